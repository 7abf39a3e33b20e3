// A team of threads on the CPU: fibers that run the same code and meet where a GPU's threads do, in their warp (shuffles)
// or all together (barriers). Between two meetings a thread runs alone. The warps go one after the other, each as far as
// it can, in an order that a test chooses: code that forgets to meet before it reads what another thread has written
// gives another result in one of the orders.
//
// Copies are as late as they may be: the bytes arrive when their group is waited for. Until then their place holds NaN.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

// What all teams share: the fibers, and the memory that may be read.
struct Fibers {
  static constexpr size_t kStack = 64 << 10;
  struct Copy {
    void* to;
    const void* from;
  };
  struct Meeting {
    int arrived = 0, number = 0;
    const char* where = nullptr;
  };

  static inline ucontext_t scheduler;
  static inline std::vector<ucontext_t> contexts;
  static inline std::vector<char> stacks, finished;
  static inline std::vector<float> brought;
  static inline std::vector<std::vector<std::vector<Copy>>> groups;  // of each thread, oldest first; the last is open
  static inline std::vector<Meeting> meetings;  // of each warp, then of the team
  static inline std::vector<std::pair<const char*, const char*>> readable;
  static inline const std::function<void()>* body;
  static inline const char* problem;
  static inline int current;

  // Runs `work` once in every thread; `reversed`: the last warp and the last lane first.
  static void run(int threads, const std::function<void()>& work, bool reversed) {
    const int warps = (threads + 31) / 32;
    contexts.resize(threads);
    stacks.resize(threads * kStack);
    finished.assign(threads, 0);
    brought.assign(threads, 0);
    groups.assign(threads, {{}});
    meetings.assign(warps + 1, {});
    body = &work;
    problem = nullptr;
    for (int i = 0; i < threads; ++i) {
      getcontext(&contexts[i]);
      contexts[i].uc_stack.ss_sp = stacks.data() + i * kStack;
      contexts[i].uc_stack.ss_size = kStack;
      contexts[i].uc_link = &scheduler;
      makecontext(&contexts[i], &Fibers::main, 0);
    }
    waiting.assign(threads, {-1, 0});
    for (int left = threads; left > 0;) {
      bool moved = false;
      for (int w = 0; w < warps; ++w) {
        const int warp = reversed ? warps - 1 - w : w;
        for (bool again = true; again;) {
          again = false;
          for (int l = 0; l < 32; ++l) {
            const int thread = warp * 32 + (reversed ? 31 - l : l);
            if (thread >= threads || finished[thread] || !may_go(thread)) continue;
            current = thread;
            swapcontext(&scheduler, &contexts[thread]);
            if (problem != nullptr) throw std::runtime_error(problem);
            left -= finished[thread];
            again = moved = true;
          }
        }
      }
      if (!moved) throw std::runtime_error("threads wait for others that do not come");
    }
  }

  static void meet(int group, int size, const char* where) {
    Meeting& meeting = meetings[group];
    if (meeting.arrived == 0) meeting.where = where;
    if (std::strcmp(meeting.where, where) != 0) fail("threads met in different functions");
    waiting[current] = {group, meeting.number};
    if (++meeting.arrived == size) {
      meeting.arrived = 0;
      ++meeting.number;
    }
    pause();
  }

  static void check(const void* from, size_t bytes, size_t alignment) {
    const char* const at = static_cast<const char*>(from);
    if (reinterpret_cast<uintptr_t>(at) % alignment != 0) fail("a load that is not aligned");
    for (const auto& [begin, end] : readable) {
      if (begin <= at && at + bytes <= end) return;
    }
    fail("a load from foreign memory");
  }

  static void fail(const char* what) {
    problem = what;
    pause();
  }

 private:
  static inline std::vector<std::pair<int, int>> waiting;  // of each thread: a meeting and its number

  static bool may_go(int thread) {
    const auto [group, number] = waiting[thread];
    return group < 0 || meetings[group].number > number;
  }
  static void pause() {
    const int self = current;
    swapcontext(&contexts[self], &scheduler);
  }
  static void main() {
    (*body)();
    finished[current] = 1;
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
    std::memset(to, 0xff, 16);
    Fibers::groups[Fibers::current].back().push_back({to, live ? from : nullptr});
  }
  static void commit() {
    Fibers::groups[Fibers::current].emplace_back();
  }
  template <int kPending>
  static void wait() {
    auto& groups = Fibers::groups[Fibers::current];
    while (groups.size() > kPending + 1) {
      for (const auto& [to, from] : groups.front()) {
        if (from == nullptr) {
          std::memset(to, 0, 16);
        } else {
          std::memcpy(to, from, 16);
        }
      }
      groups.erase(groups.begin());
    }
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
