// SPDX-License-Identifier: Apache-2.0
// Plans the items of a list of layers and launches them.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "project_kernel.cuh"

namespace lorax::projection {

enum class Dtype { kBFloat16, kFloat16, kFloat32 };

// Device memory of this many bytes, aligned to 16, that lives until the stream has passed the
// launch, or null.
using Allocate = std::function<void*(size_t)>;

// How work is cut and ordered; measured on an H200, see docs/kernels/project.md.
struct Tuning {
  int item_bytes = 128 * 1024;  // of a basis in one item
  // Items between the last of a layer that reads and its first that writes, in 1/100 of the items
  // in flight. Negative: all reading items come first.
  int lag = 125;
};

struct Size {
  int64_t partials = 0, coordinates = 0, counters = 0, items = 0;
};

// Sets the derived fields of the layers. resident: blocks in flight.
template <typename Read, typename Write, int kTiles>
Size plan(std::vector<Layer>& layers, int resident, const Tuning& tuning) {
  int64_t bytes = 0;
  for (const Layer& x : layers) {
    bytes += int64_t(x.k) * groups(x, kTiles) *
             (int64_t(x.m) * sizeof(Read) + int64_t(x.p) * sizeof(Write));
  }
  // Little work is cut small enough to keep every block busy a few times.
  const int64_t item_bytes = std::clamp<int64_t>(
      bytes / (4 * resident), std::min(16 * 1024, tuning.item_bytes), tuning.item_bytes);
  auto rows = [&](int width, int size, int tile) {
    const int fair = int(std::min<int64_t>(item_bytes / (int64_t(width) * size), 1 << 20));
    return std::max(1, (fair + tile / 2) / tile) * tile;
  };
  Size size;
  for (Layer& x : layers) {
    x.read_width = panel_width(x.k, kReadWidest<Read>);
    x.write_width = panel_width(x.k, kWriteWidest<Write>);
    x.chunk_rows = rows(x.read_width, sizeof(Read), kReadRows);
    x.slab_rows = rows(x.k, sizeof(Write), kWriteRows);
    x.first_partial = int(size.partials);
    x.first_coordinate = int(size.coordinates);
    x.first_counter = int(size.counters);
    const int64_t tiles = int64_t(basis_tiles(x)) * block_tiles(x);
    size.partials += chunks(x) * 2 * tiles;
    size.coordinates += tiles;
    size.counters += read_panels(x) * groups(x, kTiles);
  }
  const int64_t lag = tuning.lag < 0 ? INT64_MAX : int64_t(resident) * tuning.lag / 100;
  size_t next = 0;
  std::vector<int64_t> read_end(layers.size());
  auto write_next = [&] {
    Layer& x = layers[next++];
    x.first_write = int(size.items);
    size.items += int64_t(slabs(x)) * groups(x, kTiles);
  };
  for (size_t i = 0; i < layers.size(); ++i) {
    Layer& x = layers[i];
    x.first_read = int(size.items);
    size.items += int64_t(chunks(x)) * read_panels(x) * groups(x, kTiles);
    read_end[i] = size.items;
    while (next <= i && size.items - read_end[next] >= lag) write_next();
  }
  while (next < layers.size()) write_next();
  return size;
}

// Cuts one allocation into the table and the workspaces of a launch.
template <int kParts>
bool allocate_table(Table& table, Upload& upload, int count, const Size& size,
                    const Allocate& allocate) {
  size_t end = 0;
  auto take = [&](int64_t bytes) {
    const size_t begin = end;
    end += size_t(bytes + 15) / 16 * 16;
    return begin;
  };
  const size_t partials = take(size.partials * kWarp * sizeof(float4));
  const size_t coordinates = take(size.coordinates * kParts * kWarp * sizeof(uint4));
  const size_t layers = take(count * sizeof(Layer));
  const size_t owners = take(size.items * sizeof(int));
  const size_t counters = take((1 + count + size.counters) * sizeof(int));
  char* base = static_cast<char*>(allocate(end));
  if (base == nullptr) return false;
  table.partials = reinterpret_cast<float4*>(base + partials);
  table.coordinates = reinterpret_cast<uint4*>(base + coordinates);
  table.layers = upload.layers = reinterpret_cast<Layer*>(base + layers);
  table.owners = upload.owners = reinterpret_cast<int*>(base + owners);
  table.counters = upload.counters = reinterpret_cast<int*>(base + counters);
  table.items = int(size.items);
  upload.total = count;
  return true;
}

template <typename Read, typename Write, typename Block, int kTiles>
cudaError_t launch_group(std::vector<Layer>& layers, const Tuning& tuning, const Allocate& allocate,
                         cudaStream_t stream) {
  constexpr int kBytes = Ring<Read, Write, Block, kTiles>::kBytes;
  const auto kernel = project_kernel<Read, Write, Block, kTiles>;
  int device = 0, processors = 0, each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, kBytes);
  }
  if (error != cudaSuccess) return error;
  if (each == 0) return cudaErrorLaunchOutOfResources;
  const int resident = each * processors;
  const Size size = plan<Read, Write, kTiles>(layers, resident, tuning);
  if (size.items > INT32_MAX || size.partials > INT32_MAX) return cudaErrorInvalidValue;
  Table table;
  Upload upload;
  int count = int(layers.size());
  if (!allocate_table<Precision<Read, Block>::kCoordinates>(table, upload, count, size, allocate)) {
    return cudaErrorMemoryAllocation;
  }
  for (upload.first = 0; upload.first < count; upload.first += kUploadLayers) {
    const int some = std::min(kUploadLayers, count - upload.first);
    std::copy_n(layers.begin() + upload.first, some, upload.layer);
    void* arguments[] = {&upload};
    error = cudaLaunchKernel(project_upload_kernel<kTiles>, dim3(some), dim3(kThreads), arguments,
                             0, stream);
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {&table, &count};
  return cudaLaunchKernel(kernel, dim3(std::min(resident, table.items)), dim3(kThreads), arguments,
                          kBytes, stream);
}

template <typename Read, typename Write, typename Block>
cudaError_t launch_typed(const std::vector<Layer>& layers, const Tuning& tuning,
                         const Allocate& allocate, cudaStream_t stream) {
  std::vector<Layer> narrow, wide;
  for (const Layer& x : layers) (x.r <= 16 ? narrow : wide).push_back(x);
  cudaError_t error = cudaSuccess;
  if (!narrow.empty()) {
    error = launch_group<Read, Write, Block, 1>(narrow, tuning, allocate, stream);
  }
  if (!wide.empty() && error == cudaSuccess) {
    error = launch_group<Read, Write, Block, 2>(wide, tuning, allocate, stream);
  }
  return error;
}

// Launches out_i = P_i (Q_i^T B_i) for layers of one combination of dtypes. The caller sets the
// pointers, strides and sizes of each layer, all sizes at least 1. Bases: kBFloat16 or kFloat32.
inline cudaError_t launch_project(const std::vector<Layer>& layers, Dtype read, Dtype write,
                                  Dtype block, const Allocate& allocate, cudaStream_t stream,
                                  const Tuning& tuning = {}) {
  auto with_block = [&](auto read_type, auto write_type) {
    using Read = decltype(read_type);
    using Write = decltype(write_type);
    switch (block) {
      case Dtype::kBFloat16:
        return launch_typed<Read, Write, bf16>(layers, tuning, allocate, stream);
      case Dtype::kFloat16:
        return launch_typed<Read, Write, __half>(layers, tuning, allocate, stream);
      default:
        return launch_typed<Read, Write, float>(layers, tuning, allocate, stream);
    }
  };
  const bool reads_full = read == Dtype::kFloat32, writes_full = write == Dtype::kFloat32;
  if (reads_full && writes_full) return with_block(float{}, float{});
  if (reads_full) return with_block(float{}, bf16{});
  if (writes_full) return with_block(bf16{}, float{});
  return with_block(bf16{}, bf16{});
}

}  // namespace lorax::projection
