// SPDX-License-Identifier: Apache-2.0
// The projection's launcher on the emulated machine, as a C function for ctypes.
#include "project_launch.cuh"

using namespace lorax::projection;

// layers: count structs as laid out in project_table.cuh, derived fields unset; resident: blocks
// that run at once. Returns 0, a cudaError_t, or -1 with the message printed.
extern "C" int emulated_project(const Layer* layers, int count, int read, int write, int block,
                                int item_bytes, int lag, int resident) {
  std::vector<std::vector<char>> owned;
  emulator::resident = resident;
  try {
    return launch_project(
        std::vector<Layer>(layers, layers + count), Dtype(read), Dtype(write), Dtype(block),
        [&](size_t bytes) -> void* {
          owned.emplace_back(bytes + 16, char(0xff));
          const auto address = reinterpret_cast<uintptr_t>(owned.back().data());
          return reinterpret_cast<void*>((address + 15) / 16 * 16);
        },
        nullptr, Tuning{item_bytes, lag});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return -1;
  }
}
