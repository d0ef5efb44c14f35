// SPDX-License-Identifier: Apache-2.0
// Batched symmetric eigendecomposition by two-sided block Jacobi: H -> J^T H J, V -> V J, until H
// is diagonal. sm_80 and newer; float32 on the plain cores.
//
// A matrix is cut into blocks of 32. A round pairs the blocks off; each pair's 64 x 64 submatrix is
// rotated in shared memory by one CTA (32 steps of 32 rotations that do not meet), and the
// collected rotations are applied to the rest of H and to V as 64 x 64 products. A sweep is every
// pair once. Nearly diagonal matrices need two to four sweeps, any other eight or nine at 256 to
// 512 columns; clusters of eigenvalues do no harm. Convergence is judged on the device: what a
// matrix that has settled still gets launched returns at once.
//
// Source: Golub, Van Loan, Matrix Computations, 8.5 (block Jacobi, parallel orderings).
#pragma once

#include <cuda_runtime.h>

#include "tile.cuh"

namespace lorax {

constexpr int kJacobiBlock = kTile / 2;
constexpr int kJacobiThreads = kTileThreads;
constexpr int kJacobiStride = kTile + 1;  // odd: a warp reads a diagonal without conflicts
// A matrix of NaN never settles; finite ones did after at most ten sweeps.
constexpr int kMaxSweeps = 20;
// Off-diagonal elements under this share of the largest element, over the extent, count as zero:
// together they then move eigenvalues by less than float32 sums do.
constexpr float kNegligible = 0x1p-21f;
constexpr int kTurnedStride = kTile + 4;  // fewer bank conflicts where a tile is stored transposed
constexpr int kApplyBytes =
    static_cast<int>(sizeof(float)) * (3 * kTileElements + kTile * kTurnedStride);

// A batch while it is being diagonalised; the extent is a multiple of 64.
struct Jacobi {
  float* H;           // (batch, extent, extent)
  float* VT;          // (batch, extent, extent) eigenvectors so far, one a row
  float* J;           // (batch, pairs, 64, 64)  rotations of a round
  int* is_active;     // (batch, pairs)          whether a pair was rotated
  uint32_t* largest;  // (batch,)                bits of the largest |H| at the start
  uint2* seen;        // (batch, kMaxSweeps)     bits of the largest |off-diagonal| rotated in a
                      //                         sweep and of the largest tangent; zeros at first
  int64_t batch;
  int64_t extent;
};

// Block `side` of pair `pair` in a round of the circle method: the last block stays, the others go
// round. The lower block of a pair comes first.
__device__ inline int jacobi_block(int round, int blocks, int pair, int side) {
  const int others = blocks - 1;
  int one = (round + pair) % others;
  int other = pair == 0 ? others : (round + others - pair) % others;
  return (one < other) == (side == 0) ? one : other;
}

// Where index i of a pair's 64 lies in the whole matrix.
struct PairIndex {
  int lower, upper;
  __device__ PairIndex(int round, int blocks, int pair)
      : lower(jacobi_block(round, blocks, pair, 0) * kJacobiBlock),
        upper(jacobi_block(round, blocks, pair, 1) * kJacobiBlock - kJacobiBlock) {}
  __device__ int operator()(int i) const { return (i < kJacobiBlock ? lower : upper) + i; }
};

__device__ inline float jacobi_threshold(const Jacobi& state, int64_t batch) {
  return __uint_as_float(state.largest[batch]) * kNegligible / static_cast<float>(state.extent);
}

// Whether what the sweep left is negligible: it shrinks by about the largest tangent, and a sweep
// of a settled matrix rotates nothing.
__device__ inline bool has_settled(const Jacobi& state, int64_t batch, int sweep) {
  const uint2 seen = state.seen[batch * kMaxSweeps + sweep];
  return __uint_as_float(seen.x) * __uint_as_float(seen.y) <= jacobi_threshold(state, batch);
}

/// Work copies: H padded with zeros, its lower triangle counting; V^T the identity.
///
/// H  (batch, columns, columns) float32, contiguous
static __global__ void jacobi_start_kernel(Jacobi state, const float* __restrict__ H,
                                           int64_t columns) {
  const int64_t batch = blockIdx.y, extent = state.extent;
  uint32_t largest = 0;
  for (int64_t i = blockIdx.x; i < extent; i += gridDim.x) {
    for (int64_t j = threadIdx.x; j < extent; j += blockDim.x) {
      float h = 0.f;
      if (i < columns && j < columns) {
        h = H[(batch * columns + (j < i ? i : j)) * columns + (j < i ? j : i)];
      }
      state.H[(batch * extent + i) * extent + j] = h;
      state.VT[(batch * extent + i) * extent + j] = i == j ? 1.f : 0.f;
      // Bit patterns of non-negative numbers are ordered as the numbers are, NaN above all.
      largest = max(largest, __float_as_uint(h) & 0x7fffffffu);
    }
  }
  largest = __reduce_max_sync(0xffffffffu, largest);
  if (threadIdx.x % 32 == 0) atomicMax(state.largest + batch, largest);
}

// A rotation by the angle that makes h_pq zero: p <- p - s (q + tau p), q <- q + s (p - tau q).
struct Rotation {
  float s, tau;

  __device__ void turn(float& p, float& q) const {
    const float old = p;
    p = fmaf(-s, fmaf(tau, p, q), p);
    q = fmaf(s, fmaf(-tau, q, old), q);
  }
};

/// One step: lane i of each warp rotates columns p and q of the pair's matrix S and of its J, and
/// the rows of S likewise. The pairs (p, q) of the lanes do not meet.
///
/// S, J     (64, 65) float32, shared
/// largest  largest |S_pq| so far
/// tangent  largest tangent of the angles of elements above the threshold
__device__ inline void jacobi_step(float* S, float* J, int p, int q, float threshold,
                                   uint32_t& largest, uint32_t& tangent) {
  const int warp = threadIdx.x / 32;
  const float hpq = S[p * kJacobiStride + q];
  const float zeta = (S[q * kJacobiStride + q] - S[p * kJacobiStride + p]) / (2.f * hpq);
  float t = copysignf(1.f, zeta) / (fabsf(zeta) + sqrtf(fmaf(zeta, zeta, 1.f)));
  if (hpq == 0.f) t = 0.f;
  // tan(angle / 2), and the sine from it: exactly orthogonal but for one rounding of the sine.
  const float tau = t / (1.f + sqrtf(fmaf(t, t, 1.f)));
  const Rotation mine{2.f * tau / fmaf(tau, tau, 1.f), tau};
  largest = max(largest, __float_as_uint(hpq) & 0x7fffffffu);
  if (!(fabsf(hpq) <= threshold)) tangent = max(tangent, __float_as_uint(t) & 0x7fffffffu);
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int lane = warp + 8 * k;
    const int above = __shfl_sync(0xffffffffu, p, lane) * kJacobiStride;
    const int below = __shfl_sync(0xffffffffu, q, lane) * kJacobiStride;
    const Rotation rows{__shfl_sync(0xffffffffu, mine.s, lane),
                        __shfl_sync(0xffffffffu, mine.tau, lane)};
    float a = S[above + p], b = S[above + q], c = S[below + p], d = S[below + q];
    mine.turn(a, b);
    mine.turn(c, d);
    rows.turn(a, c);
    rows.turn(b, d);
    S[above + p] = a;
    S[above + q] = b;
    S[below + p] = c;
    S[below + q] = d;
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    float* row = J + (warp + 8 * k) * kJacobiStride;
    float a = row[p], b = row[q];
    mine.turn(a, b);
    row[p] = a;
    row[q] = b;
  }
  __syncthreads();
}

/// Rotates the 64 x 64 submatrix of each pair of blocks: every element between the blocks once, in
/// the first round of a sweep those within the blocks as well.
static __global__ void __launch_bounds__(kJacobiThreads)
    jacobi_rotate_kernel(Jacobi state, int sweep, int round) {
  const int64_t batch = blockIdx.y, extent = state.extent;
  if (sweep > 0 && has_settled(state, batch, sweep - 1)) return;
  __shared__ float S[kTile * kJacobiStride], J[kTile * kJacobiStride];
  const int blocks = static_cast<int>(extent / kJacobiBlock), pair = blockIdx.x;
  const int t = threadIdx.x, lane = t % 32;
  const PairIndex index(round, blocks, pair);
  float* h = state.H + batch * extent * extent;
  const float threshold = jacobi_threshold(state, batch);
  bool is_needed = false;
  for (int e = t; e < kTileElements; e += kJacobiThreads) {
    const int r = e / kTile, c = e % kTile;
    const float v = h[index(r) * extent + index(c)];
    S[r * kJacobiStride + c] = v;
    J[r * kJacobiStride + c] = r == c ? 1.f : 0.f;
    const bool is_between = r < kJacobiBlock && c >= kJacobiBlock;
    if (is_between || (round == 0 && r != c)) is_needed |= !(fabsf(v) <= threshold);
  }
  is_needed = __syncthreads_or(is_needed);
  if (t == 0) state.is_active[batch * gridDim.x + pair] = is_needed;
  if (!is_needed) return;
  uint32_t largest = 0, tangent = 0;
  if (round == 0) {
    constexpr int kOthers = kJacobiBlock - 1;
    const int within = lane % (kJacobiBlock / 2), start = lane / (kJacobiBlock / 2) * kJacobiBlock;
    for (int step = 0; step < kOthers; ++step) {
      jacobi_step(S, J, start + jacobi_block(step, kJacobiBlock, within, 0),
                  start + jacobi_block(step, kJacobiBlock, within, 1), threshold, largest, tangent);
    }
  }
  for (int step = 0; step < kJacobiBlock; ++step) {
    jacobi_step(S, J, lane, kJacobiBlock + (lane + step) % kJacobiBlock, threshold, largest,
                tangent);
  }
  float* out = state.J + (batch * gridDim.x + pair) * kTileElements;
  for (int e = t; e < kTileElements; e += kJacobiThreads) {
    const int r = e / kTile, c = e % kTile;
    // The upper element of a pair decides both.
    h[index(r) * extent + index(c)] = S[min(r, c) * kJacobiStride + max(r, c)];
    out[e] = J[r * kJacobiStride + c];
  }
  if (t < 32) {
    largest = __reduce_max_sync(0xffffffffu, largest);
    tangent = __reduce_max_sync(0xffffffffu, tangent);
    uint2* seen = state.seen + batch * kMaxSweeps + sweep;
    if (t == 0) atomicMax(&seen->x, largest);
    if (t == 0) atomicMax(&seen->y, tangent);
  }
}

// Rotations of a pair into shared memory; the identity where it was left alone.
__device__ inline void load_rotations(const Jacobi& state, int64_t batch, int pair, bool is_active,
                                      float* J) {
  const int64_t pairs = state.extent / kTile;
  const float* from = state.J + (batch * pairs + pair) * kTileElements;
  for (int e = threadIdx.x * 4; e < kTileElements; e += kJacobiThreads * 4) {
    float4 v;
    if (is_active) {
      v = *reinterpret_cast<const float4*>(from + e);
    } else {
      const int ahead = e / kTile - e % kTile;
      v = make_float4(ahead == 0, ahead == 1, ahead == 2, ahead == 3);
    }
    *reinterpret_cast<float4*>(J + e) = v;
  }
}

/// Applies the rotations of a round. CTAs with the lower indices: H_PQ <- J_P^T H_PQ J_Q and its
/// mirror image, for pairs P < Q; the others: rows Q of V^T <- J_Q^T times them, 64 columns each.
static __global__ void __launch_bounds__(kJacobiThreads)
    jacobi_apply_kernel(Jacobi state, int sweep, int round) {
  const int64_t batch = blockIdx.y, extent = state.extent;
  if (sweep > 0 && has_settled(state, batch, sweep - 1)) return;
  extern __shared__ float4 shared[];
  float* JQ = reinterpret_cast<float*>(shared);
  float* tile = JQ + kTileElements;
  float* JP = tile + kTileElements;
  float* turned = JP + kTileElements;
  const int pairs = static_cast<int>(extent / kTile), blocks = 2 * pairs, t = threadIdx.x;
  const int* is_active = state.is_active + batch * pairs;
  const TilePlace at(t);
  float sum[4][4];
  int e = static_cast<int>(blockIdx.x) - pairs * (pairs - 1) / 2;
  if (e >= 0) {
    const int Q = e / pairs, start = e % pairs * kTile;
    if (!is_active[Q]) return;
    const PairIndex index(round, blocks, Q);
    float* vt = state.VT + batch * extent * extent + start;
    load_rotations(state, batch, Q, true, JQ);
    for (int i = t * 4; i < kTileElements; i += kJacobiThreads * 4) {
      *reinterpret_cast<float4*>(tile + i) =
          *reinterpret_cast<const float4*>(vt + index(i / kTile) * extent + i % kTile);
    }
    __syncthreads();
    tile_product(JQ, tile, at, sum);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      *reinterpret_cast<float4*>(vt + index(at.row + r) * extent + at.column) =
          make_float4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    }
    return;
  }
  int P = 0;
  for (e = blockIdx.x; e >= pairs - 1 - P; ++P) e -= pairs - 1 - P;
  const int Q = P + 1 + e;
  if (!is_active[P] && !is_active[Q]) return;
  const PairIndex row(round, blocks, P), column(round, blocks, Q);
  float* h = state.H + batch * extent * extent;
  load_rotations(state, batch, P, is_active[P], JP);
  load_rotations(state, batch, Q, is_active[Q], JQ);
  for (int i = t * 4; i < kTileElements; i += kJacobiThreads * 4) {
    *reinterpret_cast<float4*>(tile + i) =
        *reinterpret_cast<const float4*>(h + row(i / kTile) * extent + column(i % kTile));
  }
  __syncthreads();
  tile_product(JP, tile, at, sum);
  store_columns(turned, kTurnedStride, at, sum);
  __syncthreads();
  tile_product<kTurnedStride>(turned, JQ, at, sum);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<float4*>(h + row(at.row + i) * extent + column(at.column)) =
        make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
    *reinterpret_cast<float4*>(h + column(at.column + i) * extent + row(at.row)) =
        make_float4(sum[0][i], sum[1][i], sum[2][i], sum[3][i]);
  }
}

/// count = how many matrices have not settled after a sweep.
///
/// count  one int
static __global__ void jacobi_count_kernel(Jacobi state, int sweep, int* count) {
  int mine = 0;
  for (int64_t b = threadIdx.x; b < state.batch; b += blockDim.x) {
    mine += !has_settled(state, b, sweep);
  }
  mine = __reduce_add_sync(0xffffffffu, mine);
  if (threadIdx.x == 0) *count = mine;
}

inline int64_t jacobi_extent(int64_t columns) { return round_up(columns, kTile); }

// `largest` and `seen` must be zero.
inline cudaError_t launch_jacobi_start(const Jacobi& state, const float* H, int64_t columns,
                                       cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(state.extent, 16)),
                  static_cast<unsigned>(state.batch));
  jacobi_start_kernel<<<grid, 128, 0, stream>>>(state, H, columns);
  return cudaGetLastError();
}

// One sweep; `count` (device) receives how many matrices need another.
inline cudaError_t launch_jacobi_sweep(const Jacobi& state, int sweep, int* count,
                                       cudaStream_t stream) {
  const cudaError_t status = cudaFuncSetAttribute(
      jacobi_apply_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kApplyBytes);
  if (status != cudaSuccess) return status;
  const int pairs = static_cast<int>(state.extent / kTile);
  const unsigned batch = static_cast<unsigned>(state.batch);
  const unsigned tiles = static_cast<unsigned>(pairs * (pairs - 1) / 2 + pairs * pairs);
  for (int round = 0; round < 2 * pairs - 1; ++round) {
    jacobi_rotate_kernel<<<dim3(pairs, batch), kJacobiThreads, 0, stream>>>(state, sweep, round);
    jacobi_apply_kernel<<<dim3(tiles, batch), kJacobiThreads, kApplyBytes, stream>>>(state, sweep,
                                                                                     round);
  }
  jacobi_count_kernel<<<1, 32, 0, stream>>>(state, sweep, count);
  return cudaGetLastError();
}

}  // namespace lorax
