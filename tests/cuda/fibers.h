// Threads on the CPU: fibers that run the same code and meet where a GPU's threads do, in their warp (shuffles)
// or all together (barriers). Between two meetings a thread runs alone. The warps go one after the other, each as far as
// it can, in an order that a test chooses: code that forgets to meet before it reads what another thread has written
// gives another result in one of the orders.
//
// Copies are as late as they may be: the bytes arrive when their group is waited for. Until then their place holds NaN.
// (They are read late too: nothing may be stored where a copy reads while it is on its way.)
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

// What all teams share: the fibers, and the memory that may be read.
struct Fibers {
  static constexpr size_t kStack = 64 << 10;
  struct Copy {
    void* to;
    const void* from;
    size_t bytes, size;  // zeros from `bytes` on
  };
  struct Meeting {
    int arrived = 0, number = 0;
    const char* where = nullptr;
  };

  static inline ucontext_t scheduler;
  static inline std::vector<ucontext_t> contexts;
  static inline std::vector<char> finished;
  static inline std::vector<std::unique_ptr<char[]>> stacks;
  static inline std::vector<float> brought;
  static inline std::vector<std::vector<std::vector<Copy>>> groups;  // of each thread, oldest first; the last is open
  static inline std::vector<Meeting> meetings;  // of each warp, then of larger groups: the team alone, as a rule
  static inline std::vector<std::pair<const char*, const char*>> readable;
  static inline const std::function<void()>* body;
  static inline const char* problem;
  static inline int current;

  // Runs `work` once in every thread; `reversed`: the last warp and the last lane first.
  static void run(int threads, const std::function<void()>& work, bool reversed, int larger_groups = 1) {
    const int warps = (threads + 31) / 32;
    contexts.resize(threads);
    while (stacks.size() < static_cast<size_t>(threads)) stacks.emplace_back(new char[kStack]);
    finished.assign(threads, 0);
    brought.assign(threads, 0);
    groups.assign(threads, {{}});
    meetings.assign(warps + larger_groups, {});
    body = &work;
    problem = nullptr;
    for (int i = 0; i < threads; ++i) {
      getcontext(&contexts[i]);
      contexts[i].uc_stack.ss_sp = stacks[i].get();
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

  // A copy of `bytes`, zeros behind them up to `size`. It arrives when its group is waited for: NaN until then.
  static void copy(void* to, const void* from, size_t bytes, size_t size) {
    std::memset(to, 0xff, size);
    groups[current].back().push_back({to, from, bytes, size});
  }
  static void commit() {
    groups[current].emplace_back();
  }
  static void wait(size_t pending) {
    auto& own = groups[current];
    while (own.size() > pending + 1) {
      for (const Copy& copy : own.front()) {
        std::memcpy(copy.to, copy.from, copy.bytes);
        std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.size - copy.bytes);
      }
      own.erase(own.begin());
    }
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
