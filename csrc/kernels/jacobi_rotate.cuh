// SPDX-License-Identifier: Apache-2.0
// Block Jacobi's rotations: a pair's 64 x 64 submatrix, diagonalised once over in registers. sm_80
// and newer.
#pragma once

#include <cfloat>

#include "jacobi_state.cuh"

namespace lorax {

constexpr int kJacobiThreads = kTileThreads;
constexpr int kJacobiStride = kTile + 1;  // odd: a warp reads a diagonal without conflicts

// p <- p - s (q + tau p), q <- q + s (p - tau q): s the sine, tau the tangent of half the angle.
struct Rotation {
  float s, tau;

  __device__ void turn(float& p, float& q) const {
    const float old = p;
    p = fmaf(-s, fmaf(tau, p, q), p);
    q = fmaf(s, fmaf(-tau, q, old), q);
  }
};

__device__ inline float fast_rsqrt(float v) {
  asm("rsqrt.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}

__device__ inline float fast_reciprocal(float v) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}

/// The rotation that makes h_pq zero. Its angle comes from approximate instructions, for it decides
/// only how fast H gets diagonal; its sine fits tau to one rounding, which keeps it orthogonal.
///
/// scale    power of two that keeps squares in range
/// tangent  becomes the angle's
__device__ inline Rotation annihilate(float hpp, float hpq, float hqq, float scale,
                                      float& tangent) {
  const float x = scale * (hpq + hpq), gap = scale * (hqq - hpp);
  const float inverse = fast_rsqrt(fmaxf(fmaf(gap, gap, x * x), FLT_MIN));
  const float square = fmaf(0.5f * fabsf(gap), inverse, 0.5f);  // of the cosine
  const float secant = fast_rsqrt(square), above = fmaf(square, secant, 1.f);
  const float half = 0.5f * copysignf(1.f, gap) * x * inverse;  // sine times cosine
  const float sine = half * secant, tau = sine * fast_reciprocal(above);
  tangent = sine * secant;
  // Newton's step to 2 tau / (1 + tau^2), whose denominator is 2 / (1 + cosine).
  const float left = fmaf(-sine * tau, tau, 2.f * tau - sine);
  return {fmaf(left, 0.5f * above, sine), tau};
}

constexpr int kWarps = kJacobiThreads / 32;
constexpr int kWarpPairs = kJacobiBlock / kWarps;
constexpr int kWarpRows = kTile / kWarps;

// Pairs of indices in cyclic groups: pair k of a group's `size` joins index k of its lower half and
// k + step of its upper half, so that `size` steps meet every pair between the halves once.
struct PairGroup {
  int size;

  __device__ int lower(int k) const { return k + (k & -size); }
  __device__ int upper(int k, int step) const { return lower(k & -size) + size + within(k + step); }
  // The pair whose upper index pair k gets in the next step, and the one that gets k's.
  __device__ int next(int k) const { return (k & -size) + within(k + 1); }
  __device__ int previous(int k) const { return (k & -size) + within(k - 1); }
  __device__ int within(int k) const { return k & (size - 1); }
};

struct RotateMemory {
  float S[kTile * kJacobiStride], J[kTile * kJacobiStride];
  // What warps tell each other of a step, by its parity: each pair's elements, and the rows that
  // move on to the warp before.
  float hpp[2][32], hpq[2][32], hqq[2][32];
  float rows[2][kWarps][2][32];
};

/// Steps first to first + steps - 1 of the groups. Lane i holds columns p and q of pair i, a warp
/// four pairs of rows of S and eight rows of J; after a step the elements of q go to the lane, or
/// the row, that pairs with them next. Only the diagonal, h_pq and a row a warp are shared.
///
/// steps    one where a warp's pairs of rows are not all in one group
/// largest  largest |S_pq| so far
/// tangent  largest tangent of the angles of elements above the threshold
__device__ inline void rotate_group(RotateMemory& shared, PairGroup group, int first, int steps,
                                    float scale, float threshold, uint32_t& largest,
                                    uint32_t& tangent) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * kWarpPairs;
  const int p = group.lower(lane), source = group.next(lane);
  const int sender = group.next(row + kWarpPairs - 1) / kWarpPairs;
  float a[kWarpPairs], b[kWarpPairs], c[kWarpPairs], d[kWarpPairs], x[kWarpRows], y[kWarpRows];
  {
    const int q = group.upper(lane, first), before = group.upper(lane, first - 1);
#pragma unroll
    for (int r = 0; r < kWarpPairs; ++r) {
      const float* above = shared.S + group.lower(row + r) * kJacobiStride;
      const float* below = shared.S + group.upper(row + r, first) * kJacobiStride;
      a[r] = above[p], b[r] = above[q], c[r] = below[p], d[r] = below[q];
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const float* from = shared.J + (warp * kWarpRows + r) * kJacobiStride;
      x[r] = from[p], y[r] = from[before];
    }
  }
  const int q = group.upper(lane, first);
  float hpp = shared.S[p * kJacobiStride + p], hpq = shared.S[p * kJacobiStride + q];
  float hqq = shared.S[q * kJacobiStride + q];
  __syncthreads();
  Rotation mine{0.f, 0.f};
  for (int step = 0;; ++step) {
    float t;
    const Rotation now = annihilate(hpp, hpq, hqq, scale, t);
    largest = max(largest, __float_as_uint(hpq) & 0x7fffffffu);
    if (!(fabsf(hpq) <= threshold)) tangent = max(tangent, __float_as_uint(t) & 0x7fffffffu);
    // J is a step late: nothing waits for it, and it fills the wait for the angle. It starts with
    // a rotation by zero.
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      mine.turn(x[r], y[r]);
      y[r] = __shfl_sync(0xffffffffu, y[r], source);
    }
    mine = now;
#pragma unroll
    for (int r = 0; r < kWarpPairs; ++r) {
      const Rotation rows{__shfl_sync(0xffffffffu, mine.s, row + r),
                          __shfl_sync(0xffffffffu, mine.tau, row + r)};
      mine.turn(a[r], b[r]);
      mine.turn(c[r], d[r]);
      rows.turn(a[r], c[r]);
      rows.turn(b[r], d[r]);
    }
    if (step == steps - 1) break;
    const int parity = step % 2;
    float diagonal[2], beside;
#pragma unroll
    for (int r = 0; r < kWarpPairs; ++r) {
      b[r] = __shfl_sync(0xffffffffu, b[r], source);
      if (r == 0 || lane % kWarpPairs == r) diagonal[0] = a[r], diagonal[1] = d[r], beside = b[r];
      d[r] = __shfl_sync(0xffffffffu, d[r], source);
    }
    if (lane / kWarpPairs == warp) {
      shared.hpp[parity][lane] = diagonal[0];
      shared.hpq[parity][lane] = beside;
      shared.hqq[parity][group.previous(lane)] = diagonal[1];
    }
    shared.rows[parity][warp][0][lane] = c[0];
    shared.rows[parity][warp][1][lane] = d[0];
#pragma unroll
    for (int r = 1; r < kWarpPairs; ++r) c[r - 1] = c[r], d[r - 1] = d[r];
    __syncthreads();
    hpp = shared.hpp[parity][lane];
    hpq = shared.hpq[parity][lane];
    hqq = shared.hqq[parity][lane];
    c[kWarpPairs - 1] = shared.rows[parity][sender][0][lane];
    d[kWarpPairs - 1] = shared.rows[parity][sender][1][lane];
  }
  {
    const int q = group.upper(lane, first + steps - 1);
#pragma unroll
    for (int r = 0; r < kWarpPairs; ++r) {
      float* above = shared.S + group.lower(row + r) * kJacobiStride;
      float* below = shared.S + group.upper(row + r, first + steps - 1) * kJacobiStride;
      above[p] = a[r], above[q] = b[r], below[p] = c[r], below[q] = d[r];
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      float* to = shared.J + (warp * kWarpRows + r) * kJacobiStride;
      mine.turn(x[r], y[r]);
      to[p] = x[r], to[q] = y[r];
    }
  }
  __syncthreads();
}

/// Rotates the 64 x 64 submatrix of each pair of blocks: every element between the blocks once, in
/// the first round of a sweep those within the blocks as well.
static __global__ void __launch_bounds__(kJacobiThreads)
    jacobi_rotate_kernel(const Jacobi* where, int round) {
  const Jacobi state = *where;
  const int sweep = *state.sweep;
  const int64_t batch = blockIdx.y, extent = state.extent;
  if (sweep > 0 && has_settled(state, batch, sweep - 1)) return;
  __shared__ RotateMemory shared;
  const int blocks = static_cast<int>(extent / kJacobiBlock), pair = blockIdx.x;
  const int t = threadIdx.x;
  const PairIndex index(round, blocks, pair);
  float* h = state.H + batch * extent * extent;
  const float threshold = jacobi_threshold(state, batch);
  const float scale = jacobi_scale(state, batch);
  bool is_needed = false;
  for (int e = t; e < kTileElements; e += kJacobiThreads) {
    const int r = e / kTile, c = e % kTile;
    const float v = h[index(r) * extent + index(c)];
    shared.S[r * kJacobiStride + c] = v;
    shared.J[r * kJacobiStride + c] = r == c ? 1.f : 0.f;
    const bool is_between = r < kJacobiBlock && c >= kJacobiBlock;
    if (is_between || (round == 0 && r != c)) is_needed |= !(fabsf(v) <= threshold);
  }
  is_needed = __syncthreads_or(is_needed);
  if (t == 0) state.is_active[batch * gridDim.x + pair] = is_needed;
  uint32_t largest = 0, tangent = 0;
  for (int size = round == 0 ? 1 : kJacobiBlock; is_needed && size <= kJacobiBlock; size *= 2) {
    const int steps = size < kWarpPairs ? 1 : size;
    for (int first = 0; first < size; first += steps) {
      rotate_group(shared, {size}, first, steps, scale, threshold, largest, tangent);
    }
  }
  __half* out = state.J + (batch * gridDim.x + pair) * 2 * kTileElements;
  for (int e = 2 * t; e < kTileElements; e += 2 * kJacobiThreads) {
    const float* from = shared.J + e / kTile * kJacobiStride + e % kTile;
    const TwoPieces two(from[0], from[1]);
    *reinterpret_cast<__half2*>(out + e) = two.high;
    *reinterpret_cast<__half2*>(out + kTileElements + e) = two.low;
  }
  if (!is_needed) return;
  for (int e = t; e < kTileElements; e += kJacobiThreads) {
    const int r = e / kTile, c = e % kTile;
    // The upper element of a pair decides both.
    h[index(r) * extent + index(c)] = shared.S[min(r, c) * kJacobiStride + max(r, c)];
  }
  if (t < 32) {
    largest = __reduce_max_sync(0xffffffffu, largest);
    tangent = __reduce_max_sync(0xffffffffu, tangent);
    uint2* seen = state.seen + batch * kMaxSweeps + sweep;
    if (t == 0) atomicMax(&seen->x, largest);
    if (t == 0) atomicMax(&seen->y, tangent);
  }
}

}  // namespace lorax
