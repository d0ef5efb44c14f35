// SPDX-License-Identifier: Apache-2.0
// A number of any float type in the one that holds it and is computed in. No torch header.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace lorax {

__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }

}  // namespace lorax
