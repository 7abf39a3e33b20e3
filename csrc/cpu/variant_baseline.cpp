// The build's own baseline (SSE2 on x86-64, NEON on AArch64).
//
// The instruction set is chosen by a pragma after every library header, never by a compiler flag: inline functions of
// the standard library then stay baseline code, so the linker cannot pick a copy that an older machine cannot run.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numeric>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "csc.h"
#include "csr_pool.h"
#include "kernels.h"
#include "select.h"

#define RK_ISA baseline
#define RK_VECTOR_BYTES 16
#include "simd.h"
#include "topk_encode.h"
#include "csr_encode.h"
#include "sparse_decode.h"
#include "adam.h"
#include "compact_adam.h"
#include "backward.h"
#include "projection.h"
#include "instantiate.h"
