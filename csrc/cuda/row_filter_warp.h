// One row's part of row_filter, by the 32 lanes of a warp: the k largest of relu(pre + bias), ties to the lower latent.
//
// A key is (bits of relu(pre + bias) << 32) | (0x7fffffff - latent): an integer that orders like the value, NaN first,
// equal values by ascending latent; no two keys are equal. Chunks come by ascending latent, so a later latent enters the
// list only by being strictly greater than `limit`, the bits of the k-th best so far: an equal one would lose the tie.
// When the list is about to overflow it is reduced to its k best and the limit rises. So overflow is no special case; a
// row that ascends costs a reduction every kFilterCapacity - k columns.
//
// `Warp` is what the lanes share: on a GPU the hardware's warp (row_filter.cu), in a test 32 fibers on the CPU. All
// lanes call its functions together.
#pragma once

#include <cstdint>

#include "lane.h"
#include "row_filter.h"

namespace rk::cuda {

// The k-th largest of `count` keys in `list`, for 1 <= k <= count: its value's bits, then the word of the tie, bit by bit.
template <class Warp>
RK_LANE uint64_t kth_largest(const uint64_t* list, int count, int k) {
  const auto at_least = [&](uint64_t bound) {
    int found = 0;
    for (int i = Warp::lane(); i < count; i += 32) {
      found += list[i] >= bound ? 1 : 0;
    }
    return Warp::sum(found);
  };
  uint64_t best = 0;
  int above = count;
  for (int bit = 62; bit >= 0; --bit) {
    const uint64_t trial = best | (uint64_t{1} << bit);
    const int found = at_least(trial);
    if (found >= k) {
      best = trial;
      above = found;
    }
    // Exactly k keys are at least `best`, so it separates as well as the k-th key does. Without ties at the k-th value
    // that is so after its 31 bits.
    if (above == k && bit <= 32) {
      break;
    }
  }
  return best;
}

// Leaves the k largest of the list in its first k places, in the order they stood in; returns the k-th one's value bits.
template <class Warp>
RK_LANE int32_t keep_best(uint64_t* list, int count, int k) {
  const uint64_t bound = kth_largest<Warp>(list, count, k);
  int kept = 0;
  for (int start = 0; start < count; start += 32) {
    const int at = start + Warp::lane();
    const uint64_t key = at < count ? list[at] : 0;
    const bool keep = at < count && key >= bound;
    const uint32_t lanes = Warp::ballot(keep);
    Warp::sync();  // every lane has read before one writes
    if (keep) {
      list[kept + Warp::lanes_below(lanes)] = key;
    }
    kept += Warp::lanes_of(lanes);
  }
  Warp::sync();
  return static_cast<int32_t>(bound >> 32);
}

// The keys of list [k], greatest first, to `out`: a key's place is the number of greater ones.
template <class Warp>
RK_LANE void write_sorted(const uint64_t* list, int k, int64_t* out) {
  for (int i = Warp::lane(); i < k; i += 32) {
    const uint64_t key = list[i];
    int place = 0;
    for (int j = 0; j < k; ++j) {
      place += list[j] > key ? 1 : 0;
    }
    out[place] = static_cast<int64_t>(key);
  }
}

// Orders like relu(value): 0 for what is not positive, the largest int32 for NaN.
RK_LANE int32_t rank_bits(float value) {
  union {
    float number;
    int32_t bits;
  } same{value};
  return value != value ? 0x7fffffff : value > 0.0f ? same.bits : 0;
}

// kVector 4: 16-byte loads, for which pre's row and bias + first begin at 16-byte boundaries and 4 divides columns.
template <class Warp, int kVector>
RK_LANE void filter_row(const FilterArgs& a, int64_t row, uint64_t* list) {
  constexpr int kLoads = 8 / kVector;
  constexpr int kPiece = 32 * kVector;  // columns of one load of the warp
  constexpr int kStep = kLoads * kPiece;  // 256 columns: fits behind kFilterMostK keys
  static_assert(kFilterMostK + kStep <= kFilterCapacity);
  const float* pre = a.pre + row * a.columns;
  const float* bias = a.bias + a.first;
  int64_t* keys = a.keys + row * kFilterCapacity;
  // Zeros are candidates too: rows with fewer than k positives end with zeros of the lowest latents.
  int32_t limit = -1;
  int count = 0;
  // The first `away` keys of the list are in `keys` alone: most chunks append a few and look at no other.
  int away = 0;
  if (a.first > 0) {
    count = away = a.count[row];
    limit = a.limit[row];
  }
  const auto reduce = [&] {
    for (int i = Warp::lane(); i < away; i += 32) {
      list[i] = static_cast<uint64_t>(keys[i]);
    }
    away = 0;
    Warp::sync();
    return keep_best<Warp>(list, count, a.k);
  };

  float ahead[kLoads * kVector], ahead_bias[kLoads * kVector];
  const auto fetch = [&](int start) {
    RK_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const int column = start + i * kPiece + Warp::lane() * kVector;
      if (column < a.columns) {
        Warp::template load<kVector>(pre + column, ahead + i * kVector);
        Warp::template load<kVector>(bias + column, ahead_bias + i * kVector);
      }
    }
  };
  fetch(0);
  for (int start = 0; start < a.columns; start += kStep) {
    int32_t bits[kLoads * kVector];
    int own = 0;
    RK_UNROLL
    for (int i = 0; i < kLoads * kVector; ++i) {
      const int column = start + i / kVector * kPiece + Warp::lane() * kVector + i % kVector;
      bits[i] = column < a.columns ? rank_bits(ahead[i] + ahead_bias[i]) : -1;
      own += bits[i] > limit ? 1 : 0;
    }
    fetch(start + kStep);  // on its way while this step is judged
    if (!Warp::any(own > 0)) {
      continue;
    }
    int total = Warp::sum(own);
    if (count + total > kFilterCapacity) {
      limit = reduce();
      count = a.k;
      own = 0;
      RK_UNROLL
      for (int i = 0; i < kLoads * kVector; ++i) {
        own += bits[i] > limit ? 1 : 0;
      }
      total = Warp::sum(own);
    }
    int place = count + Warp::sum_before(own);
    RK_UNROLL
    for (int i = 0; i < kLoads * kVector; ++i) {
      if (bits[i] > limit) {
        const int latent = a.first + start + i / kVector * kPiece + Warp::lane() * kVector + i % kVector;
        list[place++] = (static_cast<uint64_t>(bits[i]) << 32) | static_cast<uint64_t>(0x7fffffff - latent);
      }
    }
    count += total;
    Warp::sync();  // the next reduction reads what other lanes have written
  }

  if (a.last) {
    reduce();
    write_sorted<Warp>(list, a.k, keys);
    return;
  }
  for (int i = away + Warp::lane(); i < count; i += 32) {
    keys[i] = static_cast<int64_t>(list[i]);
  }
  if (Warp::lane() == 0) {
    a.count[row] = count;
    a.limit[row] = limit;
  }
}

}  // namespace rk::cuda
