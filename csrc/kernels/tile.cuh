// SPDX-License-Identifier: Apache-2.0
// Products of 64 x 64 float32 tiles in shared memory, 256 threads a product: what the factorisation
// and the eigensolver are made of. sm_80 and newer; float32 on the plain cores.
#pragma once

#include "launch.cuh"

namespace lorax {

constexpr int kTile = 64;
constexpr int kTileElements = kTile * kTile;
constexpr int kTileThreads = 256;

// Four rows by four columns: where a thread stands in a tile. A warp covers 16 rows by 32 columns,
// so that each of its float4 reads is one shared-memory wavefront.
struct TilePlace {
  int row, column;
  __device__ explicit TilePlace(int thread) {
    const int warp = thread / 32, lane = thread % 32;
    row = warp / 2 * 16 + lane / 8 * 4;
    column = warp % 2 * 32 + lane % 8 * 4;
  }
};

// sum[r][c] = sum over p of left[p][row + r] * right[p][column + c]; rows of `left` are kLeftStride
// apart.
template <int kLeftStride = kTile>
__device__ inline void tile_product(const float* left, const float* right, TilePlace at,
                                    float (&sum)[4][4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[r][c] = 0.f;
  }
#pragma unroll 8
  for (int p = 0; p < kTile; ++p) {
    const float4 a = *reinterpret_cast<const float4*>(left + p * kLeftStride + at.row);
    const float4 b = *reinterpret_cast<const float4*>(right + p * kTile + at.column);
    const float x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[r][c] = fmaf(x[r], y[c], sum[r][c]);
    }
  }
}

// What a thread holds of a tile, stored at rows `stride` apart.
__device__ inline void store_rows(float* to, int64_t stride, TilePlace at, const float (&v)[4][4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    *reinterpret_cast<float4*>(to + (at.row + r) * stride + at.column) =
        make_float4(v[r][0], v[r][1], v[r][2], v[r][3]);
  }
}

// The same, transposed.
__device__ inline void store_columns(float* to, int64_t stride, TilePlace at,
                                     const float (&v)[4][4]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    *reinterpret_cast<float4*>(to + (at.column + c) * stride + at.row) =
        make_float4(v[0][c], v[1][c], v[2][c], v[3][c]);
  }
}

}  // namespace lorax
