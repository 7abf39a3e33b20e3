// torch.ops.refusal_kernels_cpu.*: all schemas, and the operators without tensors. The others are implemented in
// ops_codes.cpp, ops_csr.cpp, ops_training.cpp and ops_projection.cpp.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "isa.h"
#include "kernels.h"

namespace rk {
namespace {

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
  // Codes with rows of different lengths: values [nnz], latents [nnz], offsets [N + 1].
  m.def(
      "batch_topk_encode(Tensor x, Tensor W_enc, Tensor b_enc, int k, Tensor? b_dec=None) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "threshold_encode(Tensor x, Tensor W_enc, Tensor b_enc, Tensor threshold, Tensor? b_dec=None) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "csr_encode_backward(Tensor grad_values, Tensor latents, Tensor offsets, Tensor x, Tensor W_enc, Tensor? b_dec, "
      "bool need_x, bool need_W) -> (Tensor?, Tensor?, Tensor)");
  m.def("sparse_decode_csr(Tensor values, Tensor latents, Tensor offsets, Tensor W_dec, Tensor? b_dec=None) -> Tensor");
  m.def(
      "sparse_decode_csr_backward(Tensor grad, Tensor values, Tensor latents, Tensor offsets, Tensor W_dec, "
      "bool need_values, bool need_W) -> (Tensor?, Tensor?)");
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
  m.def(
      "adam_compact_rows(Tensor(a!) W, Tensor(b!)? low, Tensor g, Tensor(c!) m, Tensor(d!) v, float lr, float beta1, "
      "float beta2, float eps, float bias_correction1, float bias_correction2, Tensor? grad_scale, "
      "bool remove_parallel, bool unit_norm, int salt) -> ()");
  m.def("project_out(Tensor g, int dim, Tensor basis, float strength, Tensor? against=None) -> Tensor");
  m.def(
      "project_out_grouped(Tensor(a!)[] tensors, int[] dims, Tensor[] bases, int[] basis_of, Tensor[] against, "
      "int[] against_of, float strength) -> ()");
  // The same in two halves: a table of the tensors' addresses, made once, and calls with it. Whoever calls keeps every
  // tensor alive and in its place.
  m.def(
      "project_out_table(Tensor[] tensors, int[] dims, Tensor[] bases, int[] basis_of, Tensor[] against, "
      "int[] against_of) -> Tensor");
  m.def("project_out_by_table(Tensor table, float strength) -> ()");
  // The instruction set in use ("default", "avx2", "avx512", "avx512_vnni"); another one of this processor's; scratch
  // held by all threads; what the latest topk_encode's 8-bit screen did: rows screened, their pairs computed in fp32,
  // rows repeated.
  m.def("isa() -> str");
  m.def("set_isa(str name) -> ()");
  m.def("workspace_bytes() -> int");
  m.def("last_screen() -> (int, int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(refusal_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&rk::current_isa));
  m.impl("set_isa", TORCH_BOX(&rk::choose_isa));
  m.impl("workspace_bytes", TORCH_BOX(&rk::workspace_bytes));
  m.impl("last_screen", TORCH_BOX(&rk::last_screen));
}
