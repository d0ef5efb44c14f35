// SPDX-License-Identifier: Apache-2.0
// Projector errors of subspaces from the residuals of their vectors.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cfloat>

#include "checks.h"
#include "kernels/subspace_error.cuh"
#include "ops.h"

namespace lorax {

at::Tensor subspace_error(const at::Tensor& C, const at::Tensor& theta, int64_t known, int64_t k,
                          int64_t rows) {
  TORCH_CHECK_VALUE(theta.dim() == 2 && (C.dim() == 2 || C.dim() == 3),
                    "theta must be (b, l) and C (b, l, l) or (b, l), got ", theta.sizes(), " and ",
                    C.sizes());
  const int64_t batch = theta.size(0), l = theta.size(1);
  TORCH_CHECK_VALUE(C.size(0) == batch && C.size(-1) == l && C.size(1) == l,
                    "theta must be (b, l) and C (b, l, l) or (b, l), got ", theta.sizes(), " and ",
                    C.sizes());
  TORCH_CHECK_VALUE(1 <= k && k <= l && 1 <= known && known <= l, "k and known must be from 1 to ",
                    l, ", got ", k, " and ", known);
  const c10::cuda::CUDAGuard guard(C.device());
  at::Tensor error = at::empty({3, batch}, C.options().dtype(at::kDouble));
  if (batch == 0) return error;
  const at::Tensor residuals = C.contiguous(), values = theta.contiguous();
  const double floor = 16. * FLT_EPSILON * FLT_EPSILON * static_cast<double>(rows);
  const ErrorConstants constants{floor, FLT_EPSILON, 0.25 * FLT_EPSILON};
  AT_DISPATCH_FLOATING_TYPES(C.scalar_type(), "subspace_error", [&] {
    using Residual = scalar_t;
    AT_DISPATCH_FLOATING_TYPES(theta.scalar_type(), "subspace_error", [&] {
      C10_CUDA_CHECK(
          launch_subspace_error(residuals.const_data_ptr<Residual>(),
                                values.const_data_ptr<scalar_t>(), error.mutable_data_ptr<double>(),
                                C.dim() == 3, batch, static_cast<int>(l), static_cast<int>(known),
                                static_cast<int>(k), constants, c10::cuda::getCurrentCUDAStream()));
    });
  });
  return error;
}

}  // namespace lorax
