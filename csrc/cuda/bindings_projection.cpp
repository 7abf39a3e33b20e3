// torch.ops.refusal_kernels_cuda: the projection, see projection.h.
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "cuda/bindings.h"
#include "cuda/projection.h"

namespace {

using namespace rk::cuda::bindings;

constexpr int64_t kMatrixNumbers = rk::cuda::kMatrixBytes / 8, kItemNumbers = 4;

// The matrices of one tensor, after checking it.
void add_tensor(
    std::vector<rk::cuda::ProjectionMatrix>& table, const Tensor& t, int64_t dim, const Tensor& basis,
    const std::optional<Tensor>& against) {
  STD_TORCH_CHECK(0 <= dim && dim < t.dim(), "refusal_kernels_cuda: dim must be a dimension of its tensor; got ", dim);
  const auto beside = [&](const Tensor& other, const char* name) {
    STD_TORCH_CHECK(
        other.is_contiguous() && other.scalar_type() == ScalarType::Float && other.device() == t.device(),
        "refusal_kernels_cuda: ", name, " must be float32, contiguous and on the device of its tensor");
  };
  beside(basis, "basis");
  STD_TORCH_CHECK(
      basis.dim() == 2 && basis.size(0) == t.size(dim) && basis.size(1) >= 1 && basis.size(1) <= rk::cuda::kMostRanks &&
          t.numel() > 0 && t.size(dim) < (1 << 30),
      "refusal_kernels_cuda: basis must be [n, r] with n the tensor's size in dim, 1 <= n < 2^30 and 1 <= r <= ",
      rk::cuda::kMostRanks);
  if (against) {
    beside(*against, "against");
    STD_TORCH_CHECK(against->numel() == basis.size(1), "refusal_kernels_cuda: against must have r elements");
  }
  rk::cuda::ProjectionMatrix like{};
  like.numbers = t.mutable_data_ptr();
  like.basis = static_cast<const float*>(basis.const_data_ptr());
  like.against = against ? static_cast<const float*>(against->const_data_ptr()) : nullptr;
  like.r = static_cast<int32_t>(basis.size(1));
  like.type = row_type(t, "tensor");
  std::vector<int64_t> sizes, strides;
  for (int64_t axis = 0; axis < t.dim(); ++axis) {
    sizes.push_back(t.size(axis));
    strides.push_back(t.stride(axis));
  }
  rk::cuda::add_matrices(table, like, sizes, strides, static_cast<size_t>(dim));
}

template <class T>
Tensor on_the_cpu(const std::vector<T>& rows, int64_t numbers, ScalarType dtype) {
  Tensor result = torch::stable::empty({static_cast<int64_t>(rows.size()), numbers}, dtype);
  if (!rows.empty()) std::memcpy(result.mutable_data_ptr(), rows.data(), rows.size() * sizeof(T));
  return result;
}

// Table and items of a group, in host memory. All bases must be of one shape of kernel, whose number comes third.
std::tuple<Tensor, Tensor, int64_t> projection_table(
    std::vector<Tensor> tensors, std::vector<int64_t> dims, std::vector<Tensor> bases, std::vector<int64_t> basis_of,
    std::vector<Tensor> against, std::vector<int64_t> against_of) {
  STD_TORCH_CHECK(
      dims.size() == tensors.size() && basis_of.size() == tensors.size() && against_of.size() == tensors.size(),
      "refusal_kernels_cuda: dims, basis_of and against_of must have one number per tensor = ", tensors.size());
  std::vector<rk::cuda::ProjectionMatrix> table;
  int shape = -1;
  for (size_t i = 0; i < tensors.size(); ++i) {
    STD_TORCH_CHECK(
        0 <= basis_of[i] && basis_of[i] < static_cast<int64_t>(bases.size()) &&
            against_of[i] < static_cast<int64_t>(against.size()),
        "refusal_kernels_cuda: basis_of and against_of must count bases and against");
    const Tensor& basis = bases[static_cast<size_t>(basis_of[i])];
    const bool directed = against_of[i] >= 0;
    add_tensor(
        table, tensors[i], dims[i], basis,
        directed ? std::optional(against[static_cast<size_t>(against_of[i])]) : std::nullopt);
    const int own = rk::cuda::projection_shape(basis.size(1));
    STD_TORCH_CHECK(shape < 0 || shape == own, "refusal_kernels_cuda: bases of different widths need a table each");
    shape = own;
  }
  STD_TORCH_CHECK(shape >= 0, "refusal_kernels_cuda: a table needs a tensor");
  const auto items = rk::cuda::projection_items(table, rk::cuda::kProjectionShapes[shape]);
  return {on_the_cpu(table, kMatrixNumbers, ScalarType::Long), on_the_cpu(items, kItemNumbers, ScalarType::Int), shape};
}

void launch_projection(int shape, rk::cuda::ProjectionArgs args, int64_t blocks, const Tensor& on) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  std::optional<Tensor> parts;
  if (!rk::cuda::projection_has_clusters(shape)) {
    parts = torch::stable::new_empty(on, {blocks, rk::cuda::kProjectionShapes[shape].numbers()}, ScalarType::Float);
    args.parts = static_cast<float*>(parts->mutable_data_ptr());
  }
  check_launch(rk::cuda::project_out(shape, args, blocks, current_stream(on)), "project_out");
}

// The table's addresses are trusted: whoever calls keeps every tensor alive and in its place.
void project_out_by_table(Tensor table, Tensor items, int64_t shape, double strength) {
  check(table, "table", table, ScalarType::Long);
  check(items, "items", table, ScalarType::Int);
  STD_TORCH_CHECK(
      table.dim() == 2 && table.size(1) == kMatrixNumbers && items.dim() == 2 && items.size(1) == kItemNumbers &&
          items.size(0) % rk::cuda::kClusterBlocks == 0 && items.size(0) > 0 && 0 <= shape &&
          shape < rk::cuda::kProjectionForms,
      "refusal_kernels_cuda: expected table, items and shape of projection_table");
  rk::cuda::ProjectionArgs args{};
  args.table = static_cast<const rk::cuda::ProjectionMatrix*>(table.const_data_ptr());
  args.items = static_cast<const rk::cuda::ProjectionItem*>(items.const_data_ptr());
  args.strength = static_cast<float>(strength);
  launch_projection(static_cast<int>(shape), args, items.size(0), table);
}

// One contiguous tensor, in place. It goes into the launch's arguments: no table, so a CUDA graph can hold the call.
void project_out_in_place(Tensor g, int64_t dim, Tensor basis, double strength, std::optional<Tensor> against) {
  check(g, "g", g, std::nullopt);
  std::vector<rk::cuda::ProjectionMatrix> table;
  add_tensor(table, g, dim, basis, against);
  const int shape = rk::cuda::projection_shape(basis.size(1));
  rk::cuda::ProjectionArgs args{};
  args.strength = static_cast<float>(strength);
  args.single = table[0];
  args.single_team = rk::cuda::projection_team(table[0].n, rk::cuda::kProjectionShapes[shape]);
  launch_projection(shape, args, args.single_team * rk::cuda::fibre_blocks(table[0].fibres), g);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(refusal_kernels_cuda, m) {
  m.def(
      "projection_table(Tensor[] tensors, int[] dims, Tensor[] bases, int[] basis_of, Tensor[] against, "
      "int[] against_of) -> (Tensor, Tensor, int)");
  m.def("project_out_by_table(Tensor table, Tensor items, int shape, float strength) -> ()");
  m.def("project_out_in_place(Tensor(a!) g, int dim, Tensor basis, float strength, Tensor? against) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(refusal_kernels_cuda, CUDA, m) {
  m.impl("project_out_by_table", TORCH_BOX(&project_out_by_table));
  m.impl("project_out_in_place", TORCH_BOX(&project_out_in_place));
}

// Addresses and sizes only: for tensors on any device.
STABLE_TORCH_LIBRARY_IMPL(refusal_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("projection_table", TORCH_BOX(&projection_table));
}
