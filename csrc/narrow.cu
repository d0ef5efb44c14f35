// SPDX-License-Identifier: Apache-2.0
// Steps of a subspace iteration on single matrices: Cholesky QR and the projected SVD, in float64
// and without a wait for the device.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "checks.h"
#include "kernels/ritz.cuh"
#include "ops.h"

namespace lorax {
namespace {

// As in the references, lorax_kernels/ops/cholesky_qr and ritz.
constexpr double kLeastPivot = 1e-12;
constexpr double kNearlyDependent = 0.5;
constexpr double kSteep = 1e-9;

at::TensorOptions doubles(const at::Tensor& X) { return X.options().dtype(at::kDouble); }

// Room for the sums of a block's chunks.
at::Tensor chunk_sums(const at::Tensor& X) {
  return at::empty({X.size(0), narrow_chunks(X.size(1)), X.size(2), X.size(2)}, doubles(X));
}

NarrowGram gram_of(const at::Tensor& X, const at::Tensor& partial) {
  return narrow_gram(X.const_data_ptr<float>(), partial.mutable_data_ptr<double>(), X.size(1));
}

NarrowProduct product_of(const at::Tensor& X, const at::Tensor& R, const at::Tensor& C) {
  return {X.const_data_ptr<float>(), R.const_data_ptr<double>(), C.mutable_data_ptr<float>(),
          X.size(1)};
}

void check_columns(const at::Tensor& X, const char* op, int64_t most) {
  TORCH_CHECK_VALUE(X.size(2) <= most, op, " takes up to ", most, " columns on a GPU, got ",
                    X.size(2), "; the reference takes any");
}

}  // namespace

at::Tensor cholesky_qr(const at::Tensor& X) {
  check_block(X, "X");
  check_columns(X, "cholesky_qr", kNarrowColumns);
  const c10::cuda::CUDAGuard guard(X.device());
  const at::Tensor block = X.contiguous();
  const int64_t batch = X.size(0), columns = X.size(2);
  at::Tensor Q = at::empty(X.sizes(), X.options());
  if (Q.numel() == 0) return Q;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor partial = chunk_sums(block);
  const at::Tensor R = at::empty({batch, columns, columns}, doubles(X));
  const NarrowGram gram = gram_of(block, partial);
  C10_CUDA_CHECK(launch_narrow_gram(gram, gram, 1, batch, columns, stream));
  C10_CUDA_CHECK(launch_narrow_factor(gram, R.mutable_data_ptr<double>(), batch, columns,
                                      kLeastPivot, stream));
  const NarrowProduct product = product_of(block, R, Q);
  C10_CUDA_CHECK(launch_narrow_product(product, product, 1, batch, columns, columns, stream));
  return Q;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> ritz(const at::Tensor& Q,
                                                                const at::Tensor& B,
                                                                int64_t wanted) {
  check_block(Q, "Q");
  check_block(B, "B");
  check_columns(Q, "ritz", kRitzColumns);
  const c10::cuda::CUDAGuard guard(Q.device());
  const at::Tensor left_block = Q.contiguous(), right_block = B.contiguous();
  const int64_t batch = Q.size(0), columns = Q.size(2);
  at::Tensor U = at::empty({batch, Q.size(1), wanted}, Q.options());
  at::Tensor V = at::empty({batch, B.size(1), wanted}, Q.options());
  at::Tensor S = at::empty({batch, wanted}, Q.options());
  at::Tensor status = at::empty({batch}, Q.options().dtype(at::kInt));
  if (batch == 0) return {U, S, V, status};
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor left_sums = chunk_sums(left_block), right_sums = chunk_sums(right_block);
  const at::Tensor left = at::empty({batch, columns, wanted}, doubles(Q));
  const at::Tensor right = at::empty({batch, columns, wanted}, doubles(Q));
  const NarrowGram left_gram = gram_of(left_block, left_sums);
  const NarrowGram right_gram = gram_of(right_block, right_sums);
  C10_CUDA_CHECK(launch_narrow_gram(left_gram, right_gram, 2, batch, columns, stream));
  C10_CUDA_CHECK(launch_ritz(left_gram, right_gram, left.mutable_data_ptr<double>(),
                             right.mutable_data_ptr<double>(), S.mutable_data_ptr<float>(),
                             status.mutable_data_ptr<int>(), batch, columns, wanted,
                             kNearlyDependent, kSteep, stream));
  C10_CUDA_CHECK(launch_narrow_product(product_of(left_block, left, U),
                                       product_of(right_block, right, V), 2, batch, columns, wanted,
                                       stream));
  return {U, S, V, status};
}

}  // namespace lorax
