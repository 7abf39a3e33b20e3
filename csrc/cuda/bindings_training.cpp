// torch.ops.refusal_kernels_cuda: the latent-major backward, and Adam inside it.
#include <torch/csrc/stable/ops.h>

#include <climits>
#include <utility>

#include "cuda/bindings.h"
#include "cuda/sae_adam.h"

namespace {

using namespace rk::cuda::bindings;

// What the latent-major kernels read: the transposed code, see sae_backward.h. Rows and latents are numbered through all
// heads; b_dec has as many rows of d as there are heads. `tokens`, `offsets`, `segment_ends` and `segment_latent` are
// trusted, as `order` is.
struct Entries {
  const Tensor &e, &x, &W_dec;
  const std::optional<Tensor>& b_dec;
  const Tensor &scale, &tokens, &values, &offsets, &segment_ends, &segment_latent;
  int64_t segment;
};

bool has_size(const Tensor& t, int64_t rows, int64_t columns) {
  return t.dim() == 2 && t.size(0) == rows && t.size(1) == columns;
}

const float* floats(const Tensor& t) {
  return static_cast<const float*>(t.const_data_ptr());
}

float* numbers(Tensor& t) {
  return static_cast<float*>(t.mutable_data_ptr());
}

// The kernels' arguments but for what they write, after checking them.
rk::cuda::BackwardArgs check_entries(const Entries& in) {
  const Tensor& e = in.e;
  STD_TORCH_CHECK(e.dim() == 2 && in.W_dec.dim() == 2, "refusal_kernels_cuda: e and W_dec must be matrices");
  const int64_t rows = e.size(0), d = e.size(1), latents = in.W_dec.size(0), segments = in.segment_latent.numel();
  for (const auto& [t, name] : {std::pair{&e, "e"}, {&in.x, "x"}, {&in.W_dec, "W_dec"}, {&in.values, "values"}}) {
    check(*t, name, e, e.scalar_type());
  }
  check(in.scale, "scale", e, ScalarType::Float);
  check(in.tokens, "tokens", e, ScalarType::Int);
  for (const auto& [t, name] :
       {std::pair{&in.offsets, "offsets"},
        {&in.segment_ends, "segment_ends"},
        {&in.segment_latent, "segment_latent"}}) {
    check(*t, name, e, ScalarType::Long);
  }
  STD_TORCH_CHECK(
      has_size(in.x, rows, d) && in.W_dec.size(1) == d, "refusal_kernels_cuda: e and x must be [N, d], W_dec [F, d]");
  STD_TORCH_CHECK(
      in.scale.numel() == 1 && in.tokens.numel() == in.values.numel() && in.offsets.numel() == latents + 1 &&
          in.segment_ends.numel() == latents,
      "refusal_kernels_cuda: scale must be one number, tokens and values have an entry each, offsets F + 1 numbers and "
      "segment_ends F");
  STD_TORCH_CHECK(
      rows <= INT_MAX && d <= INT_MAX / 2 && latents + segments <= INT_MAX / 2 && in.segment >= 1 &&
          in.segment <= INT_MAX,
      "refusal_kernels_cuda: N, d, F and segment must be below 2^30");
  const int64_t heads = in.b_dec && d > 0 ? in.b_dec->numel() / d : 1;
  if (in.b_dec) {
    check(*in.b_dec, "b_dec", e, ScalarType::Float);
    STD_TORCH_CHECK(
        heads >= 1 && in.b_dec->numel() == heads * d && latents % heads == 0,
        "refusal_kernels_cuda: b_dec must have d elements for each of the heads, which share the latents evenly");
  }
  const auto integers = [](const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); };
  rk::cuda::BackwardArgs args{};
  args.e = e.const_data_ptr();
  args.x = in.x.const_data_ptr();
  args.W_dec = in.W_dec.const_data_ptr();
  args.b_dec = in.b_dec ? floats(*in.b_dec) : nullptr;
  args.scale = floats(in.scale);
  args.tokens = static_cast<const int32_t*>(in.tokens.const_data_ptr());
  args.values = in.values.const_data_ptr();
  args.offsets = integers(in.offsets);
  args.ends = integers(in.segment_ends);
  args.segment_latent = integers(in.segment_latent);
  args.latents = static_cast<int>(latents);
  args.segments = static_cast<int>(segments);
  args.segment = static_cast<int>(in.segment);
  args.head_latents = static_cast<int>(latents / heads);
  args.d = static_cast<int>(d);
  return args;
}

// Room for the parts of hot latents and, for wide rows, the dot products; it lives as long as the launches need it.
struct Workspace {
  Tensor part_enc, part_db, part_dec, dots;

  Workspace(const Tensor& like, rk::cuda::BackwardArgs& args, int64_t n_dots)
      : part_enc(torch::stable::new_empty(like, {args.segments, args.d}, ScalarType::Float)),
        part_db(torch::stable::new_empty(like, {args.segments}, ScalarType::Float)),
        part_dec(torch::stable::new_empty(like, {args.segments, args.d}, ScalarType::Float)),
        dots(torch::stable::new_empty(like, {n_dots}, ScalarType::Float)) {
    args.part_enc = numbers(part_enc);
    args.part_db = numbers(part_db);
    args.part_dec = numbers(part_dec);
    args.dots = numbers(dots);
  }
};

void sae_backward(
    Tensor e, Tensor x, Tensor W_dec, std::optional<Tensor> b_dec, Tensor scale, Tensor tokens, Tensor values,
    Tensor offsets, Tensor segment_ends, Tensor segment_latent, int64_t segment, Tensor dW_enc, Tensor db_enc,
    Tensor dW_dec, bool accumulate) {
  rk::cuda::BackwardArgs args =
      check_entries({e, x, W_dec, b_dec, scale, tokens, values, offsets, segment_ends, segment_latent, segment});
  for (const auto& [t, name] : {std::pair{&dW_enc, "dW_enc"}, {&db_enc, "db_enc"}, {&dW_dec, "dW_dec"}}) {
    check(*t, name, e, ScalarType::Float);
  }
  STD_TORCH_CHECK(
      has_size(dW_enc, args.latents, args.d) && has_size(dW_dec, args.latents, args.d) &&
          db_enc.numel() == args.latents,
      "refusal_kernels_cuda: dW_enc and dW_dec must be [F, d], db_enc [F]");
  if (args.d == 0 || args.latents == 0) {
    return;
  }
  const torch::stable::accelerator::DeviceGuard guard(e.get_device_index());
  const rk::cuda::RowType type = row_type(e, "e");
  const bool wide = rk::cuda::split_backward(args.d, type, true).chunks > 1;
  const Workspace workspace(e, args, wide ? values.numel() : 0);
  args.dW_enc = numbers(dW_enc);
  args.db_enc = numbers(db_enc);
  args.dW_dec = numbers(dW_dec);
  args.accumulate = accumulate;
  check_launch(rk::cuda::sae_backward(type, args, current_stream(e)), "sae_backward");
}

// State of one matrix: see sae_adam.h.
rk::cuda::StateRows check_state(
    const Tensor& e, const char* name, Tensor& W, std::optional<Tensor>& low, Tensor& m, Tensor& v,
    std::optional<Tensor>& copy, int64_t latents, int64_t salt, ScalarType moments) {
  check(W, name, e, low ? ScalarType::BFloat16 : ScalarType::Float);
  check(m, "a moment", e, moments);
  check(v, "a moment", e, moments);
  bool sizes = true;
  for (const Tensor* t : {&W, &m, &v}) sizes = sizes && has_size(*t, latents, e.size(1));
  if (low) {
    check(*low, "low", e, ScalarType::Short);
    sizes = sizes && has_size(*low, latents, e.size(1));
    STD_TORCH_CHECK(
        e.scalar_type() == ScalarType::BFloat16, "refusal_kernels_cuda: weights in halves need bfloat16 rows");
  }
  if (copy) {
    check(*copy, "copy", e, e.scalar_type());
    sizes = sizes && has_size(*copy, latents, e.size(1));
  }
  STD_TORCH_CHECK(sizes, "refusal_kernels_cuda: ", name, " and its state must be [F, d]");
  return {
      W.mutable_data_ptr(),
      low ? static_cast<int16_t*>(low->mutable_data_ptr()) : nullptr,
      m.mutable_data_ptr(),
      v.mutable_data_ptr(),
      copy ? copy->mutable_data_ptr() : nullptr,
      static_cast<uint32_t>(salt)};
}

// The latents' step of Adam: see sae_adam.h. W_dec_seen are the decoder's weights in e's type, as the forward pass saw
// them: the copy, the upper halves or the weights themselves may be the same tensor.
void sae_backward_adam(
    Tensor e, Tensor x, Tensor W_dec_seen, std::optional<Tensor> b_dec, Tensor scale, Tensor tokens, Tensor values,
    Tensor offsets, Tensor segment_ends, Tensor segment_latent, int64_t segment, Tensor W_enc,
    std::optional<Tensor> low_enc, Tensor m_enc, Tensor v_enc, std::optional<Tensor> copy_enc, Tensor W_dec,
    std::optional<Tensor> low_dec, Tensor m_dec, Tensor v_dec, std::optional<Tensor> copy_dec, Tensor b_enc, Tensor m_b,
    Tensor v_b, std::optional<Tensor> position, std::optional<Tensor> extra_enc, std::optional<Tensor> extra_db,
    std::optional<Tensor> extra_dec, Tensor through, double step_size, double beta1, double one_minus_beta1,
    double beta2, double one_minus_beta2, double eps, double inverse_root_bc2, bool remove_parallel, bool unit_norm,
    int64_t salt_enc, int64_t salt_dec) {
  rk::cuda::AdamArgs args{};
  args.entries =
      check_entries({e, x, W_dec_seen, b_dec, scale, tokens, values, offsets, segment_ends, segment_latent, segment});
  const int64_t latents = args.entries.latents, d = args.entries.d;
  STD_TORCH_CHECK(
      through.dim() == 3 && through.size(0) >= 1 && latents % through.size(0) == 0,
      "refusal_kernels_cuda: through must be [heads, teams, d], the heads sharing the latents evenly");
  const int64_t heads = through.size(0), head_latents = latents / heads;
  STD_TORCH_CHECK(
      through.size(1) == rk::cuda::adam_teams(static_cast<int>(head_latents)) && through.size(2) == d &&
          (!b_dec || b_dec->numel() == heads * d),
      "refusal_kernels_cuda: through must have a row of d for every team, b_dec one for every head");
  const ScalarType moments = m_enc.scalar_type();
  STD_TORCH_CHECK(
      moments == ScalarType::Float || moments == ScalarType::BFloat16,
      "refusal_kernels_cuda: moments must be float32 or bfloat16");
  args.enc = check_state(e, "W_enc", W_enc, low_enc, m_enc, v_enc, copy_enc, latents, salt_enc, moments);
  args.dec = check_state(e, "W_dec", W_dec, low_dec, m_dec, v_dec, copy_dec, latents, salt_dec, moments);
  STD_TORCH_CHECK(
      low_enc.has_value() == low_dec.has_value(), "refusal_kernels_cuda: both matrices are in halves or neither");
  for (const auto& [t, name] : {std::pair{&b_enc, "b_enc"}, {&m_b, "m_b"}, {&v_b, "v_b"}, {&through, "through"}}) {
    check(*t, name, e, ScalarType::Float);
  }
  STD_TORCH_CHECK(
      b_enc.numel() == latents && m_b.numel() == latents && v_b.numel() == latents,
      "refusal_kernels_cuda: b_enc and its moments must be [F]");
  if (position) {
    STD_TORCH_CHECK(
        extra_enc && extra_db && extra_dec, "refusal_kernels_cuda: position comes with the three extra gradients");
    check(*position, "position", e, ScalarType::Long);
    for (const auto& [t, name] :
         {std::pair{&*extra_enc, "extra_enc"}, {&*extra_db, "extra_db"}, {&*extra_dec, "extra_dec"}}) {
      check(*t, name, e, ScalarType::Float);
    }
    const int64_t rows = extra_db->numel();
    STD_TORCH_CHECK(
        rows % heads == 0 && extra_enc->numel() == rows * d && extra_dec->numel() == rows * d &&
            position->numel() % heads == 0 && position->numel() / heads >= head_latents,
        "refusal_kernels_cuda: extra_enc and extra_dec must be [heads, D, d], extra_db [heads, D], position [heads, "
        "F]");
    args.position = static_cast<const int64_t*>(position->const_data_ptr());
    args.extra_enc = floats(*extra_enc);
    args.extra_db = floats(*extra_db);
    args.extra_dec = floats(*extra_dec);
    args.positions = position->numel() / heads;
    args.extra_rows = rows / heads;
  }
  if (d == 0 || latents == 0) {
    return;
  }
  const torch::stable::accelerator::DeviceGuard guard(e.get_device_index());
  const Workspace workspace(e, args.entries, 0);
  args.b_enc = numbers(b_enc);
  args.m_b = numbers(m_b);
  args.v_b = numbers(v_b);
  args.through = numbers(through);
  args.heads = static_cast<int>(heads);
  args.teams = static_cast<int>(through.size(1));
  args.short_moments = moments == ScalarType::BFloat16;
  args.remove_parallel = remove_parallel;
  args.unit_norm = unit_norm;
  args.step_size = static_cast<float>(step_size);
  args.beta1 = static_cast<float>(beta1);
  args.one_minus_beta1 = static_cast<float>(one_minus_beta1);
  args.beta2 = static_cast<float>(beta2);
  args.one_minus_beta2 = static_cast<float>(one_minus_beta2);
  args.eps = static_cast<float>(eps);
  args.inverse_root_bc2 = static_cast<float>(inverse_root_bc2);
  check_launch(rk::cuda::sae_backward_adam(row_type(e, "e"), args, current_stream(e)), "sae_backward_adam");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(refusal_kernels_cuda, m) {
  m.def(
      "sae_backward(Tensor e, Tensor x, Tensor W_dec, Tensor? b_dec, Tensor scale, Tensor tokens, Tensor values, "
      "Tensor offsets, Tensor segment_ends, Tensor segment_latent, int segment, Tensor(a!) dW_enc, Tensor(b!) db_enc, "
      "Tensor(c!) dW_dec, bool accumulate) -> ()");
  m.def(
      "sae_backward_adam(Tensor e, Tensor x, Tensor W_dec_seen, Tensor? b_dec, Tensor scale, Tensor tokens, "
      "Tensor values, Tensor offsets, Tensor segment_ends, Tensor segment_latent, int segment, Tensor(a!) W_enc, "
      "Tensor(b!)? low_enc, Tensor(c!) m_enc, Tensor(d!) v_enc, Tensor(e!)? copy_enc, Tensor(f!) W_dec, "
      "Tensor(g!)? low_dec, Tensor(h!) m_dec, Tensor(i!) v_dec, Tensor(j!)? copy_dec, Tensor(k!) b_enc, "
      "Tensor(l!) m_b, Tensor(m!) v_b, Tensor? position, Tensor? extra_enc, Tensor? extra_db, Tensor? extra_dec, "
      "Tensor(n!) through, float step_size, float beta1, float one_minus_beta1, float beta2, float one_minus_beta2, "
      "float eps, float inverse_root_bc2, bool remove_parallel, bool unit_norm, int salt_enc, int salt_dec) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(refusal_kernels_cuda, CUDA, m) {
  m.impl("sae_backward", TORCH_BOX(&sae_backward));
  m.impl("sae_backward_adam", TORCH_BOX(&sae_backward_adam));
}
