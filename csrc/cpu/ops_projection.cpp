// Operators that take the component along a subspace out of tensors: one tensor into a new one, or many in place.
#include <string>
#include <vector>

#include "operators.h"

namespace rk {
namespace {

// What is not known at compile time of an entry: its other dimensions. A vector per entry keeps addresses valid.
template <class T>
struct Entries {
  std::vector<ProjectionEntry<T>> list;
  std::vector<std::vector<ProjectionAxis>> axes;

  void run(double strength) {
    if (list.empty()) {
      return;
    }
    const ProjectionArgs<T> args{list.data(), static_cast<int64_t>(list.size()), static_cast<T>(strength)};
    RK_RUN(project_out, args);
  }
};

Element element_of(const char* op, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
    case ScalarType::Double:
      return Element::kCompute;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kHalf;
    default:
      STD_TORCH_CHECK(false, op, ": expected tensors in float32, float64, bfloat16 or float16");
  }
}

void check_projection(
    const char* op, const char* name, size_t number, const Tensor& t, int64_t dim, const Tensor& basis,
    const MaybeTensor& against) {
  STD_TORCH_CHECK(
      0 <= dim && dim < t.dim(), op, ": dim must be a dimension of ", name, " ", number, "; got ", dim, " for ",
      shape_of(t));
  element_of(op, t.scalar_type());
  check_matrix(op, "basis", basis);
  const ScalarType ct = compute_dtype(t.scalar_type());
  check(op, "basis", basis, ct, {t.size(dim), basis.size(1)});
  check(op, "against", against, ct, {basis.size(1)});
}

// Checked tensors; nothing to do for empty ones and for r = 0.
template <class T>
void add_entry(
    Entries<T>& entries, const char* op, const Tensor& from, const Tensor& to, int64_t dim, const Tensor& basis,
    const MaybeTensor& against) {
  const int64_t r = basis.size(1);
  if (from.numel() == 0 || r == 0) {
    return;
  }
  std::vector<ProjectionAxis> axes;
  for (int64_t axis = 0; axis < from.dim(); ++axis) {
    if (axis == dim || from.size(axis) == 1) {
      continue;
    }
    const ProjectionAxis next{from.size(axis), from.stride(axis), to.stride(axis)};
    if (!axes.empty() && axes.back().from_stride == next.size * next.from_stride &&
        axes.back().to_stride == next.size * next.to_stride) {
      axes.back() = {axes.back().size * next.size, next.from_stride, next.to_stride};
    } else {
      axes.push_back(next);
    }
  }
  entries.axes.push_back(std::move(axes));
  const auto& own = entries.axes.back();
  entries.list.push_back(
      {element_of(op, from.scalar_type()), from.const_data_ptr(), to.mutable_data_ptr(), from.stride(dim),
       to.stride(dim), own.data(), static_cast<int64_t>(own.size()), from.numel() / from.size(dim), in<T>(basis),
       from.size(dim), r, in<T>(against)});
}

Tensor project_out(const Tensor& g, int64_t dim, const Tensor& basis, double strength, const MaybeTensor& against) {
  const char* op = "project_out";
  check_projection(op, "tensor", 0, g, dim, basis, against);
  std::vector<int64_t> shape;
  for (int64_t axis = 0; axis < g.dim(); ++axis) {
    shape.push_back(g.size(axis));
  }
  Tensor result = torch::stable::new_empty(g, shape, g.scalar_type());
  if (basis.size(1) == 0) {
    torch::stable::copy_(result, g);
  } else if (g.scalar_type() == ScalarType::Double) {
    Entries<double> entries;
    add_entry(entries, op, g, result, dim, basis, against);
    entries.run(strength);
  } else {
    Entries<float> entries;
    add_entry(entries, op, g, result, dim, basis, against);
    entries.run(strength);
  }
  return result;
}

void project_out_grouped(
    std::vector<Tensor> tensors, std::vector<int64_t> dims, std::vector<Tensor> bases, std::vector<int64_t> basis_of,
    std::vector<Tensor> against, std::vector<int64_t> against_of, double strength) {
  const char* op = "project_out_grouped";
  STD_TORCH_CHECK(
      dims.size() == tensors.size() && basis_of.size() == tensors.size() && against_of.size() == tensors.size(), op,
      ": dims, basis_of and against_of must have one number per tensor = ", tensors.size());
  const auto direction = [&](size_t i) {
    return against_of[i] < 0 ? MaybeTensor() : MaybeTensor(against[static_cast<size_t>(against_of[i])]);
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    STD_TORCH_CHECK(
        0 <= basis_of[i] && basis_of[i] < static_cast<int64_t>(bases.size()) &&
            against_of[i] < static_cast<int64_t>(against.size()),
        op, ": basis_of and against_of must count bases and against; got ", basis_of[i], " and ", against_of[i]);
    check_projection(op, "tensor", i, tensors[i], dims[i], bases[static_cast<size_t>(basis_of[i])], direction(i));
  }
  // Neighbours with the same basis share a read of it.
  Entries<float> singles;
  Entries<double> doubles;
  singles.list.reserve(tensors.size());
  singles.axes.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& basis = bases[static_cast<size_t>(basis_of[i])];
    if (tensors[i].scalar_type() == ScalarType::Double) {
      add_entry(doubles, op, tensors[i], tensors[i], dims[i], basis, direction(i));
    } else {
      add_entry(singles, op, tensors[i], tensors[i], dims[i], basis, direction(i));
    }
  }
  singles.run(strength);
  doubles.run(strength);
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(refusal_kernels_cpu, CPU, m) {
  m.impl("project_out", TORCH_BOX(&rk::project_out));
  m.impl("project_out_grouped", TORCH_BOX(&rk::project_out_grouped));
}
