// SPDX-License-Identifier: Apache-2.0
// Batched Cholesky factorisation and inverse of its factor: A = L L^T, M = L^-1. sm_80 and newer.
//
// Blocks of 64 columns, in float32 on the plain cores. The inverse is built in place by the same
// updates as the factorisation: eliminating block column k turns the trailing matrix into its Schur
// complement and, in the columns already eliminated, the identity into L^-1. A step is three
// launches (diagonal block, its row and column, the rest): one CTA a matrix would leave most of the
// device idle at 16 matrices, and took 0.8 ms at 512 columns.
#pragma once

#include "symmetric.cuh"
#include "tile.cuh"

namespace lorax {

constexpr int kFactorThreads = 512;
constexpr int kHalf = kTile / 2;        // what one warp factors in registers
constexpr int kWorkStride = kTile + 1;  // odd: a warp reads a column without conflicts

// Shared memory of factor_kernel: M and MT, the block while it is factored, a product inside it.
constexpr int kFactorBytes =
    static_cast<int>(sizeof(float)) * (2 * kTileElements + kTile * kWorkStride + kHalf * kHalf);

// What stands on the diagonal of L^-1 for a column that is left out; kept ones have 1 or more
// there, because pivots of a unit diagonal never exceed 1.
constexpr float kLeftOut = 0.5f;

__device__ inline bool left_out(float diagonal) { return diagonal < 0.75f; }

// What a step hands from launch to launch, for each matrix of t tiles a side.
//   slots  t tiles: block row or column of each other block, as the updates want it; M_kk for k
//   MT     1 tile:  M_kk transposed
inline int64_t step_elements(int64_t extent) { return (extent / kTile + 1) * kTileElements; }

/// One warp: the 32 x 32 block at `work` becomes its lower factor L; MT gets (L^-1)^T.
///
/// A column whose pivot is not above `floor` is left out: nothing is eliminated with it, and its
/// own row of L^-1 is half of what is left of it, unnormalised. Dividing by a replaced pivot
/// instead let the errors of dependent columns multiply from one to the next, to overflow at 130 of
/// them.
__device__ inline void factor_half(float* work, float* MT, float floor) {
  const int lane = threadIdx.x % 32;
  float a[kHalf];
#pragma unroll
  for (int j = 0; j < kHalf; ++j) a[j] = work[lane * kWorkStride + j];
  float reciprocal = 0.f;
#pragma unroll
  for (int k = 0; k < kHalf; ++k) {
    const float pivot = __shfl_sync(0xffffffffu, a[k], k);
    const bool kept = pivot > floor;
    const float inverse = kept ? 1.f / sqrtf(pivot) : kLeftOut;
    if (lane == k) {
      a[k] = 1.f / inverse;
      reciprocal = inverse;
    } else {
      a[k] = kept ? a[k] * inverse : 0.f;
    }
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
    MT[lane * kTile + i] = x[i];
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
  float* corner_MT = MT + kHalf * kTile + kHalf;
  if (t < 32) factor_half(work, MT, floor);
  __syncthreads();
  float b[2] = {0.f, 0.f};
#pragma unroll 8
  for (int p = 0; p < kHalf; ++p) {
    const float x = lower[i * kWorkStride + p];
    b[0] = fmaf(x, MT[p * kTile + j], b[0]);
    b[1] = fmaf(x, MT[p * kTile + j + 1], b[1]);
  }
  __syncthreads();
  lower[i * kWorkStride + j] = left_out(MT[j * kTile + j]) ? 0.f : b[0];
  lower[i * kWorkStride + j + 1] = left_out(MT[(j + 1) * kTile + j + 1]) ? 0.f : b[1];
  __syncthreads();
  float c[2] = {0.f, 0.f}, u[2] = {0.f, 0.f};
#pragma unroll 8
  for (int p = 0; p < kHalf; ++p) {
    const float x = lower[i * kWorkStride + p];
    c[0] = fmaf(x, lower[j * kWorkStride + p], c[0]);
    c[1] = fmaf(x, lower[(j + 1) * kWorkStride + p], c[1]);
    u[0] = fmaf(x, MT[j * kTile + p], u[0]);
    u[1] = fmaf(x, MT[(j + 1) * kTile + p], u[1]);
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
    const float x = corner_MT[p * kTile + i];
    m[0] = fmaf(x, spare[p * kHalf + j], m[0]);
    m[1] = fmaf(x, spare[p * kHalf + j + 1], m[1]);
  }
  MT[j * kTile + kHalf + i] = -m[0];
  MT[(j + 1) * kTile + kHalf + i] = -m[1];
  MT[(kHalf + i) * kTile + j] = 0.f;
  MT[(kHalf + i) * kTile + j + 1] = 0.f;
  __syncthreads();
  for (int e = t; e < kTileElements; e += kFactorThreads) {
    M[e] = MT[e % kTile * kTile + e / kTile];
  }
}

/// M = L_kk^-1 of diagonal block k, in its place; in a slot for the updates; transposed for the
/// panels.
///
/// A      (batch, extent, extent)      float32
/// steps  (batch, tiles + 1, 64, 64)   float32
static __global__ void __launch_bounds__(kFactorThreads)
    factor_kernel(float* __restrict__ A, float* __restrict__ steps, int64_t extent, int k,
                  float floor) {
  extern __shared__ float4 shared[];
  float* M = reinterpret_cast<float*>(shared);
  float* MT = M + kTileElements;
  float* work = MT + kTileElements;
  float* spare = work + kTile * kWorkStride;
  const int64_t tiles = extent / kTile;
  float* tile = A + (static_cast<int64_t>(blockIdx.x) * extent + k * kTile) * extent + k * kTile;
  float* slots = steps + static_cast<int64_t>(blockIdx.x) * (tiles + 1) * kTileElements;
  for (int e = threadIdx.x; e < kTileElements; e += kFactorThreads) {
    const int r = e / kTile, c = e % kTile;
    work[r * kWorkStride + c] = tile[r * extent + c];
  }
  __syncthreads();
  factor_tile(work, M, MT, spare, floor);
  __syncthreads();
  for (int e = threadIdx.x; e < kTileElements; e += kFactorThreads) {
    tile[e / kTile * extent + e % kTile] = M[e];
    slots[k * kTileElements + e] = M[e];
    slots[tiles * kTileElements + e] = MT[e];
  }
}

/// Slots of block k: left of the diagonal the rows of the inverse, T_kj <- M_k T_kj; below it the
/// panel, (L_ik)^T = M_k A_ik^T, without what is left out.
///
/// A      (batch, extent, extent)      float32
/// steps  (batch, tiles + 1, 64, 64)   float32
static __global__ void __launch_bounds__(kTileThreads)
    panel_kernel(float* __restrict__ A, float* __restrict__ steps, int64_t extent, int k) {
  const int i = blockIdx.x, t = threadIdx.x;
  if (i == k) return;
  __shared__ float4 shared[2 * kTileElements / 4];
  float* MT = reinterpret_cast<float*>(shared);
  float* right = MT + kTileElements;
  const int64_t tiles = extent / kTile;
  float* a = A + static_cast<int64_t>(blockIdx.y) * extent * extent;
  float* slots = steps + static_cast<int64_t>(blockIdx.y) * (tiles + 1) * kTileElements;
  const float4* from = reinterpret_cast<const float4*>(slots + tiles * kTileElements);
  float* row_k = a + static_cast<int64_t>(k) * kTile * extent + i * kTile;
  const float* column_k = a + static_cast<int64_t>(i) * kTile * extent + k * kTile;
  for (int e = t; e < kTileElements / 4; e += kTileThreads) {
    shared[e] = from[e];
    if (i < k) {
      const int r = e / (kTile / 4), c = e % (kTile / 4) * 4;
      *reinterpret_cast<float4*>(right + r * kTile + c) =
          *reinterpret_cast<const float4*>(row_k + r * extent + c);
    } else {
      // Transposed on the way in: a warp stores 32 consecutive rows, without bank conflicts.
      const int r = e % kTile, c = e / kTile * 4;
      const float4 v = *reinterpret_cast<const float4*>(column_k + r * extent + c);
      float* to = right + c * kTile + r;
      to[0] = v.x;
      to[kTile] = v.y;
      to[2 * kTile] = v.z;
      to[3 * kTile] = v.w;
    }
  }
  __syncthreads();
  const TilePlace at(t);
  float sum[4][4];
  tile_product(MT, right, at, sum);
  if (i > k) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (!left_out(MT[(at.row + r) * kTile + at.row + r])) continue;
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[r][c] = 0.f;
    }
  }
  store_rows(slots + i * kTileElements, kTile, at, sum);
  if (i < k) store_rows(row_k, extent, at, sum);
}

/// What eliminating block k leaves of block (i, j), i > k, j <= i: A_ij - L_ik L_jk^T right of k,
/// -L_ik M_k in k, T_ij - L_ik T_kj left of it; each is A_ij - slot_i^T slot_j.
///
/// A      (batch, extent, extent)      float32
/// steps  (batch, tiles + 1, 64, 64)   float32
static __global__ void __launch_bounds__(kTileThreads)
    update_kernel(float* __restrict__ A, const float* __restrict__ steps, int64_t extent, int k) {
  const int j = blockIdx.x, i = k + 1 + blockIdx.y, t = threadIdx.x;
  if (j > i) return;
  __shared__ float4 shared[2 * kTileElements / 4];
  const int64_t tiles = extent / kTile;
  const float* slots = steps + static_cast<int64_t>(blockIdx.z) * (tiles + 1) * kTileElements;
  const float4* left = reinterpret_cast<const float4*>(slots + i * kTileElements);
  const float4* right = reinterpret_cast<const float4*>(slots + j * kTileElements);
  for (int e = t; e < kTileElements / 4; e += kTileThreads) {
    shared[e] = left[e];
    shared[kTileElements / 4 + e] = right[e];
  }
  const TilePlace at(t);
  float* target = A + (static_cast<int64_t>(blockIdx.z) * extent + i * kTile) * extent + j * kTile;
  float4 old[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    old[r] = j == k ? make_float4(0.f, 0.f, 0.f, 0.f)
                    : *reinterpret_cast<const float4*>(target + (at.row + r) * extent + at.column);
  }
  __syncthreads();
  float sum[4][4];
  const float* tile = reinterpret_cast<const float*>(shared);
  tile_product(tile, tile + kTileElements, at, sum);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    sum[r][0] = old[r].x - sum[r][0];
    sum[r][1] = old[r].y - sum[r][1];
    sum[r][2] = old[r].z - sum[r][2];
    sum[r][3] = old[r].w - sum[r][3];
  }
  store_rows(target, extent, at, sum);
}

inline int64_t factor_extent(int64_t columns) { return round_up(columns, kTile); }

// The lower triangle of each A (batch, extent, extent), symmetric with a unit diagonal, becomes
// M = L^-1; the upper one is not read above its diagonal tiles. Columns with pivots up to `floor`
// are left out: 1/2 on the diagonal of M. `steps` is scratch of batch * step_elements(extent)
// floats.
inline cudaError_t launch_cholesky_inverse(float* A, float* steps, int64_t batch, int64_t extent,
                                           float floor, cudaStream_t stream) {
  const cudaError_t status = cudaFuncSetAttribute(
      factor_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kFactorBytes);
  if (status != cudaSuccess) return status;
  const unsigned tiles = static_cast<unsigned>(extent / kTile);
  const unsigned count = static_cast<unsigned>(batch);
  for (unsigned k = 0; k < tiles; ++k) {
    factor_kernel<<<count, kFactorThreads, kFactorBytes, stream>>>(A, steps, extent, k, floor);
    if (tiles > 1)
      panel_kernel<<<dim3(tiles, count), kTileThreads, 0, stream>>>(A, steps, extent, k);
    if (k + 1 < tiles) {
      update_kernel<<<dim3(tiles, tiles - k - 1, count), kTileThreads, 0, stream>>>(A, steps,
                                                                                    extent, k);
    }
  }
  return cudaGetLastError();
}

constexpr int kMendThreadsX = 32;
constexpr int kMendThreadsY = 8;
constexpr int kMendRows = 256;  // rows of one CTA
// Independent columns come out within a percent of unit length.
constexpr float kMendShorter = 0.8f;
constexpr float kMendLonger = 1.25f;

/// Q[b][:, j] = noise of about unit length where column j was left out or did not come out at unit
/// length, after a pass whose result is final.
///
/// What is left of such columns is nearly dependent on other ones: a pivot that is an error of the
/// Gram matrix betrays itself by the length that it leads to. NaN stays.
///
/// M       (batch, extent, extent) float32, from the factorisation
/// scale   (batch, columns)        float32, of Q, from column_scales_kernel
/// square  (batch, columns)        float32, of Q, from column_scales_kernel
/// Q       (batch, rows, columns)  float32, in place; mostly not touched
static __global__ void mend_columns_kernel(const float* __restrict__ M,
                                           const float* __restrict__ scale,
                                           const float* __restrict__ square, float* __restrict__ Q,
                                           int64_t rows, int64_t columns, int64_t extent,
                                           uint32_t seed) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kMendThreadsX + threadIdx.x;
  if (column >= columns) return;
  const int64_t batch = blockIdx.z;
  const float square_now = square[batch * columns + column];
  const float length =
      sqrtf(square_now) * scalbnf(1.f / scale[batch * columns + column], kPieceExponent);
  const bool wrong = square_now < 0.f || length < kMendShorter || length > kMendLonger;
  const bool left = left_out(M[batch * extent * extent + column * extent + column]);
  if (isnan(square_now) || !(left || wrong)) return;
  const float amplitude = sqrtf(3.f / static_cast<float>(rows));
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kMendRows;
  const int64_t last = first + kMendRows < rows ? first + kMendRows : rows;
  for (int64_t row = first + threadIdx.y; row < last; row += kMendThreadsY) {
    Q[(batch * rows + row) * columns + column] = amplitude * position_noise(row, column, seed);
  }
}

inline cudaError_t launch_mend_columns(const float* M, const float* scale, const float* square,
                                       float* Q, int64_t batch, int64_t rows, int64_t columns,
                                       int64_t extent, uint32_t seed, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(columns, kMendThreadsX)),
                  static_cast<unsigned>(ceil_div(rows, kMendRows)), static_cast<unsigned>(batch));
  mend_columns_kernel<<<grid, dim3(kMendThreadsX, kMendThreadsY), 0, stream>>>(
      M, scale, square, Q, rows, columns, extent, seed);
  return cudaGetLastError();
}

/// largest[0] = max over b and i > j of |G[b][i][j]|, as bits; NaN counts as above all.
///
/// G        (batch, extent, extent) float32, symmetric
/// largest  (1,)                    zero before
static __global__ void off_diagonal_kernel(const float* __restrict__ G,
                                           uint32_t* __restrict__ largest, int64_t extent) {
  const int64_t row = blockIdx.x;
  const float* g = G + (static_cast<int64_t>(blockIdx.y) * extent + row) * extent;
  uint32_t seen = 0;
  for (int64_t c = threadIdx.x; c < row; c += 32) {
    // Bit patterns of non-negative numbers are ordered as the numbers are, NaN above all.
    seen = max(seen, __float_as_uint(g[c]) & 0x7fffffffu);
  }
  seen = __reduce_max_sync(0xffffffffu, seen);
  // A read first: most rows do not raise the maximum, and atomics on one address queue up.
  if (threadIdx.x == 0 && seen > *static_cast<volatile uint32_t*>(largest)) {
    atomicMax(largest, seen);
  }
}

inline cudaError_t launch_off_diagonal(const float* G, uint32_t* largest, int64_t batch,
                                       int64_t extent, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(extent), static_cast<unsigned>(batch));
  off_diagonal_kernel<<<grid, 32, 0, stream>>>(G, largest, extent);
  return cudaGetLastError();
}

}  // namespace lorax
