// SPDX-License-Identifier: Apache-2.0
// Matrices of one size, each times a power of two, as a float16 stack; the largest magnitude of
// each is found on the way, so that nothing reads them a second time. Bound by memory: 16 bytes a
// load, in one launch for some thousand matrices. sm_80 and newer; no torch header.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "widen.cuh"

namespace lorax {

// A power of two as two factors: one alone can be out of float32's range.
struct StackEntry {
  const void* from;
  float first, second;
};

// Lists travel as kernel parameters (up to 32764 bytes since CUDA 12.1).
constexpr int kStackEntries = 2000;
struct StackList {
  StackEntry entry[kStackEntries];
};
static_assert(sizeof(StackList) <= 32764, "a kernel's parameters end at 32764 bytes");

constexpr int kStackThreads = 256;
constexpr int kStackWidth = 8;

__device__ inline uint16_t bits_of(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
__device__ inline uint16_t bits_of(__half x) { return __half_as_ushort(x); }
__device__ inline void from_bits(uint16_t bits, __nv_bfloat16* x) {
  *x = __ushort_as_bfloat16(bits);
}
__device__ inline void from_bits(uint16_t bits, __half* x) { *x = __ushort_as_half(bits); }

/// to[b][i] = from_b[i] * first_b * second_b
///
/// T        __nv_bfloat16 or __half
/// list     matrices of `count` contiguous elements
/// to       (matrices, count) float16
/// largest  (matrices,)       zeros before: bits of the largest |from_b[i]|, float32; NaN above all
/// vectors  elements that lie in vectors of 16 bytes in every matrix and in `to`: all or none
template <typename T>
static __global__ void __launch_bounds__(kStackThreads)
    stack_halves_kernel(const __grid_constant__ StackList list, __half* __restrict__ to,
                        uint32_t* __restrict__ largest, int64_t count, int64_t vectors) {
  const StackEntry& x = list.entry[blockIdx.y];
  const T* from = static_cast<const T*>(x.from);
  to += blockIdx.y * count;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const float first = x.first, second = x.second;
  // Bit patterns of non-negative numbers are ordered as the numbers are, NaN above all, in 16 bits
  // too: the largest of the even and of the odd elements, two in one operation.
  constexpr uint32_t kMagnitudes = 0x7fff7fffu;
  uint32_t seen = 0;
#pragma unroll 4
  for (int64_t i = thread; i < vectors / kStackWidth; i += step) {
    alignas(16) T in[kStackWidth];
    alignas(16) __half out[kStackWidth];
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(from) + i);
    *reinterpret_cast<uint4*>(in) = words;
    seen = __vmaxu2(seen, words.x & kMagnitudes);
    seen = __vmaxu2(seen, words.y & kMagnitudes);
    seen = __vmaxu2(seen, words.z & kMagnitudes);
    seen = __vmaxu2(seen, words.w & kMagnitudes);
#pragma unroll
    for (int c = 0; c < kStackWidth; ++c) {
      out[c] = __float2half_rn(widen(in[c]) * first * second);
    }
    reinterpret_cast<uint4*>(to)[i] = *reinterpret_cast<const uint4*>(out);
  }
  for (int64_t i = vectors + thread; i < count; i += step) {
    const T one = from[i];
    seen = __vmaxu2(seen, bits_of(one) & kMagnitudes);
    to[i] = __float2half_rn(widen(one) * first * second);
  }
  __shared__ uint32_t warps[kStackThreads / 32];
  seen = __reduce_max_sync(0xffffffffu, max(seen & 0xffffu, seen >> 16));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = seen;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kStackThreads / 32; ++w) seen = max(seen, warps[w]);
    T top;
    from_bits(static_cast<uint16_t>(seen), &top);
    atomicMax(largest + blockIdx.y, __float_as_uint(widen(top)));
  }
}

// `largest` is a zero for each matrix.
template <typename T>
inline cudaError_t launch_stack_halves(const std::vector<StackEntry>& entries, __half* to,
                                       uint32_t* largest, int64_t count, cudaStream_t stream) {
  constexpr int kEach = 4, kMostBlocks = 1024;
  // A stack of matrices whose size is no whole number of vectors is unaligned from the second on.
  bool is_aligned = count % kStackWidth == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0;
  for (const StackEntry& x : entries) {
    is_aligned = is_aligned && reinterpret_cast<uintptr_t>(x.from) % 16 == 0;
  }
  const int64_t vectors = is_aligned ? count : 0;
  const int64_t each = int64_t{kStackThreads} * kEach * (is_aligned ? kStackWidth : 1);
  const auto blocks =
      static_cast<unsigned>(std::clamp<int64_t>((count + each - 1) / each, 1, kMostBlocks));
  StackList list;
  for (size_t start = 0; start < entries.size(); start += kStackEntries) {
    const size_t some = std::min(entries.size() - start, size_t(kStackEntries));
    std::copy_n(entries.begin() + start, some, list.entry);
    stack_halves_kernel<T><<<dim3(blocks, static_cast<unsigned>(some)), kStackThreads, 0, stream>>>(
        list, to + start * count, largest + start, count, vectors);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace lorax
