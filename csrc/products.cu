// SPDX-License-Identifier: Apache-2.0
// Batched products through cuBLAS, and blocks as float16 pieces.
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "checks.h"
#include "kernels/symmetric.cuh"
#include "products.h"

namespace lorax {
namespace {

// Rows that tensor cores, which truncate their running sums, add up before ordinary arithmetic
// takes over.
constexpr int64_t kSumRows = 512;

// Gram matrices of parts of the rows live in scratch memory of about this size, for some blocks at
// a time.
constexpr int64_t kScratchBytes = int64_t{256} << 20;

}  // namespace

void multiply(at::ScalarType type, int64_t batch, int64_t rows, int64_t columns, int64_t inner,
              double alpha, Operand A, Operand B, double beta, void* C, int64_t C_row_stride,
              int64_t C_batch_stride) {
  const cublasHandle_t handle = at::cuda::getCurrentCUDABlasHandle();
  // A row-major product is the column-major product of the transposes in the other order.
  const cublasOperation_t op_A = A.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  const cublasOperation_t op_B = B.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  if (type == at::kDouble) {
    LORAX_CUBLAS_CHECK(cublasDgemmStridedBatched_64(
        handle, op_B, op_A, columns, rows, inner, &alpha, static_cast<const double*>(B.data),
        B.row_stride, B.batch_stride, static_cast<const double*>(A.data), A.row_stride,
        A.batch_stride, &beta, static_cast<double*>(C), C_row_stride, C_batch_stride, batch));
    return;
  }
  const cudaDataType_t data_type = type == at::kHalf ? CUDA_R_16F : CUDA_R_16BF;
  const float alpha32 = static_cast<float>(alpha), beta32 = static_cast<float>(beta);
  LORAX_CUBLAS_CHECK(cublasGemmStridedBatchedEx_64(
      handle, op_B, op_A, columns, rows, inner, &alpha32, B.data, data_type, B.row_stride,
      B.batch_stride, A.data, data_type, A.row_stride, A.batch_stride, &beta32, C, CUDA_R_32F,
      C_row_stride, C_batch_stride, batch, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

void multiply_blocks(at::ScalarType type, int64_t batch, int64_t rows, int64_t columns,
                     int64_t inner, const Operand& A, const Operand& B, float* C,
                     int64_t C_row_stride, int64_t C_batch_stride) {
  const auto at_row = [](const Operand& X, int64_t row, bool transposed) {
    return Operand{static_cast<const uint16_t*>(X.data) + row * X.row_stride, X.row_stride,
                   X.batch_stride, transposed};
  };
  for (int64_t start = 0; start < inner; start += kSumRows) {
    multiply(type, batch, rows, columns, std::min(kSumRows, inner - start), 1.0,
             at_row(A, start, true), at_row(B, start, false), start == 0 ? 0.0 : 1.0, C,
             C_row_stride, C_batch_stride);
  }
}

const uint32_t* scale_bits(const at::Tensor& largest) {
  return largest.defined() ? reinterpret_cast<const uint32_t*>(largest.const_data_ptr<int32_t>())
                           : nullptr;
}

Operand Pieces::piece(int index) const {
  const auto* start = static_cast<const uint16_t*>(data.const_data_ptr()) + index * padded();
  return {start, count() * padded(), rows() * count() * padded()};
}

namespace {

// X times 2^11 as float16 pieces at `to`; returns what block_scale takes.
at::Tensor split_halves(const at::Tensor& X, __half* to, int count, PieceLayout layout) {
  const int64_t batch = X.size(0), rows = X.size(1), columns = X.size(2);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const float* x = X.const_data_ptr<float>();
  at::Tensor largest = at::zeros({batch}, X.options().dtype(at::kInt));
  auto* bits = reinterpret_cast<uint32_t*>(largest.mutable_data_ptr<int32_t>());
  C10_CUDA_CHECK((launch_split<__half, Scaling::kBlock>(x, nullptr, bits, to, count, batch, rows,
                                                        columns, layout, 0, stream)));
  C10_CUDA_CHECK((launch_split<__half, Scaling::kAgain>(x, nullptr, bits, to, count, batch, rows,
                                                        columns, layout, 0, stream)));
  return largest;
}

}  // namespace

Pieces block_pieces(const at::Tensor& X, int count, at::ScalarType type) {
  const int64_t batch = X.size(0), rows = X.size(1), columns = X.size(2);
  const int64_t padded = padded_columns(columns);
  const PieceLayout layout{count * padded, padded, rows * count * padded};
  Pieces pieces{at::empty({batch, rows, count, padded}, X.options().dtype(type)), at::Tensor()};
  if (type == at::kHalf) {
    auto* to = reinterpret_cast<__half*>(pieces.data.mutable_data_ptr<at::Half>());
    pieces.largest = split_halves(X, to, count, layout);
  } else {
    auto* to = reinterpret_cast<__nv_bfloat16*>(pieces.data.mutable_data_ptr<at::BFloat16>());
    C10_CUDA_CHECK((launch_split<__nv_bfloat16, Scaling::kNone>(
        X.const_data_ptr<float>(), nullptr, nullptr, to, count, batch, rows, columns, layout, 0,
        c10::cuda::getCurrentCUDAStream())));
  }
  return pieces;
}

Stack stacked_pieces(const at::Tensor& R) {
  const int64_t batch = R.size(0), rows = R.size(1);
  const int64_t depth = padded_columns(rows), padded = padded_columns(R.size(2));
  Stack stack{at::empty({batch, 2, depth, padded}, R.options().dtype(at::kHalf)), at::Tensor()};
  if (depth != rows) stack.data.zero_();
  auto* to = reinterpret_cast<__half*>(stack.data.mutable_data_ptr<at::Half>());
  stack.largest =
      split_halves(R, to + depth * padded, 2, {padded, -depth * padded, 2 * depth * padded});
  return stack;
}

ColumnScales column_scales(const at::Tensor& X, float dead) {
  const int64_t batch = X.size(0), rows = X.size(1), columns = X.size(2);
  const auto options = X.options();
  ColumnScales result{at::empty({batch, columns}, options), at::empty({batch, columns}, options)};
  const at::Tensor partial =
      at::empty({batch, norm_chunks(rows), columns}, options.dtype(at::kDouble));
  C10_CUDA_CHECK(launch_column_scales(X.const_data_ptr<float>(), partial.mutable_data_ptr<double>(),
                                      result.scale.mutable_data_ptr<float>(),
                                      result.square.mutable_data_ptr<float>(), batch, rows, columns,
                                      dead, c10::cuda::getCurrentCUDAStream()));
  return result;
}

Pieces column_pieces(const at::Tensor& X, const at::Tensor& scale, uint32_t seed) {
  const int64_t batch = X.size(0), rows = X.size(1), columns = X.size(2);
  const int64_t padded = padded_columns(columns);
  Pieces pieces{at::empty({batch, rows, 2, padded}, X.options().dtype(at::kHalf)), at::Tensor()};
  C10_CUDA_CHECK((launch_split<__half, Scaling::kColumns>(
      X.const_data_ptr<float>(), scale.const_data_ptr<float>(), nullptr,
      reinterpret_cast<__half*>(pieces.data.mutable_data_ptr<at::Half>()), 2, batch, rows, columns,
      {2 * padded, padded, rows * 2 * padded}, seed, c10::cuda::getCurrentCUDAStream())));
  return pieces;
}

namespace {

// The fewest equal parts of at most kSumRows rows each; 0 where that takes about twice as many as
// unequal ones.
int64_t equal_parts(int64_t rows) {
  const int64_t least = ceil_div(rows, kSumRows);
  for (int64_t parts = least; parts <= 2 * least + 2; ++parts) {
    if (rows % parts == 0) return parts;
  }
  return 0;
}

}  // namespace

void gram_from_pieces(const Pieces& pieces, const ColumnScales& scales, at::Tensor& G,
                      float* normalizer) {
  const int64_t batch = pieces.data.size(0), rows = pieces.rows(), padded = pieces.padded();
  const int64_t columns = scales.scale.size(1), extent = G.size(1), size = padded * 2 * padded;
  // [P_0^T P_0 | P_0^T P_1] of equal parts of the rows is one product for all: blocks are
  // contiguous, so that parts are matrices of a longer batch. Added up one after the other, as
  // multiply_blocks does, each waits for the one before, and none fills the device.
  const int64_t equal = equal_parts(rows);
  const bool is_one = equal > 0 && equal * size * 4 <= kScratchBytes;
  const int64_t parts = is_one ? equal : 1;
  const int64_t most = std::min(kScratchBytes / (parts * size * 4), kMaxGridYZ / parts);
  const int64_t step = std::clamp<int64_t>(most, 1, batch);
  const at::Tensor scratch = at::empty({step, parts, padded, 2 * padded}, G.options());
  auto* T = scratch.mutable_data_ptr<float>();
  auto* to = G.mutable_data_ptr<float>();
  const float* scale = scales.scale.const_data_ptr<float>();
  const float* square = scales.square.const_data_ptr<float>();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Operand all = pieces.piece(0);
  for (int64_t start = 0; start < batch; start += step) {
    const int64_t some = std::min(step, batch - start);
    Operand block = all;
    block.data = static_cast<const uint16_t*>(all.data) + start * all.batch_stride;
    if (is_one) {
      block.batch_stride = rows / parts * all.row_stride;
      Operand left = block;
      left.transposed = true;
      multiply(at::kHalf, some * parts, padded, 2 * padded, rows / parts, 1.0, left, block, 0.0, T,
               2 * padded, size);
    } else {
      multiply_blocks(at::kHalf, some, padded, 2 * padded, rows, block, block, T, 2 * padded, size);
    }
    const int64_t first = start * columns;
    C10_CUDA_CHECK(launch_combine(T, scale + first, square + first, to + start * extent * extent,
                                  normalizer == nullptr ? nullptr : normalizer + first, some,
                                  columns, extent, static_cast<int>(parts), stream));
  }
}

void multiply_pieces(const Pieces& pieces, const at::Tensor& stack, double alpha, double beta,
                     at::Tensor& C) {
  const int64_t batch = pieces.data.size(0), rows = pieces.rows(), inner = pieces.padded();
  const int64_t padded = stack.size(3), columns = C.size(2);
  const auto* R = stack.const_data_ptr<at::Half>();
  const Operand left = pieces.piece(0);
  // [P_0 | P_1] [R_1; R_0] is both small products in one; then the large one on top of them.
  multiply(at::kHalf, batch, rows, columns, 2 * inner, alpha, left, {R, padded, 2 * inner * padded},
           beta, C.mutable_data_ptr(), columns, rows * columns);
  multiply(at::kHalf, batch, rows, columns, inner, alpha, left,
           {R + inner * padded, padded, 2 * inner * padded}, 1.0, C.mutable_data_ptr(), columns,
           rows * columns);
}

}  // namespace lorax
