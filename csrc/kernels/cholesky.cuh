// SPDX-License-Identifier: Apache-2.0
// Batched Cholesky factorisation and inverse of its factor: A = L L^T, M = L^-1. sm_80 and newer.
//
// Blocks of 64 columns, in float32 on the plain cores. The inverse is built in place by the same
// updates as the factorisation: eliminating block column k turns the trailing matrix into its Schur
// complement and, in the columns already eliminated, the identity into L^-1. A step is two
// launches: row and column of its diagonal block, and the rest. The next diagonal block is updated
// first and factored at once, beside the updates of other blocks: by itself it would hold the
// device up. One CTA a matrix for all would leave most of it idle at 16 matrices.
#pragma once

#include "symmetric.cuh"
#include "tile.cuh"

namespace lorax {

// What stands on the diagonal of L^-1 for a column that is left out; kept ones have 1 or more
// there, because pivots of a unit diagonal never exceed 1.
constexpr float kLeftOut = 0.5f;

__device__ inline bool left_out(float diagonal) { return diagonal < 0.75f; }

// A batch while it is being factored; the extent is a multiple of 64.
struct Factorization {
  float* A;      // (batch, extent, extent)
  float* steps;  // (batch, tiles + 1, 64, 64) what a step hands from launch to launch:
                 //   tiles  panels of the blocks below, transposed
                 //   1      M_kk transposed
  int64_t extent;
  float floor;  // pivots up to here are left out
};

inline int64_t step_elements(int64_t extent) { return (extent / kTile + 1) * kTileElements; }

// Shared memory of a factorisation: M; line k and line k + 1, a line being row k left of the
// diagonal and column k from there on; the diagonal in two parts, and one more that a loop reads.
constexpr int kFactorElements = kTileElements + 2 * kTile + 2 * (kTile + 2);

/// 1 / sqrt(x) to one rounding, from two.
__device__ inline float inverse_root(float x, float root) {
  return fmaf(0.5f * root, fmaf(-x * root, root, 1.f), root);
}

/// A thread's part of line k, of the block that it holds `a` of, and element k + 1 of its diagonal;
/// k = group + m, m < 4.
__device__ inline void leave_line(const float (&a)[4][4], const float (&low)[4], TilePlace at,
                                  int group, int m, float* line, float2* diagonal) {
  const bool is_row = at.row == group && at.column < group;
  const bool is_column = at.column == group && at.row >= group;
  float v[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    // In the block on the diagonal they meet.
    v[e] = is_row || (e < m && at.row == group) ? a[m][e] : a[e][m];
  }
  if (is_row || is_column) {
    *reinterpret_cast<float4*>(line + (is_row ? at.column : at.row)) =
        make_float4(v[0], v[1], v[2], v[3]);
  }
  const int after = (m + 1) % 4;
  if (at.row == at.column && at.row == group + m + 1 - after) {
    diagonal[at.row + after] = make_float2(a[after][after], low[after]);
  }
}

/// All threads: the diagonal block that they hold `a` of becomes M = L^-1.
///
/// Column by column, as blocks are: a step needs one line of the block, and who computes an element
/// of the next line leaves it in shared memory, so that a column is one barrier. The next pivot is
/// worked out by every thread, so that its root is taken while others are still on their way.
/// The diagonal, whose elements are the largest, also keeps what its differences were rounded by.
///
/// A column whose pivot is not above `floor` is left out: nothing is eliminated with it, and its
/// own row of L^-1 is half of what is left of it, unnormalised. Dividing by a replaced pivot
/// instead let the errors of dependent columns multiply from one to the next, to overflow at 130 of
/// them. NaN is no such pivot, and spreads.
///
/// shared  (kFactorElements,)  not in use by any thread but for its first tile
__device__ inline void factor_tile(float (&a)[4][4], TilePlace at, float floor, float* shared) {
  float* M = shared;
  float* lines = shared + kTileElements;
  float2* diagonal = reinterpret_cast<float2*>(lines + 2 * kTile);
  float low[4] = {};
  // Warps whose elements are all above the diagonal or in rows that are done only wait.
  const int last_row = at.row | 15;
  const int last_busy = (at.column & 32) <= last_row ? last_row : -1;
  leave_line(a, low, at, 0, 0, lines, diagonal);
  __syncthreads();
  float pivot = lines[0];
  float root = rsqrtf(pivot);
  for (int group = 0; group < kTile; group += 4) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      if (group <= last_busy) {
        const float* line = lines + m % 2 * kTile;
        const float4 x = *reinterpret_cast<const float4*>(line + at.row);
        const float4 y = *reinterpret_cast<const float4*>(line + at.column);
        const float exact = inverse_root(pivot, root);
        const float inverse = pivot <= floor ? kLeftOut : exact;
        const float lower = pivot <= floor ? 0.f : exact;
        const float next = line[group + m + 1] * lower;
        const float2 after = diagonal[group + m + 1];
        pivot = fmaf(-next, next, after.x) + after.y;
        root = rsqrtf(pivot);
        const float left[4] = {x.x * lower, x.y * lower, x.z * lower, x.w * lower};
        float right[4] = {y.x * inverse, y.y * inverse, y.z * inverse, y.w * inverse};
        const bool is_own = at.column == group;
        if (is_own) right[m] = inverse;
        if (at.row == group) {
          *reinterpret_cast<float4*>(M + (group + m) * kTile + at.column) =
              make_float4(right[0], right[1], right[2], right[3]);
        }
        // Rows up to k go on too, to no end: what they came to is in M.
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const float old = c == m && is_own ? 0.f : a[r][c];
            a[r][c] = fmaf(-left[r], right[c], old);
            if (r == c) low[r] += fmaf(-left[r], right[c], old - a[r][c]);
          }
        }
        leave_line(a, low, at, group + (m + 1) / 4 * 4, (m + 1) % 4, lines + (m + 1) % 2 * kTile,
                   diagonal);
      }
      __syncthreads();
    }
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int row = at.row + r, column = at.column + c;
      a[r][c] = column <= row ? M[row * kTile + column] : 0.f;
    }
  }
}

/// M = L_kk^-1 of the first diagonal block, in its place, and transposed for the panels.
///
/// where  the state is put, for the kernels of the steps
static __global__ void __launch_bounds__(kTileThreads)
    factor_kernel(Factorization state, Factorization* where) {
  if (blockIdx.x + threadIdx.x == 0) *where = state;
  __shared__ float4 shared[kFactorElements / 4];
  const int64_t extent = state.extent, tiles = extent / kTile;
  float* target = state.A + static_cast<int64_t>(blockIdx.x) * extent * extent;
  const TilePlace at(threadIdx.x);
  float a[4][4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const float4 v = *reinterpret_cast<const float4*>(target + (at.row + r) * extent + at.column);
    a[r][0] = v.x;
    a[r][1] = v.y;
    a[r][2] = v.z;
    a[r][3] = v.w;
  }
  factor_tile(a, at, state.floor, reinterpret_cast<float*>(shared));
  store_rows(target, extent, at, a);
  store_columns(state.steps + (blockIdx.x * (tiles + 1) + tiles) * kTileElements, kTile, at, a);
}

/// Left of diagonal block k the rows of the inverse, T_kj <- M_k T_kj, in place; below it, in
/// slots, the panel, (L_ik)^T = M_k A_ik^T, without what is left out.
static __global__ void __launch_bounds__(kTileThreads)
    panel_kernel(const Factorization* where, int k) {
  const Factorization state = *where;
  const int64_t extent = state.extent;
  const int i = blockIdx.x, t = threadIdx.x;
  if (i == k) return;
  __shared__ float4 shared[2 * kTileElements / 4];
  float* MT = reinterpret_cast<float*>(shared);
  float* right = MT + kTileElements;
  const int64_t tiles = extent / kTile;
  float* a = state.A + static_cast<int64_t>(blockIdx.y) * extent * extent;
  float* slots = state.steps + static_cast<int64_t>(blockIdx.y) * (tiles + 1) * kTileElements;
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
  if (i < k) {
    store_rows(row_k, extent, at, sum);
  } else {
    store_rows(slots + i * kTileElements, kTile, at, sum);
  }
}

/// What eliminating block k leaves of block (i, j), i > k, j <= i: A_ij - L_ik L_jk^T right of k,
/// -L_ik M_k in k, T_ij - L_ik T_kj left of it. Block (k + 1, k + 1) becomes M_(k + 1), and that
/// transposed goes to the panels.
static __global__ void __launch_bounds__(kTileThreads)
    update_kernel(const Factorization* where, int k) {
  const Factorization state = *where;
  const int64_t extent = state.extent;
  // Those that go on to factor come first: they take longest.
  const int tiles = static_cast<int>(extent / kTile);
  const int i = k + 1 + blockIdx.y, j = (k + 1 + blockIdx.z) % tiles, t = threadIdx.x;
  if (j > i) return;
  __shared__ float4 shared[2 * kTileElements / 4];
  static_assert(kFactorElements <= 2 * kTileElements, "both tiles make room for a factor");
  float* a = state.A + static_cast<int64_t>(blockIdx.x) * extent * extent;
  float* slots = state.steps + static_cast<int64_t>(blockIdx.x) * (tiles + 1) * kTileElements;
  const float4* left = reinterpret_cast<const float4*>(slots + i * kTileElements);
  const float* right = j > k ? slots + j * kTileElements : a + (k * extent + j) * kTile;
  const int64_t stride = j > k ? kTile : extent;
  for (int e = t; e < kTileElements / 4; e += kTileThreads) {
    shared[e] = left[e];
    shared[kTileElements / 4 + e] =
        *reinterpret_cast<const float4*>(right + e / (kTile / 4) * stride + e % (kTile / 4) * 4);
  }
  const TilePlace at(t);
  float* target = a + (i * extent + j) * kTile;
  float4 old[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    old[r] = j == k ? make_float4(0.f, 0.f, 0.f, 0.f)
                    : *reinterpret_cast<const float4*>(target + (at.row + r) * extent + at.column);
  }
  __syncthreads();
  float sum[4][4];
  float* tile = reinterpret_cast<float*>(shared);
  tile_product(tile, tile + kTileElements, at, sum);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    sum[r][0] = old[r].x - sum[r][0];
    sum[r][1] = old[r].y - sum[r][1];
    sum[r][2] = old[r].z - sum[r][2];
    sum[r][3] = old[r].w - sum[r][3];
  }
  if (i == k + 1 && j == i) {
    __syncthreads();
    factor_tile(sum, at, state.floor, tile);
    store_columns(slots + tiles * kTileElements, kTile, at, sum);
  }
  store_rows(target, extent, at, sum);
}

inline int64_t factor_extent(int64_t columns) { return round_up(columns, kTile); }

// The lower triangle of each A, symmetric with a unit diagonal, becomes M = L^-1; the upper one is
// not read above its diagonal tiles. Columns that are left out have 1/2 on the diagonal of M.
// The first step; those of launch_cholesky_steps must follow.
inline cudaError_t launch_cholesky_start(const Factorization& state, Factorization* where,
                                         int64_t batch, cudaStream_t stream) {
  factor_kernel<<<static_cast<unsigned>(batch), kTileThreads, 0, stream>>>(state, where);
  return cudaGetLastError();
}

// The other steps of the state that was put to `where`; none for a single tile. What is launched
// depends on its batch and extent alone.
inline cudaError_t launch_cholesky_steps(const Factorization* where, int64_t batch, int64_t extent,
                                         cudaStream_t stream) {
  const unsigned tiles = static_cast<unsigned>(extent / kTile);
  const unsigned count = static_cast<unsigned>(batch);
  for (unsigned k = 0; k < tiles && tiles > 1; ++k) {
    panel_kernel<<<dim3(tiles, count), kTileThreads, 0, stream>>>(where, k);
    if (k + 1 == tiles) break;
    update_kernel<<<dim3(count, tiles - k - 1, tiles), kTileThreads, 0, stream>>>(where, k);
  }
  return cudaGetLastError();
}

constexpr int kMendColumns = 32;  // of one CTA
constexpr int kMendWarps = 16;
// Independent columns come out within a percent of unit length.
constexpr float kMendShorter = 0.8f;
constexpr float kMendLonger = 1.25f;

// Column j of the result is the sum of M_ji x_i over columns x_i of unit length. An error E of
// their Gram matrix changes its squared length by m^T E m, m being row j of M: with E about 1e-6 by
// a percent where |m|^2 is 1e4. Its own pivot, whose inverse root is one element of m, does not
// tell: it may lie along a column before it whose pivot was small.
constexpr float kMendReach = 1e4f;

/// Q[b][:, j] = noise of about unit length where column j was left out or did not come out at unit
/// length, after a pass whose result is final.
///
/// What is left of such columns is nearly dependent on other ones: a pivot that is an error of the
/// Gram matrix betrays itself by the length that it leads to. NaN stays. Only the columns whose
/// length the factorisation leaves open are read; one CTA reads all rows of its columns.
///
/// M  (batch, extent, extent) float32, from the factorisation
/// Q  (batch, rows, columns)  float32, in place; mostly not touched
static __global__ void __launch_bounds__(kMendColumns* kMendWarps)
    mend_columns_kernel(const float* __restrict__ M, float* __restrict__ Q, int64_t rows,
                        int64_t columns, int64_t extent, uint32_t seed) {
  __shared__ bool left[kMendColumns], open[kMendColumns];
  __shared__ double sums[kMendWarps][kMendColumns];
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t batch = blockIdx.y, start = static_cast<int64_t>(blockIdx.x) * kMendColumns;
  for (int c = warp; c < kMendColumns; c += kMendWarps) {
    const int64_t j = start + c;
    const float* m = M + (batch * extent + j) * extent;
    float sum = 0.f;
    if (j < columns) {
#pragma unroll 8
      for (int64_t i = lane; i <= j; i += 32) sum = fmaf(m[i], m[i], sum);
    }
    for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    if (lane == 0) {
      left[c] = j < columns && left_out(m[j]);
      open[c] = left[c] || sum > kMendReach;
    }
  }
  __syncthreads();
  const bool is_open = open[lane];
  if (!__any_sync(0xffffffffu, is_open)) return;  // in every warp or in none
  float* q = Q + batch * rows * columns + start + lane;
  double sum = 0;
  if (is_open) {
#pragma unroll 8
    for (int64_t row = warp; row < rows; row += kMendWarps) {
      const double x = q[row * columns];
      sum += x * x;
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < kMendWarps; ++w) sum += sums[w][lane];
  const double length = sqrt(sum);
  const bool is_wrong = left[lane] || length < kMendShorter || length > kMendLonger;
  if (!is_open || !is_wrong || !isfinite(sum)) return;
  const float amplitude = sqrtf(3.f / static_cast<float>(rows));
  for (int64_t row = warp; row < rows; row += kMendWarps) {
    q[row * columns] = amplitude * position_noise(row, start + lane, seed);
  }
}

inline cudaError_t launch_mend_columns(const float* M, float* Q, int64_t batch, int64_t rows,
                                       int64_t columns, int64_t extent, uint32_t seed,
                                       cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(columns, kMendColumns)),
                  static_cast<unsigned>(batch));
  mend_columns_kernel<<<grid, dim3(kMendColumns, kMendWarps), 0, stream>>>(M, Q, rows, columns,
                                                                           extent, seed);
  return cudaGetLastError();
}

/// largest[0] = max over b and i of M[b][i][i], as bits: the reciprocal root of the least pivot.
///
/// A column that was left out counts as infinite, and NaN as above that.
///
/// M        (batch, extent, extent) float32, from the factorisation
/// largest  (1,)                    zero before
static __global__ void least_pivot_kernel(const float* __restrict__ M,
                                          uint32_t* __restrict__ largest, int64_t extent) {
  const float* m = M + static_cast<int64_t>(blockIdx.x) * extent * extent;
  uint32_t seen = 0;
  for (int64_t i = threadIdx.x; i < extent; i += blockDim.x) {
    const float diagonal = m[i * extent + i];
    // Bit patterns of non-negative numbers are ordered as the numbers are, NaN above all.
    seen = max(seen, __float_as_uint(left_out(diagonal) ? INFINITY : diagonal));
  }
  seen = __reduce_max_sync(0xffffffffu, seen);
  if (threadIdx.x % 32 == 0) atomicMax(largest, seen);
}

inline cudaError_t launch_least_pivot(const float* M, uint32_t* largest, int64_t batch,
                                      int64_t extent, cudaStream_t stream) {
  least_pivot_kernel<<<static_cast<unsigned>(batch), 256, 0, stream>>>(M, largest, extent);
  return cudaGetLastError();
}

}  // namespace lorax
