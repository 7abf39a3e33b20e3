// Adam (Kingma & Ba 2015, as torch.optim.Adam writes it) over one row, with the two things a dictionary wants around it:
// removing the gradient's component along the row before the update, and scaling the row back to unit norm after it.
//
// 7 numbers move per parameter and update, so rows are treated while they are in the first-level cache: norm, removal,
// update and renormalisation read memory once.
#pragma once

#include "kernels.h"
#include "sparse_decode.h"

namespace rk {
namespace RK_ISA {

template <class T>
RK_INLINE Vec<T> adam_vec(const AdamScalars<T>& s, Vec<T> w, Vec<T> g, T* m_at, T* v_at) {
  const Vec<T> m = s.beta1 * load(m_at) + s.rest1 * g;
  const Vec<T> v = s.beta2 * load(v_at) + s.rest2 * g * g;
  store<T>(m_at, m);
  store<T>(v_at, v);
  return w - s.step * (m / (vsqrt(v) * s.denom_scale + s.eps));
}

template <class T>
RK_INLINE T adam_one(const AdamScalars<T>& s, T w, T g, T& m, T& v) {
  m = s.beta1 * m + s.rest1 * g;
  v = s.beta2 * v + s.rest2 * g * g;
  return w - s.step * (m / (std::sqrt(v) * s.denom_scale + s.eps));
}

// w, m, v in place; g (null: zero gradient) is times grad_scale and is not changed. A row of norm 0 has no direction:
// nothing is removed and nothing is scaled.
template <class T>
void adam_row(
    const AdamScalars<T>& s, T* w, const T* g, T* m, T* v, int64_t d, T grad_scale, bool remove_parallel,
    bool unit_norm) {
  constexpr int L = kLanes<T>;
  T along = 0;  // g - along * w is orthogonal to w
  if (remove_parallel && g != nullptr) {
    T gw[1];
    T ww[1];
    dots<T, T, 1>({g}, w, d, gw);
    dots<T, T, 1>({w}, w, d, ww);
    along = ww[0] > 0 ? grad_scale * gw[0] / ww[0] : T(0);
  }
  Vec<T> squares = Vec<T>{};
  T sq = 0;
  int64_t c = 0;
  for (; c + L <= d; c += L) {
    const Vec<T> old = load(w + c);
    const Vec<T> grad = g != nullptr ? grad_scale * load(g + c) - along * old : Vec<T>{};
    const Vec<T> updated = adam_vec(s, old, grad, m + c, v + c);
    squares += updated * updated;
    store<T>(w + c, updated);
  }
  for (; c < d; ++c) {
    const T grad = g != nullptr ? grad_scale * g[c] - along * w[c] : T(0);
    w[c] = adam_one(s, w[c], grad, m[c], v[c]);
    sq += w[c] * w[c];
  }
  if (!unit_norm) {
    return;
  }
  sq += horizontal_sum<T>(squares);
  if (!(sq > 0)) {
    return;
  }
  const T norm = std::sqrt(sq);
  for (c = 0; c + L <= d; c += L) {
    store<T>(w + c, load(w + c) / norm);
  }
  for (; c < d; ++c) {
    w[c] /= norm;
  }
}

// The same for a row and state stored in R: a 16-bit row is updated and normalised in fp32 and rounded once.
template <class R>
void adam_stored_row(
    const AdamScalars<Compute<R>>& s, R* w, const Compute<R>* g, R* m, R* v, int64_t d, Compute<R> grad_scale,
    bool remove_parallel, bool unit_norm) {
  using T = Compute<R>;
  if constexpr (std::is_same_v<R, T>) {
    adam_row(s, w, g, m, v, d, grad_scale, remove_parallel, unit_norm);
  } else {
    T* wide = scratch<T>(Slot::kWide, 3 * d);
    R* const stored[] = {w, m, v};
    for (int i = 0; i < 3; ++i) {
      for (int64_t c = 0; c < d; ++c) {
        wide[i * d + c] = widen(stored[i][c]);
      }
    }
    adam_row<T>(s, wide, g, wide + d, wide + 2 * d, d, grad_scale, remove_parallel, unit_norm);
    for (int i = 0; i < 3; ++i) {
      for (int64_t c = 0; c < d; ++c) {
        narrow(wide[i * d + c], stored[i][c]);
      }
    }
  }
}

template <class R>
void adam_rows(const AdamRowsArgs<R>& a, const Threads& threads) {
  // Rows of one number each (a bias) are one long row when nothing looks at norms.
  const bool flat = !a.remove_parallel && !a.unit_norm;
  const int64_t d = flat ? 4096 : a.d;
  const int64_t rows = flat ? (a.rows * a.d + d - 1) / d : a.rows;
  const int64_t rows_each = std::max<int64_t>(16384 / std::max<int64_t>(d, 1), 1);
  parallel_tasks(threads, (rows + rows_each - 1) / rows_each, [&](int64_t task) {
    for (int64_t r = task * rows_each; r < std::min((task + 1) * rows_each, rows); ++r) {
      const int64_t at = r * d;
      const int64_t length = std::min(d, a.rows * a.d - at);
      const Compute<R>* g;
      if constexpr (std::is_same_v<R, Compute<R>>) {
        g = a.g + at;
      } else {
        Compute<R>* wide = scratch<Compute<R>>(Slot::kRows, d);
        for (int64_t c = 0; c < length; ++c) {
          wide[c] = widen(a.g[at + c]);
        }
        g = wide;
      }
      adam_stored_row(a.adam, a.W + at, g, a.m + at, a.v + at, length, a.grad_scale, a.remove_parallel, a.unit_norm);
    }
  });
}

}  // namespace RK_ISA
}  // namespace rk
