// SPDX-License-Identifier: Apache-2.0
// Writes pointers to device memory from a kernel's parameters: no pinned buffer to keep alive, and
// a captured graph holds its own copy. No torch header.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

namespace lorax {

constexpr int kUploadPointers = 4080;
struct PointerUpload {
  const void** target;
  int count;
  const void* pointer[kUploadPointers];
};
static_assert(sizeof(PointerUpload) <= 32764, "a kernel's parameters end at 32764 bytes");

__global__ void upload_pointers_kernel(const __grid_constant__ PointerUpload upload) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < upload.count) upload.target[i] = upload.pointer[i];
}

inline cudaError_t upload_pointers(const std::vector<const void*>& pointers, const void** target,
                                   cudaStream_t stream) {
  constexpr int kThreads = 256;
  PointerUpload upload;
  for (size_t first = 0; first < pointers.size(); first += kUploadPointers) {
    upload.target = target + first;
    upload.count = int(std::min(pointers.size() - first, size_t(kUploadPointers)));
    std::copy_n(pointers.begin() + first, upload.count, upload.pointer);
    void* arguments[] = {&upload};
    const dim3 blocks((upload.count + kThreads - 1) / kThreads);
    const cudaError_t error =
        cudaLaunchKernel(upload_pointers_kernel, blocks, dim3(kThreads), arguments, 0, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace lorax
