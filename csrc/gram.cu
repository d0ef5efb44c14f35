// SPDX-License-Identifier: Apache-2.0
// X^T X for a batch of blocks, exactly symmetric.
//
// float32 from float32: two float16 pieces of scaled columns, H = P_0^T P_0 and C = P_0^T P_1 in
// one product, G = H + C + C^T; the diagonal from exact norms. float32 from 16-bit blocks: one
// product, exact factors. Both in sums of at most 512 rows. float64: cuBLAS on an upcast copy
// (Hopper multiplies float64 on tensor cores). Two float16 pieces from float16: one product and
// one sum, as a filter needs it.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "checks.h"
#include "kernels/symmetric.cuh"
#include "products.h"

namespace lorax {
namespace {

// The float64 copy of the block is made a few matrices at a time, in scratch of about this size.
constexpr int64_t kScratchBytes = int64_t{512} << 20;

// Rows of G that one product computes where G is wide: at 4096 columns 37 % less to multiply, in
// products still large enough to run at full speed.
constexpr int64_t kStrip = 1024;

void gram_float64(const at::Tensor& X, at::Tensor& G) {
  const int64_t batch = X.size(0), rows = X.size(1), columns = X.size(2);
  const int64_t step = std::clamp<int64_t>(kScratchBytes / (rows * columns * 8), 1, batch);
  for (int64_t start = 0; start < batch; start += step) {
    const int64_t some = std::min(step, batch - start);
    const at::Tensor wide = X.narrow(0, start, some).to(at::kDouble).contiguous();
    const void* data = wide.const_data_ptr();
    multiply(at::kDouble, some, columns, columns, rows, 1.0, {data, columns, rows * columns, true},
             {data, columns, rows * columns}, 0.0,
             G.mutable_data_ptr<double>() + start * columns * columns, columns, columns * columns);
  }
  C10_CUDA_CHECK(launch_mirror(G.mutable_data_ptr<double>(), batch, columns,
                               c10::cuda::getCurrentCUDAStream()));
}

void gram_exact_factors(const at::Tensor& X, at::Tensor& G) {
  const int64_t batch = X.size(0), rows = X.size(1), columns = X.size(2);
  const at::Tensor kept = X.contiguous();
  const auto* data = static_cast<const uint16_t*>(kept.const_data_ptr());
  // Block rows from the diagonal on: the half below is mirrored, not computed.
  const int64_t strip = columns < 2 * kStrip ? columns : kStrip;
  for (int64_t start = 0; start < columns; start += strip) {
    const int64_t some = std::min(strip, columns - start);
    const Operand block{data + start, columns, rows * columns};
    multiply_blocks(X.scalar_type(), batch, some, columns - start, rows, block, block,
                    G.mutable_data_ptr<float>() + start * columns + start, columns,
                    columns * columns);
  }
  C10_CUDA_CHECK(launch_mirror(G.mutable_data_ptr<float>(), batch, columns,
                               c10::cuda::getCurrentCUDAStream()));
}

void gram_pieces(const at::Tensor& X, at::Tensor& G) {
  const at::Tensor kept = X.contiguous();
  const ColumnScales scales = column_scales(kept, 0.f);
  gram_from_pieces(column_pieces(kept, scales.scale, 0), scales, G, nullptr);
}

// The float32 strip of a Gram matrix lives in scratch memory of about this size, for some matrices
// at a time.
constexpr int64_t kStripBytes = int64_t{128} << 20;

}  // namespace

at::Tensor gram(const at::Tensor& X, at::ScalarType dtype) {
  check_block(X, "X");
  const c10::cuda::CUDAGuard guard(X.device());
  at::Tensor G = at::empty({X.size(0), X.size(2), X.size(2)}, X.options().dtype(dtype));
  if (G.numel() == 0) return G;
  if (X.numel() == 0) return G.zero_();
  if (dtype == at::kDouble) {
    gram_float64(X, G);
  } else if (X.scalar_type() == at::kFloat || X.scalar_type() == at::kDouble) {
    gram_pieces(X.to(at::kFloat), G);
  } else {
    gram_exact_factors(X, G);
  }
  return G;
}

at::Tensor gram_halves(const at::Tensor& X) {
  check_block(X, "X");
  TORCH_CHECK_TYPE(X.scalar_type() == at::kHalf, "X must be float16, got ", X.scalar_type());
  const c10::cuda::CUDAGuard guard(X.device());
  const int64_t batch = X.size(0), rows = X.size(1), columns = X.size(2);
  at::Tensor pieces = at::empty({2, batch, columns, columns}, X.options());
  if (pieces.numel() == 0) return pieces;
  if (X.numel() == 0) return pieces.zero_();
  const bool columns_apart = X.stride(1) == 1 && X.stride(2) >= rows;
  const bool rows_apart = X.stride(2) == 1 && X.stride(1) >= columns;
  const at::Tensor kept = rows_apart || columns_apart ? X : X.contiguous();
  const bool is_transposed = !rows_apart && columns_apart;
  const int64_t stride = kept.stride(is_transposed ? 2 : 1);
  const auto* data = static_cast<const uint16_t*>(kept.const_data_ptr());
  auto* high = reinterpret_cast<__half*>(pieces.mutable_data_ptr<at::Half>());
  auto* low = high + batch * columns * columns;
  // Block rows from the diagonal on: the half below is mirrored, not computed.
  const int64_t strip = columns < 2 * kStrip ? columns : kStrip;
  const int64_t step = std::clamp<int64_t>(kStripBytes / (strip * columns * 4), 1, batch);
  const at::Tensor scratch = at::empty({step, strip, columns}, X.options().dtype(at::kFloat));
  auto* T = scratch.mutable_data_ptr<float>();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  for (int64_t first = 0; first < batch; first += step) {
    const int64_t count = std::min(step, batch - first);
    for (int64_t start = 0; start < columns; start += strip) {
      const int64_t some = std::min(strip, columns - start), wide = columns - start;
      const uint16_t* from =
          data + first * kept.stride(0) + start * (is_transposed ? stride : int64_t{1});
      multiply(at::kHalf, count, some, wide, rows, 1.0,
               {from, stride, kept.stride(0), !is_transposed},
               {from, stride, kept.stride(0), is_transposed}, 0.0, T, wide, some * wide);
      const int64_t offset = first * columns * columns;
      C10_CUDA_CHECK(
          launch_strip_pieces(T, high + offset, low + offset, count, some, columns, start, stream));
    }
  }
  return pieces;
}

}  // namespace lorax
