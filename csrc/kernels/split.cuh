// SPDX-License-Identifier: Apache-2.0
// float32 blocks as sums of 16-bit pieces that tensor cores multiply exactly. sm_80 and newer;
// memory-bound: an element is read once and each of its pieces written once, 16 bytes at a time.
//
// bfloat16 pieces have float32's range and need no scale: two carry 16 bits of mantissa, three 24.
// float16 pieces carry 11 bits each, so two reach 22, but only of elements in their range. Either
// each column is scaled to a norm of 2^13..2^14 (columns.cuh), or the whole block by 2^11: enough
// for what an iteration multiplies, whose elements are at most about 1. A block that is larger than
// 16 or smaller than 2^-8 throughout is found out while it is split, and split again.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "launch.cuh"
#include "widen.cuh"

namespace lorax {

// Columns are scaled by a power of two to norms in [2^13, 2^14): far under float16's 65504, and far
// enough above its smallest number that the second piece seldom underflows.
constexpr int kPieceExponent = 14;

// What whole blocks are multiplied by. Under 2^-25 (2^-35) an element loses bits (is lost).
constexpr int kBlockExponent = 11;

enum class Scaling {
  kNone,     // bfloat16
  kColumns,  // by `scale`; a column of scale 0 becomes noise of norm 2^14
  kBlock,    // by 2^11, and the largest element is noted
  kAgain,    // by what kBlock should have used, where that is not 2^11; else nothing is written
};

// The power of two that suits a block, from the bit pattern of its largest |element|.
__device__ inline float block_scale(uint32_t largest) {
  const float x = __uint_as_float(largest);
  if (x == 0.f || (x >= 0x1p-8f && x <= 16.f)) return scalbnf(1.f, kBlockExponent);
  if (!(x < INFINITY)) return 1.f;  // NaN and Inf stay what they are
  // 2^110 is as far as a float32 scale reaches with room for what it is combined with.
  return scalbnf(1.f, min(kPieceExponent - ilogbf(x), 110));
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

__device__ inline void to_piece(float v, __nv_bfloat16* piece) { *piece = __float2bfloat16_rn(v); }
__device__ inline void to_piece(float v, __half* piece) { *piece = __float2half_rn(v); }

constexpr int kSplitThreads = 256;
constexpr int kSplitWidth = 8;  // columns of a thread: 16 bytes of a piece

// Where the pieces of a block go: piece p of row i of matrix b starts at
// b * batch_stride + i * row_stride + p * piece_stride, in elements; multiples of 8.
struct PieceLayout {
  int64_t row_stride;
  int64_t piece_stride;
  int64_t batch_stride;
};

/// X[b][i][j] * scale = P_0 + P_1 + ..., each piece the rounding of what the ones before left.
///
/// Columns from `columns` to `padded_columns(columns)` are written as zeros.
///
/// Piece        __nv_bfloat16 or __half
/// kPieces      1, 2 or 3
/// kScaling     where the scale comes from
/// kAligned     rows of X start at multiples of 32 bytes
/// X            (batch, rows, columns) float32, contiguous
/// scale        (batch, columns)       float32 for kColumns, else null
/// largest      (batch,)               bits of the largest |X|, float32: written by kBlock into
///                                     zeros, read by kAgain; else null
/// pieces       (batch, ...)           Piece, as `layout` says
template <typename Piece, int kPieces, Scaling kScaling, bool kAligned>
static __global__ void __launch_bounds__(kSplitThreads)
    split_kernel(const float* __restrict__ X, const float* __restrict__ scale,
                 uint32_t* __restrict__ largest, Piece* __restrict__ pieces, int64_t rows,
                 int64_t columns, PieceLayout layout, uint32_t seed) {
  const int64_t batch = blockIdx.z;
  const int64_t chunk = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  const int64_t column = chunk * kSplitWidth;
  const bool inside = column < padded_columns(columns);
  const float* block = X + batch * rows * columns + column;
  Piece* out = pieces + batch * layout.batch_stride + column;
  float s[kSplitWidth];
  if constexpr (kScaling == Scaling::kColumns) {
#pragma unroll
    for (int c = 0; c < kSplitWidth; ++c) {
      s[c] = column + c < columns ? scale[batch * columns + column + c] : 1.f;
    }
  }
  float common = scalbnf(1.f, kBlockExponent);
  if constexpr (kScaling == Scaling::kAgain) {
    const float suits = block_scale(largest[batch]);
    if (suits == common) return;
    common = suits;
  }
  const float amplitude = scalbnf(sqrtf(3.f / static_cast<float>(rows)), kPieceExponent);
  uint32_t seen = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
#pragma unroll 4
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < rows;
       row += step) {
    if (!inside) continue;
    float v[kSplitWidth];
    if constexpr (kAligned) {
      const float4* x = reinterpret_cast<const float4*>(block + row * columns);
      *reinterpret_cast<float4*>(v) = __ldg(x);
      *reinterpret_cast<float4*>(v + 4) = __ldg(x + 1);
    } else {
#pragma unroll
      for (int c = 0; c < kSplitWidth; ++c) {
        v[c] = column + c < columns ? __ldg(block + row * columns + c) : 0.f;
      }
    }
#pragma unroll
    for (int c = 0; c < kSplitWidth; ++c) {
      if constexpr (kScaling == Scaling::kColumns) {
        v[c] = s[c] == 0.f ? amplitude * position_noise(row, column + c, seed) : v[c] * s[c];
      } else if constexpr (kScaling != Scaling::kNone) {
        if constexpr (kScaling == Scaling::kBlock) {
          // Bit patterns of non-negative numbers are ordered as the numbers are, NaN above all.
          seen = max(seen, __float_as_uint(v[c]) & 0x7fffffffu);
        }
        v[c] *= common;
      }
    }
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      alignas(16) Piece piece[kSplitWidth];
#pragma unroll
      for (int c = 0; c < kSplitWidth; ++c) {
        to_piece(v[c], &piece[c]);
        v[c] -= widen(piece[c]);
      }
      // Asked for by name: a plain assignment becomes four stores of four bytes.
      __stwb(reinterpret_cast<uint4*>(out + row * layout.row_stride + p * layout.piece_stride),
             *reinterpret_cast<const uint4*>(piece));
    }
  }
  if constexpr (kScaling == Scaling::kBlock) {
    __shared__ uint32_t warps[kSplitThreads / 32];
    const int t = threadIdx.y * blockDim.x + threadIdx.x;
    seen = __reduce_max_sync(0xffffffffu, seen);
    if (t % 32 == 0) warps[t / 32] = seen;
    __syncthreads();
    if (t == 0) {
      for (int w = 1; w < kSplitThreads / 32; ++w) seen = max(seen, warps[w]);
      atomicMax(largest + batch, seen);
    }
  }
}

// CTAs a matrix for what is mostly no more than a question: two for every multiprocessor of an H200
// over a batch. Fewer are slow where the answer is yes, and more wait for room beside products.
inline int64_t rare_blocks(int64_t batch, int64_t most) {
  return std::min(ceil_div(264, batch), most);
}

// Threads of a CTA across the columns: a power of two, so that warps read whole rows.
inline dim3 split_threads(int64_t columns) {
  unsigned across = 1;
  while (across < 64 && across * kSplitWidth < columns) across *= 2;
  return dim3(across, kSplitThreads / across);
}

// Split of a block; `again` repeats it for the matrices that 2^11 did not suit, and only those.
template <typename Piece, Scaling kScaling>
inline cudaError_t launch_split(const float* X, const float* scale, uint32_t* largest,
                                Piece* pieces, int count, int64_t batch, int64_t rows,
                                int64_t columns, PieceLayout layout, uint32_t seed,
                                cudaStream_t stream) {
  const dim3 threads = split_threads(columns);
  // Eight rows a thread keep enough loads in flight; a repetition mostly only asks.
  const int64_t blocks = ceil_div(rows, threads.y * 8);
  const int64_t chunks = kScaling == Scaling::kAgain ? rare_blocks(batch, blocks) : blocks;
  const dim3 grid(static_cast<unsigned>(chunks),
                  static_cast<unsigned>(ceil_div(padded_columns(columns), kSplitWidth * threads.x)),
                  static_cast<unsigned>(batch));
  const bool aligned =
      columns % kSplitWidth == 0 && reinterpret_cast<uintptr_t>(X) % sizeof(float4) == 0;
  const auto launch = [&](auto kernel) {
    kernel<<<grid, threads, 0, stream>>>(X, scale, largest, pieces, rows, columns, layout, seed);
  };
  const auto launch_count = [&](auto one, auto two, auto three) {
    if (count == 1) {
      launch(one);
    } else if (count == 2) {
      launch(two);
    } else {
      launch(three);
    }
  };
  if (aligned) {
    launch_count(split_kernel<Piece, 1, kScaling, true>, split_kernel<Piece, 2, kScaling, true>,
                 split_kernel<Piece, 3, kScaling, true>);
  } else {
    launch_count(split_kernel<Piece, 1, kScaling, false>, split_kernel<Piece, 2, kScaling, false>,
                 split_kernel<Piece, 3, kScaling, false>);
  }
  return cudaGetLastError();
}

}  // namespace lorax
