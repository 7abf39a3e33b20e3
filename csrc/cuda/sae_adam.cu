// sae_backward_adam: the latent-major backward straight into Adam; the gradients of the weights are never written.
//
//   dW_dec[f], dW_enc[f], db_enc[f]    as in sae_backward.cu, and AuxK's where f is one of its latents
//   dW_dec[f] -= <dW_dec[f], w> w / ||w||^2 (remove_parallel), then Adam, then w / ||w|| (unit_norm)
//   Adam on W_enc[f] and b_enc[f];     through += db_enc[f] W_enc[f], the weights as the forward pass saw them
//
// A team (sae_adam_team.h) takes every adam_teams-th latent: it adds up the entries as in sae_backward.cu, and steps the
// latent with both gradient rows still in registers. Four batches before the last entry it asks for the latent's rows of
// state, 96 KB at d = 4096 in fp32, which then come from L2; meanwhile another block of the multiprocessor streams. Parts
// of hot latents are made by sae_backward.cu's kernel before. Its shares of `through` are one row per team, in L2, added
// up afterwards in their order: no atomics, the same input gives the same bits.
//
// Where rows of 16 bits stand beside fp32 weights, the copies that the next forward pass reads are written in this pass.
//
// Bytes: N k 2 d times the element size gathered, the decoder's copy once, 12 for every entry, and per weight 24 (fp32
// state) or 16 (halves and bf16 moments), 2 more for each copy. Prediction for N 32768, d 4096, F 131072, k 64, bf16 rows
// beside fp32 state, with copies, on an H200: 34.4 + 1.1 + 25.8 + 2.1 GB at 4.22 TB/s, 15.0 ms; sae_backward.cu reaches
// 90 to 95 % of its bytes' time, so 16 to 17 ms, where Triton's step takes 23 and the copies 1.5 more. Compact state: 52.7
// GB, 12.5 ms, so 13 to 14.
//
// STATUS: compiled for sm_80, sm_90a, sm_100 and sm_120 without spills; the algorithm is run by fibers on the CPU
// (tests/test_cuda_adam.py). Not yet run on a GPU; the dispatcher uses it on explicit request only.

#include "device_team.h"
#include "sae_adam_team.h"

namespace rk::cuda {
namespace {

template <int kIndex>
constexpr BackwardShape kShape = kBackwardShapes[kIndex];
template <int kIndex>
constexpr int kTeams = kShape<kIndex>.teams();
template <int kIndex>
constexpr int kTeamBytes = adam_team_bytes(kShape<kIndex>);

// 512 threads of a multiprocessor: 128 registers hold both gradients, the decoder's row and a piece of its state. Rows of
// four pieces take 168, of which sm_100 is three short.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 1000
constexpr int kFewest = 2;
#else
constexpr int kFewest = 3;
#endif
template <int kIndex>
constexpr int kBlocks = kShape<kIndex>.blocks < 512 / kShape<kIndex>.block ? kFewest : 512 / kShape<kIndex>.block;

template <class Row, int kIndex>
__global__ void __launch_bounds__(kShape<kIndex>.block, kBlocks<kIndex>) adam_latents(const AdamArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  constexpr int kTeamThreads = kShape<kIndex>.threads;
  const int own = kTeams<kIndex> == 1 ? 0 : static_cast<int>(threadIdx.x) / kTeamThreads;
  const int team = static_cast<int>(blockIdx.x) * kTeams<kIndex> + own;
  if (team < args.heads * args.teams) {  // the same for all threads of a team
    step_latents<DeviceTeam<kTeamThreads>, Row, kIndex>(args, team, memory + own * kTeamBytes<kIndex>);
  }
}

template <class Row, int kIndex>
cudaError_t launch_shape(const AdamArgs& args, const BackwardSplit& split, cudaStream_t stream) {
  const Grid grid = adam_grid(args.heads, args.entries.latents / args.heads, split);
  constexpr int shared = kTeams<kIndex> * kTeamBytes<kIndex>;
  const auto kernel = adam_latents<Row, kIndex>;
  if (shared > 48 << 10) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, attribute, shared); error != cudaSuccess) {
      (void)cudaGetLastError();  // or the next launch would report it
      return error;
    }
  }
  kernel<<<static_cast<unsigned>(grid.x), kShape<kIndex>.block, shared, stream>>>(args);
  return cudaGetLastError();
}

template <class Row>
cudaError_t launch_row(const AdamArgs& args, const BackwardSplit& split, cudaStream_t stream) {
  switch (split.shape) {
    case 0:
      return launch_shape<Row, 0>(args, split, stream);
    case 1:
      return launch_shape<Row, 1>(args, split, stream);
    case 2:
      return launch_shape<Row, 2>(args, split, stream);
    case 3:
      return launch_shape<Row, 3>(args, split, stream);
    case 4:
      return launch_shape<Row, 4>(args, split, stream);
    default:
      return launch_shape<Row, kWidestBackward>(args, split, stream);
  }
}

}  // namespace

const char* sae_backward_adam(RowType type, const AdamArgs& args, void* stream_of_torch) {
  if (!adam_takes(type, args)) {
    return "rows that are wider than a chunk or not at 16-byte boundaries";
  }
  const BackwardSplit split = split_backward(args.entries.d, type, true);
  if (const char* const problem = sae_backward_parts(type, args.entries, stream_of_torch); problem != nullptr) {
    return problem;
  }
  const auto stream = static_cast<cudaStream_t>(stream_of_torch);
  const cudaError_t error = type == RowType::kFloat32    ? launch_row<Float32Row>(args, split, stream)
                            : type == RowType::kBFloat16 ? launch_row<BFloat16Row>(args, split, stream)
                                                         : launch_row<Float16Row>(args, split, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace rk::cuda
