// SPDX-License-Identifier: Apache-2.0
// P_i (Q_i^T B_i) for lists of blocks and bases: sorts the layers by dtype, fills the launch table
// and hands over to kernels/project_launch.cuh.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>
#include <map>
#include <tuple>
#include <vector>

#include "kernels/project_launch.cuh"
#include "ops.h"

namespace lorax {
namespace {

using projection::Dtype;
using projection::Layer;

bool fits_int(int64_t x) { return x <= std::numeric_limits<int>::max(); }

// The kernels read bases of bfloat16 and float32 by rows; anything else is converted first.
at::Tensor readable_basis(const at::Tensor& basis) {
  const auto type = basis.scalar_type();
  const bool is_known = type == at::kBFloat16 || type == at::kFloat;
  const at::Tensor x = is_known ? basis : basis.to(at::kFloat);
  const bool has_rows = (x.stride(1) == 1 || x.size(1) == 1) && fits_int(x.stride(0));
  return has_rows ? x : x.contiguous();
}

at::Tensor readable_block(const at::Tensor& block) {
  const at::Tensor x = block.scalar_type() == at::kDouble ? block.to(at::kFloat) : block;
  return fits_int(x.stride(0)) && fits_int(x.stride(1)) ? x : x.contiguous();
}

Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kFloat:
      return Dtype::kFloat32;
    default:
      TORCH_CHECK_TYPE(false, "project takes floating point numbers of 16 to 64 bits, got ",
                       x.scalar_type());
  }
}

}  // namespace

std::vector<at::Tensor> project(at::TensorList blocks, at::TensorList read, at::TensorList write) {
  TORCH_CHECK_VALUE(blocks.size() == read.size() && blocks.size() == write.size(),
                    "blocks, read and write bases must be lists of one length, got ", blocks.size(),
                    ", ", read.size(), " and ", write.size());
  std::vector<at::Tensor> results;
  if (blocks.empty()) return results;
  const c10::cuda::CUDAGuard guard(blocks[0].device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  std::vector<at::Tensor> kept;  // conversions and workspaces, until the launches are queued
  std::map<std::tuple<Dtype, Dtype, Dtype>, std::vector<Layer>> groups;
  results.reserve(blocks.size());
  for (size_t i = 0; i < blocks.size(); ++i) {
    TORCH_CHECK_VALUE(blocks[i].dim() == 2 && read[i].dim() == 2 && write[i].dim() == 2 &&
                          blocks[i].size(0) == read[i].size(0) &&
                          read[i].size(1) == write[i].size(1),
                      "entry ", i, ": a block (m, r) needs bases (m, k) and (p, k), got ",
                      blocks[i].sizes(), ", ", read[i].sizes(), " and ", write[i].sizes());
    TORCH_CHECK_VALUE(blocks[i].device() == blocks[0].device() &&
                          read[i].device() == blocks[0].device() &&
                          write[i].device() == blocks[0].device(),
                      "entry ", i, ": all layers must be on ", blocks[0].device());
    const at::Tensor B = readable_block(blocks[i]);
    const at::Tensor Q = readable_basis(read[i]);
    const at::Tensor P = write[i].is_same(read[i]) ? Q : readable_basis(write[i]);
    at::Tensor out = at::empty({P.size(0), B.size(1)}, B.options());
    results.push_back(out);
    if (!B.is_same(blocks[i])) kept.push_back(B);
    if (!Q.is_same(read[i])) kept.push_back(Q);
    if (!P.is_same(write[i])) kept.push_back(P);
    if (out.numel() == 0) continue;
    if (B.size(0) == 0 || Q.size(1) == 0) {
      out.zero_();
      continue;
    }
    TORCH_CHECK_VALUE(
        fits_int(B.size(0)) && fits_int(P.size(0)) && fits_int(Q.size(1)) && fits_int(B.size(1)),
        "entry ", i, ": sizes must be under 2^31");
    Layer layer{};
    layer.block = B.const_data_ptr();
    layer.read = Q.const_data_ptr();
    layer.write = P.const_data_ptr();
    layer.out = out.mutable_data_ptr();
    layer.block_row = int(B.stride(0));
    layer.block_column = int(B.stride(1));
    layer.read_row = int(Q.stride(0));
    layer.write_row = int(P.stride(0));
    layer.m = int(B.size(0));
    layer.p = int(P.size(0));
    layer.k = int(Q.size(1));
    layer.r = int(B.size(1));
    groups[{dtype_of(Q), dtype_of(P), dtype_of(B)}].push_back(layer);
  }
  const auto allocate = [&](size_t bytes) -> void* {
    kept.push_back(at::empty({int64_t(bytes)}, blocks[0].options().dtype(at::kByte)));
    return kept.back().mutable_data_ptr();
  };
  for (const auto& [types, layers] : groups) {
    const auto [reads, writes, factors] = types;
    C10_CUDA_CHECK(projection::launch_project(layers, reads, writes, factors,
                                              projection::Method::kAuto, allocate, stream));
  }
  for (size_t i = 0; i < results.size(); ++i) {
    if (blocks[i].scalar_type() == at::kDouble) results[i] = results[i].to(at::kDouble);
  }
  return results;
}

}  // namespace lorax
