// SPDX-License-Identifier: Apache-2.0
// Batched Cholesky factorisation and inverse of its factor: A = L L^T, M = L^-1. sm_80 and newer.
//
// One CTA a matrix, blocks of 64 columns, in float32 on the plain cores. The matrix lives in L2 (it
// is 1 MB at 512 columns); what one step needs of it lives in shared memory. The inverse is built
// in place by the same updates as the factorisation: eliminating block column k turns the trailing
// matrix into its Schur complement and, in the columns already eliminated, the identity into L^-1.
#pragma once

#include "symmetric.cuh"

namespace lorax {

constexpr int kFactorThreads = 512;  // two groups, a tile each
constexpr int kGroupThreads = kFactorThreads / 2;
constexpr int kTileElements = kFactorTile * kFactorTile;
constexpr int kHalf = kFactorTile / 2;        // what one warp factors in registers
constexpr int kWorkStride = kFactorTile + 1;  // odd: a warp reads a column without conflicts

// Shared memory, for a matrix of t tiles a side:
//   slots  t tiles: block row or column of each other block, as the updates want it
//   MT     1 tile:  transposed inverse of the diagonal block
//   work   64 x 65: the diagonal block while it is factored
//   spare  32 x 32: a product inside it
constexpr int64_t factor_shared_bytes(int64_t extent) {
  return static_cast<int64_t>(sizeof(float)) *
         ((extent / kFactorTile + 1) * kTileElements + kFactorTile * kWorkStride + kHalf * kHalf);
}

// One element of four rows by four columns: where a thread of a group stands in a tile. A warp
// covers 16 rows by 32 columns, so that each of its float4 reads is one shared-memory wavefront.
struct TilePlace {
  int row, column;
  __device__ explicit TilePlace(int thread) {
    const int warp = thread / 32, lane = thread % 32;
    row = warp / 2 * 16 + lane / 8 * 4;
    column = warp % 2 * 32 + lane % 8 * 4;
  }
};

// sum[r][c] = sum over p of left[p][row + r] * right[p][column + c], tiles in shared memory.
__device__ inline void tile_product(const float* left, const float* right, TilePlace at,
                                    float (&sum)[4][4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[r][c] = 0.f;
  }
#pragma unroll 8
  for (int p = 0; p < kFactorTile; ++p) {
    const float4 a = *reinterpret_cast<const float4*>(left + p * kFactorTile + at.row);
    const float4 b = *reinterpret_cast<const float4*>(right + p * kFactorTile + at.column);
    const float x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[r][c] = fmaf(x[r], y[c], sum[r][c]);
    }
  }
}

__device__ inline void group_barrier(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kGroupThreads) : "memory");
}

/// One warp: the 32 x 32 block at `work` becomes its lower factor L; MT gets (L^-1)^T.
///
/// A pivot at or below `floor` is replaced by it: the column it belongs to is then shortened, not
/// normalised, and what follows stays finite.
__device__ inline void factor_half(float* work, float* MT, float floor) {
  const int lane = threadIdx.x % 32;
  float a[kHalf];
#pragma unroll
  for (int j = 0; j < kHalf; ++j) a[j] = work[lane * kWorkStride + j];
  float reciprocal = 0.f;
#pragma unroll
  for (int k = 0; k < kHalf; ++k) {
    float pivot = __shfl_sync(0xffffffffu, a[k], k);
    pivot = pivot > floor ? pivot : floor;
    const float inverse = 1.f / sqrtf(pivot);
    if (lane == k) {
      a[k] = pivot;
      reciprocal = inverse;
    }
    a[k] *= inverse;
#pragma unroll
    for (int j = k + 1; j < kHalf; ++j) a[j] -= a[k] * __shfl_sync(0xffffffffu, a[k], j);
  }
#pragma unroll
  for (int j = 0; j < kHalf; ++j) work[lane * kWorkStride + j] = j <= lane ? a[j] : 0.f;
  __syncwarp();
  // Lane c solves for column c of the inverse: L x = e_c.
  float x[kHalf];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    float sum = i == lane ? 1.f : 0.f;
#pragma unroll
    for (int p = 0; p < i; ++p) sum -= work[i * kWorkStride + p] * x[p];
    x[i] = sum * __shfl_sync(0xffffffffu, reciprocal, i);
    MT[lane * kFactorTile + i] = x[i];
  }
}

/// All threads: MT = (L^-1)^T and M = L^-1 of the 64 x 64 block at `work`, which is overwritten.
///
/// Halves: L = [a 0; b c], L^-1 = [a^-1 0; -c^-1 b a^-1  c^-1].
__device__ inline void factor_tile(float* work, float* M, float* MT, float* spare, float floor) {
  const int t = threadIdx.x;
  const int i = t / 16, j = t % 16 * 2;  // two of the 32 x 32 elements of a half
  float* lower = work + kHalf * kWorkStride;
  float* corner = lower + kHalf;
  float* corner_MT = MT + kHalf * kFactorTile + kHalf;
  if (t < 32) factor_half(work, MT, floor);
  __syncthreads();
  float b[2] = {0.f, 0.f};
#pragma unroll 8
  for (int p = 0; p < kHalf; ++p) {
    const float x = lower[i * kWorkStride + p];
    b[0] = fmaf(x, MT[p * kFactorTile + j], b[0]);
    b[1] = fmaf(x, MT[p * kFactorTile + j + 1], b[1]);
  }
  __syncthreads();
  lower[i * kWorkStride + j] = b[0];
  lower[i * kWorkStride + j + 1] = b[1];
  __syncthreads();
  float c[2] = {0.f, 0.f}, u[2] = {0.f, 0.f};
#pragma unroll 8
  for (int p = 0; p < kHalf; ++p) {
    const float x = lower[i * kWorkStride + p];
    c[0] = fmaf(x, lower[j * kWorkStride + p], c[0]);
    c[1] = fmaf(x, lower[(j + 1) * kWorkStride + p], c[1]);
    u[0] = fmaf(x, MT[j * kFactorTile + p], u[0]);
    u[1] = fmaf(x, MT[(j + 1) * kFactorTile + p], u[1]);
  }
  corner[i * kWorkStride + j] -= c[0];
  corner[i * kWorkStride + j + 1] -= c[1];
  spare[i * kHalf + j] = u[0];
  spare[i * kHalf + j + 1] = u[1];
  __syncthreads();
  if (t < 32) factor_half(corner, corner_MT, floor);
  __syncthreads();
  float m[2] = {0.f, 0.f};
#pragma unroll 8
  for (int p = 0; p < kHalf; ++p) {
    const float x = corner_MT[p * kFactorTile + i];
    m[0] = fmaf(x, spare[p * kHalf + j], m[0]);
    m[1] = fmaf(x, spare[p * kHalf + j + 1], m[1]);
  }
  MT[j * kFactorTile + kHalf + i] = -m[0];
  MT[(j + 1) * kFactorTile + kHalf + i] = -m[1];
  MT[(kHalf + i) * kFactorTile + j] = 0.f;
  MT[(kHalf + i) * kFactorTile + j + 1] = 0.f;
  __syncthreads();
  for (int e = t; e < kTileElements; e += kFactorThreads) {
    M[e] = MT[e % kFactorTile * kFactorTile + e / kFactorTile];
  }
}

/// A = L L^T, then the lower triangle of A becomes M = L^-1, for a symmetric A with unit diagonal.
///
/// Step k, with the blocks already eliminated to the left and the rest below:
///   M_k = L_kk^-1;  row k of the inverse: T_kj <- M_k T_kj (j < k);  panel: L_ik = A_ik M_k^T (i >
///   k) A_ij <- A_ij - L_ik L_jk^T (j > k);  T_ik = -L_ik M_k;  T_ij <- T_ij - L_ik T_kj (j < k)
/// Every product is slot_i^T slot_j of two 64 x 64 tiles in shared memory.
///
/// A      (batch, extent, extent) float32, extent a multiple of 64; the upper triangle is not read
///                                below its diagonal tiles and is left as it was
/// floor  smallest pivot
static __global__ void __launch_bounds__(kFactorThreads, 1)
    cholesky_inverse_kernel(float* __restrict__ A, int64_t extent, float floor) {
  extern __shared__ float4 shared[];
  const int tiles = static_cast<int>(extent / kFactorTile);
  float* slots = reinterpret_cast<float*>(shared);
  float* MT = slots + tiles * kTileElements;
  float* work = MT + kTileElements;
  float* spare = work + kFactorTile * kWorkStride;
  float* a = A + static_cast<int64_t>(blockIdx.x) * extent * extent;
  const int t = threadIdx.x;
  const int group = t / kGroupThreads;
  const TilePlace at(t % kGroupThreads);

  const auto tile = [&](int i, int j) {
    return a + (static_cast<int64_t>(i) * extent + j) * kFactorTile;
  };
  const auto store = [&](float* to, int64_t stride, const float (&v)[4][4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      *reinterpret_cast<float4*>(to + (at.row + r) * stride + at.column) =
          make_float4(v[r][0], v[r][1], v[r][2], v[r][3]);
    }
  };

  for (int k = 0; k < tiles; ++k) {
    for (int e = t; e < kTileElements; e += kFactorThreads) {
      const int r = e / kFactorTile, c = e % kFactorTile;
      work[r * kWorkStride + c] = tile(k, k)[r * extent + c];
    }
    for (int e = t; e < tiles * kTileElements / 4; e += kFactorThreads) {
      const int i = e / (kTileElements / 4), within = e % (kTileElements / 4);
      if (i < k) {
        const int r = within / (kFactorTile / 4), c = within % (kFactorTile / 4) * 4;
        *reinterpret_cast<float4*>(slots + i * kTileElements + r * kFactorTile + c) =
            *reinterpret_cast<const float4*>(tile(k, i) + r * extent + c);
      } else if (i > k) {
        // Transposed on the way in: a warp stores 32 consecutive rows, without bank conflicts.
        const int r = within % kFactorTile, c = within / kFactorTile * 4;
        const float4 v = *reinterpret_cast<const float4*>(tile(i, k) + r * extent + c);
        float* to = slots + i * kTileElements + c * kFactorTile + r;
        to[0] = v.x;
        to[kFactorTile] = v.y;
        to[2 * kFactorTile] = v.z;
        to[3 * kFactorTile] = v.w;
      }
    }
    __syncthreads();
    factor_tile(work, slots + k * kTileElements, MT, spare, floor);
    __syncthreads();
    for (int i = group; i < tiles; i += 2) {
      if (i == k) continue;
      float* slot = slots + i * kTileElements;
      float sum[4][4];
      tile_product(MT, slot, at, sum);
      group_barrier(group);
      store(slot, kFactorTile, sum);
      if (i < k) store(tile(k, i), extent, sum);
    }
    for (int e = t; e < kTileElements / 4; e += kFactorThreads) {
      const int r = e / (kFactorTile / 4), c = e % (kFactorTile / 4) * 4;
      *reinterpret_cast<float4*>(tile(k, k) + r * extent + c) =
          *reinterpret_cast<const float4*>(slots + k * kTileElements + r * kFactorTile + c);
    }
    __syncthreads();
    int turn = 0;
    for (int i = k + 1; i < tiles; ++i) {
      for (int j = 0; j <= i; ++j, ++turn) {
        if (turn % 2 != group) continue;
        float* target = tile(i, j);
        float4 old[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          old[r] =
              j == k ? make_float4(0.f, 0.f, 0.f, 0.f)
                     : *reinterpret_cast<const float4*>(target + (at.row + r) * extent + at.column);
        }
        float sum[4][4];
        tile_product(slots + i * kTileElements, slots + j * kTileElements, at, sum);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          sum[r][0] = old[r].x - sum[r][0];
          sum[r][1] = old[r].y - sum[r][1];
          sum[r][2] = old[r].z - sum[r][2];
          sum[r][3] = old[r].w - sum[r][3];
        }
        store(target, extent, sum);
      }
    }
    __syncthreads();
  }
}

inline int64_t factor_extent(int64_t columns) { return round_up(columns, kFactorTile); }

inline cudaError_t launch_cholesky_inverse(float* A, int64_t batch, int64_t extent, float floor,
                                           cudaStream_t stream) {
  const int bytes = static_cast<int>(factor_shared_bytes(extent));
  const cudaError_t status = cudaFuncSetAttribute(
      cholesky_inverse_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  cholesky_inverse_kernel<<<static_cast<unsigned>(batch), kFactorThreads, bytes, stream>>>(
      A, extent, floor);
  return cudaGetLastError();
}

}  // namespace lorax
