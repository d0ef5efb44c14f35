// SPDX-License-Identifier: Apache-2.0
// Times the projection's kernels one by one on a Llama-2-7B-shaped model, without torch:
//   nvcc -std=c++17 -O3 -I csrc/kernels -gencode=arch=compute_90a,code=sm_90a
//        benchmarks/kernels/project_variants.cu -o /tmp/project_variants && /tmp/project_variants
// Bytes: 448 bases of 4096 or 11008 rows, 2.5 M rows x 320 bfloat16 = 1.60 GB, and as much again
// where a variant reads them twice; blocks and results 0.16 GB.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "project_launch.cuh"

using namespace lorax::projection;

namespace {

constexpr int kRank = 320;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

__global__ void fill_kernel(bf16* x, size_t n, float scale) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n;
       i += size_t(gridDim.x) * blockDim.x) {
    uint32_t hash = uint32_t(i * 2654435761u) ^ uint32_t(i >> 32);
    hash = (hash ^ hash >> 15) * 2246822519u;
    x[i] = __float2bfloat16(scale * (float((hash ^ hash >> 13) >> 8) / float(1 << 23) - 1.0f));
  }
}

char* device_bytes(size_t bytes) {
  void* pointer;
  check(cudaMalloc(&pointer, bytes), "cudaMalloc");
  return static_cast<char*>(pointer);
}

template <typename Run>
double median_ms(Run run) {
  std::vector<float> times;
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start), "event");
  check(cudaEventCreate(&stop), "event");
  for (int i = 0; i < 13; ++i) {
    check(cudaEventRecord(start), "record");
    run();
    check(cudaEventRecord(stop), "record");
    check(cudaEventSynchronize(stop), "run");
    float ms;
    check(cudaEventElapsedTime(&ms, start, stop), "elapsed");
    if (i >= 3) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  const int r = argc > 1 ? std::atoi(argv[1]) : 16;
  std::vector<int> sizes;
  for (int layer = 0; layer < 32; ++layer) {
    for (int i = 0; i < 4; ++i) sizes.insert(sizes.end(), {4096, 4096});
    for (int i = 0; i < 3; ++i)
      sizes.insert(sizes.end(), {i < 2 ? 11008 : 4096, i < 2 ? 4096 : 11008});
  }
  size_t rows = 0;
  for (int m : sizes) rows += m;
  bf16* bases = reinterpret_cast<bf16*>(device_bytes(rows * kRank * 2));
  bf16* blocks = reinterpret_cast<bf16*>(device_bytes(rows * r * 2));
  bf16* results = reinterpret_cast<bf16*>(device_bytes(rows * r * 2));
  fill_kernel<<<1024, 256>>>(bases, rows * kRank, 0.02f);
  fill_kernel<<<1024, 256>>>(blocks, rows * r, 1.0f);
  std::vector<Layer> layers;
  size_t row = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    Layer x{};
    x.read = x.write = bases + row * kRank;
    x.block = blocks + row * r;
    x.out = results + row * r;
    // Every other block lies transposed, as lora_A does.
    x.block_row = i % 2 ? 1 : r;
    x.block_column = i % 2 ? sizes[i] : 1;
    x.read_row = x.write_row = x.k = kRank;
    x.m = x.p = sizes[i];
    x.r = r;
    layers.push_back(x);
    row += sizes[i];
  }
  Device device;
  check(query_device(device), "device");
  const size_t workspace_bytes = size_t(1) << 31;
  char* workspace = device_bytes(workspace_bytes);
  size_t used = 0;
  const Allocate allocate = [&](size_t bytes) -> void* {
    char* place = workspace + used;
    used += bytes / 256 * 256 + 512;
    return used < workspace_bytes ? place : nullptr;
  };
  const double gigabytes = rows * kRank * 2e-9;
  auto report = [&](const char* name, double ms, double reads) {
    std::printf("%-28s %7.3f ms  %6.2f TB/s of bases\n", name, ms, reads * gigabytes / ms);
  };

  const size_t bytes = rows * kRank * 2 / 2;
  report("copy (read + write)", median_ms([&] {
           check(cudaMemcpyAsync(bases, reinterpret_cast<char*>(bases) + bytes, bytes,
                                 cudaMemcpyDeviceToDevice),
                 "copy");
         }),
         1);
  auto whole = [&](Method method) {
    return median_ms([&] {
      used = 0;
      check(launch_project(layers, Dtype::kBFloat16, Dtype::kBFloat16, Dtype::kBFloat16, method,
                           allocate, nullptr),
            "launch_project");
    });
  };
  report("two passes", whole(Method::kTwoPass), 2);
  std::vector<bf16> expected(rows * r), found(rows * r);
  check(cudaMemcpy(expected.data(), results, rows * r * 2, cudaMemcpyDeviceToHost), "copy");
  if (r > 32) return 0;
  check(cudaMemset(results, 0xff, rows * r * 2), "memset");
  report("fused", whole(Method::kFused), 1);
  check(cudaMemcpy(found.data(), results, rows * r * 2, cudaMemcpyDeviceToHost), "copy");
  double difference = 0, norm = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    const double a = __bfloat162float(expected[i]), b = __bfloat162float(found[i]);
    difference += (a - b) * (a - b), norm += a * a;
  }
  std::printf("fused against two passes: relative difference %.2e\n", std::sqrt(difference / norm));

  for (int start = 0; start < int(layers.size()); start += 224) {
    Table table{};
    table.count = 224;
    std::copy_n(layers.begin() + start, 224, table.layer);
    used = 0;
    const int64_t partials = plan_two_pass(table, kWidest<bf16, 1>, 1, device.processors);
    check(allocate_workspace<2>(table, partials, allocate), "workspace");
    if (r > 16) break;
    const int width = panel_width(table.layer[0], kWidest<bf16, 1>);
    report("half: read pass", median_ms([&] {
             check(launch(project_read_kernel<bf16, bf16, 1>, table.reads,
                          read_shared_bytes<bf16, bf16, 1>(width), nullptr, table),
                   "read");
           }),
           0.5);
    report("half: sum", median_ms([&] {
             check(launch(project_sum_kernel<2>, ceil_div(table.tiles, kWarps), 0, nullptr, table),
                   "sum");
           }),
           0);
    report("half: write pass", median_ms([&] {
             check(launch(project_write_kernel<bf16, bf16, 1>, table.writes,
                          write_shared_bytes<bf16, bf16, 1>(width), nullptr, table),
                   "write");
           }),
           0.5);
    for (int each : {1, 2, 3, 4}) {
      bool was_launched = false;
      const double ms = median_ms([&] {
        used = 0;
        check(launch_fused<bf16, 1>(table, device, allocate, nullptr, was_launched, each), "fused");
      });
      char name[64];
      std::snprintf(name, sizeof name, "half: fused, %d a processor%s", each,
                    was_launched ? "" : " (not launched)");
      report(name, ms, 0.5);
    }
  }
  return 0;
}
