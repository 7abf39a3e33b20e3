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
// do so as a whole. Which path a row takes depends on the row, W_enc and the shape alone, so equal rows have equal bits.
//
// A threshold that starts at 0 lets k (1 + ln(F / k)) latents pass, times the bound's slack. But k-th best values are a
// similar multiple of ||x|| in all rows: a panel of each part is done first, and the others start from a bit less than
// its smallest multiple. Rows that then end with fewer than k candidates are repeated from 0.
#pragma once

#include "screen.h"
#include "sparse_decode.h"
#include "topk_encode.h"

namespace rk {
namespace RK_ISA {

constexpr int64_t kScreenSegment = 128;  // steps of 4 columns: 24 KiB of a panel's rows stay in the first-level cache
constexpr int64_t kScreenChunkBytes =
    128 * 1024;  // 8-bit latents of a chunk: they and their fp32 rows share the second
constexpr int64_t kScreenMostColumns = 65536;  // 127 * 255 * 65536 < 2^31
constexpr int64_t kScreenLeastRows = 64;  // fewer do not pay for rounding W_enc
constexpr int64_t kSeedsWorthwhile = 4;  // panels of a part from which on one of them is done first
constexpr float kGuessMargin = 0.97f;
constexpr int kGroupOfDots = 4;

// The rows of a block, shared by all threads.
struct ScreenRows {
  const float* centred;  // [rows, d]: x - b_dec
  const float* start;  // [rows]: threshold to start from
};

// Candidates of `rows` (row numbers in the block) among latents [begin, end); candidates are indexed by place in the list.
template <class R>
void screen_block(
    const EncodeArgs<R>& a, const ScreenRows& block, const int64_t* rows, int64_t n, int64_t begin, int64_t end,
    Candidates<float>& candidates) {
  constexpr int64_t kPanel = kPanelRows<float>;
  const int64_t d = a.d;
  const int64_t stride = (d + 63) / 64 * 64;
  const int64_t steps = (d + 3) / 4;
  const int64_t segments = (steps + kScreenSegment - 1) / kScreenSegment;
  const int64_t segment = (steps + segments - 1) / segments;
  const int64_t panels = (n + kPanel - 1) / kPanel;
  int64_t chunk =
      std::clamp<int64_t>(kScreenChunkBytes / (4 * steps) / kTileLatents * kTileLatents, kTileLatents, 1024);
  chunk = std::min(chunk, (end - begin + kTileLatents - 1) / kTileLatents * kTileLatents);

  // One rounded row or tile of latents in the making, the packed panels, the packed chunk.
  uint8_t* bytes = scratch<uint8_t>(Slot::kWide, 16 * stride);
  uint32_t* packed_x = scratch<uint32_t>(Slot::kPackedX, panels * kPanel * steps);
  uint32_t* packed_w = scratch<uint32_t>(Slot::kPackedW, chunk * (steps + 5));
  float* facts = reinterpret_cast<float*>(packed_w + chunk * steps);
  const LatentBounds latents{
      facts, facts + chunk, facts + 2 * chunk, facts + 3 * chunk, reinterpret_cast<int32_t*>(facts + 4 * chunk)};
  int32_t* sums = scratch<int32_t>(Slot::kPartialSums, (segments > 1 ? chunk : kTileLatents) * kPanel);
  const int64_t room = chunk + 8;  // suspects per row; not a power of two, or all rows would share a few cache sets
  Suspect* suspects = scratch<Suspect>(Slot::kRows, kPanel * room);
  RowBounds* bounds = scratch<RowBounds>(Slot::kOrder, panels);

  const auto lanes_of = [&](int64_t panel) { return (std::min(n - panel * kPanel, kPanel) + 15) / 16 * 16; };
  // A dot of two chains of d / 32 sums each (see dots), a bound of a few operations.
  const float rounding = (static_cast<float>(d) / 16 + 64) * 0x1p-24f;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t lanes = lanes_of(p);
    for (int64_t i = 0; i < lanes; i += 16) {
      for (int64_t j = 0; j < 16; ++j) {
        const int64_t at = p * kPanel + i + j;
        Rounded row{0, 0, 0, 0};
        if (at < n) {
          round_to_bytes(block.centred + rows[at] * d, d, stride, 0x80, bytes + j * stride, row);
        } else {
          std::memset(bytes + j * stride, 0x80, static_cast<size_t>(stride));
        }
        bounds[p].scale[i + j] = row.scale;
        bounds[p].spread[i + j] = row.rest + rounding * row.norm;
        bounds[p].length[i + j] = row.norm + row.rest;
      }
      interleave_words<16>(
          reinterpret_cast<const uint32_t*>(bytes), stride / 4, steps, lanes, packed_x + p * kPanel * steps + i);
    }
  }
  for (int64_t i = 0; i < panels * kPanel; ++i) {
    candidates.threshold[i] = i < n ? block.start[rows[i]] : 0;
    candidates.count[i] = 0;
  }

  int64_t computed = 0;
  for (int64_t f = begin; f < end; f += chunk) {
    const int64_t here = std::min(chunk, end - f);
    for (int64_t t = 0; t < here; t += kTileLatents) {
      for (int64_t i = 0; i < kTileLatents; ++i) {
        Rounded row{0, 0, 0, 0};
        float bias = 0;
        if (t + i < here) {
          const int64_t latent = f + t + i;
          if (!round_to_bytes(a.W + latent * d, d, stride, 0, bytes + i * stride, row) && row.norm == row.norm) {
            // All below kSmallest: the bound is by the largest element alone.
            row.norm = kSmallest * std::sqrt(static_cast<float>(d)) * 1.001f;
            row.rest = row.norm;
          }
          bias = a.b_enc[latent] + (0x1p-20f * std::fabs(a.b_enc[latent]) + 1e-30f);
        } else {
          std::memset(bytes + i * stride, 0, static_cast<size_t>(stride));
        }
        latents.scale[t + i] = row.scale;
        latents.norm[t + i] = row.norm;
        latents.rest[t + i] = row.rest;
        latents.bias[t + i] = bias;
        latents.start[t + i] = -128 * row.sum;
      }
      interleave_words<kTileLatents>(
          reinterpret_cast<const uint32_t*>(bytes), stride / 4, steps, kTileLatents, packed_w + t * steps);
    }
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = p * kPanel;
      const int64_t lanes = lanes_of(p);
      int64_t counts[kPanel] = {};
      const auto run = [&](auto vecs) {
        constexpr int V = decltype(vecs)::value;
        constexpr int64_t kTile = kTileLatents * V * 16;
        for (int64_t s = 0; s < segments; ++s) {
          const int64_t from = s * segment;
          const int64_t length = std::min(segment, steps - from);
          for (int64_t t = 0; t < here; t += kTileLatents) {
            int32_t* tile = sums + (segments > 1 ? t / kTileLatents * kTile : 0);
            multiply_bytes<V>(
                packed_x + first * steps + from * V * 16, packed_w + t * steps + from * kTileLatents, length,
                s == 0 ? latents.start + t : nullptr, tile);
            if (s + 1 == segments) {
              suspect_pairs<V>(
                  tile, bounds[p], latents, t, std::min<int64_t>(kTileLatents, here - t), candidates.threshold + first,
                  n - first, static_cast<uint32_t>(f + t), room, suspects, counts);
            }
          }
        }
      };
      if (lanes == 48) {
        run(std::integral_constant<int, 3>());
      } else if (lanes == 32) {
        run(std::integral_constant<int, 2>());
      } else {
        run(std::integral_constant<int, 1>());
      }
      for (int64_t i = 0; i < std::min(n - first, kPanel); ++i) {
        const Suspect* own = suspects + i * room;
        const float* x = block.centred + rows[first + i] * d;
        float& threshold = candidates.threshold[first + i];  // rises as candidates come
        int64_t at = 0;
        while (at < counts[i]) {
          uint32_t picked[kGroupOfDots];
          int taken = 0;
          for (; at < counts[i] && taken < kGroupOfDots; ++at) {
            picked[taken] = own[at].latent;
            taken += own[at].bound <= threshold ? 0 : 1;
          }
          float products[kGroupOfDots];
          if (taken == kGroupOfDots) {
            const R* const w[kGroupOfDots] = {
                a.W + picked[0] * d, a.W + picked[1] * d, a.W + picked[2] * d, a.W + picked[3] * d};
            dots<R, float, kGroupOfDots>(w, x, d, products);
          } else {
            for (int j = 0; j < taken; ++j) {
              float one[1];
              dots<R, float, 1>({a.W + picked[j] * d}, x, d, one);
              products[j] = one[0];
            }
          }
          for (int j = 0; j < taken; ++j) {
            const float pre = products[j] + a.b_enc[picked[j]];
            if (!(pre <= threshold)) {
              candidates.push(first + i, pre, picked[j]);
            }
          }
          computed += taken;
        }
      }
    }
  }
  encode_counts.computed += computed;
}

// z with P(standard normal > z) = p, for p <= 1/2 (Abramowitz and Stegun 26.2.23, |error| < 4.5e-4).
inline double upper_quantile(double p) {
  const double t = std::sqrt(-2 * std::log(p));
  return t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308)));
}

// The widest bound, in standard deviations of a row's pre-activations, at which screening is still faster than computing
// everything, if they are normal; 0 or less: never. In cycles of an AVX-512 core: a product of a pair costs d / 16 in
// fp32, a quarter of that in 8 bits; a pair computed after the screen costs a call and d / 8 for two loads from the
// second-level cache.
inline double widest_bound(int64_t N, int64_t d, int64_t F, int64_t k) {
  if (N < kScreenLeastRows || d > kScreenMostColumns || 2 * k > F) {
    return 0;
  }
  const double columns = static_cast<double>(d);
  const double pays = 0.6 * (columns / 16) / (40 + 0.16 * columns);  // part of the latents that may be computed
  return upper_quantile(static_cast<double>(k) / static_cast<double>(F)) - upper_quantile(pays);
}

// Mean ||dw|| / ||w|| of a sample of latents that depends on nothing but F.
template <class R>
double rounding_of_latents(const R* W, int64_t d, int64_t F) {
  constexpr int64_t kSample = 64;
  const int64_t stride = (d + 63) / 64 * 64;
  uint8_t* bytes = scratch<uint8_t>(Slot::kWide, stride);
  double total = 0;
  int64_t counted = 0;
  for (int64_t i = 0; i < std::min(kSample, F); ++i) {
    Rounded row;
    if (round_to_bytes(W + i * F / std::min(kSample, F) * d, d, stride, 0, bytes, row)) {
      total += static_cast<double>(row.rest) / static_cast<double>(row.norm);
      ++counted;
    }
  }
  return counted == 0 ? 1.0 : total / static_cast<double>(counted);
}

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
  const int64_t stride = (a.d + 63) / 64 * 64;
  // Of a block of rows: its list (one more than rows, see list_rows), rounding, threshold to start from, whether to
  // screen, whether to repeat, x - b_dec; and per row part the list of a pass and its length.
  int64_t* list = scratch<int64_t>(Slot::kScreen, (most + plan.row_parts) * 3 + most * (4 + a.d) / 2 + most + 64);
  int64_t* sizes = list + most + plan.row_parts;
  Rounded* rounded = reinterpret_cast<Rounded*>(sizes + plan.row_parts);
  float* start = reinterpret_cast<float*>(rounded + most);
  float* centred = start + most;
  uint8_t* screened = reinterpret_cast<uint8_t*>(centred + most * a.d);
  uint8_t* repeat = screened + most;
  const ScreenRows block{centred, start};

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
            repeat[row] = n < a.k && start[row] > 0;
            if (!repeat[row]) {
              write_row<R>(keys, n, a.k, a.values + (base + row) * a.k, a.indices + (base + row) * a.k);
            }
          });
    };
    const auto screen = [&](int64_t part, int64_t begin, int64_t end, Candidates<float>& candidates) {
      screen_block(a, block, list_of(part), sizes[part], begin, end, candidates);
    };

    constexpr int64_t kRowsPerTask = 64;
    parallel_tasks(threads, (here + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
      uint8_t* bytes = scratch<uint8_t>(Slot::kWide, stride);
      for (int64_t r = task * kRowsPerTask; r < std::min((task + 1) * kRowsPerTask, here); ++r) {
        centre(a.x + (base + r) * a.d, a.b_dec, a.d, centred + r * a.d);
        const bool ordinary = round_to_bytes(centred + r * a.d, a.d, stride, 0, bytes, rounded[r]);
        const double width = root * static_cast<double>(rounded[r].rest) / static_cast<double>(rounded[r].norm);
        screened[r] = ordinary && width + of_latents < widest;
        repeat[r] = 0;
        start[r] = 0;
      }
    });
    if (collect([&](int64_t r) { return screened[r] == 0; }) > 0) {
      pass([&](int64_t part, int64_t begin, int64_t end, Candidates<float>& candidates) {
        encode_block(a, RowList<R>{a.x + base * a.d, list_of(part), sizes[part]}, begin, end, candidates);
      });
    }
    const int64_t rows = collect([&](int64_t r) { return screened[r] != 0; });
    encode_counts.screened += rows;
    if (rows < kSeedsWorthwhile * kPanelRows<float> * plan.row_parts) {
      pass(screen);
      continue;
    }
    // Seeds: the first panel of every part.
    for (int64_t part = 0; part < plan.row_parts; ++part) {
      sizes[part] = std::min(sizes[part], kPanelRows<float>);
    }
    pass(screen);
    float multiple = std::numeric_limits<float>::infinity();
    for (int64_t part = 0; part < plan.row_parts; ++part) {
      for (int64_t i = 0; i < sizes[part]; ++i) {
        const int64_t row = list_of(part)[i];
        const float kth = widen(a.values[(base + row + 1) * a.k - 1]);
        multiple = std::min(multiple, kth / rounded[row].norm);
        screened[row] = 0;
      }
    }
    if (!(multiple < std::numeric_limits<float>::infinity())) {
      multiple = 0;
    }
    collect([&](int64_t r) { return screened[r] != 0; });
    for (int64_t r = 0; r < here; ++r) {
      start[r] = kGuessMargin * multiple * rounded[r].norm;
    }
    pass(screen);
    const int64_t repeated = collect([&](int64_t r) { return repeat[r] != 0; });
    if (repeated > 0) {
      encode_counts.repeated += repeated;
      std::fill(start, start + here, 0.0f);
      pass(screen);
    }
  }
}

}  // namespace RK_ISA
}  // namespace rk
