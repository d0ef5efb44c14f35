// SPDX-License-Identifier: Apache-2.0
// Tiles of bases and blocks on their way from device memory to bfloat16 planes in shared memory.
#pragma once

#include "project_numbers.cuh"
#include "project_ptx.cuh"
#include "project_table.cuh"

namespace lorax::projection {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTileRows = 64;
// Shared rows are padded by 16 bytes: with widths that are multiples of 32 bytes, eight rows then
// start in eight different groups of banks and ldmatrix runs without conflicts.
constexpr int kPad = 8;

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

// Panel width for blocks of 16 * kTiles columns: at most 8 loads of 16 bytes a thread, which
// with the sums is what 128 registers hold.
template <typename Basis, int kTiles>
constexpr int kWidest = kTiles > 1 || sizeof(Basis) == 4 ? 128 : 256;

// Elements a vector of 16 bytes holds.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

// Up to 16 bytes of a row, element by element; the rest is 0. Out of line: inlined once for each
// load of a tile it would cost the aligned path its registers.
template <typename T>
__device__ __noinline__ uint4 load_ragged(const T* source, int valid) {
  union {
    uint4 bits;
    T element[kVector<T>];
  } x;
  x.bits = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    if (i < valid) x.element[i] = source[i];
  }
  return x.bits;
}

template <typename T>
__device__ inline bool has_aligned_rows(const T* source, int row_stride) {
  return reinterpret_cast<uintptr_t>(source) % 16 == 0 && row_stride % kVector<T> == 0;
}

// A tile of kTileRows x width elements of a basis, held in registers while the previous tile is
// multiplied, then split into kParts planes of [kTileRows][width + kPad] bfloat16.
template <typename T, int kParts, int kWidth>
struct BasisPrefetch {
  static constexpr int kLoads = kTileRows * kWidth / kVector<T> / kThreads;
  uint4 x[kLoads];

  // source: row 0, column 0 of the tile; rows, columns: how many exist; width: multiple of 16.
  __device__ void load(const T* source, int row_stride, int rows, int columns, int width,
                       bool is_aligned) {
    const int vectors = width / kVector<T>;
    int row = threadIdx.x / vectors, vector = threadIdx.x % vectors;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int column = vector * kVector<T>;
      x[i] = make_uint4(0, 0, 0, 0);
      if (row < rows && column < columns) {
        const T* from = source + int64_t(row) * row_stride + column;
        const bool is_whole = is_aligned && column + kVector<T> <= columns;
        x[i] = is_whole ? load_streaming(from) : load_ragged(from, columns - column);
      }
      row += kThreads / vectors, vector += kThreads % vectors;
      if (vector >= vectors) vector -= vectors, ++row;
    }
  }

  __device__ void store(bf16* planes, int width) const {
    const int vectors = width / kVector<T>, stride = width + kPad;
    int row = threadIdx.x / vectors, vector = threadIdx.x % vectors;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (row < kTileRows) store_vector(planes, row * stride + vector * kVector<T>, stride, x[i]);
      row += kThreads / vectors, vector += kThreads % vectors;
      if (vector >= vectors) vector -= vectors, ++row;
    }
  }

 private:
  __device__ static void store_vector(bf16* planes, int offset, int stride, const uint4& bits) {
    if constexpr (kParts == 1) {
      *reinterpret_cast<uint4*>(planes + offset) = bits;
    } else {
      const float value[4] = {__uint_as_float(bits.x), __uint_as_float(bits.y),
                              __uint_as_float(bits.z), __uint_as_float(bits.w)};
      bf16 part[4][kParts];
#pragma unroll
      for (int i = 0; i < 4; ++i) split(value[i], part[i]);
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        *reinterpret_cast<uint2*>(planes + j * kTileRows * stride + offset) =
            make_uint2(pack(part[0][j], part[1][j]), pack(part[2][j], part[3][j]));
      }
    }
  }
};

// A tile of kRows x 16 * kTiles elements of a block, on its way to planes of
// [plane_rows][16 * kTiles + kPad].
template <typename T, int kParts, int kTiles, int kRows>
struct BlockPrefetch {
  static constexpr int kColumns = 16 * kTiles;
  static constexpr int kStride = kColumns + kPad;
  static constexpr int kLoads = kRows * kColumns / kThreads;
  T x[kLoads];

  // Neighbouring threads take neighbouring elements, whichever way the block lies in memory.
  __device__ static void position(int i, bool is_transposed, int& row, int& column) {
    const int index = threadIdx.x + i * kThreads;
    row = is_transposed ? index % kRows : index / kColumns;
    column = is_transposed ? index / kRows : index % kColumns;
  }

  __device__ void load(const T* source, int row_stride, int column_stride, int rows, int columns) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      int row, column;
      position(i, row_stride == 1, row, column);
      const bool exists = row < rows && column < columns;
      x[i] = exists ? source[int64_t(row) * row_stride + int64_t(column) * column_stride]
                    : from_float<T>(0.0f);
    }
  }

  // plane_rows: rows of one plane; base points at the first of this tile's kRows rows.
  __device__ void store(bf16* base, int plane_rows, bool is_transposed) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      int row, column;
      position(i, is_transposed, row, column);
      bf16 part[kParts];
      split(to_float(x[i]), part);
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        base[(j * plane_rows + row) * kStride + column] = part[j];
      }
    }
  }
};

}  // namespace lorax::projection
