// The hardware's team of threads, and the row type that needs CUDA's own conversions, for the latent-major kernels.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "sae_backward_team.h"

namespace rk::cuda {

struct Float16Row {
  using Element = uint16_t;
  static constexpr int kVector = 8;
  static __device__ __forceinline__ float to_float(uint16_t x) {
    return __half2float(__ushort_as_half(x));
  }
  static __device__ __forceinline__ void unpack(const Words& from, float (&to)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = to_float(static_cast<uint16_t>(from.word[i] & 0xffffu));
      to[2 * i + 1] = to_float(static_cast<uint16_t>(from.word[i] >> 16));
    }
  }
  static __device__ __forceinline__ uint16_t of_float(float x) {
    return __half_as_ushort(__float2half_rn(x));
  }
};

// A part of a warp, a warp, or the whole block.
template <int kSize>
struct DeviceTeam {
  static constexpr int kThreads = kSize, kLanes = kSize < 32 ? kSize : 32;

  // The team's in this warp: teams that share one go their own ways.
  static __device__ __forceinline__ unsigned lanes() {
    return kSize < 32 ? ((1u << kLanes % 32) - 1) << (threadIdx.x % 32 / kLanes * kLanes) : 0xffffffffu;
  }
  static __device__ __forceinline__ int rank() {
    return static_cast<int>(kSize > 32 ? threadIdx.x : threadIdx.x % kSize);
  }
  static __device__ __forceinline__ float shuffle_xor(float own, int distance) {
    return __shfl_xor_sync(lanes(), own, distance, kLanes);
  }
  static __device__ __forceinline__ void barrier() {
    if constexpr (kSize > 32) {
      __syncthreads();
    } else {
      __syncwarp(lanes());
    }
  }
  // No load is moved up across this: the compiler would rather spill than wait for shared memory.
  static __device__ __forceinline__ void not_before_here() {
    __syncwarp(lanes());
  }
  // 16 bytes on their way from global to shared memory, or zeros.
  static __device__ __forceinline__ void copy(void* to, const void* from, bool live) {
    const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(live ? 16 : 0)
                 : "memory");
  }
  static __device__ __forceinline__ void commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  // Until all but the newest `kPending` groups of this thread are there.
  template <int kPending>
  static __device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }
  static __device__ __forceinline__ Words from_ring(const unsigned char* at) {
    const uint4 four = *reinterpret_cast<const uint4*>(at);
    return {four.x, four.y, four.z, four.w};
  }
  static __device__ __forceinline__ Words load(const void* from) {
    const uint4 four = __ldg(static_cast<const uint4*>(from));
    return {four.x, four.y, four.z, four.w};
  }
  // Both to two units in the last place; the divisor from 2^-126 to 2^126.
  static __device__ __forceinline__ float quotient(float x, float by) {
    return __fdividef(x, by);
  }
  static __device__ __forceinline__ float root(float x) {
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
    return root;
  }
  // A line of 128 bytes on its way to the L2 cache.
  static __device__ __forceinline__ void prefetch(const void* line) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
  }
};

}  // namespace rk::cuda
