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

// C[b] = A[b]^T B[b], float32 from blocks of 16-bit elements with `inner` rows: the products of at
// most 512 rows at a time added up in ordinary float32. Tensor cores truncate their running sums:
// sums of one sign lose up to 2^-24 every 16 rows, 1.9e-5 measured at 4096.
void multiply_blocks(at::ScalarType type, int64_t batch, int64_t rows, int64_t columns,
                     int64_t inner, const Operand& A, const Operand& B, float* C,
                     int64_t C_row_stride, int64_t C_batch_stride);

// The bits in `largest` as kernels take them; null where it is undefined.
const uint32_t* scale_bits(const at::Tensor& largest);

// A block as 16-bit pieces side by side, each padded to a multiple of 8 columns.
struct Pieces {
  at::Tensor data;     // (b, n, count, padded l)
  at::Tensor largest;  // (b,) of float16 pieces: what block_scale takes; else undefined

  int64_t rows() const { return data.size(1); }
  int count() const { return static_cast<int>(data.size(2)); }
  int64_t padded() const { return data.size(3); }
  const uint32_t* scales() const { return scale_bits(largest); }

  // One piece; a product that takes `padded` columns more takes the next piece too.
  Operand piece(int index) const;
};

// X (b, n, l) float32 as `count` pieces in bfloat16, or in float16 times 2^11.
Pieces block_pieces(const at::Tensor& X, int count, at::ScalarType type);

// A small factor (b, l, k) as two float16 pieces times 2^11, the second on top: [R_1; R_0].
struct Stack {
  at::Tensor data;     // (b, 2, padded l, padded k)
  at::Tensor largest;  // (b,) what block_scale takes
};

Stack stacked_pieces(const at::Tensor& R);

// Power-of-two scales of the columns of a block and their exact squared norms; see columns.cuh.
struct ColumnScales {
  at::Tensor scale;   // (b, l) float32
  at::Tensor square;  // (b, l) float32
};

ColumnScales column_scales(const at::Tensor& X, float dead);

// X (b, n, l) float32 times its scales as two float16 pieces; columns of scale 0 become noise.
Pieces column_pieces(const at::Tensor& X, const at::Tensor& scale, uint32_t seed);

// G (b, extent, extent) float32 = X^T X from the two pieces of X's scaled columns, in tensor-core
// sums of at most 512 rows; see combine_kernel. `normalizer` (b, l): G gets a unit diagonal and may
// be wider than l; null: extent is l.
void gram_from_pieces(const Pieces& pieces, const ColumnScales& scales, at::Tensor& G,
                      float* normalizer);

// C (b, n, k) = alpha (P_0 + P_1)(R_0 + R_1) + beta C without the product of the second pieces,
// from two pieces and a stack [R_1; R_0] (b, 2, padded l, padded k).
void multiply_pieces(const Pieces& pieces, const at::Tensor& stack, double alpha, double beta,
                     at::Tensor& C);

}  // namespace lorax
