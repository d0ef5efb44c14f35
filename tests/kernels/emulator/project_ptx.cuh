// SPDX-License-Identifier: Apache-2.0
// The instructions of csrc/kernels/project_ptx.cuh on the emulated machine, from their definitions
// in the PTX manual.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace lorax::projection {

inline char* shared_memory() { return emulator::shared(); }

inline void load_blocks(uint32_t (&x)[4], const __nv_bfloat16* row, bool is_transposed = false) {
  const uint64_t in[1] = {reinterpret_cast<uint64_t>(row)};
  uint64_t out[4];
  emulator::together(in, 1, out, 4, [is_transposed](emulator::Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        auto element = [&](int i, int j) {
          const auto* p = reinterpret_cast<const __nv_bfloat16*>(warp.in[8 * matrix + i][0]);
          if (reinterpret_cast<uint64_t>(p) % 16) throw std::runtime_error("ldmatrix: unaligned");
          return uint32_t(p[j].bits);
        };
        const int i = lane / 4, j = lane % 4 * 2;
        warp.out[lane][matrix] = is_transposed ? element(j, i) | element(j + 1, i) << 16
                                               : element(i, j) | element(i, j + 1) << 16;
      }
    }
  });
  for (int i = 0; i < 4; ++i) x[i] = uint32_t(out[i]);
}

inline void load_blocks_transposed(uint32_t (&x)[4], const __nv_bfloat16* row) {
  load_blocks(x, row, true);
}

inline float half_of(uint64_t pair, int which) {
  return __bfloat162float({uint16_t(pair >> 16 * which)});
}

inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint64_t in[10] = {a[0], a[1], a[2], a[3], b0, b1}, out[4];
  for (int i = 0; i < 4; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &c[i], 4);
    in[6 + i] = bits;
  }
  emulator::together(in, 10, out, 4, [](emulator::Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = __uint_as_float(uint32_t(warp.in[lane][6 + i]));
        for (int k = 0; k < 16; ++k) {
          const uint64_t* left = warp.in[row % 8 * 4 + k % 8 / 2];
          const uint64_t* right = warp.in[column * 4 + k % 8 / 2];
          sum +=
              double(half_of(left[k / 8 * 2 + row / 8], k % 2)) * half_of(right[4 + k / 8], k % 2);
        }
        const float value = float(sum);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        warp.out[lane][i] = bits;
      }
    }
  });
  for (int i = 0; i < 4; ++i) c[i] = __uint_as_float(uint32_t(out[i]));
}

inline uint64_t keep_policy() { return 0; }
inline uint64_t drop_policy() { return 0; }

inline void copy_async(void* shared, const void* source, int bytes, uint64_t) {
  if (reinterpret_cast<uint64_t>(source) % 16) throw std::runtime_error("unaligned 16-byte copy");
  std::memset(shared, 0, 16);
  std::memcpy(shared, source, bytes);
}
inline void commit_copies() {}
template <int kPending>
void wait_copies() {}

inline int arrive(int* counter) { return (*counter)++; }
inline void wait_until(const int* counter, int count) {
  if (*counter < count) emulator::pause_until([=] { return *counter >= count; });
}
inline int take_ticket(int* counter) { return (*counter)++; }

}  // namespace lorax::projection
