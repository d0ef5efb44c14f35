// SPDX-License-Identifier: Apache-2.0
// Numbers of the projection kernels: conversions, and the split of wider ones into bfloat16 parts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace lorax::projection {

using bf16 = __nv_bfloat16;

// How many bfloat16 parts hold a value: bfloat16 is exact in one, float16 in two, float32 in three.
template <typename T>
constexpr int kExactParts = 0;
template <>
inline constexpr int kExactParts<bf16> = 1;
template <>
inline constexpr int kExactParts<__half> = 2;
template <>
inline constexpr int kExactParts<float> = 3;

__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(float x) { return x; }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half(x);
}
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}

// x = part[0] + part[1] + ... up to 2^-8, 2^-16 or 2^-24 of |x|.
template <int kParts>
__device__ inline void split(float x, bf16 (&part)[kParts]) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    part[i] = __float2bfloat16(x);
    x -= __bfloat162float(part[i]);
  }
}

__device__ inline uint32_t pack(bf16 low, bf16 high) {
  return uint32_t(__bfloat16_as_ushort(low)) | uint32_t(__bfloat16_as_ushort(high)) << 16;
}

}  // namespace lorax::projection
