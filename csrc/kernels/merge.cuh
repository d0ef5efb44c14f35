// SPDX-License-Identifier: Apache-2.0
// From products of pieces back to float32 blocks. sm_80 and newer; memory-bound.
#pragma once

#include "split.cuh"

namespace lorax {

constexpr int kMergeThreadsX = 64;
constexpr int kMergeThreadsY = 4;

inline dim3 merge_grid(int64_t batch, int64_t rows, int64_t columns, int64_t rows_a_thread) {
  return dim3(
      static_cast<unsigned>(ceil_div(columns, kMergeThreadsX)),
      static_cast<unsigned>(min(ceil_div(rows, kMergeThreadsY * rows_a_thread), kMaxGridYZ)),
      static_cast<unsigned>(batch));
}

// What is left to multiply by where blocks were split with a scale other than 2^11.
__device__ inline float correction(const uint32_t* largest, const uint32_t* also, int64_t batch) {
  float factor = 1.f;
  if (largest != nullptr) factor = scalbnf(1.f / block_scale(largest[batch]), kBlockExponent);
  if (also != nullptr) factor *= scalbnf(1.f / block_scale(also[batch]), kBlockExponent);
  return factor;
}

/// C[b][i][j] = (sum over p of T[b][i][p * piece_stride + j]) * correction.
///
/// T        (batch, rows, row_stride) float32
/// largest  (batch,)                  from split_kernel, or null
/// C        (batch, rows, columns)    float32
template <int kPieces>
static __global__ void merge_kernel(const float* __restrict__ T,
                                    const uint32_t* __restrict__ largest, float* __restrict__ C,
                                    int64_t rows, int64_t columns, int64_t row_stride,
                                    int64_t piece_stride) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  const int64_t batch = blockIdx.z;
  const float factor = correction(largest, nullptr, batch);
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
#pragma unroll 4
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < rows;
       row += step) {
    const float* t = T + (batch * rows + row) * row_stride + column;
    float sum = t[0];
#pragma unroll
    for (int p = 1; p < kPieces; ++p) sum += t[p * piece_stride];
    C[(batch * rows + row) * columns + column] = sum * factor;
  }
}

/// C[b] *= correction, where that is not 1: for blocks that 2^11 did not suit.
///
/// largest, also  (batch,)      from split_kernel; `also` may be null
/// C              (batch, size) float32
static __global__ void correct_kernel(const uint32_t* __restrict__ largest,
                                      const uint32_t* __restrict__ also, float* __restrict__ C,
                                      int64_t size) {
  const int64_t batch = blockIdx.y;
  const float factor = correction(largest, also, batch);
  if (factor == 1.f) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
#pragma unroll 4
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size;
       i += step) {
    C[batch * size + i] *= factor;
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
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
#pragma unroll 8
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < rows;
       row += step) {
    const __half* p = pieces + (batch * rows + row) * 2 * padded + column;
    const float value = __half2float(p[0]) + __half2float(p[padded]);
    Q[(batch * rows + row) * columns + column] = value * factor;
  }
}

inline cudaError_t launch_merge(const float* T, const uint32_t* largest, float* C, int count,
                                int64_t batch, int64_t rows, int64_t columns, int64_t row_stride,
                                int64_t piece_stride, cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    kernel<<<merge_grid(batch, rows, columns, 8), dim3(kMergeThreadsX, kMergeThreadsY), 0,
             stream>>>(T, largest, C, rows, columns, row_stride, piece_stride);
  };
  if (count == 2) {
    launch(merge_kernel<2>);
  } else {
    launch(merge_kernel<3>);
  }
  return cudaGetLastError();
}

inline cudaError_t launch_correct(const uint32_t* largest, const uint32_t* also, float* C,
                                  int64_t batch, int64_t rows, int64_t columns,
                                  cudaStream_t stream) {
  constexpr int kThreads = 1024;
  const int64_t size = rows * columns;
  const dim3 grid(static_cast<unsigned>(rare_blocks(batch, ceil_div(size, kThreads))),
                  static_cast<unsigned>(batch));
  correct_kernel<<<grid, kThreads, 0, stream>>>(largest, also, C, size);
  return cudaGetLastError();
}

inline cudaError_t launch_restore(const __half* pieces, const float* gain, float* Q, int64_t batch,
                                  int64_t rows, int64_t columns, cudaStream_t stream) {
  restore_kernel<<<merge_grid(batch, rows, columns, 8), dim3(kMergeThreadsX, kMergeThreadsY), 0,
                   stream>>>(pieces, gain, Q, rows, columns);
  return cudaGetLastError();
}

}  // namespace lorax
