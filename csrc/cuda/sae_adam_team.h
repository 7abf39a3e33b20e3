// A team's latents in sae_backward_adam: the gradients of each by sae_backward_team.h, and its step of Adam while they are
// in registers.
//
// Every thread reads and writes its own pieces of the rows of state, so nothing but the sums over a row meets the team.
// `Team` and `Row` as in sae_backward_team.h.
#pragma once

#include "sae_adam.h"
#include "sae_backward_team.h"

namespace rk::cuda {

union Bits32 {
  float number;
  uint32_t bits;
};

RK_LANE float number_of(uint32_t bits) {
  Bits32 same;
  same.bits = bits;
  return same.number;
}

RK_LANE uint32_t bits_of(float number) {
  Bits32 same;
  same.number = number;
  return number == number ? same.bits : 0x7fc00000u;  // one NaN: another's payload could carry into the sign
}

// The bf16 half of fp32 master weights: rounded to nearest, ties away from zero.
RK_LANE uint32_t upper_half(uint32_t bits) {
  return (bits + 0x8000u) >> 16;
}

template <int kVector>
struct alignas(2 * kVector) Halves {
  uint32_t word[kVector / 2];  // two of 16 bits in each, the lower one first
};

template <int kVector>
RK_LANE void read_halves(const void* from, uint32_t (&to)[kVector]) {
  const Halves<kVector> halves = *static_cast<const Halves<kVector>*>(from);
  RK_UNROLL
  for (int i = 0; i < kVector; ++i) {
    to[i] = i % 2 == 0 ? halves.word[i / 2] & 0xffffu : halves.word[i / 2] >> 16;
  }
}

// The lower 16 bits of each number.
template <int kVector>
RK_LANE void write_halves(void* to, const uint32_t (&numbers)[kVector]) {
  Halves<kVector> halves;
  RK_UNROLL
  for (int i = 0; i < kVector; i += 2) {
    halves.word[i / 2] = (numbers[i] & 0xffffu) | numbers[i + 1] << 16;
  }
  *static_cast<Halves<kVector>*>(to) = halves;
}

template <int kVector>
RK_LANE void read_floats(const float* from, float (&to)[kVector]) {
  RK_UNROLL
  for (int i = 0; i < kVector; i += 4) {
    const Quad four = *reinterpret_cast<const Quad*>(from + i);
    RK_UNROLL
    for (int j = 0; j < 4; ++j) {
      to[i + j] = four.number[j];
    }
  }
}

template <int kVector>
RK_LANE void write_floats(float* to, const float (&from)[kVector]) {
  emit<true, kVector>(to, kVector, from, false);
}

// The places below count elements of a matrix; its piece there is whole.

template <int kVector>
RK_LANE void read_weights(const StateRows& rows, int64_t at, float (&w)[kVector]) {
  if (rows.low == nullptr) {
    read_floats(static_cast<const float*>(rows.weights) + at, w);
    return;
  }
  uint32_t high[kVector], low[kVector];
  read_halves(static_cast<const uint16_t*>(rows.weights) + at, high);
  read_halves(rows.low + at, low);
  RK_UNROLL
  for (int i = 0; i < kVector; ++i) {
    const int32_t rest = static_cast<int16_t>(low[i]);
    w[i] = number_of((high[i] << 16) + static_cast<uint32_t>(rest));
  }
}

// Weights as the forward pass sees them: the upper half, or a copy in the rows' type.
template <class Row>
RK_LANE typename Row::Element seen(const StateRows& rows, float w) {
  if constexpr (Row::kVector == 8) {
    if (rows.low != nullptr) {
      return static_cast<typename Row::Element>(upper_half(bits_of(w)));
    }
  }
  return Row::of_float(w);
}

template <class Row>
RK_LANE void write_weights(const StateRows& rows, int64_t at, const float (&w)[Row::kVector]) {
  constexpr int kVector = Row::kVector;
  uint32_t bits[kVector];
  if (rows.low == nullptr) {
    write_floats(static_cast<float*>(rows.weights) + at, w);
  } else {
    RK_UNROLL
    for (int i = 0; i < kVector; ++i) {
      bits[i] = bits_of(w[i]);
    }
    write_halves(rows.low + at, bits);
    RK_UNROLL
    for (int i = 0; i < kVector; ++i) {
      bits[i] = upper_half(bits[i]);
    }
    write_halves(static_cast<uint16_t*>(rows.weights) + at, bits);
  }
  if constexpr (kVector == 8) {  // rows of fp32 are the weights themselves
    if (rows.copy != nullptr) {
      RK_UNROLL
      for (int i = 0; i < kVector; ++i) {
        bits[i] = seen<Row>(rows, w[i]);
      }
      write_halves(static_cast<uint16_t*>(rows.copy) + at, bits);
    }
  }
}

template <int kVector>
RK_LANE void read_moments(const void* moments, bool is_short, int64_t at, float (&to)[kVector]) {
  if (!is_short) {
    read_floats(static_cast<const float*>(moments) + at, to);
    return;
  }
  uint32_t bits[kVector];
  read_halves(static_cast<const uint16_t*>(moments) + at, bits);
  RK_UNROLL
  for (int i = 0; i < kVector; ++i) {
    to[i] = number_of(bits[i] << 16);
  }
}

// 32 random bits of an element, as refusal_kernels.compact has them.
RK_LANE uint32_t random_word(uint32_t salt, int64_t at) {
  uint32_t x = static_cast<uint32_t>(at) ^ salt;
  x = ((x >> 16) ^ x) * 0x45d9f3bu;
  x = ((x >> 16) ^ x) * 0x45d9f3bu;
  return (x >> 16) ^ x;
}

template <int kVector>
RK_LANE void write_moments(
    const StateRows& rows, bool is_short, int64_t at, const float (&m)[kVector], const float (&v)[kVector]) {
  if (!is_short) {
    write_floats(static_cast<float*>(rows.m) + at, m);
    write_floats(static_cast<float*>(rows.v) + at, v);
    return;
  }
  uint32_t of_m[kVector], of_v[kVector];
  RK_UNROLL
  for (int i = 0; i < kVector; ++i) {
    const uint32_t random = random_word(rows.salt, at + i);
    of_m[i] = m[i] == m[i] ? (bits_of(m[i]) + (random & 0xffffu)) >> 16 : 0x7fc0u;
    of_v[i] = v[i] == v[i] ? (bits_of(v[i]) + (random >> 16)) >> 16 : 0x7fc0u;
  }
  write_halves(static_cast<uint16_t*>(rows.m) + at, of_m);
  write_halves(static_cast<uint16_t*>(rows.v) + at, of_v);
}

// Quotients and roots are the hardware's, off by two units in the last place at most: those that are rounded correctly
// call a function, in front of which registers spill.
template <class Team>
RK_LANE void adam_number(const AdamArgs& a, float& w, float g, float& m, float& v) {
  m = a.beta1 * m + a.one_minus_beta1 * g;
  v = a.beta2 * v + a.one_minus_beta2 * g * g;
  w -= Team::quotient(a.step_size * m, Team::root(v) * a.inverse_root_bc2 + a.eps);
}

// The moments of a piece in place, its weights in registers.
template <class Team, int kVector>
RK_LANE void adam_piece(
    const AdamArgs& a, const StateRows& rows, int64_t at, const float (&g)[kVector], float (&w)[kVector]) {
  float m[kVector], v[kVector];
  read_moments(rows.m, a.short_moments, at, m);
  read_moments(rows.v, a.short_moments, at, v);
  RK_UNROLL
  for (int i = 0; i < kVector; ++i) {
    adam_number<Team>(a, w[i], g[i], m[i], v[i]);
  }
  write_moments(rows, a.short_moments, at, m, v);
}

template <int kVector>
RK_LANE void add_piece(const float* from, float (&to)[kVector]) {
  float more[kVector];
  read_floats(from, more);
  RK_UNROLL
  for (int i = 0; i < kVector; ++i) {
    to[i] += more[i];
  }
}

// Asks for a latent's rows of state: they come from HBM while its last entries are added up.
template <class Team>
RK_LANE void ask_for_state(const AdamArgs& a, int latent) {
  constexpr int kLine = 128;
  const int64_t d = a.entries.d;
  const auto ask = [&](const void* rows, int64_t size) {
    if (rows == nullptr) {
      return;
    }
    const char* const row = static_cast<const char*>(rows) + latent * d * size;
    RK_ROLLED
    for (int64_t line = Team::rank() * kLine; line < d * size; line += Team::kThreads * kLine) {
      Team::prefetch(row + line);
    }
  };
  const int weight = a.dec.low == nullptr ? 4 : 2, moment = a.short_moments ? 2 : 4;
  ask(a.dec.weights, weight);
  ask(a.dec.low, 2);
  ask(a.dec.m, moment);
  ask(a.dec.v, moment);
  ask(a.enc.weights, weight);
  ask(a.enc.low, 2);
  ask(a.enc.m, moment);
  ask(a.enc.v, moment);
}

template <int kIndex>
constexpr int kGradientBytes = backward_team_bytes(kBackwardShapes[kIndex]);

// `memory`: adam_team_bytes of shared memory.
template <class Team, class Row, int kIndex>
RK_LANE void step_latents(const AdamArgs& a, int team, unsigned char* memory) {
  constexpr BackwardShape kShape = kBackwardShapes[kIndex];
  constexpr int kVector = Row::kVector, kPieces = kShape.pieces, kColumns = Team::kThreads * kVector;
  constexpr int kAhead = 4 * kShape.batch;  // entries before the end at which the state is asked for
  const BackwardArgs& b = a.entries;
  const int head_latents = b.latents / a.heads;
  const int head = team / a.teams;
  const int first = Team::rank() * kVector;
  float* const row_sums = reinterpret_cast<float*>(memory + kGradientBytes<kIndex>);
  for (int f = team % a.teams; f < head_latents; f += a.teams) {
    const int latent = head * head_latents + f;
    Work work{latent, b.offsets[latent], b.offsets[latent + 1], true};
    const int64_t count = work.end - work.begin;
    const bool hot = count > b.segment;
    float dW_dec[kPieces][kVector] = {}, dW_enc[kPieces][kVector] = {}, db_enc = 0;
    if (hot || count <= kAhead) {
      ask_for_state<Team>(a, latent);
    }
    if (!hot && count > 0) {
      sum_entries<Team, Row, kIndex, true, false>(b, work, 0, memory, dW_dec, dW_enc, db_enc, [&](int left) {
        if (left <= kAhead && left > kAhead - kShape.batch) {
          ask_for_state<Team>(a, latent);
        }
      });
    }
    if (hot) {
      const int end = static_cast<int>(b.ends[latent]);
      for (int part = end - segments_of(b, count); part < end; ++part) {
        RK_UNROLL
        for (int p = 0; p < kPieces; ++p) {
          if (first + p * kColumns < b.d) {
            add_piece(row_of(b.part_dec, part, b.d) + first + p * kColumns, dW_dec[p]);
            add_piece(row_of(b.part_enc, part, b.d) + first + p * kColumns, dW_enc[p]);
          }
        }
        db_enc += b.part_db[part];
      }
    }
    const int64_t position = a.position == nullptr ? -1 : a.position[head * a.positions + f];
    if (position >= 0) {
      const int64_t extra = head * a.extra_rows + position;
      RK_UNROLL
      for (int p = 0; p < kPieces; ++p) {
        if (first + p * kColumns < b.d) {
          add_piece(a.extra_dec + extra * b.d + first + p * kColumns, dW_dec[p]);
          add_piece(a.extra_enc + extra * b.d + first + p * kColumns, dW_enc[p]);
        }
      }
      db_enc += a.extra_db[extra];
    }

    // The decoder: its row stays in registers until its norm is known.
    const int64_t at = static_cast<int64_t>(latent) * b.d + first;
    float w[kPieces][kVector];
    RK_UNROLL
    for (int p = 0; p < kPieces; ++p) {
      if (first + p * kColumns < b.d) {
        read_weights(a.dec, at + p * kColumns, w[p]);
      } else {
        RK_UNROLL
        for (int i = 0; i < kVector; ++i) {
          w[p][i] = 0;
        }
      }
    }
    if (a.remove_parallel) {
      float sums[2] = {};
      RK_UNROLL
      for (int p = 0; p < kPieces; ++p) {
        RK_UNROLL
        for (int i = 0; i < kVector; ++i) {
          sums[0] += w[p][i] * w[p][i];
          sums[1] += dW_dec[p][i] * w[p][i];
        }
      }
      sum_over_team<Team>(sums, row_sums);
      // Team::quotient takes a divisor from 2^-126 to 2^126.
      const float scale = sums[0] < 1 ? 0x1p64f : 0x1p-64f;
      const float share = sums[0] > 0 ? Team::quotient(sums[1] * scale, sums[0] * scale) : 0.f;
      RK_UNROLL
      for (int p = 0; p < kPieces; ++p) {
        RK_UNROLL
        for (int i = 0; i < kVector; ++i) {
          dW_dec[p][i] -= share * w[p][i];
        }
      }
    }
    float square[1] = {};
    RK_UNROLL
    for (int p = 0; p < kPieces; ++p) {
      if (first + p * kColumns < b.d) {
        adam_piece<Team>(a, a.dec, at + p * kColumns, dW_dec[p], w[p]);
        RK_UNROLL
        for (int i = 0; i < kVector; ++i) {
          square[0] += w[p][i] * w[p][i];
        }
      }
    }
    if (a.unit_norm) {
      sum_over_team<Team>(square, row_sums + 2 * (Team::kThreads / 32));
      const float norm = square[0] > 0 ? Team::root(square[0]) : 1.f;
      RK_UNROLL
      for (int p = 0; p < kPieces; ++p) {
        RK_UNROLL
        for (int i = 0; i < kVector; ++i) {
          w[p][i] = Team::quotient(w[p][i], norm);
        }
      }
    }
    RK_UNROLL
    for (int p = 0; p < kPieces; ++p) {
      if (first + p * kColumns < b.d) {
        write_weights<Row>(a.dec, at + p * kColumns, w[p]);
      }
    }

    float* const through = row_of(a.through, team, b.d) + first;
    RK_UNROLL
    for (int p = 0; p < kPieces; ++p) {
      if (first + p * kColumns < b.d) {
        const int64_t here = at + p * kColumns;
        float encoder[kVector], share[kVector] = {};
        read_weights(a.enc, here, encoder);
        if (f >= a.teams) {  // not the team's first latent
          read_floats(through + p * kColumns, share);
        }
        RK_UNROLL
        for (int i = 0; i < kVector; ++i) {
          share[i] += db_enc * Row::to_float(seen<Row>(a.enc, encoder[i]));
        }
        write_floats(through + p * kColumns, share);
        adam_piece<Team>(a, a.enc, here, dW_enc[p], encoder);
        write_weights<Row>(a.enc, here, encoder);
      }
    }
    if (Team::rank() == 0) {
      float bias = a.b_enc[latent], m = a.m_b[latent], v = a.v_b[latent];
      adam_number<Team>(a, bias, db_enc, m, v);
      a.b_enc[latent] = bias;
      a.m_b[latent] = m;
      a.v_b[latent] = v;
    }
    Team::barrier();  // the next latent's sums go where this one's may still be read
  }
}

}  // namespace rk::cuda
