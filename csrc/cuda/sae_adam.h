// Host interface of sae_adam.cu: launch plan and launcher. Free of torch and of the CUDA headers.
#pragma once

#include <cstdint>

#include "sae_backward.h"

namespace rk::cuda {

// Teams of a head that share its latents, or fewer where it has fewer. A constant, so that the order of what is summed
// over latents does not depend on the GPU; at d = 4096 eight turns of the 264 blocks that an H200 holds.
inline constexpr int kAdamTeams = 2048;

inline constexpr int adam_teams(int head_latents) {
  return head_latents < kAdamTeams ? head_latents : kAdamTeams;
}

// Bytes of shared memory of a team: what the gradients take, and three numbers of every warp for the sums over a row.
inline constexpr int kRowSums = 3;
inline constexpr int adam_team_bytes(const BackwardShape& shape) {
  return backward_team_bytes(shape) + (shape.threads > 32 ? kRowSums * (shape.threads / 32) * 4 : 0);
}

inline constexpr Grid adam_grid(int64_t heads, int head_latents, const BackwardSplit& split) {
  const int teams = kBackwardShapes[split.shape].teams();
  return {(heads * adam_teams(head_latents) + teams - 1) / teams, 1};
}

// State of one matrix [latents, d]. Weights are fp32 numbers, or with `low` fp32 numbers in halves, of which `weights` is
// the upper one, rounded to bf16. Moments are fp32, or bf16 rounded stochastically by the hash that begins with `salt`.
struct StateRows {
  void* weights;
  int16_t* low;   // or null
  void* m;
  void* v;
  void* copy;     // [latents, d] T: becomes the weights, rounded to nearest; or null
  uint32_t salt;  // of refusal_kernels.compact
};

// One step of Adam from the gradients that `entries` says: its W_dec are the weights as the forward pass saw them, its
// parts those of the hot latents, its dW_enc, db_enc, dW_dec and dots are not used.
struct AdamArgs {
  BackwardArgs entries;
  StateRows enc, dec;
  float* b_enc;  // [latents], its moments m_b and v_b
  float* m_b;
  float* v_b;
  // What is added to the gradients of some latents (AuxK), or null: position[head * positions + f] is the row of latent f
  // among the head's `extra_rows` rows, or negative.
  const int64_t* position;
  const float* extra_enc;  // [heads * extra_rows, d], extra_db [heads * extra_rows], extra_dec [heads * extra_rows, d]
  const float* extra_db;
  const float* extra_dec;
  int64_t positions, extra_rows;
  float* through;  // [heads, teams, d]: shares of db_enc @ W_enc, the weights as the forward pass saw them
  int heads, teams;  // teams: adam_teams of a head
  bool short_moments, remove_parallel, unit_norm;
  float step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, inverse_root_bc2;
};

// Whether the kernel takes rows of this width at these places: one chunk, all at 16-byte boundaries.
inline bool adam_takes(RowType type, const AdamArgs& a) {
  uintptr_t all = 0;
  for (const StateRows* rows : {&a.enc, &a.dec}) {
    for (const void* p : {rows->weights, static_cast<void*>(rows->low), rows->m, rows->v, rows->copy}) {
      all |= reinterpret_cast<uintptr_t>(p);
    }
  }
  for (const float* p : {a.extra_enc, a.extra_dec, static_cast<const float*>(a.through)}) {
    all |= reinterpret_cast<uintptr_t>(p);
  }
  return all % 16 == 0 && backward_is_aligned(type, a.entries) && split_backward(a.entries.d, type, true).chunks == 1;
}

// Null on success, else the text of the error. Pointers are device pointers, `stream` is a cudaStream_t.
const char* sae_backward_adam(RowType type, const AdamArgs& args, void* stream);

}  // namespace rk::cuda
