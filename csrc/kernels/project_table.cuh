// SPDX-License-Identifier: Apache-2.0
// The layers of one launch and how their work is cut into items.
//
// The table travels by value as a kernel parameter (up to 32764 bytes since CUDA 12.1): no copy to
// the device, no pinned buffer to keep alive, and a captured graph holds its own copy.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lorax::projection {

// One product out = P (Q^T B).
struct Layer {
  const void* block;  // B (m, r), element (i, j) at i * block_row + j * block_column
  const void* read;   // Q (m, k), rows read_row elements apart
  const void* write;  // P (p, k), rows write_row elements apart
  void* out;          // (p, r), contiguous
  int block_row, block_column;
  int read_row, write_row;
  int m, p, k, r;
  int chunk_rows;        // rows of Q in one partial sum
  int first_read;        // index of its first item in the pass that reads Q
  int first_write;       // index of its first item in the pass that writes with P
  int first_partial;     // index of its first tile of partial sums
  int first_coordinate;  // index of its first tile of coordinates
};

constexpr int kMaxLayers = 320;

struct Table {
  float4* partials;    // tiles of kWarp float4: C^T in the register order of an mma's result
  uint4* coordinates;  // tiles of (parts, kWarp) uint4: C in the register order of operand b
  int* counters;       // fused kernel: a ticket, then two a layer
  int count;
  int reads, writes;  // items in each pass
  int tiles;          // tiles of coordinates
  int write_rows;     // rows of P in one item of the writing pass
  Layer layer[kMaxLayers];
};
static_assert(sizeof(Table) <= 32764, "a kernel's parameters end at 32764 bytes");

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Sizes in units of the tensor core's tiles: 16 columns of a basis, 16 columns of a block.
__host__ __device__ inline int basis_tiles(const Layer& x) { return ceil_div(x.k, 16); }
__host__ __device__ inline int block_tiles(const Layer& x) { return ceil_div(x.r, 16); }
__host__ __device__ inline int chunks(const Layer& x) { return ceil_div(x.m, x.chunk_rows); }

// Columns of a basis are taken in equal panels of at most `widest`, a multiple of 16.
__host__ __device__ inline int panels(const Layer& x, int widest) { return ceil_div(x.k, widest); }
__host__ __device__ inline int panel_width(const Layer& x, int widest) {
  return round_up(ceil_div(x.k, panels(x, widest)), 16);
}

// The layer that owns `item`: the last one whose first item is not beyond it.
template <int Layer::* kFirst>
__device__ inline int find_layer(const Table& table, int item) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.layer[middle].*kFirst <= item) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Tile of partial sums: columns 8 * eighth.. of Q in rows `chunk`, columns 16 * tile.. of B.
__device__ inline float4* partial_tile(const Table& table, const Layer& x, int chunk, int eighth,
                                       int tile) {
  const int64_t inside = (int64_t(chunk) * 2 * basis_tiles(x) + eighth) * block_tiles(x) + tile;
  return table.partials + (x.first_partial + inside) * 32;
}

// Tile of coordinates: rows 16 * step.. (columns of the bases), columns 16 * tile.. of B.
template <int kParts>
__device__ inline uint4* coordinate_tile(const Table& table, const Layer& x, int step, int tile) {
  const int64_t inside = int64_t(step) * block_tiles(x) + tile;
  return table.coordinates + (x.first_coordinate + inside) * kParts * 32;
}

}  // namespace lorax::projection
