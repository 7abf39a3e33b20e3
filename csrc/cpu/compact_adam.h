// Adam on state in fewer bytes: bf16 moments that are rounded stochastically, fp32 master weights in two 16-bit halves.
// refusal_kernels/compact.py has the formulas; here a row is widened into the first-level cache, stepped there as any
// fp32 row is, and narrowed again. 8 bytes are kept for a weight instead of 14.
#pragma once

#include "adam.h"
#include "kernels.h"

namespace rk {
namespace RK_ISA {

RK_INLINE uint32_t mix(uint32_t x) {
  x = (x >> 16 ^ x) * 0x45d9f3bu;
  x = (x >> 16 ^ x) * 0x45d9f3bu;
  return x >> 16 ^ x;
}

// The bits of a number, any NaN as the quiet one: rounding up would carry 0x7fffffff into the sign.
RK_INLINE uint32_t plain_bits(float value) {
  const uint32_t bits = float_to_bits(value);
  return value == value ? bits : 0x7fc00000u;
}

RK_INLINE void round_stochastically(float value, uint32_t random, BF16& out) {
  const uint32_t bits = float_to_bits(value);
  out.bits = static_cast<uint16_t>((value == value ? bits + random : 0x7fc00000u) >> 16);
}

inline void adam_compact_row(const CompactAdamArgs& a, int64_t row) {
  const int64_t d = a.d;
  const int64_t at = row * d;
  float* const wide = scratch<float>(Slot::kWide, 3 * d);
  float* w = a.W + at;
  float* m = a.m + at;
  float* v = a.v + at;
  if (a.W == nullptr) {
    w = wide;
    for (int64_t c = 0; c < d; ++c) {
      const uint32_t high = static_cast<uint32_t>(a.high[at + c].bits) << 16;
      w[c] = bits_to_float(high + static_cast<uint32_t>(static_cast<int32_t>(a.low[at + c])));
    }
  }
  if (a.m == nullptr) {
    m = wide + d;
    v = wide + 2 * d;
    for (int64_t c = 0; c < d; ++c) {
      m[c] = bits_to_float(static_cast<uint32_t>(a.m16[at + c].bits) << 16);
      v[c] = bits_to_float(static_cast<uint32_t>(a.v16[at + c].bits) << 16);
    }
  }
  adam_row<float>(a.adam, w, a.g + at, m, v, d, a.grad_scale, a.remove_parallel, a.unit_norm);
  if (a.W == nullptr) {
    for (int64_t c = 0; c < d; ++c) {
      const uint32_t bits = plain_bits(w[c]);
      a.high[at + c].bits = static_cast<uint16_t>((bits + 0x8000u) >> 16);
      a.low[at + c] = static_cast<int16_t>(static_cast<uint16_t>(bits));
    }
  }
  if (a.m == nullptr) {
    const uint32_t first = static_cast<uint32_t>(at);  // the element's number, modulo 2^32
    for (int64_t c = 0; c < d; ++c) {
      const uint32_t random = mix((first + static_cast<uint32_t>(c)) ^ a.salt);
      round_stochastically(m[c], random & 0xffffu, a.m16[at + c]);
      round_stochastically(v[c], random >> 16, a.v16[at + c]);
    }
  }
}

void adam_compact_rows(const CompactAdamArgs& a, const Threads& threads) {
  const int64_t rows_each = std::max<int64_t>(16384 / std::max<int64_t>(a.d, 1), 1);
  parallel_tasks(threads, (a.rows + rows_each - 1) / rows_each, [&](int64_t task) {
    for (int64_t row = task * rows_each; row < std::min((task + 1) * rows_each, a.rows); ++row) {
      adam_compact_row(a, row);
    }
  });
}

}  // namespace RK_ISA
}  // namespace rk
