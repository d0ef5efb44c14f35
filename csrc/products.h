// SPDX-License-Identifier: Apache-2.0
// Batched row-major matrix products and scaled float16 pieces: what the ops share. Torch-facing.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace lorax {

// One operand of a batch of row-major products: where it starts and how far apart rows and matrices
// are, in elements. `transposed`: the product takes its transpose.
struct Operand {
  const void* data;
  int64_t row_stride;
  int64_t batch_stride;
  bool transposed = false;
};

// C[b] = alpha op(A[b]) op(B[b]) + beta C[b], (rows, inner) by (inner, columns), with A and B in
// bfloat16, float16 (C float32) or float64 (C float64), on the current stream. Never reduced below
// the precision of C.
void multiply(at::ScalarType type, int64_t batch, int64_t rows, int64_t columns, int64_t inner,
              double alpha, Operand A, Operand B, double beta, void* C, int64_t C_row_stride,
              int64_t C_batch_stride);

// Power-of-two scales of the columns of a block and their exact squared norms; see split.cuh.
struct ColumnScales {
  at::Tensor scale;   // (b, l) float32
  at::Tensor square;  // (b, l) float32
};

ColumnScales column_scales(const at::Tensor& X, float dead);

// X (b, n, l) times its scales as two float16 pieces side by side: (b, n, 2, padded l).
at::Tensor side_by_side_pieces(const at::Tensor& X, const at::Tensor& scale, uint32_t seed);

// [P_0^T P_0 | P_0^T P_1] of side-by-side pieces, unscaled: (b, padded l, 2 padded l) float32.
at::Tensor piece_products(const at::Tensor& pieces);

// C (b, n, k) = alpha (P_0 + P_1)(R_0 + R_1) + beta C without the product of the second pieces,
// from side-by-side pieces (b, n, 2, padded l) and a stack [R_1; R_0] (b, 2, padded l, padded k).
void multiply_pieces(const at::Tensor& pieces, const at::Tensor& stack, double alpha, double beta,
                     at::Tensor& C);

}  // namespace lorax
