// SPDX-License-Identifier: Apache-2.0
// Long blocks of few float32 columns in float64: their Gram matrices, the inverse of a Cholesky
// factor in one CTA, and products with small matrices. sm_80 and newer.
//
// For single matrices, where a step is its launches and its dependent instructions: a block is read
// once to be summed and once to be changed, and one CTA does the small part between in shared
// memory. float64 costs nothing at these sizes.
#pragma once

#include "launch.cuh"

namespace lorax {

constexpr int kNarrowColumns = 128;

constexpr int kNarrowSide = 16;  // a CTA's threads are 16 x 16 over a Gram matrix
constexpr int kNarrowThreads = kNarrowSide * kNarrowSide;
constexpr int kNarrowRows = 32;  // rows in shared memory at a time
// One CTA adds the chunks of a block up: with more than this it would become the longest part.
constexpr int64_t kNarrowChunks = 64;

inline int64_t narrow_chunk_rows(int64_t rows) {
  const int64_t even = round_up(ceil_div(rows, kNarrowChunks), kNarrowRows);
  return even < 2 * kNarrowRows ? 2 * kNarrowRows : even;
}

inline int64_t narrow_chunks(int64_t rows) { return ceil_div(rows, narrow_chunk_rows(rows)); }

// A batch of blocks and the sums of their chunks.
struct NarrowGram {
  const float* X;   // (batch, rows, columns)
  double* partial;  // (batch, chunks, columns, columns)
  int64_t rows;
  int64_t chunks;
  int64_t chunk_rows;
};

inline NarrowGram narrow_gram(const float* X, double* partial, int64_t rows) {
  return {X, partial, rows, narrow_chunks(rows), narrow_chunk_rows(rows)};
}

/// Lower triangles of X^T X of each chunk of rows; grid (chunks, batch, blocks), of one or two
/// blocks with as many columns. Every thread has kEach x kEach elements, 16 apart.
template <int kEach>
static __global__ void __launch_bounds__(kNarrowThreads)
    narrow_gram_kernel(NarrowGram first, NarrowGram second, int columns) {
  constexpr int kWide = kNarrowSide * kEach;
  constexpr int kLoads = kNarrowRows * kWide / kNarrowThreads;
  __shared__ double tile[kNarrowRows * kWide];
  const NarrowGram gram = blockIdx.z == 0 ? first : second;
  if (blockIdx.x >= gram.chunks) return;
  const int t = threadIdx.x, tx = t % kNarrowSide, ty = t / kNarrowSide;
  const float* block = gram.X + static_cast<int64_t>(blockIdx.y) * gram.rows * columns;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * gram.chunk_rows;
  const int64_t end = begin + gram.chunk_rows < gram.rows ? begin + gram.chunk_rows : gram.rows;
  float next[kLoads];
  const auto load = [&](int64_t start) {
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int e = t + k * kNarrowThreads;
      const int64_t row = start + e / kWide;
      const int column = e % kWide;
      next[k] = row < end && column < columns ? block[row * columns + column] : 0.f;
    }
  };
  double sum[kEach][kEach] = {};
  load(begin);
  for (int64_t start = begin; start < end; start += kNarrowRows) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kLoads; ++k) tile[t + k * kNarrowThreads] = next[k];
    __syncthreads();
    load(start + kNarrowRows);
#pragma unroll 4
    for (int row = 0; row < kNarrowRows; ++row) {
      const double* x = tile + row * kWide;
      double left[kEach], right[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        left[i] = x[ty + i * kNarrowSide];
        right[i] = x[tx + i * kNarrowSide];
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) sum[i][j] = fma(left[i], right[j], sum[i][j]);
      }
    }
  }
  double* to = gram.partial +
               (static_cast<int64_t>(blockIdx.y) * gram.chunks + blockIdx.x) * columns * columns;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int row = ty + i * kNarrowSide, column = tx + j * kNarrowSide;
      if (row < columns && column <= row) to[row * columns + column] = sum[i][j];
    }
  }
}

// `second` is looked at where `count` is 2.
inline cudaError_t launch_narrow_gram(const NarrowGram& first, const NarrowGram& second, int count,
                                      int64_t batch, int64_t columns, cudaStream_t stream) {
  const int64_t chunks = count == 2 && second.chunks > first.chunks ? second.chunks : first.chunks;
  const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(batch),
                  static_cast<unsigned>(count));
  const int l = static_cast<int>(columns);
  if (l <= 2 * kNarrowSide) {
    narrow_gram_kernel<2><<<grid, kNarrowThreads, 0, stream>>>(first, second, l);
  } else if (l <= 4 * kNarrowSide) {
    narrow_gram_kernel<4><<<grid, kNarrowThreads, 0, stream>>>(first, second, l);
  } else if (l <= 6 * kNarrowSide) {
    narrow_gram_kernel<6><<<grid, kNarrowThreads, 0, stream>>>(first, second, l);
  } else {
    narrow_gram_kernel<8><<<grid, kNarrowThreads, 0, stream>>>(first, second, l);
  }
  return cudaGetLastError();
}

// What one CTA does with a small matrix in shared memory: rows of warps, columns of lanes.
constexpr int kSmallThreads = 512;
constexpr int kSmallWarps = kSmallThreads / 32;

// Odd: a warp reads a column of doubles without conflicts.
__host__ __device__ constexpr int small_stride(int columns) { return columns | 1; }

/// All threads: the lower triangle of G = the sum of a matrix's chunks.
__device__ inline void add_chunks(const NarrowGram& gram, int columns, int stride, double* G) {
  const int64_t size = static_cast<int64_t>(columns) * columns;
  const double* from = gram.partial + static_cast<int64_t>(blockIdx.x) * gram.chunks * size;
  for (int i = threadIdx.x / 32; i < columns; i += kSmallWarps) {
    for (int j = threadIdx.x % 32; j <= i; j += 32) {
      double sum = 0;
#pragma unroll 16
      for (int64_t c = 0; c < gram.chunks; ++c) sum += from[c * size + i * columns + j];
      G[i * stride + j] = sum;
    }
  }
}

/// All threads: the lower triangle of G = L L^T becomes that of L^-1, in place; returns whether all
/// pivots, the squares of the diagonal of L, are above `limit`. A pivot below its `floor` is
/// replaced by it; NaN stays.
///
/// Column by column: eliminating column k turns what is below into its Schur complement and, in the
/// columns already eliminated, the identity into L^-1. The thread that computes an element of the
/// next column or row leaves it in `lines` too, so that a step is one barrier.
///
/// G      (columns, stride)  shared, complete before
/// lines  (2, columns)       shared
/// floor  (columns,)         shared
__device__ inline bool invert_factor(double* G, double* lines, const double* floor, int columns,
                                     int stride, double limit) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < columns; i += kSmallThreads) lines[i] = G[i * stride];
  __syncthreads();
  bool is_above = true;
  for (int k = 0; k < columns; ++k) {
    const double* line = lines + k % 2 * columns;
    double* next = lines + (k + 1) % 2 * columns;
    double pivot = line[k];
    if (pivot < floor[k]) pivot = floor[k];
    is_above &= pivot > limit;
    const double reciprocal = rsqrt(pivot);
    for (int i = k + warp; i < columns; i += kSmallWarps) {
      const double factor = line[i] * reciprocal;
      for (int j = lane; j <= i; j += 32) {
        double value;
        if (i == k) {
          value = j == k ? reciprocal : line[j] * reciprocal;
        } else {
          const double right = j == k ? reciprocal : line[j] * reciprocal;
          value = fma(-factor, right, j == k ? 0.0 : G[i * stride + j]);
          if (j == k + 1) next[i] = value;
          if (i == k + 1 && j <= k) next[j] = value;
        }
        G[i * stride + j] = value;
      }
    }
    __syncthreads();
  }
  return is_above;
}

inline int64_t narrow_factor_bytes(int64_t columns) {
  const int l = static_cast<int>(columns);
  return static_cast<int64_t>(sizeof(double)) * (l * small_stride(l) + 3 * l);
}

/// R = L^-T of L L^T = G (1 + `least`), from the chunks of G.
///
/// R  (batch, columns, columns) float64, upper triangular with zeros below
static __global__ void __launch_bounds__(kSmallThreads)
    narrow_factor_kernel(NarrowGram gram, double* __restrict__ R, int columns, double least) {
  extern __shared__ double small[];
  const int stride = small_stride(columns);
  double* G = small;
  double* lines = G + columns * stride;
  double* floor = lines + 2 * columns;
  add_chunks(gram, columns, stride, G);
  __syncthreads();
  for (int i = threadIdx.x; i < columns; i += kSmallThreads) {
    const double diagonal = G[i * stride + i];
    // 1e-290: a column of zeros stays one, without a division by zero.
    G[i * stride + i] = fma(diagonal, least, diagonal) + 1e-290;
    floor[i] = 0.5 * least * diagonal + 1e-290;
  }
  __syncthreads();
  invert_factor(G, lines, floor, columns, stride, 0);
  double* to = R + static_cast<int64_t>(blockIdx.x) * columns * columns;
  for (int i = threadIdx.x / 32; i < columns; i += kSmallWarps) {
    for (int j = threadIdx.x % 32; j < columns; j += 32) {
      to[i * columns + j] = j < i ? 0.0 : G[j * stride + i];
    }
  }
}

inline cudaError_t launch_narrow_factor(const NarrowGram& gram, double* R, int64_t batch,
                                        int64_t columns, double least, cudaStream_t stream) {
  const int bytes = static_cast<int>(narrow_factor_bytes(columns));
  const cudaError_t status = cudaFuncSetAttribute(
      narrow_factor_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  narrow_factor_kernel<<<static_cast<unsigned>(batch), kSmallThreads, bytes, stream>>>(
      gram, R, static_cast<int>(columns), least);
  return cudaGetLastError();
}

// A batch of blocks, the small matrices that they are multiplied by, and the products.
struct NarrowProduct {
  const float* X;   // (batch, rows, inner)
  const double* R;  // (batch, inner, columns)
  float* C;         // (batch, rows, columns)
  int64_t rows;
};

constexpr int kApplyRows = 4;  // of a warp; a CTA has kNarrowRows
static_assert(kApplyRows * kNarrowThreads / 32 == kNarrowRows, "a warp has its rows");
constexpr unsigned kApplyBlocks = 512;  // CTAs of a block at most, a few for each multiprocessor

/// C = X R, sums in float64; grid (CTAs, batch, products), of one or two products.
template <int kEach>
static __global__ void __launch_bounds__(kNarrowThreads)
    narrow_product_kernel(NarrowProduct first, NarrowProduct second, int inner, int columns) {
  extern __shared__ double small[];
  const NarrowProduct product = blockIdx.z == 0 ? first : second;
  const int64_t batch = blockIdx.y, rows = product.rows;
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  constexpr int kWide = 32 * kEach;
  double* R = small;
  double* X = R + inner * kWide;
  if (static_cast<int64_t>(blockIdx.x) * kNarrowRows >= rows) return;
  for (int i = warp; i < inner; i += kNarrowThreads / 32) {
    for (int j = lane; j < kWide; j += 32) {
      R[i * kWide + j] = j < columns ? product.R[(batch * inner + i) * columns + j] : 0.0;
    }
  }
  for (int64_t start = static_cast<int64_t>(blockIdx.x) * kNarrowRows; start < rows;
       start += static_cast<int64_t>(gridDim.x) * kNarrowRows) {
    __syncthreads();
    for (int r = warp; r < kNarrowRows; r += kNarrowThreads / 32) {
      for (int i = lane; i < inner; i += 32) {
        X[r * inner + i] =
            start + r < rows ? product.X[(batch * rows + start + r) * inner + i] : 0.f;
      }
    }
    __syncthreads();
    const double* x = X + warp * kApplyRows * inner;
    double sum[kApplyRows][kEach] = {};
#pragma unroll 4
    for (int i = 0; i < inner; ++i) {
      double right[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) right[j] = R[i * kWide + lane + 32 * j];
#pragma unroll
      for (int r = 0; r < kApplyRows; ++r) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) sum[r][j] = fma(x[r * inner + i], right[j], sum[r][j]);
      }
    }
#pragma unroll
    for (int r = 0; r < kApplyRows; ++r) {
      const int64_t row = start + warp * kApplyRows + r;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int column = lane + 32 * j;
        if (row < rows && column < columns) {
          product.C[(batch * rows + row) * columns + column] = static_cast<float>(sum[r][j]);
        }
      }
    }
  }
}

template <int kEach>
inline cudaError_t launch_narrow_product_of(const NarrowProduct& first, const NarrowProduct& second,
                                            const dim3& grid, int inner, int columns,
                                            cudaStream_t stream) {
  const int bytes = static_cast<int>(sizeof(double)) * inner * (32 * kEach + kNarrowRows);
  const cudaError_t status = cudaFuncSetAttribute(
      narrow_product_kernel<kEach>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  narrow_product_kernel<kEach>
      <<<grid, kNarrowThreads, bytes, stream>>>(first, second, inner, columns);
  return cudaGetLastError();
}

// `second` is looked at where `count` is 2.
inline cudaError_t launch_narrow_product(const NarrowProduct& first, const NarrowProduct& second,
                                         int count, int64_t batch, int64_t inner, int64_t columns,
                                         cudaStream_t stream) {
  const int64_t rows = count == 2 && second.rows > first.rows ? second.rows : first.rows;
  const unsigned tiles = static_cast<unsigned>(ceil_div(rows, kNarrowRows));
  const dim3 grid(tiles < kApplyBlocks ? tiles : kApplyBlocks, static_cast<unsigned>(batch),
                  static_cast<unsigned>(count));
  const int l = static_cast<int>(inner), k = static_cast<int>(columns);
  if (k <= 32) return launch_narrow_product_of<1>(first, second, grid, l, k, stream);
  if (k <= 64) return launch_narrow_product_of<2>(first, second, grid, l, k, stream);
  if (k <= 96) return launch_narrow_product_of<3>(first, second, grid, l, k, stream);
  return launch_narrow_product_of<4>(first, second, grid, l, k, stream);
}

}  // namespace lorax
