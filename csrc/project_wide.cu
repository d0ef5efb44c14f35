// SPDX-License-Identifier: Apache-2.0
// The projection of wide blocks: two batched cuBLAS products for all layers of one shape.
#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <tuple>

#include "checks.h"
#include "kernels/pointers.cuh"
#include "project_wide.h"

namespace lorax {
namespace {

using projection::Layer;

// A block that lies transposed starts a new row in memory with each of its columns.
bool is_transposed(const Layer& x) { return x.block_row == 1; }
int block_stride(const Layer& x) { return is_transposed(x) ? x.block_column : x.block_row; }

// What the layers of one batched product have in common.
auto shape_of(const Layer& x) {
  return std::tuple(x.m, x.p, x.k, x.r, is_transposed(x), block_stride(x), x.read_row, x.write_row);
}

}  // namespace

bool is_wide(const Layer& x, int element) {
  // Batched products assume vectors of 16 bytes without looking at the pointers.
  const int vector = 16 / element;
  const auto starts_on_vector = [](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0;
  };
  return x.r >= kWideRank && x.r % vector == 0 && (x.block_row == 1 || x.block_column == 1) &&
         block_stride(x) % vector == 0 && x.read_row % vector == 0 && x.write_row % vector == 0 &&
         starts_on_vector(x.block) && starts_on_vector(x.read) && starts_on_vector(x.write);
}

void project_wide(const std::vector<Layer>& layers, const at::TensorOptions& options,
                  std::vector<at::Tensor>& kept) {
  std::map<decltype(shape_of(layers[0])), std::vector<Layer>> batches;
  int64_t elements = 0;
  for (const Layer& x : layers) {
    batches[shape_of(x)].push_back(x);
    elements += int64_t(x.k) * x.r;
  }
  const at::Tensor coordinates = at::empty({elements}, options);
  const at::Tensor table =
      at::empty({int64_t(5 * layers.size() * sizeof(void*))}, options.dtype(at::kByte));
  kept.insert(kept.end(), {coordinates, table});

  std::vector<const void*> pointers;
  const auto* next = static_cast<const char*>(coordinates.const_data_ptr());
  for (const auto& [shape, batch] : batches) {
    for (const Layer& x : batch) pointers.push_back(x.block);
    for (const Layer& x : batch) pointers.push_back(x.read);
    for (const Layer& x : batch) {
      pointers.push_back(next);
      next += int64_t(x.k) * x.r * coordinates.element_size();
    }
    for (const Layer& x : batch) pointers.push_back(x.write);
    for (const Layer& x : batch) pointers.push_back(x.out);
  }
  auto** device = static_cast<const void**>(table.mutable_data_ptr());
  C10_CUDA_CHECK(upload_pointers(pointers, device, c10::cuda::getCurrentCUDAStream()));

  // Float32 products stay float32, whatever PyTorch was told about its own.
  const at::NoTF32Guard full_precision;
  const cublasHandle_t handle = at::cuda::getCurrentCUDABlasHandle();
  const cudaDataType_t type = coordinates.scalar_type() == at::kFloat ? CUDA_R_32F : CUDA_R_16BF;
  const float one = 1.0f, zero = 0.0f;
  for (const auto& [shape, batch] : batches) {
    const Layer& x = batch[0];
    const auto count = int(batch.size());
    // A row-major product is the column-major product of the transposes in the other order:
    // C^T = B^T Q, then out^T = C^T P^T.
    LORAX_CUBLAS_CHECK(cublasGemmBatchedEx(handle, is_transposed(x) ? CUBLAS_OP_T : CUBLAS_OP_N,
                                           CUBLAS_OP_T, x.r, x.k, x.m, &one, device, type,
                                           block_stride(x), device + count, type, x.read_row, &zero,
                                           const_cast<void**>(device + 2 * count), type, x.r, count,
                                           CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    LORAX_CUBLAS_CHECK(cublasGemmBatchedEx(
        handle, CUBLAS_OP_N, CUBLAS_OP_N, x.r, x.p, x.k, &one, device + 2 * count, type, x.r,
        device + 3 * count, type, x.write_row, &zero, const_cast<void**>(device + 4 * count), type,
        x.r, count, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    device += 5 * count;
  }
}

}  // namespace lorax
