// SPDX-License-Identifier: Apache-2.0
// Kernels of the block Jacobi eigensolver.
#include "check.h"
#include "kernels/jacobi.cuh"

namespace lorax::check {
namespace {

// The lower triangles of symmetric matrices, NaN above them: far from diagonal, or nearly so with
// eigenvalues in clusters, or diagonal already.
std::vector<float> lower_triangles(int64_t batch, int64_t n, bool is_near) {
  std::vector<float> h = normals(batch * n * n);
  for (int64_t e = 0; e < batch * n * n; ++e) {
    const int64_t i = e / n % n, j = e % n;
    if (j > i) h[e] = NAN;
    if (!is_near) continue;
    if (j == i) h[e] = static_cast<float>(n - i / 3);
    if (j < i) h[e] *= e / n / n == 0 ? 0 : 0.01f;
  }
  return h;
}

void check_jacobi(int64_t batch, int64_t n, bool is_near) {
  const int64_t extent = jacobi_extent(n), pairs = extent / kTile, size = extent * extent;
  const std::vector<float> h = lower_triangles(batch, n, is_near);
  const Buffer<float> input(h), H(batch * size), VT(batch * size);
  const Buffer<__half> J(batch * pairs * 2 * kTileElements);
  const Buffer<int> is_active(batch * pairs), counts(kMaxSweeps), over{std::vector<int>(1)};
  const Buffer<uint32_t> largest{std::vector<uint32_t>(batch)};
  const Buffer<uint2> seen{std::vector<uint2>(batch * kMaxSweeps)};
  const Buffer<unsigned char> room(sizeof(Jacobi));
  auto* where = reinterpret_cast<Jacobi*>(room.data());
  const Jacobi state{H.data(),       VT.data(),   J.data(),    is_active.data(),
                     largest.data(), seen.data(), over.data(), counts.data(),
                     batch,          extent};
  LORAX_RUN(launch_jacobi_start(state, where, input.data(), n, nullptr));
  int left = 1;
  for (int sweep = 0; sweep < kMaxSweeps && left != 0; ++sweep) {
    const int* count = counts.data() + sweep;
    LORAX_RUN(launch_jacobi_sweep(where, batch, extent, nullptr));
    LORAX_RUN(cudaMemcpy(&left, count, sizeof(left), cudaMemcpyDeviceToHost));
  }
  const std::vector<float> found = H.read(), vectors = VT.read();
  Expect expect("jacobi kernels, %ld columns", n);
  expect.same(left, 0);
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<double> whole(size);
    double norm = 0;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        const double v = h[(b * n + std::max(i, j)) * n + std::min(i, j)];
        whole[i * extent + j] = v;
        norm += v * v;
      }
    }
    norm = std::sqrt(norm);
    const std::vector<double> V = transposed(&vectors[b * size], extent, extent);
    const std::vector<double> identity = gram_of(V.data(), extent, V.data(), extent, extent);
    const std::vector<double> HV = gram_of(whole.data(), extent, V.data(), extent, extent);
    const std::vector<double> diagonal = gram_of(V.data(), extent, HV.data(), extent, extent);
    for (int64_t e = 0; e < size; ++e) {
      const bool is_diagonal = e / extent == e % extent;
      expect.near(identity[e], is_diagonal, 1e-5);
      expect.near(diagonal[e], is_diagonal ? found[b * size + e] : 0, 1e-5 * norm);
    }
  }
}

}  // namespace

void check_eigen() {
  check_jacobi(1, 1, false);
  check_jacobi(2, 63, false);
  check_jacobi(2, 130, true);
}

}  // namespace lorax::check
