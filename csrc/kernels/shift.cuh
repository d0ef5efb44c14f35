// SPDX-License-Identifier: Apache-2.0
// One factor of a polynomial filter, (Z - a X) s with one a and one s a matrix. sm_80 and newer;
// memory-bound: 12 bytes an element.
#pragma once

#include "launch.cuh"

namespace lorax {

constexpr int kShiftThreads = 256;
constexpr int kShiftRepeats = 4;  // loads of each operand that a thread has in flight

/// out[b][i] = (Z[b][i] - a[b] X[b][i]) s[b].
///
/// Item        float4, or float where sizes or addresses do not allow it
/// Z, X, out   (batch, size) Item, contiguous
/// a, s        (batch,)      float32
template <typename Item>
static __global__ void __launch_bounds__(kShiftThreads)
    shift_kernel(const Item* __restrict__ Z, const Item* __restrict__ X,
                 const float* __restrict__ a, const float* __restrict__ s, Item* __restrict__ out,
                 int64_t size) {
  const int64_t batch = blockIdx.y;
  const float root = a[batch], factor = s[batch];
  const Item* z = Z + batch * size;
  const Item* x = X + batch * size;
  Item* to = out + batch * size;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * kShiftThreads * kShiftRepeats + threadIdx.x;
#pragma unroll
  for (int r = 0; r < kShiftRepeats; ++r) {
    const int64_t i = first + r * kShiftThreads;
    if (i >= size) return;
    const Item left = __ldg(z + i), right = __ldg(x + i);
    if constexpr (sizeof(Item) == sizeof(float)) {
      to[i] = (left - root * right) * factor;
    } else {
      to[i] = make_float4((left.x - root * right.x) * factor, (left.y - root * right.y) * factor,
                          (left.z - root * right.z) * factor, (left.w - root * right.w) * factor);
    }
  }
}

inline cudaError_t launch_shift(const float* Z, const float* X, const float* a, const float* s,
                                float* out, int64_t batch, int64_t size, cudaStream_t stream) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(Z) | reinterpret_cast<uintptr_t>(X) |
                              reinterpret_cast<uintptr_t>(out);
  const bool aligned = size % 4 == 0 && addresses % sizeof(float4) == 0;
  const int64_t items = aligned ? size / 4 : size;
  const dim3 grid(static_cast<unsigned>(ceil_div(items, kShiftThreads * kShiftRepeats)),
                  static_cast<unsigned>(batch));
  if (aligned) {
    shift_kernel<<<grid, kShiftThreads, 0, stream>>>(reinterpret_cast<const float4*>(Z),
                                                     reinterpret_cast<const float4*>(X), a, s,
                                                     reinterpret_cast<float4*>(out), items);
  } else {
    shift_kernel<<<grid, kShiftThreads, 0, stream>>>(Z, X, a, s, out, items);
  }
  return cudaGetLastError();
}

}  // namespace lorax
