// SPDX-License-Identifier: Apache-2.0
// Orthonormal columns by Cholesky QR, repeated, with no word to the host.
//
// A pass: scale columns, G = X^T X with unit diagonal, G = L L^T with pivots no smaller than a
// floor, X <- X D L^-T. Where a pivot is at its floor the column comes out short instead of
// normalised; the next pass sees its true length and either normalises it, nearly orthogonal by
// then, or finds that nothing but rounding is left and puts noise in its place. The last pass
// multiplies by nearly the identity, whose diagonal is applied in float32. Quick is one pass.
//
// Sources: Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, ETNA 44 (2015), for repeating Cholesky QR;
// Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, SIAM J. Sci. Comput. 42 (2020), for shifts;
// Ootomo, Yokota, IJHPCA 36 (2022), for float32 products from float16 pieces.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cmath>

#include "checks.h"
#include "kernels/cholesky.cuh"
#include "kernels/merge.cuh"
#include "products.h"

namespace lorax {
namespace {

// Off-diagonal sums of a unit-diagonal Gram matrix are wrong by up to about 1e-5 for nearly
// parallel columns (tensor cores truncate); a pivot must stand clear of that.
constexpr float kPivotFloor = 4e-5f;

// A column whose pivot was at the floor and that comes out shorter than this had less than 1.3e-5
// of its length outside the columns before it: rounding of the products, no direction.
constexpr float kDeadLength = 2e-3f;

// The same where no other pass follows and short columns are stretched to unit length: errors of
// the Gram matrix put up to 5e-3 of the columns before into them.
constexpr float kMendLength = 0.1f;

enum class Pass {
  kFirst,  // what comes next sees to short columns
  kLast,   // nearly the identity: to full accuracy
  kOnly,   // short columns are seen to here
};

at::Tensor make_pass(const at::Tensor& X, float dead, uint32_t seed, Pass kind) {
  const bool last = kind == Pass::kLast;
  const int64_t batch = X.size(0), rows = X.size(1), columns = X.size(2);
  const int64_t extent = factor_extent(columns), padded = padded_columns(columns);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto options = X.options();
  const ColumnScales scales = column_scales(X, dead);
  const Pieces pieces = column_pieces(X, scales.scale, seed);
  at::Tensor G = at::empty({batch, extent, extent}, options);
  at::Tensor normalizer = at::empty({batch, columns}, options);
  {
    const at::Tensor T = piece_products(pieces);
    C10_CUDA_CHECK(launch_combine(T.const_data_ptr<float>(), scales.scale.const_data_ptr<float>(),
                                  scales.square.const_data_ptr<float>(),
                                  G.mutable_data_ptr<float>(), normalizer.mutable_data_ptr<float>(),
                                  batch, columns, extent, stream));
  }
  {
    const at::Tensor steps = at::empty({batch, step_elements(extent)}, options);
    C10_CUDA_CHECK(launch_cholesky_inverse(G.mutable_data_ptr<float>(),
                                           steps.mutable_data_ptr<float>(), batch, extent,
                                           kPivotFloor, stream));
  }
  at::Tensor stack = at::empty({batch, 2, padded, padded}, pieces.data.options());
  at::Tensor gain = at::empty({batch, columns}, options);
  C10_CUDA_CHECK(launch_triangle_pieces(
      G.const_data_ptr<float>(), normalizer.const_data_ptr<float>(),
      reinterpret_cast<__half*>(stack.mutable_data_ptr<at::Half>()),
      last ? gain.mutable_data_ptr<float>() : nullptr, batch, columns, extent, stream));
  at::Tensor Q = at::empty_like(X);
  if (last) {
    C10_CUDA_CHECK(launch_restore(
        reinterpret_cast<const __half*>(pieces.data.const_data_ptr<at::Half>()),
        gain.const_data_ptr<float>(), Q.mutable_data_ptr<float>(), batch, rows, columns, stream));
  }
  multiply_pieces(pieces, stack, std::ldexp(1.0, -kPieceExponent - kTriangleExponent),
                  last ? 1.0 : 0.0, Q);
  if (kind == Pass::kOnly) {
    C10_CUDA_CHECK(launch_mend_columns(G.const_data_ptr<float>(), Q.mutable_data_ptr<float>(),
                                       batch, rows, columns, extent, kPivotFloor, kMendLength,
                                       seed + 1, stream));
  }
  return Q;
}

}  // namespace

at::Tensor orthonormalize(const at::Tensor& X, bool quick) {
  check_block(X, "X");
  const c10::cuda::CUDAGuard guard(X.device());
  at::Tensor Q = X.contiguous();
  if (Q.numel() == 0) return at::empty_like(Q);
  if (quick) return make_pass(Q, 0.f, 0, Pass::kOnly);
  // Two passes do for independent columns; the third is for dependent ones, whose remainder the
  // first two find to be noise. Fresh noise in a nearly square block takes a fourth.
  const int passes = 4 * X.size(2) <= X.size(1) ? 3 : 4;
  for (int p = 0; p < passes; ++p) {
    Q = make_pass(Q, p == 0 ? 0.f : kDeadLength, static_cast<uint32_t>(p),
                  p == passes - 1 ? Pass::kLast : Pass::kFirst);
  }
  return Q;
}

}  // namespace lorax
