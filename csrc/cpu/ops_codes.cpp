// Operators between tokens and codes: topk_encode, sparse_decode, the residual, and their gradients.
#include <atomic>
#include <tuple>
#include <type_traits>

#include "operators.h"

namespace rk {
namespace {

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

// out = sum of rows of W weighted by values (where mask is not 0) + b_dec - x, and ||out_n||^2 if asked for. The kernel
// looks at the range of the indices itself: a pass of its own over cold indices would be a tenth of a call at d = 128.
void decode_into(
    const char* op, const Tensor& values, const MaybeTensor& mask, const Tensor& indices, const Tensor& W,
    const MaybeTensor& b_dec, const MaybeTensor& x, const Tensor& result, const MaybeTensor& sq) {
  with_row_type(op, W.scalar_type(), [&](auto type) {
    using R = typename decltype(type)::type;
    using T = Compute<R>;
    with_index_type(op, indices.scalar_type(), [&](auto index_type) {
      using I = typename decltype(index_type)::type;
      std::atomic<bool> refused{false};
      const DecodeArgs<R, I> args{in<R>(values),  in<R>(mask),     in<I>(indices),  in<R>(W),  in<T>(b_dec),
                                  in<R>(x),       indices.size(0), indices.size(1), W.size(1), W.size(0),
                                  out<R>(result), out<T>(sq),      &refused};
      RK_RUN(sparse_decode, args);
      if (refused) {
        check_range(op, indices, W.size(0));
      }
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
  check_codes(op, values, indices, dtype, N);
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
  check_codes(op, values, indices, dtype, N);
  Tensor e = fresh(x, {N, d}, dtype);
  Tensor sq = fresh(x, {N}, compute_dtype(dtype));
  decode_into(op, values, std::nullopt, indices, W_dec, b_dec, x, e, sq);
  return {e, sq};
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
  check_codes(op, values, indices, dtype, N);
  check_range(op, indices, F);
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
  check_codes(op, values, indices, dtype, N);
  check_range(op, indices, F);
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

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(refusal_kernels_cpu, CPU, m) {
  m.impl("topk_encode", TORCH_BOX(&rk::topk_encode));
  m.impl("topk_encode_backward", TORCH_BOX(&rk::topk_encode_backward));
  m.impl("sparse_decode", TORCH_BOX(&rk::sparse_decode));
  m.impl("sparse_decode_backward", TORCH_BOX(&rk::sparse_decode_backward));
  m.impl("decode_residual", TORCH_BOX(&rk::decode_residual));
}
