// Element types and the ways from a row's storage type R to its compute type (fp64 for fp64, else fp32) and back.
// Torch-free: bf16 and fp16 are raw 16-bit words here, so this file compiles without any library.
#pragma once

#include <cstdint>
#include <cstring>

namespace rk {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class R>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class R>
using Compute = typename ComputeOf<R>::type;

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float value) {
  return value;
}
inline double widen(double value) {
  return value;
}
inline float widen(BF16 value) {
  return bits_to_float(static_cast<uint32_t>(value.bits) << 16);
}
inline float widen(F16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  if (magnitude >= (0x7c00u << 13)) {  // inf, NaN: the exponent field of fp32 is all ones, too
    return bits_to_float(sign | 0x7f800000u | magnitude);
  }
  // The half's exponent bias is 15, the float's 127: multiplying by 2^112 rebases it, subnormals included, exactly.
  const float rebased = bits_to_float(magnitude) * bits_to_float(0x77800000u);
  return bits_to_float(sign | float_to_bits(rebased));
}

// Round to nearest even, as torch's conversions do.
inline void narrow(float value, float& out) {
  out = value;
}
inline void narrow(double value, double& out) {
  out = value;
}
inline void narrow(float value, BF16& out) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out.bits = static_cast<uint16_t>((bits >> 16) | 0x40u);  // stays a NaN when the payload's low half is cut off
    return;
  }
  out.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void narrow(float value, F16& out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (
      magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 puts the subnormal's last bit at the float's last bit
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

}  // namespace rk
