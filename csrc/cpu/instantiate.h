// The types every variant provides.
#pragma once

namespace rk {
namespace RK_ISA {

#define RK_ROWS(R)                                                                        \
  template void topk_encode<R>(const EncodeArgs<R>&, const Threads&);                     \
  template void csr_encode<R>(const CsrEncodeArgs<R>&, const Threads&);                   \
  template void sparse_decode<R, int32_t>(const DecodeArgs<R, int32_t>&, const Threads&); \
  template void sparse_decode<R, int64_t>(const DecodeArgs<R, int64_t>&, const Threads&); \
  template void row_dots<R, int32_t>(const DotArgs<R, int32_t>&, const Threads&);         \
  template void row_dots<R, int64_t>(const DotArgs<R, int64_t>&, const Threads&);         \
  template void weight_grad<R>(const WeightGradArgs<R>&, const Threads&);                 \
  template void sae_backward<R>(const SaeGradArgs<R>&, const Threads&);                   \
  template void sae_backward_adam<R>(const SaeAdamArgs<R>&, const Threads&);              \
  template void adam_rows<R>(const AdamRowsArgs<R>&, const Threads&);
RK_ROWS(float)
RK_ROWS(double)
RK_ROWS(BF16)
RK_ROWS(F16)
#undef RK_ROWS
template void project_out<float>(const ProjectionArgs<float>&, const Threads&);
template void project_out<double>(const ProjectionArgs<double>&, const Threads&);

}  // namespace RK_ISA
}  // namespace rk
