// Host interface of projection.cu: the table of a group, its launch plan, the launcher. Free of torch and of the CUDA
// headers.
#pragma once

#include <cstdint>
#include <vector>

#include "sparse_decode.h"

namespace rk::cuda {

inline constexpr int kBlockFibres = 16;  // of a block: the rank of a LoRA
inline constexpr int kProjectionThreads = 256;
inline constexpr int kClusterBlocks = 8;  // of a cluster: the most that every device with clusters takes
inline constexpr int kMostRanks = 256;
inline constexpr int kMatrixBytes = 88;

// How a warp's lanes share a row of the basis and 16 fibres of the matrix: a lane has 8 columns of the basis, 8 fibres
// and every row_lanes-th row, so 64 sums, which stay in registers. A crew (a warp, or two where a warp has 8 fibres)
// works on 4 row_lanes neighbouring rows in a slot of its own: warps do not wait for each other. Row by row, the crews'
// slots of one stage make a tile.
struct ProjectionShape {
  int ranks;   // columns of the basis, padded with zeros
  int stages;  // slots of a crew

  constexpr int rank_lanes() const {
    return ranks / 8;
  }
  constexpr int fibre_lanes() const {
    return rank_lanes() < 32 ? 2 : 1;
  }
  constexpr int row_lanes() const {
    return 32 / (rank_lanes() * fibre_lanes());
  }
  constexpr int crew_warps() const {
    return 2 / fibre_lanes();
  }
  constexpr int crews() const {
    return kProjectionThreads / 32 / crew_warps();
  }
  constexpr int crew_rows() const {
    return 4 * row_lanes();
  }
  constexpr int rows() const {  // of a tile
    return crews() * crew_rows();
  }
  constexpr int slot_bytes() const {
    return crew_rows() * (ranks + kBlockFibres) * 4;
  }
  constexpr int numbers() const {  // of U^T G
    return ranks * kBlockFibres;
  }
  // The crews' slots; the block's part of U^T G and the sum of all parts; where its fibres begin; its matrix. Two blocks
  // a multiprocessor where it has 228 KB, one where it has 100.
  constexpr int shared_bytes() const {
    return crews() * stages * slot_bytes() + 2 * numbers() * 4 + kBlockFibres * 8 + kMatrixBytes;
  }
};

inline constexpr ProjectionShape kProjectionShapes[] = {{8, 2}, {16, 3}, {32, 3}, {64, 4}, {128, 4}, {256, 3}};
inline constexpr int kProjectionForms = 6;

// The narrowest shape for a basis of r columns, 1 <= r <= kMostRanks.
inline constexpr int projection_shape(int64_t r) {
  int shape = 0;
  while (kProjectionShapes[shape].ranks < r) {
    ++shape;
  }
  return shape;
}

// Blocks that share 16 fibres of n numbers, a power of two. Each has a slab of whole tiles, four or more where the team
// is larger than one; the last slabs may have fewer, or none.
inline constexpr int projection_team(int64_t n, const ProjectionShape& shape) {
  int team = 1;
  while (team < kClusterBlocks && n >= int64_t{2} * team * 4 * shape.rows()) {
    team *= 2;
  }
  return team;
}

// How numbers of a matrix come to shared memory.
enum class Way : int32_t {
  kWide32,    // fp32, 16 bytes of neighbouring fibres
  kWords,     // fp32, one by one: any strides
  kWide16,    // 16-bit, 16 bytes of neighbouring fibres
  kPairs16,   // 16-bit, two neighbouring rows of a fibre
  kElements,  // 16-bit, one by one, through registers
};

// fibres = outer times inner vectors of n numbers; strides in elements. A row of a table in device memory.
struct ProjectionMatrix {
  void* numbers;
  const float* basis;    // [n, r]
  const float* against;  // [r]: only fibres whose product with it is negative are projected; or null
  int64_t row_stride, outer_stride, inner_stride, inner;
  int64_t fibres;
  int32_t n, r;
  RowType type;
  Way way;
  int32_t wide_basis;  // whether rows of the basis begin at 16-byte boundaries
  int32_t unused;
};
static_assert(sizeof(ProjectionMatrix) == kMatrixBytes);

// What a block works on: a slab of 16 fibres of a matrix, with `team` blocks of its cluster, of which it is the rank-th.
struct ProjectionItem {
  int32_t matrix;  // -1: nothing
  int32_t fibres;  // which 16
  int32_t rank, team;
};

struct ProjectionArgs {
  const ProjectionMatrix* table;  // null: `single` is the only matrix, and its blocks are those of the grid in order
  const ProjectionItem* items;    // [blocks]
  float* parts;                   // [blocks, numbers()]: where there are no clusters
  float strength;
  int single_team;
  ProjectionMatrix single;
};

inline void choose_ways(ProjectionMatrix& m) {
  const auto aligned = [](const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const int64_t wide = 16 / row_bytes(m.type);
  const bool whole = m.inner == m.fibres || (m.inner % wide == 0 && m.outer_stride % wide == 0);
  const bool neighbours = m.inner_stride == 1 && whole && m.row_stride % wide == 0 && aligned(m.numbers, 16);
  if (m.type == RowType::kFloat32) {
    m.way = neighbours ? Way::kWide32 : Way::kWords;
  } else if (neighbours) {
    m.way = Way::kWide16;
  } else {
    const bool pairs = m.row_stride == 1 && m.outer_stride % 2 == 0 && m.inner_stride % 2 == 0 && aligned(m.numbers, 4);
    m.way = pairs ? Way::kPairs16 : Way::kElements;
  }
  m.wide_basis = m.r % 4 == 0 && aligned(m.basis, 16);
}

// Adds a tensor's rows to a table: one, or one for every element of the dimensions beyond two that cannot be joined.
// `like` says all but the layout and the ways.
inline void add_matrices(
    std::vector<ProjectionMatrix>& table, ProjectionMatrix like, const std::vector<int64_t>& sizes,
    const std::vector<int64_t>& strides, size_t dim) {
  struct Axis {
    int64_t size, stride;
  };
  std::vector<Axis> axes;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (i == dim || sizes[i] == 1) continue;
    if (!axes.empty() && axes.back().stride == sizes[i] * strides[i]) {
      axes.back() = {axes.back().size * sizes[i], strides[i]};
    } else {
      axes.push_back({sizes[i], strides[i]});
    }
  }
  while (axes.size() < 2) {
    axes.insert(axes.begin(), {1, 0});
  }
  const Axis inner = axes.back(), outer = axes[axes.size() - 2];
  axes.resize(axes.size() - 2);
  int64_t places = 1;
  for (const Axis& axis : axes) {
    places *= axis.size;
  }
  like.n = static_cast<int32_t>(sizes[dim]);
  like.row_stride = strides[dim];
  like.outer_stride = outer.stride;
  like.inner_stride = inner.stride;
  like.inner = inner.size;
  like.fibres = outer.size * inner.size;
  for (int64_t place = 0; place < places; ++place) {
    int64_t offset = 0, rest = place;
    for (size_t i = axes.size(); i-- > 0;) {
      offset += rest % axes[i].size * axes[i].stride;
      rest /= axes[i].size;
    }
    table.push_back(like);
    table.back().numbers = static_cast<char*>(like.numbers) + offset * row_bytes(like.type);
    choose_ways(table.back());
  }
}

inline constexpr int64_t fibre_blocks(int64_t fibres) {
  return (fibres + kBlockFibres - 1) / kBlockFibres;
}

// The items of a table, large teams first, filled up to whole clusters: a team never lies in two of them.
inline std::vector<ProjectionItem> projection_items(
    const std::vector<ProjectionMatrix>& table, const ProjectionShape& shape) {
  std::vector<ProjectionItem> items;
  for (int team = kClusterBlocks; team >= 1; team /= 2) {
    for (size_t i = 0; i < table.size(); ++i) {
      if (projection_team(table[i].n, shape) != team) continue;
      for (int64_t block = 0; block < fibre_blocks(table[i].fibres); ++block) {
        for (int rank = 0; rank < team; ++rank) {
          items.push_back({static_cast<int32_t>(i), static_cast<int32_t>(block), rank, team});
        }
      }
    }
  }
  while (items.size() % kClusterBlocks != 0) {
    items.push_back({-1, 0, 0, 1});
  }
  return items;
}

// Null on success, else the text of the CUDA error. `blocks`: of the grid. Pointers are device pointers, `stream` is a
// cudaStream_t of the current device.
const char* project_out(int shape, const ProjectionArgs& args, int64_t blocks, void* stream);

// Whether the current device runs a shape's blocks in clusters, which need no `parts`.
bool projection_has_clusters(int shape);

}  // namespace rk::cuda
