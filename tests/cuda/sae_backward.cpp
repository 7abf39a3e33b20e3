// sae_backward_team.h on the CPU, for tests/test_cuda_backward.py: the launches of sae_backward.cu one team after another.
#include <exception>
#include <memory>

#include "sae_backward_team.h"

#include "emulated_team.h"

namespace {

using namespace rk::cuda;

constexpr int kWidestThreads = kBackwardShapes[kWidestBackward].threads;

template <class Row, int kIndex, bool kAligned, bool kGiven>
void run(const BackwardArgs& a, const BackwardSplit& split, bool reversed) {
  constexpr BackwardShape kShape = kBackwardShapes[kIndex];
  using Team = EmulatedTeam<kShape.threads>;
  const size_t bytes = backward_team_bytes(kShape);
  auto* const memory = static_cast<unsigned char*>(std::aligned_alloc(16, bytes));
  const std::unique_ptr<void, decltype(&std::free)> owner(memory, &std::free);
  for (int program = 0; program < a.segments + a.latents; ++program) {
    for (int chunk = 0; chunk < split.chunks; ++chunk) {
      std::memset(memory, 0xff, bytes);  // shared memory holds anything at the start of a block
      Fibers::run(
          kShape.threads, [&] { add_entries<Team, Row, kIndex, kAligned, kGiven>(a, program, chunk, memory); },
          reversed);
    }
  }
}

template <class Row, bool kAligned>
void run_row(const BackwardArgs& a, const BackwardSplit& split, bool reversed) {
  if (split.chunks > 1) {
    alignas(16) float sums[2 * 2 * (kWidestThreads / 32)];
    for (int program = 0; program < a.segments + a.latents; ++program) {
      Fibers::run(
          kWidestThreads, [&] { dot_entries<EmulatedTeam<kWidestThreads>, Row, 2, kAligned>(a, program, sums); },
          reversed);
    }
    return run<Row, kWidestBackward, kAligned, true>(a, split, reversed);
  }
  if constexpr (kAligned) {
    switch (split.shape) {
      case 0:
        return run<Row, 0, true, false>(a, split, reversed);
      case 1:
        return run<Row, 1, true, false>(a, split, reversed);
      case 3:
        return run<Row, 3, true, false>(a, split, reversed);
      case 4:
        return run<Row, 4, true, false>(a, split, reversed);
      default:
        break;
    }
  }
  if (split.shape == 2) return run<Row, 2, kAligned, false>(a, split, reversed);
  run<Row, kWidestBackward, kAligned, false>(a, split, reversed);
}

}  // namespace

// `rows`: of e and x. Null on success, else what went wrong; `shape` becomes the index of the shape that ran.
extern "C" const char* emulate_sae_backward(
    int32_t type, const void* e, const void* x, const void* W_dec, const float* b_dec, const float* scale,
    const int32_t* tokens, const void* values, const int64_t* offsets, const int64_t* ends,
    const int64_t* segment_latent, float* dW_enc, float* db_enc, float* dW_dec, float* part_enc, float* part_db,
    float* part_dec, float* dots, int64_t rows, int32_t latents, int32_t segments, int32_t segment,
    int32_t head_latents, int32_t d, int32_t accumulate, int32_t reversed, int32_t* shape) {
  static char message[200];
  const RowType row_type = static_cast<RowType>(type);
  const BackwardArgs a{
      e,
      x,
      W_dec,
      b_dec,
      scale,
      tokens,
      values,
      offsets,
      ends,
      segment_latent,
      dW_enc,
      db_enc,
      dW_dec,
      part_enc,
      part_db,
      part_dec,
      dots,
      latents,
      segments,
      segment,
      head_latents,
      d,
      accumulate != 0};
  const bool aligned = backward_is_aligned(row_type, a);
  const BackwardSplit split = split_backward(d, row_type, aligned);
  *shape = split.shape;
  Fibers::readable.clear();
  for (const auto& [from, count] : {std::pair{e, rows}, {x, rows}, {W_dec, int64_t{latents}}}) {
    const char* const begin = static_cast<const char*>(from);
    Fibers::readable.emplace_back(begin, begin + count * d * row_bytes(row_type));
  }
  const auto launch = [&]<class Row>() {
    aligned ? run_row<Row, true>(a, split, reversed != 0) : run_row<Row, false>(a, split, reversed != 0);
  };
  try {
    if (row_type == RowType::kFloat32) {
      launch.template operator()<Float32Row>();
    } else if (row_type == RowType::kBFloat16) {
      launch.template operator()<BFloat16Row>();
    } else {
      launch.template operator()<Float16Row>();
    }
    for (int program = 0; program < segments; ++program) {
      for (int column = 0; column <= d; ++column) combine_parts(a, program, column);
    }
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof message - 1);
    return message;
  }
  return nullptr;
}
