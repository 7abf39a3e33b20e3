// values, indices = top k of relu((x - b_dec) @ W_enc^T + b_enc) per row, without ever holding [N, F].
//
// 2 N F d flops on (N + F) d numbers: compute-bound, so the floor is the bare matrix product. The product is written out
// here because the selection then sits behind the registers: a tile of pre-activations is compared with each row's
// current k-th best value while it is still in the first-level cache, and only survivors are stored, about
// k (1 + ln(F / k)) of F per row.
//
// * Vector lanes are rows of x (packed to [panel][d][rows], b_dec subtracted on the way); latents are broadcast from
//   packed tiles [tile][k][kTileLatents]. kVecs x kTileLatents accumulators fill the register file.
// * Blocking: a chunk of latents, kDepth columns of it at a time, stays in the second-level cache while all panels of x
//   pass by; kSumLength columns of a panel stay in the first while the chunk's tiles pass by. Unfinished tiles wait in a
//   buffer of partial sums. Restarting the sum every kSumLength columns also keeps the rounding error that of a blocked
//   product, not of a serial sum.
// * Work is split over rows; over latents only when there are too few rows to amortise the packing of W_enc.
// * Every pre-activation is the same sequence of operations wherever its tile lies, and selection is by a total order:
//   the result does not depend on threads or blocking.
#pragma once

#include "kernels.h"
#include "select.h"
#include "simd.h"

namespace rk {
namespace RK_ISA {

#if RK_VECTOR_BYTES == 64
constexpr int kTileLatents = 8;  // 8 x 3 accumulators + 3 of x + broadcasts in 32 registers
#else
constexpr int kTileLatents = 4;  // 4 x 3 + 3 + 1 in 16 registers
#endif
constexpr int kVecs = 3;
constexpr int64_t kSumLength = 192;  // 192 columns of a panel: 36 KiB of fp32 rows in AVX-512
constexpr int64_t kDepth = 1024;
constexpr int64_t kAheadSteps = 8;  // about 100 cycles of multiply-adds
constexpr int64_t kChunkElements = 128 * 1024;  // packed latents: half a MiB of fp32
constexpr int64_t kPackedRowElements = 2 * 1024 * 1024;  // packed x per thread: 8 MiB of fp32
constexpr int64_t kCandidateBytes = 16 << 20;  // candidates per thread, at least one panel's
constexpr int64_t kRowsWorthSplitting = 512;  // rows per thread that amortise packing all of W_enc

template <class T>
constexpr int64_t kPanelRows = kVecs * kLanes<T>;

// tile[f][row] (+)= sum_k w[k][f] * x[k][row]
template <class T, int V>
RK_INLINE void multiply(const T* __restrict x, const T* __restrict w, int64_t depth, T* __restrict tile, bool add) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[kTileLatents][V];
#pragma GCC unroll 16
  for (int f = 0; f < kTileLatents; ++f) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sum[f][v] = Vec<T>{};
    }
  }
  for (int64_t i = 0; i < depth; ++i) {
    Vec<T> rows[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      __builtin_prefetch(x + (kAheadSteps * V + v) * L);  // the panel streams from the second-level cache
      rows[v] = load(x + v * L);
    }
#pragma GCC unroll 16
    for (int f = 0; f < kTileLatents; ++f) {
      const Vec<T> latent = splat<T>(w[f]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sum[f][v] += latent * rows[v];
      }
    }
    x += V * L;
    w += kTileLatents;
  }
  if (add) {
#pragma GCC unroll 16
    for (int f = 0; f < kTileLatents; ++f) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        store<T>(tile + (f * V + v) * L, load(tile + (f * V + v) * L) + sum[f][v]);
      }
    }
  } else {
#pragma GCC unroll 16
    for (int f = 0; f < kTileLatents; ++f) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        store<T>(tile + (f * V + v) * L, sum[f][v]);
      }
    }
  }
}

// What a filter hands survivors to, and asks for the value that one must exceed: by its row, or by its latent.
//
// Candidates of a block of rows over a range of latents: each row its own threshold.
template <class T>
struct Candidates {
  typename Candidate<T>::Key* keys;  // [rows, capacity]
  T* threshold;  // [rows]: a later latent must exceed it
  int64_t* count;  // [rows]
  int64_t capacity, k;

  void start(int64_t rows) const {
    std::fill(threshold, threshold + rows, T(0));
    std::fill(count, count + rows, int64_t{0});
  }
  Vec<T> row_bound(int64_t row) const {
    return load(threshold + row);
  }
  Vec<T> bound(Vec<T> of_row, int64_t) const {
    return of_row;
  }
  void push(int64_t row, T value, uint32_t index) {
    auto* own = keys + row * capacity;
    own[count[row]++] = Candidate<T>::key(value, index);
    if (count[row] == capacity && capacity > k) {
      threshold[row] = keep_best<T>(own, capacity, k);
      count[row] = k;
    }
  }
};

// Adds the bias to a finished tile and hands on what exceeds its bound.
template <class T, int V, class Sink>
RK_INLINE void filter(
    T* tile, const T* bias, int64_t first_latent, int64_t latents, int64_t first_row, int64_t rows, Sink& out) {
  constexpr int L = kLanes<T>;
  uint32_t survivors[kTileLatents * V * L + L];  // positions in the tile
  int64_t n = 0;
  Vec<T> threshold[V];
  uint32_t exists[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    threshold[v] = out.row_bound(first_row + v * L);
    const int64_t lanes = std::clamp<int64_t>(rows - v * L, 0, L);
    exists[v] = (uint32_t{1} << lanes) - 1;
  }
  for (int64_t f = 0; f < latents; ++f) {
    const Vec<T> b = splat<T>(bias[first_latent + f]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t at = (f * V + v) * L;
      const Vec<T> pre = load(tile + at) + b;
      store<T>(tile + at, pre);
      n = append_set_bits<T>(
          survivors, n, not_le(pre, out.bound(threshold[v], first_latent + f)) & exists[v], static_cast<uint32_t>(at));
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t at = survivors[i];
    out.push(first_row + at % (V * L), tile[at], static_cast<uint32_t>(first_latent) + at / (V * L));
  }
}

// Rows of x, all in order or those of a list.
template <class R>
struct RowList {
  const R* x;
  const int64_t* numbers;  // null: 0, 1, 2, ...
  int64_t count;

  const R* row(int64_t place, int64_t d) const {
    return x + (numbers == nullptr ? place : numbers[place]) * d;
  }
};

// Rows [first, first + rows) of a list -> [d][lanes], b_dec subtracted; lanes beyond the rows are 0.
template <class R>
void pack_panel(
    const RowList<R>& list, int64_t first, const Compute<R>* b_dec, int64_t rows, int64_t lanes, int64_t d,
    Compute<R>* out) {
  using T = Compute<R>;
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < lanes; r += L) {
    int64_t c = 0;
    for (; c + L <= d; c += L) {
      const Vec<T> origin = b_dec == nullptr ? Vec<T>{} : load(b_dec + c);
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        block[i] = r + i < rows ? load(list.row(first + r + i, d) + c) - origin : Vec<T>{};
      }
      transpose<T, L>(block);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        store<T>(out + (c + i) * lanes + r, block[i]);
      }
    }
    for (; c < d; ++c) {
      for (int64_t i = r; i < r + L; ++i) {
        const T value = i < rows ? T(widen(list.row(first + i, d)[c])) : T(0);
        out[c * lanes + i] = i < rows && b_dec != nullptr ? value - b_dec[c] : value;
      }
    }
  }
}

// Columns [start, start + depth) of `latents` rows of W -> [tile][depth][kTileLatents], zero-padded to whole tiles.
template <class R>
void pack_latents(const R* W, int64_t latents, int64_t d, int64_t start, int64_t depth, Compute<R>* out) {
  using T = Compute<R>;
  constexpr int L = kLanes<T>;
  for (int64_t f = 0; f < latents; f += kTileLatents) {
    const R* rows = W + f * d + start;
    const int64_t real = std::min<int64_t>(kTileLatents, latents - f);
    int64_t c = 0;
    for (; real == kTileLatents && c + L <= depth; c += L) {
      Vec<T> block[kTileLatents];
#pragma GCC unroll 16
      for (int i = 0; i < kTileLatents; ++i) {
        block[i] = load(rows + i * d + c);
      }
      transpose<T, kTileLatents>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kTileLatents; ++i) {
        store<T>(out + c * kTileLatents + i * L, block[i]);
      }
    }
    for (; c < depth; ++c) {
      for (int64_t i = 0; i < kTileLatents; ++i) {
        out[c * kTileLatents + i] = i < real ? T(widen(rows[i * d + c])) : T(0);
      }
    }
    out += kTileLatents * depth;
  }
}

template <class T, int V, class Sink>
void multiply_and_filter(
    const T* panel, const T* packed, int64_t depth, T* partial, bool first, bool last, const T* bias,
    int64_t first_latent, int64_t latents, int64_t first_row, int64_t rows, Sink& out) {
  constexpr int64_t kTile = kTileLatents * V * kLanes<T>;
  for (int64_t start = 0; start == 0 || start < depth; start += kSumLength) {
    const int64_t length = std::min(kSumLength, depth - start);
    const bool complete = last && start + length >= depth;
    const T* x = panel + start * V * kLanes<T>;
    const T* w = packed + start * kTileLatents;
    T* tile = partial;
    for (int64_t f = 0; f < latents; f += kTileLatents) {
      multiply<T, V>(x, w, length, tile, !first || start > 0);
      if (complete) {
        filter<T, V>(tile, bias, first_latent + f, std::min<int64_t>(kTileLatents, latents - f), first_row, rows, out);
      }
      w += kTileLatents * depth;
      tile += kTile;
    }
  }
}

// Hands on what a list of rows has among latents [begin, end), a row's latents in ascending order.
template <class R, class Sink>
void encode_block(const EncodeArgs<R>& a, const RowList<R>& list, int64_t begin, int64_t end, Sink& out) {
  using T = Compute<R>;
  const int64_t d = a.d;
  const int64_t rows = list.count;
  const int64_t panels = (rows + kPanelRows<T> - 1) / kPanelRows<T>;
  const int64_t depth_most = std::min(d, kDepth);
  int64_t chunk = kChunkElements / std::max<int64_t>(depth_most, 1) / kTileLatents * kTileLatents;
  chunk = std::clamp<int64_t>(chunk, kTileLatents, 4096);
  chunk = std::min(chunk, (end - begin + kTileLatents - 1) / kTileLatents * kTileLatents);

  out.start(panels * kPanelRows<T>);
  T* packed_x = scratch<T>(Slot::kPackedX, panels * kPanelRows<T> * d);
  T* packed_w = scratch<T>(Slot::kPackedW, chunk * depth_most);
  T* partial = scratch<T>(Slot::kPartialSums, (d > kDepth ? panels : 1) * kPanelRows<T> * chunk);

  const auto lanes_of = [&](int64_t panel) {
    const int64_t left = std::min(rows - panel * kPanelRows<T>, kPanelRows<T>);
    return (left + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  };
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t row = p * kPanelRows<T>;
    pack_panel(list, row, a.b_dec, std::min(rows - row, kPanelRows<T>), lanes_of(p), d, packed_x + row * d);
  }
  for (int64_t f = begin; f < end; f += chunk) {
    const int64_t latents = std::min(chunk, end - f);
    for (int64_t start = 0; start == 0 || start < d; start += kDepth) {
      const int64_t depth = std::min(kDepth, d - start);
      pack_latents(a.W + f * d, latents, d, start, depth, packed_w);
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t row = p * kPanelRows<T>;
        const int64_t lanes = lanes_of(p);
        const T* panel = packed_x + row * d + start * lanes;
        T* sums = partial + (d > kDepth ? row * chunk : 0);
        const auto run = [&](auto vecs) {
          multiply_and_filter<T, decltype(vecs)::value>(
              panel, packed_w, depth, sums, start == 0, start + depth >= d, a.b_enc, f, latents, row, rows - row, out);
        };
        if (lanes == 3 * kLanes<T>) {
          run(std::integral_constant<int, 3>());
        } else if (lanes == 2 * kLanes<T>) {
          run(std::integral_constant<int, 2>());
        } else {
          run(std::integral_constant<int, 1>());
        }
      }
    }
  }
}

// How a call is cut up, and the candidates of its parts: blocks of rows_each rows times ranges of latents_each latents.
template <class R>
struct EncodePlan {
  using T = Compute<R>;
  using Key = typename Candidate<T>::Key;

  int64_t k, row_parts, latent_parts, latents_each, rows_each, capacity;
  Key* keys;
  T* thresholds;
  int64_t* counts;

  EncodePlan(const EncodeArgs<R>& a, int64_t threads) : k(a.k) {
    row_parts = std::clamp<int64_t>(a.N / kRowsWorthSplitting, 1, std::max<int64_t>(threads, 1));
    const int64_t tiles = (a.F + kTileLatents - 1) / kTileLatents;
    latent_parts = std::clamp<int64_t>(threads / row_parts, 1, tiles);
    latents_each = (tiles + latent_parts - 1) / latent_parts * kTileLatents;
    capacity = std::min(std::max(2 * a.k, a.k + 32), latents_each);

    constexpr int64_t kPanel = kPanelRows<T>;
    rows_each = ((a.N + row_parts - 1) / row_parts + kPanel - 1) / kPanel * kPanel;
    rows_each = std::min(rows_each, kPackedRowElements / std::max<int64_t>(a.d, 1));
    rows_each = std::min(rows_each, kCandidateBytes / (capacity * static_cast<int64_t>(sizeof(Key))));
    rows_each = std::max<int64_t>(rows_each / kPanel, 1) * kPanel;

    const int64_t places = row_parts * latent_parts * rows_each;
    keys = scratch<Key>(Slot::kCandidates, places * (capacity + 2));
    thresholds = reinterpret_cast<T*>(keys + places * capacity);
    counts = reinterpret_cast<int64_t*>(keys + places * (capacity + 1));
  }

  Candidates<T> candidates(int64_t row_part, int64_t latent_part) const {
    const int64_t first = (row_part * latent_parts + latent_part) * rows_each;
    return Candidates<T>{keys + first * capacity, thresholds + first, counts + first, capacity, k};
  }
};

// One pass over rows_of(row part) rows of every row part: encode(row part, first latent, last latent, candidates) on
// every part, then finish(row part, place, candidates, how many) on every row.
template <class R, class Rows, class Encode, class Finish>
void encode_pass(
    const EncodePlan<R>& plan, int64_t F, const Threads& threads, const Rows& rows_of, const Encode& encode,
    const Finish& finish) {
  using Key = typename EncodePlan<R>::Key;
  parallel_tasks(threads, plan.row_parts * plan.latent_parts, [&](int64_t part) {
    const int64_t row_part = part / plan.latent_parts;
    const int64_t latent_part = part % plan.latent_parts;
    if (rows_of(row_part) > 0) {
      auto candidates = plan.candidates(row_part, latent_part);
      const int64_t begin = std::min(latent_part * plan.latents_each, F);
      encode(row_part, begin, std::min(begin + plan.latents_each, F), candidates);
    }
  });
  constexpr int64_t kRowsPerTask = 64;
  const int64_t tasks_each = (plan.rows_each + kRowsPerTask - 1) / kRowsPerTask;
  parallel_tasks(threads, plan.row_parts * tasks_each, [&](int64_t task) {
    const int64_t row_part = task / tasks_each;
    const int64_t first = task % tasks_each * kRowsPerTask;
    Key* merged = scratch<Key>(Slot::kMerge, plan.latent_parts * plan.capacity);
    for (int64_t place = first; place < std::min(first + kRowsPerTask, rows_of(row_part)); ++place) {
      int64_t n = 0;
      for (int64_t part = 0; part < plan.latent_parts; ++part) {
        const auto own = plan.candidates(row_part, part);
        const Key* from = own.keys + place * plan.capacity;
        std::copy(from, from + own.count[place], merged + n);
        n += own.count[place];
      }
      finish(row_part, place, merged, n);
    }
  });
}

template <class R>
void encode_unscreened(const EncodeArgs<R>& a, const Threads& threads) {
  using T = Compute<R>;
  if (a.N == 0) {
    return;
  }
  const EncodePlan<R> plan(a, threads.count);
  for (int64_t base = 0; base < a.N; base += plan.row_parts * plan.rows_each) {
    const auto first_row = [&](int64_t part) { return base + part * plan.rows_each; };
    const auto rows_of = [&](int64_t part) { return std::clamp<int64_t>(a.N - first_row(part), 0, plan.rows_each); };
    encode_pass(
        plan, a.F, threads, rows_of,
        [&](int64_t part, int64_t begin, int64_t end, Candidates<T>& candidates) {
          const RowList<R> rows{a.x + first_row(part) * a.d, nullptr, rows_of(part)};
          encode_block(a, rows, begin, end, candidates);
        },
        [&](int64_t part, int64_t place, auto* keys, int64_t n) {
          const int64_t at = (first_row(part) + place) * a.k;
          write_row<R>(keys, n, a.k, a.values + at, a.indices + at);
        });
  }
}

#if !defined(RK_SCREEN)
template <class R>
void topk_encode(const EncodeArgs<R>& a, const Threads& threads) {
  encode_unscreened(a, threads);
}
#endif

}  // namespace RK_ISA
}  // namespace rk
