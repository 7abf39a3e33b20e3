// Exact selection under one total order: value descending, NaN first, equal values by ascending index.
//
// A candidate is one integer key that sorts that way, so selection needs no comparator and no second look at the index:
// only positive values and NaN become candidates, and positive IEEE numbers order like their bits. NaN takes the largest
// bit pattern of all, whatever its payload, so several NaN rank by index.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>

#include "types.h"

namespace rk {

template <class T>
struct Candidate;

template <>
struct Candidate<float> {
  using Key = uint64_t;
  static Key key(float value, uint32_t index) {
    const uint32_t bits = value != value ? 0x7fffffffu : float_to_bits(value);
    return (static_cast<uint64_t>(bits) << 32) | static_cast<uint32_t>(~index);
  }
  static float value(Key key) {
    return bits_to_float(static_cast<uint32_t>(key >> 32));
  }
  static uint32_t index(Key key) {
    return ~static_cast<uint32_t>(key);
  }
};

template <>
struct Candidate<double> {
  __extension__ using Key = unsigned __int128;
  static Key key(double value, uint32_t index) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = value != value ? 0x7fffffffffffffffu : bits;
    return (static_cast<Key>(bits) << 32) | static_cast<uint32_t>(~index);
  }
  static double value(Key key) {
    const uint64_t bits = static_cast<uint64_t>(key >> 32);
    double out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
  }
  static uint32_t index(Key key) {
    return ~static_cast<uint32_t>(key);
  }
};

// Moves the k largest of n distinct keys to the front, unordered; 1 <= k <= n. Quickselect whose partition has no branch
// on the data (a mispredicted one costs more than the handful of instructions it saves); after more rounds than random
// data ever needs, the library's introselect takes over, so no order of the input is quadratic.
template <class Key>
void select_largest(Key* keys, int64_t n, int64_t k) {
  int64_t low = 0;
  int64_t high = n;
  for (int rounds = 0; low < k && k < high; ++rounds) {
    if (rounds == 24) {
      std::nth_element(keys + low, keys + (k - 1), keys + high, std::greater<Key>());
      return;
    }
    Key* const first = keys + low;
    Key* const last = keys + (high - 1);
    Key* const middle = keys + (low + high) / 2;
    // The median of three goes to the end as the pivot.
    if (*middle < *first) {
      std::swap(*middle, *first);
    }
    if (*last < *first) {
      std::swap(*last, *first);
    }
    if (*middle < *last) {
      std::swap(*middle, *last);
    }
    const Key pivot = *last;
    Key* front = first;
    for (Key* at = first; at < last; ++at) {
      const Key key = *at;
      *at = *front;
      *front = key;
      front += key > pivot ? 1 : 0;
    }
    std::swap(*front, *last);
    const int64_t place = front - keys;  // everything before it is larger
    if (place == k || place == k - 1) {
      return;
    }
    if (place > k) {
      high = place;
    } else {
      low = place + 1;
    }
  }
}

// Moves the k best of keys[0, n) to the front, unordered, k < n; returns the value that a later index must exceed to be
// among them. Nothing exceeds a NaN, hence infinity there.
template <class T>
T keep_best(typename Candidate<T>::Key* keys, int64_t n, int64_t k) {
  select_largest(keys, n, k);
  const T kth = Candidate<T>::value(*std::min_element(keys, keys + k));
  return kth == kth ? kth : std::numeric_limits<T>::infinity();
}

// One output row from its n candidates (any order; they are overwritten): k values and indices, value descending. Rows
// with fewer than k candidates fill up with value 0 and the lowest indices that are not among them.
template <class R>
void write_row(typename Candidate<Compute<R>>::Key* keys, int64_t n, int64_t k, R* values, int64_t* indices) {
  using C = Candidate<Compute<R>>;
  if (n > k) {
    select_largest(keys, n, k);
    n = k;
  }
  std::sort(keys, keys + n, std::greater<typename C::Key>());
  for (int64_t j = 0; j < n; ++j) {
    narrow(C::value(keys[j]), values[j]);
    indices[j] = C::index(keys[j]);
  }
  if (n == k) {
    return;
  }
  // The candidates' own memory serves for the sorted list of used indices: the keys are no longer needed.
  for (int64_t j = 0; j < n; ++j) {
    keys[j] = C::index(keys[j]);
  }
  std::sort(keys, keys + n);
  int64_t next = 0;
  int64_t used = 0;
  for (int64_t j = n; j < k; ++next) {
    if (used < n && static_cast<int64_t>(keys[used]) == next) {
      ++used;
      continue;
    }
    narrow(Compute<R>(0), values[j]);
    indices[j++] = next;
  }
}

}  // namespace rk
