// SPDX-License-Identifier: Apache-2.0
// X R for a batch of blocks and small matrices, to float32 accuracy: both as two float16 pieces of
// scaled columns, three of the four products on tensor cores, scales undone at the end.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "checks.h"
#include "kernels/split.cuh"
#include "products.h"

namespace lorax {

at::Tensor rotate(const at::Tensor& X, const at::Tensor& R) {
  check_block(X, "X");
  check_block(R, "R");
  const c10::cuda::CUDAGuard guard(X.device());
  const at::Tensor block = X.contiguous();
  const int64_t batch = X.size(0), rows = X.size(1), inner = X.size(2), columns = R.size(2);
  at::Tensor C = at::empty({batch, rows, columns}, X.options());
  if (C.numel() == 0) return C;
  if (inner == 0) return C.zero_();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const ColumnScales scales = column_scales(block, 0.f);
  const at::Tensor pieces = side_by_side_pieces(block, scales.scale, 0);
  // Rows of R take up the scales of the columns of X; a column of zeros meets a row of zeros.
  const at::Tensor inverse =
      at::where(scales.scale == 0, at::zeros_like(scales.scale), scales.scale.reciprocal());
  const at::Tensor factor = (R.to(at::kFloat) * inverse.unsqueeze(2)).contiguous();
  const ColumnScales factor_scales = column_scales(factor, 0.f);
  const float* scale = factor_scales.scale.const_data_ptr<float>();
  const int64_t depth = pieces.size(3), padded = padded_columns(columns);
  at::Tensor stack = at::empty({batch, 2, depth, padded}, pieces.options());
  if (depth != inner) stack.zero_();
  // The first piece lies behind the second: [R_1; R_0].
  C10_CUDA_CHECK((launch_split<__half, true>(
      factor.const_data_ptr<float>(), scale,
      reinterpret_cast<__half*>(stack.mutable_data_ptr<at::Half>()) + depth * padded, 2, batch,
      inner, columns, padded, -depth * padded, 2 * depth * padded, 0, stream)));
  multiply_pieces(pieces, stack, 1.0, 0.0, C);
  C10_CUDA_CHECK(launch_merge(C.const_data_ptr<float>(), scale, C.mutable_data_ptr<float>(), 1,
                              batch, rows, columns, columns, 0, 1.f, stream));
  return C;
}

}  // namespace lorax
