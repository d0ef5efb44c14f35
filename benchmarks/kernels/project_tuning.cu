// SPDX-License-Identifier: Apache-2.0
// Times the projection kernel alone on a Llama-2-7B-shaped model, for the constants in
// csrc/kernels/project_launch.cuh and the bounds in docs/kernels/project.md. A line a case, as CSV:
// what, r, item KiB, lag, ms, TB/s of bases (each counted as often as the case reads it).
//
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -I csrc/kernels \
//     benchmarks/kernels/project_tuning.cu -o project_tuning && ./project_tuning
#include <cstdio>
#include <cstdlib>

#include "project_launch.cuh"

using namespace lorax::projection;

#define CHECK(call)                                                        \
  do {                                                                     \
    const cudaError_t error_ = (call);                                     \
    if (error_ != cudaSuccess) {                                           \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error_)); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

constexpr int kRank = 320;

__global__ void fill_kernel(bf16* x, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * blockDim.x) {
    const uint32_t hash = uint32_t(i) * 2654435761u >> 9;
    x[i] = __float2bfloat16(float(hash) / (1 << 22) - 1.0f);
  }
}

struct Memory {
  char* base;
  size_t end = 0;
  explicit Memory(size_t bytes) { CHECK(cudaMalloc(&base, bytes)); }
  bf16* take(int64_t elements) {
    bf16* p = reinterpret_cast<bf16*>(base + end);
    end += (elements * sizeof(bf16) + 255) / 256 * 256;
    return p;
  }
};

enum class Case { kSame, kTwoBases, kReads, kWrites };

// Both sides of every layer; factors of the input side lie transposed.
std::vector<Layer> make_layers(Memory& memory, int r, Case which) {
  const int sides[] = {4096, 4096, 4096, 4096, 11008, 11008, 4096};
  const int inputs[] = {4096, 4096, 4096, 4096, 4096, 4096, 11008};
  std::vector<Layer> layers;
  for (int i = 0; i < 32 * 7; ++i) {
    for (bool is_input : {false, true}) {
      const int side = is_input ? inputs[i % 7] : sides[i % 7];
      Layer x{};
      x.read = memory.take(int64_t(side) * kRank);
      x.write = which == Case::kTwoBases ? memory.take(int64_t(side) * kRank) : x.read;
      x.block = memory.take(int64_t(side) * r);
      x.out = memory.take(int64_t(side) * r);
      x.block_row = is_input ? 1 : r;
      x.block_column = is_input ? side : 1;
      x.read_row = x.write_row = kRank;
      // One tile stands for the pass that is left out.
      x.m = which == Case::kWrites ? kReadRows : side;
      x.p = which == Case::kReads ? kWriteRows : side;
      if (which == Case::kWrites && is_input) x.block_column = side;
      x.k = kRank;
      x.r = r;
      layers.push_back(x);
    }
  }
  return layers;
}

void time_case(const char* name, Memory memory, char* workspace, size_t workspace_bytes, int r,
               Case which, const Tuning& tuning) {
  const std::vector<Layer> layers = make_layers(memory, r, which);
  const auto allocate = [&](size_t bytes) -> void* {
    return bytes <= workspace_bytes ? workspace : nullptr;
  };
  const auto run = [&] {
    CHECK(launch_project(layers, Dtype::kBFloat16, Dtype::kBFloat16, Dtype::kBFloat16, allocate,
                         nullptr, tuning));
  };
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  for (int i = 0; i < 3; ++i) run();
  CHECK(cudaDeviceSynchronize());
  constexpr int kRepeats = 20;
  CHECK(cudaEventRecord(start));
  for (int i = 0; i < kRepeats; ++i) run();
  CHECK(cudaEventRecord(stop));
  CHECK(cudaEventSynchronize(stop));
  float ms = 0;
  CHECK(cudaEventElapsedTime(&ms, start, stop));
  ms /= kRepeats;
  double bytes = 0;
  for (const Layer& x : layers) bytes += 2.0 * kRank * (double(x.m) + x.p);
  std::printf("%s,%d,%d,%d,%.4f,%.2f\n", name, r, tuning.item_bytes / 1024, tuning.lag, ms,
              bytes / ms / 1e9);
  std::fflush(stdout);
}

int main() {
  Memory memory(size_t(5) << 30);
  constexpr size_t kWorkspace = size_t(1) << 30;
  char* workspace = nullptr;
  CHECK(cudaMalloc(&workspace, kWorkspace));
  fill_kernel<<<1024, 256>>>(reinterpret_cast<bf16*>(memory.base), int64_t(5) << 29);
  CHECK(cudaGetLastError());
  std::printf("case,r,item_kib,lag,ms,tb_per_s\n");
  const auto time = [&](const char* name, int r, Case which, const Tuning& tuning) {
    time_case(name, memory, workspace, kWorkspace, r, which, tuning);
  };
  for (int kib : {64, 96, 128, 192, 256}) {
    time("reads only", 16, Case::kReads, {kib * 1024, 125});
    time("writes only", 16, Case::kWrites, {kib * 1024, 125});
    time("two bases", 16, Case::kTwoBases, {kib * 1024, 125});
    for (int lag : {-1, 25, 50, 75, 100, 125, 150, 200, 300}) {
      time("one basis", 16, Case::kSame, {kib * 1024, lag});
    }
  }
  for (int r : {1, 4, 8, 32, 48, 64, 128}) time("one basis", r, Case::kSame, {});
  return 0;
}
