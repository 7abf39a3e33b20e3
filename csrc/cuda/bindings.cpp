// torch.ops.refusal_kernels_cuda: the CUDA kernels behind torch's stable C ABI. Here the decoder and the row filter.
#include <torch/csrc/stable/ops.h>

#include <climits>
#include <tuple>

#include "cuda/bindings.h"
#include "cuda/row_filter.h"

namespace {

using namespace rk::cuda::bindings;

constexpr int64_t kMostRows = rk::cuda::kMaxGridX * rk::cuda::kFilterWarps;

// Sizes common to the three kernels, after checking them.
struct Sizes {
  int64_t n, k, n_latents, d;
};

Sizes check_decoder(const Tensor& values, const Tensor& indices, const Tensor& W_dec) {
  STD_TORCH_CHECK(
      values.dim() == 2 && indices.dim() == 2 && W_dec.dim() == 2,
      "refusal_kernels_cuda: values, indices and W_dec must be matrices");
  const Sizes s{values.size(0), values.size(1), W_dec.size(0), W_dec.size(1)};
  STD_TORCH_CHECK(
      indices.size(0) == s.n && indices.size(1) == s.k, "refusal_kernels_cuda: indices must have the shape of values");
  STD_TORCH_CHECK(s.n <= INT_MAX && s.n_latents <= INT_MAX, "refusal_kernels_cuda: N and F must be below 2^31");
  check(W_dec, "W_dec", W_dec, std::nullopt);
  check(values, "values", W_dec, W_dec.scalar_type());
  check(indices, "indices", W_dec, std::nullopt);
  STD_TORCH_CHECK(
      indices.scalar_type() == ScalarType::Int || indices.scalar_type() == ScalarType::Long,
      "refusal_kernels_cuda: indices must be int32 or int64");
  return s;
}

Tensor sparse_decode(Tensor values, Tensor indices, Tensor W_dec, std::optional<Tensor> b_dec) {
  const Sizes s = check_decoder(values, indices, W_dec);
  if (b_dec) {
    check(*b_dec, "b_dec", W_dec, ScalarType::Float);
    STD_TORCH_CHECK(b_dec->numel() == s.d, "refusal_kernels_cuda: b_dec must have d elements");
  }
  const torch::stable::accelerator::DeviceGuard guard(W_dec.get_device_index());
  Tensor out = torch::stable::new_empty(W_dec, {s.n, s.d});
  check_launch(
      rk::cuda::sparse_decode(
          row_type(W_dec, "W_dec"), values.const_data_ptr(), indices.const_data_ptr(),
          indices.scalar_type() == ScalarType::Long, W_dec.const_data_ptr(),
          b_dec ? static_cast<const float*>(b_dec->const_data_ptr()) : nullptr, out.mutable_data_ptr(), s.n, s.k,
          s.n_latents, s.d, current_stream(W_dec)),
      "sparse_decode");
  return out;
}

// `order` [N k], entry numbers by latent, ascending within one, and `offsets` [F + 1] where each latent's begin: made by
// the caller with torch's stable sort, so that the sums are the same from run to run. Without them there is no dW_dec.
std::tuple<Tensor, Tensor> sparse_decode_backward(
    Tensor grad, Tensor values, Tensor indices, Tensor W_dec, std::optional<Tensor> order,
    std::optional<Tensor> offsets, bool need_values) {
  const Sizes s = check_decoder(values, indices, W_dec);
  check(grad, "grad", W_dec, W_dec.scalar_type());
  STD_TORCH_CHECK(
      grad.dim() == 2 && grad.size(0) == s.n && grad.size(1) == s.d, "refusal_kernels_cuda: grad must be [N, d]");
  STD_TORCH_CHECK(
      order.has_value() == offsets.has_value(), "refusal_kernels_cuda: order and offsets come together or not at all");
  const torch::stable::accelerator::DeviceGuard guard(W_dec.get_device_index());
  const rk::cuda::RowType type = row_type(W_dec, "W_dec");
  // A gradient that is not asked for comes back with no elements: the stable ABI has no undefined tensor.
  using Shape = std::vector<int64_t>;
  Tensor dvalues = torch::stable::new_empty(values, need_values ? Shape{s.n, s.k} : Shape{0});
  if (need_values) {
    check_launch(
        rk::cuda::sparse_decode_dvalues(
            type, grad.const_data_ptr(), indices.const_data_ptr(), indices.scalar_type() == ScalarType::Long,
            W_dec.const_data_ptr(), dvalues.mutable_data_ptr(), s.n, s.k, s.n_latents, s.d, current_stream(W_dec)),
        "sparse_decode_dvalues");
  }
  Tensor dW_dec = torch::stable::new_empty(W_dec, order ? Shape{s.n_latents, s.d} : Shape{0});
  if (order) {
    check(*order, "order", W_dec, ScalarType::Long);
    check(*offsets, "offsets", W_dec, ScalarType::Long);
    STD_TORCH_CHECK(
        order->numel() == s.n * s.k && offsets->numel() == s.n_latents + 1,
        "refusal_kernels_cuda: order must have N k elements and offsets F + 1");
    check_launch(
        rk::cuda::sparse_decode_dweight(
            type, grad.const_data_ptr(), values.const_data_ptr(), static_cast<const int64_t*>(order->const_data_ptr()),
            static_cast<const int64_t*>(offsets->const_data_ptr()), dW_dec.mutable_data_ptr(), s.k, s.n_latents, s.d,
            current_stream(W_dec)),
        "sparse_decode_dweight");
  }
  return {dvalues, dW_dec};
}

// A chunk of topk_encode: see row_filter.h. keys, count and limit go from chunk to chunk; `first` is 0 in the first.
void row_filter(Tensor pre, Tensor bias, Tensor keys, Tensor count, Tensor limit, int64_t first, bool last, int64_t k) {
  check(pre, "pre", pre, ScalarType::Float);
  check(bias, "bias", pre, ScalarType::Float);
  check(keys, "keys", pre, ScalarType::Long);
  check(count, "count", pre, ScalarType::Int);
  check(limit, "limit", pre, ScalarType::Int);
  STD_TORCH_CHECK(pre.dim() == 2 && keys.dim() == 2, "refusal_kernels_cuda: pre and keys must be matrices");
  const int64_t rows = pre.size(0), columns = pre.size(1);
  STD_TORCH_CHECK(
      keys.size(0) >= rows && keys.size(1) == rk::cuda::kFilterCapacity && count.numel() >= rows &&
          limit.numel() >= rows,
      "refusal_kernels_cuda: keys must be [rows, ", rk::cuda::kFilterCapacity,
      "], count and limit [rows] of pre's rows");
  STD_TORCH_CHECK(
      k >= 1 && k <= rk::cuda::kFilterMostK, "refusal_kernels_cuda: k must be from 1 to ", rk::cuda::kFilterMostK);
  STD_TORCH_CHECK(
      first >= 0 && first + columns <= bias.numel() && bias.numel() <= INT_MAX && rows < kMostRows,
      "refusal_kernels_cuda: bias must have a number for every latent first .. first + columns, fewer than 2^31");
  STD_TORCH_CHECK(!last || first + columns >= k, "refusal_kernels_cuda: k must not exceed the number of latents");
  if (rows == 0) {
    return;
  }
  const torch::stable::accelerator::DeviceGuard guard(pre.get_device_index());
  const rk::cuda::FilterArgs args{
      static_cast<const float*>(pre.const_data_ptr()),
      static_cast<const float*>(bias.const_data_ptr()),
      static_cast<int64_t*>(keys.mutable_data_ptr()),
      static_cast<int32_t*>(count.mutable_data_ptr()),
      static_cast<int32_t*>(limit.mutable_data_ptr()),
      rows,
      static_cast<int32_t>(columns),
      static_cast<int32_t>(first),
      static_cast<int32_t>(k),
      last};
  check_launch(rk::cuda::row_filter(args, current_stream(pre)), "row_filter");
}

}  // namespace

STABLE_TORCH_LIBRARY(refusal_kernels_cuda, m) {
  m.def("sparse_decode(Tensor values, Tensor indices, Tensor W_dec, Tensor? b_dec) -> Tensor");
  m.def(
      "sparse_decode_backward(Tensor grad, Tensor values, Tensor indices, Tensor W_dec, Tensor? order, "
      "Tensor? offsets, bool need_values) -> (Tensor, Tensor)");
  m.def(
      "row_filter(Tensor pre, Tensor bias, Tensor(a!) keys, Tensor(b!) count, Tensor(c!) limit, int first, bool last, "
      "int k) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(refusal_kernels_cuda, CUDA, m) {
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
  m.impl("sparse_decode_backward", TORCH_BOX(&sparse_decode_backward));
  m.impl("row_filter", TORCH_BOX(&row_filter));
}
