// What the 8-bit screen of screened_encode.h consists of: rounding with bounds, the integer product, the comparison.
//
//     x = s_x q_x + dx,   w = s_w q_w + dw      =>      <x, w> = s_x s_w <q_x, q_w> + <dx, w> + <s_x q_x, dw>
//                                                      <=  s_x s_w <q_x, q_w> + ||dx|| ||w|| + ||s_x q_x|| ||dw||
//
// by Cauchy-Schwarz; the integer product is exact. Norms are rounded up, and what fp32 arithmetic can add to the value
// that is finally computed, and to the bound itself, is part of the bound.
#pragma once

#include "topk_encode.h"

namespace rk {
namespace RK_ISA {

// Numbers whose largest lies between these cannot overflow in a product, and lose nothing that counts in a square.
constexpr float kSmallest = 1e-12f;
constexpr float kLargest = 1e15f;

// Room for d bytes, in whole vectors.
constexpr int64_t byte_stride(int64_t d) {
  return (d + 63) / 64 * 64;
}

// A vector as 8-bit numbers: v = scale * q + (a rest of norm `rest`), ||v|| <= norm, sum of q.
struct Rounded {
  float scale, rest, norm;
  int32_t sum;
};

// Rounds v[0, d) to q[0, stride), zero beyond d; stride is a multiple of 64. False if the largest |v| is not in
// [kSmallest, kLargest] (0, tiny, huge, not finite): q is then 0. `flip` is xored to every byte (0x80: q + 128 unsigned).
template <class V>
bool round_to_bytes(const V* v, int64_t d, int64_t stride, uint8_t flip, uint8_t* q, Rounded& out) {
  constexpr int L = 16;
  const int64_t whole = d / L * L;
  float tail[L] = {};
  for (int64_t i = whole; i < d; ++i) {
    tail[i - whole] = widen(v[i]);
  }
  const auto vector = [&](int64_t c) { return c < whole ? load(v + c) : load(tail); };
  __m512 most = _mm512_setzero_ps();
  Vec<float> squares = Vec<float>{};
  uint32_t bad = 0;
  for (int64_t c = 0; c < d; c += L) {
    const Vec<float> part = vector(c);
    const __m512 size = _mm512_abs_ps(part);
    bad |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(kLargest), _CMP_NLE_UQ);  // max() would lose a NaN
    most = _mm512_maskz_max_ps(0xffff, most, size);
    squares += part * part;
  }
  float largest = 0;
  float sizes[L];
  store<float>(sizes, most);
  for (const float size : sizes) {
    largest = std::max(largest, size);
  }
  if (bad != 0 || !(largest >= kSmallest)) {
    std::memset(q, flip, static_cast<size_t>(stride));
    out = Rounded{0, 0, bad != 0 ? std::numeric_limits<float>::quiet_NaN() : 0, 0};
    return false;
  }
  const Vec<float> scale = splat<float>(largest / 127);
  const Vec<float> inverse = splat<float>(127 / largest);
  Vec<float> rest = Vec<float>{};
  __m512i sum = _mm512_setzero_si512();
  const __m128i flips = _mm_set1_epi8(static_cast<char>(flip));
  for (int64_t c = 0; c < stride; c += L) {
    const Vec<float> part = c < d ? vector(c) : Vec<float>{};
    const __m512i rounded = _mm512_maskz_cvtps_epi32(0xffff, part * inverse);
    const Vec<float> left = part - scale * static_cast<Vec<float>>(_mm512_maskz_cvtepi32_ps(0xffff, rounded));
    rest += left * left;
    sum = _mm512_add_epi32(sum, rounded);
    const __m128i bytes = _mm_xor_si128(_mm512_maskz_cvtepi32_epi8(0xffff, rounded), flips);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + c), bytes);
  }
  // A sum of d squares in 16 lanes is off by less than d / 16 * 2^-24 of itself: 0.1 % covers 65536 columns twice over.
  const float norm = 1.001f * std::sqrt(horizontal_sum<float>(squares));
  int32_t sums[L];
  _mm512_storeu_si512(sums, sum);
  out = Rounded{
      largest / 127, 1.001f * std::sqrt(horizontal_sum<float>(rest)) + 0x1p-22f * norm, norm,
      std::accumulate(sums, sums + L, 0)};
  return true;
}

// Rows of `steps` 4-byte words, a byte_stride apart -> [steps][out_stride], the first Rows of each; Rows a divisor of 16.
template <int Rows>
void interleave_words(const uint8_t* bytes, int64_t stride, int64_t steps, int64_t out_stride, uint32_t* out) {
  for (int64_t s = 0; s < steps; s += 16) {
    Vec<float> block[Rows];  // shuffled only, never computed with
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      block[i] = load(reinterpret_cast<const float*>(bytes + i * stride) + s);
    }
    transpose<float, Rows>(block);
    uint32_t words[16 * Rows];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      store<float>(reinterpret_cast<float*>(words) + i * 16, block[i]);
    }
    for (int64_t i = 0; i < std::min<int64_t>(16, steps - s); ++i) {
      std::memcpy(out + (s + i) * out_stride, words + i * Rows, Rows * sizeof(uint32_t));
    }
  }
}

// sum[f][row] (+)= sum over steps of four products; starts from `start[f]`, or goes on from `sums`.
template <int V>
RK_INLINE void multiply_bytes(
    const uint32_t* __restrict x, const uint32_t* __restrict w, int64_t steps, const int32_t* start,
    int32_t* __restrict sums) {
  __m512i sum[kTileLatents][V];
#pragma GCC unroll 16
  for (int f = 0; f < kTileLatents; ++f) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sum[f][v] = start != nullptr ? _mm512_set1_epi32(start[f]) : _mm512_loadu_si512(sums + (f * V + v) * 16);
    }
  }
  for (int64_t i = 0; i < steps; ++i) {
    __m512i rows[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      rows[v] = _mm512_loadu_si512(x + v * 16);
    }
#pragma GCC unroll 16
    for (int f = 0; f < kTileLatents; ++f) {
      const __m512i latent = _mm512_set1_epi32(static_cast<int>(w[f]));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sum[f][v] = _mm512_dpbusd_epi32(sum[f][v], rows[v], latent);
      }
    }
    x += V * 16;
    w += kTileLatents;
  }
#pragma GCC unroll 16
  for (int f = 0; f < kTileLatents; ++f) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      _mm512_storeu_si512(sums + (f * V + v) * 16, sum[f][v]);
    }
  }
}

// What a bound needs of the rows of a panel (lanes) and of the latents of a chunk (scalars).
struct RowBounds {
  float scale[3 * 16];   // s_x
  float spread[3 * 16];  // ||dx|| + rounding of the fp32 value, per unit of ||w||
  float length[3 * 16];  // ||s_x q_x||
};
struct LatentBounds {
  float* scale;   // s_w
  float* norm;    // ||w||; NaN: always compute this latent
  float* rest;    // ||dw||
  float* bias;    // b_enc and its own rounding
  int32_t* start; // -128 sum q_w: rows are stored as q + 128
};

// A pair that may matter: the bound, and which latent.
struct Suspect {
  float bound;
  uint32_t latent;
};

template <int V>
RK_INLINE void suspect_pairs(
    const int32_t* sums, const RowBounds& rows, const LatentBounds& latents, int64_t first, int64_t count,
    const float* thresholds, int64_t exist, uint32_t first_latent, int64_t capacity, Suspect* suspects,
    int64_t* counts) {
  float bounds[kTileLatents * V * 16];
  uint32_t found[kTileLatents * V * 16 + 16];
  int64_t n = 0;
  Vec<float> scale[V], spread[V], length[V], threshold[V];
  uint32_t exists[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    scale[v] = load(rows.scale + v * 16);
    spread[v] = load(rows.spread + v * 16);
    length[v] = load(rows.length + v * 16);
    threshold[v] = load(thresholds + v * 16);
    exists[v] = (uint32_t{1} << std::clamp<int64_t>(exist - v * 16, 0, 16)) - 1;
  }
  for (int64_t f = 0; f < count; ++f) {
    const Vec<float> w_scale = splat<float>(latents.scale[first + f]);
    const Vec<float> w_norm = splat<float>(latents.norm[first + f]);
    const Vec<float> w_rest = splat<float>(latents.rest[first + f]);
    const Vec<float> bias = splat<float>(latents.bias[first + f]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t at = (f * V + v) * 16;
      const Vec<float> sum = _mm512_maskz_cvtepi32_ps(0xffff, _mm512_loadu_si512(sums + at));
      const Vec<float> bound = sum * scale[v] * w_scale + (spread[v] * w_norm + (length[v] * w_rest + bias));
      store<float>(bounds + at, bound);
      n = append_set_bits<float>(found, n, not_le(bound, threshold[v]) & exists[v], static_cast<uint32_t>(at));
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t at = found[i];
    const int64_t row = at % (V * 16);
    suspects[row * capacity + counts[row]++] = Suspect{bounds[at], first_latent + at / (V * 16)};
  }
}

}  // namespace RK_ISA
}  // namespace rk
