// A warp on the CPU: 32 fibers that run the same code and meet in every function that a warp does together, as lanes of a
// GPU do. Between two meetings a lane runs alone, in an order that a test chooses: code that forgets to meet before it
// reads what another lane has written gives another result in one of the orders.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

struct EmulatedWarp {
  static constexpr int kLanes = 32;
  static constexpr size_t kStack = 64 << 10;

  static inline ucontext_t scheduler, lanes[kLanes];
  static inline std::vector<char> stacks;
  static inline const std::function<void()>* body;
  static inline int current;
  static inline bool finished[kLanes];
  static inline int64_t brought[kLanes];  // what each lane brings to a meeting
  static inline const char* where[kLanes];  // which function it meets in
  static inline const char* fault;  // what a lane did that a GPU does not allow
  static inline int64_t anys, ballots, syncs, maxima, sums;  // how often the warp met there; a test sets them to 0

  // Runs `work` once in every lane; `reversed`: lane 31 first between two meetings.
  static void run(const std::function<void()>& work, bool reversed) {
    stacks.resize(kLanes * kStack);
    body = &work;
    fault = nullptr;
    for (int i = 0; i < kLanes; ++i) {
      finished[i] = false;
      getcontext(&lanes[i]);
      lanes[i].uc_stack.ss_sp = stacks.data() + i * kStack;
      lanes[i].uc_stack.ss_size = kStack;
      lanes[i].uc_link = &scheduler;
      makecontext(&lanes[i], &EmulatedWarp::lane_main, 0);
    }
    for (bool going = true; going;) {
      int done = 0;
      for (int step = 0; step < kLanes; ++step) {
        current = reversed ? kLanes - 1 - step : step;
        if (!finished[current]) {
          swapcontext(&scheduler, &lanes[current]);
        }
        done += finished[current];
      }
      if (done != 0 && done != kLanes) {
        throw std::runtime_error("some lanes ended while others wait for them");
      }
      for (int i = 1; done == 0 && i < kLanes; ++i) {
        if (std::strcmp(where[i], where[0]) != 0) {
          throw std::runtime_error("lanes met in different functions");
        }
      }
      if (fault != nullptr) {
        throw std::runtime_error(fault);
      }
      going = done == 0;
    }
  }

  static void lane_main() {
    (*body)();
    finished[current] = true;
  }

  // Waits until every lane has come to the same function.
  static void meet(const char* function) {
    const int self = current;
    where[self] = function;
    swapcontext(&lanes[self], &scheduler);
  }
  // A second wait keeps a fast lane from bringing its next number before the others have read this one.
  template <class F>
  static auto together(const char* function, int64_t number, const F& read) {
    brought[current] = number;
    meet(function);
    const auto result = read();
    meet("read");
    return result;
  }

  static int lane() {
    return current;
  }
  static bool any(bool condition) {
    anys += lane() == 0;
    return together("any", condition, [] {
      bool found = false;
      for (int64_t one : brought) found = found || one != 0;
      return found;
    });
  }
  static uint32_t ballot(bool condition) {
    ballots += lane() == 0;
    return together("ballot", condition, [] {
      uint32_t bits = 0;
      for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(brought[i] != 0) << i;
      return bits;
    });
  }
  static int lanes_of(uint32_t bits) {
    return __builtin_popcount(bits);
  }
  static int lanes_below(uint32_t bits) {
    return __builtin_popcount(bits & ((1u << lane()) - 1));
  }
  static int sum(int own) {
    sums += lane() == 0;
    return together("sum", own, [] {
      int64_t total = 0;
      for (int64_t one : brought) total += one;
      return static_cast<int>(total);
    });
  }
  static uint32_t max(uint32_t own) {
    maxima += lane() == 0;
    return together("max", own, [] {
      int64_t most = brought[0];
      for (int64_t one : brought) most = one > most ? one : most;
      return static_cast<uint32_t>(most);
    });
  }
  static uint32_t min(uint32_t own) {
    return together("min", own, [] {
      int64_t least = brought[0];
      for (int64_t one : brought) least = one < least ? one : least;
      return static_cast<uint32_t>(least);
    });
  }
  static int highest_bit(uint32_t bits) {
    return bits == 0 ? -1 : 31 - __builtin_clz(bits);
  }
  static void sync() {
    syncs += lane() == 0;
    meet("sync");
  }
  template <int kVector>
  static void load(const float* from, float* to) {
    if (reinterpret_cast<uintptr_t>(from) % (kVector * sizeof(float)) != 0) fault = "a load is not aligned";
    std::memcpy(to, from, kVector * sizeof(float));
  }
  static float once(float value) {
    return value;
  }
  template <int kVector>
  static void load_once(const float* from, float* to) {
    load<kVector>(from, to);
  }
};
