// SPDX-License-Identifier: Apache-2.0
// The end of a subspace iteration in one CTA a matrix: from the Gram matrices of Q and of B = A^T Q
// to what turns both into singular vectors. float64 in shared memory. sm_80 and newer.
//
// The eigenproblem goes to Jacobi's method, as many rotations at a time as do not meet. Blocks that
// were iterated on come nearly diagonal and in descending order, so that a few sweeps do.
//
// Source: Golub, Van Loan, Matrix Computations, 8.5 (parallel orderings).
#pragma once

#include "narrow.cuh"

namespace lorax {

constexpr int kRitzColumns = 64;
constexpr int kRitzSweeps = 30;  // twelve were the most that anything took
// An element is rotated away above these shares of the geometric mean of its diagonal elements
// and of the largest: what rotations leave of it is rounding. As squares.
constexpr double kRotatedShare = 0x1p-100;
constexpr double kRotatedLeast = 0x1p-132;

constexpr int kRitzDone = 0;
constexpr int kRitzDependent = 1;  // Gram matrices do not tell enough
constexpr int kRitzNotFinite = 2;

// Index `side` of pair `pair` in a round of the circle method: the last index stays, the others go
// round. The lower index of a pair comes first.
__device__ inline int circle_index(int round, int count, int pair, int side) {
  const int others = count - 1;
  const int one = (round + pair) % others;
  const int other = pair == 0 ? others : (round + others - pair) % others;
  return (one < other) == (side == 0) ? one : other;
}

// Shared memory of the kernel: three matrices, lines of pivots, rotations.
inline int64_t ritz_bytes(int64_t columns) {
  const int n = static_cast<int>(round_up(columns, 2));
  return static_cast<int64_t>(sizeof(double)) * (3 * n * small_stride(n) + 3 * n);
}

// Two rows and two columns of a symmetric matrix, rotated.
struct Rotated {
  double c, s;
  __device__ void turn(double& p, double& q) const {
    const double old = p;
    p = c * old - s * q;
    q = s * old + c * q;
  }
};

/// All threads: H -> J^T H J until it is diagonal, V -> V J.
///
/// H, V     (n, stride)  shared; n even, at most 64; H symmetric, its largest element about 1
/// cosines  (n,)         shared; cosines and sines of a round
__device__ inline void diagonalize(double* H, double* V, double* cosines, int n, int stride) {
  const int t = threadIdx.x, pairs = n / 2;
  double* sines = cosines + pairs;
  // A power of two of threads in a row of pairs.
  const int wide = pairs <= 16 ? 16 : 32, b = t % wide, start = t / wide;
  for (int sweep = 0; sweep < kRitzSweeps; ++sweep) {
    bool is_changed = false;
    for (int round = 0; round < n - 1; ++round) {
      bool is_rotated = false;
      if (t < pairs) {
        const int p = circle_index(round, n, t, 0), q = circle_index(round, n, t, 1);
        const double above = H[p * stride + p], below = H[q * stride + q], h = H[p * stride + q];
        is_rotated = h * h > fma(kRotatedShare, fabs(above * below), kRotatedLeast);
        double c = 1, s = 0;
        if (is_rotated) {
          // A float32 tangent leaves 1e-7 of the element: one sweep more at most, and no float64
          // division or root. The rotation is orthogonal to float64's accuracy all the same.
          const float zeta = static_cast<float>(below - above) / static_cast<float>(2 * h);
          const double tangent =
              copysignf(1.f, zeta) / (fabsf(zeta) + sqrtf(fmaf(zeta, zeta, 1.f)));
          c = rsqrt(fma(tangent, tangent, 1.0));
          s = c * tangent;
        }
        cosines[t] = c;
        sines[t] = s;
      }
      if (!__syncthreads_or(is_rotated)) continue;
      is_changed = true;
      if (b < pairs) {
        const int pb = circle_index(round, n, b, 0), qb = circle_index(round, n, b, 1);
        const Rotated columns{cosines[b], sines[b]};
        for (int a = start; a <= b; a += kSmallThreads / wide) {
          const int pa = circle_index(round, n, a, 0), qa = circle_index(round, n, a, 1);
          const Rotated rows{cosines[a], sines[a]};
          double x = H[pa * stride + pb], y = H[pa * stride + qb];
          double z = H[qa * stride + pb], w = H[qa * stride + qb];
          columns.turn(x, y);
          columns.turn(z, w);
          rows.turn(x, z);
          rows.turn(y, w);
          if (a == b) z = y;
          H[pa * stride + pb] = x;
          H[pa * stride + qb] = y;
          H[qa * stride + pb] = z;
          H[qa * stride + qb] = w;
          H[pb * stride + pa] = x;
          H[qb * stride + pa] = y;
          H[pb * stride + qa] = z;
          H[qb * stride + qa] = w;
        }
        for (int row = start; row < n; row += kSmallThreads / wide) {
          columns.turn(V[row * stride + pb], V[row * stride + qb]);
        }
      }
      __syncthreads();
    }
    if (!is_changed) return;
  }
}

/// Singular values of Q B^T projected onto the span of Q, and left, right with U = Q left and
/// V = B right. Zeros where `status` is not kRitzDone.
///
/// K = Q^T Q, H = B^T B; C = L^-1 of K = L L^T; C H C^T = W diag(S^2) W^T; left = C^T W,
/// right = left / S.
///
/// left, right  (batch, columns, wanted)  float64
/// S            (batch, wanted)           float32
/// status       (batch,)
static __global__ void __launch_bounds__(kSmallThreads)
    ritz_kernel(NarrowGram left_gram, NarrowGram right_gram, double* __restrict__ left,
                double* __restrict__ right, float* __restrict__ S, int* __restrict__ status,
                int columns, int wanted, double dependent, double steep) {
  extern __shared__ double small[];
  __shared__ int order[kRitzColumns];
  __shared__ double largest_shared;
  const int n = (columns + 1) / 2 * 2, stride = small_stride(n);
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  double* K = small;
  double* H = K + n * stride;
  double* V = H + n * stride;
  double* lines = V + n * stride;
  double* floor = lines + 2 * n;
  left += static_cast<int64_t>(blockIdx.x) * columns * wanted;
  right += static_cast<int64_t>(blockIdx.x) * columns * wanted;
  S += static_cast<int64_t>(blockIdx.x) * wanted;

  add_chunks(left_gram, columns, stride, K);
  add_chunks(right_gram, columns, stride, H);
  __syncthreads();
  bool is_bad = false;
  for (int i = warp; i < columns; i += kSmallWarps) {
    for (int j = lane; j <= i; j += 32) {
      is_bad |= !isfinite(K[i * stride + j]) || !isfinite(H[i * stride + j]);
      H[j * stride + i] = H[i * stride + j];
    }
  }
  for (int i = t; i < columns; i += kSmallThreads) floor[i] = 0x1p-60;
  int result = __syncthreads_or(is_bad) ? kRitzNotFinite : kRitzDone;
  if (result == kRitzDone) {
    const double limit = dependent * dependent;
    if (!invert_factor(K, lines, floor, columns, stride, limit)) result = kRitzDependent;
  }
  if (result == kRitzDone) {
    // V = C H, then H = V C^T.
    for (int i = warp; i < columns; i += kSmallWarps) {
      for (int j = lane; j < columns; j += 32) {
        double sum = 0;
        for (int p = 0; p <= i; ++p) sum = fma(K[i * stride + p], H[p * stride + j], sum);
        V[i * stride + j] = sum;
      }
    }
    __syncthreads();
    for (int i = warp; i < n; i += kSmallWarps) {
      for (int j = lane; j <= i; j += 32) {
        double sum = 0;
        if (i < columns) {
          for (int p = 0; p <= j; ++p) sum = fma(V[i * stride + p], K[j * stride + p], sum);
        }
        H[i * stride + j] = sum;
        H[j * stride + i] = sum;
      }
    }
    __syncthreads();
    if (t == 0) {
      double largest = 0;
      for (int i = 0; i < columns; ++i) largest = fmax(largest, H[i * stride + i]);
      largest_shared = largest;
    }
    __syncthreads();
    if (!(largest_shared > 0)) result = kRitzDependent;
  }
  if (result == kRitzDone) {
    // An even power of two, so that its root is one too and nothing is rounded.
    const int half = ilogb(largest_shared) / 2;
    const double down = scalbn(1.0, -half);
    for (int i = warp; i < n; i += kSmallWarps) {
      for (int j = lane; j < n; j += 32) {
        H[i * stride + j] = H[i * stride + j] * down * down;
        V[i * stride + j] = i == j ? 1.0 : 0.0;
      }
    }
    __syncthreads();
    diagonalize(H, V, lines, n, stride);
    if (t < columns) {
      const double mine = H[t * stride + t];
      int before = 0;
      for (int i = 0; i < columns; ++i) {
        const double other = H[i * stride + i];
        before += other > mine || (other == mine && i < t);
      }
      order[before] = t;
    }
    __syncthreads();
    const int first = order[0], last = order[wanted - 1];
    if (!(H[last * stride + last] > steep * H[first * stride + first])) result = kRitzDependent;
    if (result == kRitzDone) {
      const double up = scalbn(1.0, half);
      for (int i = warp; i < columns; i += kSmallWarps) {
        for (int j = lane; j < wanted; j += 32) {
          const int from = order[j];
          const double value = sqrt(H[from * stride + from]) * up;
          double sum = 0;
          for (int p = i; p < columns; ++p) {
            sum = fma(K[p * stride + i], V[p * stride + from], sum);
          }
          left[i * wanted + j] = sum;
          right[i * wanted + j] = sum / value;
          if (i == 0) S[j] = static_cast<float>(value);
        }
      }
    }
  }
  if (t == 0) status[blockIdx.x] = result;
  if (result == kRitzDone) return;
  for (int e = t; e < columns * wanted; e += kSmallThreads) left[e] = right[e] = 0;
  for (int j = t; j < wanted; j += kSmallThreads) S[j] = 0.f;
}

inline cudaError_t launch_ritz(const NarrowGram& left_gram, const NarrowGram& right_gram,
                               double* left, double* right, float* S, int* status, int64_t batch,
                               int64_t columns, int64_t wanted, double dependent, double steep,
                               cudaStream_t stream) {
  const int bytes = static_cast<int>(ritz_bytes(columns));
  const cudaError_t error =
      cudaFuncSetAttribute(ritz_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  ritz_kernel<<<static_cast<unsigned>(batch), kSmallThreads, bytes, stream>>>(
      left_gram, right_gram, left, right, S, status, static_cast<int>(columns),
      static_cast<int>(wanted), dependent, steep);
  return cudaGetLastError();
}

}  // namespace lorax
