// G -= s U (U^T G) for the fibres of many tensors: each fibre g of n numbers along the projected dimension loses (a share
// of) its component in the span of the orthonormal columns of U [n, r].
//
// 4 n r flops per fibre on 2 n numbers of it and n r of U: with the 16 fibres of a LoRA matrix that is 4 r / (8 + r / 4)
// flops per byte, bound by memory at r = 8 and by arithmetic from r ~ 64 on. So both products run out of registers, U is
// streamed (read from memory once per panel, and again from cache), and G is read and written once.
//
// * Vector lanes are fibres, of whatever tensor: a stripe is up to kLanes fibres of one tensor, a panel up to kMostVecs
//   stripes that share U. Left and right side, any strides and 16-bit types differ only in how a panel is packed to
//   [n][lanes]; fp32 matrices that lie like that in memory (n x 16 row-major) are worked on in place.
// * A panel is a task of its own, without sums across threads. Only where there are fewer panels than threads could share
//   is a panel cut into slabs of kSlab rows, first for the coefficients and then for the update.
// * While a panel is worked on, the next one of the thread is fetched into the second-level cache: at r = 8 bytes take as
//   long as arithmetic, and the second pass over a panel would leave memory idle.
// * The order of every sum follows from n and r alone: blocks of rows, then slabs in ascending order. Neither threads, nor
//   the tensors beside it, nor its layout change a fibre's result.
#pragma once

#include "projection_lanes.h"

namespace rk {
namespace RK_ISA {

constexpr int kMostVecs = 3;
constexpr int64_t kSlab = 1024;
constexpr int64_t kRankBlock = 128;  // columns of U at a time: their coefficients stay in the first-level cache
constexpr int64_t kBasisBlock = 4096;  // numbers of U per block of rows: 16 KiB of fp32
constexpr int64_t kKeptElements =
    1 << 20;  // a packed panel up to this size waits for the update; else it is packed again
constexpr int64_t kDirectStride = 64;  // rows that lie further apart are packed: they would share few cache sets

// Register tiles: accumulators are kUpdateRows x vecs or kTileRanks x vecs.
template <int V>
constexpr int kTileRanks = RK_VECTOR_BYTES == 64 ? (V == 1 ? 16 : 8) : (V == 1 ? 8 : 4);
template <int V>
constexpr int kUpdateRows = RK_VECTOR_BYTES == 64 ? 8 : (V == 1 ? 8 : 4);

// Rows of a block over which a coefficient is summed in registers.
inline int64_t block_rows(int64_t r) {
  return std::clamp<int64_t>(kBasisBlock / std::min(r, kRankBlock), 32, 256);
}

// ---- register tiles --------------------------------------------------------------------------------------------------

// c[j][lane] (+)= sum over rows of u[row][j] * panel[row][lane], for J columns of U. The next block of U is fetched into
// the first-level cache, and a line per row from `far` on into the second.
template <class T, int J, int V>
RK_INLINE void coefficients_tile(
    const T* __restrict panel, int64_t ldp, const T* __restrict u, int64_t ldu, int64_t rows, int64_t ahead,
    const char* far, int64_t far_step, T* __restrict c, bool add) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[J][V];
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sum[j][v] = Vec<T>{};
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    Vec<T> g[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      g[v] = load(panel + v * L);
    }
    __builtin_prefetch(u + ahead);
    __builtin_prefetch(far, 0, 2);
    far += far_step;
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) {
      const Vec<T> factor = splat<T>(u[j]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sum[j][v] += factor * g[v];
      }
    }
    panel += ldp;
    u += ldu;
  }
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* at = c + (j * V + v) * L;
      store<T>(at, add ? load(at) + sum[j][v] : sum[j][v]);
    }
  }
}

template <class T, int J, int V>
RK_INLINE int64_t coefficients_tiles(
    int64_t j, int64_t end, const T* panel, int64_t ldp, const T* u, int64_t ldu, int64_t rows, int64_t ahead, T* c,
    bool add, Fetcher& next) {
  for (; j + J <= end; j += J) {
    const char* far = next.take(rows);
    const int64_t far_step = far != nullptr ? Fetcher::kLine : 0;
    const char* address = far != nullptr ? far : reinterpret_cast<const char*>(u);
    coefficients_tile<T, J, V>(panel, ldp, u + j, ldu, rows, ahead, address, far_step, c + j * V * kLanes<T>, add);
  }
  return j;
}

// to[row][lane] = from[row][lane] + sum_j u[row][j] * c[j][lane], for N rows. The next N rows of U are fetched.
template <class T, int N, int V>
RK_INLINE void update_tile(
    const T* from, int64_t from_ld, T* to, int64_t to_ld, const T* __restrict u, int64_t ldu, const T* __restrict c,
    int64_t ranks) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[N][V];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sum[i][v] = Vec<T>{};
    }
  }
  const T* next = u + N * ldu;
  for (int64_t j = 0; j < ranks; ++j) {
    Vec<T> coefficient[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      coefficient[v] = load(c + v * L);
    }
    __builtin_prefetch(next);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const Vec<T> factor = splat<T>(u[i * ldu + j]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sum[i][v] += factor * coefficient[v];
      }
    }
    c += V * L;
    next += N;
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store<T>(to + i * to_ld + v * L, load(from + i * from_ld + v * L) + sum[i][v]);
    }
  }
}

// The same for fibres that lie along memory and R ranks, with lanes along the fibres: to[i] = from[i] + sum_j u[.][j]
// c[j][i]. The panel need not be packed back, which at few ranks is a sixth of the whole; every sum is in the same order.
template <class T, int R>
RK_INLINE void update_along(
    const Stripe<T>& s, int64_t column, const Vec<T> (&u)[R], const T* __restrict c, int64_t ldc) {
  constexpr int L = kLanes<T>;
  const T* from = static_cast<const T*>(s.entry->from) + column;
  T* to = static_cast<T*>(s.entry->to) + column;
  // Rows are often a multiple of 4 KiB apart. Loads that follow a store of the same low address bits wait for it, so
  // all loads of a group come first.
  constexpr int kGroup = R == 8 && RK_VECTOR_BYTES == 64 ? L : L / 2;
  for (int first = 0; first < L; first += kGroup) {
    Vec<T> sum[kGroup];
#pragma GCC unroll 16
    for (int i = 0; i < kGroup; ++i) {
      sum[i] = Vec<T>{};
    }
#pragma GCC unroll 16
    for (int j = 0; j < R; ++j) {
#pragma GCC unroll 16
      for (int i = 0; i < kGroup; ++i) {
        sum[i] += splat<T>(c[j * ldc + first + i]) * u[j];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kGroup; ++i) {
      sum[i] += load(from + s.from[first + i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kGroup; ++i) {
      store<T>(to + s.to[first + i], sum[i]);
    }
  }
}

// ---- panels ----------------------------------------------------------------------------------------------------------

// Which stripes: `vecs` of them, from stripe `stripe` of entry `entry` on, over into the next entries.
struct PanelPlace {
  int64_t entry, stripe, vecs;
};

template <class T, int V>
struct Panel {
  static constexpr int64_t kWidth = V * kLanes<T>;

  Stripe<T> stripes[V];
  bool direct;  // the fibres lie as [n][kWidth] in memory
  const T* u;
  int64_t n, r, slabs;

  Panel(const ProjectionArgs<T>& a, PanelPlace place) : Panel(a, place, std::make_integer_sequence<int, V>()) {}

  template <int... Is>
  Panel(const ProjectionArgs<T>& a, PanelPlace place, std::integer_sequence<int, Is...>)
      : stripes{stripe(a, place, Is)...} {
    const ProjectionEntry<T>& first = *stripes[0].entry;
    u = first.basis;
    n = first.n;
    r = first.r;
    slabs = (n + kSlab - 1) / kSlab;
    direct = first.type == Element::kCompute && first.from_stride <= kDirectStride &&
             first.to_stride <= kDirectStride && first.from_stride >= kWidth && first.to_stride >= kWidth;
    for (int v = 0; v < V; ++v) {
      const Stripe<T>& s = stripes[v];
      direct = direct && s.entry == &first && s.adjacent_from && s.adjacent_to && s.count == kLanes<T> &&
               s.from[0] == stripes[0].from[0] + v * kLanes<T> && s.to[0] == stripes[0].to[0] + v * kLanes<T>;
    }
  }

  static Stripe<T> stripe(const ProjectionArgs<T>& a, PanelPlace place, int64_t ahead) {
    const auto stripes_of = [&](int64_t e) { return (a.entries[e].fibres + kLanes<T> - 1) / kLanes<T>; };
    int64_t entry = place.entry;
    int64_t number = place.stripe + ahead;
    for (; number >= stripes_of(entry); ++entry) {
      number -= stripes_of(entry);
    }
    return Stripe<T>(a.entries[entry], number);
  }

  int64_t rows(int64_t slab) const {
    return std::min(kSlab, n - slab * kSlab);
  }

  void pack(int64_t slab, T* out) const {
    for (int v = 0; v < V; ++v) {
      with_element_type(stripes[v], [&](auto element) {
        pack_stripe<decltype(element)>(stripes[v], slab * kSlab, rows(slab), out + v * kLanes<T>, kWidth);
      });
    }
  }

  void unpack(int64_t slab, const T* in) const {
    for (int v = 0; v < V; ++v) {
      with_element_type(stripes[v], [&](auto element) {
        unpack_stripe<decltype(element)>(stripes[v], slab * kSlab, rows(slab), in + v * kLanes<T>, kWidth);
      });
    }
  }

  // c [r][kWidth] = U^T G over one slab; `packed` is filled unless the panel needs no packing.
  void coefficients(int64_t slab, T* packed, T* c, Fetcher& next) const {
    const ProjectionEntry<T>& e = *stripes[0].entry;
    const T* g = packed;
    int64_t ld = kWidth;
    if (direct) {
      g = static_cast<const T*>(e.from) + stripes[0].from[0] + slab * kSlab * e.from_stride;
      ld = e.from_stride;
    } else {
      pack(slab, packed);
    }
    const T* base = u + slab * kSlab * r;
    const int64_t each = block_rows(r);
    for (int64_t rank = 0; rank < r; rank += kRankBlock) {
      const int64_t end = std::min(rank + kRankBlock, r);
      for (int64_t row = 0; row < rows(slab); row += each) {
        const int64_t length = std::min(each, rows(slab) - row);
        const T* panel = g + row * ld;
        const T* block = base + row * r;
        const bool add = row > 0;
        int64_t j =
            coefficients_tiles<T, kTileRanks<V>, V>(rank, end, panel, ld, block, r, length, each * r, c, add, next);
        if constexpr (kTileRanks<V> > 8) {
          j = coefficients_tiles<T, 8, V>(j, end, panel, ld, block, r, length, each * r, c, add, next);
        }
        if constexpr (kTileRanks<V> > 4) {
          j = coefficients_tiles<T, 4, V>(j, end, panel, ld, block, r, length, each * r, c, add, next);
        }
        coefficients_tiles<T, 1, V>(j, end, panel, ld, block, r, length, each * r, c, add, next);
      }
    }
  }

  // c -> -strength * c; 0 for fibres that do not oppose their direction.
  void choose(T strength, T* c) const {
    constexpr int L = kLanes<T>;
    for (int v = 0; v < V; ++v) {
      const T* against = stripes[v].entry->against;
      if (against == nullptr) {
        continue;
      }
      Vec<T> dot = Vec<T>{};
      for (int64_t j = 0; j < r; ++j) {
        dot += splat<T>(against[j]) * load(c + j * kWidth + v * L);
      }
      T opposes[L];
      store<T>(opposes, dot);
      for (int64_t j = 0; j < r; ++j) {
        T* own = c + j * kWidth + v * L;
        for (int i = 0; i < L; ++i) {
          own[i] = opposes[i] < T(0) ? own[i] : T(0);
        }
      }
    }
    for (int64_t i = 0; i < r * kWidth; i += L) {
      store<T>(c + i, -strength * load(c + i));
    }
  }

  // What the panel will read first, as far as it lies in long pieces.
  void announce(Fetcher& fetcher) const {
    for (const Stripe<T>& s : stripes) {
      const ProjectionEntry<T>& e = *s.entry;
      const int64_t size = e.type == Element::kCompute ? sizeof(T) : 2;
      const char* base = static_cast<const char*>(e.from);
      if (e.from_stride == 1) {
        for (int64_t i = 0; i < s.count; ++i) {
          fetcher.add(base + s.from[i] * size, n * size);
        }
      } else if (s.adjacent_from && e.from_stride <= kDirectStride) {
        fetcher.add(base + s.from[0] * size, n * e.from_stride * size);
      }
    }
    fetcher.add(u, n * r * static_cast<int64_t>(sizeof(T)));
  }

  // Whether `update_along` serves: full stripes of contiguous fibres in the compute type, whole vectors of them.
  bool along(int64_t slab) const {
    bool all = (r == 8 || r == 16) && rows(slab) % kLanes<T> == 0;
    for (const Stripe<T>& s : stripes) {
      const ProjectionEntry<T>& e = *s.entry;
      all = all && s.count == kLanes<T> && e.type == Element::kCompute && e.from_stride == 1 && e.to_stride == 1;
    }
    return all;
  }

  template <int R>
  void update_along(int64_t slab, const T* c, Fetcher& next) const {
    constexpr int L = kLanes<T>;
    for (int64_t column = slab * kSlab; column < slab * kSlab + rows(slab); column += L) {
      for (int i = 0; i < L; i += kUpdateRows<V>) {
        next.step();
      }
      Vec<T> basis[R];
      columns_of<T, R>(u + column * R, basis);
      for (int v = 0; v < V; ++v) {
        RK_ISA::update_along<T, R>(stripes[v], column, basis, c + v * L, kWidth);
      }
    }
  }

  // G += U c over one slab; `packed` holds it already, or is filled first, unless the panel needs no packing.
  void update(int64_t slab, T* packed, bool filled, const T* c, Fetcher& next) const {
    if (along(slab)) {
      return r == 8 ? update_along<8>(slab, c, next) : update_along<16>(slab, c, next);
    }
    const ProjectionEntry<T>& e = *stripes[0].entry;
    const T* from = packed;
    T* to = packed;
    int64_t from_ld = kWidth;
    int64_t to_ld = kWidth;
    if (direct) {
      from = static_cast<const T*>(e.from) + stripes[0].from[0] + slab * kSlab * e.from_stride;
      to = static_cast<T*>(e.to) + stripes[0].to[0] + slab * kSlab * e.to_stride;
      from_ld = e.from_stride;
      to_ld = e.to_stride;
    } else if (!filled) {
      pack(slab, packed);
    }
    const T* base = u + slab * kSlab * r;
    for (int64_t rank = 0; rank < r; rank += kRankBlock) {
      const int64_t ranks = std::min(kRankBlock, r - rank);
      const T* own = c + rank * kWidth;
      int64_t row = 0;
      for (; row + kUpdateRows<V> <= rows(slab); row += kUpdateRows<V>) {
        next.step();
        update_tile<T, kUpdateRows<V>, V>(
            from + row * from_ld, from_ld, to + row * to_ld, to_ld, base + row * r + rank, r, own, ranks);
      }
      for (; row < rows(slab); ++row) {
        update_tile<T, 1, V>(
            from + row * from_ld, from_ld, to + row * to_ld, to_ld, base + row * r + rank, r, own, ranks);
      }
      from = to;
      from_ld = to_ld;
    }
    if (!direct) {
      unpack(slab, packed);
    }
  }
};

// The whole of a panel by one thread; `next` is fetched on the way.
template <class T, int V>
void project_panel(const Panel<T, V>& p, T strength, Fetcher& next) {
  constexpr int64_t W = Panel<T, V>::kWidth;
  // Where the update does not need the packed panel, slabs share one place: it stays in the second-level cache.
  const bool keep = !p.direct && !(p.along(0) && p.along(p.slabs - 1)) && p.n * W <= kKeptElements;
  T* packed = scratch<T>(Slot::kPackedX, p.direct ? 0 : (keep ? p.n : std::min(p.n, kSlab)) * W);
  T* c = scratch<T>(Slot::kPartialSums, 2 * p.r * W);
  T* part = c + p.r * W;
  const auto place = [&](int64_t slab) { return packed + (keep ? slab * kSlab * W : 0); };
  for (int64_t slab = 0; slab < p.slabs; ++slab) {
    p.coefficients(slab, place(slab), slab == 0 ? c : part, next);
    for (int64_t i = 0; slab > 0 && i < p.r * W; i += kLanes<T>) {
      store<T>(c + i, load(c + i) + load(part + i));
    }
  }
  p.choose(strength, c);
  next.spread((p.n + kUpdateRows<V> - 1) / kUpdateRows<V>);
  for (int64_t slab = 0; slab < p.slabs; ++slab) {
    p.update(slab, place(slab), keep, c, next);
  }
}

template <class T, class F>
void with_panel(const ProjectionArgs<T>& a, PanelPlace place, const F& f) {
  switch (place.vecs) {
    case 3:
      return f(Panel<T, 3>(a, place));
    case 2:
      return f(Panel<T, 2>(a, place));
    default:
      return f(Panel<T, 1>(a, place));
  }
}

// Tasks differ in length, so each thread takes the next one when it begins with its last: f(task, the one after, or
// `tasks` for none).
template <class F>
void tasks_in_turn(const Threads& threads, int64_t tasks, const F& f) {
  std::atomic<int64_t> next{0};
  parallel_tasks(threads, std::min(tasks, std::max<int64_t>(threads.count, 1)), [&](int64_t) {
    for (int64_t task = next++; task < tasks;) {
      const int64_t after = std::min<int64_t>(next++, tasks);
      f(task, after);
      task = after;
    }
  });
}

// The same when there are too few panels to occupy the threads: slabs are the tasks, in two passes.
template <class T>
void project_in_slabs(const ProjectionArgs<T>& a, const PanelPlace* places, int64_t panels, const Threads& threads) {
  int64_t* first = scratch<int64_t>(Slot::kMerge, 2 * (panels + 1));  // of a panel's slabs, among all
  int64_t* begin = first + panels + 1;  // of its partial coefficients
  first[0] = begin[0] = 0;
  for (int64_t i = 0; i < panels; ++i) {
    const ProjectionEntry<T>& e = a.entries[places[i].entry];
    const int64_t slabs = (e.n + kSlab - 1) / kSlab;
    first[i + 1] = first[i] + slabs;
    begin[i + 1] = begin[i] + slabs * e.r * places[i].vecs * kLanes<T>;
  }
  T* partial = scratch<T>(Slot::kWide, begin[panels]);
  const auto each_slab = [&](const auto& work) {
    tasks_in_turn(threads, first[panels], [&](int64_t task, int64_t) {
      const int64_t i = std::upper_bound(first, first + panels + 1, task) - first - 1;
      with_panel(a, places[i], [&](const auto& p) {
        constexpr int64_t W = std::decay_t<decltype(p)>::kWidth;
        T* packed = scratch<T>(Slot::kPackedX, p.direct ? 0 : std::min(p.n, kSlab) * W);
        work(p, task - first[i], packed, partial + begin[i]);
      });
    });
  };
  each_slab([](const auto& p, int64_t slab, T* packed, T* sums) {
    Fetcher nothing;
    p.coefficients(slab, packed, sums + slab * p.r * p.kWidth, nothing);
  });
  each_slab([&](const auto& p, int64_t slab, T* packed, T* sums) {
    T* c = scratch<T>(Slot::kPartialSums, p.r * p.kWidth);
    for (int64_t i = 0; i < p.r * p.kWidth; i += kLanes<T>) {
      Vec<T> sum = load(sums + i);
      for (int64_t s = 1; s < p.slabs; ++s) {
        sum += load(sums + s * p.r * p.kWidth + i);
      }
      store<T>(c + i, sum);
    }
    p.choose(a.strength, c);
    Fetcher nothing;
    p.update(slab, packed, false, c, nothing);
  });
}

template <class T>
void project_out(const ProjectionArgs<T>& a, const Threads& threads) {
  const auto stripes_of = [&](int64_t e) { return (a.entries[e].fibres + kLanes<T> - 1) / kLanes<T>; };
  // Calls f(place) for every panel: the stripes of neighbours with the same basis, in nearly equal panels.
  const auto each_panel = [&](const auto& f) {
    for (int64_t begin = 0, end; begin < a.count; begin = end) {
      int64_t stripes = 0;
      for (end = begin; end < a.count && a.entries[end].basis == a.entries[begin].basis; ++end) {
        stripes += stripes_of(end);
      }
      const int64_t panels = (stripes + kMostVecs - 1) / kMostVecs;
      PanelPlace place{begin, 0, 0};
      for (int64_t i = 0; i < panels; ++i) {
        place.vecs = stripes / panels + (i < stripes % panels ? 1 : 0);
        f(place);
        for (place.stripe += place.vecs; place.entry < end && place.stripe >= stripes_of(place.entry); ++place.entry) {
          place.stripe -= stripes_of(place.entry);
        }
      }
    }
  };
  int64_t panels = 0;
  each_panel([&](PanelPlace) { ++panels; });
  PanelPlace* places = scratch<PanelPlace>(Slot::kOrder, panels);
  int64_t filled = 0;
  each_panel([&](PanelPlace place) { places[filled++] = place; });
  // The longest first: what the threads end with, one waiting for the other, is then the shortest.
  const auto length = [&](const PanelPlace& place) { return a.entries[place.entry].n * place.vecs; };
  std::stable_sort(places, places + panels, [&](const PanelPlace& one, const PanelPlace& other) {
    return length(one) > length(other);
  });
  if (threads.count > 1 && panels < 2 * threads.count) {
    return project_in_slabs(a, places, panels, threads);
  }
  tasks_in_turn(threads, panels, [&](int64_t task, int64_t after) {
    Fetcher next;
    if (after < panels) {
      with_panel(a, places[after], [&](const auto& panel) { panel.announce(next); });
    }
    with_panel(a, places[task], [&](const auto& panel) { project_panel(panel, a.strength, next); });
  });
}

}  // namespace RK_ISA
}  // namespace rk
