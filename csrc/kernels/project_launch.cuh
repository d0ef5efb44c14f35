// SPDX-License-Identifier: Apache-2.0
// Chooses the kernels for a list of layers and launches them.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "project_fused.cuh"
#include "project_two_pass.cuh"

namespace lorax::projection {

enum class Dtype { kBFloat16, kFloat16, kFloat32 };
enum class Method { kAuto, kTwoPass, kFused };

// Device memory of this many bytes that lives until the stream has passed the launch, or null.
using Allocate = std::function<void*(size_t)>;

struct Device {
  int processors, shared_per_processor, shared_per_block;
};

inline cudaError_t query_device(Device& device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  auto get = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, index);
  };
  get(device.processors, cudaDevAttrMultiProcessorCount);
  get(device.shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  get(device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return error;
}

template <typename Kernel>
cudaError_t launch(Kernel kernel, int blocks, int shared_bytes, cudaStream_t stream,
                   const Table& table) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {const_cast<Table*>(&table)};
  return cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), arguments, shared_bytes, stream);
}

// Cuts one allocation into the workspaces of a table.
template <int kParts>
cudaError_t allocate_workspace(Table& table, int64_t partials, const Allocate& allocate) {
  const int64_t partial_bytes = partials * kWarp * sizeof(float4);
  const int64_t coordinate_bytes = int64_t(table.tiles) * kParts * kWarp * sizeof(uint4);
  const int64_t counter_bytes = int64_t(1 + 2 * table.count) * sizeof(int);
  char* base = static_cast<char*>(allocate(partial_bytes + coordinate_bytes + counter_bytes));
  if (base == nullptr) return cudaErrorMemoryAllocation;
  table.partials = reinterpret_cast<float4*>(base);
  table.coordinates = reinterpret_cast<uint4*>(base + partial_bytes);
  table.counters = reinterpret_cast<int*>(base + partial_bytes + coordinate_bytes);
  return cudaSuccess;
}

template <typename Read, typename Write, typename Block, int kTiles>
cudaError_t launch_two_pass(Table& table, const Device& device, const Allocate& allocate,
                            cudaStream_t stream) {
  constexpr int kRead = kWidest<Read, kTiles>, kWrite = kWidest<Write, kTiles>;
  constexpr int kParts = Precision<Read, Block>::kCoordinates;
  const int64_t partials = plan_two_pass(table, kRead, kTiles, device.processors);
  int read_width = 0, write_width = 0;
  for (int i = 0; i < table.count; ++i) {
    read_width = std::max(read_width, panel_width(table.layer[i], kRead));
    write_width = std::max(write_width, panel_width(table.layer[i], kWrite));
  }
  cudaError_t error = allocate_workspace<kParts>(table, partials, allocate);
  if (error == cudaSuccess) {
    error = launch(project_read_kernel<Read, Block, kTiles>, table.reads,
                   read_shared_bytes<Read, Block, kTiles>(read_width), stream, table);
  }
  if (error == cudaSuccess) {
    error = launch(project_sum_kernel<kParts>, ceil_div(table.tiles, kWarps), 0, stream, table);
  }
  if (error == cudaSuccess) {
    error = launch(project_write_kernel<Write, Block, kTiles>, table.writes,
                   write_shared_bytes<Write, Block, kTiles>(write_width), stream, table);
  }
  return error;
}

// `was_launched` is false where the layers do not fit the kernel's conditions.
template <typename Block, int kTiles>
cudaError_t launch_fused(Table& table, const Device& device, const Allocate& allocate,
                         cudaStream_t stream, bool& was_launched, int blocks_per_processor = 2) {
  constexpr int kParts = Precision<bf16, Block>::kCoordinates;
  constexpr int kReservedBytes = 1024;  // of each block, by the system
  was_launched = false;
  const int bytes = std::min(device.shared_per_processor / blocks_per_processor - kReservedBytes,
                             device.shared_per_block);
  auto kernel = project_fused_kernel<Block, kTiles>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_processor, kernel, kThreads,
                                                          bytes);
  }
  if (error != cudaSuccess) return error;
  const int resident = blocks_per_processor * device.processors;
  const int64_t partials = plan_fused<Block, kTiles>(table, bytes, resident);
  if (partials < 0) return cudaSuccess;
  was_launched = true;
  error = allocate_workspace<kParts>(table, partials, allocate);
  if (error == cudaSuccess) {
    error = cudaMemsetAsync(table.counters, 0, (1 + 2 * table.count) * sizeof(int), stream);
  }
  if (error == cudaSuccess) {
    error = launch(kernel, std::min(resident, table.reads), bytes, stream, table);
  }
  return error;
}

inline bool can_fuse(const Layer& x) {
  return x.read == x.write && x.read_row == x.write_row && x.m == x.p && x.k <= kFusedWidest &&
         x.r <= 32 && reinterpret_cast<uintptr_t>(x.read) % 16 == 0 && x.read_row % 8 == 0;
}

template <typename Read, typename Write, typename Block, int kTiles>
cudaError_t launch_group(const std::vector<Layer>& layers, Method method, const Device& device,
                         const Allocate& allocate, cudaStream_t stream) {
  // Launches of equal size: a short last one would leave the device idle for its tail.
  const int launches = ceil_div(int(layers.size()), kMaxLayers);
  const int each = ceil_div(int(layers.size()), launches);
  for (size_t first = 0; first < layers.size(); first += each) {
    Table table;
    table.count = int(std::min(layers.size() - first, size_t(each)));
    std::copy_n(layers.begin() + first, table.count, table.layer);
    bool is_done = false;
    cudaError_t error = cudaSuccess;
    if constexpr (sizeof(Read) == 2 && sizeof(Write) == 2 && kTiles <= 2) {
      if (method != Method::kTwoPass && can_fuse(table.layer[0])) {
        error = launch_fused<Block, kTiles>(table, device, allocate, stream, is_done);
      }
    }
    if (error == cudaSuccess && !is_done) {
      if (method == Method::kFused) return cudaErrorNotSupported;
      error = launch_two_pass<Read, Write, Block, kTiles>(table, device, allocate, stream);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename Read, typename Write, typename Block>
cudaError_t launch_typed(const std::vector<Layer>& layers, Method method, const Allocate& allocate,
                         cudaStream_t stream) {
  Device device;
  cudaError_t error = query_device(device);
  // Layers of one launch share the width of their tiles and whether they can be fused.
  for (int tiles : {1, 2, 4}) {
    for (bool fuse : {true, false}) {
      std::vector<Layer> group;
      for (const Layer& x : layers) {
        const int own = x.r <= 16 ? 1 : x.r <= 32 ? 2 : 4;
        if (own == tiles && can_fuse(x) == fuse) group.push_back(x);
      }
      if (group.empty() || error != cudaSuccess) continue;
      auto run = tiles == 1   ? launch_group<Read, Write, Block, 1>
                 : tiles == 2 ? launch_group<Read, Write, Block, 2>
                              : launch_group<Read, Write, Block, 4>;
      error = run(group, method, device, allocate, stream);
    }
  }
  return error;
}

// Launches out_i = P_i (Q_i^T B_i) for layers of one combination of dtypes. The caller sets the
// pointers, strides and sizes of each layer, all sizes at least 1. Bases: kBFloat16 or kFloat32.
inline cudaError_t launch_project(const std::vector<Layer>& layers, Dtype read, Dtype write,
                                  Dtype block, Method method, const Allocate& allocate,
                                  cudaStream_t stream) {
  auto with_block = [&](auto read_type, auto write_type) {
    using Read = decltype(read_type);
    using Write = decltype(write_type);
    switch (block) {
      case Dtype::kBFloat16:
        return launch_typed<Read, Write, bf16>(layers, method, allocate, stream);
      case Dtype::kFloat16:
        return launch_typed<Read, Write, __half>(layers, method, allocate, stream);
      default:
        return launch_typed<Read, Write, float>(layers, method, allocate, stream);
    }
  };
  const bool reads_full = read == Dtype::kFloat32, writes_full = write == Dtype::kFloat32;
  if (reads_full && writes_full) return with_block(float{}, float{});
  if (reads_full) return with_block(float{}, bf16{});
  if (writes_full) return with_block(bf16{}, float{});
  return with_block(bf16{}, bf16{});
}

}  // namespace lorax::projection
