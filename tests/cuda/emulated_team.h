// A team of threads on the CPU, as sae_backward_team.h takes it: fibers.h.
#pragma once

#include "fibers.h"

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
};
