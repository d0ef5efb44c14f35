// SPDX-License-Identifier: Apache-2.0
// The ops that this extension implements for CUDA tensors; contracts in lorax_kernels/_ops.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

namespace lorax {

at::Tensor thin_matmul(const at::Tensor& W, const at::Tensor& X, bool transpose, int64_t pieces);
at::Tensor normal_matmul(const at::Tensor& W, const at::Tensor& X, bool transpose);
at::Tensor gram(const at::Tensor& X, at::ScalarType dtype);
at::Tensor gram_halves(const at::Tensor& X);
at::Tensor orthonormalize(const at::Tensor& X, bool quick);
std::tuple<at::Tensor, at::Tensor> symmetric_eigh(const at::Tensor& H);
at::Tensor subspace_error(const at::Tensor& C, const at::Tensor& theta, int64_t known, int64_t k,
                          int64_t rows);
at::Tensor rotate(const at::Tensor& X, const at::Tensor& R);
at::Tensor cholesky_qr(const at::Tensor& X);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> ritz(const at::Tensor& Q,
                                                                const at::Tensor& B,
                                                                int64_t wanted);
std::tuple<at::Tensor, at::Tensor> stack_halves(at::TensorList matrices, at::IntArrayRef exponents);
at::Tensor shift(const at::Tensor& Z, const at::Tensor& X, const at::Tensor& a,
                 const at::Tensor& s);
std::vector<at::Tensor> project(at::TensorList blocks, at::TensorList read, at::TensorList write);

}  // namespace lorax
