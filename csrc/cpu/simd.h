// Vectors of one instruction set, as GCC/Clang vector extensions; compiled once per variant_*.cpp, which defines
//   RK_ISA           namespace of the variant
//   RK_VECTOR_BYTES  64 (AVX-512), 32 (AVX2), 16 (SSE2, NEON)
// Everything is always_inline: a vector wider than the baseline's must not cross a function boundary of the baseline.
#pragma once

#include "types.h"

#define RK_INLINE inline __attribute__((always_inline))

namespace rk {
namespace RK_ISA {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(RK_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(RK_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t Mask __attribute__((vector_size(RK_VECTOR_BYTES)));
  static constexpr int kLanes = RK_VECTOR_BYTES / 4;
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(RK_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(RK_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t Mask __attribute__((vector_size(RK_VECTOR_BYTES)));
  static constexpr int kLanes = RK_VECTOR_BYTES / 8;
};

template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
inline constexpr int kLanes = Simd<T>::kLanes;

template <class T>
RK_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};  // x - 0 is x for every x, -0.0 and NaN included
}

// Unaligned loads that widen to the compute type.
RK_INLINE Vec<float> load(const float* p) {
  return *reinterpret_cast<const Simd<float>::Unaligned*>(p);
}
RK_INLINE Vec<double> load(const double* p) {
  return *reinterpret_cast<const Simd<double>::Unaligned*>(p);
}

typedef uint16_t HalfWords __attribute__((vector_size(RK_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(RK_VECTOR_BYTES)));

RK_INLINE Vec<float> load(const BF16* p) {
  const Words words = __builtin_convertvector(*reinterpret_cast<const HalfWords*>(p), Words);
  return reinterpret_cast<Vec<float>>(words << 16);
}

RK_INLINE Vec<float> load(const F16* p) {
#if RK_VECTOR_BYTES == 64
  // The zero-masking form: GCC 12 warns about the undefined source operand inside the plain one.
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif RK_VECTOR_BYTES == 32
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> out;
  for (int i = 0; i < kLanes<float>; ++i) {
    out[i] = widen(p[i]);
  }
  return out;
#endif
}

template <class T>
RK_INLINE void store(T* p, Vec<T> value) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = value;
}
template <class R>
RK_INLINE void store_narrow(R* p, Vec<Compute<R>> value) {
  for (int i = 0; i < kLanes<Compute<R>>; ++i) {
    narrow(value[i], p[i]);
  }
}
RK_INLINE void store_narrow(float* p, Vec<float> value) {
  store<float>(p, value);
}
RK_INLINE void store_narrow(double* p, Vec<double> value) {
  store<double>(p, value);
}

RK_INLINE Vec<float> vsqrt(Vec<float> a) {
#if RK_VECTOR_BYTES == 64
  return _mm512_maskz_sqrt_ps(0xffff, a);
#elif RK_VECTOR_BYTES == 32
  return _mm256_sqrt_ps(a);
#else
  for (int i = 0; i < kLanes<float>; ++i) {
    a[i] = __builtin_sqrtf(a[i]);
  }
  return a;
#endif
}
RK_INLINE Vec<double> vsqrt(Vec<double> a) {
#if RK_VECTOR_BYTES == 64
  return _mm512_maskz_sqrt_pd(0xff, a);
#elif RK_VECTOR_BYTES == 32
  return _mm256_sqrt_pd(a);
#else
  for (int i = 0; i < kLanes<double>; ++i) {
    a[i] = __builtin_sqrt(a[i]);
  }
  return a;
#endif
}

// Bit i is set where !(a[i] <= b[i]): greater, or NaN on either side.
RK_INLINE uint32_t not_le(Vec<float> a, Vec<float> b) {
#if RK_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ);
#elif RK_VECTOR_BYTES == 32
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpnle_ps(a, b)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes<float>; ++i) {
    mask |= static_cast<uint32_t>(!(a[i] <= b[i])) << i;
  }
  return mask;
#endif
}
RK_INLINE uint32_t not_le(Vec<double> a, Vec<double> b) {
#if RK_VECTOR_BYTES == 64
  return _mm512_cmp_pd_mask(a, b, _CMP_NLE_UQ);
#elif RK_VECTOR_BYTES == 32
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_NLE_UQ)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_pd(_mm_cmpnle_pd(a, b)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes<double>; ++i) {
    mask |= static_cast<uint32_t>(!(a[i] <= b[i])) << i;
  }
  return mask;
#endif
}

// a[0], b[0], a[1], b[1], ... : the low and the high half of the interleaved lanes.
template <class T, bool High>
RK_INLINE Vec<T> zip(Vec<T> a, Vec<T> b) {
  constexpr int L = kLanes<T>;
#if defined(__clang__)
  Vec<T> out;
  for (int i = 0; i < L; ++i) {
    out[i] = (i % 2 == 0 ? a : b)[(High ? L / 2 : 0) + i / 2];
  }
  return out;
#else
  typename Simd<T>::Mask order;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    order[i] = (High ? L / 2 : 0) + i / 2 + (i % 2 == 0 ? 0 : L);
  }
  return __builtin_shuffle(a, b, order);
#endif
}

// Rotates the addresses of the numbers in `rows` left by as many bits as 2^bits = count: interleaving the first with the
// second half of an array moves the top bit of every address to the bottom.
template <class T, int Rows>
RK_INLINE void rotate_addresses(Vec<T> (&rows)[Rows], int count) {
#pragma GCC unroll 4
  for (int round = 1; round < count; round *= 2) {
    Vec<T> zipped[Rows];
#pragma GCC unroll 8
    for (int i = 0; i < Rows / 2; ++i) {
      zipped[2 * i] = zip<T, false>(rows[i], rows[i + Rows / 2]);
      zipped[2 * i + 1] = zip<T, true>(rows[i], rows[i + Rows / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      rows[i] = zipped[i];
    }
  }
}

// rows[i][c] of a Rows x lanes matrix -> the same numbers in the order [c][i]: the row bits go behind the column's.
template <class T, int Rows>
RK_INLINE void transpose(Vec<T> (&rows)[Rows]) {
  rotate_addresses<T, Rows>(rows, Rows);
}

// A lanes x Columns matrix, its rows one after the other -> columns[j][lane].
template <class T, int Columns>
RK_INLINE void columns_of(const T* matrix, Vec<T> (&columns)[Columns]) {
#pragma GCC unroll 16
  for (int j = 0; j < Columns; ++j) {
    columns[j] = load(matrix + j * kLanes<T>);
  }
  rotate_addresses<T, Columns>(columns, kLanes<T>);
}

// Appends first + i for every set bit i of mask; `list` has room for a vector more than it holds.
template <class T>
RK_INLINE int64_t append_set_bits(uint32_t* list, int64_t n, uint32_t mask, uint32_t first) {
#if RK_VECTOR_BYTES == 64
  // No branch on the mask: which tiles hold survivors is unpredictable, and a mispredicted branch costs more than this.
  if constexpr (kLanes<T> == 16) {
    const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i codes = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), iota);
    _mm512_storeu_si512(list + n, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), codes));
  } else {
    const __m256i iota = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i codes = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first)), iota);
    const __m256i packed = _mm256_maskz_compress_epi32(static_cast<__mmask8>(mask), codes);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(list + n), packed);
  }
  return n + __builtin_popcount(mask);
#else
  for (; mask != 0; mask &= mask - 1) {
    list[n++] = first + static_cast<uint32_t>(__builtin_ctz(mask));
  }
  return n;
#endif
}

// Pairwise over the lanes: a fixed order, so equal on every run.
template <class T>
RK_INLINE T horizontal_sum(Vec<T> a) {
  T lane[kLanes<T>];
  store<T>(lane, a);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      lane[i] += lane[i + width];
    }
  }
  return lane[0];
}

}  // namespace RK_ISA
}  // namespace rk
