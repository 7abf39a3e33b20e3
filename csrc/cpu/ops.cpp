// torch.ops.refusal_kernels_cpu.*: schemas, checks, and the way from tensors to the raw-pointer kernels.
//
// Built on LibTorch's stable ABI (2.10), so one binary serves every later torch. The operators are the raw primitives:
// two-dimensional contiguous CPU tensors, no autograd; rows in fp32, fp64, bf16 or fp16, biases in the compute dtype
// (fp64 for fp64, else fp32), parameters to update and their optimiser state in the row dtype. Everything is checked
// before anything is written.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "csc.h"
#include "isa.h"
#include "kernels.h"

namespace rk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

Threads pool() {
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
void with_scalar_type(const char* op, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(Type<float>());
    case ScalarType::Double:
      return f(Type<double>());
    default:
      STD_TORCH_CHECK(false, op, ": expected grad_scale in float32 or float64");
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

ScalarType compute_dtype(ScalarType dtype) {
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

std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(t.size(i));
  }
  return text + "]";
}

void check(const char* op, const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> shape) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  std::string expected = "[";
  int64_t axis = 0;
  for (const int64_t size : shape) {
    expected += (axis == 0 ? "" : ", ") + std::to_string(size);
    same = same && t.size(axis) == size;
    ++axis;
  }
  STD_TORCH_CHECK(same, op, ": ", name, " must have shape ", expected, "]; got ", shape_of(t));
  STD_TORCH_CHECK(
      t.scalar_type() == dtype, op, ": ", name, " has dtype ", torch::headeronly::toString(t.scalar_type()), " where ",
      torch::headeronly::toString(dtype), " is expected");
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

void check(
    const char* op, const char* name, const MaybeTensor& t, ScalarType dtype, std::initializer_list<int64_t> shape) {
  if (t.has_value()) {
    check(op, name, *t, dtype, shape);
  }
}

void check_matrix(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, op, ": ", name, " must be two-dimensional; got ", shape_of(t));
}

// Latents are numbered by 32 bits inside a candidate's key, tokens and slots inside a hit.
constexpr int64_t kMost = int64_t{0xffffffff};

// values and indices [N, k] with every index in [0, F).
void check_codes(const char* op, const Tensor& values, const Tensor& indices, ScalarType dtype, int64_t N, int64_t F) {
  check_matrix(op, "indices", indices);
  const int64_t k = indices.size(1);
  check(op, "values", values, dtype, {N, k});
  check(op, "indices", indices, indices.scalar_type(), {N, k});
  STD_TORCH_CHECK(N < kMost && k < kMost, op, ": more than 2^32 tokens or values per token are not supported");
  with_index_type(op, indices.scalar_type(), [&](auto type) {
    using I = typename decltype(type)::type;
    int64_t low = 0;
    int64_t high = -1;
    index_range<I>(in<I>(indices), N * k, low, high);
    STD_TORCH_CHECK(
        low >= 0 && high < F, op, ": indices must lie in [0, ", F, "), the rows of the weights; got ",
        low < 0 ? low : high);
  });
}

Tensor fresh(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, std::vector<int64_t>(shape), dtype);
}

// ---- operators -------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> topk_encode(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, int64_t k, const MaybeTensor& b_dec) {
  const char* op = "topk_encode";
  check_matrix(op, "x", x);
  check_matrix(op, "W_enc", W_enc);
  const int64_t N = x.size(0);
  const int64_t d = x.size(1);
  const int64_t F = W_enc.size(0);
  const ScalarType dtype = x.scalar_type();
  check(op, "x", x, dtype, {N, d});
  check(op, "W_enc", W_enc, dtype, {F, d});
  check(op, "b_enc", b_enc, compute_dtype(dtype), {F});
  check(op, "b_dec", b_dec, compute_dtype(dtype), {d});
  STD_TORCH_CHECK(k >= 1 && k <= F, op, ": k must lie in [1, F = ", F, "]; got ", k);
  STD_TORCH_CHECK(F < kMost, op, ": more than 2^32 latents are not supported");
  Tensor values = fresh(x, {N, k}, dtype);
  Tensor indices = fresh(x, {N, k}, ScalarType::Long);
  with_row_type(op, dtype, [&](auto type) {
    using R = typename decltype(type)::type;
    using T = Compute<R>;
    const EncodeArgs<R> args{in<R>(x), in<R>(W_enc),   in<T>(b_enc),         in<T>(b_dec), N, d, F,
                             k,        out<R>(values), out<int64_t>(indices)};
    encode_counts.screened = encode_counts.computed = encode_counts.repeated = 0;
#if defined(__x86_64__)
    if constexpr (!std::is_same_v<R, double>) {
      if (isa() == Isa::kAvx512Vnni) {
        avx512_vnni::topk_encode(args, pool());
        return;
      }
    }
#endif
    RK_RUN(topk_encode, args);
  });
  return {values, indices};
}

// out = sum of rows of W weighted by values (where mask is not 0) + b_dec - x, and ||out_n||^2 if asked for.
void decode_into(
    const char* op, const Tensor& values, const MaybeTensor& mask, const Tensor& indices, const Tensor& W,
    const MaybeTensor& b_dec, const MaybeTensor& x, const Tensor& result, const MaybeTensor& sq) {
  with_row_type(op, W.scalar_type(), [&](auto type) {
    using R = typename decltype(type)::type;
    using T = Compute<R>;
    with_index_type(op, indices.scalar_type(), [&](auto index_type) {
      using I = typename decltype(index_type)::type;
      const DecodeArgs<R, I> args{in<R>(values), in<R>(mask),    in<I>(indices),  in<R>(W),
                                  in<T>(b_dec),  in<R>(x),       indices.size(0), indices.size(1),
                                  W.size(1),     out<R>(result), out<T>(sq)};
      RK_RUN(sparse_decode, args);
    });
  });
}

Tensor sparse_decode(const Tensor& values, const Tensor& indices, const Tensor& W_dec, const MaybeTensor& b_dec) {
  const char* op = "sparse_decode";
  check_matrix(op, "indices", indices);
  check_matrix(op, "W_dec", W_dec);
  const int64_t N = indices.size(0);
  const int64_t F = W_dec.size(0);
  const int64_t d = W_dec.size(1);
  const ScalarType dtype = W_dec.scalar_type();
  check(op, "W_dec", W_dec, dtype, {F, d});
  check(op, "b_dec", b_dec, compute_dtype(dtype), {d});
  check_codes(op, values, indices, dtype, N, F);
  Tensor result = fresh(W_dec, {N, d}, dtype);
  decode_into(op, values, std::nullopt, indices, W_dec, b_dec, std::nullopt, result, std::nullopt);
  return result;
}

std::tuple<Tensor, Tensor> decode_residual(
    const Tensor& x, const Tensor& values, const Tensor& indices, const Tensor& W_dec, const MaybeTensor& b_dec) {
  const char* op = "decode_residual";
  check_matrix(op, "x", x);
  check_matrix(op, "W_dec", W_dec);
  const int64_t N = x.size(0);
  const int64_t F = W_dec.size(0);
  const int64_t d = W_dec.size(1);
  const ScalarType dtype = W_dec.scalar_type();
  check(op, "x", x, dtype, {N, d});
  check(op, "W_dec", W_dec, dtype, {F, d});
  check(op, "b_dec", b_dec, compute_dtype(dtype), {d});
  check_codes(op, values, indices, dtype, N, F);
  Tensor e = fresh(x, {N, d}, dtype);
  Tensor sq = fresh(x, {N}, compute_dtype(dtype));
  decode_into(op, values, std::nullopt, indices, W_dec, b_dec, x, e, sq);
  return {e, sq};
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

std::tuple<MaybeTensor, MaybeTensor> sparse_decode_backward(
    const Tensor& grad, const Tensor& values, const Tensor& indices, const Tensor& W_dec, bool need_values,
    bool need_W) {
  const char* op = "sparse_decode_backward";
  check_matrix(op, "grad", grad);
  check_matrix(op, "W_dec", W_dec);
  const int64_t N = grad.size(0);
  const int64_t F = W_dec.size(0);
  const int64_t d = W_dec.size(1);
  const ScalarType dtype = W_dec.scalar_type();
  check(op, "grad", grad, dtype, {N, d});
  check(op, "W_dec", W_dec, dtype, {F, d});
  check_codes(op, values, indices, dtype, N, F);
  const int64_t k = indices.size(1);
  MaybeTensor dvalues;
  MaybeTensor dW;
  if (need_values) {
    dvalues = fresh(values, {N, k}, dtype);
  }
  if (need_W) {
    dW = fresh(W_dec, {F, d}, dtype);
  }
  with_row_type(op, dtype, [&](auto type) {
    using R = typename decltype(type)::type;
    if (need_W) {
      const WeightGradArgs<R> args{
          by_latent<R>(indices, std::nullopt, F),
          in<R>(grad),
          nullptr,
          in<R>(values),
          nullptr,
          in<R>(W_dec),
          F,
          k,
          d,
          out<R>(dvalues),
          out<R>(dW),
          nullptr};
      RK_RUN(weight_grad, args);
    } else if (need_values) {
      with_index_type(op, indices.scalar_type(), [&](auto index_type) {
        using I = typename decltype(index_type)::type;
        const DotArgs<R, I> args{in<R>(grad), in<I>(indices), in<R>(W_dec), N, k, d, out<R>(dvalues)};
        RK_RUN(row_dots, args);
      });
    }
  });
  return {dvalues, dW};
}

std::tuple<MaybeTensor, MaybeTensor, Tensor> topk_encode_backward(
    const Tensor& grad_values, const Tensor& values, const Tensor& indices, const Tensor& x, const Tensor& W_enc,
    const MaybeTensor& b_dec, bool need_x, bool need_W) {
  const char* op = "topk_encode_backward";
  check_matrix(op, "x", x);
  check_matrix(op, "W_enc", W_enc);
  const int64_t N = x.size(0);
  const int64_t d = x.size(1);
  const int64_t F = W_enc.size(0);
  const ScalarType dtype = x.scalar_type();
  check(op, "x", x, dtype, {N, d});
  check(op, "W_enc", W_enc, dtype, {F, d});
  check(op, "b_dec", b_dec, compute_dtype(dtype), {d});
  check_codes(op, values, indices, dtype, N, F);
  const int64_t k = indices.size(1);
  check(op, "grad_values", grad_values, dtype, {N, k});
  MaybeTensor dx;
  MaybeTensor dW;
  Tensor db = fresh(W_enc, {F}, compute_dtype(dtype));
  if (need_x) {
    dx = fresh(x, {N, d}, dtype);
    decode_into(op, grad_values, values, indices, W_enc, std::nullopt, std::nullopt, *dx, std::nullopt);
  }
  if (need_W) {
    dW = fresh(W_enc, {F, d}, dtype);
  }
  with_row_type(op, dtype, [&](auto type) {
    using R = typename decltype(type)::type;
    using T = Compute<R>;
    const WeightGradArgs<R> args{
        by_latent<R>(indices, values, F),
        in<R>(x),
        in<T>(b_dec),
        in<R>(grad_values),
        nullptr,
        nullptr,
        F,
        k,
        d,
        nullptr,
        out<R>(dW),
        out<T>(db)};
    RK_RUN(weight_grad, args);
  });
  return {dx, dW, db};
}

void sae_backward(
    const Tensor& e, const Tensor& x, const Tensor& values, const Tensor& indices, const Tensor& W_enc,
    const Tensor& W_dec, const MaybeTensor& b_dec, double scale, const Tensor& dW_enc, const Tensor& db_enc,
    const Tensor& dW_dec) {
  const char* op = "sae_backward";
  check_matrix(op, "x", x);
  check_matrix(op, "W_dec", W_dec);
  const int64_t N = x.size(0);
  const int64_t d = x.size(1);
  const int64_t F = W_dec.size(0);
  const ScalarType dtype = x.scalar_type();
  const ScalarType ct = compute_dtype(dtype);
  check(op, "x", x, dtype, {N, d});
  check(op, "e", e, dtype, {N, d});
  check(op, "W_enc", W_enc, dtype, {F, d});
  check(op, "W_dec", W_dec, dtype, {F, d});
  check(op, "b_dec", b_dec, ct, {d});
  check(op, "dW_enc", dW_enc, ct, {F, d});
  check(op, "db_enc", db_enc, ct, {F});
  check(op, "dW_dec", dW_dec, ct, {F, d});
  check_codes(op, values, indices, dtype, N, F);
  with_row_type(op, dtype, [&](auto type) {
    using R = typename decltype(type)::type;
    using T = Compute<R>;
    const SaeGradArgs<R> args{
        by_latent<R>(indices, values, F),
        in<R>(e),
        in<R>(x),
        in<R>(values),
        in<R>(W_dec),
        in<T>(b_dec),
        F,
        indices.size(1),
        d,
        static_cast<T>(scale),
        out<T>(dW_enc),
        out<T>(db_enc),
        out<T>(dW_dec)};
    RK_RUN(sae_backward, args);
  });
}

template <class T>
AdamScalars<T> adam_scalars(
    double lr, double beta1, double beta2, double eps, double bias_correction1, double bias_correction2) {
  return AdamScalars<T>{
      static_cast<T>(beta1),
      static_cast<T>(beta2),
      static_cast<T>(eps),
      static_cast<T>(1 - beta1),
      static_cast<T>(1 - beta2),
      static_cast<T>(lr / bias_correction1),
      static_cast<T>(1 / std::sqrt(bias_correction2))};
}

Tensor sae_backward_adam(
    const Tensor& e, const Tensor& x, const Tensor& values, const Tensor& indices, const Tensor& W_enc,
    const Tensor& b_enc, const Tensor& W_dec, const MaybeTensor& b_dec, double scale, const Tensor& m_W_enc,
    const Tensor& v_W_enc, const Tensor& m_b_enc, const Tensor& v_b_enc, const Tensor& m_W_dec, const Tensor& v_W_dec,
    double lr, double beta1, double beta2, double eps, double bias_correction1, double bias_correction2,
    bool remove_parallel, bool unit_norm, const MaybeTensor& extra_rows, const MaybeTensor& extra_dW_enc,
    const MaybeTensor& extra_db_enc, const MaybeTensor& extra_dW_dec) {
  const char* op = "sae_backward_adam";
  check_matrix(op, "x", x);
  check_matrix(op, "W_dec", W_dec);
  const int64_t N = x.size(0);
  const int64_t d = x.size(1);
  const int64_t F = W_dec.size(0);
  const ScalarType dtype = x.scalar_type();
  const ScalarType ct = compute_dtype(dtype);
  check(op, "x", x, dtype, {N, d});
  check(op, "e", e, dtype, {N, d});
  check(op, "b_dec", b_dec, ct, {d});
  const std::pair<const char*, const Tensor&> matrices[] = {{"W_enc", W_enc},     {"W_dec", W_dec},
                                                            {"m_W_enc", m_W_enc}, {"v_W_enc", v_W_enc},
                                                            {"m_W_dec", m_W_dec}, {"v_W_dec", v_W_dec}};
  for (const auto& [name, tensor] : matrices) {
    check(op, name, tensor, dtype, {F, d});
  }
  const std::pair<const char*, const Tensor&> vectors[] = {
      {"b_enc", b_enc}, {"m_b_enc", m_b_enc}, {"v_b_enc", v_b_enc}};
  for (const auto& [name, tensor] : vectors) {
    check(op, name, tensor, dtype, {F});
  }
  check_codes(op, values, indices, dtype, N, F);

  std::vector<int64_t> position;
  if (extra_rows.has_value() && extra_rows->numel() > 0) {
    STD_TORCH_CHECK(
        extra_dW_enc.has_value() && extra_db_enc.has_value() && extra_dW_dec.has_value(), op,
        ": extra_rows needs extra_dW_enc, extra_db_enc and extra_dW_dec");
    const int64_t D = extra_rows->numel();
    check(op, "extra_rows", *extra_rows, ScalarType::Long, {D});
    check(op, "extra_dW_enc", *extra_dW_enc, ct, {D, d});
    check(op, "extra_db_enc", *extra_db_enc, ct, {D});
    check(op, "extra_dW_dec", *extra_dW_dec, ct, {D, d});
    position.assign(static_cast<size_t>(F), -1);
    const int64_t* rows = in<int64_t>(*extra_rows);
    for (int64_t i = 0; i < D; ++i) {
      STD_TORCH_CHECK(
          rows[i] >= 0 && rows[i] < F, op, ": extra_rows must lie in [0, ", F, "), the latents; got ", rows[i]);
      STD_TORCH_CHECK(position[rows[i]] < 0, op, ": extra_rows must be distinct; got ", rows[i], " twice");
      position[rows[i]] = i;
    }
  }
  Tensor result = fresh(x, {d}, ct);
  with_row_type(op, dtype, [&](auto type) {
    using R = typename decltype(type)::type;
    using T = Compute<R>;
    const SaeAdamArgs<R> args{
        by_latent<R>(indices, values, F),
        in<R>(e),
        in<R>(x),
        in<R>(values),
        in<T>(b_dec),
        F,
        indices.size(1),
        d,
        static_cast<T>(scale),
        out<R>(W_enc),
        out<R>(b_enc),
        out<R>(W_dec),
        out<R>(m_W_enc),
        out<R>(v_W_enc),
        out<R>(m_b_enc),
        out<R>(v_b_enc),
        out<R>(m_W_dec),
        out<R>(v_W_dec),
        adam_scalars<T>(lr, beta1, beta2, eps, bias_correction1, bias_correction2),
        remove_parallel,
        unit_norm,
        position.empty() ? nullptr : position.data(),
        in<T>(extra_dW_enc),
        in<T>(extra_db_enc),
        in<T>(extra_dW_dec),
        out<T>(result)};
    RK_RUN(sae_backward_adam, args);
  });
  return result;
}

void adam_rows(
    const Tensor& W, const Tensor& g, const Tensor& m, const Tensor& v, double lr, double beta1, double beta2,
    double eps, double bias_correction1, double bias_correction2, const MaybeTensor& grad_scale, bool remove_parallel,
    bool unit_norm) {
  const char* op = "adam_rows";
  STD_TORCH_CHECK(
      W.dim() == 2 || (W.dim() == 1 && !remove_parallel && !unit_norm), op,
      ": W must be two-dimensional (or one-dimensional without remove_parallel and unit_norm); got ", shape_of(W));
  const int64_t rows = W.dim() == 2 ? W.size(0) : 1;
  const int64_t d = W.size(W.dim() - 1);
  const ScalarType dtype = W.scalar_type();
  const std::pair<const char*, const Tensor&> tensors[] = {{"W", W}, {"g", g}, {"m", m}, {"v", v}};
  for (const auto& [name, tensor] : tensors) {
    if (W.dim() == 2) {
      check(op, name, tensor, dtype, {rows, d});
    } else {
      check(op, name, tensor, dtype, {d});
    }
  }
  double factor = 1;
  if (grad_scale.has_value()) {
    STD_TORCH_CHECK(grad_scale->numel() == 1, op, ": grad_scale must be one number; got shape ", shape_of(*grad_scale));
    with_scalar_type(op, grad_scale->scalar_type(), [&](auto type) {
      factor = static_cast<double>(*in<typename decltype(type)::type>(*grad_scale));
    });
  }
  with_row_type(op, dtype, [&](auto type) {
    using R = typename decltype(type)::type;
    using T = Compute<R>;
    const AdamRowsArgs<R> args{
        out<R>(W),
        in<R>(g),
        out<R>(m),
        out<R>(v),
        rows,
        d,
        static_cast<T>(factor),
        adam_scalars<T>(lr, beta1, beta2, eps, bias_correction1, bias_correction2),
        remove_parallel,
        unit_norm};
    RK_RUN(adam_rows, args);
  });
}

std::string current_isa() {
  return isa_name();
}

void choose_isa(const std::string& name) {
  const std::string problem = set_isa(name);
  STD_TORCH_CHECK(problem.empty(), "set_isa: ", problem);
}

int64_t workspace_bytes() {
  return scratch_total();
}

std::tuple<int64_t, int64_t, int64_t> last_screen() {
  return {encode_counts.screened, encode_counts.computed, encode_counts.repeated};
}

}  // namespace
}  // namespace rk

// (a!) marks what an operator writes to. N tokens, d features, F latents, k values per token.
STABLE_TORCH_LIBRARY_FRAGMENT(refusal_kernels_cpu, m) {
  m.def("topk_encode(Tensor x, Tensor W_enc, Tensor b_enc, int k, Tensor? b_dec=None) -> (Tensor, Tensor)");
  m.def(
      "topk_encode_backward(Tensor grad_values, Tensor values, Tensor indices, Tensor x, Tensor W_enc, Tensor? b_dec, "
      "bool need_x, bool need_W) -> (Tensor?, Tensor?, Tensor)");
  m.def("sparse_decode(Tensor values, Tensor indices, Tensor W_dec, Tensor? b_dec=None) -> Tensor");
  m.def(
      "sparse_decode_backward(Tensor grad, Tensor values, Tensor indices, Tensor W_dec, bool need_values, bool need_W) "
      "-> (Tensor?, Tensor?)");
  m.def(
      "decode_residual(Tensor x, Tensor values, Tensor indices, Tensor W_dec, Tensor? b_dec=None) -> (Tensor, Tensor)");
  m.def(
      "sae_backward(Tensor e, Tensor x, Tensor values, Tensor indices, Tensor W_enc, Tensor W_dec, Tensor? b_dec, "
      "float scale, Tensor(a!) dW_enc, Tensor(b!) db_enc, Tensor(c!) dW_dec) -> ()");
  m.def(
      "sae_backward_adam(Tensor e, Tensor x, Tensor values, Tensor indices, Tensor(a!) W_enc, Tensor(b!) b_enc, "
      "Tensor(c!) W_dec, Tensor? b_dec, float scale, Tensor(d!) m_W_enc, Tensor(e!) v_W_enc, Tensor(f!) m_b_enc, "
      "Tensor(g!) v_b_enc, Tensor(h!) m_W_dec, Tensor(i!) v_W_dec, float lr, float beta1, float beta2, float eps, "
      "float bias_correction1, float bias_correction2, bool remove_parallel, bool unit_norm, Tensor? extra_rows=None, "
      "Tensor? extra_dW_enc=None, Tensor? extra_db_enc=None, Tensor? extra_dW_dec=None) -> Tensor");
  m.def(
      "adam_rows(Tensor(a!) W, Tensor g, Tensor(b!) m, Tensor(c!) v, float lr, float beta1, float beta2, float eps, "
      "float bias_correction1, float bias_correction2, Tensor? grad_scale, bool remove_parallel, bool unit_norm) -> "
      "()");
  // The instruction set in use ("default", "avx2", "avx512", "avx512_vnni"); another one of this processor's; scratch
  // held by all threads; what the latest topk_encode's 8-bit screen did: rows screened, their pairs computed in fp32,
  // rows repeated.
  m.def("isa() -> str");
  m.def("set_isa(str name) -> ()");
  m.def("workspace_bytes() -> int");
  m.def("last_screen() -> (int, int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(refusal_kernels_cpu, CPU, m) {
  m.impl("topk_encode", TORCH_BOX(&rk::topk_encode));
  m.impl("topk_encode_backward", TORCH_BOX(&rk::topk_encode_backward));
  m.impl("sparse_decode", TORCH_BOX(&rk::sparse_decode));
  m.impl("sparse_decode_backward", TORCH_BOX(&rk::sparse_decode_backward));
  m.impl("decode_residual", TORCH_BOX(&rk::decode_residual));
  m.impl("sae_backward", TORCH_BOX(&rk::sae_backward));
  m.impl("sae_backward_adam", TORCH_BOX(&rk::sae_backward_adam));
  m.impl("adam_rows", TORCH_BOX(&rk::adam_rows));
}

STABLE_TORCH_LIBRARY_IMPL(refusal_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&rk::current_isa));
  m.impl("set_isa", TORCH_BOX(&rk::choose_isa));
  m.impl("workspace_bytes", TORCH_BOX(&rk::workspace_bytes));
  m.impl("last_screen", TORCH_BOX(&rk::last_screen));
}
