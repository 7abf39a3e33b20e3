// row_filter_warp.h on the CPU, for tests/test_row_filter.py.
#include <exception>

#include "emulated_warp.h"
#include "row_filter_warp.h"

// One chunk: all rows, one after the other. Null on success, else what went wrong.
extern "C" const char* filter_chunk(
    const float* pre, const float* bias, int64_t* keys, int32_t* count, int32_t* limit, int64_t rows, int32_t columns,
    int32_t first, int32_t k, int32_t last, int32_t vector, int32_t reversed) {
  static char message[200];
  const rk::cuda::FilterArgs args{pre, bias, keys, count, limit, rows, columns, first, k, last != 0};
  try {
    for (int64_t row = 0; row < rows; ++row) {
      // Shared memory holds anything at the start of a block.
      constexpr int kBehind = 300;  // what lies there belongs to other warps
      constexpr uint64_t kAnything = 0x7fffffffffffffffu;
      uint64_t list[rk::cuda::kFilterCapacity + kBehind];
      for (uint64_t& key : list) key = kAnything;
      EmulatedWarp::run(
          [&] {
            if (vector != 0) {
              rk::cuda::filter_row<EmulatedWarp, 4>(args, row, list);
            } else {
              rk::cuda::filter_row<EmulatedWarp, 1>(args, row, list);
            }
          },
          reversed != 0);
      for (int i = 0; i < kBehind; ++i) {
        if (list[rk::cuda::kFilterCapacity + i] != kAnything) return "a list has overflowed";
      }
    }
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof message - 1);
    return message;
  }
  return nullptr;
}

// How often the warps have met in any, ballot, sync, max and sum since the last call.
extern "C" void meetings(int64_t* five) {
  using Warp = EmulatedWarp;
  for (int64_t* count : {&Warp::anys, &Warp::ballots, &Warp::syncs, &Warp::maxima, &Warp::sums}) {
    *five++ = *count;
    *count = 0;
  }
}

extern "C" int32_t capacity() {
  return rk::cuda::kFilterCapacity;
}

extern "C" int32_t most_k() {
  return rk::cuda::kFilterMostK;
}
