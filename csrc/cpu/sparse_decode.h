// out_n = sum_j values[n, j] * W[indices[n, j]] + b_dec (- x_n, with ||out_n||^2), and dvalues = <grad_n, W[i_j]>.
//
// N k d multiply-adds on N k gathered rows: bound by how fast rows arrive from the last-level cache or memory, not by
// arithmetic. A block of columns is summed in registers over all k rows, so the result is written once; the rows that
// come kAhead activations later are prefetched, because their addresses are data and no hardware prefetcher sees them.
#pragma once

#include <type_traits>

#include "csc.h"
#include "kernels.h"
#include "simd.h"

namespace rk {
namespace RK_ISA {

#if RK_VECTOR_BYTES == 64
constexpr int kDecodeVecs = 16;
#else
constexpr int kDecodeVecs = 8;
#endif
// Rows that are prefetched ahead: as many bytes for short spans as for long ones.
template <int V>
constexpr int64_t kAhead = V >= kDecodeVecs ? 6 : 12;

template <class R>
RK_INLINE void prefetch_span(const R* p, int64_t elements) {
  for (int64_t i = 0; i < elements; i += static_cast<int64_t>(64 / sizeof(R))) {
    __builtin_prefetch(p + i);
  }
}

// The indices of one token's entries.
template <class I>
struct Entries {
  const I* indices;
  int64_t count;
};

// Entries of token n, from its first in the code; of token N none.
template <class R, class I>
RK_INLINE int64_t first_entry(const DecodeArgs<R, I>& a, int64_t n) {
  return a.offsets == nullptr ? n * a.k : a.offsets[n];
}
template <class R, class I>
RK_INLINE Entries<I> entries_of(const DecodeArgs<R, I>& a, int64_t n) {
  const int64_t first = first_entry(a, n);
  return {a.indices + first, n < a.N ? first_entry(a, n + 1) - first : 0};
}

// Columns [c, c + V * lanes) of one output row. `next` are the entries after this row's.
template <class R, class I, int V>
RK_INLINE Vec<Compute<R>> decode_span(
    const DecodeArgs<R, I>& a, int64_t n, const Entries<I>& own, const Compute<R>* values, const Entries<I>& next,
    int64_t c) {
  using T = Compute<R>;
  constexpr int64_t kSpan = V * kLanes<T>;
  const I* indices = own.indices;
  Vec<T> sum[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    sum[v] = Vec<T>{};
  }
  for (int64_t j = 0; j < own.count; ++j) {
    const int64_t ahead = j + kAhead<V>;
    if (ahead < own.count) {
      prefetch_span(a.W + static_cast<int64_t>(indices[ahead]) * a.d + c, kSpan);
    } else if (c + kSpan < a.d) {
      if (ahead - own.count < own.count) {
        prefetch_span(
            a.W + static_cast<int64_t>(indices[ahead - own.count]) * a.d + c + kSpan, std::min(kSpan, a.d - c - kSpan));
      }
    } else if (ahead - own.count < next.count) {
      prefetch_span(a.W + static_cast<int64_t>(next.indices[ahead - own.count]) * a.d, std::min(kSpan, a.d));
    }
    const R* row = a.W + static_cast<int64_t>(indices[j]) * a.d + c;
    const Vec<T> value = splat<T>(values[j]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      sum[v] += value * load(row + v * kLanes<T>);
    }
  }
  Vec<T> squares = Vec<T>{};
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    const int64_t at = c + v * kLanes<T>;
    if (a.b_dec != nullptr) {
      sum[v] += load(a.b_dec + at);
    }
    if (a.x != nullptr) {
      sum[v] -= load(a.x + n * a.d + at);
    }
    if (a.sq != nullptr) {
      squares += sum[v] * sum[v];
    }
    store_narrow(a.out + n * a.d + at, sum[v]);
  }
  return squares;
}

template <class R, class I>
void decode_row(
    const DecodeArgs<R, I>& a, int64_t n, const Entries<I>& own, const Compute<R>* values, const Entries<I>& next) {
  using T = Compute<R>;
  constexpr int L = kLanes<T>;
  Vec<T> squares = Vec<T>{};
  int64_t c = 0;
  for (; c + kDecodeVecs * L <= a.d; c += kDecodeVecs * L) {
    squares += decode_span<R, I, kDecodeVecs>(a, n, own, values, next, c);
  }
  for (; c + kDecodeVecs / 2 * L <= a.d; c += kDecodeVecs / 2 * L) {
    squares += decode_span<R, I, kDecodeVecs / 2>(a, n, own, values, next, c);
  }
  for (; c + 2 * L <= a.d; c += 2 * L) {
    squares += decode_span<R, I, 2>(a, n, own, values, next, c);
  }
  for (; c + L <= a.d; c += L) {
    squares += decode_span<R, I, 1>(a, n, own, values, next, c);
  }
  T sq = a.sq != nullptr ? horizontal_sum<T>(squares) : T(0);
  for (; c < a.d; ++c) {
    T sum = 0;
    for (int64_t j = 0; j < own.count; ++j) {
      sum += values[j] * widen(a.W[static_cast<int64_t>(own.indices[j]) * a.d + c]);
    }
    sum += a.b_dec != nullptr ? a.b_dec[c] : T(0);
    sum -= a.x != nullptr ? T(widen(a.x[n * a.d + c])) : T(0);
    sq += sum * sum;
    narrow(sum, a.out[n * a.d + c]);
  }
  if (a.sq != nullptr) {
    a.sq[n] = sq;
  }
}

constexpr int64_t kTokensPerTask = 16;

template <class R, class I>
void sparse_decode(const DecodeArgs<R, I>& a, const Threads& threads) {
  using T = Compute<R>;
  parallel_tasks(threads, (a.N + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t task) {
    const int64_t end = std::min((task + 1) * kTokensPerTask, a.N);
    for (int64_t n = task * kTokensPerTask; n < end; ++n) {
      const Entries<I> own = entries_of(a, n);
      if (!all_in_range(own.indices, own.count, a.F)) {
        *a.refused = true;
        continue;
      }
      const int64_t first = first_entry(a, n);
      T* copies = scratch<T>(Slot::kRows, own.count);
      const T* values = copies;
      if constexpr (std::is_same_v<R, T>) {
        values = a.mask == nullptr ? a.values + first : copies;
      }
      for (int64_t j = 0; values == copies && j < own.count; ++j) {
        const int64_t at = first + j;
        const bool counts = a.mask == nullptr || !(widen(a.mask[at]) == T(0));
        copies[j] = counts ? T(widen(a.values[at])) : T(0);
      }
      decode_row(a, n, own, values, entries_of(a, n + 1));
    }
  });
}

// ---- dot products of rows ------------------------------------------------------------------------------------------

// A chain of roundings is no longer than a block's: with 8 lanes one of 9000 columns had four times torch's error.
constexpr int64_t kDotColumns = 2048;

// out[i] = <rows[i], w> from column `begin` to `end`. Two chains per row; four rows share the loads of w. Same bits for
// every G.
template <class R, class S, int G>
RK_INLINE void dots_of_block(const R* const (&rows)[G], const S* w, int64_t begin, int64_t end, Compute<R> (&out)[G]) {
  using T = Compute<R>;
  constexpr int L = kLanes<T>;
  Vec<T> even[G];
  Vec<T> odd[G];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
    even[g] = Vec<T>{};
    odd[g] = Vec<T>{};
  }
  int64_t c = begin;
  for (; c + 2 * L <= end; c += 2 * L) {
    const Vec<T> w0 = load(w + c);
    const Vec<T> w1 = load(w + c + L);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      even[g] += load(rows[g] + c) * w0;
      odd[g] += load(rows[g] + c + L) * w1;
    }
  }
  if (c + L <= end) {
    const Vec<T> w0 = load(w + c);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      even[g] += load(rows[g] + c) * w0;
    }
    c += L;
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
    out[g] = horizontal_sum<T>(even[g] + odd[g]);
    for (int64_t i = c; i < end; ++i) {
      out[g] += T(widen(rows[g][i])) * T(widen(w[i]));
    }
  }
}

// out[i] = <rows[i], w>, block by block.
template <class R, class S, int G>
RK_INLINE void dots(const R* const (&rows)[G], const S* w, int64_t d, Compute<R> (&out)[G]) {
  dots_of_block<R, S, G>(rows, w, 0, std::min(kDotColumns, d), out);
  for (int64_t begin = kDotColumns; begin < d; begin += kDotColumns) {
    Compute<R> more[G];
    dots_of_block<R, S, G>(rows, w, begin, std::min(begin + kDotColumns, d), more);
    for (int g = 0; g < G; ++g) {
      out[g] += more[g];
    }
  }
}

template <class R, class I>
void row_dots(const DotArgs<R, I>& a, const Threads& threads) {
  using T = Compute<R>;
  const auto first_entry_of = [&](int64_t n) { return a.offsets == nullptr ? n * a.k : a.offsets[n]; };
  const int64_t total = first_entry_of(a.N);
  parallel_tasks(threads, (a.N + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t task) {
    const int64_t end = std::min((task + 1) * kTokensPerTask, a.N);
    for (int64_t n = task * kTokensPerTask; n < end; ++n) {
      const R* grad = a.grad + n * a.d;
      int64_t j = first_entry_of(n);
      const int64_t last = first_entry_of(n + 1);
      const auto row = [&](int64_t i) { return a.W + static_cast<int64_t>(a.indices[i]) * a.d; };
      for (; j + 4 <= last; j += 4) {
        for (int64_t i = j + 4; i < std::min(j + 8, total); ++i) {
          prefetch_span(row(i), a.d);
        }
        T out[4];
        dots<R, R, 4>({row(j), row(j + 1), row(j + 2), row(j + 3)}, grad, a.d, out);
        for (int i = 0; i < 4; ++i) {
          narrow(out[i], a.dvalues[j + i]);
        }
      }
      for (; j < last; ++j) {
        T out[1];
        dots<R, R, 1>({row(j)}, grad, a.d, out);
        narrow(out[0], a.dvalues[j]);
      }
    }
  });
}

}  // namespace RK_ISA
}  // namespace rk
