// Host interface of sparse_decode.cu: launch plan and launchers. Free of torch and of the CUDA headers, so that
// module.cpp can report the plan on a machine without either.
#pragma once

#include <cstdint>

namespace rk::cuda {

enum class RowType : int { kFloat32, kBFloat16, kFloat16 };

inline constexpr int row_bytes(RowType type) {
  return type == RowType::kFloat32 ? 4 : 2;
}

inline constexpr int kThreads = 256;        // per block, 8 warps
inline constexpr int kEntriesPerGroup = 4;  // dvalues: decoder rows that share one read of the gradient row
inline constexpr int64_t kMaxGridX = 2147483647, kMaxGridY = 65535;

// How a row of d elements is cut up: `lanes` neighbouring threads form a group and read `lanes * vector` neighbouring
// columns at a time.
struct RowSplit {
  int vector;      // elements per load: 16 bytes' worth, or 1 where rows do not start at 16-byte boundaries
  int lanes;       // threads per group, 16 or 32
  int groups;      // groups per block
  int64_t slices;  // ceil(d / (lanes * vector)): grid.y of the row sums
};

inline constexpr RowSplit split_row(int64_t d, RowType type, bool aligned16) {
  const int full = 16 / row_bytes(type);
  const int vector = aligned16 && d % full == 0 ? full : 1;
  const int64_t pieces = d / vector;
  // Short rows get short groups: at d = 128 in bf16 half of a warp's lanes would be without a column.
  const int lanes = vector > 1 && pieces <= 16 ? 16 : 32;
  return {vector, lanes, kThreads / lanes, (pieces + lanes - 1) / lanes};
}

struct Grid {
  int64_t x, y;
};

// Blocks for the sum of rows over `segments` tokens or latents. Column slices are the slow dimension: the slice of all
// F rows that the resident blocks read is lanes * vector columns wide and stays in L2 where the whole matrix would not.
inline constexpr Grid sum_grid(int64_t segments, const RowSplit& split) {
  return {(segments + split.groups - 1) / split.groups, split.slices};
}

// Blocks for dvalues: a group takes kEntriesPerGroup entries of one token over the whole row.
inline constexpr Grid dots_grid(int64_t n, int64_t k, const RowSplit& split) {
  const int64_t items = n * ((k + kEntriesPerGroup - 1) / kEntriesPerGroup);
  return {(items + split.groups - 1) / split.groups, 1};
}

// All pointers are device pointers to contiguous data; `stream` is a cudaStream_t. The results are null on success,
// else the text of the CUDA error. n_rows and n_latents must be below 2^31.

// out [n, d] = bias [d] (or none) + sum_j values [n, k]_j * W_dec[indices [n, k]_j]
const char* sparse_decode(
    RowType type, const void* values, const void* indices, bool indices_are_int64, const void* W_dec, const float* bias,
    void* out, int64_t n, int64_t k, int64_t n_latents, int64_t d, void* stream);

// dvalues [n, k] = <grad [n, d], W_dec[indices [n, k]]>
const char* sparse_decode_dvalues(
    RowType type, const void* grad, const void* indices, bool indices_are_int64, const void* W_dec, void* dvalues,
    int64_t n, int64_t k, int64_t n_latents, int64_t d, void* stream);

// dW_dec [F, d]_f = sum over the entries e of latent f of values_e * grad[e / k]; `order` lists the flat positions e of
// all n * k entries sorted stably by latent, and latent f owns order[offsets[f]] … order[offsets[f + 1] - 1].
const char* sparse_decode_dweight(
    RowType type, const void* grad, const void* values, const int64_t* order, const int64_t* offsets, void* dW_dec,
    int64_t k, int64_t n_latents, int64_t d, void* stream);

}  // namespace rk::cuda
