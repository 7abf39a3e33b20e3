// Gradients by latent: each latent has one owner that walks its hits in token order (csc.h) with the two gradient rows
// in the first-level cache. No atomics, no [N * k, d] intermediate, every row of the result written once.
//
// Bytes: one gathered row of e (and one of x) per hit, mostly from the last-level cache; the weights once. Latents are
// handed out in chunks, heaviest first, because firing rates are heavy-tailed; who takes a chunk changes no bit.
#pragma once

#include <atomic>
#include <cmath>
#include <numeric>
#include <type_traits>

#include "adam.h"
#include "kernels.h"

namespace rk {
namespace RK_ISA {

constexpr int kGroup = 4;  // hits treated together: gradient rows are loaded and stored once per group

// sum += sum_i coefficient[i] * (rows[i] - shift); the rows `next` are prefetched on the way.
template <class R, int G, bool Shift>
RK_INLINE void accumulate_rows(
    Compute<R>* sum, const R* const (&rows)[G], const Compute<R> (&coefficient)[G], const Compute<R>* shift,
    int64_t d) {
  using T = Compute<R>;
  constexpr int L = kLanes<T>;
  int64_t c = 0;
  for (; c + L <= d; c += L) {
    Vec<T> total = load(sum + c);
    const Vec<T> origin = Shift ? load(shift + c) : Vec<T>{};
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const Vec<T> row = load(rows[g] + c);
      total += coefficient[g] * (Shift ? row - origin : row);
    }
    store<T>(sum + c, total);
  }
  for (; c < d; ++c) {
    for (int g = 0; g < G; ++g) {
      const T row = widen(rows[g][c]);
      sum[c] += coefficient[g] * (Shift ? row - shift[c] : row);
    }
  }
}

template <class R, int G>
RK_INLINE void accumulate(
    Compute<R>* sum, const R* const (&rows)[G], const Compute<R> (&coefficient)[G], const Compute<R>* shift,
    int64_t d) {
  if (shift != nullptr) {
    accumulate_rows<R, G, true>(sum, rows, coefficient, shift, d);
  } else {
    accumulate_rows<R, G, false>(sum, rows, coefficient, shift, d);
  }
}

// Chunks of latents; the chunk length depends on F alone, so per-chunk sums have one order.
struct Chunks {
  int64_t length, count;
  explicit Chunks(int64_t F) : length(std::max<int64_t>(32, (F + 511) / 512)), count((F + length - 1) / length) {}
};

// body(first latent, last latent, chunk) for every chunk, heaviest first.
template <class F>
void each_chunk(const Chunks& chunks, int64_t latents, const int64_t* offsets, const Threads& threads, const F& body) {
  int64_t* order = scratch<int64_t>(Slot::kOrder, chunks.count);
  std::iota(order, order + chunks.count, int64_t{0});
  const auto weight = [&](int64_t chunk) {
    return offsets[std::min((chunk + 1) * chunks.length, latents)] - offsets[chunk * chunks.length];
  };
  std::stable_sort(order, order + chunks.count, [&](int64_t a, int64_t b) { return weight(a) > weight(b); });
  std::atomic<int64_t> next{0};
  parallel_tasks(threads, std::min(std::max<int64_t>(threads.count, 1), chunks.count), [&](int64_t) {
    for (int64_t i = next++; i < chunks.count; i = next++) {
      body(order[i] * chunks.length, std::min((order[i] + 1) * chunks.length, latents), order[i]);
    }
  });
}

// f(rank of the first hit, number of hits as a constant) over [begin, end): groups of four, then single hits.
template <class F>
RK_INLINE void each_group(int64_t begin, int64_t end, const F& f) {
  int64_t h = begin;
  for (; h + kGroup <= end; h += kGroup) {
    f(h, std::integral_constant<int, kGroup>());
  }
  for (; h < end; ++h) {
    f(h, std::integral_constant<int, 1>());
  }
}

// Latents that fire in nearly every token have thousands of hits, whose serial sum in fp32 would lose what a blocked product
// keeps: hits are summed in segments, and the segments' sums then. f(begin, end, first segment or not).
constexpr int64_t kSegmentHits = 128;

template <class F>
RK_INLINE void each_segment(int64_t begin, int64_t end, const F& f) {
  for (int64_t h = begin; h < end; h += kSegmentHits) {
    f(h, std::min(h + kSegmentHits, end), h == begin);
  }
}

template <class T>
RK_INLINE void add_row(T* sum, const T* row, int64_t d) {
  for (int64_t c = 0; c < d; ++c) {
    sum[c] += row[c];
  }
}

template <class R>
void prefetch_hits(const LatentMajor& list, int64_t begin, int64_t end, const R* rows, int64_t d) {
  for (int64_t h = begin; h < end; ++h) {
    prefetch_span(rows + list.hits[h].token * d, d);
  }
}

// ---- one matrix: dW[f] = sum coefficient * (row - shift) ------------------------------------------------------------
template <class R>
void weight_grad(const WeightGradArgs<R>& a, const Threads& threads) {
  using T = Compute<R>;
  const int64_t d = a.d;
  each_chunk(Chunks(a.F), a.F, a.list.offsets, threads, [&](int64_t first, int64_t last, int64_t) {
    T* sum = scratch<T>(Slot::kRows, 2 * d);
    const int64_t hits_end = a.list.offsets[last];
    for (int64_t f = first; f < last; ++f) {
      std::fill(sum, sum + d, T(0));
      T total = 0;
      each_segment(a.list.offsets[f], a.list.offsets[f + 1], [&](int64_t from, int64_t to, bool initial) {
        T* part = initial ? sum : sum + d;
        if (!initial) {
          std::fill(part, part + d, T(0));
        }
        T part_total = 0;
        each_group(from, to, [&](int64_t h, auto group) {
          constexpr int G = decltype(group)::value;
          const R* rows[G];
          T coefficient[G];
          prefetch_hits(a.list, h + G, std::min<int64_t>(h + G + kGroup, hits_end), a.rows, d);
          for (int g = 0; g < G; ++g) {
            const Hit hit = a.list.hits[h + g];
            const int64_t at = hit.token * a.k + hit.slot;
            const bool counts = a.mask == nullptr || !(widen(a.mask[at]) == T(0));
            rows[g] = a.rows + hit.token * d;
            coefficient[g] = counts ? T(widen(a.values[at])) : T(0);
            part_total += coefficient[g];
          }
          if (a.dvalues != nullptr) {
            T dots_out[G];
            dots<R, R, G>(rows, a.W + f * d, d, dots_out);
            for (int g = 0; g < G; ++g) {
              const Hit hit = a.list.hits[h + g];
              narrow(dots_out[g], a.dvalues[hit.token * a.k + hit.slot]);
            }
          }
          if (a.dW != nullptr) {
            accumulate<R, G>(part, rows, coefficient, a.shift, d);
          }
        });
        total += part_total;
        if (!initial) {
          add_row(sum, part, d);
        }
      });
      if (a.dW != nullptr) {
        int64_t c = 0;
        for (; c + kLanes<T> <= d; c += kLanes<T>) {
          store_narrow(a.dW + f * d + c, load(sum + c));
        }
        for (; c < d; ++c) {
          narrow(sum[c], a.dW[f * d + c]);
        }
      }
      if (a.db != nullptr) {
        a.db[f] = total;
      }
    }
  });
}

// ---- all gradients of the autoencoder's loss from e ----------------------------------------------------------------

// Hits [begin, end) of one latent: gd += v g_n, ge += dv (x_n - b_dec), returns sum dv, with g = scale * e and
// dv = <g_n, w_dec>.
template <class R>
RK_INLINE Compute<R> segment_gradient(
    const LatentMajor& list, int64_t begin, int64_t end, int64_t prefetch_end, const R* e, const R* x, const R* values,
    const R* w_dec, const Compute<R>* b_dec, int64_t k, int64_t d, Compute<R> scale, Compute<R>* gd, Compute<R>* ge) {
  using T = Compute<R>;
  T gb = 0;
  each_group(begin, end, [&](int64_t h, auto group) {
    constexpr int G = decltype(group)::value;
    const R* rows_e[G];
    const R* rows_x[G];
    T value[G];
    T dv[G];
    prefetch_hits(list, h + G, std::min<int64_t>(h + G + kGroup, prefetch_end), e, d);
    for (int g = 0; g < G; ++g) {
      const Hit hit = list.hits[h + g];
      rows_e[g] = e + hit.token * d;
      rows_x[g] = x + hit.token * d;
      value[g] = scale * widen(values[hit.token * k + hit.slot]);
    }
    dots<R, R, G>(rows_e, w_dec, d, dv);
    for (int g = 0; g < G; ++g) {
      dv[g] *= scale;
      gb += dv[g];
    }
    accumulate_rows<R, G, false>(gd, rows_e, value, nullptr, d);
    prefetch_hits(list, h + G, std::min<int64_t>(h + G + kGroup, prefetch_end), x, d);
    accumulate<R, G>(ge, rows_x, dv, b_dec, d);
  });
  return gb;
}

// The same for all hits of a latent, segment by segment; `parts` is room for two rows.
template <class R>
Compute<R> latent_gradient(
    const LatentMajor& list, int64_t latent, int64_t prefetch_end, const R* e, const R* x, const R* values,
    const R* w_dec, const Compute<R>* b_dec, int64_t k, int64_t d, Compute<R> scale, Compute<R>* gd, Compute<R>* ge,
    Compute<R>* parts) {
  using T = Compute<R>;
  T gb = 0;
  each_segment(list.offsets[latent], list.offsets[latent + 1], [&](int64_t from, int64_t to, bool initial) {
    T* own_gd = initial ? gd : parts;
    T* own_ge = initial ? ge : parts + d;
    if (!initial) {
      std::fill(parts, parts + 2 * d, T(0));
    }
    gb += segment_gradient<R>(list, from, to, prefetch_end, e, x, values, w_dec, b_dec, k, d, scale, own_gd, own_ge);
    if (!initial) {
      add_row(gd, own_gd, d);
      add_row(ge, own_ge, d);
    }
  });
  return gb;
}

template <class R>
void sae_backward(const SaeGradArgs<R>& a, const Threads& threads) {
  using T = Compute<R>;
  each_chunk(Chunks(a.F), a.F, a.list.offsets, threads, [&](int64_t first, int64_t last, int64_t) {
    T* parts = scratch<T>(Slot::kRows, 2 * a.d);
    const int64_t* offsets = a.list.offsets;
    for (int64_t f = first; f < last; ++f) {
      if (offsets[f] < offsets[f + 1]) {
        a.db_enc[f] += latent_gradient<R>(
            a.list, f, offsets[last], a.e, a.x, a.values, a.W_dec + f * a.d, a.b_dec, a.k, a.d, a.scale,
            a.dW_dec + f * a.d, a.dW_enc + f * a.d, parts);
      }
    }
  });
}

template <class R>
void sae_backward_adam(const SaeAdamArgs<R>& a, const Threads& threads) {
  using T = Compute<R>;
  const int64_t d = a.d;
  const Chunks chunks(a.F);
  // [chunks, d]: sums of db_enc[f] W_enc[f] per chunk, added up in chunk order below.
  T* partial = scratch<T>(Slot::kPartialSums, chunks.count * d);
  each_chunk(chunks, a.F, a.list.offsets, threads, [&](int64_t first, int64_t last, int64_t chunk) {
    T* gd = scratch<T>(Slot::kRows, 4 * d);
    T* ge = gd + d;
    T* parts = gd + 2 * d;
    T* sum = partial + chunk * d;
    std::fill(sum, sum + d, T(0));
    const int64_t* offsets = a.list.offsets;
    for (int64_t f = first; f < last; ++f) {
      R* w_enc = a.W_enc + f * d;
      R* w_dec = a.W_dec + f * d;
      const int64_t extra = a.extra_position != nullptr ? a.extra_position[f] : -1;
      const bool touched = offsets[f] < offsets[f + 1] || extra >= 0;
      T gb = 0;
      if (touched) {
        if (extra >= 0) {
          std::copy_n(a.extra_dW_dec + extra * d, d, gd);
          std::copy_n(a.extra_dW_enc + extra * d, d, ge);
          gb = a.extra_db_enc[extra];
        } else {
          std::fill(gd, gd + 2 * d, T(0));
        }
        gb += latent_gradient<R>(
            a.list, f, offsets[last], a.e, a.x, a.values, w_dec, a.b_dec, a.k, d, a.scale, gd, ge, parts);
        accumulate_rows<R, 1, false>(sum, {w_enc}, {gb}, nullptr, d);
      }
      const T* no_gradient = nullptr;
      adam_stored_row(
          a.adam, w_dec, touched ? gd : no_gradient, a.m_W_dec + f * d, a.v_W_dec + f * d, d, T(1), a.remove_parallel,
          a.unit_norm);
      adam_stored_row(
          a.adam, w_enc, touched ? ge : no_gradient, a.m_W_enc + f * d, a.v_W_enc + f * d, d, T(1), false, false);
      adam_stored_row(a.adam, a.b_enc + f, &gb, a.m_b_enc + f, a.v_b_enc + f, 1, T(1), false, false);
    }
  });
  std::fill(a.db_times_W_enc, a.db_times_W_enc + d, T(0));
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    for (int64_t c = 0; c < d; ++c) {
      a.db_times_W_enc[c] += partial[chunk * d + c];
    }
  }
}

}  // namespace RK_ISA
}  // namespace rk
