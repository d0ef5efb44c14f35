// SPDX-License-Identifier: Apache-2.0
// P_i (Q_i^T B_i) for many layers in one launch, through tensor cores. sm_80 and newer.
//
// Blocks take items in the order of tickets. A layer's writing items come a while after its reading
// items: late enough that its sum is ready when they start, early enough that a basis that both
// read is still in the L2 cache, so that device memory is read once. An item waits only for items
// with smaller tickets, so that the launch ends however few of its blocks run at once; sums are in
// a fixed order, so that results do not depend on the timing.
#pragma once

#include "project_items.cuh"

namespace lorax::projection {

template <typename Read_, typename Write_, typename Block_, int kTiles_>
struct Kernel {
  using Read = Read_;
  using Write = Write_;
  using Block = Block_;
  static constexpr int kTiles = kTiles_;
  using Ring = projection::Ring<Read, Write, Block, kTiles>;
};

// out = P (Q^T B), blocks of B by 16 * kTiles columns.
template <typename Read, typename Write, typename Block, int kTiles>
__global__ __launch_bounds__(kThreads, 2) void project_kernel(
    const __grid_constant__ Table table,  // in device memory, filled by project_upload_kernel
    int layer_count) {
  using Self = Kernel<Read, Write, Block, kTiles>;
  int* ticket = reinterpret_cast<int*>(shared_memory());
  if (threadIdx.x == 0) *ticket = take_ticket(table.counters);
  __syncthreads();
  while (*ticket < table.items) {
    const int item = *ticket;
    const int owner = table.owners[item];
    const Layer x = table.layers[owner / 2];
    // Taken ahead: the answer comes while this item is worked on.
    const int next = threadIdx.x == 0 ? take_ticket(table.counters) : 0;
    if (owner % 2 == 0) {
      read_item<Self>(table, x, owner / 2, layer_count, item - x.first_read);
    } else {
      write_item<Self>(table, x, owner / 2, item - x.first_write);
    }
    __syncthreads();
    if (threadIdx.x == 0) *ticket = next;
    __syncthreads();
  }
}

}  // namespace lorax::projection
