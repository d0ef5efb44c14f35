// SPDX-License-Identifier: Apache-2.0
// Matrices of one size, each times a power of two, as a float16 stack. Bound by memory: 16 bytes a
// load, in one launch for some thousand matrices. Every architecture; no torch header.
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

constexpr int kStackWidth = 8;

/// to[b][i] = from_b[i] * first_b * second_b
///
/// T        __nv_bfloat16 or __half
/// list     matrices of `count` contiguous elements
/// to       (matrices, count) float16
/// vectors  elements that lie in vectors of 16 bytes in every matrix and in `to`: all or none
template <typename T>
static __global__ void stack_halves_kernel(const __grid_constant__ StackList list,
                                           __half* __restrict__ to, int64_t count,
                                           int64_t vectors) {
  const StackEntry& x = list.entry[blockIdx.y];
  const T* from = static_cast<const T*>(x.from);
  to += blockIdx.y * count;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const float first = x.first, second = x.second;
#pragma unroll 4
  for (int64_t i = thread; i < vectors / kStackWidth; i += step) {
    alignas(16) T in[kStackWidth];
    alignas(16) __half out[kStackWidth];
    *reinterpret_cast<uint4*>(in) = __ldg(reinterpret_cast<const uint4*>(from) + i);
#pragma unroll
    for (int c = 0; c < kStackWidth; ++c) {
      out[c] = __float2half_rn(widen(in[c]) * first * second);
    }
    reinterpret_cast<uint4*>(to)[i] = *reinterpret_cast<const uint4*>(out);
  }
  for (int64_t i = vectors + thread; i < count; i += step) {
    to[i] = __float2half_rn(widen(from[i]) * first * second);
  }
}

template <typename T>
inline cudaError_t launch_stack_halves(const std::vector<StackEntry>& entries, __half* to,
                                       int64_t count, cudaStream_t stream) {
  constexpr int kThreads = 256, kEach = 4, kMostBlocks = 1024;
  // A stack of matrices whose size is no whole number of vectors is unaligned from the second on.
  bool is_aligned = count % kStackWidth == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0;
  for (const StackEntry& x : entries) {
    is_aligned = is_aligned && reinterpret_cast<uintptr_t>(x.from) % 16 == 0;
  }
  const int64_t vectors = is_aligned ? count : 0;
  const int64_t each = int64_t{kThreads} * kEach * (is_aligned ? kStackWidth : 1);
  const auto blocks =
      static_cast<unsigned>(std::clamp<int64_t>((count + each - 1) / each, 1, kMostBlocks));
  StackList list;
  for (size_t start = 0; start < entries.size(); start += kStackEntries) {
    const size_t some = std::min(entries.size() - start, size_t(kStackEntries));
    std::copy_n(entries.begin() + start, some, list.entry);
    stack_halves_kernel<T><<<dim3(blocks, static_cast<unsigned>(some)), kThreads, 0, stream>>>(
        list, to + start * count, count, vectors);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace lorax
