// SPDX-License-Identifier: Apache-2.0
// Q_i (Q_i^T B_i) for many layers in one launch that reads each bfloat16 basis once: a block keeps
// its rows of Q in shared memory while the layer's blocks add up Q^T B. sm_80 and newer.
//
// A layer's blocks wait for each other, so all must be running: items are taken in order from a
// ticket counter, and the launcher admits only layers with at most half as many items as blocks
// fit on the device. Sums are in a fixed order, so results do not depend on the timing.
#pragma once

#include "project_multiply.cuh"

namespace lorax::projection {

constexpr int kFusedWidest = 384;
constexpr int kGroupRows = 32;  // rows that arrive and are multiplied together
constexpr int kMaxGroups = 8;   // of them in one item
constexpr int kSummers = 4;     // threads that share the chunks of one sum

template <typename Block, int kTiles>
struct Fused {
  using Kind = Precision<bf16, Block>;
  static constexpr int kBlockBytes = 2 * Kind::kBlock * (16 * kTiles + kPad);  // a row
  static constexpr int kStepBytes = kTiles * Kind::kCoordinates * kWarp * int(sizeof(uint4));
  static constexpr int kSumBytes = kThreads * int(sizeof(float4));

  // Bytes beside the rows of Q: block, sums and coordinates are in use one after another.
  __host__ __device__ static constexpr int side_bytes(int rows, int k) {
    const int block = rows * kBlockBytes, coordinates = ceil_div(k, 16) * kStepBytes;
    const int most = block > coordinates ? block : coordinates;
    return 16 + (most > kSumBytes ? most : kSumBytes);
  }
  __host__ __device__ static constexpr int shared_bytes(int rows, int k) {
    return rows * 2 * (round_up(k, 16) + kPad) + side_bytes(rows, k);
  }
  // The most rows, in groups, that fit; 0 where not one group does.
  static constexpr int rows_that_fit(int k, int bytes) {
    int rows = kMaxGroups * kGroupRows;
    while (rows > 0 && shared_bytes(rows, k) > bytes) rows -= kGroupRows;
    return rows;
  }
};

// C = sum over chunks of the partial sums, this item's share of the tiles: kSummers threads add
// every kSummers-th chunk of one register, then one adds their sums.
template <int kParts>
__device__ inline void sum_share(const Table& table, const Layer& x, int chunk, float4* scratch) {
  const int count = chunks(x), total = basis_tiles(x) * block_tiles(x) * kWarp;
  const int share = ceil_div(total, count);
  const int end = min(total, (chunk + 1) * share);
  constexpr int kPairs = kThreads / (2 * kSummers);  // (left, right) sums at once
  for (int first = chunk * share; first < end; first += kPairs) {
    const int summer = threadIdx.x / (2 * kPairs), pair = threadIdx.x % (2 * kPairs);
    const int index = first + pair % kPairs, half = pair / kPairs;
    float4 sum = make_float4(0, 0, 0, 0);
    if (index < end) {
      const int lane = index % kWarp, tile = index / kWarp;
      const int step = tile / block_tiles(x), column = tile % block_tiles(x);
#pragma unroll 8
      for (int c = summer; c < count; c += kSummers) {
        sum = add(sum, __ldcg(partial_tile(table, x, c, 2 * step + half, column) + lane));
      }
    }
    scratch[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < kPairs && index < end) {
      float4 left = scratch[threadIdx.x], right = scratch[threadIdx.x + kPairs];
#pragma unroll
      for (int s = 1; s < kSummers; ++s) {
        left = add(left, scratch[threadIdx.x + 2 * kPairs * s]);
        right = add(right, scratch[threadIdx.x + 2 * kPairs * s + kPairs]);
      }
      const int lane = index % kWarp, tile = index / kWarp;
      store_coordinates<kParts>(
          coordinate_tile<kParts>(table, x, tile / block_tiles(x), tile % block_tiles(x)), lane,
          left, right);
    }
    __syncthreads();
  }
}

template <typename Block, int kTiles>
__global__ __launch_bounds__(kThreads,
                             2) void project_fused_kernel(const __grid_constant__ Table table) {
  using Layout = Fused<Block, kTiles>;
  using Kind = typename Layout::Kind;
  constexpr int kSteps = kFusedWidest / 16 / kWarps;
  constexpr int kBlockStride = 16 * kTiles + kPad;
  int* ticket = reinterpret_cast<int*>(shared_memory());
  char* side = shared_memory() + 16;
  while (true) {
    if (threadIdx.x == 0) *ticket = take_ticket(table.counters);
    __syncthreads();
    const int item = *ticket;
    if (item >= table.reads) return;
    const int index = find_layer<&Layer::first_read>(table, item);
    const Layer& x = table.layer[index];
    const int chunk = item - x.first_read;
    const int first_row = chunk * x.chunk_rows, rows = min(x.chunk_rows, x.m - first_row);
    const int steps = basis_tiles(x), stride = 16 * steps + kPad, vectors = 2 * steps;
    const int count = chunks(x);
    int* arrived = table.counters + 1 + 2 * index;

    bf16* block = reinterpret_cast<bf16*>(side);
    bf16* basis = reinterpret_cast<bf16*>(side + Layout::side_bytes(x.chunk_rows, x.k) - 16);
    const int block_plane = x.chunk_rows * kBlockStride;
    const Block* factor = static_cast<const Block*>(x.block) + int64_t(first_row) * x.block_row;
    const bf16* source = static_cast<const bf16*>(x.read) + int64_t(first_row) * x.read_row;
    // The block's loads are issued first and stored last, so that their latency hides behind the
    // copies of the basis.
    BlockPrefetch<Block, Kind::kBlock, kTiles, kGroupRows> staged[kMaxGroups];
#pragma unroll
    for (int group = 0; group < kMaxGroups; ++group) {
      const int row = group * kGroupRows;
      if (row >= x.chunk_rows) break;
      staged[group].load(factor + int64_t(row) * x.block_row, x.block_row, x.block_column,
                         rows - row, x.r);
    }
    for (int group = 0; group < kMaxGroups; ++group) {
      if (group * kGroupRows < x.chunk_rows) {
        for (int i = threadIdx.x; i < kGroupRows * vectors; i += kThreads) {
          const int row = group * kGroupRows + i / vectors, column = i % vectors * 8;
          const int bytes = row < rows ? 2 * min(8, max(0, x.k - column)) : 0;
          // A copy of no bytes still needs a valid address.
          const bf16* from = bytes > 0 ? source + int64_t(row) * x.read_row + column : source;
          copy_async(basis + row * stride + column, from, bytes);
        }
      }
      commit_copies();
    }
#pragma unroll
    for (int group = 0; group < kMaxGroups; ++group) {
      const int row = group * kGroupRows;
      if (row >= x.chunk_rows) break;
      staged[group].store(block + row * kBlockStride, x.chunk_rows, x.block_row == 1);
    }

    {
      float sum[kSteps][2][kTiles][4] = {};
#pragma unroll
      for (int group = 0; group < kMaxGroups; ++group) {
        if (group * kGroupRows >= x.chunk_rows) break;
        switch (group) {
          case 0:
            wait_copies<kMaxGroups - 1>();
            break;
          case 1:
            wait_copies<kMaxGroups - 2>();
            break;
          case 2:
            wait_copies<kMaxGroups - 3>();
            break;
          case 3:
            wait_copies<kMaxGroups - 4>();
            break;
          case 4:
            wait_copies<kMaxGroups - 5>();
            break;
          case 5:
            wait_copies<kMaxGroups - 6>();
            break;
          case 6:
            wait_copies<kMaxGroups - 7>();
            break;
          default:
            wait_copies<0>();
            break;
        }
        __syncthreads();
        accumulate_read<Kind, kTiles, kSteps, kGroupRows>(
            sum, basis + group * kGroupRows * stride, 0, stride,
            block + group * kGroupRows * kBlockStride, block_plane, steps);
      }
      store_partials<kTiles, kSteps>(sum, table, x, chunk, 0, steps, 0);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      signal(arrived);
      wait_until(arrived, count);
    }
    __syncthreads();
    sum_share<Kind::kCoordinates>(table, x, chunk, reinterpret_cast<float4*>(side));
    __syncthreads();
    if (threadIdx.x == 0) {
      signal(arrived + 1);
      wait_until(arrived + 1, count);
    }
    __syncthreads();
    uint4* coordinates = reinterpret_cast<uint4*>(side);
    for (int i = threadIdx.x; i < steps * Layout::kStepBytes / 16; i += kThreads) {
      const int step = i / (Layout::kStepBytes / 16), inside = i % (Layout::kStepBytes / 16);
      const int tile = inside / (Kind::kCoordinates * kWarp);
      coordinates[i] = tile < block_tiles(x)
                           ? __ldcg(coordinate_tile<Kind::kCoordinates>(table, x, step, tile) +
                                    inside % (Kind::kCoordinates * kWarp))
                           : make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    for (int row = threadIdx.x / kWarp * 16; row < rows; row += kWarps * 16) {
      float out[2 * kTiles][4] = {};
      accumulate_write<Kind, kTiles, 2 * kTiles>(out, basis + row * stride, 0, stride, coordinates,
                                                 steps, 0);
      store_out<Block, 2 * kTiles>(out, x, first_row + row, 0);
    }
    __syncthreads();
  }
}

// Fills in the derived fields of a table. Returns the tiles of partial sums, or -1 where a layer
// has more items than may wait for each other.
template <typename Block, int kTiles>
int64_t plan_fused(Table& table, int block_bytes, int resident_blocks) {
  int64_t partials = 0;
  table.reads = table.writes = table.tiles = 0;
  for (int i = 0; i < table.count; ++i) {
    Layer& x = table.layer[i];
    x.chunk_rows = Fused<Block, kTiles>::rows_that_fit(x.k, block_bytes);
    if (x.chunk_rows == 0 || 2 * chunks(x) > resident_blocks) return -1;
    x.first_read = table.reads;
    x.first_write = 0;
    x.first_partial = int(partials);
    x.first_coordinate = table.tiles;
    table.reads += chunks(x);
    table.tiles += basis_tiles(x) * block_tiles(x);
    partials += int64_t(chunks(x)) * 2 * basis_tiles(x) * block_tiles(x);
  }
  return partials;
}

}  // namespace lorax::projection
