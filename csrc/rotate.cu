// SPDX-License-Identifier: Apache-2.0
// X R for a batch of blocks and small matrices, to float32 accuracy: both as two float16 pieces,
// three of the four products on tensor cores.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cmath>

#include "checks.h"
#include "kernels/merge.cuh"
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
  const Pieces left = block_pieces(block, 2, at::kHalf);
  const Stack right = stacked_pieces(R.to(at::kFloat).contiguous());
  multiply_pieces(left, right.data, std::ldexp(1.0, -2 * kBlockExponent), 0.0, C);
  C10_CUDA_CHECK(launch_correct(left.scales(), scale_bits(right.largest),
                                C.mutable_data_ptr<float>(), batch, rows, columns,
                                c10::cuda::getCurrentCUDAStream()));
  return C;
}

}  // namespace lorax
