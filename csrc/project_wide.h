// SPDX-License-Identifier: Apache-2.0
// The projection of wide blocks, which is arithmetic rather than memory traffic. Torch-facing.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "kernels/project_table.cuh"

namespace lorax {

// Columns of a block from which cuBLAS takes over: at 16 it took 0.83 ms, the kernel 1.43.
constexpr int kWideRank = 8;

// Whether `project_wide` takes this layer, whose block and bases have one dtype of `element` bytes.
bool is_wide(const projection::Layer& x, int element);

// out_i = P_i (Q_i^T B_i) on the current stream, all of dtype `type`, bfloat16 or float32. The
// coordinates between the two products are rounded to that dtype, as in PyTorch's own two products.
// Memory that must outlive the call's launches is added to `kept`.
void project_wide(const std::vector<projection::Layer>& layers, const at::TensorOptions& options,
                  std::vector<at::Tensor>& kept);

}  // namespace lorax
