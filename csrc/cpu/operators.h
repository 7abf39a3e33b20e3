// What every operator of torch.ops.refusal_kernels_cpu needs: torch's thread pool, element types, checks, and the way from
// tensors to the raw-pointer kernels of the instruction set in use.
//
// Built on LibTorch's stable ABI (2.10), so one binary serves every later torch. The operators are the raw primitives:
// two-dimensional contiguous CPU tensors (the projection's of any shape and strides), no autograd; rows in fp32, fp64, bf16 or fp16, biases in the compute dtype
// (fp64 for fp64, else fp32), parameters to update and their optimiser state in the row dtype. Everything is checked
// before anything is written.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "csc.h"
#include "isa.h"
#include "kernels.h"

namespace rk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Threads pool() {
  return Threads{
      static_cast<int64_t>(torch::stable::get_num_threads()),
      [](int64_t tasks, void (*body)(int64_t, void*), void* context) {
        torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            body(i, context);
          }
        });
      }};
}

// ---- types -----------------------------------------------------------------------------------------------------------

template <class R>
struct Type {
  using type = R;
};

template <class F>
void with_row_type(const char* op, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(Type<float>());
    case ScalarType::Double:
      return f(Type<double>());
    case ScalarType::BFloat16:
      return f(Type<BF16>());
    case ScalarType::Half:
      return f(Type<F16>());
    default:
      STD_TORCH_CHECK(false, op, ": expected rows in float32, float64, bfloat16 or float16");
  }
}

template <class F>
void with_index_type(const char* op, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Int:
      return f(Type<int32_t>());
    case ScalarType::Long:
      return f(Type<int64_t>());
    default:
      STD_TORCH_CHECK(false, op, ": expected indices in int32 or int64");
  }
}

inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class R>
const R* in(const Tensor& t) {
  return static_cast<const R*>(t.const_data_ptr());
}
template <class R>
const R* in(const MaybeTensor& t) {
  return t.has_value() ? in<R>(*t) : nullptr;
}
template <class R>
R* out(const Tensor& t) {
  return static_cast<R*>(t.mutable_data_ptr());
}
template <class R>
R* out(const MaybeTensor& t) {
  return t.has_value() ? out<R>(*t) : nullptr;
}

#if defined(__x86_64__)
#define RK_RUN(kernel, args)          \
  switch (isa()) {                    \
    case Isa::kAvx512Vnni:            \
    case Isa::kAvx512:                \
      avx512::kernel(args, pool());   \
      break;                          \
    case Isa::kAvx2:                  \
      avx2::kernel(args, pool());     \
      break;                          \
    default:                          \
      baseline::kernel(args, pool()); \
  }
#else
#define RK_RUN(kernel, args) baseline::kernel(args, pool())
#endif

// ---- checks ----------------------------------------------------------------------------------------------------------

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(t.size(i));
  }
  return text + "]";
}

inline void check(
    const char* op, const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> shape) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (const int64_t size : shape) {
    same = same && t.size(axis) == size;
    ++axis;
  }
  if (!same) {
    std::string expected;
    for (const int64_t size : shape) {
      expected += (expected.empty() ? "[" : ", ") + std::to_string(size);
    }
    STD_TORCH_CHECK(false, op, ": ", name, " must have shape ", expected, "]; got ", shape_of(t));
  }
  STD_TORCH_CHECK(
      t.scalar_type() == dtype, op, ": ", name, " has dtype ", torch::headeronly::toString(t.scalar_type()), " where ",
      torch::headeronly::toString(dtype), " is expected");
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

inline void check(
    const char* op, const char* name, const MaybeTensor& t, ScalarType dtype, std::initializer_list<int64_t> shape) {
  if (t.has_value()) {
    check(op, name, *t, dtype, shape);
  }
}

inline void check_matrix(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, op, ": ", name, " must be two-dimensional; got ", shape_of(t));
}

// Latents are numbered by 32 bits inside a candidate's key, tokens and slots inside a hit.
constexpr int64_t kMost = int64_t{0xffffffff};

// Every index in [0, F).
inline void check_range(const char* op, const Tensor& indices, int64_t F) {
  with_index_type(op, indices.scalar_type(), [&](auto type) {
    using I = typename decltype(type)::type;
    if (!all_in_range<I>(in<I>(indices), indices.numel(), F)) {
      int64_t low = 0;
      int64_t high = -1;
      index_range<I>(in<I>(indices), indices.numel(), low, high);
      STD_TORCH_CHECK(
          false, op, ": indices must lie in [0, ", F, "), the rows of the weights; got ", low < 0 ? low : high);
    }
  });
}

// values and indices [N, k]; that every index is in [0, F) is checked by check_range, or by the kernel on its way.
inline void check_codes(const char* op, const Tensor& values, const Tensor& indices, ScalarType dtype, int64_t N) {
  check_matrix(op, "indices", indices);
  const int64_t k = indices.size(1);
  check(op, "values", values, dtype, {N, k});
  check(op, "indices", indices, indices.scalar_type(), {N, k});
  STD_TORCH_CHECK(N < kMost && k < kMost, op, ": more than 2^32 tokens or values per token are not supported");
}

inline Tensor fresh(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, std::vector<int64_t>(shape), dtype);
}

template <class R>
LatentMajor by_latent(const Tensor& indices, const MaybeTensor& skip_where_zero, int64_t F) {
  LatentMajor list{};
  with_index_type("indices", indices.scalar_type(), [&](auto type) {
    using I = typename decltype(type)::type;
    list = latent_major<R, I>(in<I>(indices), in<R>(skip_where_zero), indices.size(0), indices.size(1), F, pool());
  });
  return list;
}

}  // namespace rk
