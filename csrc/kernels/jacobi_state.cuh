// SPDX-License-Identifier: Apache-2.0
// A batch of symmetric matrices while block Jacobi (jacobi.cuh) diagonalises it.
#pragma once

#include <cuda_fp16.h>

#include "tile.cuh"

namespace lorax {

constexpr int kJacobiBlock = kTile / 2;
// A matrix of NaN never settles, nor do eigenvalues repeated many times over; others did after at
// most seventeen sweeps.
constexpr int kMaxSweeps = 20;
// Off-diagonal elements under this share of the largest element, over the extent, count as zero:
// together they then move eigenvalues by less than float32 sums do.
constexpr float kNegligible = 0x1p-21f;

// A batch while it is being diagonalised; the extent is a multiple of 64.
struct Jacobi {
  float* H;           // (batch, extent, extent)
  float* VT;          // (batch, extent, extent) eigenvectors so far, one a row
  __half* J;          // (batch, pairs, 2, 64, 64) rotations of a round, high and low pieces
  int* is_active;     // (batch, pairs)          whether a pair was rotated
  uint32_t* largest;  // (batch,)                bits of the largest |H| at the start
  uint2* seen;        // (batch, kMaxSweeps)     bits of the largest |off-diagonal| rotated in a
                      //                         sweep and of the largest tangent; zeros at first
  int* sweep;         // how many sweeps are over; zero at first
  int* left;          // (kMaxSweeps,)           how many matrices had not settled after each;
                      //                         pinned memory of the host will do
  int64_t batch;
  int64_t extent;
};

// Block `side` of pair `pair` in a round of the circle method: the last block stays, the others go
// round. The lower block of a pair comes first.
__device__ inline int jacobi_block(int round, int blocks, int pair, int side) {
  const int others = blocks - 1;
  int one = round + pair, other = round - pair;  // modulo others
  if (one >= others) one -= others;
  if (other < 0) other += others;
  if (pair == 0) other = others;
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

// Power of two that takes the largest eigenvalue there can be to less than 2^15: squares stay in
// float32's range, elements in float16's.
__device__ inline float jacobi_scale(const Jacobi& state, int64_t batch) {
  const int exponent = static_cast<int>(state.largest[batch] >> 23);
  const int bits = 32 - __clz(static_cast<int>(state.extent) - 1);
  return __uint_as_float(static_cast<uint32_t>(min(max(268 - exponent - bits, 1), 253)) << 23);
}

// Whether what the sweep left is negligible: it shrinks by about the largest tangent, and a sweep
// of a settled matrix rotates nothing.
__device__ inline bool has_settled(const Jacobi& state, int64_t batch, int sweep) {
  const uint2 seen = state.seen[batch * kMaxSweeps + sweep];
  return __uint_as_float(seen.x) * __uint_as_float(seen.y) <= jacobi_threshold(state, batch);
}

// Two numbers as sums of two float16 pieces, 22 bits: high + low / 2^11, the factor keeping the low
// ones out of subnormals.
constexpr float kLowScale = 0x1p11f;

struct TwoPieces {
  __half2 high, low;

  __device__ TwoPieces(float a, float b) : high(__floats2half2_rn(a, b)) {
    const float2 known = __half22float2(high);
    low = __floats2half2_rn((a - known.x) * kLowScale, (b - known.y) * kLowScale);
  }
};

}  // namespace lorax
