// torch.ops.refusal_kernels_cuda: the CUDA kernels behind torch's stable C ABI. Shapes and dtypes are checked by the
// Python operators; what is checked here again is what would otherwise read or write out of bounds.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <climits>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/projection.h"
#include "cuda/row_filter.h"
#include "cuda/sae_backward.h"
#include "cuda/sparse_decode.h"

// Weak: a CPU-only torch does not have it, and this library must load there too. It is called with CUDA tensors only.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostRows = rk::cuda::kMaxGridX * rk::cuda::kFilterWarps;

rk::cuda::RowType row_type(const Tensor& rows, const char* name) {
  switch (rows.scalar_type()) {
    case ScalarType::Float:
      return rk::cuda::RowType::kFloat32;
    case ScalarType::BFloat16:
      return rk::cuda::RowType::kBFloat16;
    case ScalarType::Half:
      return rk::cuda::RowType::kFloat16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, "refusal_kernels_cuda: ", name, " must be float32, bfloat16 or float16");
}

void check(const Tensor& t, const char* name, const Tensor& like, std::optional<ScalarType> dtype) {
  STD_TORCH_CHECK(t.is_contiguous(), "refusal_kernels_cuda: ", name, " must be contiguous");
  STD_TORCH_CHECK(
      t.get_device_index() == like.get_device_index() && t.is_cuda(), "refusal_kernels_cuda: ", name,
      " must be on the device of the other tensors");
  if (dtype) STD_TORCH_CHECK(t.scalar_type() == *dtype, "refusal_kernels_cuda: ", name, " has the wrong dtype");
}

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

void* current_stream(const Tensor& on) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "refusal_kernels_cuda: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  return stream;
}

void check_launch(const char* error, const char* kernel) {
  STD_TORCH_CHECK(error == nullptr, "refusal_kernels_cuda: ", kernel, ": ", error);
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

// sae_backward on the transposed code: see sae_backward.h. Rows and latents are numbered through all heads; b_dec has as
// many rows of d as there are heads. `tokens`, `offsets`, `segment_ends` and `segment_latent` are trusted, as `order` is.
void sae_backward(
    Tensor e, Tensor x, Tensor W_dec, std::optional<Tensor> b_dec, Tensor scale, Tensor tokens, Tensor values,
    Tensor offsets, Tensor segment_ends, Tensor segment_latent, int64_t segment, Tensor dW_enc, Tensor db_enc,
    Tensor dW_dec, bool accumulate) {
  const auto has_size = [](const Tensor& t, int64_t rows, int64_t columns) {
    return t.dim() == 2 && t.size(0) == rows && t.size(1) == columns;
  };
  STD_TORCH_CHECK(e.dim() == 2 && W_dec.dim() == 2, "refusal_kernels_cuda: e and W_dec must be matrices");
  const int64_t rows = e.size(0), d = e.size(1), latents = W_dec.size(0), segments = segment_latent.numel();
  const int64_t entries = values.numel();
  for (const auto& [t, name] : {std::pair{&e, "e"}, {&x, "x"}, {&W_dec, "W_dec"}, {&values, "values"}}) {
    check(*t, name, e, e.scalar_type());
  }
  for (const auto& [t, name] :
       {std::pair{&scale, "scale"}, {&dW_enc, "dW_enc"}, {&db_enc, "db_enc"}, {&dW_dec, "dW_dec"}}) {
    check(*t, name, e, ScalarType::Float);
  }
  check(tokens, "tokens", e, ScalarType::Int);
  for (const auto& [t, name] :
       {std::pair{&offsets, "offsets"}, {&segment_ends, "segment_ends"}, {&segment_latent, "segment_latent"}}) {
    check(*t, name, e, ScalarType::Long);
  }
  STD_TORCH_CHECK(
      has_size(x, rows, d) && W_dec.size(1) == d && has_size(dW_enc, latents, d) && has_size(dW_dec, latents, d) &&
          db_enc.numel() == latents,
      "refusal_kernels_cuda: e and x must be [N, d], W_dec, dW_enc and dW_dec [F, d], db_enc [F]");
  STD_TORCH_CHECK(
      scale.numel() == 1 && tokens.numel() == entries && offsets.numel() == latents + 1 &&
          segment_ends.numel() == latents,
      "refusal_kernels_cuda: scale must be one number, tokens and values have an entry each, offsets F + 1 numbers and "
      "segment_ends F");
  STD_TORCH_CHECK(
      rows <= INT_MAX && d <= INT_MAX / 2 && latents + segments <= INT_MAX / 2 && segment >= 1 && segment <= INT_MAX,
      "refusal_kernels_cuda: N, d, F and segment must be below 2^30");
  const int64_t heads = b_dec && d > 0 ? b_dec->numel() / d : 1;
  if (b_dec) {
    check(*b_dec, "b_dec", e, ScalarType::Float);
    STD_TORCH_CHECK(
        heads >= 1 && b_dec->numel() == heads * d && latents % heads == 0,
        "refusal_kernels_cuda: b_dec must have d elements for each of the heads, which share the latents evenly");
  }
  if (d == 0 || latents == 0) {
    return;
  }
  const torch::stable::accelerator::DeviceGuard guard(e.get_device_index());
  const rk::cuda::RowType type = row_type(e, "e");
  const bool wide = rk::cuda::split_backward(d, type, true).chunks > 1;
  Tensor part_enc = torch::stable::new_empty(db_enc, {segments, d});
  Tensor part_db = torch::stable::new_empty(db_enc, {segments});
  Tensor part_dec = torch::stable::new_empty(db_enc, {segments, d});
  Tensor dots = torch::stable::new_empty(db_enc, {wide ? entries : 0});
  const auto numbers = [](Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  const auto integers = [](const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); };
  const rk::cuda::BackwardArgs args{
      e.const_data_ptr(),
      x.const_data_ptr(),
      W_dec.const_data_ptr(),
      b_dec ? static_cast<const float*>(b_dec->const_data_ptr()) : nullptr,
      static_cast<const float*>(scale.const_data_ptr()),
      static_cast<const int32_t*>(tokens.const_data_ptr()),
      values.const_data_ptr(),
      integers(offsets),
      integers(segment_ends),
      integers(segment_latent),
      numbers(dW_enc),
      numbers(db_enc),
      numbers(dW_dec),
      numbers(part_enc),
      numbers(part_db),
      numbers(part_dec),
      numbers(dots),
      static_cast<int>(latents),
      static_cast<int>(segments),
      static_cast<int>(segment),
      static_cast<int>(latents / heads),
      static_cast<int>(d),
      accumulate};
  check_launch(rk::cuda::sae_backward(type, args, current_stream(e)), "sae_backward");
}

// ---- the projection: see projection.h ------------------------------------------------------------------------------

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

STABLE_TORCH_LIBRARY(refusal_kernels_cuda, m) {
  m.def("sparse_decode(Tensor values, Tensor indices, Tensor W_dec, Tensor? b_dec) -> Tensor");
  m.def(
      "sparse_decode_backward(Tensor grad, Tensor values, Tensor indices, Tensor W_dec, Tensor? order, "
      "Tensor? offsets, bool need_values) -> (Tensor, Tensor)");
  m.def(
      "row_filter(Tensor pre, Tensor bias, Tensor(a!) keys, Tensor(b!) count, Tensor(c!) limit, int first, bool last, "
      "int k) -> ()");
  m.def(
      "sae_backward(Tensor e, Tensor x, Tensor W_dec, Tensor? b_dec, Tensor scale, Tensor tokens, Tensor values, "
      "Tensor offsets, Tensor segment_ends, Tensor segment_latent, int segment, Tensor(a!) dW_enc, Tensor(b!) db_enc, "
      "Tensor(c!) dW_dec, bool accumulate) -> ()");
  m.def(
      "projection_table(Tensor[] tensors, int[] dims, Tensor[] bases, int[] basis_of, Tensor[] against, "
      "int[] against_of) -> (Tensor, Tensor, int)");
  m.def("project_out_by_table(Tensor table, Tensor items, int shape, float strength) -> ()");
  m.def("project_out_in_place(Tensor(a!) g, int dim, Tensor basis, float strength, Tensor? against) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(refusal_kernels_cuda, CUDA, m) {
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
  m.impl("sparse_decode_backward", TORCH_BOX(&sparse_decode_backward));
  m.impl("row_filter", TORCH_BOX(&row_filter));
  m.impl("sae_backward", TORCH_BOX(&sae_backward));
  m.impl("project_out_by_table", TORCH_BOX(&project_out_by_table));
  m.impl("project_out_in_place", TORCH_BOX(&project_out_in_place));
}

// Addresses and sizes only: for tensors on any device.
STABLE_TORCH_LIBRARY_IMPL(refusal_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("projection_table", TORCH_BOX(&projection_table));
}
