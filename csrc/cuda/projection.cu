// project_out for hundreds of tensors in place, one launch: G -= s U (U^T G) along one dimension of each.
//
// 16 vectors of G's numbers, all of them for a LoRA matrix, belong to a team of 1, 2, 4 or 8 blocks of a cluster, which cut
// the projected dimension into slabs (projection_block.h). Each makes its part of U^T G; the parts are added through
// distributed shared memory in the order of the blocks, each block a share of them, which it gives to all; then each
// updates its slab. Without clusters, below sm_90, the parts go through device memory to a second launch, to the same
// bits. Table and items lie in device memory, made once for a plan. No atomics, every sum has one order.
//
// Why a ring, and not whole slabs in shared memory: at r = 64 a slab of 4096 / 8 rows is 128 KB of U and 32 of G, one block
// a multiprocessor, and streams nothing while it waits for its cluster; 14336 rows are 4.6 MB, more than 16 blocks of
// 227 KB. With 80 KB of ring two blocks share a multiprocessor, of 4 tiles of 64 rows each: the update begins with those,
// half of a slab of 512 rows, and asks for the others again, the latest first. Second reads in flight, at r = 64:
// 264 blocks times 80 KB (4096 rows) to 490 KB (14336 rows), on average half of that at a time, beside 50 MB of L2.
//
// Any strides; wide copies where neighbouring fibres are neighbours in memory (B [out, 16]), or 4 bytes at a time along
// the projected dimension (A [16, in]), which turns the matrix on its way; 16-bit numbers are widened in shared memory.
//
// Roofline (448 LoRA matrices of an 8B model, rank 16, fp32; H200, 4.22 TB/s, 67 TFLOP/s of FMA), at r = 8, 64, 128:
//   bytes    G twice, U once           0.41, 0.91, 1.48 GB        0.10, 0.22, 0.35 ms
//   FMA      4 r for each of 42 M      1.3, 10.7, 21.5 GFLOP      0.02, 0.16, 0.32 ms at peak
//   issue    850 instructions of a warp for 512 FMA (r = 64)      0.06, 0.30, 0.60 ms
// A lane's sums are 8 columns of U by 8 fibres: 4 loads of 16 bytes from shared memory for 64 FMA. Issue slots, not bytes,
// are the limit from r = 64 on; tf32x3 on tensor cores would take a third of them.
// Prediction for the launch: 0.14, 0.36, 0.72 ms; eager adds what ProjectionPlan asks of 448 tensors, 0.1 to 0.2 ms.
// Triton's two launches take 0.25, 0.50, 0.94 ms in a CUDA graph.
//
// STATUS: compiled for sm_80, sm_90a, sm_100 and sm_120 without spills; the algorithm is run by fibers on the CPU
// (tests/test_cuda_projection.py). Measured on an H200 in a CUDA graph, 2026-11-27: 0.28, 0.77, 1.41 ms, twice the
// prediction and slower than Triton's; errors as the reference's. So the dispatcher uses it on explicit request only. Its
// value tests have not been run on a GPU.

#include "projection_block.h"

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>

namespace rk::cuda {
namespace {

struct DeviceBlock {
  static __device__ __forceinline__ int thread() {
    return static_cast<int>(threadIdx.x);
  }
  static __device__ __forceinline__ int lane() {
    return static_cast<int>(threadIdx.x % 32);
  }
  static __device__ __forceinline__ float shuffle_xor(float own, int distance) {
    return __shfl_xor_sync(0xffffffffu, own, distance);
  }
  static __device__ __forceinline__ void barrier() {
    __syncthreads();
  }
  template <int kWarps>
  static __device__ __forceinline__ void crew_barrier(int crew) {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(crew + 1), "n"(32 * kWarps) : "memory");
    }
  }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  static __device__ __forceinline__ int cluster_rank() {
    return static_cast<int>(cooperative_groups::this_cluster().block_rank());
  }
  static __device__ __forceinline__ void cluster_barrier() {
    cooperative_groups::this_cluster().sync();
  }
  // The same place in the shared memory of another block of the cluster.
  static __device__ __forceinline__ float* remote(float* own, int block) {
    return cooperative_groups::this_cluster().map_shared_rank(own, block);
  }
#endif
  // `bytes` of 16 (4) on their way from global to shared memory, zeros behind them.
  static __device__ __forceinline__ void copy16(float* to, const void* from, int bytes) {
    const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(bytes)
                 : "memory");
  }
  static __device__ __forceinline__ void copy4(float* to, const void* from, int bytes) {
    const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 4, %2;" ::"r"(target), "l"(from), "r"(bytes)
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
  static __device__ __forceinline__ float widen(RowType type, uint16_t x) {
    return type == RowType::kBFloat16 ? __uint_as_float(static_cast<unsigned>(x) << 16)
                                      : __half2float(__ushort_as_half(x));
  }
  static __device__ __forceinline__ uint16_t narrow(RowType type, float x) {
    return type == RowType::kBFloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x))
                                      : __half_as_ushort(__float2half_rn(x));
  }
};

template <int kIndex>
__global__ void __launch_bounds__(kProjectionThreads, 2) project_cluster(const __grid_constant__ ProjectionArgs args) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char memory[];
  project_in_cluster<DeviceBlock, kIndex>(args, static_cast<int>(blockIdx.x), memory);
#else
  __trap();
#endif
}

template <int kIndex>
__global__ void __launch_bounds__(kProjectionThreads, 2) project_parts(const __grid_constant__ ProjectionArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  parts_of_block<DeviceBlock, kIndex>(args, static_cast<int>(blockIdx.x), memory);
}

template <int kIndex>
__global__ void __launch_bounds__(kProjectionThreads, 2) project_update(const __grid_constant__ ProjectionArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  update_of_block<DeviceBlock, kIndex>(args, static_cast<int>(blockIdx.x), memory);
}

using Kernel = void (*)(ProjectionArgs);

struct Kernels {
  Kernel cluster, parts, update;
};

template <int kIndex>
constexpr Kernels kKernels = {project_cluster<kIndex>, project_parts<kIndex>, project_update<kIndex>};

Kernels kernels_of(int shape) {
  static_assert(kProjectionForms == 6);
  const Kernels all[] = {kKernels<0>, kKernels<1>, kKernels<2>, kKernels<3>, kKernels<4>, kKernels<5>};
  return all[shape];
}

cudaLaunchConfig_t launch_of(int shape, int64_t blocks, cudaStream_t stream, cudaLaunchAttribute* cluster, int team) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kProjectionThreads);
  config.dynamicSmemBytes = static_cast<size_t>(kProjectionShapes[shape].shared_bytes());
  config.stream = stream;
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim = {static_cast<unsigned>(team), 1, 1};
  config.attrs = cluster;
  config.numAttrs = 1;
  return config;
}

// Once for every device and shape: the shared memory that its kernels may have, and whether clusters run.
enum Setup : int { kUnknown, kPlain, kClusters };
constexpr int kMostDevices = 64;
std::atomic<int> setups[kMostDevices][kProjectionForms];

cudaError_t set_up(int shape, Setup* found) {
  int device = 0, clusters = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
    return error;
  }
  if (device >= kMostDevices) {
    return cudaErrorInvalidDevice;
  }
  *found = static_cast<Setup>(setups[device][shape].load(std::memory_order_relaxed));
  if (*found != kUnknown) {
    return cudaSuccess;
  }
  const Kernels kernels = kernels_of(shape);
  for (const Kernel kernel : {kernels.cluster, kernels.parts, kernels.update}) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kProjectionShapes[shape].shared_bytes());
    if (error != cudaSuccess) {
      return error;
    }
  }
  *found = kPlain;
  if (cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device) == cudaSuccess && clusters != 0) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = launch_of(shape, kClusterBlocks, nullptr, &attribute, kClusterBlocks);
    int active = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&active, kernels.cluster, &config);
    *found = error == cudaSuccess && active > 0 ? kClusters : kPlain;
    cudaGetLastError();  // a device slice too small for a cluster is no error
  }
  setups[device][shape].store(*found, std::memory_order_relaxed);
  return cudaSuccess;
}

}  // namespace

bool projection_has_clusters(int shape) {
  Setup found = kUnknown;
  return set_up(shape, &found) == cudaSuccess && found == kClusters;
}

const char* project_out(int shape, const ProjectionArgs& args, int64_t blocks, void* stream_of_torch) {
  if (blocks > kMaxGridX) {
    return "too many matrices for one launch";
  }
  const auto stream = static_cast<cudaStream_t>(stream_of_torch);
  Setup setup = kUnknown;
  cudaError_t error = set_up(shape, &setup);
  if (error != cudaSuccess) {
    return cudaGetErrorString(error);
  }
  const Kernels kernels = kernels_of(shape);
  cudaLaunchAttribute attribute;
  const int team = args.table == nullptr ? args.single_team : kClusterBlocks;
  cudaLaunchConfig_t config = launch_of(shape, blocks, stream, &attribute, team);
  if (setup == kClusters) {
    error = cudaLaunchKernelEx(&config, kernels.cluster, args);
  } else if (args.parts == nullptr) {
    return "without clusters it needs a workspace";
  } else {
    config.numAttrs = 0;
    error = cudaLaunchKernelEx(&config, kernels.parts, args);
    if (error == cudaSuccess) {
      error = cudaLaunchKernelEx(&config, kernels.update, args);
    }
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace rk::cuda
