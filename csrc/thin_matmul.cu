// SPDX-License-Identifier: Apache-2.0
// W X and W^T X for a batch of weights and thin float32 blocks, and both in a row: blocks as 16-bit
// pieces, products on tensor cores through cuBLAS with float32 sums.
//
// 16-bit weights are exact, so `pieces` products do, with pieces in the weights' own dtype. float32
// weights are split as well, and the products of pieces whose orders sum to less than `pieces` are
// kept.
//
// W^T (W X) needs no more than float16 of what is between its products, and cuBLAS writes that: no
// float32 block in between, and no split of one.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cmath>

#include "checks.h"
#include "kernels/merge.cuh"
#include "products.h"

namespace lorax {
namespace {

// Up to this many columns the pieces go side by side into one product, which reads the weights once
// and is summed afterwards; beyond, one product a piece adds into the result.
constexpr int64_t kSideBySideColumns = 384;

// The pieces of float32 weights live in scratch memory of about this size, a few matrices at a
// time.
constexpr int64_t kScratchBytes = int64_t{256} << 20;

struct Weights {
  at::Tensor W;
  Operand operand;
};

// Takes row strides as they are; anything else is copied once.
Weights as_operand(const at::Tensor& W, bool transpose) {
  if (W.stride(2) == 1 && W.stride(1) >= W.size(2)) {
    return {W, {W.const_data_ptr(), W.stride(1), W.stride(0), transpose}};
  }
  // Where a side is one its stride may be anything, in a contiguous tensor too.
  const at::Tensor kept = W.contiguous();
  return {kept, {kept.const_data_ptr(), W.size(2), W.size(1) * W.size(2), transpose}};
}

// W times pieces of X in W's own dtype.
void multiply_exact(const at::Tensor& W, const Operand& weights, const Pieces& X, at::Tensor& C) {
  const int64_t batch = C.size(0), rows = C.size(1), columns = C.size(2), inner = X.rows();
  const int count = X.count();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const double alpha = X.scales() == nullptr ? 1.0 : std::ldexp(1.0, -kBlockExponent);
  if (count > 1 && count * X.padded() <= kSideBySideColumns) {
    const int64_t wide = count * X.padded();
    const at::Tensor T = at::empty({batch, rows, wide}, C.options());
    multiply(W.scalar_type(), batch, rows, wide, inner, alpha, weights, X.piece(0), 0.0,
             T.mutable_data_ptr(), wide, rows * wide);
    C10_CUDA_CHECK(launch_merge(T.const_data_ptr<float>(), X.scales(), C.mutable_data_ptr<float>(),
                                count, batch, rows, columns, wide, X.padded(), stream));
    return;
  }
  // Small pieces first: the sum then loses less.
  for (int p = count - 1; p >= 0; --p) {
    multiply(W.scalar_type(), batch, rows, columns, inner, alpha, weights, X.piece(p),
             p == count - 1 ? 0.0 : 1.0, C.mutable_data_ptr(), columns, rows * columns);
  }
  if (X.scales() != nullptr) {
    C10_CUDA_CHECK(launch_correct(X.scales(), nullptr, C.mutable_data_ptr<float>(), batch, rows,
                                  columns, stream));
  }
}

void multiply_float32(const at::Tensor& W, const at::Tensor& X, bool transpose, int pieces,
                      at::Tensor& C) {
  const int64_t batch = C.size(0), rows = C.size(1), columns = C.size(2);
  const at::Tensor weights = W.contiguous();
  const int64_t row_bytes = pieces * padded_columns(W.size(2)) * 2;
  const int64_t step =
      std::clamp<int64_t>(kScratchBytes / std::max<int64_t>(W.size(1) * row_bytes, 1), 1, batch);
  const Pieces right = block_pieces(X, pieces, at::kBFloat16);
  const int64_t block = right.data.stride(0);
  for (int64_t start = 0; start < batch; start += step) {
    const int64_t some = std::min(step, batch - start);
    const Pieces left = block_pieces(weights.narrow(0, start, some), pieces, at::kBFloat16);
    float* to = C.mutable_data_ptr<float>() + start * rows * columns;
    bool first = true;
    for (int order = pieces - 1; order >= 0; --order) {
      for (int p = 0; p <= order; ++p) {
        Operand A = left.piece(p), B = right.piece(order - p);
        A.transposed = transpose;
        B.data = static_cast<const uint16_t*>(B.data) + start * block;
        multiply(at::kBFloat16, some, rows, columns, X.size(1), 1.0, A, B, first ? 0.0 : 1.0, to,
                 columns, rows * columns);
        first = false;
      }
    }
  }
}

// C[b] = alpha op(A[b]) B[b] in float16, all rows contiguous but those of A; else as `multiply`.
void multiply_to_half(int64_t batch, int64_t rows, int64_t columns, int64_t inner, double alpha,
                      const Operand& A, const Operand& B, at::Tensor& C) {
  const cublasHandle_t handle = at::cuda::getCurrentCUDABlasHandle();
  const cublasOperation_t op_A = A.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  const float alpha32 = static_cast<float>(alpha), beta32 = 0.f;
  // A long sum in parts must not be added up in float16. Afterwards as PyTorch leaves a handle.
  LORAX_CUBLAS_CHECK(cublasSetMathMode(handle, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
  LORAX_CUBLAS_CHECK(cublasGemmStridedBatchedEx_64(
      handle, CUBLAS_OP_N, op_A, columns, rows, inner, &alpha32, B.data, CUDA_R_16F, B.row_stride,
      B.batch_stride, A.data, CUDA_R_16F, A.row_stride, A.batch_stride, &beta32,
      C.mutable_data_ptr(), CUDA_R_16F, columns, rows * columns, batch, CUBLAS_COMPUTE_32F,
      CUBLAS_GEMM_DEFAULT));
  LORAX_CUBLAS_CHECK(cublasSetMathMode(handle, CUBLAS_DEFAULT_MATH));
}

// W X' is held in float16 times 2^-e, the smallest e with 2^e >= sqrt(inner). By Cauchy-Schwarz no
// element is then larger than the largest weight times the norm of a column of X' = 2^11 X: of
// weights under 1/2, whose largest is (1 - 2^-11)/2, and columns of X of norm 64 that is 65504,
// float16's own largest number.
int middle_exponent(int64_t inner) {
  int exponent = 0;
  while (int64_t{1} << (2 * exponent) < inner) ++exponent;
  return exponent;
}

}  // namespace

at::Tensor thin_matmul(const at::Tensor& W, const at::Tensor& X, bool transpose, int64_t pieces) {
  check_block(W, "W");
  check_block(X, "X");
  const c10::cuda::CUDAGuard guard(X.device());
  const at::Tensor block = X.contiguous();
  const int64_t rows = W.size(transpose ? 2 : 1);
  at::Tensor C = at::empty({W.size(0), rows, X.size(2)}, X.options());
  if (C.numel() == 0) return C;
  if (block.numel() == 0) return C.zero_();
  const int count = static_cast<int>(pieces);
  if (W.scalar_type() == at::kFloat) {
    multiply_float32(W, block, transpose, count, C);
    return C;
  }
  const Weights weights = as_operand(W, transpose);
  multiply_exact(weights.W, weights.operand, block_pieces(block, count, W.scalar_type()), C);
  return C;
}

at::Tensor normal_matmul(const at::Tensor& W, const at::Tensor& X, bool transpose) {
  check_block(W, "W");
  check_block(X, "X");
  TORCH_CHECK_TYPE(W.scalar_type() == at::kHalf, "W must be float16, got ", W.scalar_type());
  const c10::cuda::CUDAGuard guard(X.device());
  const int64_t batch = X.size(0), inner = X.size(1), columns = X.size(2);
  const int64_t rows = W.size(transpose ? 2 : 1);
  at::Tensor Z = at::empty({batch, inner, columns}, X.options());
  if (Z.numel() == 0) return Z;
  if (W.numel() == 0) return Z.zero_();
  Weights weights = as_operand(W, transpose);
  const Pieces piece = block_pieces(X.contiguous(), 1, at::kHalf);
  const int64_t padded = piece.padded();
  const int exponent = middle_exponent(inner);
  at::Tensor Y = at::empty({batch, rows, padded}, W.options());
  multiply_to_half(batch, rows, padded, inner, std::ldexp(1.0, -exponent), weights.operand,
                   piece.piece(0), Y);
  weights.operand.transposed = !transpose;
  multiply(at::kHalf, batch, inner, columns, rows, std::ldexp(1.0, exponent - kBlockExponent),
           weights.operand, {Y.const_data_ptr(), padded, rows * padded}, 0.0, Z.mutable_data_ptr(),
           columns, inner * columns);
  C10_CUDA_CHECK(launch_correct(piece.scales(), nullptr, Z.mutable_data_ptr<float>(), batch, inner,
                                columns, c10::cuda::getCurrentCUDAStream()));
  return Z;
}

}  // namespace lorax
