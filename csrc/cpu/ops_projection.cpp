// Operators that take the component along a subspace out of tensors: one tensor into a new one, or many in place.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "operators.h"

namespace rk {
namespace {

// The entries of one compute type; their other dimensions, of all of them, in one list that no longer grows when
// pointers into it are taken.
template <class T>
struct Entries {
  std::vector<ProjectionEntry<T>> list;
  std::vector<ProjectionAxis> axes;

  void run(double strength) {
    if (list.empty()) {
      return;
    }
    const ProjectionAxis* own = axes.data();
    for (ProjectionEntry<T>& entry : list) {
      entry.other = own;
      own += entry.others;
    }
    const ProjectionArgs<T> args{list.data(), static_cast<int64_t>(list.size()), static_cast<T>(strength)};
    RK_RUN(project_out, args);
  }
};

struct Group {
  Entries<float> singles;
  Entries<double> doubles;

  void run(double strength) {
    singles.run(strength);
    doubles.run(strength);
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
  int64_t others = 0;
  for (int64_t axis = 0; axis < from.dim(); ++axis) {
    if (axis == dim || from.size(axis) == 1) {
      continue;
    }
    const ProjectionAxis next{from.size(axis), from.stride(axis), to.stride(axis)};
    ProjectionAxis* last = others > 0 ? &entries.axes.back() : nullptr;
    if (last != nullptr && last->from_stride == next.size * next.from_stride &&
        last->to_stride == next.size * next.to_stride) {
      *last = {last->size * next.size, next.from_stride, next.to_stride};
    } else {
      entries.axes.push_back(next);
      ++others;
    }
  }
  entries.list.push_back(
      {element_of(op, from.scalar_type()), from.const_data_ptr(), to.mutable_data_ptr(), from.stride(dim),
       to.stride(dim), nullptr, others, from.numel() / from.size(dim), in<T>(basis), from.size(dim), r,
       in<T>(against)});
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

// Checked entries of many tensors, to be changed in place. Neighbours with the same basis share a read of it.
Group group_of(
    const char* op, const std::vector<Tensor>& tensors, const std::vector<int64_t>& dims,
    const std::vector<Tensor>& bases, const std::vector<int64_t>& basis_of, const std::vector<Tensor>& against,
    const std::vector<int64_t>& against_of) {
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
  Group group;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& basis = bases[static_cast<size_t>(basis_of[i])];
    if (tensors[i].scalar_type() == ScalarType::Double) {
      add_entry(group.doubles, op, tensors[i], tensors[i], dims[i], basis, direction(i));
    } else {
      add_entry(group.singles, op, tensors[i], tensors[i], dims[i], basis, direction(i));
    }
  }
  return group;
}

void project_out_grouped(
    std::vector<Tensor> tensors, std::vector<int64_t> dims, std::vector<Tensor> bases, std::vector<int64_t> basis_of,
    std::vector<Tensor> against, std::vector<int64_t> against_of, double strength) {
  group_of("project_out_grouped", tensors, dims, bases, basis_of, against, against_of).run(strength);
}

// ---- a group as numbers: hundreds of tensors through the dispatcher take half a millisecond, one takes microseconds ----

constexpr int64_t kMark = 0x726b706c616e;  // what a table begins with; then the numbers of entries of both types
constexpr int64_t kHead = 3;

template <class P>
int64_t number_of(P* pointer) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer));
}
template <class P>
P* pointer_of(int64_t number) {
  return reinterpret_cast<P*>(static_cast<uintptr_t>(number));
}

template <class T>
void write(const Entries<T>& entries, std::vector<int64_t>& numbers) {
  const ProjectionAxis* axis = entries.axes.data();
  for (const ProjectionEntry<T>& e : entries.list) {
    numbers.insert(
        numbers.end(), {static_cast<int64_t>(e.type), number_of(e.from), number_of(e.to), e.from_stride, e.to_stride,
                        e.others, e.fibres, number_of(e.basis), e.n, e.r, number_of(e.against)});
    for (int64_t i = 0; i < e.others; ++i, ++axis) {
      numbers.insert(numbers.end(), {axis->size, axis->from_stride, axis->to_stride});
    }
  }
}

template <class T>
const int64_t* read(const int64_t* at, int64_t count, Entries<T>& entries) {
  entries.list.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    entries.list.push_back(
        {static_cast<Element>(at[0]), pointer_of<const void>(at[1]), pointer_of<void>(at[2]), at[3], at[4], nullptr,
         at[5], at[6], pointer_of<const T>(at[7]), at[8], at[9], pointer_of<const T>(at[10])});
    at += 11;
    for (int64_t axis = 0; axis < entries.list.back().others; ++axis, at += 3) {
      entries.axes.push_back({at[0], at[1], at[2]});
    }
  }
  return at;
}

Tensor project_out_table(
    std::vector<Tensor> tensors, std::vector<int64_t> dims, std::vector<Tensor> bases, std::vector<int64_t> basis_of,
    std::vector<Tensor> against, std::vector<int64_t> against_of) {
  const char* op = "project_out_table";
  const Group group = group_of(op, tensors, dims, bases, basis_of, against, against_of);
  std::vector<int64_t> numbers{
      kMark, static_cast<int64_t>(group.singles.list.size()), static_cast<int64_t>(group.doubles.list.size())};
  write(group.singles, numbers);
  write(group.doubles, numbers);
  Tensor table = torch::stable::new_empty(tensors[0], {static_cast<int64_t>(numbers.size())}, ScalarType::Long);
  std::copy(numbers.begin(), numbers.end(), out<int64_t>(table));
  return table;
}

void project_out_by_table(const Tensor& table, double strength) {
  const char* op = "project_out_by_table";
  STD_TORCH_CHECK(
      table.scalar_type() == ScalarType::Long && table.dim() == 1 && table.is_contiguous() && table.numel() >= kHead &&
          in<int64_t>(table)[0] == kMark,
      op, ": expected a table of project_out_table; got ", shape_of(table));
  const int64_t* numbers = in<int64_t>(table);
  Group group;
  read(read(numbers + kHead, numbers[1], group.singles), numbers[2], group.doubles);
  group.run(strength);
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(refusal_kernels_cpu, CPU, m) {
  m.impl("project_out", TORCH_BOX(&rk::project_out));
  m.impl("project_out_grouped", TORCH_BOX(&rk::project_out_grouped));
  m.impl("project_out_table", TORCH_BOX(&rk::project_out_table));
  m.impl("project_out_by_table", TORCH_BOX(&rk::project_out_by_table));
}
