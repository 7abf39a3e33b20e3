// Operators of a training step: all gradients of the autoencoder's loss, with or without Adam, and Adam by itself.
#include <cmath>
#include <utility>
#include <vector>

#include "operators.h"

namespace rk {
namespace {

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
  check_codes(op, values, indices, dtype, N);
  check_range(op, indices, F);
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
  check_codes(op, values, indices, dtype, N);
  check_range(op, indices, F);

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
      if (rows[i] == -1) {  // the list of a head is padded to the length of the longest
        continue;
      }
      STD_TORCH_CHECK(
          rows[i] >= 0 && rows[i] < F, op, ": extra_rows must lie in [0, ", F, "), the latents, or be -1; got ",
          rows[i]);
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

// The number in grad_scale; 1 where there is none.
double factor_of(const char* op, const MaybeTensor& grad_scale) {
  double factor = 1;
  if (grad_scale.has_value()) {
    STD_TORCH_CHECK(grad_scale->numel() == 1, op, ": grad_scale must be one number; got shape ", shape_of(*grad_scale));
    with_scalar_type(op, grad_scale->scalar_type(), [&](auto type) {
      factor = static_cast<double>(*in<typename decltype(type)::type>(*grad_scale));
    });
  }
  return factor;
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
  const double factor = factor_of(op, grad_scale);
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

void adam_compact_rows(
    const Tensor& W, const MaybeTensor& low, const Tensor& g, const Tensor& m, const Tensor& v, double lr, double beta1,
    double beta2, double eps, double bias_correction1, double bias_correction2, const MaybeTensor& grad_scale,
    bool remove_parallel, bool unit_norm, int64_t salt) {
  const char* op = "adam_compact_rows";
  check_matrix(op, "W", W);
  const int64_t rows = W.size(0);
  const int64_t d = W.size(1);
  const bool halves = low.has_value();
  const bool narrow = m.scalar_type() == ScalarType::BFloat16;
  const ScalarType moments = narrow ? ScalarType::BFloat16 : ScalarType::Float;
  check(op, "W", W, halves ? ScalarType::BFloat16 : ScalarType::Float, {rows, d});
  check(op, "low", low, ScalarType::Short, {rows, d});
  check(op, "g", g, ScalarType::Float, {rows, d});
  check(op, "m", m, moments, {rows, d});
  check(op, "v", v, moments, {rows, d});
  STD_TORCH_CHECK(salt >= 0 && salt <= kMost, op, ": salt must be in [0, 2^32); got ", salt);
  const CompactAdamArgs args{
      halves ? nullptr : out<float>(W),
      halves ? out<BF16>(W) : nullptr,
      out<int16_t>(low),
      in<float>(g),
      narrow ? nullptr : out<float>(m),
      narrow ? nullptr : out<float>(v),
      narrow ? out<BF16>(m) : nullptr,
      narrow ? out<BF16>(v) : nullptr,
      rows,
      d,
      static_cast<float>(factor_of(op, grad_scale)),
      adam_scalars<float>(lr, beta1, beta2, eps, bias_correction1, bias_correction2),
      remove_parallel,
      unit_norm,
      static_cast<uint32_t>(salt)};
  RK_RUN(adam_compact_rows, args);
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(refusal_kernels_cpu, CPU, m) {
  m.impl("sae_backward", TORCH_BOX(&rk::sae_backward));
  m.impl("sae_backward_adam", TORCH_BOX(&rk::sae_backward_adam));
  m.impl("adam_rows", TORCH_BOX(&rk::adam_rows));
  m.impl("adam_compact_rows", TORCH_BOX(&rk::adam_compact_rows));
}
