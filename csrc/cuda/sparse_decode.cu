// sparse_decode and its gradients on the GPU.
//
//   forward    x_hat_n   = b_dec + sum_j v_nj W_dec[i_nj]      reads N k d rows' elements, writes N d
//   backward   dv_nj     = <g_n, W_dec[i_nj]>                  the same reads
//              dW_dec[f] = sum_{(n, j): i_nj = f} v_nj g_n     reads N k d of g, writes F d
//
// Two flops per element read, so all three are bound by memory: bytes = N k d * sizeof(T). A decoder that exceeds L2 is
// read column slice by column slice (blockIdx.y, the slow grid dimension): a slice of 32 x 16 bytes of every row is
// F * 512 bytes, 64 MB at F = 131072, of which the frequent latents' part stays in L2.
//
// One shape of work covers the forward pass and dW_dec: a segment (a token; a latent) sums rows of a matrix, weighted,
// in the order of its entries. A group of 16 or 32 lanes owns one segment and one slice of columns. Its lanes load
// one entry each, coalesced, and hand them round by shuffles, so that the inner loop holds nothing but 16-byte loads of
// the rows, four in flight per lane, and fp32 FMAs. No atomics, fixed order: the same input gives the same bits.
//
// An index outside [0, F) would read foreign memory, and the host cannot check it without waiting for the GPU. It costs
// one comparison per entry to read row 0 with weight NaN instead: a wrong index shows up in the loss.
//
// STATUS: compiled for sm_80, sm_90a, sm_100 and sm_120 without spills (tests/test_cuda_compile.py). What has been run
// and measured on a GPU is in the README; the dispatcher uses it on explicit request only.

#include "sparse_decode.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>

namespace rk::cuda {
namespace {

// Without a second bound ptxas aims at 32 registers for full occupancy and spills one of them on sm_90.
constexpr int kMinBlocks = 3;

// -- VEC neighbouring elements of a row, as fp32
// ------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (__is_same(T, __nv_bfloat16)) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}

template <typename T, int VEC>
union Piece {
  static_assert(VEC == 1 || VEC * sizeof(T) == 16, "a piece is one element or one 16-byte load");
  uint4 words;
  T elements[VEC];
  __device__ Piece() {}
};

template <typename T, int VEC>
__device__ __forceinline__ Piece<T, VEC> load(const T* __restrict__ from) {
  Piece<T, VEC> piece;
  if constexpr (VEC == 1) {
    piece.elements[0] = __ldg(from);
  } else {
    piece.words = __ldg(reinterpret_cast<const uint4*>(from));
  }
  return piece;
}

template <typename T, int VEC>
__device__ __forceinline__ void store(T* to, const float (&x)[VEC]) {
  Piece<T, VEC> piece;
#pragma unroll
  for (int i = 0; i < VEC; ++i) piece.elements[i] = from_float<T>(x[i]);
  if constexpr (VEC == 1) {
    *to = piece.elements[0];
  } else {
    *reinterpret_cast<uint4*>(to) = piece.words;
  }
}

// -- entries of a segment: which row, with which weight
// ------------------------------------------------------------------

struct Entry {
  int row;
  float weight;
};

struct Indices {
  const void* data;
  bool are_int64;
  int n_latents;

  // The latent of entry e, or -1 where the index is out of range. The branch on the width is the same for every thread.
  __device__ __forceinline__ int operator[](int64_t e) const {
    const int64_t f =
        are_int64 ? __ldg(static_cast<const long long*>(data) + e) : __ldg(static_cast<const int*>(data) + e);
    return f >= 0 && f < n_latents ? static_cast<int>(f) : -1;
  }
};

template <typename T>
struct EntriesOfToken {
  const T* values;
  Indices indices;
  int64_t k;

  __device__ int64_t begin(int64_t n) const {
    return n * k;
  }
  __device__ int64_t end(int64_t n) const {
    return n * k + k;
  }
  __device__ __forceinline__ Entry operator[](int64_t e) const {
    const int latent = indices[e];
    return latent < 0 ? Entry{0, __int_as_float(0x7fffffff)} : Entry{latent, to_float(__ldg(values + e))};
  }
};

template <typename T>
struct EntriesOfLatent {
  const T* values;
  const int64_t *order, *offsets;
  int64_t k;

  __device__ int64_t begin(int64_t f) const {
    return offsets[f];
  }
  __device__ int64_t end(int64_t f) const {
    return offsets[f + 1];
  }
  __device__ __forceinline__ Entry operator[](int64_t e) const {
    const int64_t position = order[e];
    return {static_cast<int>(position / k), to_float(__ldg(values + position))};
  }
};

// The threads of this thread's group of LANES, for the shuffles. Groups of one warp may leave the loop at different
// times.
template <int LANES>
__device__ __forceinline__ unsigned group_mask() {
  if constexpr (LANES == 32) {
    return 0xffffffffu;
  } else {
    return ((1u << LANES) - 1) << (threadIdx.x % 32 / LANES * LANES);
  }
}

// -- kernels
// -------------------------------------------------------------------------------------------------------------

// out[s] = bias + sum over the entries e of segment s of weight_e * rows[row_e]. Grid: segments x column slices.
template <typename T, int VEC, int LANES, typename Entries>
__global__ void __launch_bounds__(kThreads, kMinBlocks) sum_of_rows(
    Entries entries, const T* __restrict__ rows, const float* __restrict__ bias, T* __restrict__ out,
    int64_t n_segments, int64_t d) {
  const int lane = threadIdx.x % LANES;
  const unsigned mask = group_mask<LANES>();
  const int64_t segment = static_cast<int64_t>(blockIdx.x) * (kThreads / LANES) + threadIdx.x / LANES;
  if (segment >= n_segments) return;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * LANES + lane) * VEC;
  // A lane past the end of the row takes part in the shuffles and reads column 0, so the inner loop needs no predicate.
  const T* from = rows + (column < d ? column : 0);

  float sum[VEC] = {};
  const int64_t end = entries.end(segment);
  for (int64_t base = entries.begin(segment); base < end; base += LANES) {
    Entry mine{0, 0.f};
    if (base + lane < end) mine = entries[base + lane];
    const int count = end - base < LANES ? static_cast<int>(end - base) : LANES;
#pragma unroll 4
    for (int j = 0; j < count; ++j) {
      const int row = __shfl_sync(mask, mine.row, j, LANES);
      const float weight = __shfl_sync(mask, mine.weight, j, LANES);
      const Piece<T, VEC> piece = load<T, VEC>(from + row * d);
#pragma unroll
      for (int i = 0; i < VEC; ++i) sum[i] = fmaf(weight, to_float(piece.elements[i]), sum[i]);
    }
  }
  if (column >= d) return;
  if (bias != nullptr) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum[i] += __ldg(bias + column + i);
  }
  store<T, VEC>(out + segment * d + column, sum);
}

// dvalues: one group per kEntriesPerGroup entries of a token, whose rows share one read of the gradient row.
template <typename T, int VEC, int LANES>
__global__ void __launch_bounds__(kThreads, kMinBlocks) dots_with_rows(
    const T* __restrict__ grad, Indices indices, const T* __restrict__ rows, T* __restrict__ dvalues, int64_t n,
    int64_t k, int64_t d) {
  const int lane = threadIdx.x % LANES;
  const unsigned mask = group_mask<LANES>();
  const int64_t groups_per_token = (k + kEntriesPerGroup - 1) / kEntriesPerGroup;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * (kThreads / LANES) + threadIdx.x / LANES;
  const int64_t token = group / groups_per_token;
  if (token >= n) return;
  const int64_t first = group % groups_per_token * kEntriesPerGroup;

  const T* row[kEntriesPerGroup];
  float dot[kEntriesPerGroup];
#pragma unroll
  for (int u = 0; u < kEntriesPerGroup; ++u) {
    // Past the last entry the group repeats it and drops the result.
    const int latent = indices[token * k + (first + u < k ? first + u : k - 1)];
    row[u] = rows + (latent < 0 ? 0 : latent) * d;
    dot[u] = latent < 0 ? __int_as_float(0x7fffffff) : 0.f;
  }
  for (int64_t column = lane * VEC; column < d; column += LANES * VEC) {
    const Piece<T, VEC> g = load<T, VEC>(grad + token * d + column);
#pragma unroll
    for (int u = 0; u < kEntriesPerGroup; ++u) {
      const Piece<T, VEC> w = load<T, VEC>(row[u] + column);
#pragma unroll
      for (int i = 0; i < VEC; ++i) dot[u] = fmaf(to_float(g.elements[i]), to_float(w.elements[i]), dot[u]);
    }
  }
  __syncwarp(mask);
#pragma unroll
  for (int u = 0; u < kEntriesPerGroup; ++u) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
      dot[u] += __shfl_xor_sync(mask, dot[u], distance, LANES);
    }
    if (lane == u && first + u < k) dvalues[token * k + first + u] = from_float<T>(dot[u]);
  }
}

// -- launchers
// -----------------------------------------------------------------------------------------------------------

bool is_aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

const char* error_text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Calls launch<T, VEC, LANES>() for the row type and the split.
template <typename T, typename Launch>
const char* with_split(const RowSplit& split, Launch launch) {
  constexpr int kFull = 16 / static_cast<int>(sizeof(T));
  if (split.vector == 1) {
    launch.template operator()<T, 1, 32>();
  } else if (split.lanes == 16) {
    launch.template operator()<T, kFull, 16>();
  } else {
    launch.template operator()<T, kFull, 32>();
  }
  return error_text(cudaGetLastError());
}

template <typename Launch>
const char* with_type(RowType type, const RowSplit& split, Launch launch) {
  if (type == RowType::kFloat32) return with_split<float>(split, launch);
  if (type == RowType::kBFloat16) return with_split<__nv_bfloat16>(split, launch);
  return with_split<__half>(split, launch);
}

// The grid as CUDA takes it, or the reason why it does not.
const char* to_dim3(const Grid& grid, dim3& out) {
  if (grid.x > kMaxGridX || grid.y > kMaxGridY) return "too many rows or columns for one launch";
  out = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  return nullptr;
}

}  // namespace

const char* sparse_decode(
    RowType type, const void* values, const void* indices, bool indices_are_int64, const void* W_dec, const float* bias,
    void* out, int64_t n, int64_t k, int64_t n_latents, int64_t d, void* stream) {
  if (n == 0 || d == 0) return nullptr;
  const RowSplit split = split_row(d, type, is_aligned16(W_dec) && is_aligned16(out));
  dim3 grid;
  if (const char* reason = to_dim3(sum_grid(n, split), grid)) return reason;
  const Indices latents{indices, indices_are_int64, static_cast<int>(n_latents)};
  return with_type(type, split, [&]<typename T, int VEC, int LANES>() {
    const EntriesOfToken<T> entries{static_cast<const T*>(values), latents, k};
    sum_of_rows<T, VEC, LANES><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        entries, static_cast<const T*>(W_dec), bias, static_cast<T*>(out), n, d);
  });
}

const char* sparse_decode_dvalues(
    RowType type, const void* grad, const void* indices, bool indices_are_int64, const void* W_dec, void* dvalues,
    int64_t n, int64_t k, int64_t n_latents, int64_t d, void* stream) {
  if (n == 0 || k == 0) return nullptr;
  const RowSplit split = split_row(d, type, is_aligned16(W_dec) && is_aligned16(grad));
  dim3 grid;
  if (const char* reason = to_dim3(dots_grid(n, k, split), grid)) return reason;
  const Indices latents{indices, indices_are_int64, static_cast<int>(n_latents)};
  return with_type(type, split, [&]<typename T, int VEC, int LANES>() {
    dots_with_rows<T, VEC, LANES><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(grad), latents, static_cast<const T*>(W_dec), static_cast<T*>(dvalues), n, k, d);
  });
}

const char* sparse_decode_dweight(
    RowType type, const void* grad, const void* values, const int64_t* order, const int64_t* offsets, void* dW_dec,
    int64_t k, int64_t n_latents, int64_t d, void* stream) {
  if (n_latents == 0 || d == 0) return nullptr;
  const RowSplit split = split_row(d, type, is_aligned16(grad) && is_aligned16(dW_dec));
  dim3 grid;
  if (const char* reason = to_dim3(sum_grid(n_latents, split), grid)) return reason;
  return with_type(type, split, [&]<typename T, int VEC, int LANES>() {
    const EntriesOfLatent<T> entries{static_cast<const T*>(values), order, offsets, k};
    sum_of_rows<T, VEC, LANES><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        entries, static_cast<const T*>(grad), nullptr, static_cast<T*>(dW_dec), n_latents, d);
  });
}

}  // namespace rk::cuda
