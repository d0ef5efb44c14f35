// SPDX-License-Identifier: Apache-2.0
// float32 blocks as sums of 16-bit pieces that tensor cores multiply exactly, and the column scales
// that keep float16 pieces in range. sm_80 and newer; memory-bound: each kernel reads and writes
// each element once.
//
// bfloat16 pieces have float32's range and need no scale: two carry 16 bits of mantissa, three 24.
// float16 pieces carry 11 bits each, so two reach 22, if every column is first brought to norm
// 2^13..2^14: then an element 2^-39 of its column's norm is still represented.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.cuh"

namespace lorax {

// Columns are scaled by a power of two to norms in [2^13, 2^14): far under float16's 65504, and far
// enough above its smallest number that the second piece seldom underflows.
constexpr int kPieceExponent = 14;

constexpr int kSplitThreadsX = 32;  // pairs of columns
constexpr int kSplitThreadsY = 8;
constexpr int kSplitRows = 256;  // rows of one CTA: 32 a thread, enough loads in flight

inline int64_t norm_chunks(int64_t rows) { return ceil_div(rows, kSplitRows); }

inline dim3 split_grid(int64_t batch, int64_t rows, int64_t columns) {
  return dim3(static_cast<unsigned>(ceil_div(columns, 2 * kSplitThreadsX)),
              static_cast<unsigned>(norm_chunks(rows)), static_cast<unsigned>(batch));
}

// Deterministic uniform noise in [-1, 1) from a position: what stands in for a column that carries
// no direction. It does not depend on the batch index, so that results do not depend on grouping.
__device__ inline float position_noise(uint32_t row, uint32_t column, uint32_t seed) {
  uint32_t h = row * 0x9E3779B1u ^ (column + 0x7F4A7C15u) * 0x85EBCA77u ^ seed * 0xC2B2AE3Du;
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = (h ^ (h >> 15)) * 0x846CA68Bu;
  h ^= h >> 16;
  return static_cast<float>(static_cast<int32_t>(h)) * 0x1p-31f;
}

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
  __shared__ double sums[kSplitThreadsY][2 * kSplitThreadsX + 1];
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kSplitThreadsX + threadIdx.x) * 2;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kSplitRows;
  const int64_t last = first + kSplitRows < rows ? first + kSplitRows : rows;
  const float* block = X + static_cast<int64_t>(blockIdx.z) * rows * columns;
  double left = 0, right = 0;
#pragma unroll 8
  for (int64_t row = first + threadIdx.y; row < last; row += kSplitThreadsY) {
    const float* x = block + row * columns + column;
    const double a = column < columns ? x[0] : 0.f;
    const double b = column + 1 < columns ? x[1] : 0.f;
    left += a * a;
    right += b * b;
  }
  sums[threadIdx.y][2 * threadIdx.x] = left;
  sums[threadIdx.y][2 * threadIdx.x + 1] = right;
  __syncthreads();
  const int t = threadIdx.y * kSplitThreadsX + threadIdx.x;
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * 2 * kSplitThreadsX + t;
  if (t < 2 * kSplitThreadsX && mine < columns) {
    double sum = 0;
    for (int y = 0; y < kSplitThreadsY; ++y) sum += sums[y][t];
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

__device__ inline void to_piece(float v, __nv_bfloat16* piece) { *piece = __float2bfloat16_rn(v); }
__device__ inline void to_piece(float v, __half* piece) {
  *piece = __float2half_rn(fminf(fmaxf(v, -65504.f), 65504.f));
}
__device__ inline float from_piece(__nv_bfloat16 piece) { return __bfloat162float(piece); }
__device__ inline float from_piece(__half piece) { return __half2float(piece); }

/// X[b][i][j] * scale[b][j] = P_0 + P_1 + ..., each piece the rounding of what the ones before
/// left.
///
/// Piece p of a row starts at `row * row_stride + p * piece_stride`; columns from `columns` to
/// `padded_columns(columns)` are written as zeros. Columns of scale 0 become noise of norm 2^14.
///
/// Piece        __nv_bfloat16 or __half
/// kPieces      1, 2 or 3
/// kScaled      whether `scale` is read
/// X            (batch, rows, columns) float32, contiguous
/// scale        (batch, columns)       float32, or null
/// pieces       (batch, ...)           Piece, `batch_stride` apart; row_stride even
template <typename Piece, int kPieces, bool kScaled>
static __global__ void split_kernel(const float* __restrict__ X, const float* __restrict__ scale,
                                    Piece* __restrict__ pieces, int64_t rows, int64_t columns,
                                    int64_t row_stride, int64_t piece_stride, int64_t batch_stride,
                                    uint32_t seed) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kSplitThreadsX + threadIdx.x) * 2;
  if (column >= padded_columns(columns)) return;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kSplitRows;
  const int64_t last = first + kSplitRows < rows ? first + kSplitRows : rows;
  const float* block = X + static_cast<int64_t>(blockIdx.z) * rows * columns;
  Piece* out = pieces + static_cast<int64_t>(blockIdx.z) * batch_stride;
  float s[2] = {1.f, 1.f};
  if constexpr (kScaled) {
    for (int c = 0; c < 2; ++c) {
      if (column + c < columns) {
        s[c] = scale[static_cast<int64_t>(blockIdx.z) * columns + column + c];
      }
    }
  }
  const float amplitude = scalbnf(sqrtf(3.f / static_cast<float>(rows)), kPieceExponent);
#pragma unroll 4
  for (int64_t row = first + threadIdx.y; row < last; row += kSplitThreadsY) {
    float v[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      v[c] = column + c < columns ? block[row * columns + column + c] : 0.f;
      if constexpr (kScaled) {
        v[c] = s[c] == 0.f ? amplitude * position_noise(row, column + c, seed) : v[c] * s[c];
      }
    }
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      Piece pair[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        to_piece(v[c], &pair[c]);
        v[c] -= from_piece(pair[c]);
      }
      Piece* to = out + row * row_stride + p * piece_stride + column;
      *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(pair);
    }
  }
}

/// C[b][i][j] = (sum over p of T[b][i][p * piece_stride + j]) * numerator / scale[b][j].
///
/// T          (batch, rows, row_stride) float32
/// scale      (batch, columns)          float32, or null; where it is 0 the column becomes 0
/// C          (batch, rows, columns)    float32; may be T itself when kPieces is 1
template <int kPieces>
static __global__ void merge_kernel(const float* T, const float* __restrict__ scale, float* C,
                                    int64_t rows, int64_t columns, int64_t row_stride,
                                    int64_t piece_stride, float numerator) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  const int64_t batch = blockIdx.z;
  float factor = numerator;
  if (scale != nullptr) {
    const float s = scale[batch * columns + column];
    factor = s == 0.f ? 0.f : numerator / s;
  }
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kSplitRows;
  const int64_t last = first + kSplitRows < rows ? first + kSplitRows : rows;
#pragma unroll 4
  for (int64_t row = first + threadIdx.y; row < last; row += blockDim.y) {
    const float* t = T + (batch * rows + row) * row_stride + column;
    float sum = t[0];
#pragma unroll
    for (int p = 1; p < kPieces; ++p) sum += t[p * piece_stride];
    C[(batch * rows + row) * columns + column] = sum * factor;
  }
}

/// Q[b][i][j] = gain[b][j] * (P_0 + P_1)[b][i][j] / 2^14: the scaled columns again, from two
/// float16 pieces side by side.
///
/// pieces  (batch, rows, 2, padded_columns(columns)) float16
/// gain    (batch, columns)                          float32
/// Q       (batch, rows, columns)                    float32
static __global__ void restore_kernel(const __half* __restrict__ pieces,
                                      const float* __restrict__ gain, float* __restrict__ Q,
                                      int64_t rows, int64_t columns) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  const int64_t batch = blockIdx.z;
  const int64_t padded = padded_columns(columns);
  const float factor = scalbnf(gain[batch * columns + column], -kPieceExponent);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kSplitRows;
  const int64_t last = first + kSplitRows < rows ? first + kSplitRows : rows;
#pragma unroll 4
  for (int64_t row = first + threadIdx.y; row < last; row += blockDim.y) {
    const __half* p = pieces + (batch * rows + row) * 2 * padded + column;
    const float value = __half2float(p[0]) + __half2float(p[padded]);
    Q[(batch * rows + row) * columns + column] = value * factor;
  }
}

// Scales of the columns of X; `partial` is scratch of batch * norm_chunks(rows) * columns doubles.
inline cudaError_t launch_column_scales(const float* X, double* partial, float* scale,
                                        float* square, int64_t batch, int64_t rows, int64_t columns,
                                        float dead, cudaStream_t stream) {
  column_norms_kernel<<<split_grid(batch, rows, columns), dim3(kSplitThreadsX, kSplitThreadsY), 0,
                        stream>>>(X, partial, rows, columns);
  const unsigned blocks = static_cast<unsigned>(ceil_div(batch * columns, 128));
  column_scales_kernel<<<blocks, 128, 0, stream>>>(partial, scale, square, batch, norm_chunks(rows),
                                                   columns, dead);
  return cudaGetLastError();
}

template <typename Piece, bool kScaled>
inline cudaError_t launch_split(const float* X, const float* scale, Piece* pieces, int count,
                                int64_t batch, int64_t rows, int64_t columns, int64_t row_stride,
                                int64_t piece_stride, int64_t batch_stride, uint32_t seed,
                                cudaStream_t stream) {
  const dim3 grid = split_grid(batch, rows, padded_columns(columns));
  const dim3 threads(kSplitThreadsX, kSplitThreadsY);
  const auto launch = [&](auto kernel) {
    kernel<<<grid, threads, 0, stream>>>(X, scale, pieces, rows, columns, row_stride, piece_stride,
                                         batch_stride, seed);
  };
  if (count == 1) {
    launch(split_kernel<Piece, 1, kScaled>);
  } else if (count == 2) {
    launch(split_kernel<Piece, 2, kScaled>);
  } else {
    launch(split_kernel<Piece, 3, kScaled>);
  }
  return cudaGetLastError();
}

inline cudaError_t launch_merge(const float* T, const float* scale, float* C, int count,
                                int64_t batch, int64_t rows, int64_t columns, int64_t row_stride,
                                int64_t piece_stride, float numerator, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(columns, 64)),
                  static_cast<unsigned>(norm_chunks(rows)), static_cast<unsigned>(batch));
  const auto launch = [&](auto kernel) {
    kernel<<<grid, dim3(64, 4), 0, stream>>>(T, scale, C, rows, columns, row_stride, piece_stride,
                                             numerator);
  };
  if (count == 1) {
    launch(merge_kernel<1>);
  } else if (count == 2) {
    launch(merge_kernel<2>);
  } else {
    launch(merge_kernel<3>);
  }
  return cudaGetLastError();
}

inline cudaError_t launch_restore(const __half* pieces, const float* gain, float* Q, int64_t batch,
                                  int64_t rows, int64_t columns, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(columns, 64)),
                  static_cast<unsigned>(norm_chunks(rows)), static_cast<unsigned>(batch));
  restore_kernel<<<grid, dim3(64, 4), 0, stream>>>(pieces, gain, Q, rows, columns);
  return cudaGetLastError();
}

}  // namespace lorax
