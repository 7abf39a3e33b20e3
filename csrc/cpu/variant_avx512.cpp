// AVX-512 F/BW/DQ/VL (Skylake-X, Zen 4 and later).
//
// The instruction set is chosen by a pragma after every library header, never by a compiler flag: inline functions of
// the standard library then stay baseline code, so the linker cannot pick a copy that an older machine cannot run.
#if defined(__x86_64__)
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numeric>
#include <type_traits>
#include <utility>

#include <immintrin.h>

#include "csc.h"
#include "csr_pool.h"
#include "kernels.h"
#include "select.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")
#endif

#define RK_ISA avx512
#define RK_VECTOR_BYTES 64
#include "simd.h"
#include "topk_encode.h"
#include "csr_encode.h"
#include "sparse_decode.h"
#include "adam.h"
#include "compact_adam.h"
#include "backward.h"
#include "projection.h"
#include "instantiate.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
