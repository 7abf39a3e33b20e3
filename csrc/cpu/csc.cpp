#include "csc.h"

#include <algorithm>
#include <limits>
#include <type_traits>

namespace rk {

template <class I>
bool all_in_range(const I* indices, int64_t count, int64_t F) {
  // Negative where an index is, or where one is beyond F - 1: operations that every vector unit has for 64 bits, too.
  const I last = static_cast<I>(std::min<int64_t>(F - 1, std::numeric_limits<I>::max()));
  I sign = 0;
  for (int64_t i = 0; i < count; ++i) {
    sign |=
        indices[i] |
        static_cast<I>(static_cast<std::make_unsigned_t<I>>(last) - static_cast<std::make_unsigned_t<I>>(indices[i]));
  }
  return sign >= 0;
}

template <class I>
void index_range(const I* indices, int64_t count, int64_t& low, int64_t& high) {
  const auto [least, most] = std::minmax_element(indices, indices + count);
  low = count > 0 ? *least : 0;
  high = count > 0 ? *most : -1;
}

namespace {

// each_hit(first token, last token, f) calls f(token, slot, latent) for the activations of those tokens, in order.
template <class EachHit>
LatentMajor transposed(int64_t N, int64_t entries, int64_t F, const Threads& threads, const EachHit& each_hit) {
  // One histogram per part of the tokens. More parts than threads would only add histograms to sum, and a part should
  // hold more activations than its histogram has bins.
  const int64_t parts = std::clamp<int64_t>(std::min(threads.count, entries / std::max<int64_t>(F, 1)), 1, 16);
  const int64_t tokens_each = (N + parts - 1) / parts;
  int64_t* offsets = scratch<int64_t>(Slot::kHits, (parts + 1) * F + 1 + entries);
  int64_t* place = offsets + F + 1;  // [parts, F]
  Hit* hits = reinterpret_cast<Hit*>(place + parts * F);

  const auto each_hit_of = [&](int64_t part, const auto& f) {
    each_hit(std::min(part * tokens_each, N), std::min((part + 1) * tokens_each, N), f);
  };
  parallel_tasks(threads, parts, [&](int64_t part) {
    int64_t* own = place + part * F;
    std::fill(own, own + F, int64_t{0});
    each_hit_of(part, [&](int64_t, int64_t, int64_t f) { ++own[f]; });
  });
  int64_t total = 0;
  for (int64_t f = 0; f < F; ++f) {
    offsets[f] = total;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t count = place[part * F + f];
      place[part * F + f] = total;
      total += count;
    }
  }
  offsets[F] = total;
  parallel_tasks(threads, parts, [&](int64_t part) {
    int64_t* own = place + part * F;
    each_hit_of(part, [&](int64_t n, int64_t j, int64_t f) {
      hits[own[f]++] = Hit{static_cast<uint32_t>(n), static_cast<uint32_t>(j)};
    });
  });
  return LatentMajor{offsets, hits};
}

}  // namespace

template <class R, class I>
LatentMajor latent_major(
    const I* indices, const R* skip_where_zero, int64_t N, int64_t k, int64_t F, const Threads& threads) {
  return transposed(N, N * k, F, threads, [&](int64_t begin, int64_t end, const auto& f) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t j = 0; j < k; ++j) {
        if (skip_where_zero == nullptr || !(widen(skip_where_zero[n * k + j]) == 0)) {
          f(n, j, static_cast<int64_t>(indices[n * k + j]));
        }
      }
    }
  });
}

LatentMajor latent_major_csr(
    const int64_t* latents, const int64_t* offsets, int64_t N, int64_t F, const Threads& threads) {
  return transposed(N, offsets[N], F, threads, [&](int64_t begin, int64_t end, const auto& f) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t i = offsets[n]; i < offsets[n + 1]; ++i) {
        f(n, i, latents[i]);
      }
    }
  });
}

#define RK_INSTANTIATE(R, I) \
  template LatentMajor latent_major<R, I>(const I*, const R*, int64_t, int64_t, int64_t, const Threads&);
#define RK_INSTANTIATE_INDEX(I)                                        \
  template bool all_in_range<I>(const I*, int64_t, int64_t);           \
  template void index_range<I>(const I*, int64_t, int64_t&, int64_t&); \
  RK_INSTANTIATE(float, I) RK_INSTANTIATE(double, I) RK_INSTANTIATE(BF16, I) RK_INSTANTIATE(F16, I)
RK_INSTANTIATE_INDEX(int32_t)
RK_INSTANTIATE_INDEX(int64_t)

}  // namespace rk
