// The fibres of a tensor as lanes of a vector: where they lie, how they are packed and written back, and how memory that
// is needed later is fetched between other work.
#pragma once

#include "kernels.h"
#include "simd.h"
#include "topk_encode.h"

namespace rk {
namespace RK_ISA {

// Fetches byte ranges into the second-level cache, a few lines at a time between other work.
struct Fetcher {
  static constexpr int kMost = 64;
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kBytes =
      448 << 10;  // less than half of a second-level cache: the panel in work is there too

  const char* begin[kMost];
  int64_t lines[kMost];
  int ranges = 0;
  int64_t total = 0, each = 0;

  void add(const void* at, int64_t bytes) {
    const int64_t count = std::min(bytes / kLine, kBytes / kLine - total);
    if (count > 0 && ranges < kMost) {
      begin[ranges] = static_cast<const char*>(at);
      lines[ranges++] = count;
      total += count;
    }
  }

  // `count` lines in a row for a loop that fetches one at a time; null when there is nothing left.
  const char* take(int64_t count) {
    if (ranges == 0) {
      return nullptr;
    }
    const int last = ranges - 1;
    const char* at = begin[last];
    count = std::min(count, lines[last]);
    begin[last] += count * kLine;
    lines[last] -= count;
    total -= count;
    ranges -= lines[last] == 0;
    return at;
  }

  // What is left, over `steps` calls of step().
  void spread(int64_t steps) {
    each = (total + steps - 1) / std::max<int64_t>(steps, 1);
  }

  RK_INLINE void step() {
    for (int64_t left = each; left > 0 && ranges > 0;) {
      const int last = ranges - 1;
      const int64_t count = std::min(left, lines[last]);
      for (int64_t i = 0; i < count; ++i) {
        __builtin_prefetch(begin[last] + i * kLine, 0, 2);
      }
      begin[last] += count * kLine;
      lines[last] -= count;
      ranges -= lines[last] == 0;
      left -= count;
    }
  }
};

template <class T>
struct Stripe {
  const ProjectionEntry<T>* entry;
  int64_t count;  // fibres; lanes beyond are 0
  bool adjacent_from, adjacent_to;  // lanes lie one after the other
  int64_t from[kLanes<T>], to[kLanes<T>];  // where each lane's fibre begins

  Stripe(const ProjectionEntry<T>& e, int64_t number) : entry(&e) {
    constexpr int64_t L = kLanes<T>;
    count = std::min(L, e.fibres - number * L);
    adjacent_from = adjacent_to = true;
    for (int64_t lane = 0; lane < count; ++lane) {
      int64_t rest = number * L + lane;
      from[lane] = to[lane] = 0;
      for (int64_t axis = e.others; axis-- > 0;) {
        const int64_t at = rest % e.other[axis].size;
        rest /= e.other[axis].size;
        from[lane] += at * e.other[axis].from_stride;
        to[lane] += at * e.other[axis].to_stride;
      }
      adjacent_from = adjacent_from && from[lane] == from[0] + lane;
      adjacent_to = adjacent_to && to[lane] == to[0] + lane;
    }
  }
};

// Numbers [start, start + rows) of each fibre -> out[row][lane], rows `ld` apart.
template <class R, class T>
void pack_stripe(const Stripe<T>& s, int64_t start, int64_t rows, T* out, int64_t ld) {
  constexpr int L = kLanes<T>;
  const int64_t stride = s.entry->from_stride;
  const R* base = static_cast<const R*>(s.entry->from) + start * stride;
  int64_t c = 0;
  if (stride == 1) {
    for (; c + L <= rows; c += L) {
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        block[i] = i < s.count ? load(base + s.from[i] + c) : Vec<T>{};
      }
      transpose<T, L>(block);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        store<T>(out + (c + i) * ld, block[i]);
      }
    }
  } else if (s.adjacent_from && s.count == L) {
    for (; c < rows; ++c) {
      store<T>(out + c * ld, load(base + s.from[0] + c * stride));
    }
  }
  for (; c < rows; ++c) {
    for (int64_t i = 0; i < L; ++i) {
      out[c * ld + i] = i < s.count ? T(widen(base[s.from[i] + c * stride])) : T(0);
    }
  }
}

// The way back.
template <class R, class T>
void unpack_stripe(const Stripe<T>& s, int64_t start, int64_t rows, const T* in, int64_t ld) {
  constexpr int L = kLanes<T>;
  const int64_t stride = s.entry->to_stride;
  R* base = static_cast<R*>(s.entry->to) + start * stride;
  int64_t c = 0;
  if (stride == 1) {
    for (; c + L <= rows; c += L) {
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        block[i] = load(in + (c + i) * ld);
      }
      transpose<T, L>(block);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        if (i < s.count) {
          store_narrow(base + s.to[i] + c, block[i]);
        }
      }
    }
  } else if (s.adjacent_to && s.count == L) {
    for (; c < rows; ++c) {
      store_narrow(base + s.to[0] + c * stride, load(in + c * ld));
    }
  }
  for (; c < rows; ++c) {
    for (int64_t i = 0; i < s.count; ++i) {
      narrow(in[c * ld + i], base[s.to[i] + c * stride]);
    }
  }
}

template <class T, class F>
void with_element_type(const Stripe<T>& s, const F& f) {
  if constexpr (std::is_same_v<T, double>) {
    f(double());
  } else {
    switch (s.entry->type) {
      case Element::kBFloat16:
        return f(BF16());
      case Element::kHalf:
        return f(F16());
      default:
        return f(float());
    }
  }
}

}  // namespace RK_ISA
}  // namespace rk
