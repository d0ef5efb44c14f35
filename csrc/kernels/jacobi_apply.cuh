// SPDX-License-Identifier: Apache-2.0
// Block Jacobi's products: the rotations of a round, applied to the rest of H and to V on tensor
// cores. sm_80 and newer.
//
// Both sides as two float16 pieces: three products keep float32's accuracy, as long as sums leave
// the tensor cores every 16 products (three TF32 products summed inside them left V 2.5 times as
// far from orthogonal).
#pragma once

#include <cuda_pipeline.h>

#include "jacobi_state.cuh"

namespace lorax {

constexpr int kApplyWarps = kTile / 16;
constexpr int kApplyThreads = 32 * kApplyWarps;
constexpr int kPieceStride = kTile + 8;  // ldmatrix reads eight rows without bank conflicts

// A 64 x 64 tile in shared memory.
struct Pieces {
  __half high[kTile * kPieceStride], low[kTile * kPieceStride];

  // Asynchronous.
  __device__ void load_rotations(const __half* from) {
#pragma unroll
    for (int i = 0; i < kTileElements / (8 * kApplyThreads); ++i) {
      const int e = (threadIdx.x + i * kApplyThreads) * 8;
      const int at = e / kTile * kPieceStride + e % kTile;
      __pipeline_memcpy_async(high + at, from + e, 16);
      __pipeline_memcpy_async(low + at, from + kTileElements + e, 16);
    }
  }

  // from(row, column) points to four numbers.
  template <class From>
  __device__ void load(float scale, From from) {
#pragma unroll
    for (int i = 0; i < kTileElements / (4 * kApplyThreads); ++i) {
      const int e = (threadIdx.x + i * kApplyThreads) * 4, row = e / kTile, column = e % kTile;
      const float4 v = *reinterpret_cast<const float4*>(from(row, column));
      const TwoPieces one(scale * v.x, scale * v.y), two(scale * v.z, scale * v.w);
      __half2* to = reinterpret_cast<__half2*>(high + row * kPieceStride + column);
      to[0] = one.high, to[1] = two.high;
      to = reinterpret_cast<__half2*>(low + row * kPieceStride + column);
      to[0] = one.low, to[1] = two.low;
    }
  }
};

constexpr int kApplyBytes = 3 * static_cast<int>(sizeof(Pieces));

// Four 8 x 8 matrices of float16, transposed; lane l names row l % 8 of matrix l / 8.
__device__ inline void load_fragment(__half2 (&to)[4], const __half* row) {
  uint32_t (&r)[4] = reinterpret_cast<uint32_t (&)[4]>(to);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// sum += a b, 16 x 16 times 16 x 8.
__device__ inline void multiply(float (&sum)[4], const __half2 (&left)[4], const __half2* right) {
  const uint32_t (&a)[4] = reinterpret_cast<const uint32_t (&)[4]>(left);
  const uint32_t* b = reinterpret_cast<const uint32_t*>(right);
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A warp's 16 rows of a 64 x 64 tile as the left side of a product, 16 columns an entry.
struct LeftRows {
  __half2 high[4][4], low[4][4];

  // Rows of the transpose of a tile.
  __device__ explicit LeftRows(const Pieces& tile) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int at = (lane % 8 + lane / 16 * 8) * kPieceStride + warp * 16 + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      load_fragment(high[k], tile.high + at + k * 16 * kPieceStride);
      load_fragment(low[k], tile.low + at + k * 16 * kPieceStride);
    }
  }

  // What a product has left in registers, which are in this order already.
  __device__ explicit LeftRows(const float (&sum)[8][4]) {
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      const TwoPieces two(sum[e / 2][e % 2 * 2], sum[e / 2][e % 2 * 2 + 1]);
      high[e / 4][e % 4] = two.high;
      low[e / 4][e % 4] = two.low;
    }
  }
};

// sum = left times right: lane l has rows l / 4 and l / 4 + 8 of the warp's, and of the eight
// columns of an entry 2 (l % 4) and the next.
__device__ inline void rows_product(const LeftRows& left, const Pieces& right, float (&sum)[8][4]) {
  const int lane = threadIdx.x % 32, at = lane % 16 * kPieceStride + lane / 16 * 8;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    float cross[2][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      __half2 high[4], low[4];
      load_fragment(high, right.high + at + k * 16 * kPieceStride + pair * 16);
      load_fragment(low, right.low + at + k * 16 * kPieceStride + pair * 16);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Tensor cores cut sums off where float32 ends: here those of 16 products, whose sum is
        // rounded.
        float part[4] = {};
        multiply(part, left.high[k], high + 2 * half);
        multiply(cross[half], left.high[k], low + 2 * half);
        multiply(cross[half], left.low[k], high + 2 * half);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& to = sum[2 * pair + half][e];
          to = k == 0 ? part[e] : to + part[e];
          if (k == 3) to = fmaf(cross[half][e], 1.f / kLowScale, to);
        }
      }
    }
  }
}

// Waits for all that was loaded.
__device__ inline void await_loads() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
}

/// Applies the rotations of a round. CTAs with the lower indices: H_PQ <- J_P^T H_PQ J_Q and its
/// mirror image, for pairs P < Q; the others: rows Q of V^T <- J_Q^T times them, 64 columns each.
static __global__ void __launch_bounds__(kApplyThreads, 4)
    jacobi_apply_kernel(const Jacobi* where, int round) {
  const Jacobi state = *where;
  const int sweep = *state.sweep;
  const int64_t batch = blockIdx.y, extent = state.extent;
  if (sweep > 0 && has_settled(state, batch, sweep - 1)) return;
  extern __shared__ uint4 shared[];
  Pieces* JQ = reinterpret_cast<Pieces*>(shared);
  Pieces* tile = JQ + 1;
  Pieces* JP = JQ + 2;
  const int pairs = static_cast<int>(extent / kTile), blocks = 2 * pairs;
  const int lane = threadIdx.x % 32, top = threadIdx.x / 32 * 16 + lane / 4, left = lane % 4 * 2;
  const int* is_active = state.is_active + batch * pairs;
  const __half* J = state.J + batch * pairs * 2 * kTileElements;
  float sum[8][4];
  int e = static_cast<int>(blockIdx.x) - pairs * (pairs - 1) / 2;
  if (e >= 0) {
    const int Q = e / pairs, start = e % pairs * kTile;
    if (!is_active[Q]) return;
    const PairIndex index(round, blocks, Q);
    float* vt = state.VT + batch * extent * extent + start;
    JQ->load_rotations(J + Q * 2 * kTileElements);
    tile->load(1.f, [&](int r, int c) { return vt + index(r) * extent + c; });
    await_loads();
    rows_product(LeftRows(*JQ), *tile, sum);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      *reinterpret_cast<float2*>(vt + index(top + i % 2 * 8) * extent + i / 2 * 8 + left) =
          make_float2(sum[i / 2][i % 2 * 2], sum[i / 2][i % 2 * 2 + 1]);
    }
    return;
  }
  int P = 0;
  for (e = blockIdx.x; e >= pairs - 1 - P; ++P) e -= pairs - 1 - P;
  const int Q = P + 1 + e;
  if (!is_active[P] && !is_active[Q]) return;
  const PairIndex row(round, blocks, P), column(round, blocks, Q);
  float* h = state.H + batch * extent * extent;
  const float scale = jacobi_scale(state, batch);
  const float back = __uint_as_float(0x7f000000u - __float_as_uint(scale));  // its inverse
  JP->load_rotations(J + P * 2 * kTileElements);
  JQ->load_rotations(J + Q * 2 * kTileElements);
  tile->load(scale, [&](int r, int c) { return h + row(r) * extent + column(c); });
  await_loads();
  rows_product(LeftRows(*JP), *tile, sum);
  rows_product(LeftRows(sum), *JQ, sum);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int64_t r = row(top + i % 2 * 8), c = column(i / 2 * 8 + left);
    const float one = back * sum[i / 2][i % 2 * 2], two = back * sum[i / 2][i % 2 * 2 + 1];
    *reinterpret_cast<float2*>(h + r * extent + c) = make_float2(one, two);
    h[c * extent + r] = one;
    h[(c + 1) * extent + r] = two;
  }
}

}  // namespace lorax
