// SPDX-License-Identifier: Apache-2.0
// Kernels for long blocks of few columns in float64: Cholesky QR and the projected SVD.
#include "check.h"
#include "kernels/ritz.cuh"

namespace lorax::check {
namespace {

constexpr double kLeast = 1e-12, kDependent = 0.5, kSteep = 1e-9;

int64_t chunk_sums(const Shape& shape) {
  return shape.batch * narrow_chunks(shape.rows) * shape.columns * shape.columns;
}

std::vector<double> own_gram(const std::vector<float>& x, const Shape& shape, int64_t b) {
  const float* block = &x[b * shape.rows * shape.columns];
  return gram_of(block, shape.columns, block, shape.columns, shape.rows);
}

// left^T A right of a symmetric A.
std::vector<double> between(const double* left, const std::vector<double>& A, const double* right,
                            int64_t n, int64_t columns) {
  const std::vector<double> product = gram_of(A.data(), n, right, columns, n);
  return gram_of(left, columns, product.data(), columns, n);
}

void expect_product(const std::vector<float>& x, const Shape& shape, const std::vector<double>& R,
                    const std::vector<float>& got, int64_t columns) {
  Expect expect("narrow_product_kernel, %ldx%ldx%ld", shape.rows, shape.columns, columns);
  for (int64_t row = 0; row < shape.batch * shape.rows; ++row) {
    const double* r = &R[row / shape.rows * shape.columns * columns];
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < shape.columns; ++i) {
        const double term = x[row * shape.columns + i] * r[i * columns + j];
        sum += term;
        size += std::fabs(term);
      }
      expect.near(got[row * columns + j], sum, std::fabs(sum) * 0x1p-24 + size * 1e-14);
    }
  }
}

// The sums of chunks add up to lower triangles of the Gram matrices. Nothing is written above
// them, so that they are read only where poison was.
void expect_sums(const std::vector<float>& x, const Shape& shape, const Buffer<double>& partial) {
  if (!is_poisoned) return;
  const int64_t n = shape.columns, chunks = narrow_chunks(shape.rows);
  const std::vector<double> got = partial.read();
  Expect expect("narrow_gram_kernel, %ldx%ld", shape.rows, n);
  for (int64_t b = 0; b < shape.batch; ++b) {
    const std::vector<double> want = own_gram(x, shape, b);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        double sum = 0;
        for (int64_t c = 0; c < chunks; ++c) sum += got[((b * chunks + c) * n + i) * n + j];
        expect.near(sum, want[i * n + j], 1e-13 * std::sqrt(want[i * n + i] * want[j * n + j]));
      }
    }
  }
}

void check_cholesky_qr(const Shape& shape) {
  const auto [batch, rows, n] = shape;
  const std::vector<float> x = normals(shape.size());
  const Buffer<float> X(x, 1), Q(shape.size());
  const Buffer<double> partial(chunk_sums(shape)), R(batch * n * n);
  const NarrowGram gram = narrow_gram(X.data(), partial.data(), rows);
  LORAX_RUN(launch_narrow_gram(gram, gram, 1, batch, n, nullptr));
  LORAX_RUN(launch_narrow_factor(gram, R.data(), batch, n, kLeast, nullptr));
  const NarrowProduct product{X.data(), R.data(), Q.data(), rows};
  LORAX_RUN(launch_narrow_product(product, product, 1, batch, n, n, nullptr));
  expect_sums(x, shape, partial);
  const std::vector<double> r = R.read();
  expect_product(x, shape, r, Q.read(), n);
  // R^T G R = I and nothing below the diagonal of R say all.
  Expect expect("narrow_factor_kernel, %ldx%ld", rows, n);
  for (int64_t b = 0; b < batch; ++b) {
    const double* own = &r[b * n * n];
    const std::vector<double> identity = between(own, own_gram(x, shape, b), own, n, n);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        expect.near(identity[i * n + j], i == j, 1e-9);
        if (j < i) expect.same(own[i * n + j], 0);
      }
      expect.same(own[i * n + i] > 0, 1);
    }
  }
}

// U = Q left and V = B right have orthonormal columns, and U^T A V = S where A^T Q = B. The second
// matrix of the batch has a NaN, the third a column of zeros: their results are zeros, and their
// status says why.
void check_ritz(int64_t rows, int64_t other_rows, int64_t n, int64_t wanted) {
  const Shape q_shape{3, rows, n}, b_shape{3, other_rows, n};
  std::vector<float> q = normals(q_shape.size()), b = normals(b_shape.size());
  for (float& value : q) value /= std::sqrt(static_cast<float>(rows));
  for (int64_t e = 0; e < b_shape.size(); ++e) b[e] *= std::pow(0.9f, static_cast<float>(e % n));
  b[other_rows * n + n / 2] = NAN;
  for (int64_t i = 0; i < rows; ++i) q[(2 * rows + i) * n + n - 1] = 0;
  const int64_t batch = q_shape.batch;
  const Buffer<float> Q(q), B(b), S(batch * wanted);
  const Buffer<float> U(batch * rows * wanted), V(batch * other_rows * wanted);
  const Buffer<double> q_sums(chunk_sums(q_shape)), b_sums(chunk_sums(b_shape));
  const Buffer<double> left(batch * n * wanted), right(batch * n * wanted);
  const Buffer<int> status(batch);
  const NarrowGram q_gram = narrow_gram(Q.data(), q_sums.data(), rows);
  const NarrowGram b_gram = narrow_gram(B.data(), b_sums.data(), other_rows);
  LORAX_RUN(launch_narrow_gram(q_gram, b_gram, 2, batch, n, nullptr));
  LORAX_RUN(launch_ritz(q_gram, b_gram, left.data(), right.data(), S.data(), status.data(), batch,
                        n, wanted, kDependent, kSteep, nullptr));
  LORAX_RUN(launch_narrow_product({Q.data(), left.data(), U.data(), rows},
                                  {B.data(), right.data(), V.data(), other_rows}, 2, batch, n,
                                  wanted, nullptr));
  expect_sums(q, q_shape, q_sums);
  const std::vector<double> l = left.read(), r = right.read();
  const std::vector<float> s = S.read();
  expect_product(q, q_shape, l, U.read(), wanted);
  expect_product(b, b_shape, r, V.read(), wanted);
  Expect expect("ritz_kernel, %ld of %ld columns", wanted, n);
  const std::vector<int> found = status.read();
  expect.same(found[0], kRitzDone);
  expect.same(found[1], kRitzNotFinite);
  expect.same(found[2], kRitzDependent);
  for (int64_t e = n * wanted; e < batch * n * wanted; ++e) expect.same(l[e] + r[e], 0);
  for (int64_t e = wanted; e < batch * wanted; ++e) expect.same(s[e], 0);
  const std::vector<double> K = own_gram(q, q_shape, 0), H = own_gram(b, b_shape, 0);
  const std::vector<double> Hr = gram_of(H.data(), n, r.data(), wanted, n);
  const std::vector<double> left_ones = between(l.data(), K, l.data(), n, wanted);
  const std::vector<double> right_ones = gram_of(r.data(), wanted, Hr.data(), wanted, n);
  const std::vector<double> middle = gram_of(l.data(), wanted, Hr.data(), wanted, n);
  for (int64_t e = 0; e < wanted * wanted; ++e) {
    const int64_t i = e / wanted, j = e % wanted;
    expect.near(left_ones[e], i == j, 1e-9);
    expect.near(right_ones[e], i == j, 1e-9);
    expect.near(middle[e], i == j ? s[i] : 0, 1e-7 * s[0]);
    if (i == j && i > 0) expect.same(s[i] <= s[i - 1], 1);
  }
}

}  // namespace

void check_narrow() {
  for (const Shape& shape : {Shape{3, 199, 1}, {2, 1025, 63}, {1, 300, 90}, {1, 199, 128}}) {
    check_cholesky_qr(shape);
  }
  check_cholesky_qr({2, 2049 + 63, 7});
  check_ritz(199, 63, 1, 1);
  check_ritz(1025, 199, 31, 6);
  check_ritz(1025, 199, 64, 64);
}

}  // namespace lorax::check
