// SPDX-License-Identifier: Apache-2.0
// The two products of the projection and the sum between them, on tiles in shared memory.
//
// Blocks are taken transposed, C^T = B^T Q, so that a register of the first product's result is
// already a register of the second one's operand: nothing is shuffled in between.
#pragma once

#include "project_stage.cuh"

namespace lorax::projection {

// sum[s][h][t] += B^T Q over kRows rows of shared memory: 16 * kTiles columns of B against the
// 16 columns of Q that start at 16 * (warp + kWarps * s), as two halves h of 8.
template <typename Kind, int kTiles, int kSteps, int kRows>
__device__ inline void multiply_read(
    float (&sum)[kSteps][2][kTiles][4],
    const bf16* basis,  // [Kind::kBasis] planes of [rows][basis_stride]
    int basis_plane, int basis_stride,
    const bf16* block,  // [Kind::kBlock] planes of [rows][16 * kTiles + kPad]
    int block_plane,
    int steps) {  // columns of the panel over 16
  constexpr int kStride = 16 * kTiles + kPad;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int block_offset = (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
  const int basis_offset = (lane / 8 % 2 * 8 + lane % 8) * basis_stride + lane / 16 * 8;
#pragma unroll
  for (int row = 0; row < kRows; row += 16) {
    uint32_t b[Kind::kBlock][kTiles][4];
#pragma unroll
    for (int j = 0; j < Kind::kBlock; ++j) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        load_blocks_transposed(b[j][t],
                               block + j * block_plane + row * kStride + block_offset + 16 * t);
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int step = warp + kWarps * s;
      if (step >= steps) break;
#pragma unroll
      for (int i = 0; i < Kind::kBasis; ++i) {
        uint32_t q[4];
        load_blocks_transposed(
            q, basis + i * basis_plane + row * basis_stride + basis_offset + 16 * step);
#pragma unroll
        for (int j = 0; j < Kind::kBlock && i + j < Kind::kReadLevel; ++j) {
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            multiply_add(sum[s][0][t], b[j][t], q[0], q[1]);
            multiply_add(sum[s][1][t], b[j][t], q[2], q[3]);
          }
        }
      }
    }
  }
}

// The same, with the rounding of float32: tensor cores truncate each running sum, which adds up
// to 1e-5 over 4096 rows. Sums of kRows rows start at zero and are added in ordinary arithmetic.
template <typename Kind, int kTiles, int kSteps, int kRows>
__device__ inline void accumulate_read(float (&sum)[kSteps][2][kTiles][4], const bf16* basis,
                                       int basis_plane, int basis_stride, const bf16* block,
                                       int block_plane, int steps) {
  if constexpr (!Kind::kIsFull) {
    multiply_read<Kind, kTiles, kSteps, kRows>(sum, basis, basis_plane, basis_stride, block,
                                               block_plane, steps);
  } else {
    float part[kSteps][2][kTiles][4] = {};
    multiply_read<Kind, kTiles, kSteps, kRows>(part, basis, basis_plane, basis_stride, block,
                                               block_plane, steps);
#pragma unroll
    for (int i = 0; i < kSteps * 2 * kTiles * 4; ++i)
      (&sum[0][0][0][0])[i] += (&part[0][0][0][0])[i];
  }
}

// Writes the sums of one chunk to device memory as they lie in the registers.
template <int kTiles, int kSteps>
__device__ inline void store_partials(const float (&sum)[kSteps][2][kTiles][4], const Table& table,
                                      const Layer& x, int chunk, int first_step, int steps,
                                      int first_tile) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
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
}

__device__ inline float4 add(const float4& a, const float4& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Splits the sums of both halves of a tile and writes them in the order of mma's operand b.
template <int kParts>
__device__ inline void store_coordinates(uint4* tile, int lane, const float4& left,
                                         const float4& right) {
  const float value[8] = {left.x, left.y, right.x, right.y, left.z, left.w, right.z, right.w};
  bf16 part[8][kParts];
#pragma unroll
  for (int i = 0; i < 8; ++i) split(value[i], part[i]);
#pragma unroll
  for (int j = 0; j < kParts; ++j) {
    tile[j * kWarp + lane] = make_uint4(pack(part[0][j], part[1][j]), pack(part[2][j], part[3][j]),
                                        pack(part[4][j], part[5][j]), pack(part[6][j], part[7][j]));
  }
}

// sum[n] += P C over one panel: the 16 rows of P at `basis`, columns 8 * (first_eighth + n) of C.
template <typename Kind, int kTiles, int kEighths>
__device__ inline void accumulate_write(
    float (&sum)[kEighths][4],
    const bf16* basis,  // [Kind::kBasis] planes of [rows][basis_stride]
    int basis_plane, int basis_stride,
    const uint4* coordinates,  // [steps][kTiles][Kind::kCoordinates][kWarp]
    int steps, int first_eighth) {
  const int lane = threadIdx.x % kWarp;
  const int basis_offset = (lane / 8 % 2 * 8 + lane % 8) * basis_stride + lane / 16 * 8;
#pragma unroll 2
  for (int step = 0; step < steps; ++step) {
    uint32_t a[Kind::kBasis][4];
#pragma unroll
    for (int i = 0; i < Kind::kBasis; ++i) {
      load_blocks(a[i], basis + i * basis_plane + basis_offset + 16 * step);
    }
#pragma unroll
    for (int n = 0; n < kEighths; ++n) {
      const int eighth = first_eighth + n;
      const uint4* tile =
          coordinates + (step * kTiles + eighth / 2) * Kind::kCoordinates * kWarp + lane;
      float part[4] = {};
      float (&c)[4] = Kind::kIsFull ? part : sum[n];
#pragma unroll
      for (int j = 0; j < Kind::kCoordinates; ++j) {
        const uint2 b = reinterpret_cast<const uint2*>(tile + j * kWarp)[eighth % 2];
#pragma unroll
        for (int i = 0; i < Kind::kBasis && i + j < Kind::kWriteLevel; ++i) {
          multiply_add(c, a[i], b.x, b.y);
        }
      }
      if constexpr (Kind::kIsFull) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[n][i] += part[i];
      }
    }
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
      // With an even r every pair is aligned: results are whole allocations.
      if (x.r % 2 == 0) {
        *reinterpret_cast<Pair*>(target) = pair;
      } else {
        target[0] = pair.low;
        if (column + 1 < x.r) target[1] = pair.high;
      }
    }
  }
}

}  // namespace lorax::projection
