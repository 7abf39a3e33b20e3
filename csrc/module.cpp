// refusal_kernels._C: the host side that Python sees. No tensor passes through pybind11: the operators register
// themselves with torch's dispatcher when this library is loaded (csrc/cpu, csrc/cuda), through its stable C ABI.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "build_config.h"
#include "cpu/isa.h"
#include "cuda/projection.h"
#include "cuda/row_filter.h"
#include "cuda/sae_adam.h"
#include "cuda/sae_backward.h"
#include "cuda/sparse_decode.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin < text.size();) {
    size_t end = text.find(separator, begin);
    if (end == std::string::npos) end = text.size();
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

std::optional<std::string> text_or_none(const char* text) {
  return *text ? std::optional<std::string>(text) : std::nullopt;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = RK_CXX_COMPILER;
  info["flags"] = RK_CXX_FLAGS;
  info["build_type"] = RK_BUILD_TYPE;
  info["torch"] = RK_TORCH_VERSION;
  info["torch_abi_target"] = "2.10";
  info["git_commit"] = text_or_none(RK_GIT_COMMIT);
  info["isa"] = rk::isa_name();
#ifdef RK_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_version"] = text_or_none(RK_CUDA_VERSION);
  info["cuda_archs"] = split(RK_CUDA_ARCHITECTURES, ';');
  info["cuda_left_out"] = text_or_none(RK_CUDA_LEFT_OUT);
  return info;
}

// The launch of a CUDA kernel, from the functions the launchers themselves use; see _C.pyi.
py::dict plan(const std::string& op, const std::array<int64_t, 4>& shape, const std::string& dtype, int sm) {
  using namespace rk::cuda;
  const auto [n, d, n_latents, k] = shape;
  if (n < 0 || d < 1 || n_latents < 1 || k < 0) {
    throw py::value_error("plan: shape must be (N, d, F, k) with N, k >= 0 and d, F >= 1");
  }
  if (sm < 80) {
    throw py::value_error(
        "plan: sm must be a compute capability of at least 80 (these kernels run on GPUs only); got " +
        std::to_string(sm));
  }
  RowType type;
  if (dtype == "float32") {
    type = RowType::kFloat32;
  } else if (dtype == "bfloat16") {
    type = RowType::kBFloat16;
  } else if (dtype == "float16") {
    type = RowType::kFloat16;
  } else {
    throw py::value_error("plan: dtype must be float32, bfloat16 or float16; got '" + dtype + "'");
  }
  RowSplit split = split_row(d, type, true);
  Grid grid;
  int64_t workspace = 0;
  int threads = kThreads;
  bool fits = true;
  if (op == "sparse_decode") {
    grid = sum_grid(n, split);
  } else if (op == "sparse_decode_dvalues") {
    grid = dots_grid(n, k, split);
  } else if (op == "sparse_decode_dweight") {
    grid = sum_grid(n_latents, split);
    workspace = 8 * (n_latents + 1) + (8 + 8) * n * k;  // offsets; sorted int64 latents and their positions
  } else if (op == "row_filter") {  // of a chunk of N rows and F columns
    split = {n_latents % 4 == 0 ? 4 : 1, 32, kFilterWarps, 1};
    grid = {(n + kFilterWarps - 1) / kFilterWarps, 1};
    workspace = n * (kFilterCapacity * 8 + 4 + 4);  // lists, counts, limits
    fits = k >= 1 && k <= kFilterMostK;
  } else if (op == "sae_backward") {  // without segments of hot latents
    const BackwardSplit cut = split_backward(d, type, true);
    const BackwardShape& shape = kBackwardShapes[cut.shape];
    split = {cut.vector, shape.threads, shape.teams(), cut.chunks};
    threads = shape.block;
    grid = backward_grid(n_latents, cut);
    workspace = cut.chunks > 1 ? 4 * n * k : 0;  // dot products
  } else if (op == "sae_backward_adam") {  // of one head, without segments of hot latents
    const BackwardSplit cut = split_backward(d, type, true);
    const BackwardShape& shape = kBackwardShapes[cut.shape];
    split = {cut.vector, shape.threads, shape.teams(), 1};
    threads = shape.block;
    grid = adam_grid(1, static_cast<int>(n_latents), cut);
    workspace = adam_teams(static_cast<int>(n_latents)) * d * 4;  // shares of db_enc @ W_enc
    fits = cut.chunks == 1 && d % cut.vector == 0 && n_latents <= INT_MAX / 2;
  } else if (op == "project_out") {  // of F matrices with d vectors of N numbers, k columns of the basis
    fits = k >= 1 && k <= kMostRanks;
    const ProjectionShape& shape = kProjectionShapes[projection_shape(fits ? k : kMostRanks)];
    split.lanes = 32 * shape.crew_warps() / shape.row_lanes();
    threads = kProjectionThreads;
    const int64_t blocks = n_latents * fibre_blocks(d) * projection_team(n, shape);
    grid = {(blocks + kClusterBlocks - 1) / kClusterBlocks * kClusterBlocks, 1};
    workspace = sm < 90 ? grid.x * shape.numbers() * 4 : 0;  // parts of U^T G where there are no clusters
  } else {
    throw py::value_error(
        "plan: op must be sparse_decode, sparse_decode_dvalues, sparse_decode_dweight, row_filter, sae_backward, "
        "sae_backward_adam or project_out; got '" +
        op + "'");
  }
  py::dict result;
  result["vector"] = split.vector;
  result["lanes"] = split.lanes;
  result["threads"] = threads;
  result["grid"] = py::make_tuple(grid.x, grid.y);
  result["workspace_bytes"] = workspace;
  result["fits"] = fits && grid.x <= kMaxGridX && grid.y <= kMaxGridY;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of refusal_kernels. Importing it registers torch.ops.refusal_kernels_*.";
  m.def("build_info", &build_info, "How this binary was built and what it holds, as plain values.");
  m.def(
      "plan", &plan, py::arg("op"), py::arg("shape"), py::arg("dtype"), py::arg("sm"),
      "How a CUDA kernel cuts up a problem: vector width, lanes per row, grid, workspace.");
}
