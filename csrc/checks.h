// SPDX-License-Identifier: Apache-2.0
// How the torch-facing files turn return codes into exceptions.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/util/Exception.h>
#include <cublas_v2.h>

#define LORAX_CUBLAS_CHECK(call)                                                         \
  do {                                                                                   \
    const cublasStatus_t status_ = (call);                                               \
    TORCH_CHECK(status_ == CUBLAS_STATUS_SUCCESS, "cuBLAS failed in " #call ": status ", \
                static_cast<int>(status_));                                              \
  } while (0)

namespace lorax {

// Raised here too, not only in Python, because the dispatcher can be called directly.
inline void check_block(const at::Tensor& X, const char* name) {
  TORCH_CHECK_VALUE(X.dim() == 3, name, " must be a batch (b, rows, columns), got ", X.dim(),
                    " dimensions");
  TORCH_CHECK_VALUE(X.size(0) <= 65535, name, " holds ", X.size(0),
                    " matrices, more than the 65535 of one call; split the batch");
}

// A captured stream must not be waited for.
inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace lorax
