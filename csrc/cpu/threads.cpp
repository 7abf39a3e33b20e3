#include "threads.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace rk {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kKeepAlways = size_t{64} << 20;

std::atomic<int64_t> total{0};

struct Block {
  void* data = nullptr;
  size_t size = 0;

  void release() {
    std::free(data);
    total -= static_cast<int64_t>(size);
    data = nullptr;
    size = 0;
  }
  ~Block() {
    release();
  }
};

thread_local Block blocks[static_cast<int>(Slot::kCount)];

}  // namespace

void* scratch_bytes(Slot slot, size_t bytes) {
  Block& block = blocks[static_cast<int>(slot)];
  const bool oversized = block.size > kKeepAlways && bytes < block.size / 4;
  if (bytes > block.size || oversized) {
    block.release();
    const size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    block.data = std::aligned_alloc(kAlignment, size);
    if (block.data == nullptr) {
      throw std::bad_alloc();
    }
    block.size = size;
    total += static_cast<int64_t>(size);
  }
  return block.data;
}

int64_t scratch_total() {
  return total;
}

}  // namespace rk
