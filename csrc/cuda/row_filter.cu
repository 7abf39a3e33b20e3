// The row filter of topk_encode: what the chunked encoder does with a chunk of pre-activations.
//
//   keys of a row = the k largest of relu(pre + bias) over all chunks so far, and what else the list holds
//
// A warp owns a row (row_filter_warp.h): 16-byte loads, two steps of 256 columns on their way while one is judged, 64
// KB of a multiprocessor's 32 warps; pre-activations leave the caches first, the bias stays in L1. An addition, a
// comparison and no more per column, and one vote to skip a step without survivors. A step with some asks column by
// column, 32 lanes at a time, and appends by ballot: 28 instructions and 18 a column that appends. No barrier between
// warps, no atomics, one order: the same input gives the same bits.
//
// A Gaussian row of F 131072 at k 64, in chunks of 4096: some 200 of its 512 steps have survivors, 365 columns of 32
// lanes append, 9.5 reductions of 11 bits each; 42 thousand instructions, of which 15 for the 30 of every step. The
// tests count the events (test_what_a_canonical_row_costs), SASS for sm_90a is where the instructions of each were
// counted, by hand: inputs of the prediction, not measurements.
//
// Prediction for all chunks of N 32768, F 131072, k 64 on an H200: 17.2 GB at 4.2 TB/s, 4.1 ms; 1.5 ms of issue slots
// (132 x 4 a cycle at 1.75 GHz) beneath them; 4 us of launch and drain in each of 128 chunks, 0.5 ms. So the encoder in
// 55 to 56 ms, where the product alone takes 50.7.
//
// STATUS: compiled for sm_80, sm_90a, sm_100 and sm_120 without spills; the algorithm is run by 32 fibers on the CPU
// (tests/test_row_filter.py). This form has not been run on a GPU. The one before it was measured on an H200,
// 2026-11-27: the encoder took 62.5 ms with it, 62.0 with Triton's filter and 50.7 for the product alone; the latents
// of 256 rows were those of a stable sort. So the dispatcher uses it on explicit request only.

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
  static __device__ __forceinline__ uint32_t max(uint32_t own) {
    return __reduce_max_sync(kAll, own);
  }
  static __device__ __forceinline__ uint32_t min(uint32_t own) {
    return __reduce_min_sync(kAll, own);
  }
  // -1 of 0.
  static __device__ __forceinline__ int highest_bit(uint32_t bits) {
    return 31 - __clz(static_cast<int>(bits));
  }
  static __device__ __forceinline__ void sync() {
    __syncwarp(kAll);
  }
  template <int kVector>
  static __device__ __forceinline__ void load(const float* from, float* to) {
    if constexpr (kVector == 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(from));
      to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    } else {
      to[0] = __ldg(from);
    }
  }
  // Keeps the compiler from computing it again where it is used again, for which it would copy what it is made of.
  static __device__ __forceinline__ float once(float value) {
    asm("" : "+f"(value));
    return value;
  }
  // What no one reads again leaves the caches first.
  template <int kVector>
  static __device__ __forceinline__ void load_once(const float* from, float* to) {
    if constexpr (kVector == 4) {
      const float4 four = __ldcs(reinterpret_cast<const float4*>(from));
      to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    } else {
      to[0] = __ldcs(from);
    }
  }
};

template <int kVector>
__global__ void __launch_bounds__(32 * kFilterWarps, 4) filter_rows(const FilterArgs args) {
  __shared__ uint64_t lists[kFilterWarps][kFilterCapacity];
  // By a shuffle, so that the compiler knows that all lanes have the same.
  const int warp = __shfl_sync(DeviceWarp::kAll, static_cast<int>(threadIdx.x / 32), 0);
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
