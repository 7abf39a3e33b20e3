// sae_backward, latent-major: the gradients of both matrices and of the encoder's bias in one pass over e and x.
//
//   dv_nj     = scale <e_n, W_dec[i_nj]>                 where values_nj != 0, else 0
//   dW_dec[f] = scale * sum over entries (n, j) with i_nj = f of  values_nj e_n
//   dW_enc[f] = sum of dv_nj (x_n - b_dec),    db_enc[f] = sum of dv_nj
//
// A team of threads owns a latent, or a segment of a hot one (sae_backward_team.h). Rows of e and x come by cp.async into
// a ring in shared memory, a batch ahead of the one that is added up; the decoder's row lies beside it, both gradient rows
// stay in registers. One barrier serves the dot products of a batch, and two blocks share a multiprocessor, so that one
// streams while the other waits. A team is half a warp up to 256 bytes of row, a warp up to 2 KB, a block of 128, 256 or
// 512 threads up to 4, 8 and 16 KB; of the last a multiprocessor holds one. Wider rows are cut into chunks of 16 KB, after
// a pass that makes their dot products. Parts of hot latents go to a workspace and are added in their order: no atomics,
// the same input gives the same bits.
//
// Bytes: N k 2 d times the element size gathered, W_dec once, 2 F d 4 written (read as well when accumulating), and 12
// for every entry. Prediction for N 32768, d 4096, F 131072, k 64 in bf16, gradients written, on an H200: 34.4 + 1.1 + 4.3
// GB at 4.22 TB/s, 9.4 ms; the 208 instructions of 8 warps for an entry are 3.9 ms of issue slots, in their shadow; the
// start and end of a block, 16 entries a latent, leave 90 % of the bandwidth: 10.5 ms. Triton's kernel takes 19.6 ms there.
//
// STATUS: compiled for sm_80, sm_90a, sm_100 and sm_120 without spills; the algorithm is run by fibers on the CPU
// (tests/test_cuda_backward.py). Measured on an H200, 2026-11-27: 9.3 and 9.8 ms in two runs, Triton's 19.0 and 19.4. The
// dispatcher uses it on explicit request only: Adam behind it reads the gradients again, where Triton's step has it inside,
// and its value tests have not been run on a GPU (memcheck found nothing in its smallest ones).

#include "device_team.h"
#include "sae_backward_team.h"

namespace rk::cuda {
namespace {

template <int kIndex>
constexpr BackwardShape kShape = kBackwardShapes[kIndex];
template <int kIndex>
constexpr int kTeams = kShape<kIndex>.teams();
template <int kIndex>
constexpr int kTeamBytes = backward_team_bytes(kShape<kIndex>);

// The slow paths take the registers they need.
template <class Row, int kIndex, bool kAligned, bool kGiven>
__global__ void __launch_bounds__(kShape<kIndex>.block, kAligned && !kGiven ? kShape<kIndex>.blocks : 1)
    latent_gradients(const BackwardArgs args, const int programs) {
  extern __shared__ __align__(16) unsigned char memory[];
  constexpr int kTeamThreads = kShape<kIndex>.threads;
  const int team = kTeams<kIndex> == 1 ? 0 : static_cast<int>(threadIdx.x) / kTeamThreads;
  const int program = static_cast<int>(blockIdx.x) * kTeams<kIndex> + team;
  if (program < programs) {  // the same for all threads of a team
    add_entries<DeviceTeam<kTeamThreads>, Row, kIndex, kAligned, kGiven>(
        args, program, static_cast<int>(blockIdx.y), memory + team * kTeamBytes<kIndex>);
  }
}

constexpr BackwardShape kWidest = kShape<kWidestBackward>;
constexpr int kDotBatch = 2;

template <class Row, bool kAligned>
__global__ void __launch_bounds__(kWidest.threads, 1) latent_dots(const BackwardArgs args) {
  __shared__ __align__(16) float sums[2 * kDotBatch * (kWidest.threads / 32)];
  dot_entries<DeviceTeam<kWidest.threads>, Row, kDotBatch, kAligned>(args, static_cast<int>(blockIdx.x), sums);
}

__global__ void __launch_bounds__(kThreads) latent_combine(const BackwardArgs args) {
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (column <= args.d) {
    combine_parts(args, static_cast<int>(blockIdx.x), static_cast<int>(column));
  }
}

template <class Row, int kIndex, bool kAligned, bool kGiven>
cudaError_t launch_shape(const BackwardArgs& args, const BackwardSplit& split, int programs, cudaStream_t stream) {
  const Grid grid = backward_grid(programs, split);
  const auto kernel = latent_gradients<Row, kIndex, kAligned, kGiven>;
  if (split.shared > 48 << 10) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, attribute, split.shared); error != cudaSuccess) {
      (void)cudaGetLastError();  // or the next launch would report it
      return error;
    }
  }
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  kernel<<<blocks, kShape<kIndex>.block, split.shared, stream>>>(args, programs);
  return cudaGetLastError();
}

template <class Row, bool kAligned>
cudaError_t launch_row(const BackwardArgs& args, const BackwardSplit& split, int programs, cudaStream_t stream) {
  if (split.chunks > 1) {
    latent_dots<Row, kAligned><<<static_cast<unsigned>(programs), kWidest.threads, 0, stream>>>(args);
    return launch_shape<Row, kWidestBackward, kAligned, true>(args, split, programs, stream);
  }
  if constexpr (kAligned) {
    switch (split.shape) {
      case 0:
        return launch_shape<Row, 0, true, false>(args, split, programs, stream);
      case 1:
        return launch_shape<Row, 1, true, false>(args, split, programs, stream);
      case 3:
        return launch_shape<Row, 3, true, false>(args, split, programs, stream);
      case 4:
        return launch_shape<Row, 4, true, false>(args, split, programs, stream);
      default:
        break;
    }
  }
  static_assert(kUnalignedBackward[0] == 2);
  if (split.shape == 2) {
    return launch_shape<Row, 2, kAligned, false>(args, split, programs, stream);
  }
  return launch_shape<Row, kWidestBackward, kAligned, false>(args, split, programs, stream);
}

// The first `programs` of backward_grid, of which the segments' are the first.
cudaError_t launch(RowType type, const BackwardArgs& args, int programs, cudaStream_t stream) {
  const bool aligned = backward_is_aligned(type, args);
  const BackwardSplit split = split_backward(args.d, type, aligned);
  const auto of_row = [&]<class Row>() {
    return aligned ? launch_row<Row, true>(args, split, programs, stream)
                   : launch_row<Row, false>(args, split, programs, stream);
  };
  return type == RowType::kFloat32    ? of_row.template operator()<Float32Row>()
         : type == RowType::kBFloat16 ? of_row.template operator()<BFloat16Row>()
                                      : of_row.template operator()<Float16Row>();
}

const char* text_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* sae_backward(RowType type, const BackwardArgs& args, void* stream_of_torch) {
  const BackwardSplit split = split_backward(args.d, type, backward_is_aligned(type, args));
  const Grid grid = backward_grid(args.segments + args.latents, split);
  if (grid.x > kMaxGridX || grid.y > kMaxGridY) {
    return "too many latents or columns for one launch";
  }
  const auto stream = static_cast<cudaStream_t>(stream_of_torch);
  cudaError_t error = launch(type, args, args.segments + args.latents, stream);
  if (error == cudaSuccess && args.segments > 0) {
    const unsigned columns = static_cast<unsigned>(args.d / kThreads + 1);
    latent_combine<<<dim3(static_cast<unsigned>(args.segments), columns), kThreads, 0, stream>>>(args);
    error = cudaGetLastError();
  }
  return text_of(error);
}

const char* sae_backward_parts(RowType type, const BackwardArgs& args, void* stream) {
  return args.segments == 0 ? nullptr : text_of(launch(type, args, args.segments, static_cast<cudaStream_t>(stream)));
}

}  // namespace rk::cuda
