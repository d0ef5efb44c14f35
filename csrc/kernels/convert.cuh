// SPDX-License-Identifier: Apache-2.0
// Copies a list of matrices of any strides and float types into rows, converting, in one launch for
// some hundreds of them. A plain grid, for every architecture; no torch header.
//
// A matrix may lie in parts that add up to it, and may be written in such: in two or three bfloat16
// matrices, each the rounding of what those before it left, so that tensor cores multiply it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "widen.cuh"

namespace lorax {

enum class Float { kBFloat16, kFloat16, kFloat32, kFloat64 };

// sum_p to[i * to_row + j + p * to_part] = sum_p from[i * from_row + j * from_column + p *
// from_part], i < rows, j < columns.
struct Conversion {
  const void* from;
  void* to;
  int64_t from_row, from_column, to_row;
  int rows, columns;  // rows * columns < 2^31
  Float from_type, to_type;
  int from_parts = 1, to_parts = 1;
  int64_t from_part = 0, to_part = 0;
};

constexpr int kMostParts = 3;  // bfloat16 numbers that hold a float32

// Lists travel as kernel parameters (up to 32764 bytes since CUDA 12.1): no pinned buffer to keep
// alive, and a captured graph holds its own copy.
constexpr int kConversions = 400;
struct Conversions {
  Conversion entry[kConversions];
};
static_assert(sizeof(Conversions) <= 32764, "a kernel's parameters end at 32764 bytes");

template <typename To, typename From>
__device__ inline To narrow(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_same_v<To, __nv_bfloat16>) {
    return __float2bfloat16(static_cast<float>(widen(x)));
  } else if constexpr (std::is_same_v<To, __half>) {
    return __float2half(static_cast<float>(widen(x)));
  } else {
    return static_cast<To>(widen(x));
  }
}

template <typename To, typename From, bool kInParts>
__device__ void convert_matrix(const Conversion& x) {
  using Wide = std::conditional_t<std::is_same_v<From, double>, double, decltype(widen(To()))>;
  const auto* from = static_cast<const From*>(x.from);
  auto* to = static_cast<To*>(x.to);
  const uint32_t count = uint32_t(x.rows) * uint32_t(x.columns), columns = x.columns;
  const uint32_t step = gridDim.x * blockDim.x;
  // Four loads in flight a thread.
#pragma unroll 4
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
    const uint32_t row = i / columns, column = i - row * columns;
    const From* source = from + row * x.from_row + column * x.from_column;
    To* target = to + row * x.to_row + column;
    if constexpr (!kInParts) {
      *target = narrow<To>(*source);
    } else {
      Wide sum = 0;
#pragma unroll
      for (int p = 0; p < kMostParts; ++p) {
        if (p < x.from_parts) sum += widen(source[p * x.from_part]);
      }
#pragma unroll
      for (int p = 0; p < kMostParts; ++p) {
        if (p == x.to_parts) break;
        const To part = narrow<To>(sum);
        target[p * x.to_part] = part;
        sum -= widen(part);
      }
    }
  }
}

template <typename To, typename From>
__device__ void convert_from(const Conversion& x) {
  if (x.from_parts == 1 && x.to_parts == 1) {
    convert_matrix<To, From, false>(x);
  } else {
    convert_matrix<To, From, true>(x);
  }
}

template <typename To>
__device__ void convert_to(const Conversion& x) {
  switch (x.from_type) {
    case Float::kBFloat16:
      return convert_from<To, __nv_bfloat16>(x);
    case Float::kFloat16:
      return convert_from<To, __half>(x);
    case Float::kFloat32:
      return convert_from<To, float>(x);
    case Float::kFloat64:
      return convert_from<To, double>(x);
  }
}

__global__ void convert_kernel(const __grid_constant__ Conversions list) {
  const Conversion& x = list.entry[blockIdx.y];
  switch (x.to_type) {
    case Float::kBFloat16:
      return convert_to<__nv_bfloat16>(x);
    case Float::kFloat16:
      return convert_to<__half>(x);
    case Float::kFloat32:
      return convert_to<float>(x);
    case Float::kFloat64:
      return convert_to<double>(x);
  }
}

inline cudaError_t launch_conversions(const std::vector<Conversion>& list, cudaStream_t stream) {
  constexpr int kThreads = 256, kEach = 16, kMostBlocks = 64;
  Conversions some;
  for (size_t first = 0; first < list.size(); first += kConversions) {
    const int count = int(std::min(list.size() - first, size_t(kConversions)));
    std::copy_n(list.begin() + first, count, some.entry);
    int64_t largest = 1;
    for (int i = 0; i < count; ++i) {
      largest = std::max(largest, int64_t(some.entry[i].rows) * some.entry[i].columns);
    }
    const auto blocks =
        int(std::min<int64_t>((largest + kThreads * kEach - 1) / (kThreads * kEach), kMostBlocks));
    void* arguments[] = {&some};
    const cudaError_t error =
        cudaLaunchKernel(convert_kernel, dim3(blocks, count), dim3(kThreads), arguments, 0, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace lorax
