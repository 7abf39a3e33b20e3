// A team of threads on the CPU and the row type that needs a processor's conversions, as sae_backward_team.h takes them.
#pragma once

#include <cmath>

#include "fibers.h"

struct Float16Row {
  using Element = uint16_t;
  static constexpr int kVector = 8;
  static float to_float(uint16_t x) {
    _Float16 number;
    std::memcpy(&number, &x, 2);
    return static_cast<float>(number);
  }
  static void unpack(const rk::cuda::Words& from, float (&to)[8]) {
    for (int i = 0; i < 8; ++i) {
      to[i] = to_float(static_cast<uint16_t>(from.word[i / 2] >> (i % 2 * 16)));
    }
  }
  static uint16_t of_float(float x) {
    const _Float16 number = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &number, 2);
    return bits;
  }
};

// The threads' functions, as sae_backward_team.h takes them.
template <int kSize>
struct EmulatedTeam {
  static constexpr int kThreads = kSize, kLanes = kSize < 32 ? kSize : 32;

  static int rank() {
    return Fibers::current;
  }
  static float shuffle_xor(float own, int distance) {
    const int self = Fibers::current, warp = self / 32;
    Fibers::brought[self] = own;
    Fibers::meet(warp, kLanes, "shuffle");
    const float other = Fibers::brought[self ^ distance];
    Fibers::meet(warp, kLanes, "shuffled");
    return other;
  }
  static void barrier() {
    Fibers::meet((kSize + 31) / 32, kSize, "barrier");
  }
  static void not_before_here() {}
  static void copy(void* to, const void* from, bool live) {
    if (live) Fibers::check(from, 16, 16);
    Fibers::copy(to, from, live ? 16 : 0, 16);
  }
  static void commit() {
    Fibers::commit();
  }
  template <int kPending>
  static void wait() {
    Fibers::wait(kPending);
  }
  static rk::cuda::Words from_ring(const unsigned char* at) {
    rk::cuda::Words words;
    std::memcpy(&words, at, sizeof words);
    return words;
  }
  static rk::cuda::Words load(const void* from) {
    Fibers::check(from, 16, 16);
    rk::cuda::Words words;
    std::memcpy(&words, from, sizeof words);
    return words;
  }
  static float quotient(float x, float by) {
    return x / by;
  }
  static float root(float x) {
    return std::sqrt(x);
  }
  static void prefetch(const void* line) {
    Fibers::check(line, 1, 1);
  }
};
