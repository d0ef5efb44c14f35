// SPDX-License-Identifier: Apache-2.0
// Kernels of an orthonormalisation: Gram matrices from products of pieces, which the host computes,
// their Cholesky factors and what is made of those.
#include "check.h"
#include "kernels/cholesky.cuh"
#include "kernels/symmetric.cuh"

namespace lorax::check {
namespace {

constexpr float kFloor = 4e-5f;

template <typename T>
void check_mirror(int64_t batch, int64_t columns) {
  const std::vector<float> values = normals(batch * columns * columns);
  const std::vector<T> g(values.begin(), values.end());
  const Buffer<T> G(g);
  LORAX_RUN(launch_mirror(G.data(), batch, columns, nullptr));
  const std::vector<T> got = G.read();
  Expect expect("mirror_kernel, %ld columns", columns);
  for (size_t e = 0; e < got.size(); ++e) {
    const int64_t i = e / columns % columns, j = e % columns;
    expect.same(got[e], i > j ? g[e + (j - i) * columns + i - j] : g[e]);
  }
}

// Strips of a symmetric matrix, 64 rows each from the diagonal on, as two float16 pieces. What lies
// below the diagonal in them is not to be looked at.
void check_strips(int64_t batch, int64_t columns) {
  const std::vector<float> g = normals(batch * columns * columns);
  const Buffer<__half> high(batch * columns * columns), low(batch * columns * columns);
  for (int64_t start = 0; start < columns; start += 64) {
    const int64_t rows = std::min<int64_t>(64, columns - start), wide = columns - start;
    std::vector<float> t(batch * rows * wide);
    for (int64_t e = 0; e < batch * rows * wide; ++e) {
      const int64_t j = e % wide, i = e / wide % rows, b = e / wide / rows;
      t[e] = g[(b * columns + start + i) * columns + start + j];
    }
    const Buffer<float> T(t);
    LORAX_RUN(launch_strip_pieces(T.data(), high.data(), low.data(), batch, rows, columns, start,
                                  nullptr));
    LORAX_RUN(cudaDeviceSynchronize());
  }
  const std::vector<__half> first = high.read(), second = low.read();
  Expect expect("strip_pieces_kernel, %ld columns", columns);
  for (int64_t e = 0; e < batch * columns * columns; ++e) {
    const int64_t j = e % columns, i = e / columns % columns;
    const double want = g[i > j ? e + (j - i) * columns + i - j : e];
    const double got = widened(first[e]) + widened(second[e]) * 0x1p-11;
    expect.near(got, want, std::fabs(want) * 0x1p-22 + 0x1p-36);
  }
}

// Cholesky factor L of the lower triangle of A and M = L^-1, both in double: columns with a pivot
// up to the floor are left out, with 2 on the diagonal of L.
std::vector<double> inverse_factor(const float* A, int64_t n) {
  std::vector<double> a(A, A + n * n), M(n * n);
  for (int64_t k = 0; k < n; ++k) {
    const double pivot = a[k * n + k];
    const bool is_kept = pivot > kFloor;
    a[k * n + k] = is_kept ? std::sqrt(pivot) : 2;
    for (int64_t i = k + 1; i < n; ++i) a[i * n + k] *= is_kept ? 1 / a[k * n + k] : 0;
    for (int64_t i = k + 1; i < n; ++i) {
      for (int64_t j = k + 1; j <= i; ++j) a[i * n + j] -= a[i * n + k] * a[j * n + k];
    }
  }
  for (int64_t c = 0; c < n; ++c) {
    for (int64_t i = c; i < n; ++i) {
      double sum = i == c;
      for (int64_t p = c; p < i; ++p) sum -= a[i * n + p] * M[p * n + c];
      M[i * n + c] = sum / a[i * n + i];
    }
  }
  return M;
}

// An orthonormalisation's pass as far as its own kernels go, one after the other, each checked
// against what it was given.
class Pass {
 public:
  // Columns 5 and 70 repeat earlier ones, and column 1 is zero, where there are so many. Products
  // of the pieces are given in `parts` groups of rows.
  Pass(const Shape& shape, int parts)
      : shape_(shape),
        parts_(parts),
        padded_(padded_columns(shape.columns)),
        extent_(factor_extent(shape.columns)),
        x_(normals(shape.size())),
        X_(repeated()),
        scale_(shape.batch * shape.columns),
        square_(shape.batch * shape.columns),
        T_(products()) {}

  void check() {
    check_plain();
    const Buffer<float> G(shape_.batch * extent_ * extent_);
    const Buffer<float> normalizer(shape_.batch * shape_.columns);
    check_normalized(G, normalizer);
    check_cholesky(G);
    check_least_pivot(G);
    check_triangle(G, normalizer, true);
    check_triangle(G, normalizer, false);
  }

 private:
  const std::vector<float>& repeated() {
    const int64_t l = shape_.columns;
    for (int64_t row = 0; row < shape_.batch * shape_.rows; ++row) {
      if (l > 1) x_[row * l + 1] = 0;
      if (l > 5) x_[row * l + 5] = x_[row * l];
      if (l > 70) x_[row * l + 70] = x_[row * l + 3];
    }
    return x_;
  }

  // [P_0^T P_0 | P_0^T P_1] of two float16 pieces of the scaled columns, by groups of rows; keeps
  // the sums of the pieces.
  std::vector<float> products() {
    const auto [batch, rows, columns] = shape_;
    const Buffer<double> partial(batch * norm_chunks(rows) * columns);
    LORAX_RUN(launch_column_scales(X_.data(), partial.data(), scale_.data(), square_.data(), batch,
                                   rows, columns, 0.f, nullptr));
    const PieceLayout at{2 * padded_, padded_, rows * 2 * padded_};
    const Buffer<__half> pieces(batch * at.batch_stride);
    LORAX_RUN(launch_split<__half, Scaling::kColumns>(
        X_.data(), scale_.data(), nullptr, pieces.data(), 2, batch, rows, columns, at, 7, nullptr));
    const std::vector<__half> p = pieces.read();
    std::vector<float> first(batch * rows * padded_), both(p.size()), T;
    sums_.resize(first.size());
    for (size_t e = 0; e < first.size(); ++e) {
      const int64_t from = e / padded_ * 2 * padded_ + e % padded_;
      both[from] = first[e] = __half2float(p[from]);
      both[from + padded_] = __half2float(p[from + padded_]);
      sums_[e] = std::ldexp(static_cast<double>(both[from]) + both[from + padded_], -14);
    }
    for (int64_t part = 0; part < batch * parts_; ++part) {
      const int64_t start = part % parts_ * rows / parts_;
      const int64_t end = (part % parts_ + 1) * rows / parts_;
      const int64_t row = part / parts_ * rows + start;
      const std::vector<double> t = gram_of(&first[row * padded_], padded_,
                                            &both[row * at.row_stride], 2 * padded_, end - start);
      T.insert(T.end(), t.begin(), t.end());
    }
    return T;
  }

  void check_plain() {
    const auto [batch, rows, columns] = shape_;
    const Buffer<float> G(batch * columns * columns);
    LORAX_RUN(launch_combine(T_.data(), scale_.data(), square_.data(), G.data(), nullptr, batch,
                             columns, columns, parts_, nullptr));
    const std::vector<float> got = G.read();
    Expect expect("combine_kernel, %ldx%ld", rows, columns);
    for (int64_t b = 0; b < batch; ++b) {
      const float* x = &x_[b * rows * columns];
      const std::vector<double> want = gram_of(x, columns, x, columns, rows);
      for (int64_t i = 0; i < columns; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          const double size = std::sqrt(want[i * columns + i] * want[j * columns + j]);
          const int64_t e = (b * columns + i) * columns + j;
          expect.near(got[e], want[i * columns + j], 2e-6 * size);
          expect.same(got[e], got[(b * columns + j) * columns + i]);
        }
      }
    }
  }

  void check_normalized(const Buffer<float>& G, const Buffer<float>& normalizer) {
    const auto [batch, rows, columns] = shape_;
    LORAX_RUN(launch_combine(T_.data(), scale_.data(), square_.data(), G.data(), normalizer.data(),
                             batch, columns, extent_, parts_, nullptr));
    const std::vector<float> got = G.read(), d = normalizer.read();
    Expect expect("combine_kernel, normalized, %ldx%ld", rows, columns);
    for (int64_t b = 0; b < batch; ++b) {
      const double* y = &sums_[b * rows * padded_];
      const std::vector<double> want = gram_of(y, padded_, y, padded_, rows);
      for (int64_t i = 0; i < extent_; ++i) {
        const double left = i < columns ? 1 / std::sqrt(want[i * padded_ + i]) : 0;
        if (i < columns) expect.near(d[b * columns + i], left, 2e-6 * left);
        for (int64_t j = 0; j < extent_; ++j) {
          const bool is_inside = i < columns && j < columns && i != j;
          const double value =
              is_inside ? want[i * padded_ + j] * left / std::sqrt(want[j * padded_ + j]) : i == j;
          expect.near(got[(b * extent_ + i) * extent_ + j], value, is_inside ? 4e-6 : 0);
        }
      }
    }
  }

  void check_least_pivot(const Buffer<float>& M) {
    const Buffer<uint32_t> largest{std::vector<uint32_t>(1)};
    LORAX_RUN(launch_least_pivot(M.data(), largest.data(), shape_.batch, extent_, nullptr));
    const std::vector<float> m = M.read();
    uint32_t want = 0;
    for (int64_t d = 0; d < shape_.batch * extent_; ++d) {
      const float diagonal = m[d * extent_ + d % extent_];
      const float counted = diagonal < 0.75f ? INFINITY : diagonal;
      uint32_t bits;
      std::memcpy(&bits, &counted, sizeof(bits));
      want = std::max(want, bits);
    }
    Expect expect("least_pivot_kernel, %ld columns", shape_.columns);
    expect.same(largest.read()[0], want);
  }

  void check_cholesky(const Buffer<float>& G) {
    const std::vector<float> A = G.read();
    const Buffer<float> steps(shape_.batch * step_elements(extent_));
    const Buffer<unsigned char> room(sizeof(Factorization));
    auto* where = reinterpret_cast<Factorization*>(room.data());
    const Factorization state{G.data(), steps.data(), extent_, kFloor};
    LORAX_RUN(launch_cholesky_start(state, where, shape_.batch, nullptr));
    LORAX_RUN(launch_cholesky_steps(where, shape_.batch, extent_, nullptr));
    const std::vector<float> got = G.read();
    Expect expect("factor_kernel, panel_kernel, update_kernel, %ld columns", shape_.columns);
    for (int64_t b = 0; b < shape_.batch; ++b) {
      const int64_t start = b * extent_ * extent_;
      const std::vector<double> want = inverse_factor(&A[start], extent_);
      for (int64_t e = 0; e < extent_ * extent_; ++e) {
        if (e % extent_ <= e / extent_) expect.near(got[start + e], want[e], 1e-4);
      }
    }
  }

  // R = D M^T times 2^3 as two pieces; the diagonal elsewhere if it is not among them.
  void check_triangle(const Buffer<float>& M, const Buffer<float>& normalizer, bool has_diagonal) {
    const auto [batch, rows, columns] = shape_;
    const Buffer<__half> stack(batch * 2 * padded_ * padded_);
    const Buffer<float> gain(batch * columns);
    LORAX_RUN(launch_triangle_pieces(M.data(), normalizer.data(), stack.data(),
                                     has_diagonal ? nullptr : gain.data(), batch, columns, extent_,
                                     nullptr));
    const std::vector<float> m = M.read(), d = normalizer.read();
    const std::vector<float> gains = has_diagonal ? std::vector<float>() : gain.read();
    const std::vector<__half> got = stack.read();
    Expect expect("triangle_pieces_kernel, %ld columns", columns);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = 0; i < padded_; ++i) {
        for (int64_t j = 0; j < padded_; ++j) {
          double want = 0;
          if (i <= j && j < columns) {
            want = static_cast<double>(m[(b * extent_ + j) * extent_ + i]) * d[b * columns + i];
          }
          if (!has_diagonal && i == j) {
            if (i < columns) expect.near(gains[b * columns + i], want, 1e-7 * std::fabs(want));
            want = 0;
          }
          const int64_t second = (b * 2 * padded_ + i) * padded_ + j;
          const double sum = static_cast<double>(__half2float(got[second])) +
                             __half2float(got[second + padded_ * padded_]);
          expect.near(sum, 8 * want, 8 * std::fabs(want) * 0x1p-21 + 0x1p-25);
        }
      }
    }
  }

  const Shape shape_;
  const int parts_;
  const int64_t padded_, extent_;
  std::vector<float> x_;
  std::vector<double> sums_;  // of two pieces, over 2^14
  const Buffer<float> X_, scale_, square_, T_;
};

// Noise where a column was left out, or is longer or shorter than one and the factorisation did not
// rule that out; NaN stays.
void check_mend(const Shape& shape) {
  const auto [batch, rows, columns] = shape;
  const int64_t extent = factor_extent(columns);
  std::vector<float> q = normals(shape.size()), m(batch * extent * extent);
  const auto is_left = [](int64_t column) { return column % 5 == 1; };
  for (int64_t e = 0; e < shape.size(); ++e) {
    const int64_t column = e % columns;
    q[e] /= std::sqrt(static_cast<float>(rows)) * (column == 3 || column == 8 ? 0.5f : 1.f);
    if (column == 4 && e / columns % rows == 0) q[e] = NAN;
    if (column == 7) q[e] = 0;
  }
  // Columns 2, 3 and 4 had a small pivot, column 7 lies along one that had; nothing is held against
  // column 8. What is right of the diagonal is not to be looked at.
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < extent; ++i) {
      float* row = &m[(b * extent + i) * extent];
      row[i] = is_left(i) ? kLeftOut : i >= 2 && i <= 4 ? 150.f : 1.f;
      if (i == 7) row[2] = -150.f;
      for (int64_t j = i + 1; j < extent; ++j) row[j] = 1e6f;
    }
  }
  const Buffer<float> M(m), Q(q);
  const uint32_t seed = 3;
  LORAX_RUN(launch_mend_columns(M.data(), Q.data(), batch, rows, columns, extent, seed, nullptr));
  const std::vector<float> got = Q.read();
  const double amplitude = std::sqrt(3.0 / static_cast<double>(rows));
  Expect expect("mend_columns_kernel, %ldx%ld", rows, columns);
  for (int64_t e = 0; e < shape.size(); ++e) {
    const int64_t column = e % columns;
    const bool is_mended = column != 4 && (is_left(column) || column == 3 || column == 7);
    expect.near(got[e], is_mended ? amplitude * noise_of(e / columns % rows, column, seed) : q[e],
                is_mended ? 1e-6 : 0);
  }
}

}  // namespace

void check_factor() {
  for (const int64_t columns : {1, 63, 199}) {
    check_mirror<float>(2, columns);
    check_mirror<double>(2, columns);
    check_strips(2, columns);
  }
  Pass({1, 1, 1}, 1).check();
  Pass({3, 199, 63}, 1).check();
  Pass({2, 1025, 199}, 5).check();
  check_mend({2, 1025, 63});
  check_mend({3, 199, 130});
}

}  // namespace lorax::check
