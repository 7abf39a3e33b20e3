// A block's part of the projection: G -= s U (U^T G) on a slab of 16 fibres, with the other blocks of its team.
//
//   1. coefficients   the slab's rows go through a ring of shared memory, U^T G of each lane's share into registers
//   2. sum_of_crews   the crews' sums in their order: the slab's part of U^T G, in shared memory
//   3. sum_of_team    the parts of the team's slabs in their order, each block a share of them, given to all
//   4. update         the tiles again, the last one first: those that the ring still holds are not read again
//
// Products are fp32 FMA. A 16-bit number is widened in its slot when it has arrived. Columns of the basis from r on,
// rows from the slab's end on and fibres from the last on are zeros in shared memory: only copies and stores know of
// them. Every sum has one order: the same input gives the same bits, with clusters and without.
//
// `Block` is what the threads share: on a GPU the hardware's (projection.cu), in a test fibers on the CPU. All threads
// of a block call these functions together.
#pragma once

#include <cstdint>

#include "lane.h"
#include "projection.h"

#ifdef __CUDACC__
#define RK_ROLLED _Pragma("unroll 1")
#else
#define RK_ROLLED
#endif

namespace rk::cuda {

template <int kNumbers>
struct alignas(kNumbers * 4) Floats {
  float number[kNumbers];
};
using Four = Floats<4>;

template <int kNumbers>
struct alignas(kNumbers * 2) Halves {
  uint16_t number[kNumbers];
};

// Every lane of a group of kLanes, kDistance from each other, brings kValues numbers and gets kValues / kLanes of the sums
// over the group: those from its number in the group times that many on. Destroys `value`. kOwnFirst: a lane brings its
// numbers in the order of their distance (xor) from the first that it gets, so that it never has to choose between two
// registers.
template <class Block, int kLanes, int kDistance, bool kOwnFirst, int kValues>
RK_LANE void reduce_scatter(float (&value)[kValues]) {
  RK_UNROLL
  for (int half = kLanes / 2, kept = kValues / 2; half > 0; half /= 2, kept /= 2) {
    const bool upper = !kOwnFirst && Block::lane() / (kDistance * half) % 2 != 0;
    RK_UNROLL
    for (int i = 0; i < kValues / 2; ++i) {
      if (i < kept) {
        const float own = upper ? value[i + kept] : value[i];
        const float other = upper ? value[i] : value[i + kept];
        value[i] = own + Block::shuffle_xor(other, kDistance * half);
      }
    }
  }
}

template <class Block, int kIndex>
struct Slab {
  static constexpr ProjectionShape kShape = kProjectionShapes[kIndex];
  static constexpr int kRanks = kShape.ranks, kStages = kShape.stages, kRows = kShape.crew_rows();
  static constexpr int kRankLanes = kShape.rank_lanes(), kFibreLanes = kShape.fibre_lanes();
  static constexpr int kRowLanes = kShape.row_lanes(), kCrewWarps = kShape.crew_warps();
  static constexpr int kCrewThreads = 32 * kCrewWarps, kCrews = kShape.crews();
  static constexpr int kSlotBytes = kShape.slot_bytes(), kTileRows = kShape.rows(), kNumbers = kShape.numbers();
  static constexpr int kHalf = kRanks / 2;  // a lane's 8 columns are 4 in each half: 16-byte loads without conflicts

  unsigned char* const slots;  // of the crew
  float* const part;           // of the block, [kRanks, 16]
  float* const sums;           // of the team
  int64_t* const places;       // of the block's fibres in `numbers`
  const ProjectionMatrix& m;   // in shared memory: what is read through a reference is read again after every copy
  int fibres, begin, end, tiles;
  int crew, member, rank_lane, fibre_lane, row_lane;

  RK_LANE Slab(const ProjectionMatrix& matrix, const ProjectionItem& item, unsigned char* memory)
      : slots(memory + Block::thread() / kCrewThreads * kStages * kSlotBytes),
        part(reinterpret_cast<float*>(memory + kCrews * kStages * kSlotBytes)),
        sums(part + kNumbers),
        places(reinterpret_cast<int64_t*>(sums + kNumbers)),
        m(*reinterpret_cast<const ProjectionMatrix*>(places + kBlockFibres)) {
    if (Block::thread() < kMatrixBytes / 8) {
      places[kBlockFibres + Block::thread()] = reinterpret_cast<const int64_t*>(&matrix)[Block::thread()];
    }
    Block::barrier();
    const int64_t first = static_cast<int64_t>(item.fibres) * kBlockFibres;
    fibres = static_cast<int>(m.fibres - first < kBlockFibres ? m.fibres - first : kBlockFibres);
    const int64_t all = (m.n + kTileRows - 1) / kTileRows;
    const int64_t rows = (all + item.team - 1) / item.team * kTileRows, from = item.rank * rows;
    begin = static_cast<int>(from < m.n ? from : m.n);
    end = static_cast<int>(from + rows < m.n ? from + rows : m.n);
    tiles = (end - begin + kTileRows - 1) / kTileRows;
    crew = Block::thread() / kCrewThreads;
    member = Block::thread() % kCrewThreads;
    const int lane = Block::lane();
    rank_lane = lane % kRankLanes;
    fibre_lane = kFibreLanes == 2 ? lane / kRankLanes % 2 : Block::thread() / 32 % 2;
    row_lane = lane / (kRankLanes * kFibreLanes);
    if (Block::thread() < kBlockFibres) {
      const int64_t fibre = first + Block::thread();
      places[Block::thread()] = fibre / m.inner * m.outer_stride + fibre % m.inner * m.inner_stride;
    }
    Block::barrier();
  }

  // Column, of the padded basis, of a lane's i-th of 8; and its fibre.
  RK_LANE int column(int i) const {
    return (i / 4) * kHalf + rank_lane * 4 + i % 4;
  }
  RK_LANE int fibre(int i) const {
    return (i / 4) * 8 + fibre_lane * 4 + i % 4;
  }
  // A lane's i-th of 4 rows in its crew's slot.
  RK_LANE int row(int i) const {
    return i * kRowLanes + row_lane;
  }
  RK_LANE float* basis_in(int tile) const {
    return reinterpret_cast<float*>(slots + tile % kStages * kSlotBytes);
  }
  RK_LANE float* matrix_in(int tile) const {
    return basis_in(tile) + kRows * kRanks;
  }
  RK_LANE int first_row(int tile) const {
    return begin + tile * kTileRows + crew * kRows;
  }

  // ---- copies --------------------------------------------------------------------------------------------------------

  // Asks for the crew's rows of a tile. An empty group too: groups are waited for by their number.
  RK_LANE void ask_for(int tile, bool wanted) const {
    if (wanted) {
      ask_for_basis(tile);
      ask_for_matrix(tile);
    }
    Block::commit();
  }

  RK_LANE void ask_for_basis(int tile) const {
    constexpr int kQuads = kRanks / 4;
    static_assert(kRows * kQuads == 4 * kCrewThreads);
    const int first = first_row(tile), r = m.r;
    const float* const basis = m.basis;
    const bool wide = m.wide_basis != 0;
    float* const to = basis_in(tile);
    if (wide && r == kRanks && first + kRows <= end) {  // one piece of memory
      const float* const from = basis + static_cast<int64_t>(first) * kRanks + member * 4;
      RK_UNROLL
      for (int i = 0; i < 4 * kCrewThreads; i += kCrewThreads) {
        Block::copy16(to + (member + i) * 4, from + i * 4, 16);
      }
      return;
    }
    RK_ROLLED  // beside 64 sums there is no room for more than one address
        for (int i = 0; i < 4; ++i) {
      const int at = member + i * kCrewThreads, row = first + at / kQuads, column = at % kQuads * 4;
      const int there = row < end ? r - column : 0;
      const float* const from = basis + (there > 0 ? static_cast<int64_t>(row) * r + column : 0);
      if (wide) {
        Block::copy16(to + at * 4, from, there > 0 ? 16 : 0);
      } else {
        RK_UNROLL
        for (int j = 0; j < 4; ++j) {
          Block::copy4(to + at * 4 + j, j < there ? from + j : basis, j < there ? 4 : 0);
        }
      }
    }
  }

  RK_LANE void ask_for_matrix(int tile) const {
    const int first = first_row(tile);
    float* const to = matrix_in(tile);
    const int64_t stride = m.row_stride;
    const Way way = m.way;
    const RowType type = m.type;
    const float* const singles = static_cast<const float*>(m.numbers);
    const uint16_t* const halves = static_cast<const uint16_t*>(m.numbers);
    const auto place = [&](int row, int fibre) { return (first + row) * stride + places[fibre]; };
    const auto live = [&](int row, int fibre) { return first + row < end && fibre < fibres; };
    if (way == Way::kWide32) {
      RK_ROLLED
      for (int at = member; at < kRows * 4; at += kCrewThreads) {
        const int row = at / 4, fibre = at % 4 * 4, there = live(row, fibre) ? fibres - fibre : 0;
        Block::copy16(to + at * 4, singles + (there > 0 ? place(row, fibre) : 0), there < 4 ? there * 4 : 16);
      }
    } else if (way == Way::kWide16) {
      RK_ROLLED
      for (int at = member; at < kRows * 2; at += kCrewThreads) {
        const int row = at / 2, fibre = at % 2 * 8, there = live(row, fibre) ? fibres - fibre : 0;
        Block::copy16(to + at * 4, halves + (there > 0 ? place(row, fibre) : 0), there < 8 ? there * 2 : 16);
      }
    } else if (way == Way::kPairs16) {
      RK_ROLLED
      for (int at = member; at < kRows * 8; at += kCrewThreads) {
        const int pair = at % (kRows / 2), fibre = at / (kRows / 2);
        const int there = live(2 * pair, fibre) ? (live(2 * pair + 1, fibre) ? 4 : 2) : 0;
        Block::copy4(to + pair * kBlockFibres + fibre, halves + (there > 0 ? place(2 * pair, fibre) : 0), there);
      }
    } else {
      // Neighbouring lanes take neighbours in memory.
      const bool along_rows = stride == 1;
      RK_ROLLED
      for (int at = member; at < kRows * kBlockFibres; at += kCrewThreads) {
        const int row = along_rows ? at % kRows : at / kBlockFibres;
        const int fibre = along_rows ? at / kRows : at % kBlockFibres;
        const bool there = live(row, fibre);
        float* const target = to + row * kBlockFibres + fibre;
        if (way == Way::kWords) {
          Block::copy4(target, singles + (there ? place(row, fibre) : 0), there ? 4 : 0);
        } else {
          *target = there ? Block::widen(type, halves[place(row, fibre)]) : 0.f;
        }
      }
    }
  }

  // Until the tile of the oldest group is there for the whole crew, and the slot of the last round may be filled.
  RK_LANE void wait() const {
    Block::template wait<kStages - 2>();
    Block::template crew_barrier<kCrewWarps>(crew);
  }

  // 16-bit numbers as they arrived become [kRows, 16] fp32 in the same place.
  RK_LANE void widen(int tile) const {
    if (m.way != Way::kWide16 && m.way != Way::kPairs16) {
      return;
    }
    constexpr int kWords = kRows * 8, kOwn = (kWords + kCrewThreads - 1) / kCrewThreads;
    float* const numbers = matrix_in(tile);
    uint32_t word[kOwn];
    RK_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      const int at = member + i * kCrewThreads;
      word[i] = at < kWords ? reinterpret_cast<const uint32_t*>(numbers)[at] : 0;
    }
    Block::template crew_barrier<kCrewWarps>(crew);
    RK_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      const int at = member + i * kCrewThreads;
      const bool pair = m.way == Way::kPairs16;
      const int low = pair ? at / kBlockFibres * 2 * kBlockFibres + at % kBlockFibres : 2 * at;
      if (at < kWords) {
        numbers[low] = Block::widen(m.type, static_cast<uint16_t>(word[i] & 0xffffu));
        numbers[low + (pair ? kBlockFibres : 1)] = Block::widen(m.type, static_cast<uint16_t>(word[i] >> 16));
      }
    }
    Block::template crew_barrier<kCrewWarps>(crew);
  }

  // ---- sums ----------------------------------------------------------------------------------------------------------

  static RK_LANE void read8(const float* low, const float* high, float (&to)[8]) {
    const Four a = *reinterpret_cast<const Four*>(low), b = *reinterpret_cast<const Four*>(high);
    RK_UNROLL
    for (int i = 0; i < 4; ++i) {
      to[i] = a.number[i];
      to[4 + i] = b.number[i];
    }
  }
  RK_LANE void read_basis(int tile, int i, float (&u)[8]) const {
    const float* const at = basis_in(tile) + row(i) * kRanks + column(0);
    read8(at, at + kHalf, u);
  }

  // The slab's part of U^T G, into `part`.
  RK_LANE void coefficients() const {
    float sum[64] = {};  // [8 columns, 8 fibres]
    for (int tile = 0; tile < kStages - 1; ++tile) {
      ask_for(tile, tile < tiles);
    }
    for (int tile = 0; tile < tiles; ++tile) {
      wait();
      ask_for(tile + kStages - 1, tile + kStages - 1 < tiles);
      widen(tile);
      RK_ROLLED  // other warps hide the loads; these sums and two rows' operands would not fit
          for (int i = 0; i < 4; ++i) {
        float u[8], g[8];
        read_basis(tile, i, u);
        const float* const at = matrix_in(tile) + row(i) * kBlockFibres + fibre(0);
        read8(at, at + 8, g);
        RK_UNROLL
        for (int j = 0; j < 64; ++j) {
          sum[j] += u[j / 8] * g[j % 8];
        }
      }
    }
    sum_of_crews(sum);
  }

  RK_LANE void sum_of_crews(float (&sum)[64]) const {
    constexpr int kOwn = 64 / kRowLanes;
    reduce_scatter<Block, kRowLanes, kRankLanes * kFibreLanes, false>(sum);
    for (int turn = 0; turn < kCrews; ++turn) {
      if (turn == crew) {
        // Every row lane has its share of the 64: which, is known at run time only.
        RK_UNROLL
        for (int i = 0; i < kOwn; ++i) {
          const int j = row_lane * kOwn + i;
          float* const to = part + column(j / 8) * kBlockFibres + fibre(j % 8);
          *to = sum[i] + (turn > 0 ? *to : 0.f);
        }
      }
      Block::barrier();
    }
  }

  // Adds up the parts of a team that lie in its blocks' shared memory. A cluster's barrier before it and one after it.
  RK_LANE void sum_of_team(int rank, int team) const {
    const int first = Block::cluster_rank() - rank, share = kNumbers / 4 / team;
    for (int i = Block::thread(); i < share; i += kProjectionThreads) {
      const int at = (rank * share + i) * 4;
      Four total = {};
      for (int other = 0; other < team; ++other) {
        const Four more = *reinterpret_cast<const Four*>(Block::remote(part + at, first + other));
        RK_UNROLL
        for (int j = 0; j < 4; ++j) {
          total.number[j] += more.number[j];
        }
      }
      for (int other = 0; other < team; ++other) {
        *reinterpret_cast<Four*>(Block::remote(sums + at, first + other)) = total;
      }
    }
  }

  // The same from device memory; `parts`: of the first block of the team.
  RK_LANE void sum_of_parts(const float* parts, int team) const {
    for (int i = Block::thread(); i < kNumbers; i += kProjectionThreads) {
      float total = 0;
      for (int other = 0; other < team; ++other) {
        total += parts[static_cast<int64_t>(other) * kNumbers + i];
      }
      sums[i] = total;
    }
    Block::barrier();
  }

  // ---- update --------------------------------------------------------------------------------------------------------

  // Strength where a fibre is to be projected, else 0, for the lane's 8 fibres, in the order of first ^ i.
  RK_LANE void choose(float strength, int first, float (&factor)[8]) const {
    constexpr int kParts = kRanks < 16 ? kRanks : 16;
    if (m.against != nullptr) {
      // `part` is free: the team has read it.
      if (Block::thread() < kParts * kBlockFibres) {
        float product = 0;
        for (int rank = Block::thread() / kBlockFibres; rank < m.r; rank += kParts) {
          product += m.against[rank] * sums[rank * kBlockFibres + Block::thread() % kBlockFibres];
        }
        part[Block::thread()] = product;
      }
      Block::barrier();
    }
    RK_UNROLL
    for (int i = 0; i < 8; ++i) {
      factor[i] = strength;
      if (m.against != nullptr) {
        float product = 0;
        for (int other = 0; other < kParts; ++other) {
          product += part[other * kBlockFibres + fibre(i ^ first)];
        }
        factor[i] = product < 0.f ? strength : 0.f;
      }
    }
  }

  // kResident: the ring holds the last tiles.
  template <bool kResident>
  RK_LANE void update(float strength) const {
    // Rows whose changes a warp adds up over its rank lanes together: every lane gets one number at least.
    constexpr int kBatch = kRankLanes < 8 ? 1 : kRankLanes == 32 ? 4 : 2;
    constexpr int kOwn = kBatch * 8 / kRankLanes, kWide = kOwn < 4 ? kOwn : 4;
    const int own = rank_lane * kOwn;  // of [kBatch rows, 8 fibres]; the lane's numbers are in the order of own ^ i
    float factor[8], c[64];            // [8 columns, 8 fibres]
    choose(strength, own % 8, factor);
    RK_UNROLL
    for (int i = 0; i < 64; ++i) {
      const float number = sums[column(i / 8) * kBlockFibres + fibre(i % 8 ^ own % 8)];
      c[i] = factor[i % 8] != 0.f ? number * factor[i % 8] : 0.f;  // a fibre left alone may have NaN
    }
    if (!kResident) {
      for (int back = 1; back < kStages; ++back) {
        ask_for(tiles - back, tiles - back >= 0);
      }
    }
    for (int tile = tiles - 1; tile >= 0; --tile) {
      wait();
      const int next = tile + 1 - kStages;  // into the slot of tile + 1
      ask_for(next, next >= 0 && (!kResident || tile + 1 < tiles));
      if (!kResident || tile < tiles - kStages) {
        widen(tile);
      }
      RK_ROLLED
      for (int first = 0; first < 4; first += kBatch) {
        float change[kBatch * 8] = {};  // [rows, 8 fibres]
        RK_UNROLL
        for (int i = 0; i < kBatch; ++i) {
          float u[8];
          read_basis(tile, first + (i ^ own / 8), u);
          RK_UNROLL
          for (int j = 0; j < 64; ++j) {
            change[i * 8 + j % 8] += u[j / 8] * c[j];
          }
        }
        reduce_scatter<Block, kRankLanes, 1, true>(change);
        RK_UNROLL
        for (int i = 0; i < kOwn; i += kWide) {
          const int at = own + i;
          store<kWide>(tile, row(first + at / 8), fibre(at % 8), change + i);
        }
      }
    }
  }

  // Numbers of neighbouring fibres of a row in a slot, less a change.
  template <int kWide>
  RK_LANE void store(int tile, int row, int fibre, const float* change) const {
    Floats<kWide> left = *reinterpret_cast<const Floats<kWide>*>(matrix_in(tile) + row * kBlockFibres + fibre);
    RK_UNROLL
    for (int i = 0; i < kWide; ++i) {
      left.number[i] -= change[i];
    }
    const int64_t at = first_row(tile) + row;
    if (at >= end) {
      return;
    }
    float* const singles = static_cast<float*>(m.numbers) + at * m.row_stride;
    uint16_t* const halves = static_cast<uint16_t*>(m.numbers) + at * m.row_stride;
    if (m.way == Way::kWide32 && fibre + kWide <= fibres) {
      *reinterpret_cast<Floats<kWide>*>(singles + places[fibre]) = left;
      return;
    }
    Halves<kWide> narrow;
    if (m.type != RowType::kFloat32) {
      RK_UNROLL
      for (int i = 0; i < kWide; ++i) {
        narrow.number[i] = Block::narrow(m.type, left.number[i]);
      }
      if (m.way == Way::kWide16 && fibre + kWide <= fibres) {
        *reinterpret_cast<Halves<kWide>*>(halves + places[fibre]) = narrow;
        return;
      }
    }
    RK_UNROLL
    for (int i = 0; i < kWide; ++i) {
      if (fibre + i < fibres) {
        if (m.type == RowType::kFloat32) {
          singles[places[fibre + i]] = left.number[i];
        } else {
          halves[places[fibre + i]] = narrow.number[i];
        }
      }
    }
  }
};

RK_LANE ProjectionItem item_of(const ProjectionArgs& a, int block) {
  if (a.table == nullptr) {
    return {0, block / a.single_team, block % a.single_team, a.single_team};
  }
  return a.items[block];
}

RK_LANE const ProjectionMatrix& matrix_of(const ProjectionArgs& a, const ProjectionItem& item) {
  return a.table == nullptr ? a.single : a.table[item.matrix];
}

// One launch, in clusters.
template <class Block, int kIndex>
RK_LANE void project_in_cluster(const ProjectionArgs& a, int block, unsigned char* memory) {
  const ProjectionItem item = item_of(a, block);
  if (item.matrix < 0) {
    Block::cluster_barrier();
    Block::cluster_barrier();
    return;
  }
  const Slab<Block, kIndex> slab(matrix_of(a, item), item, memory);
  slab.coefficients();
  Block::cluster_barrier();
  slab.sum_of_team(item.rank, item.team);
  Block::cluster_barrier();  // from here on no block touches another's memory
  slab.template update<true>(a.strength);
}

// Without clusters, in two launches.
template <class Block, int kIndex>
RK_LANE void parts_of_block(const ProjectionArgs& a, int block, unsigned char* memory) {
  constexpr int kNumbers = Slab<Block, kIndex>::kNumbers;
  const ProjectionItem item = item_of(a, block);
  if (item.matrix < 0) {
    return;
  }
  const Slab<Block, kIndex> slab(matrix_of(a, item), item, memory);
  slab.coefficients();
  for (int i = Block::thread(); i < kNumbers; i += kProjectionThreads) {
    a.parts[static_cast<int64_t>(block) * kNumbers + i] = slab.part[i];
  }
}

template <class Block, int kIndex>
RK_LANE void update_of_block(const ProjectionArgs& a, int block, unsigned char* memory) {
  constexpr int kNumbers = Slab<Block, kIndex>::kNumbers;
  const ProjectionItem item = item_of(a, block);
  if (item.matrix < 0) {
    return;
  }
  const Slab<Block, kIndex> slab(matrix_of(a, item), item, memory);
  slab.sum_of_parts(a.parts + static_cast<int64_t>(block - item.rank) * kNumbers, item.team);
  slab.template update<false>(a.strength);
}

}  // namespace rk::cuda
