// AVX-512 with VNNI (Cascade Lake, Ice Lake, Zen 4 and later): topk_encode behind an 8-bit screen. The other kernels have
// nothing to gain and run as compiled for AVX-512 alone; fp64 has no screen.
//
// The instruction set is chosen by a pragma after every library header, never by a compiler flag: inline functions of
// the standard library then stay baseline code, so the linker cannot pick a copy that an older machine cannot run.
#if defined(__x86_64__)
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <type_traits>

#include <immintrin.h>

#include "csc.h"
#include "csr_pool.h"
#include "kernels.h"
#include "select.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                        \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi,bmi2"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi,bmi2")
#endif

#define RK_ISA avx512_vnni
#define RK_SCREEN
#define RK_VECTOR_BYTES 64
#include "simd.h"
#include "screened_encode.h"

namespace rk {
namespace RK_ISA {
template void topk_encode<float>(const EncodeArgs<float>&, const Threads&);
template void topk_encode<BF16>(const EncodeArgs<BF16>&, const Threads&);
template void topk_encode<F16>(const EncodeArgs<F16>&, const Threads&);
}  // namespace RK_ISA
}  // namespace rk

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
