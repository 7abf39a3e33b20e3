// topk_encode with an 8-bit screen: exact results from a quarter of the multiply-adds' time.
//
// A pre-activation matters only if it exceeds its row's k-th best so far. Rows and latents are rounded to 8 bits, whose
// products run at four times the rate of fp32 (VNNI) and bound the true product from above (screen.h). Only pairs whose
// bound exceeds the threshold are computed in fp32, and only these values are ranked and returned. No pair that could
// enter is ever dropped, so the result is that of computing all of them.
//
// How many pairs are left depends on the bound's width against the spread of pre-activations: about
// sqrt(d) (||dx|| / ||x|| + ||dw|| / ||w||) standard deviations, 0.3 at d = 512, 1 at d = 4096. Rows for which it is too
// wide (outliers, infinities) take the fp32 path of topk_encode.h; shapes for which it cannot pay (large k / F, few rows)
// do so as a whole, and so does a batch whose first rows show that too many pairs would be left (pre-activations that lie
// close together, because all latents share a direction, say).
//
// A threshold that starts at 0 lets k (1 + ln(F / k)) latents pass, times the bound's slack. But k-th best values are a
// similar multiple of ||x|| in all rows: the first rows are done first, and the others start from a bit less than their
// smallest multiple. Rows that then end with fewer than k candidates are repeated from 0.
//
// Predicted for N, d, F, k = 4096, 512, 16384, 32 in cycles per row: 131 k for the integer product (a quarter of fp32's
// 524 k), 12 k for comparing, about 150 pairs of 110 in fp32, 4 k to select: 0.3 of the fp32 product. Measured: 0.34 of
// the fp32 path (`python -m benches --groups encode`, with and without REFUSAL_KERNELS_CPU_ISA=avx512).
#pragma once

#include "screen.h"
#include "sparse_decode.h"
#include "topk_encode.h"

namespace rk {
namespace RK_ISA {

constexpr int64_t kScreenSegment = 128;  // steps of 4 columns: 24 KiB of a panel's rows stay in the first-level cache
constexpr int64_t kScreenChunkBytes = 128 << 10;  // 8-bit latents of a chunk: they and their fp32 rows share the second
constexpr int64_t kScreenMostColumns = 65536;  // 127 * 255 * 65536 < 2^31
constexpr int64_t kScreenLeastRows = 64;  // fewer do not pay for rounding W_enc
constexpr int64_t kPanel = 48;  // rows that one sweep over the latents serves: three vectors of 16
constexpr int64_t kSeeds = kPanel;  // rows that are done first: a panel, in the first row part whatever the threads
constexpr int64_t kSeedsWorthwhile = 4;  // panels of a call from which on they are
constexpr int64_t kLeastSeeds = 16;
constexpr int64_t kSampledLatents = 512;
constexpr float kGuessMargin = 0.97f;
constexpr int kGroupOfDots = 4;

// ---- where it pays ---------------------------------------------------------------------------------------------------

// Part of the latents that may be left after the screen for it to be faster than computing everything. In cycles of an
// AVX-512 core: a product of a pair costs d / 16 in fp32, a quarter of that in 8 bits; a pair that is left costs a call
// and, for two loads from the second-level cache, d / 6.
inline double share_that_pays(int64_t d) {
  const double columns = static_cast<double>(d);
  return 0.6 * (columns / 16) / (40 + 0.16 * columns);
}

// z with P(standard normal > z) = p, for p <= 1/2 (Abramowitz and Stegun 26.2.23, |error| < 4.5e-4).
inline double upper_quantile(double p) {
  const double t = std::sqrt(-2 * std::log(p));
  return t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308)));
}

// The widest bound, in standard deviations of a row's pre-activations, at which screening pays if they are normal; 0 or
// less: never.
inline double widest_bound(int64_t N, int64_t d, int64_t F, int64_t k) {
  if (N < kScreenLeastRows || d > kScreenMostColumns || 2 * k > F) {
    return 0;
  }
  return upper_quantile(static_cast<double>(k) / static_cast<double>(F)) - upper_quantile(share_that_pays(d));
}

// Mean ||dw|| / ||w|| of a sample of latents that depends on nothing but F.
template <class R>
double rounding_of_latents(const R* W, int64_t d, int64_t F) {
  const int64_t sample = std::min<int64_t>(64, F);
  const int64_t stride = byte_stride(d);
  uint8_t* bytes = scratch<uint8_t>(Slot::kWide, stride);
  double total = 0;
  int64_t counted = 0;
  for (int64_t i = 0; i < sample; ++i) {
    Rounded row;
    if (round_to_bytes(W + i * F / sample * d, d, stride, 0, bytes, row)) {
      total += static_cast<double>(row.rest) / static_cast<double>(row.norm);
      ++counted;
    }
  }
  return counted == 0 ? 1.0 : total / static_cast<double>(counted);
}

// ---- one part: a list of rows, a range of latents ----------------------------------------------------------------------

// The rows of a block, shared by all threads.
struct ScreenRows {
  const float* centred;  // [rows, d]: x - b_dec
  const float* start;  // [rows]: threshold to start from
};

// Rounded rows of a list as panels of 48, the last one of 16, 32 or 48.
struct BytePanels {
  int64_t rows, steps, count;
  uint32_t* packed;  // [panel][steps][lanes]
  RowBounds* bounds;  // [panel]

  int64_t lanes(int64_t panel) const {
    return (std::min(rows - panel * kPanel, kPanel) + 15) / 16 * 16;
  }
};

inline BytePanels pack_rows(const float* centred, const int64_t* list, int64_t rows, int64_t d) {
  const int64_t stride = byte_stride(d);
  BytePanels out{rows, (d + 3) / 4, (rows + kPanel - 1) / kPanel, nullptr, nullptr};
  out.packed = scratch<uint32_t>(Slot::kPackedX, out.count * kPanel * out.steps);
  out.bounds = scratch<RowBounds>(Slot::kOrder, out.count);
  uint8_t* bytes = scratch<uint8_t>(Slot::kWide, 16 * stride);
  // What fp32 can add to a pair's value (a dot of two chains of d / 32 sums, see dots) and to its bound.
  const float rounding = (static_cast<float>(d) / 16 + 64) * 0x1p-24f;
  for (int64_t p = 0; p < out.count; ++p) {
    RowBounds& bounds = out.bounds[p];
    for (int64_t i = 0; i < out.lanes(p); i += 16) {
      for (int64_t j = 0; j < 16; ++j) {
        const int64_t at = p * kPanel + i + j;
        Rounded row{0, 0, 0, 0};
        if (at < rows) {
          round_to_bytes(centred + list[at] * d, d, stride, 0x80, bytes + j * stride, row);
        } else {
          std::memset(bytes + j * stride, 0x80, static_cast<size_t>(stride));
        }
        bounds.scale[i + j] = row.scale;
        bounds.spread[i + j] = row.rest + rounding * row.norm;
        bounds.length[i + j] = row.norm + row.rest;
      }
      interleave_words<16>(bytes, stride, out.steps, out.lanes(p), out.packed + p * kPanel * out.steps + i);
    }
  }
  return out;
}

// Rounded latents first, first + every, ... as tiles of kTileLatents.
struct ByteLatents {
  uint32_t* packed;  // [tile][steps][kTileLatents]
  LatentBounds bounds;
};

template <class R>
ByteLatents pack_byte_latents(const EncodeArgs<R>& a, int64_t first, int64_t every, int64_t count) {
  const int64_t stride = byte_stride(a.d);
  const int64_t steps = (a.d + 3) / 4;
  const int64_t room = (count + kTileLatents - 1) / kTileLatents * kTileLatents;
  uint8_t* bytes = scratch<uint8_t>(Slot::kWide, kTileLatents * stride);
  uint32_t* packed = scratch<uint32_t>(Slot::kPackedW, room * (steps + 5));
  float* facts = reinterpret_cast<float*>(packed + room * steps);
  const LatentBounds bounds{
      facts, facts + room, facts + 2 * room, facts + 3 * room, reinterpret_cast<int32_t*>(facts + 4 * room)};
  for (int64_t t = 0; t < count; t += kTileLatents) {
    for (int64_t i = 0; i < kTileLatents; ++i) {
      Rounded row{0, 0, 0, 0};
      float bias = 0;
      if (t + i < count) {
        const int64_t latent = first + (t + i) * every;
        const bool ordinary = round_to_bytes(a.W + latent * a.d, a.d, stride, 0, bytes + i * stride, row);
        if (!ordinary && row.norm == row.norm) {
          // All below kSmallest: bounded by its largest element alone.
          row.norm = row.rest = kSmallest * std::sqrt(static_cast<float>(a.d)) * 1.001f;
        }
        bias = a.b_enc[latent] + (0x1p-20f * std::fabs(a.b_enc[latent]) + 1e-30f);
      } else {
        std::memset(bytes + i * stride, 0, static_cast<size_t>(stride));
      }
      bounds.scale[t + i] = row.scale;
      bounds.norm[t + i] = row.norm;
      bounds.rest[t + i] = row.rest;
      bounds.bias[t + i] = bias;
      bounds.start[t + i] = -128 * row.sum;
    }
    interleave_words<kTileLatents>(bytes, stride, steps, kTileLatents, packed + t * steps);
  }
  return ByteLatents{packed, bounds};
}

// The pairs of a panel and `count` packed latents whose bound exceeds the row's threshold: suspects[row][room],
// counts[row]; latents are numbered from first_latent.
inline void screen_panel(
    const BytePanels& panels, int64_t p, const ByteLatents& latents, int64_t count, uint32_t first_latent,
    const float* thresholds, int64_t room, Suspect* suspects, int64_t* counts) {
  const int64_t steps = panels.steps;
  const int64_t segments = (steps + kScreenSegment - 1) / kScreenSegment;
  const int64_t segment = (steps + segments - 1) / segments;
  const auto run = [&](auto vecs) {
    constexpr int V = decltype(vecs)::value;
    constexpr int64_t kTile = kTileLatents * V * 16;
    const int64_t tiles = segments > 1 ? (count + kTileLatents - 1) / kTileLatents : 1;
    int32_t* sums = scratch<int32_t>(Slot::kPartialSums, tiles * kTile);
    const uint32_t* x = panels.packed + p * kPanel * steps;
    for (int64_t from = 0; from < steps; from += segment) {
      const int64_t length = std::min(segment, steps - from);
      for (int64_t t = 0; t < count; t += kTileLatents) {
        int32_t* tile = sums + (segments > 1 ? t / kTileLatents * kTile : 0);
        multiply_bytes<V>(
            x + from * V * 16, latents.packed + t * steps + from * kTileLatents, length,
            from == 0 ? latents.bounds.start + t : nullptr, tile);
        if (from + length == steps) {
          suspect_pairs<V>(
              tile, panels.bounds[p], latents.bounds, t, std::min<int64_t>(kTileLatents, count - t), thresholds,
              panels.rows - p * kPanel, first_latent + static_cast<uint32_t>(t), room, suspects, counts);
        }
      }
    }
  };
  if (panels.lanes(p) == kPanel) {
    run(std::integral_constant<int, 3>());
  } else if (panels.lanes(p) == 32) {
    run(std::integral_constant<int, 2>());
  } else {
    run(std::integral_constant<int, 1>());
  }
}

// Computes the suspects of one row that still exceed its threshold, which rises on the way; returns how many.
template <class R>
int64_t compute_suspects(
    const EncodeArgs<R>& a, const float* x, const Suspect* suspects, int64_t count, int64_t place,
    Candidates<float>& candidates) {
  const float& threshold = candidates.threshold[place];
  int64_t computed = 0;
  for (int64_t at = 0; at < count;) {
    uint32_t picked[kGroupOfDots];
    int taken = 0;
    for (; at < count && taken < kGroupOfDots; ++at) {
      picked[taken] = suspects[at].latent;
      taken += suspects[at].bound <= threshold ? 0 : 1;
    }
    const auto row = [&](int j) { return a.W + picked[j] * a.d; };
    float products[kGroupOfDots];
    if (taken == kGroupOfDots) {
      dots<R, float, kGroupOfDots>({row(0), row(1), row(2), row(3)}, x, a.d, products);
    } else {
      for (int j = 0; j < taken; ++j) {
        float one[1];
        dots<R, float, 1>({row(j)}, x, a.d, one);
        products[j] = one[0];
      }
    }
    for (int j = 0; j < taken; ++j) {
      const float pre = products[j] + a.b_enc[picked[j]];
      if (!(pre <= threshold)) {
        candidates.push(place, pre, picked[j]);
      }
    }
    computed += taken;
  }
  return computed;
}

// Candidates of a list of rows among latents [begin, end); candidates are indexed by place in the list.
template <class R>
void screen_block(
    const EncodeArgs<R>& a, const ScreenRows& block, const int64_t* list, int64_t rows, int64_t begin, int64_t end,
    Candidates<float>& candidates) {
  const BytePanels panels = pack_rows(block.centred, list, rows, a.d);
  for (int64_t i = 0; i < panels.count * kPanel; ++i) {
    candidates.threshold[i] = i < rows ? block.start[list[i]] : 0;
    candidates.count[i] = 0;
  }
  const int64_t chunk = std::clamp<int64_t>(kScreenChunkBytes / a.d / kTileLatents * kTileLatents, kTileLatents, 1024);
  const int64_t room = chunk + 8;  // not a power of two, or the suspects of all rows would share a few cache sets
  Suspect* suspects = scratch<Suspect>(Slot::kRows, kPanel * room);
  int64_t computed = 0;
  for (int64_t f = begin; f < end; f += chunk) {
    const int64_t here = std::min(chunk, end - f);
    const ByteLatents latents = pack_byte_latents(a, f, 1, here);
    for (int64_t p = 0; p < panels.count; ++p) {
      int64_t counts[kPanel] = {};
      const int64_t first = p * kPanel;
      screen_panel(
          panels, p, latents, here, static_cast<uint32_t>(f), candidates.threshold + first, room, suspects, counts);
      for (int64_t i = 0; i < std::min(rows - first, kPanel); ++i) {
        const float* x = block.centred + list[first + i] * a.d;
        computed += compute_suspects(a, x, suspects + i * room, counts[i], first + i, candidates);
      }
    }
  }
  encode_counts.computed += computed;
}

// Part of a sample of latents whose bound exceeds the rows' final thresholds: what the screen would leave at its best.
template <class R>
double share_left(const EncodeArgs<R>& a, const float* centred, const int64_t* list, int64_t rows) {
  const int64_t sample = std::min(kSampledLatents, a.F);
  const BytePanels panels = pack_rows(centred, list, rows, a.d);
  const ByteLatents latents = pack_byte_latents(a, 0, a.F / sample, sample);
  Suspect* suspects = scratch<Suspect>(Slot::kRows, kPanel * sample);
  int64_t left = 0;
  float kth[kPanel] = {};
  int64_t counts[kPanel] = {};
  for (int64_t i = 0; i < rows; ++i) {
    kth[i] = widen(a.values[(list[i] + 1) * a.k - 1]);
  }
  screen_panel(panels, 0, latents, sample, 0, kth, sample, suspects, counts);
  for (int64_t i = 0; i < rows; ++i) {
    left += counts[i];
  }
  return static_cast<double>(left) / static_cast<double>(rows * sample);
}

// ---- a call ------------------------------------------------------------------------------------------------------------

// out = x - b_dec in fp32.
template <class R>
void centre(const R* x, const float* b_dec, int64_t d, float* out) {
  int64_t c = 0;
  for (; c + 16 <= d; c += 16) {
    store<float>(out + c, load(x + c) - (b_dec == nullptr ? Vec<float>{} : load(b_dec + c)));
  }
  for (; c < d; ++c) {
    out[c] = widen(x[c]) - (b_dec == nullptr ? 0.0f : b_dec[c]);
  }
}

// Numbers [first, first + count) that satisfy `wanted`, in order; returns how many.
template <class Wanted>
int64_t list_rows(int64_t first, int64_t count, const Wanted& wanted, int64_t* list) {
  int64_t n = 0;
  for (int64_t r = first; r < first + count; ++r) {
    list[n] = r;
    n += wanted(r) ? 1 : 0;
  }
  return n;
}

template <class R>
void topk_encode(const EncodeArgs<R>& a, const Threads& threads) {
  const double widest = widest_bound(a.N, a.d, a.F, a.k);
  const double root = std::sqrt(static_cast<double>(a.d));
  const double of_latents = widest > 0 ? root * rounding_of_latents(a.W, a.d, a.F) : 0;
  if (!(of_latents < widest)) {
    encode_unscreened(a, threads);
    return;
  }
  const EncodePlan<R> plan(a, threads.count);
  const int64_t most = plan.row_parts * plan.rows_each;
  const int64_t stride = byte_stride(a.d);
  // Of a block of rows: the lists of a pass (of each part one more than its rows, see list_rows) and their lengths, how
  // the rows round, the thresholds to start from, x - b_dec, which rows to screen, which have their result.
  int64_t* list = scratch<int64_t>(Slot::kScreen, (most + plan.row_parts) * 3 + most * (4 + a.d) / 2 + most + 64);
  int64_t* sizes = list + most + plan.row_parts;
  Rounded* rounded = reinterpret_cast<Rounded*>(sizes + plan.row_parts);
  float* start = reinterpret_cast<float*>(rounded + most);
  float* centred = start + most;
  uint8_t* screened = reinterpret_cast<uint8_t*>(centred + most * a.d);
  uint8_t* done = screened + most;
  const ScreenRows block{centred, start};

  float multiple = 0;  // a row's threshold starts from this times its norm
  bool pays = true;
  for (int64_t base = 0; base < a.N; base += most) {
    const int64_t here = std::min(most, a.N - base);
    const auto list_of = [&](int64_t part) { return list + part * (plan.rows_each + 1); };
    const auto collect = [&](const auto& wanted) {
      int64_t total = 0;
      for (int64_t part = 0; part < plan.row_parts; ++part) {
        const int64_t first = part * plan.rows_each;
        sizes[part] = list_rows(first, std::clamp<int64_t>(here - first, 0, plan.rows_each), wanted, list_of(part));
        total += sizes[part];
      }
      return total;
    };
    const auto pass = [&](const auto& encode) {
      encode_pass(
          plan, a.F, threads, [&](int64_t part) { return sizes[part]; }, encode,
          [&](int64_t part, int64_t place, auto* keys, int64_t n) {
            const int64_t row = list_of(part)[place];
            done[row] = n >= a.k || !(start[row] > 0);
            if (done[row] != 0) {
              write_row<R>(keys, n, a.k, a.values + (base + row) * a.k, a.indices + (base + row) * a.k);
            }
          });
    };
    const auto screen = [&](int64_t part, int64_t begin, int64_t end, Candidates<float>& candidates) {
      screen_block(a, block, list_of(part), sizes[part], begin, end, candidates);
    };
    const auto todo = [&](int64_t r) { return screened[r] != 0 && done[r] == 0; };

    constexpr int64_t kRowsPerTask = 64;
    parallel_tasks(threads, (here + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
      uint8_t* bytes = scratch<uint8_t>(Slot::kWide, stride);
      for (int64_t r = task * kRowsPerTask; r < std::min((task + 1) * kRowsPerTask, here); ++r) {
        centre(a.x + (base + r) * a.d, a.b_dec, a.d, centred + r * a.d);
        const bool ordinary = round_to_bytes(centred + r * a.d, a.d, stride, 0, bytes, rounded[r]);
        const double width = root * static_cast<double>(rounded[r].rest) / static_cast<double>(rounded[r].norm);
        screened[r] = pays && ordinary && width + of_latents < widest;
        done[r] = 0;
        start[r] = 0;
      }
    });
    int64_t rows = 0;  // screened
    if (base == 0 && a.N >= kSeedsWorthwhile * kSeeds) {
      const int64_t seeds = collect([&](int64_t r) { return r < kSeeds && screened[r] != 0; });
      if (seeds >= kLeastSeeds) {
        pass(screen);
        rows += seeds;
        multiple = std::numeric_limits<float>::infinity();
        for (int64_t i = 0; i < seeds; ++i) {
          const int64_t row = list_of(0)[i];
          multiple = std::min(multiple, kGuessMargin * widen(a.values[(row + 1) * a.k - 1]) / rounded[row].norm);
        }
        multiple = multiple < std::numeric_limits<float>::infinity() ? multiple : 0;
        pays = share_left(a, centred, list_of(0), seeds) < share_that_pays(a.d);
        for (int64_t r = 0; !pays && r < here; ++r) {
          screened[r] = done[r];
        }
      }
    }
    if (collect([&](int64_t r) { return screened[r] == 0; }) > 0) {
      pass([&](int64_t part, int64_t begin, int64_t end, Candidates<float>& candidates) {
        encode_block(a, RowList<R>{a.x + base * a.d, list_of(part), sizes[part]}, begin, end, candidates);
      });
    }
    for (int64_t r = 0; r < here; ++r) {
      start[r] = multiple * rounded[r].norm;
    }
    const int64_t rest = collect(todo);
    if (rest > 0) {
      pass(screen);
    }
    std::fill(start, start + here, 0.0f);
    const int64_t repeated = collect(todo);
    if (repeated > 0) {
      pass(screen);
    }
    encode_counts.screened += rows + rest;
    encode_counts.repeated += repeated;
  }
}

}  // namespace RK_ISA
}  // namespace rk
