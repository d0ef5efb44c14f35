// SPDX-License-Identifier: Apache-2.0
// The layers of one launch, how their work is cut into items, and in which order items are taken.
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
  int read_width;        // columns of Q in one item, a multiple of 16
  int chunk_rows;        // rows of Q in one item
  int write_width;       // columns of P in one tile of an item, a multiple of 16
  int slab_rows;         // rows of P in one item
  int first_read;        // ticket of its first item that reads Q
  int first_write;       // ticket of its first item that writes with P
  int first_partial;     // its first tile of partial sums
  int first_coordinate;  // its first tile of coordinates
  int first_counter;     // its first counter of arrived chunks
};

struct Table {
  const Layer* layers;  // on the device
  const int* owners;    // for each ticket: 2 * layer, 1 more for an item that writes
  int* counters;        // the next ticket; for each layer, sums that are ready; chunks that arrived
  float4* partials;     // tiles of 32 float4: C^T in the register order of an mma's result
  uint4* coordinates;   // tiles of (parts, 32) uint4: C in the register order of operand b
  int items;
};

// Layers travel to the device as kernel parameters (up to 32764 bytes since CUDA 12.1): no pinned
// buffer to keep alive, and a captured graph holds its own copy.
constexpr int kUploadLayers = 300;
struct Upload {
  Layer* layers;
  int* owners;
  int* counters;
  int first, total;  // layers before these, and in all
  Layer layer[kUploadLayers];
};
static_assert(sizeof(Upload) <= 32764, "a kernel's parameters end at 32764 bytes");

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Sizes in units of the tensor core's tiles: 16 columns of a basis, 16 columns of a block.
__host__ __device__ inline int basis_tiles(const Layer& x) { return ceil_div(x.k, 16); }
__host__ __device__ inline int block_tiles(const Layer& x) { return ceil_div(x.r, 16); }
__host__ __device__ inline int chunks(const Layer& x) { return ceil_div(x.m, x.chunk_rows); }
__host__ __device__ inline int slabs(const Layer& x) { return ceil_div(x.p, x.slab_rows); }
__host__ __device__ inline int read_panels(const Layer& x) { return ceil_div(x.k, x.read_width); }

// The tiles of a block are taken in groups of `tiles`.
__host__ __device__ inline int groups(const Layer& x, int tiles) {
  return ceil_div(block_tiles(x), tiles);
}

// Columns of a basis are taken in equal panels of at most `widest`, a multiple of 16.
inline int panel_width(int k, int widest) { return round_up(ceil_div(k, ceil_div(k, widest)), 16); }

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

// One block a layer: its row of the table, the owners of its items, its counters at zero.
template <int kTiles>
__global__ void project_upload_kernel(const __grid_constant__ Upload upload) {
  const int index = upload.first + blockIdx.x;
  const Layer& x = upload.layer[blockIdx.x];
  const int columns = groups(x, kTiles), arrivals = read_panels(x) * columns;
  const int reads = chunks(x) * arrivals, writes = slabs(x) * columns;
  if (threadIdx.x == 0) {
    upload.layers[index] = x;
    upload.counters[1 + index] = 0;
    if (index == 0) upload.counters[0] = 0;
  }
  for (int i = threadIdx.x; i < reads; i += blockDim.x) upload.owners[x.first_read + i] = 2 * index;
  for (int i = threadIdx.x; i < writes; i += blockDim.x) {
    upload.owners[x.first_write + i] = 2 * index + 1;
  }
  for (int i = threadIdx.x; i < arrivals; i += blockDim.x) {
    upload.counters[1 + upload.total + x.first_counter + i] = 0;
  }
}

}  // namespace lorax::projection
