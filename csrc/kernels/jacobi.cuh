// SPDX-License-Identifier: Apache-2.0
// Batched symmetric eigendecomposition by two-sided block Jacobi: H -> J^T H J, V -> V J, until H
// is diagonal. sm_80 and newer; angles in float32, products on tensor cores.
//
// A matrix is cut into blocks of 32. A round pairs the blocks off; each pair's 64 x 64 submatrix is
// rotated in registers by one CTA (32 steps of 32 rotations that do not meet), and the collected
// rotations are applied to the rest of H and to V as 64 x 64 products. A sweep is every pair once.
// Nearly diagonal matrices need two to four sweeps, any other eight to eleven at 256 to 512
// columns; eigenvalues that are repeated many times over take all that are allowed, and are right.
// Convergence is judged on the device: what a matrix that has settled still gets launched returns
// at once.
//
// Source: Golub, Van Loan, Matrix Computations, 8.5 (block Jacobi, parallel orderings).
#pragma once

#include "jacobi_apply.cuh"
#include "jacobi_rotate.cuh"
#include "jacobi_state.cuh"

namespace lorax {

/// Work copies: H padded with zeros, its lower triangle counting; V^T the identity.
///
/// H      (batch, columns, columns) float32, contiguous
/// where  the state is put, for the kernels of sweeps
static __global__ void jacobi_start_kernel(Jacobi state, Jacobi* where, const float* __restrict__ H,
                                           int64_t columns) {
  const int64_t batch = blockIdx.y, extent = state.extent;
  if (blockIdx.x + blockIdx.y + threadIdx.x == 0) *where = state;
  uint32_t largest = 0;
  for (int64_t i = blockIdx.x; i < extent; i += gridDim.x) {
    for (int64_t j = threadIdx.x; j < extent; j += blockDim.x) {
      float h = 0.f;
      if (i < columns && j < columns) {
        h = H[(batch * columns + (j < i ? i : j)) * columns + (j < i ? j : i)];
      }
      state.H[(batch * extent + i) * extent + j] = h;
      state.VT[(batch * extent + i) * extent + j] = i == j ? 1.f : 0.f;
      // Bit patterns of non-negative numbers are ordered as the numbers are, NaN above all.
      largest = max(largest, __float_as_uint(h) & 0x7fffffffu);
    }
  }
  largest = __reduce_max_sync(0xffffffffu, largest);
  if (threadIdx.x % 32 == 0) atomicMax(state.largest + batch, largest);
}

/// Ends a sweep: says how many matrices have not settled, and counts it.
static __global__ void jacobi_count_kernel(const Jacobi* where) {
  const Jacobi state = *where;
  const int sweep = *state.sweep;
  int mine = 0;
  for (int64_t b = threadIdx.x; b < state.batch; b += blockDim.x) {
    mine += !has_settled(state, b, sweep);
  }
  mine = __reduce_add_sync(0xffffffffu, mine);
  if (threadIdx.x != 0) return;
  state.left[sweep] = mine;
  *state.sweep = sweep + 1;
}

inline int64_t jacobi_extent(int64_t columns) { return round_up(columns, kTile); }

// `largest`, `seen` and `sweep` must be zero.
inline cudaError_t launch_jacobi_start(const Jacobi& state, Jacobi* where, const float* H,
                                       int64_t columns, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(state.extent, 16)),
                  static_cast<unsigned>(state.batch));
  jacobi_start_kernel<<<grid, 128, 0, stream>>>(state, where, H, columns);
  return cudaGetLastError();
}

// One sweep of the state that was put to `where`. What is launched depends on its batch and extent
// alone: it can be captured once and launched for every sweep of every state put there.
inline cudaError_t launch_jacobi_sweep(const Jacobi* where, int64_t batch, int64_t extent,
                                       cudaStream_t stream) {
  const cudaError_t status = cudaFuncSetAttribute(
      jacobi_apply_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kApplyBytes);
  if (status != cudaSuccess) return status;
  const int pairs = static_cast<int>(extent / kTile);
  const unsigned matrices = static_cast<unsigned>(batch);
  const unsigned tiles = static_cast<unsigned>(pairs * (pairs - 1) / 2 + pairs * pairs);
  for (int round = 0; round < 2 * pairs - 1; ++round) {
    jacobi_rotate_kernel<<<dim3(pairs, matrices), kJacobiThreads, 0, stream>>>(where, round);
    jacobi_apply_kernel<<<dim3(tiles, matrices), kApplyThreads, kApplyBytes, stream>>>(where,
                                                                                       round);
  }
  jacobi_count_kernel<<<1, 32, 0, stream>>>(where);
  return cudaGetLastError();
}

}  // namespace lorax
