// SPDX-License-Identifier: Apache-2.0
// The two kinds of items of the projection: partial sums of B^T Q over a chunk of rows of Q, and
// rows of P times the finished sum C.
//
// Blocks are taken transposed, C^T = B^T Q, so that a register of the first product's result is
// already a register of the second one's operand: nothing is shuffled in between.
#pragma once

#include "project_stage.cuh"

namespace lorax::projection {

constexpr int kHeadBytes = 16;  // of shared memory, before the ring: a ticket and an answer

// The ring of shared memory that both kinds of items stream their tiles through.
template <typename Read, typename Write, typename Block, int kTiles>
struct Ring {
  static constexpr int kReadBytes =
      kReadRows * (kReadWidest<Read> + kReadPad<Read>)*int(sizeof(Read));
  static constexpr int kWriteBytes =
      kWriteRows * (kWriteWidest<Write> + kWritePad<Write>)*int(sizeof(Write));
  static constexpr int kStepBytes =
      kTiles * Precision<Read, Block>::kCoordinates * kWarp * int(sizeof(uint4));
  static constexpr int kReadTile = kReadBytes + BlockTile<Block, kTiles>::kBytes;
  static constexpr int kWriteTile = kWriteBytes + kWriteWidest<Write> / 16 * kStepBytes;
  static constexpr int kTileBytes = kReadTile > kWriteTile ? kReadTile : kWriteTile;
  // Two blocks share the 227 KB of a Hopper multiprocessor.
  static constexpr int kFitting = (112 * 1024 - kHeadBytes) / kTileBytes;
  static constexpr int kStages = kFitting > 4 ? 4 : kFitting;
  static_assert(kStages >= 2, "a tile is copied while another is multiplied");
  static constexpr int kBytes = kHeadBytes + kStages * kTileBytes;
};

__device__ inline float4 add(const float4& a, const float4& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Splits the sums of both halves of a tile and writes them in the order of mma's operand b.
template <int kParts>
__device__ inline void store_coordinates(uint4* tile, int lane, const float4& left,
                                         const float4& right) {
  uint32_t pair[4][kParts];
  split_pair(left.x, left.y, pair[0]);
  split_pair(right.x, right.y, pair[1]);
  split_pair(left.z, left.w, pair[2]);
  split_pair(right.z, right.w, pair[3]);
#pragma unroll
  for (int j = 0; j < kParts; ++j) {
    tile[j * kWarp + lane] = make_uint4(pair[0][j], pair[1][j], pair[2][j], pair[3][j]);
  }
}

// C = the partial sums of all chunks, first to last, over `steps` tiles of the bases' columns and
// up to kTiles tiles of the block's.
template <int kParts, int kTiles>
__device__ inline void sum_chunks(const Table& table, const Layer& x, int first_step, int steps,
                                  int first_tile) {
  const int tiles = min(kTiles, block_tiles(x) - first_tile);
  const int lane = threadIdx.x % kWarp, count = chunks(x);
  const int64_t stride = int64_t(2) * basis_tiles(x) * block_tiles(x) * kWarp;
  for (int i = threadIdx.x / kWarp; i < steps * tiles; i += kWarps) {
    const int step = first_step + i / tiles, tile = first_tile + i % tiles;
    const float4* left_source = partial_tile(table, x, 0, 2 * step, tile) + lane;
    const float4* right_source = partial_tile(table, x, 0, 2 * step + 1, tile) + lane;
    float4 left = make_float4(0, 0, 0, 0), right = left;
#pragma unroll 8
    for (int chunk = 0; chunk < count; ++chunk) {
      left = add(left, __ldcg(left_source + chunk * stride));
      right = add(right, __ldcg(right_source + chunk * stride));
    }
    store_coordinates<kParts>(coordinate_tile<kParts>(table, x, step, tile), lane, left, right);
  }
}

// partial(chunk) = B[rows]^T Q[rows, panel] for 16 * kTiles columns of B; whoever brings the last
// chunk adds all of them up and reports that C is ready for this panel.
template <typename Kernel>
__device__ inline void read_item(const Table& table, const Layer& x, int index, int layer_count,
                                 int item) {
  using Read = typename Kernel::Read;
  using Block = typename Kernel::Block;
  using Kind = Precision<Read, Block>;
  using Ring = typename Kernel::Ring;
  constexpr int kTiles = Kernel::kTiles, kStages = Ring::kStages;
  constexpr int kSteps = ceil_div(kReadWidest<Read> / 16, kWarps);
  const int columns = groups(x, kTiles), panels = read_panels(x);
  const int first_tile = item % columns * kTiles;
  const int panel = item / columns % panels, chunk = item / columns / panels;
  const int first_column = panel * x.read_width;
  // A last panel may be narrower than the others; its tiles beyond k would belong to no one.
  const int steps = ceil_div(min(x.read_width, x.k - first_column), 16);
  const int first_row = chunk * x.chunk_rows, end = min(x.m, first_row + x.chunk_rows);
  const int tiles = ceil_div(end - first_row, kReadRows);
  const int stride = x.read_width + kReadPad<Read>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  char* ring = shared_memory() + kHeadBytes;
  const Source<Read> source(x.read, x.read_row);
  // The writing item finds the rows of a shared basis in the cache.
  const uint64_t policy = x.read == x.write ? keep_policy() : drop_policy();

  auto load = [&](int tile) {
    if (tile < tiles) {
      char* slot = ring + tile % kStages * Ring::kTileBytes;
      const int row = first_row + tile * kReadRows;
      copy_tile<kReadRows>(reinterpret_cast<Read*>(slot), stride, source, row, first_column, end,
                           x.k, x.read_width, policy);
      BlockTile<Block, kTiles>::copy(reinterpret_cast<Block*>(slot + Ring::kReadBytes), x, row, end,
                                     16 * first_tile, policy);
    }
    commit_copies();
  };
  float sum[kSteps][2][kTiles][4] = {};
#pragma unroll 1
  for (int tile = 0; tile < kStages - 1; ++tile) load(tile);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<kStages - 2>();
    __syncthreads();
    load(tile + kStages - 1);
    const char* slot = ring + tile % kStages * Ring::kTileBytes;
    const Read* basis = reinterpret_cast<const Read*>(slot);
    const Block* block = reinterpret_cast<const Block*>(slot + Ring::kReadBytes);
    // Tensor cores truncate each running sum, which adds up to 1e-5 over 4096 rows: for float32
    // results the sums of one tile start at zero and are added in ordinary arithmetic.
    float part[kSteps][2][kTiles][4] = {};
    auto& target = Kind::kIsFull ? part : sum;
#pragma unroll
    for (int row = 0; row < kReadRows; row += 16) {
      uint32_t b[Kind::kBlock][kTiles][4];
      BlockTile<Block, kTiles>::operand(b, block, row, x.block_row == 1);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int step = warp + kWarps * s;
        if (step >= steps) break;
        uint32_t q[Kind::kBasis][4];
        read_operand(q, basis, stride, row, 16 * step);
#pragma unroll
        for (int i = 0; i < Kind::kBasis; ++i) {
#pragma unroll
          for (int j = 0; j < Kind::kBlock && i + j < Kind::kReadLevel; ++j) {
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
              multiply_add(target[s][0][t], b[j][t], q[i][0], q[i][1]);
              multiply_add(target[s][1][t], b[j][t], q[i][2], q[i][3]);
            }
          }
        }
      }
    }
    if constexpr (Kind::kIsFull) {
#pragma unroll
      for (int i = 0; i < kSteps * 2 * kTiles * 4; ++i)
        (&sum[0][0][0][0])[i] += (&part[0][0][0][0])[i];
    }
  }

  const int first_step = first_column / 16;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int step = warp + kWarps * s;
    if (step >= steps) break;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (first_tile + t >= block_tiles(x)) break;
        const float (&c)[4] = sum[s][h][t];
        partial_tile(table, x, chunk, 2 * (first_step + step) + h, first_tile + t)[lane] =
            make_float4(c[0], c[1], c[2], c[3]);
      }
    }
  }
  int* is_last = reinterpret_cast<int*>(shared_memory()) + 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    int* arrived = table.counters + 1 + layer_count + x.first_counter;
    *is_last = arrive(arrived + item % (columns * panels)) == chunks(x) - 1;
  }
  __syncthreads();
  if (*is_last) {
    sum_chunks<Kind::kCoordinates, kTiles>(table, x, first_step, steps, first_tile);
    __syncthreads();
    if (threadIdx.x == 0) arrive(table.counters + 1 + index);
  }
}

// Writes 16 rows of results, in the block's dtype.
template <typename Block, int kEighths>
__device__ inline void store_out(const float (&sum)[kEighths][4], const Layer& x, int first_row,
                                 int first_column) {
  const int lane = threadIdx.x % kWarp;
  Block* out = static_cast<Block*>(x.out);
#pragma unroll
  for (int n = 0; n < kEighths; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + lane / 4 + 8 * h;
      const int column = first_column + 8 * n + lane % 4 * 2;
      if (row >= x.p || column >= x.r) continue;
      Block* target = out + int64_t(row) * x.r + column;
      struct alignas(2 * sizeof(Block)) Pair {
        Block low, high;
      };
      const Pair pair{from_float<Block>(sum[n][2 * h]), from_float<Block>(sum[n][2 * h + 1])};
      // With an even r every pair is aligned: results start on multiples of 16 bytes.
      if (x.r % 2 == 0) {
        *reinterpret_cast<Pair*>(target) = pair;
      } else {
        target[0] = pair.low;
        if (column + 1 < x.r) target[1] = pair.high;
      }
    }
  }
}

// out[rows] = P[rows] C for 16 * kTiles columns of C, tile by tile of kWriteRows rows and one panel
// of columns. The first tiles of P are on their way while C is still waited for.
template <typename Kernel>
__device__ inline void write_item(const Table& table, const Layer& x, int index, int item) {
  using Write = typename Kernel::Write;
  using Block = typename Kernel::Block;
  using Ring = typename Kernel::Ring;
  using Kind = Precision<Write, Block>;
  constexpr int kTiles = Kernel::kTiles, kStages = Ring::kStages;
  constexpr int kParts = Kind::kCoordinates, kEighths = 2 * kTiles;
  const int columns = groups(x, kTiles);
  const int first_tile = item % columns * kTiles;
  const int first_row = item / columns * x.slab_rows, end = min(x.p, first_row + x.slab_rows);
  const int panels = ceil_div(x.k, x.write_width);
  const int tiles = ceil_div(end - first_row, kWriteRows) * panels;
  const int stride = x.write_width + kWritePad<Write>;
  const int warp_row = threadIdx.x / kWarp * 32, lane = threadIdx.x % kWarp;
  char* ring = shared_memory() + kHeadBytes;
  const Source<Write> source(x.write, x.write_row);
  const uint64_t drop = drop_policy(), keep = keep_policy();

  auto load_basis = [&](int tile) {
    if (tile >= tiles) return;
    copy_tile<kWriteRows>(reinterpret_cast<Write*>(ring + tile % kStages * Ring::kTileBytes),
                          stride, source, first_row + tile / panels * kWriteRows,
                          tile % panels * x.write_width, end, x.k, x.write_width, drop);
  };
  auto load_coordinates = [&](int tile) {
    constexpr int kGroup = kTiles * kParts * kWarp;
    if (tile < tiles) {
      const int first_step = tile % panels * x.write_width / 16;
      const int steps = min(x.write_width / 16, basis_tiles(x) - first_step);
      uint4* to =
          reinterpret_cast<uint4*>(ring + tile % kStages * Ring::kTileBytes + Ring::kWriteBytes);
      for (int i = threadIdx.x; i < steps * kGroup; i += kThreads) {
        const int t = first_tile + i % kGroup / (kParts * kWarp);
        const bool exists = t < block_tiles(x);
        const uint4* from =
            coordinate_tile<kParts>(table, x, first_step + i / kGroup, exists ? t : first_tile);
        copy_async(to + i, from + i % (kParts * kWarp), exists ? 16 : 0, keep);
      }
    }
    commit_copies();
  };
#pragma unroll 1
  for (int tile = 0; tile < kStages - 1; ++tile) load_basis(tile);
  if (threadIdx.x == 0) wait_until(table.counters + 1 + index, read_panels(x) * columns);
  __syncthreads();
#pragma unroll 1
  for (int tile = 0; tile < kStages - 1; ++tile) load_coordinates(tile);

  float sum[2][kEighths][4] = {};
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<kStages - 2>();
    __syncthreads();
    load_basis(tile + kStages - 1);
    load_coordinates(tile + kStages - 1);
    const char* slot = ring + tile % kStages * Ring::kTileBytes;
    const Write* basis = reinterpret_cast<const Write*>(slot);
    const uint4* coordinates = reinterpret_cast<const uint4*>(slot + Ring::kWriteBytes);
    const int panel = tile % panels;
    const int steps = ceil_div(min(x.write_width, x.k - panel * x.write_width), 16);
    float part[2][kEighths][4] = {};
    auto& target = Kind::kIsFull ? part : sum;
#pragma unroll 2
    for (int step = 0; step < steps; ++step) {
      uint32_t a[2][Kind::kBasis][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        write_operand(a[half], basis, stride, warp_row + 16 * half, 16 * step);
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int j = 0; j < kParts; ++j) {
          const uint4 b = coordinates[((step * kTiles + t) * kParts + j) * kWarp + lane];
#pragma unroll
          for (int i = 0; i < Kind::kBasis && i + j < Kind::kWriteLevel; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              multiply_add(target[half][2 * t], a[half][i], b.x, b.y);
              multiply_add(target[half][2 * t + 1], a[half][i], b.z, b.w);
            }
          }
        }
      }
    }
    if constexpr (Kind::kIsFull) {
#pragma unroll
      for (int i = 0; i < 2 * kEighths * 4; ++i) (&sum[0][0][0])[i] += (&part[0][0][0])[i];
    }
    if (panel + 1 < panels) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + tile / panels * kWriteRows + warp_row + 16 * half;
      store_out<Block>(sum[half], x, row, 16 * first_tile);
#pragma unroll
      for (int i = 0; i < kEighths * 4; ++i) (&sum[half][0][0])[i] = 0;
    }
  }
}

}  // namespace lorax::projection
