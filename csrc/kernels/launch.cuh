// SPDX-License-Identifier: Apache-2.0
// What every launcher shares: integer helpers and the return code of a launch. No torch header.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lorax {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Tensor-core GEMMs take their fast path when leading dimensions are multiples of 16 bytes: eight
// 16-bit columns.
constexpr int64_t kColumnAlignment = 8;

__host__ __device__ constexpr int64_t padded_columns(int64_t columns) {
  return round_up(columns, kColumnAlignment);
}

// Launch parameters travel in the grid, and its y and z extents end here.
constexpr int64_t kMaxGridYZ = 65535;

}  // namespace lorax
