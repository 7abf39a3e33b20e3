// Operators of codes whose rows have different lengths: batch_topk_encode, threshold_encode, sparse_decode_csr, and
// their gradients. A code is values [nnz], latents [nnz] and offsets [N + 1]: token n owns offsets[n] .. offsets[n + 1].
#include <algorithm>
#include <atomic>
#include <memory>
#include <tuple>
#include <vector>

#include "csr_pool.h"
#include "operators.h"

namespace rk {
namespace {

using Code = std::tuple<Tensor, Tensor, Tensor>;

void check_csr(const char* op, const Tensor& latents, const Tensor& offsets, int64_t N, int64_t F) {
  STD_TORCH_CHECK(latents.dim() == 1, op, ": latents must be one-dimensional; got ", shape_of(latents));
  const int64_t entries = latents.size(0);
  check(op, "latents", latents, ScalarType::Long, {entries});
  check(op, "offsets", offsets, ScalarType::Long, {N + 1});
  const int64_t* at = in<int64_t>(offsets);
  STD_TORCH_CHECK(
      at[0] == 0 && at[N] == entries && std::is_sorted(at, at + N + 1), op,
      ": offsets must begin with 0, never fall and end with the number of entries, ", entries);
  STD_TORCH_CHECK(N < kMost && entries < kMost, op, ": more than 2^32 tokens or entries are not supported");
  check_range(op, latents, F);
}

// The code of what the pools hold, of which the `most` best (0: all). The pools are in ascending order of the row part,
// then of the latents.
template <class R>
Code code_of(const std::vector<CsrPool<Compute<R>>>& pools, int64_t most, const Tensor& x, int64_t F) {
  const int64_t N = x.size(0);
  std::vector<CsrKey> best;
  if (most > 0) {
    for (const auto& pool : pools) {
      best.insert(best.end(), pool.keys().begin(), pool.keys().end());
      if (static_cast<int64_t>(best.size()) > most) {
        select_largest(best.data(), static_cast<int64_t>(best.size()), most);
        best.resize(static_cast<size_t>(most));
      }
    }
  }
  const auto each_key = [&](const auto& f) {
    std::for_each(best.begin(), best.end(), f);
    for (const auto& pool : pools) {
      if (most == 0) {
        std::for_each(pool.keys().begin(), pool.keys().end(), f);
      }
    }
  };
  Tensor offsets = fresh(x, {N + 1}, ScalarType::Long);
  int64_t* at = out<int64_t>(offsets);
  std::fill(at, at + N + 1, int64_t{0});
  each_key([&](CsrKey key) { ++at[csr_position(key) / F + 1]; });
  for (int64_t n = 0; n < N; ++n) {
    at[n + 1] += at[n];
  }
  const int64_t entries = at[N];
  Tensor values = fresh(x, {entries}, x.scalar_type());
  Tensor latents = fresh(x, {entries}, ScalarType::Long);
  std::unique_ptr<CsrKey[]> by_row(new CsrKey[static_cast<size_t>(entries)]);
  {
    std::vector<int64_t> place(at, at + N);
    each_key(
        [&](CsrKey key) { by_row[static_cast<size_t>(place[static_cast<size_t>(csr_position(key) / F)]++)] = key; });
  }
  R* value_out = out<R>(values);
  int64_t* latent_out = out<int64_t>(latents);
  constexpr int64_t kRowsPerTask = 64;
  parallel_tasks(pool(), (N + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    for (int64_t n = task * kRowsPerTask; n < std::min((task + 1) * kRowsPerTask, N); ++n) {
      CsrKey* first = by_row.get() + at[n];
      CsrKey* last = by_row.get() + at[n + 1];
      const auto before = [](CsrKey a, CsrKey b) { return csr_position(a) < csr_position(b); };
      if (!std::is_sorted(first, last, before)) {  // selection has shuffled them
        std::sort(first, last, before);
      }
      for (int64_t i = at[n]; i < at[n + 1]; ++i) {
        Compute<R> value;
        csr_value(by_row[static_cast<size_t>(i)], value);
        narrow(value, value_out[i]);
        latent_out[i] = csr_position(by_row[static_cast<size_t>(i)]) - n * F;
      }
    }
  });
  return {values, latents, offsets};
}

Code encode(
    const char* op, const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const MaybeTensor& threshold, int64_t k,
    const MaybeTensor& b_dec) {
  check_matrix(op, "x", x);
  check_matrix(op, "W_enc", W_enc);
  const int64_t N = x.size(0);
  const int64_t d = x.size(1);
  const int64_t F = W_enc.size(0);
  const ScalarType dtype = x.scalar_type();
  check(op, "x", x, dtype, {N, d});
  check(op, "W_enc", W_enc, dtype, {F, d});
  check(op, "b_enc", b_enc, compute_dtype(dtype), {F});
  check(op, "threshold", threshold, compute_dtype(dtype), {F});
  check(op, "b_dec", b_dec, compute_dtype(dtype), {d});
  STD_TORCH_CHECK(F < kMost && N < kMost, op, ": more than 2^32 latents or tokens are not supported");
  std::optional<Code> code;
  with_row_type(op, dtype, [&](auto type) {
    using R = typename decltype(type)::type;
    using T = Compute<R>;
    const T zero = largest_zero(R{});
    std::vector<T> least;
    if (threshold.has_value()) {
      least.assign(in<T>(*threshold), in<T>(*threshold) + F);
      for (T& value : least) {  // beside a NaN there is room for NaN alone, which exceeds everything
        value = value == value ? std::max(value, zero) : std::numeric_limits<T>::infinity();
      }
    }
    std::atomic<T> limit{zero};
    const int64_t most = threshold.has_value() ? 0 : N * k;
    const int64_t parts = std::max<int64_t>(pool().count, 1);
    std::vector<CsrPool<T>> pools(static_cast<size_t>(parts), CsrPool<T>(most, &limit));
    const CsrEncodeArgs<R> args{
        {in<R>(x), in<R>(W_enc), in<T>(b_enc), in<T>(b_dec), N, d, F, 0, nullptr, nullptr},
        threshold.has_value() ? least.data() : nullptr,
        pools.data(),
        parts};
    RK_RUN(csr_encode, args);
    code = code_of<R>(pools, most, x, F);
  });
  return *code;
}

Code batch_topk_encode(const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, int64_t k, const MaybeTensor& b_dec) {
  const char* op = "batch_topk_encode";
  check_matrix(op, "W_enc", W_enc);
  STD_TORCH_CHECK(k >= 1 && k <= W_enc.size(0), op, ": k must lie in [1, F = ", W_enc.size(0), "]; got ", k);
  return encode(op, x, W_enc, b_enc, std::nullopt, k, b_dec);
}

Code threshold_encode(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& threshold, const MaybeTensor& b_dec) {
  return encode("threshold_encode", x, W_enc, b_enc, threshold, 0, b_dec);
}

// out = sum of each token's rows of W weighted by values + b_dec.
void decode_into(
    const char* op, const Tensor& values, const Tensor& latents, const Tensor& offsets, const Tensor& W,
    const MaybeTensor& b_dec, const Tensor& result) {
  with_row_type(op, W.scalar_type(), [&](auto type) {
    using R = typename decltype(type)::type;
    using T = Compute<R>;
    std::atomic<bool> refused{false};  // the range has been checked
    const DecodeArgs<R, int64_t> args{
        in<R>(values),
        nullptr,
        in<int64_t>(latents),
        in<R>(W),
        in<T>(b_dec),
        nullptr,
        result.size(0),
        0,
        W.size(1),
        W.size(0),
        out<R>(result),
        nullptr,
        &refused,
        in<int64_t>(offsets)};
    RK_RUN(sparse_decode, args);
  });
}

Tensor sparse_decode_csr(
    const Tensor& values, const Tensor& latents, const Tensor& offsets, const Tensor& W_dec, const MaybeTensor& b_dec) {
  const char* op = "sparse_decode_csr";
  check_matrix(op, "W_dec", W_dec);
  STD_TORCH_CHECK(
      offsets.dim() == 1 && offsets.size(0) > 0, op, ": offsets must have shape [N + 1]; got ", shape_of(offsets));
  const int64_t N = offsets.size(0) - 1;
  const int64_t d = W_dec.size(1);
  const ScalarType dtype = W_dec.scalar_type();
  check(op, "W_dec", W_dec, dtype, {W_dec.size(0), d});
  check(op, "b_dec", b_dec, compute_dtype(dtype), {d});
  check_csr(op, latents, offsets, N, W_dec.size(0));
  check(op, "values", values, dtype, {latents.size(0)});
  Tensor result = fresh(W_dec, {N, d}, dtype);
  decode_into(op, values, latents, offsets, W_dec, b_dec, result);
  return result;
}

std::tuple<MaybeTensor, MaybeTensor> sparse_decode_csr_backward(
    const Tensor& grad, const Tensor& values, const Tensor& latents, const Tensor& offsets, const Tensor& W_dec,
    bool need_values, bool need_W) {
  const char* op = "sparse_decode_csr_backward";
  check_matrix(op, "grad", grad);
  check_matrix(op, "W_dec", W_dec);
  const int64_t N = grad.size(0);
  const int64_t d = grad.size(1);
  const int64_t F = W_dec.size(0);
  const ScalarType dtype = W_dec.scalar_type();
  check(op, "grad", grad, dtype, {N, d});
  check(op, "W_dec", W_dec, dtype, {F, d});
  check_csr(op, latents, offsets, N, F);
  const int64_t entries = latents.size(0);
  check(op, "values", values, dtype, {entries});
  MaybeTensor dvalues;
  MaybeTensor dW;
  if (need_values) {
    dvalues = fresh(values, {entries}, dtype);
  }
  if (need_W) {
    dW = fresh(W_dec, {F, d}, dtype);
  }
  with_row_type(op, dtype, [&](auto type) {
    using R = typename decltype(type)::type;
    if (need_W) {
      const WeightGradArgs<R> args{
          latent_major_csr(in<int64_t>(latents), in<int64_t>(offsets), N, F, pool()),
          in<R>(grad),
          nullptr,
          in<R>(values),
          nullptr,
          in<R>(W_dec),
          F,
          0,
          d,
          out<R>(dvalues),
          out<R>(dW),
          nullptr};
      RK_RUN(weight_grad, args);
    } else if (need_values) {
      const DotArgs<R, int64_t> args{in<R>(grad), in<int64_t>(latents), in<R>(W_dec),        N, 0,
                                     d,           out<R>(dvalues),      in<int64_t>(offsets)};
      RK_RUN(row_dots, args);
    }
  });
  return {dvalues, dW};
}

std::tuple<MaybeTensor, MaybeTensor, Tensor> csr_encode_backward(
    const Tensor& grad_values, const Tensor& latents, const Tensor& offsets, const Tensor& x, const Tensor& W_enc,
    const MaybeTensor& b_dec, bool need_x, bool need_W) {
  const char* op = "csr_encode_backward";
  check_matrix(op, "x", x);
  check_matrix(op, "W_enc", W_enc);
  const int64_t N = x.size(0);
  const int64_t d = x.size(1);
  const int64_t F = W_enc.size(0);
  const ScalarType dtype = x.scalar_type();
  check(op, "x", x, dtype, {N, d});
  check(op, "W_enc", W_enc, dtype, {F, d});
  check(op, "b_dec", b_dec, compute_dtype(dtype), {d});
  check_csr(op, latents, offsets, N, F);
  check(op, "grad_values", grad_values, dtype, {latents.size(0)});
  MaybeTensor dx;
  MaybeTensor dW;
  Tensor db = fresh(W_enc, {F}, compute_dtype(dtype));
  if (need_x) {
    dx = fresh(x, {N, d}, dtype);
    decode_into(op, grad_values, latents, offsets, W_enc, std::nullopt, *dx);
  }
  if (need_W) {
    dW = fresh(W_enc, {F, d}, dtype);
  }
  with_row_type(op, dtype, [&](auto type) {
    using R = typename decltype(type)::type;
    using T = Compute<R>;
    const WeightGradArgs<R> args{
        latent_major_csr(in<int64_t>(latents), in<int64_t>(offsets), N, F, pool()),
        in<R>(x),
        in<T>(b_dec),
        in<R>(grad_values),
        nullptr,
        nullptr,
        F,
        0,
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
  m.impl("batch_topk_encode", TORCH_BOX(&rk::batch_topk_encode));
  m.impl("threshold_encode", TORCH_BOX(&rk::threshold_encode));
  m.impl("csr_encode_backward", TORCH_BOX(&rk::csr_encode_backward));
  m.impl("sparse_decode_csr", TORCH_BOX(&rk::sparse_decode_csr));
  m.impl("sparse_decode_csr_backward", TORCH_BOX(&rk::sparse_decode_csr_backward));
}
