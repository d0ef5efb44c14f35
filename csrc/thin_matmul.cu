// SPDX-License-Identifier: Apache-2.0
// W X and W^T X for a batch of weights and thin float32 blocks: blocks as 16-bit pieces, products
// on tensor cores through cuBLAS with float32 sums.
//
// 16-bit weights are exact, so `pieces` products do, with pieces in the weights' own dtype. float32
// weights are split as well, and the products of pieces whose orders sum to less than `pieces` are
// kept.
#include <ATen/core/Tensor.h>
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
  const bool rows_apart = W.stride(2) == 1 && W.stride(1) >= W.size(2);
  const at::Tensor kept = rows_apart ? W : W.contiguous();
  return {kept, {kept.const_data_ptr(), kept.stride(1), kept.stride(0), transpose}};
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

}  // namespace lorax
