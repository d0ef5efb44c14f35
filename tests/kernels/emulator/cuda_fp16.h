// SPDX-License-Identifier: Apache-2.0
// float16, as the tests' stand-in for CUDA's header.
#pragma once

using __half = _Float16;
inline float __half2float(__half x) { return float(x); }
inline __half __float2half(float x) { return __half(x); }
