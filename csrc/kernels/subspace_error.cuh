// SPDX-License-Identifier: Apache-2.0
// Projector errors of subspaces from the residuals of their vectors: a few numbers a matrix, in
// float64. Every architecture; latency, one CTA a matrix.
#pragma once

#include "launch.cuh"

namespace lorax {

constexpr int kErrorThreads = 1024;
constexpr int kErrorWarps = kErrorThreads / 32;

// What the estimate is made of, computed once on the host; docs/kernels/subspace_error.md.
struct ErrorConstants {
  double floor;     // of values that determine a direction, relative to the first
  double epsilon;   // of float32
  double rounding;  // of products, relative to the values that they mix
};

// As torch.maximum and torch.minimum: what is not a number stays.
__device__ inline double larger(double a, double b) { return a > b || isnan(a) ? a : b; }
__device__ inline double smaller(double a, double b) { return a < b || isnan(a) ? a : b; }

/// error[0][b] = sqrt(2/k sum_i min(1, outside_i + mixed_i + rounded_i)), error[1][b] the same of
/// what is outside and not capped, error[2][b] of min(1, mixed_i); over the leading k vectors.
///
/// C      (batch, l, l) residuals' Gram matrix, or (batch, l) their squared lengths, without which
///        nothing is mixed and error[0] is error[1]
/// theta  (batch, l) descending
/// error  (3, batch) float64
template <typename Residual, typename Value, bool kIsFull>
static __global__ void __launch_bounds__(kErrorThreads)
    subspace_error_kernel(const Residual* __restrict__ C, const Value* __restrict__ theta,
                          double* __restrict__ error, int l, int known, int k,
                          ErrorConstants constants) {
  __shared__ double sums[3][kErrorWarps];
  constexpr double kTiny = 1e-300;
  const int64_t batch = blockIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Value* values = theta + batch * l;
  const Residual* residuals = C + batch * l * (kIsFull ? l : 1);
  const auto square = [&](int i) -> double {
    return residuals[kIsFull ? static_cast<int64_t>(i) * l + i : i];
  };
  double end = values[known - 1];
  // There is an eigenvalue within the residual of a Ritz value.
  if (kIsFull) end = larger(end, values[l - 1] + sqrt(larger(square(l - 1), 0.)));
  // Not a number where the first value is infinite.
  const double first = values[0], floor = constants.floor * larger(first, kTiny) + (first - first);
  const double least = constants.epsilon * floor;
  const double last_gap = larger(values[k - 1] - end, least);
  double outside_sum = 0, mixed_sum = 0, error_sum = 0;
  for (int i = warp; i < k; i += kErrorWarps) {
    const double value = values[i];
    // What is not a number counts.
    if (value <= floor) continue;
    const double gap = larger(value - end, least);
    const double own = square(i), outside = own / (gap * gap);
    double mixed = 0, rounded = 0;
    if (kIsFull) {
      const double shifted = value - own / larger(value - end, last_gap);
      for (int j = k + lane; j < l; j += 32) {
        const double other = values[j];
        const double shift = square(j) / larger(other - end, last_gap);
        const double distance = larger(shifted - (other + shift), kTiny);
        const double tilt = residuals[static_cast<int64_t>(i) * l + j] / (gap * distance);
        mixed += tilt * tilt;
        const double entry = constants.rounding * sqrt(value * larger(other, 0.));
        const double turn = entry / larger(value - other, kTiny);
        rounded += turn * turn;
      }
      for (int offset = 16; offset > 0; offset /= 2) {
        mixed += __shfl_xor_sync(0xffffffffu, mixed, offset);
        rounded += __shfl_xor_sync(0xffffffffu, rounded, offset);
      }
    }
    outside_sum += outside;
    mixed_sum += smaller(mixed, 1.);
    error_sum += smaller(outside + mixed + rounded, 1.);
  }
  if (lane == 0) {
    sums[0][warp] = kIsFull ? error_sum : outside_sum;
    sums[1][warp] = outside_sum;
    sums[2][warp] = mixed_sum;
  }
  __syncthreads();
  if (threadIdx.x >= 3) return;
  double sum = 0;
  for (int w = 0; w < kErrorWarps; ++w) sum += sums[threadIdx.x][w];
  error[static_cast<int64_t>(threadIdx.x) * gridDim.x + batch] = sqrt(2. / k * sum);
}

template <typename Residual, typename Value>
inline cudaError_t launch_subspace_error(const Residual* C, const Value* theta, double* error,
                                         bool is_full, int64_t batch, int l, int known, int k,
                                         ErrorConstants constants, cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(batch), kErrorThreads, 0, stream>>>(C, theta, error, l, known, k,
                                                                       constants);
  };
  if (is_full) {
    launch(subspace_error_kernel<Residual, Value, true>);
  } else {
    launch(subspace_error_kernel<Residual, Value, false>);
  }
  return cudaGetLastError();
}

}  // namespace lorax
