// SPDX-License-Identifier: Apache-2.0
// P_i (Q_i^T B_i) for lists of blocks and bases: one pass over the tensors that checks them and
// fills the tables, then one launch for each combination of dtypes, or cuBLAS for wide blocks.
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
#include "project_wide.h"

namespace lorax {
namespace {

using projection::Dtype;
using projection::Layer;

bool fits_int(int64_t x) { return x <= std::numeric_limits<int>::max(); }

// The kernels read bases of bfloat16 and float32 by rows; anything else is converted first.
bool is_readable_basis(const at::Tensor& x) {
  return (x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat) &&
         (x.stride(1) == 1 || x.size(1) == 1) && fits_int(x.stride(0));
}

at::Tensor readable_basis(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 ? x.contiguous() : x.to(at::kFloat).contiguous();
}

bool is_readable_block(const at::Tensor& x) {
  return x.scalar_type() != at::kDouble && fits_int(x.stride(0)) && fits_int(x.stride(1));
}

at::Tensor readable_block(const at::Tensor& x) {
  return (x.scalar_type() == at::kDouble ? x.to(at::kFloat) : x).contiguous();
}

Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      return Dtype::kFloat32;
  }
}

bool is_float(const at::Tensor& x) {
  const auto type = x.scalar_type();
  return type == at::kBFloat16 || type == at::kHalf || type == at::kFloat || type == at::kDouble;
}

void check_entry(size_t i, const at::Tensor& B, const at::Tensor& Q, const at::Tensor& P,
                 c10::Device device) {
  TORCH_CHECK_VALUE(B.dim() == 2 && Q.dim() == 2 && P.dim() == 2, "entry ", i,
                    ": block and bases must be matrices, got shapes ", B.sizes(), ", ", Q.sizes(),
                    " and ", P.sizes());
  TORCH_CHECK_TYPE(is_float(B) && is_float(Q) && is_float(P), "entry ", i,
                   ": block and bases must be floating point of 16 to 64 bits, got ",
                   B.scalar_type(), ", ", Q.scalar_type(), " and ", P.scalar_type());
  TORCH_CHECK_VALUE(B.size(0) == Q.size(0), "entry ", i,
                    ": rows of the block and of its read basis must agree, got ", B.size(0),
                    " and ", Q.size(0));
  TORCH_CHECK_VALUE(Q.size(1) == P.size(1), "entry ", i,
                    ": ranks of the two bases must agree, got ", Q.size(1), " and ", P.size(1));
  TORCH_CHECK_VALUE(B.device() == device && Q.device() == device && P.device() == device, "entry ",
                    i, ": block and bases must be on ", device, " as the first block, got ",
                    B.device(), ", ", Q.device(), " and ", P.device());
  TORCH_CHECK_VALUE(
      fits_int(B.size(0)) && fits_int(P.size(0)) && fits_int(Q.size(1)) && fits_int(B.size(1)),
      "entry ", i, ": sizes must be under 2^31");
}

// The results of one dtype, in one allocation; each starts on a multiple of 16 bytes.
struct Results {
  at::Tensor memory;
  int64_t elements = 0;

  int64_t reserve(int64_t count, int64_t vector) {
    const int64_t start = elements;
    elements += (count + vector - 1) / vector * vector;
    return start;
  }
  // Made after the launches, so that the device works meanwhile; built by hand, because a view
  // through the dispatcher takes ten times as long.
  at::Tensor view(int64_t start, int64_t rows, int64_t columns) const {
    auto impl = c10::make_intrusive<at::TensorImpl>(c10::Storage(memory.storage()),
                                                    memory.key_set(), memory.dtype());
    impl->set_storage_offset(start);
    impl->set_sizes_contiguous({rows, columns});
    return at::Tensor(std::move(impl));
  }
};

}  // namespace

std::vector<at::Tensor> project(at::TensorList blocks, at::TensorList read, at::TensorList write) {
  TORCH_CHECK_VALUE(blocks.size() == read.size() && blocks.size() == write.size(),
                    "blocks, read and write bases must be lists of one length, got ", blocks.size(),
                    ", ", read.size(), " and ", write.size());
  if (blocks.empty()) return {};
  const size_t count = blocks.size();
  const c10::Device device = blocks[0].device();
  const c10::cuda::CUDAGuard guard(device);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  std::vector<at::Tensor> kept;  // conversions and workspaces, until the launches are queued
  std::map<at::ScalarType, Results> memory;  // by the dtype that a kernel writes
  std::vector<int64_t> start(count);
  for (size_t i = 0; i < count; ++i) {
    check_entry(i, blocks[i], read[i], write[i], device);
    const auto type = blocks[i].scalar_type() == at::kDouble ? at::kFloat : blocks[i].scalar_type();
    start[i] = memory[type].reserve(write[i].size(0) * blocks[i].size(1),
                                    16 / int64_t(c10::elementSize(type)));
  }
  for (auto& [type, results] : memory) {
    results.memory = at::empty({results.elements}, blocks[0].options().dtype(type));
  }

  std::map<std::tuple<at::ScalarType, at::ScalarType, at::ScalarType>, std::vector<Layer>> groups;
  std::map<at::ScalarType, std::vector<Layer>> wide;
  for (size_t i = 0; i < count; ++i) {
    const auto readable = [&](const at::Tensor& x, bool is_readable, auto convert) {
      if (is_readable) return &x;
      kept.push_back(convert(x));
      return const_cast<const at::Tensor*>(&kept.back());
    };
    // Conversions are held by value: `kept` may move when it grows.
    const at::Tensor B = *readable(blocks[i], is_readable_block(blocks[i]), readable_block);
    const at::Tensor Q = *readable(read[i], is_readable_basis(read[i]), readable_basis);
    const at::Tensor P = write[i].is_same(read[i])
                             ? Q
                             : *readable(write[i], is_readable_basis(write[i]), readable_basis);
    const auto type = B.scalar_type();
    const at::Tensor& results = memory[type].memory;
    char* out = static_cast<char*>(results.mutable_data_ptr()) + start[i] * results.element_size();
    if (B.size(1) == 0 || P.size(0) == 0) continue;
    if (B.size(0) == 0 || Q.size(1) == 0) {
      const int64_t bytes = P.size(0) * B.size(1) * results.element_size();
      C10_CUDA_CHECK(cudaMemsetAsync(out, 0, bytes, stream));
      continue;
    }
    Layer layer{};
    layer.block = B.const_data_ptr();
    layer.read = Q.const_data_ptr();
    layer.write = P.const_data_ptr();
    layer.out = out;
    layer.block_row = int(B.stride(0));
    layer.block_column = int(B.stride(1));
    layer.read_row = int(Q.stride(0));
    layer.write_row = int(P.stride(0));
    layer.m = int(B.size(0));
    layer.p = int(P.size(0));
    layer.k = int(Q.size(1));
    layer.r = int(B.size(1));
    const bool is_uniform = Q.scalar_type() == type && P.scalar_type() == type;
    if (is_uniform && is_wide(layer, int(B.element_size()))) {
      wide[type].push_back(layer);
    } else {
      groups[{Q.scalar_type(), P.scalar_type(), type}].push_back(layer);
    }
  }
  const auto allocate = [&](size_t bytes) -> void* {
    kept.push_back(at::empty({int64_t(bytes)}, blocks[0].options().dtype(at::kByte)));
    return kept.back().mutable_data_ptr();
  };
  for (const auto& [types, layers] : groups) {
    const auto [reads, writes, factors] = types;
    C10_CUDA_CHECK(projection::launch_project(layers, dtype_of(reads), dtype_of(writes),
                                              dtype_of(factors), allocate, stream));
  }
  for (const auto& [type, layers] : wide) {
    project_wide(layers, blocks[0].options().dtype(type), kept);
  }

  std::vector<at::Tensor> outputs;
  outputs.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const bool is_double = blocks[i].scalar_type() == at::kDouble;
    const auto type = is_double ? at::kFloat : blocks[i].scalar_type();
    at::Tensor out = memory[type].view(start[i], write[i].size(0), blocks[i].size(1));
    outputs.push_back(is_double ? out.to(at::kDouble) : std::move(out));
  }
  return outputs;
}

}  // namespace lorax
