// SPDX-License-Identifier: Apache-2.0
// One factor of a polynomial filter, (Z - a X) s.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "checks.h"
#include "kernels/shift.cuh"
#include "ops.h"

namespace lorax {

at::Tensor shift(const at::Tensor& Z, const at::Tensor& X, const at::Tensor& a,
                 const at::Tensor& s) {
  check_block(Z, "Z");
  TORCH_CHECK_VALUE(Z.sizes() == X.sizes(), "Z and X must have one shape, got ", Z.sizes(), " and ",
                    X.sizes());
  const c10::cuda::CUDAGuard guard(Z.device());
  const at::Tensor left = Z.contiguous(), right = X.contiguous();
  const at::Tensor roots = a.contiguous(), factors = s.contiguous();
  at::Tensor out = at::empty_like(left);
  if (out.numel() == 0) return out;
  C10_CUDA_CHECK(launch_shift(left.const_data_ptr<float>(), right.const_data_ptr<float>(),
                              roots.const_data_ptr<float>(), factors.const_data_ptr<float>(),
                              out.mutable_data_ptr<float>(), Z.size(0), Z.size(1), Z.size(2),
                              c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace lorax
