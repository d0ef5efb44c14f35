// SPDX-License-Identifier: Apache-2.0
// P_i (Q_i^T B_i) for many layers in three launches: partial sums of Q^T B over chunks of rows,
// their sum in a fixed order, the product with P. Takes bases of any shape, bfloat16 or float32,
// with two different bases too. sm_80 and newer.
#pragma once

#include "project_multiply.cuh"

namespace lorax::projection {

template <typename Basis, typename Block, int kTiles>
constexpr int read_shared_bytes(int width) {
  using Kind = Precision<Basis, Block>;
  return kTileRows * 2 * (Kind::kBasis * (width + kPad) + Kind::kBlock * (16 * kTiles + kPad));
}

// partial(chunk) = B[rows]^T Q[rows, panel]: one item is a chunk of rows, a panel of columns of Q
// and 16 * kTiles columns of B.
template <typename Basis, typename Block, int kTiles>
__global__ __launch_bounds__(kThreads,
                             2) void project_read_kernel(const __grid_constant__ Table table) {
  using Kind = Precision<Basis, Block>;
  constexpr int kWidth = kWidest<Basis, kTiles>;
  constexpr int kSteps = ceil_div(kWidth / 16, kWarps);
  const Layer& x = table.layer[find_layer<&Layer::first_read>(table, blockIdx.x)];
  const int groups = ceil_div(block_tiles(x), kTiles);
  const int item = blockIdx.x - x.first_read;
  const int first_tile = item % groups * kTiles;
  const int panel = item / groups % panels(x, kWidth);
  const int chunk = item / groups / panels(x, kWidth);
  const int width = panel_width(x, kWidth);
  const int first_column = panel * width;
  const int columns = min(width, x.k - first_column);
  const int end = min(x.m, (chunk + 1) * x.chunk_rows);
  // A last panel may be narrower than the others; its tiles beyond k would belong to no one.
  const int steps = ceil_div(columns, 16);

  bf16* basis = reinterpret_cast<bf16*>(shared_memory());
  bf16* block = basis + Kind::kBasis * kTileRows * (width + kPad);
  const Basis* source = static_cast<const Basis*>(x.read) + first_column;
  const Block* factor =
      static_cast<const Block*>(x.block) + int64_t(first_tile) * 16 * x.block_column;
  const bool is_aligned = has_aligned_rows(source, x.read_row);

  BasisPrefetch<Basis, Kind::kBasis, kWidth> next_basis;
  BlockPrefetch<Block, Kind::kBlock, kTiles, kTileRows> next_block;
  auto load = [&](int row) {
    next_basis.load(source + int64_t(row) * x.read_row, x.read_row, end - row, columns, width,
                    is_aligned);
    next_block.load(factor + int64_t(row) * x.block_row, x.block_row, x.block_column, end - row,
                    x.r - 16 * first_tile);
  };
  float sum[kSteps][2][kTiles][4] = {};
  load(chunk * x.chunk_rows);
  for (int row = chunk * x.chunk_rows; row < end; row += kTileRows) {
    next_basis.store(basis, width);
    next_block.store(block, kTileRows, x.block_row == 1);
    __syncthreads();
    if (row + kTileRows < end) load(row + kTileRows);
    accumulate_read<Kind, kTiles, kSteps, kTileRows>(sum, basis, kTileRows * (width + kPad),
                                                     width + kPad, block,
                                                     kTileRows * (16 * kTiles + kPad), steps);
    __syncthreads();
  }
  store_partials<kTiles, kSteps>(sum, table, x, chunk, first_column / 16, steps, first_tile);
}

// coordinates = the sum of all chunks' partial sums, first to last; a warp for each tile.
template <int kParts>
__global__ __launch_bounds__(kThreads) void project_sum_kernel(
    const __grid_constant__ Table table) {
  const int lane = threadIdx.x % kWarp;
  const int index = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (index >= table.tiles) return;
  const Layer& x = table.layer[find_layer<&Layer::first_coordinate>(table, index)];
  const int step = (index - x.first_coordinate) / block_tiles(x);
  const int tile = (index - x.first_coordinate) % block_tiles(x);
  float4 left = make_float4(0, 0, 0, 0), right = left;
#pragma unroll 4
  for (int chunk = 0; chunk < chunks(x); ++chunk) {
    left = add(left, partial_tile(table, x, chunk, 2 * step, tile)[lane]);
    right = add(right, partial_tile(table, x, chunk, 2 * step + 1, tile)[lane]);
  }
  store_coordinates<kParts>(coordinate_tile<kParts>(table, x, step, tile), lane, left, right);
}

template <typename Basis, typename Block, int kTiles>
constexpr int write_shared_bytes(int width) {
  using Kind = Precision<Basis, Block>;
  return kTileRows * 2 * Kind::kBasis * (width + kPad) +
         width / 16 * kTiles * Kind::kCoordinates * kWarp * int(sizeof(uint4));
}

// out[rows] = P[rows] C: one item is table.write_rows rows and 16 * kTiles columns of C. Four
// warps share the rows of a tile by 16, two the columns of C.
template <typename Basis, typename Block, int kTiles>
__global__ __launch_bounds__(kThreads,
                             2) void project_write_kernel(const __grid_constant__ Table table) {
  using Kind = Precision<Basis, Block>;
  constexpr int kWidth = kWidest<Basis, kTiles>;
  const Layer& x = table.layer[find_layer<&Layer::first_write>(table, blockIdx.x)];
  const int groups = ceil_div(block_tiles(x), kTiles);
  const int item = blockIdx.x - x.first_write;
  const int first_tile = item % groups * kTiles;
  const int first_row = item / groups * table.write_rows;
  const int end = min(x.p, first_row + table.write_rows);
  const int width = panel_width(x, kWidth), panel_count = panels(x, kWidth);

  bf16* basis = reinterpret_cast<bf16*>(shared_memory());
  uint4* coordinates = reinterpret_cast<uint4*>(basis + Kind::kBasis * kTileRows * (width + kPad));
  const Basis* source = static_cast<const Basis*>(x.write);
  const bool is_aligned = has_aligned_rows(source, x.write_row);
  const int warp = threadIdx.x / kWarp;
  const int tile_row = warp % 4 * 16, first_eighth = warp / 4 * kTiles;

  BasisPrefetch<Basis, Kind::kBasis, kWidth> next;
  auto load = [&](int row, int panel) {
    next.load(source + int64_t(row) * x.write_row + panel * width, x.write_row, end - row,
              x.k - panel * width, width, is_aligned);
  };
  auto load_coordinates = [&](int first_step, int steps) {
    constexpr int kGroup = kTiles * Kind::kCoordinates * kWarp;
    for (int i = threadIdx.x; i < steps * kGroup; i += kThreads) {
      const int tile = first_tile + i % kGroup / (Kind::kCoordinates * kWarp);
      const int step = first_step + i / kGroup;
      coordinates[i] = tile < block_tiles(x)
                           ? coordinate_tile<Kind::kCoordinates>(
                                 table, x, step, tile)[i % (Kind::kCoordinates * kWarp)]
                           : make_uint4(0, 0, 0, 0);
    }
  };
  load(first_row, 0);
  for (int row = first_row; row < end; row += kTileRows) {
    float sum[kTiles][4] = {};
    for (int panel = 0; panel < panel_count; ++panel) {
      const int steps = ceil_div(min(width, x.k - panel * width), 16);
      next.store(basis, width);
      if (panel_count > 1 || row == first_row) load_coordinates(panel * width / 16, steps);
      __syncthreads();
      if (panel + 1 < panel_count) {
        load(row, panel + 1);
      } else if (row + kTileRows < end) {
        load(row + kTileRows, 0);
      }
      accumulate_write<Kind, kTiles, kTiles>(sum, basis + tile_row * (width + kPad),
                                             kTileRows * (width + kPad), width + kPad, coordinates,
                                             steps, first_eighth);
      __syncthreads();
    }
    store_out<Block, kTiles>(sum, x, row + tile_row, 16 * first_tile + 8 * first_eighth);
  }
}

// Fills in the derived fields of a table whose layers are set. Returns the tiles of partial sums.
// read_widest: the reading kernel's kWidest; tiles: its kTiles; processors: of the device.
inline int64_t plan_two_pass(Table& table, int read_widest, int tiles, int processors) {
  int64_t rows_read = 0, rows_written = 0;
  for (int i = 0; i < table.count; ++i) {
    rows_read += table.layer[i].m;
    rows_written += table.layer[i].p;
  }
  // Four waves of two blocks a multiprocessor keep the last wave's idle time small; beyond 1024
  // rows a longer chunk saves next to nothing of the partial sums' traffic.
  auto share = [&](int64_t rows, int most) {
    const int64_t fair = rows / (8 * processors) + 1;
    return round_up(int(fair < most ? fair : most), kTileRows);
  };
  const int chunk_rows = share(rows_read, 1024);
  table.write_rows = share(rows_written, 256);
  int64_t partials = 0;
  table.reads = table.writes = table.tiles = 0;
  for (int i = 0; i < table.count; ++i) {
    Layer& x = table.layer[i];
    const int groups = ceil_div(block_tiles(x), tiles);
    x.chunk_rows = chunk_rows;
    x.first_read = table.reads;
    x.first_write = table.writes;
    x.first_partial = int(partials);
    x.first_coordinate = table.tiles;
    table.reads += chunks(x) * panels(x, read_widest) * groups;
    table.writes += ceil_div(x.p, table.write_rows) * groups;
    table.tiles += basis_tiles(x) * block_tiles(x);
    partials += int64_t(chunks(x)) * 2 * basis_tiles(x) * block_tiles(x);
  }
  return partials;
}

}  // namespace lorax::projection
