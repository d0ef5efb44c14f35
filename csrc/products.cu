// SPDX-License-Identifier: Apache-2.0
// Batched products through cuBLAS, and blocks as float16 pieces.
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAStream.h>

#include "checks.h"
#include "kernels/split.cuh"
#include "products.h"

namespace lorax {

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

at::Tensor side_by_side_pieces(const at::Tensor& X, const at::Tensor& scale, uint32_t seed) {
  const int64_t batch = X.size(0), rows = X.size(1), columns = X.size(2);
  const int64_t padded = padded_columns(columns);
  at::Tensor pieces = at::empty({batch, rows, 2, padded}, X.options().dtype(at::kHalf));
  C10_CUDA_CHECK((launch_split<__half, true>(
      X.const_data_ptr<float>(), scale.const_data_ptr<float>(),
      reinterpret_cast<__half*>(pieces.mutable_data_ptr<at::Half>()), 2, batch, rows, columns,
      2 * padded, padded, rows * 2 * padded, seed, c10::cuda::getCurrentCUDAStream())));
  return pieces;
}

at::Tensor piece_products(const at::Tensor& pieces) {
  const int64_t batch = pieces.size(0), rows = pieces.size(1), padded = pieces.size(3);
  at::Tensor T = at::empty({batch, padded, 2 * padded}, pieces.options().dtype(at::kFloat));
  const void* data = pieces.const_data_ptr();
  multiply(at::kHalf, batch, padded, 2 * padded, rows, 1.0,
           {data, 2 * padded, rows * 2 * padded, true}, {data, 2 * padded, rows * 2 * padded}, 0.0,
           T.mutable_data_ptr(), 2 * padded, padded * 2 * padded);
  return T;
}

void multiply_pieces(const at::Tensor& pieces, const at::Tensor& stack, double alpha, double beta,
                     at::Tensor& C) {
  const int64_t batch = pieces.size(0), rows = pieces.size(1), inner = pieces.size(3);
  const int64_t padded = stack.size(3), columns = C.size(2);
  const auto* R = stack.const_data_ptr<at::Half>();
  const Operand left{pieces.const_data_ptr(), 2 * inner, rows * 2 * inner};
  // [P_0 | P_1] [R_1; R_0] is both small products in one; then the large one on top of them.
  multiply(at::kHalf, batch, rows, columns, 2 * inner, alpha, left, {R, padded, 2 * inner * padded},
           beta, C.mutable_data_ptr(), columns, rows * columns);
  multiply(at::kHalf, batch, rows, columns, inner, alpha, left,
           {R + inner * padded, padded, 2 * inner * padded}, 1.0, C.mutable_data_ptr(), columns,
           rows * columns);
}

}  // namespace lorax
