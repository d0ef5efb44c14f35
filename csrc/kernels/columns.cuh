// SPDX-License-Identifier: Apache-2.0
// Norms of the columns of float32 blocks, and the powers of two that bring them into float16's
// range. sm_80 and newer; memory-bound: the block is read once.
#pragma once

#include "split.cuh"

namespace lorax {

constexpr int kNormThreadsX = 32;  // pairs of columns
constexpr int kNormThreadsY = 8;
constexpr int kNormRows = 256;  // rows of one CTA: 32 a thread, enough loads in flight

inline int64_t norm_chunks(int64_t rows) { return ceil_div(rows, kNormRows); }

/// partial[b][c][j] = sum over the rows i of chunk c of X[b][i][j]^2.
///
/// In float64, so that neither 1e-20 nor 1e20 squared leaves the range. Chunks instead of atomics:
/// the sum's order is fixed.
///
/// X        (batch, rows, columns) float32, contiguous
/// partial  (batch, norm_chunks(rows), columns) float64
static __global__ void column_norms_kernel(const float* __restrict__ X,
                                           double* __restrict__ partial, int64_t rows,
                                           int64_t columns) {
  __shared__ double sums[kNormThreadsY][2 * kNormThreadsX + 1];
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kNormThreadsX + threadIdx.x) * 2;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kNormRows;
  const int64_t last = first + kNormRows < rows ? first + kNormRows : rows;
  const float* block = X + static_cast<int64_t>(blockIdx.z) * rows * columns;
  double left = 0, right = 0;
#pragma unroll 8
  for (int64_t row = first + threadIdx.y; row < last; row += kNormThreadsY) {
    const float* x = block + row * columns + column;
    const double a = column < columns ? x[0] : 0.f;
    const double b = column + 1 < columns ? x[1] : 0.f;
    left += a * a;
    right += b * b;
  }
  sums[threadIdx.y][2 * threadIdx.x] = left;
  sums[threadIdx.y][2 * threadIdx.x + 1] = right;
  __syncthreads();
  const int t = threadIdx.y * kNormThreadsX + threadIdx.x;
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * 2 * kNormThreadsX + t;
  if (t < 2 * kNormThreadsX && mine < columns) {
    double sum = 0;
    for (int y = 0; y < kNormThreadsY; ++y) sum += sums[y][t];
    partial[(static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * columns + mine] = sum;
  }
}

/// scale[b][j] = 2^(14 - e) with 2^(e-1) <= ||X[b][:, j]|| < 2^e, and square[b][j] the squared norm
/// of the scaled column over 2^28, in [1/4, 1).
///
/// A column whose norm is not above `dead` has scale 0 and square -1: it carries no direction.
/// A column with a NaN keeps it: scale 1, square NaN.
///
/// partial  (batch, chunks, columns) float64, from column_norms_kernel
/// scale    (batch, columns)         float32
/// square   (batch, columns)         float32
static __global__ void column_scales_kernel(const double* __restrict__ partial,
                                            float* __restrict__ scale, float* __restrict__ square,
                                            int64_t batch, int64_t chunks, int64_t columns,
                                            float dead) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= batch * columns) return;
  const double* p = partial + t / columns * chunks * columns + t % columns;
  double sum = 0;
  for (int64_t c = 0; c < chunks; ++c) sum += p[c * columns];
  if (sum <= static_cast<double>(dead) * dead) {
    scale[t] = 0.f;
    square[t] = -1.f;
    return;
  }
  if (!(sum < 1e300)) {
    scale[t] = 1.f;
    square[t] = nanf("");
    return;
  }
  // 2^110 is as far as a float32 scale reaches; shorter columns are noise below float32's range.
  int e = ilogb(sqrt(sum)) + 1;
  e = e < -110 ? -110 : e;
  scale[t] = scalbnf(1.f, kPieceExponent - e);
  square[t] = static_cast<float>(scalbn(sum, -2 * e));
}

// Scales of the columns of X; `partial` is scratch of batch * norm_chunks(rows) * columns doubles.
inline cudaError_t launch_column_scales(const float* X, double* partial, float* scale,
                                        float* square, int64_t batch, int64_t rows, int64_t columns,
                                        float dead, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(columns, 2 * kNormThreadsX)),
                  static_cast<unsigned>(norm_chunks(rows)), static_cast<unsigned>(batch));
  column_norms_kernel<<<grid, dim3(kNormThreadsX, kNormThreadsY), 0, stream>>>(X, partial, rows,
                                                                               columns);
  const unsigned blocks = static_cast<unsigned>(ceil_div(batch * columns, 128));
  column_scales_kernel<<<blocks, 128, 0, stream>>>(partial, scale, square, batch, norm_chunks(rows),
                                                   columns, dead);
  return cudaGetLastError();
}

}  // namespace lorax
