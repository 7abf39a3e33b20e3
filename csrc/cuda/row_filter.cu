// The row filter of topk_encode: what the chunked encoder does with a chunk of pre-activations that lies in the L2 cache.
//
//   keys of a row = the k largest of relu(pre + bias) over all chunks so far, and what else the list holds
//
// A warp owns a row (row_filter_warp.h): 16-byte loads, the next 256 columns on their way while these are judged, one vote
// to skip a step without survivors, which after the first columns is nearly all of them. No barrier between warps, no
// atomics, one order: the same input gives the same bits.
//
// Bytes: rows * columns * 4 read from L2, the bias from L1, what a chunk appends to a row's list, and the whole list where
// it is reduced (some three times over all chunks at F 131072). Per 8 columns a lane issues 4 loads and some 50
// instructions. Prediction for all chunks of N 32768, F 131072, k 64 on an H200: 17.2 GB at 5.5 TB/s
// of L2, 3.1 ms; 7 instructions a column, 1.0 ms of issue slots.
//
// STATUS: compiled for sm_80, sm_90a, sm_100 and sm_120 without spills; the algorithm is run by 32 fibers on the CPU
// (tests/test_row_filter.py). Measured on an H200, 2026-11-27: the encoder takes 62.5 ms with it, 62.0 with Triton's
// filter and 50.7 for the product alone, so three times the prediction at least; the latents of 256 rows were those of a
// stable sort. So the dispatcher uses it on explicit request only. Its value tests have not been run on a GPU.

#include "row_filter_warp.h"

#include <cuda_runtime.h>

namespace rk::cuda {
namespace {

struct DeviceWarp {
  static constexpr uint32_t kAll = 0xffffffffu;

  static __device__ __forceinline__ int lane() {
    return static_cast<int>(threadIdx.x % 32);
  }
  static __device__ __forceinline__ bool any(bool condition) {
    return __any_sync(kAll, condition);
  }
  static __device__ __forceinline__ uint32_t ballot(bool condition) {
    return __ballot_sync(kAll, condition);
  }
  static __device__ __forceinline__ int lanes_of(uint32_t lanes) {
    return __popc(lanes);
  }
  // How many of `lanes` come before this one.
  static __device__ __forceinline__ int lanes_below(uint32_t lanes) {
    return __popc(lanes & ((1u << lane()) - 1));
  }
  static __device__ __forceinline__ int sum(int own) {
    return static_cast<int>(__reduce_add_sync(kAll, static_cast<unsigned>(own)));
  }
  // The sum over the lanes before this one.
  static __device__ __forceinline__ int sum_before(int own) {
    int upto = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(kAll, upto, distance);
      upto += lane() >= distance ? other : 0;
    }
    return upto - own;
  }
  static __device__ __forceinline__ void sync() {
    __syncwarp(kAll);
  }
  template <int kVector>
  static __device__ __forceinline__ void load(const float* from, float* to) {
    if constexpr (kVector == 4) {
      const float4 four = *reinterpret_cast<const float4*>(from);
      to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    } else {
      to[0] = *from;
    }
  }
};

template <int kVector>
__global__ void __launch_bounds__(32 * kFilterWarps, 4) filter_rows(const FilterArgs args) {
  __shared__ uint64_t lists[kFilterWarps][kFilterCapacity];
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFilterWarps + warp;
  if (row < args.rows) {  // the same for all lanes of a warp
    filter_row<DeviceWarp, kVector>(args, row, lists[warp]);
  }
}

}  // namespace

const char* row_filter(const FilterArgs& args, void* stream) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool vector = args.columns % 4 == 0 && aligned(args.pre) && aligned(args.bias + args.first);
  const auto kernel = vector ? filter_rows<4> : filter_rows<1>;
  const unsigned blocks = static_cast<unsigned>((args.rows + kFilterWarps - 1) / kFilterWarps);
  kernel<<<blocks, 32 * kFilterWarps, 0, static_cast<cudaStream_t>(stream)>>>(args);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace rk::cuda
