// SPDX-License-Identifier: Apache-2.0
// A CUDA machine of one processor thread, for tests: the blocks of a launch run as coroutines that
// take turns at barriers, at warp instructions and while they wait for each other. It checks
// indexing, synchronisation and arithmetic of a kernel where there is no GPU; it knows no races.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __noinline__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <typename T>
T __ldcg(const T* p) {
  return *p;
}

struct dim3 {
  int x;
  explicit dim3(int x = 1) : x(x) {}
};

namespace emulator {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 128 * 1024;  // holds a kernel's parameters, up to 32 KB

struct Warp {
  int arrived = 0;
  long round = 0;
  uint64_t in[kLanes][16], out[kLanes][4];
};

struct Block {
  std::vector<char> shared;
  std::vector<Warp> warps;
  dim3 index;
  int threads, alive, arrived = 0;
  long round = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Block* block;
  dim3 index;
  bool is_done = false;
  std::function<bool()> is_ready = [] { return true; };
};

// Blocks that run at once; a correct launch ends with any number of them.
inline int resident = 8;

inline ucontext_t scheduler;
inline Fiber* current;

inline void pause_until(std::function<bool()> is_ready) {
  Fiber* self = current;
  self->is_ready = std::move(is_ready);
  swapcontext(&self->context, &scheduler);
}

inline void barrier() {
  Block* block = current->block;
  const long round = block->round;
  if (++block->arrived == block->alive) {
    block->arrived = 0;
    ++block->round;
    return;
  }
  pause_until([block, round] { return block->round != round; });
}

// A warp instruction: every lane hands in `in`, the last one computes all `out`.
template <typename Compute>
void together(const uint64_t* in, int words, uint64_t* out, int results, Compute compute) {
  const int lane = current->index.x % kLanes;
  Warp* warp = &current->block->warps[current->index.x / kLanes];
  std::copy_n(in, words, warp->in[lane]);
  const long round = warp->round;
  if (++warp->arrived == kLanes) {
    compute(*warp);
    warp->arrived = 0;
    ++warp->round;
  } else {
    pause_until([warp, round] { return warp->round != round; });
  }
  std::copy_n(warp->out[lane], results, out);
}

inline std::function<void()> body;
inline void enter() {
  body();
  current->is_done = true;
  --current->block->alive;
  swapcontext(&current->context, &scheduler);
}

// Runs `blocks` blocks, at most `resident` at a time.
inline void run(int blocks, int threads, size_t shared_bytes, int resident,
                std::function<void()> kernel) {
  body = std::move(kernel);
  std::vector<std::unique_ptr<Block>> live;
  std::vector<std::unique_ptr<Fiber>> fibers;
  int next = 0;
  while (true) {
    while (next < blocks && int(fibers.size()) < resident * threads) {
      auto block = std::make_unique<Block>();
      // Poisoned: what a kernel does not write must not matter.
      block->shared.assign(shared_bytes + 16, char(0xff));
      block->warps.resize(threads / kLanes);
      block->index = dim3(next++);
      block->threads = block->alive = threads;
      for (int t = 0; t < threads; ++t) {
        auto fiber = std::make_unique<Fiber>();
        fiber->block = block.get();
        fiber->index = dim3(t);
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack.get();
        fiber->context.uc_stack.ss_size = kStackBytes;
        fiber->context.uc_link = nullptr;
        makecontext(&fiber->context, enter, 0);
        fibers.push_back(std::move(fiber));
      }
      live.push_back(std::move(block));
    }
    if (fibers.empty()) return;
    bool moved = false;
    for (auto& fiber : fibers) {
      if (fiber->is_done || !fiber->is_ready()) continue;
      moved = true;
      current = fiber.get();
      swapcontext(&scheduler, &current->context);
    }
    if (!moved) throw std::runtime_error("deadlock: no thread of the launch can go on");
    std::erase_if(fibers, [](auto& fiber) { return fiber->is_done; });
  }
}

inline char* shared() {
  const auto address = reinterpret_cast<uintptr_t>(current->block->shared.data());
  return reinterpret_cast<char*>((address + 15) / 16 * 16);
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::current->block->index)
#define blockDim (dim3(emulator::current->block->threads))
inline void __syncthreads() { emulator::barrier(); }

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorMemoryAllocation,
  cudaErrorLaunchOutOfResources,
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };

// A small device: four processors, two blocks on each.
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 4, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, int, int) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  return *blocks = 2, cudaSuccess;
}
template <typename... Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments...), dim3 blocks, dim3 threads,
                             void** arguments, size_t shared_bytes, cudaStream_t) {
  const auto call = [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    kernel(*static_cast<std::remove_cvref_t<Arguments>*>(arguments[kIndex])...);
  };
  emulator::run(blocks.x, threads.x, shared_bytes, emulator::resident,
                [&] { call(std::index_sequence_for<Arguments...>()); });
  return cudaSuccess;
}
