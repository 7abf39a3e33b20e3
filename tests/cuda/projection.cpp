// projection_block.h on the CPU, for tests/test_cuda_projection.py: the launches of projection.cu, a cluster of blocks (or
// a block) after another.
#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>

#include "projection_block.h"

#include "fibers.h"

namespace {

using namespace rk::cuda;

constexpr int kBlockWarps = kProjectionThreads / 32;

// The threads' functions, as projection_block.h takes them. Threads of all blocks of a cluster are fibers of one run;
// they meet in warps, then in blocks, then in crews of two warps, then all together.
struct EmulatedBlock {
  static inline int blocks;
  static inline size_t block_bytes;
  static inline unsigned char* memory;  // of the cluster's blocks, one after the other

  static int larger_groups() {
    return blocks * (1 + kBlockWarps / 2) + 1;
  }
  static int block() {
    return Fibers::current / kProjectionThreads;
  }
  static int thread() {
    return Fibers::current % kProjectionThreads;
  }
  static int lane() {
    return Fibers::current % 32;
  }
  static float shuffle_xor(float own, int distance) {
    const int self = Fibers::current, warp = self / 32;
    Fibers::brought[self] = own;
    Fibers::meet(warp, 32, "shuffle");
    const float other = Fibers::brought[self ^ distance];
    Fibers::meet(warp, 32, "shuffled");
    return other;
  }
  static void barrier() {
    Fibers::meet(blocks * kBlockWarps + block(), kProjectionThreads, "barrier");
  }
  template <int kWarps>
  static void crew_barrier(int crew) {
    const int group =
        kWarps == 1 ? block() * kBlockWarps + crew : blocks * (kBlockWarps + 1) + block() * kBlockWarps / 2 + crew;
    Fibers::meet(group, 32 * kWarps, "crew");
  }
  static int cluster_rank() {
    return block();
  }
  static void cluster_barrier() {
    Fibers::meet(blocks * kBlockWarps + larger_groups() - 1, blocks * kProjectionThreads, "cluster");
  }
  static float* remote(float* own, int other) {
    if (other < 0 || other >= blocks) Fibers::fail("a block of another cluster");
    const auto offset = reinterpret_cast<unsigned char*>(own) - (memory + block() * block_bytes);
    return reinterpret_cast<float*>(memory + other * block_bytes + offset);
  }
  static void copy16(float* to, const void* from, int bytes) {
    copy(to, from, bytes, 16);
  }
  static void copy4(float* to, const void* from, int bytes) {
    copy(to, from, bytes, 4);
  }
  static void commit() {
    Fibers::commit();
  }
  template <int kPending>
  static void wait() {
    Fibers::wait(kPending);
  }
  static float widen(RowType type, uint16_t x) {
    if (type == RowType::kBFloat16) {
      const uint32_t bits = static_cast<uint32_t>(x) << 16;
      float number;
      std::memcpy(&number, &bits, 4);
      return number;
    }
    _Float16 number;
    std::memcpy(&number, &x, 2);
    return static_cast<float>(number);
  }
  static uint16_t narrow(RowType type, float x) {
    uint16_t result;
    if (type == RowType::kBFloat16) {
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      return x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    const _Float16 number = static_cast<_Float16>(x);
    std::memcpy(&result, &number, 2);
    return result;
  }

  static void copy(float* to, const void* from, int bytes, int size) {
    const unsigned char* const own = memory + block() * block_bytes;
    const unsigned char* const at = reinterpret_cast<unsigned char*>(to);
    if (at < own || at + size > own + block_bytes) Fibers::fail("a copy beyond the block's memory");
    if (bytes > 0) Fibers::check(from, static_cast<size_t>(bytes), static_cast<size_t>(size));
    Fibers::copy(to, from, static_cast<size_t>(bytes), static_cast<size_t>(size));
  }
};

// `work` in every thread of every block, `together` blocks at a time.
template <class F>
void launch(int64_t blocks, int together, size_t bytes, bool reversed, const F& work) {
  constexpr size_t kGuard = 256;  // behind each block's memory: nobody writes there
  EmulatedBlock::blocks = together;
  EmulatedBlock::block_bytes = (bytes + 15) / 16 * 16 + kGuard;
  const size_t all = EmulatedBlock::block_bytes * static_cast<size_t>(together);
  EmulatedBlock::memory = static_cast<unsigned char*>(std::aligned_alloc(16, all));
  const std::unique_ptr<void, decltype(&std::free)> owner(EmulatedBlock::memory, &std::free);
  for (int64_t first = 0; first < blocks; first += together) {
    std::memset(EmulatedBlock::memory, 0xff, all);  // shared memory holds anything at the start of a block
    Fibers::run(
        together * kProjectionThreads,
        [&] {
          const int block = EmulatedBlock::block();
          work(static_cast<int>(first) + block, EmulatedBlock::memory + block * EmulatedBlock::block_bytes);
        },
        reversed, EmulatedBlock::larger_groups());
    for (int block = 0; block < together; ++block) {
      const unsigned char* const end = EmulatedBlock::memory + (block + 1) * EmulatedBlock::block_bytes;
      if (std::any_of(end - kGuard, end, [](unsigned char byte) { return byte != 0xff; })) {
        throw std::runtime_error("a store beyond a block's memory");
      }
    }
  }
}

template <int kIndex>
void run(const ProjectionArgs& args, int64_t blocks, int cluster, bool reversed) {
  const size_t bytes = static_cast<size_t>(kProjectionShapes[kIndex].shared_bytes());
  if (cluster > 0) {
    launch(blocks, cluster, bytes, reversed, [&](int block, unsigned char* memory) {
      project_in_cluster<EmulatedBlock, kIndex>(args, block, memory);
    });
    return;
  }
  launch(blocks, 1, bytes, reversed, [&](int block, unsigned char* memory) {
    parts_of_block<EmulatedBlock, kIndex>(args, block, memory);
  });
  launch(blocks, 1, bytes, reversed, [&](int block, unsigned char* memory) {
    update_of_block<EmulatedBlock, kIndex>(args, block, memory);
  });
}

char* pointer(int64_t number) {
  return reinterpret_cast<char*>(static_cast<uintptr_t>(number));
}

void read_from(const int64_t* readable, int64_t ranges) {
  Fibers::readable.clear();
  for (int64_t i = 0; i < ranges; ++i) {
    Fibers::readable.emplace_back(pointer(readable[2 * i]), pointer(readable[2 * i + 1]));
  }
}

// cluster 0: without.
const char* emulate(ProjectionArgs args, int64_t blocks, int cluster, int shape, bool reversed) {
  static char message[200];
  std::vector<float> parts(cluster > 0 ? 0 : static_cast<size_t>(blocks * kProjectionShapes[shape].numbers()));
  args.parts = parts.data();
  try {
    const auto with = [&]<int kIndex>() { run<kIndex>(args, blocks, cluster, reversed); };
    static_assert(kProjectionForms == 6);
    switch (shape) {
      case 0:
        with.template operator()<0>();
        break;
      case 1:
        with.template operator()<1>();
        break;
      case 2:
        with.template operator()<2>();
        break;
      case 3:
        with.template operator()<3>();
        break;
      case 4:
        with.template operator()<4>();
        break;
      default:
        with.template operator()<5>();
    }
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof message - 1);
    return message;
  }
  return nullptr;
}

}  // namespace

// `entries`: for each tensor address, type, dim, address of its basis, r, address of its direction or 0, number of
// dimensions, sizes, strides. `readable`: begin and end of what may be read. form 0: in clusters, 1: without, 2: a single
// matrix in the arguments. Null on success, else what went wrong; `ways` becomes the set of ways that were taken.
extern "C" const char* emulate_projection(
    const int64_t* entries, int64_t count, const int64_t* readable, int64_t ranges, float strength, int32_t shape,
    int32_t form, int32_t reversed, int32_t* ways, int64_t* blocks) {
  std::vector<ProjectionMatrix> table;
  for (int64_t i = 0; i < count; ++i) {
    ProjectionMatrix like{};
    like.numbers = pointer(entries[0]);
    like.type = static_cast<RowType>(entries[1]);
    like.basis = reinterpret_cast<const float*>(pointer(entries[3]));
    like.r = static_cast<int32_t>(entries[4]);
    like.against = reinterpret_cast<const float*>(pointer(entries[5]));
    const int64_t dims = entries[6], *const sizes = entries + 7, *const strides = sizes + dims;
    add_matrices(table, like, {sizes, strides}, {strides, strides + dims}, static_cast<size_t>(entries[2]));
    entries = strides + dims;
  }
  read_from(readable, ranges);
  *ways = 0;
  for (const ProjectionMatrix& m : table) {
    *ways |= 1 << static_cast<int>(m.way);
  }
  const ProjectionShape& s = kProjectionShapes[shape];
  const std::vector<ProjectionItem> items = projection_items(table, s);
  *blocks = static_cast<int64_t>(items.size());
  ProjectionArgs args{table.data(), items.data(), nullptr, strength, 1, {}};
  int cluster = form == 1 ? 0 : kClusterBlocks;
  if (form == 2) {
    args.table = nullptr;
    args.items = nullptr;
    args.single = table.at(0);
    args.single_team = cluster = projection_team(table[0].n, s);
    *blocks = cluster * fibre_blocks(table[0].fibres);
  }
  return emulate(args, *blocks, cluster, shape, reversed != 0);
}

// The launch of a table and its items as refusal_kernels_cuda::projection_table makes them, in clusters.
extern "C" const char* emulate_table(
    const void* table, const void* items, int64_t blocks, float strength, int32_t shape, const int64_t* readable,
    int64_t ranges) {
  read_from(readable, ranges);
  const ProjectionArgs args{
      static_cast<const ProjectionMatrix*>(table), static_cast<const ProjectionItem*>(items), nullptr, strength, 1, {}};
  return emulate(args, blocks, kClusterBlocks, shape, false);
}

extern "C" int32_t projection_shape_of(int64_t r) {
  return projection_shape(r);
}
