// Host interface of sae_backward.cu: launch plan and launcher. Free of torch and of the CUDA headers.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "sparse_decode.h"

namespace rk::cuda {

// How a team of threads works on a latent's entries. A thread holds `pieces` times 16 bytes of every row.
struct BackwardShape {
  int threads;  // of a team: a part of a warp, a warp, or the whole block
  int pieces;
  int batch;   // entries whose dot products are summed over the team together
  int stages;  // batches in shared memory: one is added up while the others arrive
  int block;   // threads
  int blocks;  // that shall share a multiprocessor: bounds the registers

  constexpr int row_bytes() const {
    return threads * pieces * 16;
  }
  constexpr int teams() const {
    return block / threads;
  }
  constexpr bool operator==(const BackwardShape&) const = default;
};

// By ascending width. Shared memory: 34, 36, 56, 36, 72 and 80 KB a block.
inline constexpr BackwardShape kBackwardShapes[] = {
    {16, 1, 4, 2, 128, 6},  {32, 2, 2, 2, 128, 4},  {32, 4, 1, 3, 128, 3},
    {128, 2, 2, 2, 128, 4}, {256, 2, 2, 2, 256, 2}, {512, 2, 1, 2, 512, 1},
};
inline constexpr int kWidestBackward = 5;  // its width is also that of the column chunks of wider rows
// Of the slow path, for rows that do not begin at 16-byte boundaries.
inline constexpr int kUnalignedBackward[] = {2, kWidestBackward};

// Bytes of shared memory of a team: the ring of e and x, the decoder's row, the sums of its warps per stage.
inline constexpr int backward_team_bytes(const BackwardShape& shape) {
  const int sums = shape.threads > 32 ? shape.stages * shape.batch * (shape.threads / 32) * 4 : 0;
  return (shape.stages * shape.batch * 2 + 1) * shape.row_bytes() + sums;
}

struct BackwardSplit {
  int shape;   // of kBackwardShapes
  int vector;  // columns of a piece
  int64_t chunks;  // of the columns; more than one: the dot products come from a pass of their own
  int shared;      // bytes of a block
};

inline constexpr BackwardSplit split_backward(int64_t d, RowType type, bool aligned16) {
  const int vector = 16 / row_bytes(type);
  const int64_t pieces = (d + vector - 1) / vector;
  int shape = kWidestBackward;
  for (int i = kWidestBackward; i >= 0; --i) {
    const bool known = aligned16 || i == kUnalignedBackward[0] || i == kUnalignedBackward[1];
    if (known && kBackwardShapes[i].row_bytes() >= pieces * 16) shape = i;
  }
  const BackwardShape& s = kBackwardShapes[shape];
  const int64_t widest = s.row_bytes() / 16;
  return {shape, vector, (pieces + widest - 1) / widest, s.teams() * backward_team_bytes(s)};
}

// Programs: one for every segment of a hot latent, then one for every latent. A block has a team for each.
inline constexpr Grid backward_grid(int64_t programs, const BackwardSplit& split) {
  const int teams = kBackwardShapes[split.shape].teams();
  return {(programs + teams - 1) / teams, split.chunks};
}

// T is the row type. Entries stand in the order of their latents, those of a latent by ascending row: latent f has
// offsets[f] .. offsets[f + 1]. One with more than `segment` of them is hot: cut into segments, of which `ends` counts
// those of the latents up to and including f, and segment_latent says whose a segment is (`latents`: nobody's).
struct BackwardArgs {
  const void* e;           // [rows, d] T
  const void* x;           // [rows, d] T
  const void* W_dec;       // [latents, d] T
  const float* b_dec;      // [latents / head_latents, d], or null
  const float* scale;      // one number
  const int32_t* tokens;   // [entries] the entry's row of e and x
  const void* values;      // [entries] T
  const int64_t* offsets;  // [latents + 1]
  const int64_t* ends;     // [latents]
  const int64_t* segment_latent;  // [segments]
  float* dW_enc;                  // [latents, d]
  float* db_enc;                  // [latents]
  float* dW_dec;                  // [latents, d]
  float* part_enc;                // [segments, d], part_db [segments], part_dec [segments, d]: of hot latents
  float* part_db;
  float* part_dec;
  float* dots;  // [entries] <e, W_dec>, where there is more than one chunk
  int latents, segments, segment, head_latents, d;
  bool accumulate;  // add to the gradients; else overwrite them, with zeros where a latent has no entries
};

// Null on success, else the text of the CUDA error. Pointers are device pointers, `stream` is a cudaStream_t.
const char* sae_backward(RowType type, const BackwardArgs& args, void* stream);

// The parts of hot latents alone.
const char* sae_backward_parts(RowType type, const BackwardArgs& args, void* stream);

// Whether rows are at 16-byte boundaries, as the fast path needs them.
inline bool backward_is_aligned(RowType type, const BackwardArgs& a) {
  const std::initializer_list<const void*> rows = {a.e,      a.x,      a.W_dec,    a.b_dec,
                                                   a.dW_enc, a.dW_dec, a.part_enc, a.part_dec};
  uintptr_t all = 0;
  for (const void* p : rows) {
    all |= reinterpret_cast<uintptr_t>(p);
  }
  return all % 16 == 0 && a.d % (16 / row_bytes(type)) == 0;
}

}  // namespace rk::cuda
