// SPDX-License-Identifier: Apache-2.0
// One factor of a polynomial filter, (Z - a X) s with one a a matrix and one s a column. sm_80 and
// newer; memory-bound: 12 bytes an element.
#pragma once

#include "launch.cuh"

namespace lorax {

constexpr int kShiftThreads = 256;
constexpr int kShiftRepeats = 4;  // loads of each operand that a thread has in flight

/// out[b][i][j] = (Z[b][i][j] - a[b] X[b][i][j]) s[b][j].
///
/// Item        float4, or float where sizes or addresses do not allow it
/// Z, X, out   (batch, size)    Item, contiguous, rows of `columns` items one after the other
/// a           (batch,)         float32
/// s           (batch, columns) Item
template <typename Item>
static __global__ void __launch_bounds__(kShiftThreads)
    shift_kernel(const Item* __restrict__ Z, const Item* __restrict__ X,
                 const float* __restrict__ a, const Item* __restrict__ s, Item* __restrict__ out,
                 int64_t size, int64_t columns) {
  const int64_t batch = blockIdx.y;
  const float root = a[batch];
  const Item* factors = s + batch * columns;
  const Item* z = Z + batch * size;
  const Item* x = X + batch * size;
  Item* to = out + batch * size;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * kShiftThreads * kShiftRepeats + threadIdx.x;
#pragma unroll
  for (int r = 0; r < kShiftRepeats; ++r) {
    const int64_t i = first + r * kShiftThreads;
    if (i >= size) return;
    const Item left = __ldg(z + i), right = __ldg(x + i), by = __ldg(factors + i % columns);
    if constexpr (sizeof(Item) == sizeof(float)) {
      to[i] = (left - root * right) * by;
    } else {
      to[i] = make_float4((left.x - root * right.x) * by.x, (left.y - root * right.y) * by.y,
                          (left.z - root * right.z) * by.z, (left.w - root * right.w) * by.w);
    }
  }
}

inline cudaError_t launch_shift(const float* Z, const float* X, const float* a, const float* s,
                                float* out, int64_t batch, int64_t rows, int64_t columns,
                                cudaStream_t stream) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(Z) | reinterpret_cast<uintptr_t>(X) |
                              reinterpret_cast<uintptr_t>(s) | reinterpret_cast<uintptr_t>(out);
  const bool aligned = columns % 4 == 0 && addresses % sizeof(float4) == 0;
  const int64_t wide = aligned ? columns / 4 : columns, items = rows * wide;
  const dim3 grid(static_cast<unsigned>(ceil_div(items, kShiftThreads * kShiftRepeats)),
                  static_cast<unsigned>(batch));
  if (aligned) {
    shift_kernel<<<grid, kShiftThreads, 0, stream>>>(
        reinterpret_cast<const float4*>(Z), reinterpret_cast<const float4*>(X), a,
        reinterpret_cast<const float4*>(s), reinterpret_cast<float4*>(out), items, wide);
  } else {
    shift_kernel<<<grid, kShiftThreads, 0, stream>>>(Z, X, a, s, out, items, wide);
  }
  return cudaGetLastError();
}

}  // namespace lorax
