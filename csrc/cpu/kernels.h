// The kernels as raw-pointer functions, one set per instruction set. All matrices are row-major and contiguous, all
// shapes int64, rows of type R (float, double, BF16, F16), biases and accumulation in Compute<R>. Callers have checked
// shapes and that every index is in [0, F); an output never overlaps an input unless it is named in place.
#pragma once

#include <atomic>
#include <cstdint>

#include "csr_pool.h"
#include "threads.h"
#include "types.h"

namespace rk {

template <class R>
struct EncodeArgs {
  const R* x;                // [N, d]
  const R* W;                // [F, d]
  const Compute<R>* b_enc;   // [F]
  const Compute<R>* b_dec;   // [d] or null
  int64_t N, d, F, k;
  R* values;                 // [N, k]
  int64_t* indices;          // [N, k]
};

// An encoder whose rows keep any number of latents: each thread's finds go to a pool of its own.
template <class R>
struct CsrEncodeArgs {
  EncodeArgs<R> all;           // k, values and indices are not used
  const Compute<R>* least;     // [F] or null: what a latent must exceed; null: the limit that the pools share
  CsrPool<Compute<R>>* pools;  // [parts]; a row's latents arrive in ascending order, pool after pool
  int64_t parts;               // at most so many threads
};

template <class R, class I>
struct DecodeArgs {
  const R* values;           // [N, k]
  const R* mask;             // [N, k] or null: entries whose mask is 0 count as 0
  const I* indices;          // [N, k]
  const R* W;                // [F, d]
  const Compute<R>* b_dec;   // [d] or null
  const R* x;                // [N, d] or null: subtracted from the result
  int64_t N, k, d, F;
  R* out;                    // [N, d]
  Compute<R>* sq;            // [N] or null: ||out_n||^2 before rounding to R
  std::atomic<bool>* refused;  // set where an index is not in [0, F); such tokens are left out
  // [N + 1] or null: token n owns the entries offsets[n] .. offsets[n + 1] instead of n k .. (n + 1) k.
  const int64_t* offsets = nullptr;
};

// Activations by latent: the hits of latent f are hits[offsets[f] .. offsets[f + 1]) in token order. Activation (token,
// slot) is the entry token k + slot of the code; of a CSR code slot is the entry's number and k counts as 0.
struct Hit {
  uint32_t token;
  uint32_t slot;
};
struct LatentMajor {
  const int64_t* offsets;    // [F + 1]
  const Hit* hits;
};

template <class R, class I>
struct DotArgs {
  const R* grad;             // [N, d]
  const I* indices;          // [N, k]
  const R* W;                // [F, d]
  int64_t N, k, d;
  R* dvalues;                // [N, k]: <grad_n, W[i_j]>
  // As in DecodeArgs.
  const int64_t* offsets = nullptr;
};

// Gradient of one weight matrix from the latent-major list: dW[f] = sum_hits coefficient * (rows[token] - shift).
template <class R>
struct WeightGradArgs {
  LatentMajor list;
  const R* rows;             // [N, d]
  const Compute<R>* shift;   // [d] or null
  const R* values;           // [N, k] coefficient
  const R* mask;             // [N, k] or null: hits whose mask is 0 count as 0
  const R* W;                // [F, d]; needed with dvalues only
  int64_t F, k, d;
  R* dvalues;                // [N, k] or null: <rows[token], W[f]>
  R* dW;                     // [F, d] or null, overwritten
  Compute<R>* db;            // [F] or null, overwritten: sum of coefficients
};

template <class R>
struct SaeGradArgs {
  LatentMajor list;          // hits of value 0 left out: they carry no gradient
  const R* e;                // [N, d]
  const R* x;                // [N, d]
  const R* values;           // [N, k]
  const R* W_dec;            // [F, d]
  const Compute<R>* b_dec;   // [d] or null
  int64_t F, k, d;
  Compute<R> scale;
  Compute<R>* dW_enc;        // [F, d], accumulated into
  Compute<R>* db_enc;        // [F], accumulated into
  Compute<R>* dW_dec;        // [F, d], accumulated into
};

template <class T>
struct AdamScalars {
  T beta1, beta2, eps;
  T rest1, rest2;            // 1 - beta, subtracted in fp64: 1 - 0.999f has only 17 good bits
  T step;                    // lr / bias_corr1
  T denom_scale;             // 1 / sqrt(bias_corr2)
};

template <class R>
struct SaeAdamArgs {
  LatentMajor list;
  const R* e;
  const R* x;
  const R* values;
  const Compute<R>* b_dec;   // [d] or null
  int64_t F, k, d;
  Compute<R> scale;
  R *W_enc, *b_enc, *W_dec;  // in place
  R *m_W_enc, *v_W_enc, *m_b_enc, *v_b_enc, *m_W_dec, *v_W_dec;
  AdamScalars<Compute<R>> adam;
  bool remove_parallel, unit_norm;
  const int64_t* extra_position;  // [F] or null: row of the extra gradients that belongs to latent f, or -1
  const Compute<R>*extra_dW_enc, *extra_db_enc, *extra_dW_dec;
  Compute<R>* db_times_W_enc;  // [d]: sum_f db_enc[f] * W_enc[f] before the update
};

template <class R>
struct AdamRowsArgs {
  R* W;                      // [rows, d] in place
  const R* g;
  R *m, *v;
  int64_t rows, d;
  Compute<R> grad_scale;
  AdamScalars<Compute<R>> adam;
  bool remove_parallel, unit_norm;
};

// The same on state in fewer bytes (refusal_kernels/compact.py).
struct CompactAdamArgs {
  float* W;                  // [rows, d] in place, or null: then in halves
  BF16* high;                // [rows, d] fp32 master weights rounded to bf16, half-way cases away from zero, and
  int16_t* low;              // the words by which they differ
  const float* g;
  float *m, *v;              // [rows, d], or null: then in bf16, rounded stochastically
  BF16 *m16, *v16;
  int64_t rows, d;
  float grad_scale;
  AdamScalars<float> adam;
  bool remove_parallel, unit_norm;
  uint32_t salt;
};

enum class Element { kCompute, kBFloat16, kHalf };  // what a tensor of compute type T holds: T itself, or less

// A dimension of a tensor that is not projected.
struct ProjectionAxis {
  int64_t size, from_stride, to_stride;
};

// The fibres of one tensor along the projected dimension. Entries with the same basis stand one after the other.
template <class T>
struct ProjectionEntry {
  Element type;
  const void* from;
  void* to;                  // the same tensor in place, or another one without a common element
  int64_t from_stride, to_stride;  // of the projected dimension
  const ProjectionAxis* other;
  int64_t others;
  int64_t fibres;            // product of the other dimensions; not 0
  const T* basis;            // [n, r]
  int64_t n, r;              // not 0
  const T* against;          // [r] or null: only fibres whose coefficients have a negative product with it
};

template <class T>
struct ProjectionArgs {
  const ProjectionEntry<T>* entries;
  int64_t count;
  T strength;
};

// What the latest topk_encode of the process did with its screen (screened_encode.h); all 0 without one.
struct EncodeCounts {
  std::atomic<int64_t> screened{0};  // rows
  std::atomic<int64_t> computed{0};  // their pairs that were computed in fp32
  std::atomic<int64_t> repeated{0};  // rows whose guessed threshold was too high
};
inline EncodeCounts encode_counts;

#define RK_DECLARE_KERNELS(ISA)                                   \
  namespace ISA {                                                 \
  template <class R>                                              \
  void topk_encode(const EncodeArgs<R>&, const Threads&);         \
  template <class R>                                              \
  void csr_encode(const CsrEncodeArgs<R>&, const Threads&);       \
  template <class R, class I>                                     \
  void sparse_decode(const DecodeArgs<R, I>&, const Threads&);    \
  template <class R, class I>                                     \
  void row_dots(const DotArgs<R, I>&, const Threads&);            \
  template <class R>                                              \
  void weight_grad(const WeightGradArgs<R>&, const Threads&);     \
  template <class R>                                              \
  void sae_backward(const SaeGradArgs<R>&, const Threads&);       \
  template <class R>                                              \
  void sae_backward_adam(const SaeAdamArgs<R>&, const Threads&);  \
  template <class R>                                              \
  void adam_rows(const AdamRowsArgs<R>&, const Threads&);         \
  void adam_compact_rows(const CompactAdamArgs&, const Threads&); \
  template <class T>                                              \
  void project_out(const ProjectionArgs<T>&, const Threads&);     \
  }

RK_DECLARE_KERNELS(baseline)
RK_DECLARE_KERNELS(avx2)
RK_DECLARE_KERNELS(avx512)
namespace avx512_vnni {
template <class R>
void topk_encode(const EncodeArgs<R>&, const Threads&);  // float, BF16, F16
}
#undef RK_DECLARE_KERNELS

}  // namespace rk
