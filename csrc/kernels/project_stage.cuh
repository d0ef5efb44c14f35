// SPDX-License-Identifier: Apache-2.0
// Tiles of bases and blocks on their way from device memory, as they are, through a ring of shared
// memory to the operands of the tensor cores, where wider numbers are split into bfloat16 parts.
#pragma once

#include "project_numbers.cuh"
#include "project_ptx.cuh"
#include "project_table.cuh"

namespace lorax::projection {

constexpr int kWarp = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kReadRows = 64;    // rows of a tile of Q
constexpr int kWriteRows = 128;  // rows of a tile of P, 32 a warp: each part of C is used twice

// What the dtypes of a basis and of a block fix. A float32 basis is split in two parts for 16-bit
// blocks (2^-16, under their own rounding) and in three for float32 blocks.
template <typename Basis, typename Block>
struct Precision {
  static constexpr bool kIsFull = kExactParts<Block> == 3;
  static constexpr int kBasis = kExactParts<Basis> == 1 ? 1 : kIsFull ? 3 : 2;
  static constexpr int kBlock = kExactParts<Block>;
  static constexpr int kCoordinates = kIsFull ? 3 : 2;
  // Products of parts i and j are kept while i + j is under the longer expansion's length.
  static constexpr int kReadLevel = kBasis > kBlock ? kBasis : kBlock;
  static constexpr int kWriteLevel = kBasis > kCoordinates ? kBasis : kCoordinates;
};

// Elements a vector of 16 bytes holds.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

// Columns of one tile of Q and of P: 20 KB either way.
template <typename T>
constexpr int kReadWidest = sizeof(T) == 2 ? 160 : 80;
template <typename T>
constexpr int kWriteWidest = sizeof(T) == 2 ? 80 : 48;

// Rows in shared memory are padded so that a warp's accesses fall into different banks: bfloat16
// rows start in eight different groups of banks (ldmatrix); float32 is read by single words of
// rows 2 apart while Q is read, by pairs of words of neighbouring rows while P is.
template <typename T>
constexpr int kReadPad = kVector<T>;
template <typename T>
constexpr int kWritePad = 8;

// Up to 16 bytes of a row, element by element; the rest is 0. Out of line: inlined once for each
// load of a tile it would cost the aligned path its registers.
template <typename T>
__device__ __noinline__ uint4 load_ragged(const T* source, int stride, int valid) {
  union {
    uint4 bits;
    T element[kVector<T>];
  } x;
  x.bits = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    if (i < valid) x.element[i] = source[int64_t(i) * stride];
  }
  return x.bits;
}

// A matrix in device memory.
template <typename T>
struct Source {
  const T* data;
  int row_stride, column_stride;
  bool is_aligned;  // every row can be copied by vectors

  __device__ Source(const void* base, int row_stride, int column_stride = 1)
      : data(static_cast<const T*>(base)),
        row_stride(row_stride),
        column_stride(column_stride),
        is_aligned(reinterpret_cast<uintptr_t>(base) % 16 == 0 && row_stride % kVector<T> == 0 &&
                   column_stride == 1) {}
};

// Starts the copy of kRows x width elements from (row, column) on; past `rows` and `columns` of the
// matrix the tile is 0. Column and width are multiples of 16.
template <int kRows, typename T>
__device__ inline void copy_tile(T* tile, int stride, const Source<T>& source, int row, int column,
                                 int rows, int columns, int width, uint64_t policy) {
  const int vectors = width / kVector<T>;
  const T* from =
      source.data + int64_t(row) * source.row_stride + int64_t(column) * source.column_stride;
  rows -= row, columns -= column;
  int i = threadIdx.x / vectors, j = threadIdx.x % vectors;
  const int next_i = kThreads / vectors, next_j = kThreads % vectors;
#pragma unroll 4
  while (i < kRows) {
    const int first = j * kVector<T>;
    const int valid = i < rows ? max(0, min(kVector<T>, columns - first)) : 0;
    const T* vector = from + int64_t(i) * source.row_stride + int64_t(first) * source.column_stride;
    T* to = tile + i * stride + first;
    if (source.is_aligned) {
      // A copy of no bytes still needs a valid address.
      copy_async(to, valid > 0 ? vector : source.data, valid * int(sizeof(T)), policy);
    } else {
      *reinterpret_cast<uint4*>(to) = load_ragged(vector, source.column_stride, valid);
    }
    i += next_i, j += next_j;
    if (j >= vectors) j -= vectors, ++i;
  }
}

// Two neighbours of an operand as its parts.
template <int kParts>
__device__ inline void split_pair(float low, float high, uint32_t (&pair)[kParts]) {
  bf16 l[kParts], h[kParts];
  split(low, l);
  split(high, h);
#pragma unroll
  for (int j = 0; j < kParts; ++j) pair[j] = pack(l[j], h[j]);
}

// A tile of B in shared memory, [rows][columns] or, where B lies transposed, [columns][rows].
template <typename T, int kTiles>
struct BlockTile {
  static constexpr int kColumns = 16 * kTiles;
  static constexpr int kStride = kColumns + kVector<T>;
  static constexpr int kTransposedStride = kReadRows + kVector<T>;
  static constexpr int kBytes = int(sizeof(T)) * (kReadRows * kStride > kColumns * kTransposedStride
                                                      ? kReadRows * kStride
                                                      : kColumns * kTransposedStride);

  __device__ static void copy(T* tile, const Layer& x, int row, int end, int first_column,
                              uint64_t policy) {
    if (x.block_row == 1) {
      copy_tile<kColumns>(tile, kTransposedStride, Source<T>(x.block, x.block_column), first_column,
                          row, x.r, end, kReadRows, policy);
    } else {
      copy_tile<kReadRows>(tile, kStride, Source<T>(x.block, x.block_row, x.block_column), row,
                           first_column, end, x.r, kColumns, policy);
    }
  }

  // Operand a: the transpose of rows row.. and columns 16 * t...
  template <int kParts>
  __device__ static void operand(uint32_t (&a)[kParts][kTiles][4], const T* tile, int row,
                                 bool is_transposed) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if constexpr (kExactParts<T> == 1) {
        const int across = lane / 8 % 2 * 8, along = lane / 16 * 8, eighth = lane % 8;
        if (is_transposed) {
          load_blocks(a[0][t], tile + (16 * t + across + eighth) * kTransposedStride + row + along);
        } else {
          load_blocks_transposed(a[0][t],
                                 tile + (row + along + eighth) * kStride + 16 * t + across);
        }
      } else {
        const int row_step = is_transposed ? 1 : kStride;
        const int column_step = is_transposed ? kTransposedStride : 1;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = 16 * t + lane / 4 + i % 2 * 8, k = row + lane % 4 * 2 + i / 2 * 8;
          const T* at = tile + k * row_step + j * column_step;
          uint32_t pair[kParts];
          split_pair(to_float(at[0]), to_float(at[row_step]), pair);
#pragma unroll
          for (int part = 0; part < kParts; ++part) a[part][t][i] = pair[part];
        }
      }
    }
  }
};

// Operand b of two products side by side: rows row.. and 16 columns of a tile of Q.
template <int kParts, typename T>
__device__ inline void read_operand(uint32_t (&b)[kParts][4], const T* tile, int stride, int row,
                                    int column) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (kExactParts<T> == 1) {
    load_blocks_transposed(
        b[0], tile + (row + lane / 8 % 2 * 8 + lane % 8) * stride + column + lane / 16 * 8);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* at =
          tile + (row + lane % 4 * 2 + i % 2 * 8) * stride + column + lane / 4 + i / 2 * 8;
      uint32_t pair[kParts];
      split_pair(to_float(at[0]), to_float(at[stride]), pair);
#pragma unroll
      for (int part = 0; part < kParts; ++part) b[part][i] = pair[part];
    }
  }
}

// Operand a: rows row.. and 16 columns of a tile of P.
template <int kParts, typename T>
__device__ inline void write_operand(uint32_t (&a)[kParts][4], const T* tile, int stride, int row,
                                     int column) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (kExactParts<T> == 1) {
    load_blocks(a[0], tile + (row + lane / 8 % 2 * 8 + lane % 8) * stride + column + lane / 16 * 8);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = *reinterpret_cast<const float2*>(
          tile + (row + lane / 4 + i % 2 * 8) * stride + column + lane % 4 * 2 + i / 2 * 8);
      uint32_t pair[kParts];
      split_pair(x.x, x.y, pair);
#pragma unroll
      for (int part = 0; part < kParts; ++part) a[part][i] = pair[part];
    }
  }
}

}  // namespace lorax::projection
