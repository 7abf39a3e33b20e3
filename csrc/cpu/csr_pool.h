// What an encoder whose rows keep any number of latents has found, and the code in CSR form that comes of it.
//
// An entry is one integer key that orders like its value (NaN first), equal values by ascending position n F + latent,
// as in select.h, but across rows. A pool that shall keep only its `most` best entries lets them double and drops the
// worse half, so it holds at most 2 `most`. Each thread has a pool of its own; what one of them has learnt about the
// smallest value that can still be among the best is shared as a limit, which shortens the work and changes no result.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "select.h"
#include "types.h"

namespace rk {

__extension__ using CsrKey = unsigned __int128;

inline CsrKey csr_key(float value, int64_t position) {
  const uint64_t bits = value != value ? 0x7fffffffu : float_to_bits(value);
  return (static_cast<CsrKey>(bits) << 64) | ~static_cast<uint64_t>(position);
}
inline CsrKey csr_key(double value, int64_t position) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = value != value ? 0x7fffffffffffffffu : bits;
  return (static_cast<CsrKey>(bits) << 64) | ~static_cast<uint64_t>(position);
}
inline void csr_value(CsrKey key, float& out) {
  out = bits_to_float(static_cast<uint32_t>(key >> 64));
}
inline void csr_value(CsrKey key, double& out) {
  const uint64_t bits = static_cast<uint64_t>(key >> 64);
  std::memcpy(&out, &bits, sizeof out);
}
inline int64_t csr_position(CsrKey key) {
  return static_cast<int64_t>(~static_cast<uint64_t>(key));
}

// The largest positive value that rounds to 0 in R: what does not exceed it is no entry.
inline float largest_zero(BF16) {
  return bits_to_float(0x00008000u);  // half of bf16's smallest number
}
inline float largest_zero(F16) {
  return bits_to_float(0x33000000u);  // half of fp16's smallest number, 2^-25
}
inline float largest_zero(float) {
  return 0;
}
inline double largest_zero(double) {
  return 0;
}

template <class T>
class CsrPool {
 public:
  // most 0: keep everything. `limit` is shared between the pools of a call; a value must exceed it to be of use.
  CsrPool(int64_t most, std::atomic<T>* limit) : most_(static_cast<size_t>(most)), limit_(limit) {}

  // Room for what it may hold, up to 64 MiB of address space: pages are taken when they are first written.
  void reserve() {
    keys_.reserve(std::min(2 * most_, size_t{1} << 22));
  }

  T limit() const {
    return limit_->load(std::memory_order_relaxed);
  }

  void push(T value, int64_t position) {
    keys_.push_back(csr_key(value, position));
    if (most_ > 0 && keys_.size() == 2 * most_) {
      keep_best();
    }
  }

  const std::vector<CsrKey>& keys() const {
    return keys_;
  }

 private:
  void keep_best() {
    select_largest(keys_.data(), static_cast<int64_t>(2 * most_), static_cast<int64_t>(most_));
    keys_.resize(most_);
    T worst;
    csr_value(*std::min_element(keys_.begin(), keys_.end()), worst);
    // An equal value at a lower position may still come, so the limit stays just below. Beside NaN there is room for NaN
    // alone, which exceeds everything.
    const T below = worst == worst ? std::nextafter(worst, T(0)) : std::numeric_limits<T>::infinity();
    T known = limit();
    while (known < below && !limit_->compare_exchange_weak(known, below, std::memory_order_relaxed)) {
    }
  }

  std::vector<CsrKey> keys_;
  size_t most_;
  std::atomic<T>* limit_;
};

}  // namespace rk
