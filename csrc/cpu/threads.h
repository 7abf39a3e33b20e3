// How kernels reach the caller's thread pool, and the scratch memory each thread keeps between calls.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rk {

// The operators pass libtorch's pool; kernels see only this. `run` calls body(i, context) for i in [0, tasks), each
// exactly once, from up to `count` threads. No kernel's result depends on count: it only shapes the schedule.
struct Threads {
  int64_t count;
  void (*run)(int64_t tasks, void (*body)(int64_t, void*), void* context);
};

template <class F>
void parallel_tasks(const Threads& threads, int64_t tasks, const F& f) {
  if (tasks == 1 || threads.count <= 1) {
    for (int64_t i = 0; i < tasks; ++i) {
      f(i);
    }
    return;
  }
  threads.run(
      tasks, [](int64_t i, void* context) { (*static_cast<const F*>(context))(i); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Scratch lives per thread and slot and is reused by the next call: a fresh large block would be returned to the
// operating system by free() and page-faulted in again on every call. A block shrinks when a call asks for less than
// a quarter of more than 64 MiB, so one unusual call does not keep its memory for ever. 64-byte aligned, uninitialised.
enum class Slot { kPackedX, kPackedW, kPartialSums, kCandidates, kMerge, kScreen, kHits, kRows, kWide, kOrder, kCount };
void* scratch_bytes(Slot slot, size_t bytes);
int64_t scratch_total();  // bytes held by all threads now

template <class T>
T* scratch(Slot slot, int64_t count) {
  return static_cast<T*>(scratch_bytes(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace rk
