// SPDX-License-Identifier: Apache-2.0
// Orthonormal columns by Cholesky QR, repeated until the columns were nearly orthogonal before.
//
// A pass: scale columns, G = X^T X with unit diagonal, G = L L^T, X <- X D L^-T. A column whose
// pivot is not above a floor is left out of the factorisation: it loses its part along the columns
// before it and nothing else. The next pass sees its true length and either normalises it, or finds
// that nothing but rounding is left and puts noise in its place. The last pass finds columns of
// which most is independent, and applies the diagonal in float32. Quick is one pass, with noise at
// once.
//
// Sources: Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, ETNA 44 (2015), for repeating Cholesky QR;
// Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, SIAM J. Sci. Comput. 42 (2020), for shifts;
// Ootomo, Yokota, IJHPCA 36 (2022), for float32 products from float16 pieces.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cmath>
#include <cstring>

#include "checks.h"
#include "graphs.h"
#include "kernels/cholesky.cuh"
#include "kernels/merge.cuh"
#include "products.h"

namespace lorax {
namespace {

// Errors of the Gram matrix, about 1e-6 of its diagonal, are divided by the pivots. Where other
// passes follow, a column may keep 1e-6 / 4e-5 of the others; a quick pass trades some of that for
// directions kept.
constexpr float kPivotFloor = 4e-5f;
constexpr float kQuickFloor = 1e-5f;

// A column that was left out and comes out shorter than this (half of its true length) is rounding
// of the products, no direction.
constexpr float kDeadLength = 5e-6f;

// Pivots from 0.9 on, as diagonals of the inverse: what is wrong with the Gram matrix, float32's
// accuracy, is then wrong with the result, and no more.
constexpr float kSettled = 1.054f;

// A pass takes in the columns of which 6e-3 or more is independent of those before: independent
// blocks settle in two or three passes, and condition 1e7 or rank two in four of a float32 model.
constexpr int kMaxPasses = 6;
constexpr int kCapturedPasses = 5;

enum class Pass {
  kMore,   // what comes next sees to columns left out
  kLast,   // columns were nearly orthogonal: to full accuracy
  kQuick,  // columns left out are seen to here
};

// Whether no pivot was small in any of the factorisations. Waits for the device.
bool is_settled(const at::Tensor& M, c10::cuda::CUDAStream stream) {
  const at::Tensor largest = at::zeros({1}, M.options().dtype(at::kInt));
  auto* bits = reinterpret_cast<uint32_t*>(largest.mutable_data_ptr<int32_t>());
  C10_CUDA_CHECK(launch_least_pivot(M.const_data_ptr<float>(), bits, M.size(0), M.size(1), stream));
  uint32_t found = 0;
  C10_CUDA_CHECK(cudaMemcpyAsync(&found, bits, sizeof(found), cudaMemcpyDeviceToHost, stream));
  C10_CUDA_CHECK(cudaStreamSynchronize(stream));
  float value;
  std::memcpy(&value, &found, sizeof(value));
  return value < kSettled;
}

// The lower triangle of G (batch, extent, extent) becomes the inverse of its Cholesky factor.
void invert_factor(const at::Tensor& G, float floor, c10::cuda::CUDAStream stream) {
  const int64_t batch = G.size(0), extent = G.size(1);
  const at::Tensor steps = at::empty({batch, step_elements(extent)}, G.options());
  const Factorization state{G.mutable_data_ptr<float>(), steps.mutable_data_ptr<float>(), extent,
                            floor};
  const auto record = [&](void* where, cudaStream_t to) {
    return launch_cholesky_steps(static_cast<Factorization*>(where), batch, extent, to);
  };
  if (is_capturing(stream)) {
    const at::Tensor room =
        at::empty({int64_t{sizeof(Factorization)}}, G.options().dtype(at::kByte));
    void* where = room.mutable_data_ptr();
    C10_CUDA_CHECK(launch_cholesky_start(state, static_cast<Factorization*>(where), batch, stream));
    C10_CUDA_CHECK(record(where, stream));
    return;
  }
  const auto one = sequence(SequenceOf::kFactorization, batch, extent, sizeof(Factorization),
                            G.options(), stream, record);
  const std::lock_guard<std::mutex> lock(one->in_use);
  auto* where = static_cast<Factorization*>(one->where.mutable_data_ptr());
  C10_CUDA_CHECK(launch_cholesky_start(state, where, batch, stream));
  if (extent > kTile) C10_CUDA_CHECK(cudaGraphLaunch(one->graph, stream));
}

// One pass. With `ask`, kMore becomes kLast where the pivots allow; `kind` says which it was.
at::Tensor make_pass(const at::Tensor& X, float dead, uint32_t seed, bool ask, Pass& kind) {
  const int64_t batch = X.size(0), rows = X.size(1), columns = X.size(2);
  const int64_t extent = factor_extent(columns), padded = padded_columns(columns);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto options = X.options();
  const ColumnScales scales = column_scales(X, dead);
  const Pieces pieces = column_pieces(X, scales.scale, seed);
  at::Tensor G = at::empty({batch, extent, extent}, options);
  at::Tensor normalizer = at::empty({batch, columns}, options);
  gram_from_pieces(pieces, scales, G, normalizer.mutable_data_ptr<float>());
  invert_factor(G, kind == Pass::kQuick ? kQuickFloor : kPivotFloor, stream);
  if (ask && is_settled(G, stream)) kind = Pass::kLast;
  const bool last = kind == Pass::kLast;
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
  if (kind == Pass::kQuick) {
    C10_CUDA_CHECK(launch_mend_columns(G.const_data_ptr<float>(), Q.mutable_data_ptr<float>(),
                                       batch, rows, columns, extent, seed + 1, stream));
  }
  return Q;
}

}  // namespace

at::Tensor orthonormalize(const at::Tensor& X, bool quick) {
  check_block(X, "X");
  const c10::cuda::CUDAGuard guard(X.device());
  at::Tensor Q = X.contiguous();
  if (Q.numel() == 0) return at::empty_like(Q);
  Pass kind = Pass::kQuick;
  if (quick) return make_pass(Q, 0.f, 0, false, kind);
  const bool captured = is_capturing(c10::cuda::getCurrentCUDAStream());
  const int passes = captured ? kCapturedPasses : kMaxPasses;
  for (int p = 0; kind != Pass::kLast; ++p) {
    kind = p == passes - 1 ? Pass::kLast : Pass::kMore;
    Q = make_pass(Q, p == 0 ? 0.f : kDeadLength, static_cast<uint32_t>(p),
                  !captured && kind == Pass::kMore, kind);
  }
  return Q;
}

}  // namespace lorax
