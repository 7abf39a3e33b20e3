// A latent's part of sae_backward (or a segment's, of a hot one), by a team of threads.
//
// The team's threads share the columns of a row in pieces of 16 bytes: thread r has pieces r, r + threads, ... of e, of
// x, of the decoder's row and of both gradient rows. Nobody else reads a piece that a thread has copied to shared memory,
// so that needs no barrier; only the dot products are sums over the team, and one barrier serves a whole batch.
//
// `Team` is what the threads share: on a GPU the hardware's (sae_backward.cu), in a test fibers on the CPU. `Row` is the
// type of the rows' elements. All threads of a team call these functions together.
#pragma once

#include <cstdint>

#include "lane.h"
#include "sae_backward.h"

namespace rk::cuda {

struct alignas(16) Words {
  uint32_t word[4];
};

struct alignas(16) Quad {
  float number[4];
};

struct Float32Row {
  using Element = float;
  static constexpr int kVector = 4;
  static RK_LANE float to_float(float x) {
    return x;
  }
  static RK_LANE void unpack(const Words& from, float (&to)[4]) {
    RK_UNROLL
    for (int i = 0; i < 4; ++i) {
      union {
        uint32_t bits;
        float number;
      } same{from.word[i]};
      to[i] = same.number;
    }
  }
  static RK_LANE float of_float(float x) {
    return x;
  }
};

struct BFloat16Row {
  using Element = uint16_t;
  static constexpr int kVector = 8;
  static RK_LANE float of_bits(uint32_t bits) {
    union {
      uint32_t bits;
      float number;
    } same{bits};
    return same.number;
  }
  static RK_LANE float to_float(uint16_t x) {
    return of_bits(static_cast<uint32_t>(x) << 16);
  }
  static RK_LANE void unpack(const Words& from, float (&to)[8]) {
    RK_UNROLL
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = of_bits(from.word[i] << 16);
      to[2 * i + 1] = of_bits(from.word[i] & 0xffff0000u);
    }
  }
  // To nearest, ties to even, as PyTorch rounds.
  static RK_LANE uint16_t of_float(float x) {
    union {
      float number;
      uint32_t bits;
    } same{x};
    const uint32_t up = same.bits + 0x7fffu + (same.bits >> 16 & 1u);
    return static_cast<uint16_t>(x == x ? up >> 16 : 0x7fc0u);
  }
};

// A piece that may begin anywhere; zeros from its `columns`-th on, and where it is not `live`.
template <class Row>
RK_LANE Words gather_piece(const typename Row::Element* from, int columns, bool live) {
  union {
    Words words;
    typename Row::Element elements[Row::kVector];
  } piece;
  RK_UNROLL
  for (int i = 0; i < Row::kVector; ++i) {
    piece.elements[i] = live && i < columns ? from[i] : typename Row::Element(0);
  }
  return piece.words;
}

template <class T>
RK_LANE T* row_of(T* matrix, int row, int d) {
  return matrix + static_cast<int64_t>(row) * d;
}

// Segments of a latent with `count` entries.
RK_LANE int segments_of(const BackwardArgs& a, int64_t count) {
  return static_cast<int>((count + a.segment - 1) / a.segment);
}

struct Work {
  int latent;
  int64_t begin, end;
  bool active;
};

RK_LANE Work work_of(const BackwardArgs& a, int program) {
  const bool hot = program < a.segments;
  Work work{hot ? static_cast<int>(a.segment_latent[program]) : program - a.segments, 0, 0, false};
  if (work.latent >= a.latents) {
    return work;
  }
  work.begin = a.offsets[work.latent];
  work.end = a.offsets[work.latent + 1];
  const int64_t count = work.end - work.begin;
  if (!hot) {
    work.active = count <= a.segment && (count > 0 || !a.accumulate);
    return work;
  }
  const int first = static_cast<int>(a.ends[work.latent]) - segments_of(a, count);
  work.begin += static_cast<int64_t>(program - first) * a.segment;
  work.end = work.end < work.begin + a.segment ? work.end : work.begin + a.segment;
  work.active = true;
  return work;
}

// Replaces every number by its sum over the team, in a fixed order. `sums`: kBatch numbers per warp, in other places than
// at the last call, so that a fast warp does not overwrite what a slow one still reads.
template <class Team, int kBatch>
RK_LANE void sum_over_team(float (&number)[kBatch], float* sums) {
  constexpr int kLanes = Team::kThreads < 32 ? Team::kThreads : 32;
  RK_UNROLL
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    RK_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      number[u] += Team::shuffle_xor(number[u], distance);
    }
  }
  if constexpr (Team::kThreads <= 32) {
    Team::barrier();
  } else {
    constexpr int kWarps = Team::kThreads / 32;
    if (Team::rank() % 32 == 0) {
      RK_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        sums[u * kWarps + Team::rank() / 32] = number[u];
      }
    }
    Team::barrier();
    RK_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      number[u] = 0;
      RK_UNROLL
      for (int warp = 0; warp < kWarps; warp += 4) {
        const Quad four = *reinterpret_cast<const Quad*>(sums + u * kWarps + warp);
        RK_UNROLL
        for (int i = 0; i < 4; ++i) {
          number[u] += four.number[i];
        }
      }
    }
  }
}

// The functions below take a place in a row and the number of its columns from there on, which may be negative. kAligned:
// the place is at a 16-byte boundary and the row ends at one.

template <class Team, class Row, bool kAligned>
RK_LANE Words read_piece(const typename Row::Element* from, int columns) {
  if constexpr (kAligned) {
    return columns > 0 ? Team::load(from) : Words{};
  } else {
    return gather_piece<Row>(from, columns, true);
  }
}

template <class Team, class Row, bool kAligned>
RK_LANE void copy_piece(unsigned char* to, const typename Row::Element* from, int columns, bool live) {
  if constexpr (kAligned) {
    Team::copy(to, from, live && columns > 0);
  } else {
    *reinterpret_cast<Words*>(to) = gather_piece<Row>(from, columns, live);
  }
}

template <bool kAligned>
RK_LANE Quad read_quad(const float* from, int columns) {
  Quad four{};
  if constexpr (kAligned) {
    if (columns > 0) {
      four = *reinterpret_cast<const Quad*>(from);
    }
  } else {
    RK_UNROLL
    for (int i = 0; i < 4; ++i) {
      four.number[i] = i < columns ? from[i] : 0.f;
    }
  }
  return four;
}

// A piece of a gradient row: onto what is there, or in its place.
template <bool kAligned, int kVector>
RK_LANE void emit(float* to, int columns, const float (&piece)[kVector], bool add) {
  if constexpr (kAligned) {
    RK_UNROLL
    for (int i = 0; i < kVector && columns > 0; i += 4) {
      Quad* const at = reinterpret_cast<Quad*>(to + i);
      Quad four{piece[i], piece[i + 1], piece[i + 2], piece[i + 3]};
      if (add) {
        const Quad old = *at;
        RK_UNROLL
        for (int j = 0; j < 4; ++j) {
          four.number[j] += old.number[j];
        }
      }
      *at = four;
    }
  } else {
    RK_UNROLL
    for (int i = 0; i < kVector; ++i) {
      if (i < columns) {
        to[i] = piece[i] + (add ? to[i] : 0.f);
      }
    }
  }
}

// Adds the entries of `work` to gradients that begin at zero, in the columns of a chunk, by a team of
// kBackwardShapes[kIndex]. kGiven: the dot products are in a.dots. `memory`: backward_team_bytes of shared memory, in
// which nothing is on its way any more at the end. `on_batch(left)` is called in front of every batch.
template <class Team, class Row, int kIndex, bool kAligned, bool kGiven, class OnBatch>
RK_LANE void sum_entries(
    const BackwardArgs& a, const Work& work, int chunk, unsigned char* memory,
    float (&dW_dec)[kBackwardShapes[kIndex].pieces][Row::kVector],
    float (&dW_enc)[kBackwardShapes[kIndex].pieces][Row::kVector], float& db_enc, const OnBatch& on_batch) {
  constexpr BackwardShape kShape = kBackwardShapes[kIndex];
  constexpr int kVector = Row::kVector, kPieces = kShape.pieces, kBatch = kShape.batch, kStages = kShape.stages;
  using Element = typename Row::Element;
  // Everything below begins at the thread's first piece; its others are kStride bytes or kColumns columns further on.
  // Pieces behind the end of the row are zeros in the ring: no branch in what adds up.
  constexpr int kStride = Team::kThreads * 16, kColumns = Team::kThreads * kVector, kRow = kPieces * kStride;
  const int first = chunk * kPieces * kColumns + Team::rank() * kVector;  // column
  const int columns = a.d - first;
  const Element* const e = static_cast<const Element*>(a.e) + first;
  const Element* const x = static_cast<const Element*>(a.x) + first;
  const float* b_dec = a.b_dec;
  if (b_dec != nullptr) {
    b_dec = row_of(b_dec, work.latent / a.head_latents, a.d) + first;
  }
  unsigned char* const ring = memory + Team::rank() * 16;
  unsigned char* const decoder = ring + kStages * kBatch * 2 * kRow;
  float* const sums = reinterpret_cast<float*>(memory + (kStages * kBatch * 2 + 1) * kRow);

  // A batch's entries are read one batch before its rows are asked for, and its values again when they come. A filler
  // (value 0) and what lies behind the end are rows of zeros: neither has a gradient, and 0 times an infinity in a row
  // would be NaN.
  int64_t position = work.begin;
  int left = static_cast<int>(work.end - work.begin);
  const auto value_at = [&](int ahead) {
    return ahead < left ? Row::to_float(static_cast<const Element*>(a.values)[position + ahead]) : 0.f;
  };
  int32_t token[kBatch];  // -1: zeros
  const auto read_entries = [&](int ahead) {
    RK_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      const int32_t row = ahead + u < left ? a.tokens[position + ahead + u] : -1;
      token[u] = value_at(ahead + u) != 0.f ? row : -1;
    }
  };
  const auto ask_for_rows = [&](int stage) {
    RK_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      const bool live = token[u] >= 0;
      const int64_t row = static_cast<int64_t>(live ? token[u] : 0) * a.d;
      unsigned char* const slot = ring + (stage * kBatch + u) * 2 * kRow;
      RK_UNROLL
      for (int p = 0; p < kPieces; ++p) {
        copy_piece<Team, Row, kAligned>(slot + p * kStride, e + row + p * kColumns, columns - p * kColumns, live);
        copy_piece<Team, Row, kAligned>(
            slot + kRow + p * kStride, x + row + p * kColumns, columns - p * kColumns, live);
      }
    }
    Team::commit();  // an empty group too: groups are waited for by their number
  };
  if constexpr (!kGiven) {  // arrives with the first batch
    const Element* const weights = row_of(static_cast<const Element*>(a.W_dec), work.latent, a.d) + first;
    RK_UNROLL
    for (int p = 0; p < kPieces; ++p) {
      copy_piece<Team, Row, kAligned>(decoder + p * kStride, weights + p * kColumns, columns - p * kColumns, true);
    }
  }
  RK_UNROLL
  for (int s = 0; s < kStages - 1; ++s) {
    read_entries(s * kBatch);
    ask_for_rows(s);
  }
  read_entries((kStages - 1) * kBatch);

  int stage = 0;
  for (; left > 0; position += kBatch, left -= kBatch) {
    on_batch(left);
    // The slots that the last round has read take the batch that is kStages - 1 further on.
    ask_for_rows(stage == 0 ? kStages - 1 : stage - 1);
    read_entries(kStages * kBatch);
    Team::template wait<kStages - 1>();
    const unsigned char* const batch = ring + stage * kBatch * 2 * kRow;
    const float scale = *a.scale;  // from L1, as the values: it would take a register through the sums below
    float dot[kBatch] = {}, code[kBatch];
    RK_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      code[u] = value_at(u);
    }
    if constexpr (kGiven) {
      RK_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        dot[u] = u < left ? a.dots[position + u] : 0.f;
      }
    } else {
      RK_UNROLL
      for (int p = 0; p < kPieces; ++p) {
        float weight[kVector], error[kVector];
        Row::unpack(Team::from_ring(decoder + p * kStride), weight);
        RK_UNROLL
        for (int u = 0; u < kBatch; ++u) {
          Row::unpack(Team::from_ring(batch + u * 2 * kRow + p * kStride), error);
          RK_UNROLL
          for (int i = 0; i < kVector; ++i) {
            dot[u] += error[i] * weight[i];
          }
        }
      }
      sum_over_team<Team>(dot, sums + stage * kBatch * (Team::kThreads / 32));
    }
    RK_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      dot[u] = code[u] != 0.f ? dot[u] * scale : 0.f;
      code[u] *= scale;
      db_enc += dot[u];
    }
    RK_UNROLL
    for (int p = 0; p < kPieces; ++p) {
      const unsigned char* const slot = batch + p * kStride;
      float row[kVector], centre[kVector];
      Team::not_before_here();
      RK_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        Row::unpack(Team::from_ring(slot + u * 2 * kRow), row);
        RK_UNROLL
        for (int i = 0; i < kVector; ++i) {
          dW_dec[p][i] += code[u] * row[i];
        }
      }
      // From L1 every time: in registers b_dec would cost as many as a gradient row.
      RK_UNROLL
      for (int i = 0; i < kVector; i += 4) {
        const int there = b_dec == nullptr ? 0 : columns - p * kColumns - i;
        const Quad four = read_quad<kAligned>(b_dec + p * kColumns + i, there);
        RK_UNROLL
        for (int j = 0; j < 4; ++j) {
          centre[i + j] = four.number[j];
        }
      }
      RK_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        Row::unpack(Team::from_ring(slot + (u * 2 + 1) * kRow), row);
        RK_UNROLL
        for (int i = 0; i < kVector; ++i) {
          dW_enc[p][i] += dot[u] * (row[i] - centre[i]);
        }
      }
    }
    stage = stage + 1 < kStages ? stage + 1 : 0;
  }

  Team::template wait<0>();  // for the zeros behind the last entry: their place may be asked for again
}

// dW_dec, dW_enc, db_enc of a program's entries, in the columns of a chunk.
template <class Team, class Row, int kIndex, bool kAligned, bool kGiven>
RK_LANE void add_entries(const BackwardArgs& a, int program, int chunk, unsigned char* memory) {
  constexpr BackwardShape kShape = kBackwardShapes[kIndex];
  constexpr int kVector = Row::kVector, kPieces = kShape.pieces;
  constexpr int kColumns = Team::kThreads * kVector;
  const Work work = work_of(a, program);
  if (!work.active) {
    return;
  }
  float dW_dec[kPieces][kVector] = {}, dW_enc[kPieces][kVector] = {}, db_enc = 0;
  sum_entries<Team, Row, kIndex, kAligned, kGiven>(a, work, chunk, memory, dW_dec, dW_enc, db_enc, [](int) {});

  const int first = chunk * kPieces * kColumns + Team::rank() * kVector;
  const int columns = a.d - first;
  const bool hot = program < a.segments, add = a.accumulate && !hot;
  const int row = hot ? program : program - a.segments;  // of the parts; the latent
  float* const dec = row_of(hot ? a.part_dec : a.dW_dec, row, a.d) + first;
  float* const enc = row_of(hot ? a.part_enc : a.dW_enc, row, a.d) + first;
  RK_UNROLL
  for (int p = 0; p < kPieces; ++p) {
    emit<kAligned>(dec + p * kColumns, columns - p * kColumns, dW_dec[p], add);
    emit<kAligned>(enc + p * kColumns, columns - p * kColumns, dW_enc[p], add);
  }
  if (Team::rank() == 0 && chunk == 0) {
    float* const db = (hot ? a.part_db : a.db_enc) + row;
    *db = db_enc + (add ? *db : 0.f);
  }
}

// a.dots of a program's entries, for rows that are wider than a chunk.
template <class Team, class Row, int kBatch, bool kAligned>
RK_LANE void dot_entries(const BackwardArgs& a, int program, float* sums) {
  using Element = typename Row::Element;
  constexpr int kVector = Row::kVector;
  const Work work = work_of(a, program);
  if (!work.active) {
    return;
  }
  const Element* const weights = row_of(static_cast<const Element*>(a.W_dec), work.latent, a.d);
  int odd = 0;
  for (int64_t position = work.begin; position < work.end; position += kBatch) {
    const Element* row[kBatch];
    bool live[kBatch];
    float dot[kBatch] = {};
    RK_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      live[u] = position + u < work.end && Row::to_float(static_cast<const Element*>(a.values)[position + u]) != 0.f;
      row[u] = static_cast<const Element*>(a.e) + (live[u] ? static_cast<int64_t>(a.tokens[position + u]) * a.d : 0);
    }
    for (int column = Team::rank() * kVector; column < a.d; column += Team::kThreads * kVector) {
      const auto piece = [&](const Element* from, float (&to)[kVector]) {
        Row::unpack(read_piece<Team, Row, kAligned>(from + column, a.d - column), to);
      };
      float weight[kVector], error[kVector];
      piece(weights, weight);
      RK_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        piece(row[u], error);
        RK_UNROLL
        for (int i = 0; i < kVector; ++i) {
          dot[u] += error[i] * weight[i];
        }
      }
    }
    sum_over_team<Team>(dot, sums + odd * kBatch * (Team::kThreads / 32));
    odd ^= 1;
    if (Team::rank() == 0) {
      RK_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        if (position + u < work.end) {
          a.dots[position + u] = live[u] ? dot[u] : 0.f;
        }
      }
    }
  }
}

// A column (d: db_enc) of a hot latent's gradients, by the program of its first segment: the parts, in their order.
RK_LANE void combine_parts(const BackwardArgs& a, int program, int column) {
  const int64_t latent = a.segment_latent[program];
  if (latent >= a.latents) {
    return;
  }
  const int64_t count = a.offsets[latent + 1] - a.offsets[latent];
  const int64_t end = a.ends[latent], first = end - segments_of(a, count);
  if (first != program) {
    return;
  }
  const bool bias = column == a.d;
  const int64_t d = bias ? 1 : a.d;
  const auto combine = [&](const float* parts, float* out) {
    float total = 0;
    for (int64_t part = first; part < end; ++part) {
      total += parts[part * d];
    }
    *out = total + (a.accumulate ? *out : 0.f);
  };
  if (bias) {
    combine(a.part_db, a.db_enc + latent);
  } else {
    combine(a.part_dec + column, a.dW_dec + latent * d + column);
    combine(a.part_enc + column, a.dW_enc + latent * d + column);
  }
}

}  // namespace rk::cuda
