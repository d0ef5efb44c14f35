// SPDX-License-Identifier: Apache-2.0
// Weights scaled by powers of two and stacked as float16, and their largest magnitudes.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "checks.h"
#include "kernels/stack.cuh"
#include "ops.h"

namespace lorax {
namespace {

// Matrices that do not lie row after row are copied first, in scratch of about this size.
constexpr int64_t kScratchBytes = int64_t{256} << 20;

}  // namespace

std::tuple<at::Tensor, at::Tensor> stack_halves(at::TensorList matrices,
                                                at::IntArrayRef exponents) {
  TORCH_CHECK_VALUE(!matrices.empty() && matrices.size() == exponents.size(),
                    "there must be a matrix, and an exponent for each, got ", matrices.size(),
                    " and ", exponents.size());
  const at::Tensor& first = matrices[0];
  const auto type = first.scalar_type();
  TORCH_CHECK_TYPE(type == at::kHalf || type == at::kBFloat16,
                   "matrices must be bfloat16 or float16, got ", type);
  const c10::cuda::CUDAGuard guard(first.device());
  for (size_t i = 0; i < matrices.size(); ++i) {
    const at::Tensor& M = matrices[i];
    TORCH_CHECK_VALUE(M.dim() == 2 && M.sizes() == first.sizes() && M.device() == first.device(),
                      "matrices must be of one shape on one device, got ", M.sizes(), " beside ",
                      first.sizes());
    TORCH_CHECK_TYPE(M.scalar_type() == type, "matrices must be of one dtype, got ",
                     M.scalar_type(), " beside ", type);
    TORCH_CHECK_VALUE(exponents[i] >= -200 && exponents[i] <= 200,
                      "exponents must be from -200 to 200, got ", exponents[i]);
  }
  at::Tensor stacked =
      at::empty({static_cast<int64_t>(matrices.size()), first.size(0), first.size(1)},
                first.options().dtype(at::kHalf).memory_format(at::MemoryFormat::Contiguous));
  at::Tensor largest = at::zeros({stacked.size(0)}, first.options().dtype(at::kFloat));
  if (stacked.numel() == 0) return {stacked, largest};
  auto* to = reinterpret_cast<__half*>(stacked.mutable_data_ptr<at::Half>());
  auto* bits = reinterpret_cast<uint32_t*>(largest.mutable_data_ptr<float>());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto launch =
      type == at::kHalf ? launch_stack_halves<__half> : launch_stack_halves<__nv_bfloat16>;
  std::vector<at::Tensor> copies;
  std::vector<StackEntry> entries;
  int64_t copied = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const at::Tensor M = matrices[i].contiguous();
    if (!M.is_same(matrices[i])) {
      copies.push_back(M);
      copied += static_cast<int64_t>(M.nbytes());
    }
    const int exponent = static_cast<int>(exponents[i]), half = exponent / 2;
    entries.push_back(
        {M.const_data_ptr(), std::ldexp(1.f, half), std::ldexp(1.f, exponent - half)});
    if (copied < kScratchBytes && i + 1 < matrices.size()) continue;
    C10_CUDA_CHECK(launch(entries, to, bits, first.numel(), stream));
    to += static_cast<int64_t>(entries.size()) * first.numel();
    bits += entries.size();
    // Their memory goes back to a stream-ordered allocator while the launch is queued.
    entries.clear();
    copies.clear();
    copied = 0;
  }
  return {stacked, largest};
}

}  // namespace lorax
