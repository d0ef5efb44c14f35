// SPDX-License-Identifier: Apache-2.0
// Gram matrices from the products of pieces, exactly symmetric, and triangular factors as pieces.
// sm_80 and newer; small against the products that they follow (l^2 elements beside n l).
#pragma once

#include "columns.cuh"

namespace lorax {

constexpr int kMirrorTile = 32;
constexpr int kMirrorRows = 8;

// float16 pieces of a triangular inverse: entries up to 2^13 are represented, and everything from
// 2^-28 on. Entries stay near sqrt(l / pivot floor) < 2^12.
constexpr int kTriangleExponent = 3;
constexpr float kLargestHalf = 65504.f;

/// Makes G[b] symmetric to the last bit: the upper triangle is copied over the lower one.
///
/// G  (batch, columns, columns) float or double, in place
template <typename T>
__global__ void mirror_kernel(T* __restrict__ G, int64_t columns) {
  if (blockIdx.x < blockIdx.y) return;
  __shared__ T tile[kMirrorTile][kMirrorTile + 1];
  T* g = G + static_cast<int64_t>(blockIdx.z) * columns * columns;
  const int64_t top = static_cast<int64_t>(blockIdx.y) * kMirrorTile;
  const int64_t left = static_cast<int64_t>(blockIdx.x) * kMirrorTile;
  for (int r = threadIdx.y; r < kMirrorTile; r += kMirrorRows) {
    const int64_t i = top + r, j = left + threadIdx.x;
    if (i < columns && j < columns) tile[r][threadIdx.x] = g[i * columns + j];
  }
  __syncthreads();
  for (int r = threadIdx.y; r < kMirrorTile; r += kMirrorRows) {
    const int64_t i = left + r, j = top + threadIdx.x;
    if (i < columns && j < i) g[i * columns + j] = tile[threadIdx.x][r];
  }
}

/// Two float16 pieces, the second times 2^11, of rows of a symmetric matrix from the diagonal on
/// and of their mirror image; where both sides of a pair are given the upper one decides.
///
/// T     (batch, rows, columns - start)  float32: rows start.. of G, columns start..
/// high  (batch, columns, columns)       float16
/// low   (batch, columns, columns)       float16
static __global__ void strip_pieces_kernel(const float* __restrict__ T, __half* __restrict__ high,
                                           __half* __restrict__ low, int64_t rows, int64_t columns,
                                           int64_t start) {
  if (blockIdx.x < blockIdx.y) return;
  __shared__ float tile[kMirrorTile][kMirrorTile + 1];
  const int64_t width = columns - start, batch = blockIdx.z;
  const float* t = T + batch * rows * width;
  high += batch * columns * columns;
  low += batch * columns * columns;
  const int64_t top = static_cast<int64_t>(blockIdx.y) * kMirrorTile;
  const int64_t left = static_cast<int64_t>(blockIdx.x) * kMirrorTile;
  const auto write = [&](int64_t i, int64_t j, float value) {
    const __half piece = __float2half_rn(value);
    const int64_t at = (start + i) * columns + start + j;
    high[at] = piece;
    low[at] = __float2half_rn((value - __half2float(piece)) * 2048.f);
  };
  for (int r = threadIdx.y; r < kMirrorTile; r += kMirrorRows) {
    const int64_t i = top + r, j = left + threadIdx.x;
    if (i >= rows || j >= width) continue;
    const float value = t[i * width + j];
    tile[r][threadIdx.x] = value;
    if (i <= j) write(i, j, value);
  }
  __syncthreads();
  for (int r = threadIdx.y; r < kMirrorTile; r += kMirrorRows) {
    const int64_t j = left + r, i = top + threadIdx.x;
    if (i < rows && j < width && i < j) write(j, i, tile[threadIdx.x][r]);
  }
}

/// G = H + C + C^T scaled on both sides, from T = P_0^T [P_0 | P_1] = [H | C] of two pieces. T is
/// given as the products of `parts` groups of rows, which are added up in float32.
///
/// Plain (kNormalize false): undoes the column scales; the diagonal comes from the exact norms,
/// because tensor cores truncate their sums and a diagonal sums one sign (about -4e-6 at 4096
/// rows). Normalised: G has a unit diagonal, `normalizer` gets d with G = D (X^T X) D for the
/// scaled columns X / 2^14, and the padding up to `extent` is an identity.
///
/// T           (batch, parts, padded, 2 * padded) float32, padded = padded_columns(columns)
/// scale       (batch, columns)                   float32, from column_scales_kernel
/// square      (batch, columns)                   float32, from column_scales_kernel
/// G           (batch, extent, extent)            float32
/// normalizer  (batch, columns)                   float32, or null
template <bool kNormalize>
__global__ void combine_kernel(const float* __restrict__ T, const float* __restrict__ scale,
                               const float* __restrict__ square, float* __restrict__ G,
                               float* __restrict__ normalizer, int64_t columns, int64_t extent,
                               int parts) {
  if (blockIdx.x < blockIdx.y) return;
  __shared__ float value[kMirrorTile][kMirrorTile + 1];
  __shared__ float cross[kMirrorTile][kMirrorTile + 1];
  __shared__ float side[2][kMirrorTile];
  __shared__ float diagonal[kMirrorTile];
  const int64_t batch = blockIdx.z;
  const int64_t padded = padded_columns(columns);
  const int64_t part_size = padded * 2 * padded;
  const float* t = T + batch * parts * part_size;
  float* g = G + batch * extent * extent;
  const int64_t top = static_cast<int64_t>(blockIdx.y) * kMirrorTile;
  const int64_t left = static_cast<int64_t>(blockIdx.x) * kMirrorTile;
  // All of a part at once, twelve loads a thread: parts are read from memory, once.
  constexpr int kRows = kMirrorTile / kMirrorRows;
  float high[kRows] = {}, low[kRows] = {}, mirrored[kRows] = {};
#pragma unroll 2
  for (int p = 0; p < parts; ++p) {
    const float* part = t + p * part_size;
#pragma unroll
    for (int e = 0; e < kRows; ++e) {
      const int r = threadIdx.y + e * kMirrorRows;
      const int64_t i = top + r, j = left + threadIdx.x;
      if (i < columns && j < columns) {
        high[e] += part[i * 2 * padded + j];
        low[e] += part[i * 2 * padded + padded + j];
      }
      const int64_t mi = left + r, mj = top + threadIdx.x;
      if (mi < columns && mj < columns) mirrored[e] += part[mi * 2 * padded + padded + mj];
    }
  }
#pragma unroll
  for (int e = 0; e < kRows; ++e) {
    value[threadIdx.y + e * kMirrorRows][threadIdx.x] = high[e] + low[e];
    cross[threadIdx.y + e * kMirrorRows][threadIdx.x] = mirrored[e];
  }
  if (threadIdx.y < 2) {
    const int64_t c = (threadIdx.y == 0 ? top : left) + threadIdx.x;
    float factor = 0.f, own = 0.f;
    if (c < columns) {
      const float s = scale[batch * columns + c];
      const float q = square[batch * columns + c];
      if constexpr (kNormalize) {
        float norm2 = q;
        if (q < 0.f) {  // noise, whose norm was not known before
          float square_high = 0.f, cross_low = 0.f;
          for (int p = 0; p < parts; ++p) {
            const float* at = t + p * part_size + c * 2 * padded + c;
            square_high += at[0];
            cross_low += at[padded];
          }
          norm2 = scalbnf(square_high + 2.f * cross_low, -2 * kPieceExponent);
        }
        const float d = rsqrtf(norm2);
        factor = scalbnf(d, -kPieceExponent);
        own = 1.f;
        if (blockIdx.x == blockIdx.y && threadIdx.y == 0) normalizer[batch * columns + c] = d;
      } else {
        factor = s == 0.f ? 0.f : 1.f / s;
        own = scalbnf(fmaxf(q, 0.f), 2 * kPieceExponent) * factor * factor;
        if (isnan(q)) own = q;
      }
    } else {
      own = kNormalize ? 1.f : 0.f;
    }
    side[threadIdx.y][threadIdx.x] = factor;
    if (threadIdx.y == 0) diagonal[threadIdx.x] = own;
  }
  __syncthreads();
  // The upper element of a pair decides both.
  for (int r = threadIdx.y; r < kMirrorTile; r += kMirrorRows) {
    const int c = threadIdx.x;
    const int64_t i = top + r, j = left + c;
    if (i <= j) {
      const float v = (value[r][c] + cross[c][r]) * side[0][r] * side[1][c];
      value[r][c] = i == j ? diagonal[r] : v;
    }
  }
  __syncthreads();
  for (int r = threadIdx.y; r < kMirrorTile; r += kMirrorRows) {
    const int64_t i = top + r, j = left + threadIdx.x;
    if (i <= j && j < extent) g[i * extent + j] = value[r][threadIdx.x];
    const int64_t mi = left + r, mj = top + threadIdx.x;
    if (mj < mi && mi < extent) g[mi * extent + mj] = value[threadIdx.x][r];
  }
}

/// R = D M^T in two float16 pieces, times 2^3: the upper triangular factor that turns the scaled
/// columns into orthonormal ones, laid out as the stack [R_1; R_0] of K-contiguous operands.
///
/// With kDiagonal the pieces hold all of R; without it the diagonal goes to `gain` in float32 and
/// the pieces hold the rest: the last pass of an orthonormalisation multiplies by nearly the
/// identity, and its diagonal must not be rounded to a product of pieces.
///
/// M           (batch, extent, extent)    float32, lower triangular
/// normalizer  (batch, columns)           float32
/// stack       (batch, 2, padded, padded) float16, padded = padded_columns(columns)
/// gain        (batch, columns)           float32; written when kDiagonal is false
template <bool kDiagonal>
__global__ void triangle_pieces_kernel(const float* __restrict__ M,
                                       const float* __restrict__ normalizer,
                                       __half* __restrict__ stack, float* __restrict__ gain,
                                       int64_t columns, int64_t extent) {
  __shared__ float tile[kMirrorTile][kMirrorTile + 1];
  const int64_t batch = blockIdx.z;
  const int64_t padded = padded_columns(columns);
  const int64_t top = static_cast<int64_t>(blockIdx.y) * kMirrorTile;
  const int64_t left = static_cast<int64_t>(blockIdx.x) * kMirrorTile;
  const float* m = M + batch * extent * extent;
  for (int r = threadIdx.y; r < kMirrorTile; r += kMirrorRows) {
    const int64_t i = left + r, j = top + threadIdx.x;
    tile[r][threadIdx.x] = i < columns && j <= i ? m[i * extent + j] : 0.f;
  }
  __syncthreads();
  __half* second = stack + batch * 2 * padded * padded;
  __half* first = second + padded * padded;
  for (int r = threadIdx.y; r < kMirrorTile; r += kMirrorRows) {
    const int64_t i = top + r, j = left + threadIdx.x;
    if (i >= padded || j >= padded) continue;
    float v = i < columns ? tile[threadIdx.x][r] * normalizer[batch * columns + i] : 0.f;
    if constexpr (!kDiagonal) {
      if (i == j) {
        if (i < columns) gain[batch * columns + i] = v;
        v = 0.f;
      }
    }
    // Past float16's range only where columns are dependent: later passes repair a wrong factor,
    // none an infinite one. NaN stays.
    v = scalbnf(v, kTriangleExponent);
    v = v > kLargestHalf ? kLargestHalf : (v < -kLargestHalf ? -kLargestHalf : v);
    __half piece;
    to_piece(v, &piece);
    first[i * padded + j] = piece;
    to_piece(v - widen(piece), &piece);
    second[i * padded + j] = piece;
  }
}

inline dim3 mirror_grid(int64_t batch, int64_t extent) {
  const unsigned tiles = static_cast<unsigned>(ceil_div(extent, kMirrorTile));
  return dim3(tiles, tiles, static_cast<unsigned>(batch));
}

template <typename T>
inline cudaError_t launch_mirror(T* G, int64_t batch, int64_t columns, cudaStream_t stream) {
  mirror_kernel<T>
      <<<mirror_grid(batch, columns), dim3(kMirrorTile, kMirrorRows), 0, stream>>>(G, columns);
  return cudaGetLastError();
}

// `normalizer` null: the plain Gram matrix; otherwise the normalised one.
inline cudaError_t launch_combine(const float* T, const float* scale, const float* square, float* G,
                                  float* normalizer, int64_t batch, int64_t columns, int64_t extent,
                                  int parts, cudaStream_t stream) {
  const dim3 grid = mirror_grid(batch, extent), threads(kMirrorTile, kMirrorRows);
  if (normalizer == nullptr) {
    combine_kernel<false>
        <<<grid, threads, 0, stream>>>(T, scale, square, G, nullptr, columns, extent, parts);
  } else {
    combine_kernel<true>
        <<<grid, threads, 0, stream>>>(T, scale, square, G, normalizer, columns, extent, parts);
  }
  return cudaGetLastError();
}

// `gain` null: pieces of all of R; otherwise its diagonal goes there.
inline cudaError_t launch_triangle_pieces(const float* M, const float* normalizer, __half* stack,
                                          float* gain, int64_t batch, int64_t columns,
                                          int64_t extent, cudaStream_t stream) {
  const dim3 grid = mirror_grid(batch, padded_columns(columns)), threads(kMirrorTile, kMirrorRows);
  if (gain == nullptr) {
    triangle_pieces_kernel<true>
        <<<grid, threads, 0, stream>>>(M, normalizer, stack, nullptr, columns, extent);
  } else {
    triangle_pieces_kernel<false>
        <<<grid, threads, 0, stream>>>(M, normalizer, stack, gain, columns, extent);
  }
  return cudaGetLastError();
}

inline cudaError_t launch_strip_pieces(const float* T, __half* high, __half* low, int64_t batch,
                                       int64_t rows, int64_t columns, int64_t start,
                                       cudaStream_t stream) {
  const auto tiles = [](int64_t extent) {
    return static_cast<unsigned>(ceil_div(extent, kMirrorTile));
  };
  const dim3 grid(tiles(columns - start), tiles(rows), static_cast<unsigned>(batch));
  strip_pieces_kernel<<<grid, dim3(kMirrorTile, kMirrorRows), 0, stream>>>(T, high, low, rows,
                                                                           columns, start);
  return cudaGetLastError();
}

}  // namespace lorax
