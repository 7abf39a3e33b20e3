// Host interface of row_filter.cu. Free of torch and of the CUDA headers.
#pragma once

#include <cstdint>

namespace rk::cuda {

inline constexpr int kFilterCapacity = 512;  // keys of a row's list; 4 KB of shared memory a warp
inline constexpr int kFilterMostK = 256;     // a step of kFilterCapacity - k columns must fit behind the k best
inline constexpr int kFilterWarps =
    8;       // rows of a block: 32 KB of lists; 64 registers let 4 blocks share a multiprocessor

struct FilterArgs {
  const float* pre;   // [rows, columns] pre-activations of the latents first .. first + columns, without bias
  const float* bias;  // [first + columns at least], indexed by the latent
  int64_t* keys;      // [rows, kFilterCapacity]
  int32_t* count;     // [rows]
  int32_t* limit;     // [rows]
  int64_t rows;
  int32_t columns, first, k;
  bool last;          // no chunk follows: the first k keys of a row become the result, best first
};

// Null on success, else the text of the CUDA error. Pointers are device pointers, `stream` is a cudaStream_t; 1 <= k <=
// kFilterMostK, and over all chunks of a row there are at least k columns.
const char* row_filter(const FilterArgs& args, void* stream);

}  // namespace rk::cuda
