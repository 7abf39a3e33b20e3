// One row's part of row_filter, by the 32 lanes of a warp: the k largest of relu(pre + bias), ties to the lower latent.
//
// A key is (bits of relu(pre + bias) << 32) | (0x7fffffff - latent): an integer that orders like the value, NaN first,
// equal values by ascending latent; no two keys are equal, none is 0. Chunks come by ascending latent, so a later
// latent enters the list only by being strictly greater than `limit`, the bits of the k-th best so far: an equal one
// would lose the tie. A list that has grown enough (`kept_until`) is reduced to its k best and the limit rises. So
// overflow is no special case; a row that ascends is reduced in nearly every step. What is in the list beyond the k
// best is never wrong, and its order says nothing.
//
// Three kinds of columns. Of a row's first ones all enter, zeros too (rows with fewer than k positives end with zeros
// of the lowest latents): there is no limit yet, it is below 0. Then steps of 256 with one vote each, two on their way
// while one is judged; the limit is a number >= 0 by then and a candidate is what is not <= it, NaN included: an
// addition and a comparison a column. What is left at a chunk's end goes by 32.
//
// `Warp` is what the lanes share: on a GPU the hardware's warp (row_filter.cu), in a test 32 fibers on the CPU. All
// lanes call its functions together.
#pragma once

#include <cstdint>

#include "lane.h"
#include "row_filter.h"

namespace rk::cuda {

inline constexpr int32_t kNanRank = 0x7fffffff;
inline constexpr int kGroup = 128;  // keys that a reduction looks at together: 4 a lane

// The least key of the k largest of `count` in `list`, or less, as long as just k are at least that; 1 <= k <= count.
// Value bits first, then the word of the tie, bit by bit. `limit`: no key's value bits are less. Behind the keys the
// list has zeros up to a multiple of kGroup.
template <class Warp>
RK_LANE uint64_t bound_of_best(const uint64_t* list, int count, int k, int32_t limit) {
  uint32_t most = 0;
  RK_ROLLED
  for (int start = 0; start < count; start += kGroup) {
    RK_UNROLL
    for (int i = 0; i < kGroup; i += 32) {
      const uint32_t value = static_cast<uint32_t>(list[start + i + Warp::lane()] >> 32);
      most = value > most ? value : most;
    }
  }
  most = Warp::max(most);
  const uint32_t least = limit < 0 ? 0 : static_cast<uint32_t>(limit);
  // The bits above the first in which the two differ are every key's: no need to ask for them.
  int bit = Warp::highest_bit(most ^ least);  // -1 where they are equal
  uint32_t best = bit < 0 ? most : static_cast<uint32_t>(uint64_t{most} >> (bit + 1) << (bit + 1));
  int above = count;
  RK_ROLLED
  for (; bit >= 0 && above != k; --bit) {
    const uint32_t trial = best | (1u << bit);
    int found = 0;
    RK_ROLLED
    for (int start = 0; start < count; start += kGroup) {
      RK_UNROLL
      for (int i = 0; i < kGroup; i += 32) {
        found += static_cast<uint32_t>(list[start + i + Warp::lane()] >> 32) >= trial ? 1 : 0;
      }
    }
    found = Warp::sum(found);
    if (found >= k) {
      best = trial;
      above = found;
    }
  }
  uint64_t bound = uint64_t{best} << 32;
  // More than k only where the k-th value is met several times.
  RK_ROLLED
  for (bit = 30; bit >= 0 && above != k; --bit) {
    const uint64_t trial = bound | (uint64_t{1} << bit);
    int found = 0;
    RK_ROLLED
    for (int i = Warp::lane(); i < count; i += 32) {
      found += list[i] >= trial ? 1 : 0;
    }
    found = Warp::sum(found);
    if (found >= k) {
      bound = trial;
      above = found;
    }
  }
  return bound;
}

// Leaves the k largest of the list in its first k places, in the order they stood in. Returns the value bits of the
// k-th; `limit` are those of the last time, or below 0.
template <class Warp>
RK_LANE int32_t keep_best(uint64_t* list, int count, int k, int32_t limit) {
  RK_ROLLED
  for (int i = count + Warp::lane(); i < (count + kGroup - 1) / kGroup * kGroup; i += 32) {
    list[i] = 0;
  }
  Warp::sync();  // what other lanes have appended
  const uint64_t bound = bound_of_best<Warp>(list, count, k, limit);
  int kept = 0;
  uint32_t least = kNanRank;
  RK_ROLLED
  for (int start = 0; start < count; start += 32) {
    const int at = start + Warp::lane();
    const uint64_t key = at < count ? list[at] : 0;
    const bool keep = at < count && key >= bound;
    const uint32_t lanes = Warp::ballot(keep);
    Warp::sync();  // every lane has read before one writes
    if (keep) {
      list[kept + Warp::lanes_below(lanes)] = key;
      const uint32_t value = static_cast<uint32_t>(key >> 32);
      least = value < least ? value : least;
    }
    kept += Warp::lanes_of(lanes);
  }
  Warp::sync();
  return static_cast<int32_t>(Warp::min(least));
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

union FloatBits {
  float number;
  int32_t bits;
};

// Orders like relu(value): 0 for what is not positive, the largest int32 for NaN.
RK_LANE int32_t rank_bits(float value) {
  const FloatBits same{value};
  return value != value ? kNanRank : value > 0.0f ? same.bits : 0;
}

RK_LANE uint64_t key_of(int32_t bits, uint32_t tie) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(bits)) << 32) | tie;
}

// A value that is not <= level has bits > limit. NaN, beside a NaN as limit, has not, but is let in as well: it is less
// than the k best by its tie.
RK_LANE float level_of(int32_t limit) {
  constexpr int32_t kInfinity = 0x7f800000;
  return FloatBits{.bits = limit > kInfinity ? kInfinity : limit}.number;
}

// A list that is longer is reduced before more is appended: a longer one lets in more that only beats a limit that lags
// behind, a shorter one is reduced more often. A little below 2 k, so that the last step's keys seldom take it past 2 k:
// for k = 64, to a second kGroup.
RK_LANE constexpr int kept_until(int k) {
  return k < 16 ? 32 : 2 * k - k / 8;
}
static_assert(kept_until(kFilterMostK) + 32 <= kFilterCapacity, "32 columns fit behind a list that is not reduced");

// kVector 4: 16-byte loads, for which pre's row and bias + first begin at 16-byte boundaries and 4 divides columns.
template <class Warp, int kVector>
RK_LANE void filter_row(const FilterArgs& a, int64_t row, uint64_t* list) {
  constexpr int kOwn = 8;  // a lane's columns of a step
  constexpr int kLoads = kOwn / kVector;
  constexpr int kPiece = 32 * kVector;  // columns of one load of the warp
  constexpr int kStep = kLoads * kPiece;
  constexpr int kAhead = 2;  // steps on their way
  static_assert(kFilterMostK + kStep <= kFilterCapacity, "a step fits behind the k best");
  const float* pre = a.pre + row * a.columns;
  const float* bias = a.bias + a.first;
  int64_t* keys = a.keys + row * kFilterCapacity;

  // Where this lane reads. The pre-activations come from memory and the bias from a cache, so those are on their way
  // for longer.
  const float* pre_at = pre + Warp::lane() * kVector;
  const float* bias_at = bias + Warp::lane() * kVector;
  float next[kAhead][kOwn], next_bias[kOwn];
  const auto fetch = [&](int slot, int step) {
    RK_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      Warp::template load_once<kVector>(pre_at + step * kStep + i * kPiece, next[slot] + i * kVector);
    }
  };
  const auto fetch_bias = [&](int step) {
    RK_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      Warp::template load<kVector>(bias_at + step * kStep + i * kPiece, next_bias + i * kVector);
    }
  };
  // kAhead steps that all lie in the row, or none.
  const auto fetch_first = [&](int start) {
    if (start + kAhead * kStep <= a.columns) {
      RK_UNROLL
      for (int slot = 0; slot < kAhead; ++slot) {
        fetch(slot, slot);
      }
      fetch_bias(0);
    }
  };

  int32_t limit = -1;
  int count = 0;
  // The first `away` keys of the list are in `keys` alone: most chunks append a few and look at no other.
  int away = 0;
  int start = 0;
  const auto reduce = [&] {
    RK_ROLLED
    for (int i = Warp::lane(); i < away; i += 32) {
      list[i] = static_cast<uint64_t>(keys[i]);
    }
    away = 0;
    limit = keep_best<Warp>(list, count, a.k, limit);
    count = a.k;
  };

  if (a.first > 0) {
    fetch_first(0);  // before the limit is waited for
    count = away = a.count[row];
    limit = a.limit[row];
  }
  if (limit < 0) {
    const int room = (kFilterCapacity - count) / kVector * kVector;  // the steps that follow begin at a boundary
    start = room < a.columns ? room : a.columns;
    RK_ROLLED
    for (int column = Warp::lane(); column < start; column += 32) {
      list[count + column] = key_of(rank_bits(pre[column] + bias[column]), kNanRank - a.first - column);
    }
    count += start;
    if (start < a.columns) {
      reduce();
    }
    pre_at += start;
    bias_at += start;
    fetch_first(start);
  }

  const int most = kept_until(a.k);
  const int roomy = most < kFilterCapacity - kStep ? most : kFilterCapacity - kStep;
  float level = level_of(limit);
  const auto append = [&](float value, bool enters, int latent) {
    const uint32_t lanes = Warp::ballot(enters);
    if (enters) {
      const int32_t bits = value != value ? kNanRank : FloatBits{value}.bits;
      list[count + Warp::lanes_below(lanes)] = key_of(bits, kNanRank - latent);
    }
    count += Warp::lanes_of(lanes);
  };
  for (bool more = start + kAhead * kStep <= a.columns; more; start += kAhead * kStep) {
    more = start + 2 * kAhead * kStep <= a.columns;
    RK_UNROLL
    for (int slot = 0; slot < kAhead; ++slot) {
      float value[kOwn];
      bool found = false;
      RK_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        value[i] = Warp::once(next[slot][i] + next_bias[i]);
        found |= !(value[i] <= level);
      }
      if (slot + 1 < kAhead || more) {
        fetch_bias(slot + 1);
      }
      if (more) {
        fetch(slot, slot + kAhead);
      }
      if (!Warp::any(found)) {
        continue;
      }
      if (count > roomy) {
        int own = 0;
        RK_UNROLL
        for (int i = 0; i < kOwn; ++i) {
          own += !(value[i] <= level) ? 1 : 0;
        }
        if (count > most || count + Warp::sum(own) > kFilterCapacity) {
          reduce();
          level = level_of(limit);
        }
      }
      const int latent = a.first + start + slot * kStep + Warp::lane() * kVector;
      RK_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        const bool enters = !(value[i] <= level);
        if (Warp::any(enters)) {
          append(value[i], enters, latent + i / kVector * kPiece + i % kVector);
        }
      }
    }
    pre_at += kAhead * kStep;
    bias_at += kAhead * kStep;
  }
  RK_ROLLED
  for (; start < a.columns; start += 32) {
    const int column = start + Warp::lane();
    const float value = column < a.columns ? pre[column] + bias[column] : 0.0f;  // 0 enters nowhere
    if (Warp::any(!(value <= level))) {
      if (count > most) {
        reduce();
        level = level_of(limit);
      }
      append(value, !(value <= level), a.first + column);
    }
  }

  if (a.last) {
    reduce();
    write_sorted<Warp>(list, a.k, keys);
    return;
  }
  Warp::sync();  // what other lanes have appended
  RK_ROLLED
  for (int i = away + Warp::lane(); i < count; i += 32) {
    keys[i] = static_cast<int64_t>(list[i]);
  }
  if (Warp::lane() == 0) {
    a.count[row] = count;
    a.limit[row] = limit;
  }
}

}  // namespace rk::cuda
