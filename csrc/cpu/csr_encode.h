// All latents of a batch that exceed a bound, which is one per latent (threshold_encode) or one for the whole batch that
// rises as better ones are found (batch_topk_encode), without ever holding [N, F].
//
// The product, its blocking and the filter behind the registers are those of topk_encode.h; survivors go to the thread's
// pool (csr_pool.h). After the first 2 N k of them the batch's bound admits about N k (1 + ln(F / k)) of N F in all on
// rows in random order; ascending ones admit everything, which costs time and not memory.
#pragma once

#include "csr_pool.h"
#include "topk_encode.h"

namespace rk {
namespace RK_ISA {

template <class T, bool PerLatent>
struct CsrSink {
  CsrPool<T>* pool;
  const T* least;  // [F] with PerLatent
  int64_t first_row, F;

  void start(int64_t) const {
    pool->reserve();
  }
  Vec<T> row_bound(int64_t) const {
    return splat<T>(PerLatent ? T(0) : pool->limit());
  }
  Vec<T> bound(Vec<T> of_all, int64_t latent) const {
    return PerLatent ? splat<T>(least[latent]) : of_all;
  }
  void push(int64_t row, T value, uint32_t latent) const {
    pool->push(value, (first_row + row) * F + latent);
  }
};

template <class R>
void csr_encode(const CsrEncodeArgs<R>& args, const Threads& threads) {
  using T = Compute<R>;
  const EncodeArgs<R>& a = args.all;
  constexpr int64_t kPanel = kPanelRows<T>;
  const int64_t parts = std::clamp<int64_t>(threads.count, 1, args.parts);
  const int64_t row_parts = std::clamp<int64_t>(a.N / kRowsWorthSplitting, 1, parts);
  const int64_t tiles = (a.F + kTileLatents - 1) / kTileLatents;
  const int64_t latent_parts = std::clamp<int64_t>(parts / row_parts, 1, tiles);
  const int64_t latents_each = (tiles + latent_parts - 1) / latent_parts * kTileLatents;
  int64_t rows_each = ((a.N + row_parts - 1) / row_parts + kPanel - 1) / kPanel * kPanel;
  rows_each = std::min(rows_each, kPackedRowElements / std::max<int64_t>(a.d, 1));
  rows_each = std::max<int64_t>(rows_each / kPanel, 1) * kPanel;

  for (int64_t base = 0; base < a.N; base += row_parts * rows_each) {
    parallel_tasks(threads, row_parts * latent_parts, [&](int64_t part) {
      const int64_t first = base + part / latent_parts * rows_each;
      const int64_t count = std::clamp<int64_t>(a.N - first, 0, rows_each);
      const int64_t begin = std::min(part % latent_parts * latents_each, a.F);
      const int64_t end = std::min(begin + latents_each, a.F);
      if (count == 0) {
        return;
      }
      const RowList<R> rows{a.x + first * a.d, nullptr, count};
      const auto run = [&](auto per_latent) {
        CsrSink<T, decltype(per_latent)::value> sink{args.pools + part, args.least, first, a.F};
        encode_block(a, rows, begin, end, sink);
      };
      if (args.least != nullptr) {
        run(std::true_type());
      } else {
        run(std::false_type());
      }
    });
  }
}

}  // namespace RK_ISA
}  // namespace rk
