// SPDX-License-Identifier: Apache-2.0
// From products of pieces back to blocks, and shifts of blocks.
#include "check.h"
#include "kernels/merge.cuh"
#include "kernels/shift.cuh"
#include "kernels/subspace_error.cuh"

namespace lorax::check {
namespace {

void check_sum(const Shape& shape, int count, bool is_scaled) {
  const auto [batch, rows, columns] = shape;
  const int64_t padded = padded_columns(columns), wide = count * padded;
  const std::vector<float> t = normals(batch * rows * wide);
  const std::vector<uint32_t> bits = largest_bits(blocks(shape), batch);
  const Buffer<float> T(t), C(shape.size());
  const Buffer<uint32_t> largest(bits);
  LORAX_RUN(launch_merge(T.data(), is_scaled ? largest.data() : nullptr, C.data(), count, batch,
                         rows, columns, wide, padded, nullptr));
  const std::vector<float> got = C.read();
  Expect expect("merge_kernel, %d pieces, %ldx%ld", count, rows, columns);
  for (int64_t e = 0; e < shape.size(); ++e) {
    const int64_t row = e / columns, b = row / rows;
    const double factor = is_scaled ? 0x1p11 / suits(bits[b]) : 1;
    double sum = 0, size = 0;
    for (int p = 0; p < count; ++p) {
      const double v = t[row * wide + p * padded + e % columns];
      sum += v;
      size += std::fabs(v);
    }
    expect.near(got[e], sum * factor, 2 * kUlp * size * factor);
  }
}

void check_correct(const Shape& shape, bool has_other) {
  const auto [batch, rows, columns] = shape;
  const std::vector<float> c = normals(shape.size());
  const std::vector<uint32_t> bits = largest_bits(blocks(shape), batch);
  const std::vector<uint32_t> others(bits.rbegin(), bits.rend());
  const Buffer<float> C(c);
  const Buffer<uint32_t> largest(bits), also(others);
  LORAX_RUN(launch_correct(largest.data(), has_other ? also.data() : nullptr, C.data(), batch, rows,
                           columns, nullptr));
  const std::vector<float> got = C.read();
  Expect expect("correct_kernel, %ldx%ld", rows, columns);
  for (int64_t e = 0; e < shape.size(); ++e) {
    const int64_t b = e / columns / rows;
    const double factor = 0x1p11 / suits(bits[b]) * (has_other ? 0x1p11 / suits(others[b]) : 1);
    expect.same(got[e], c[e] * factor);
  }
}

void check_restore(const Shape& shape) {
  const auto [batch, rows, columns] = shape;
  const int64_t padded = padded_columns(columns);
  const std::vector<float> values = normals(batch * rows * 2 * padded);
  std::vector<__half> p(values.size());
  for (size_t i = 0; i < p.size(); ++i) p[i] = __float2half(values[i]);
  const std::vector<float> factors = normals(batch * columns);
  const Buffer<__half> pieces(p);
  const Buffer<float> gain(factors), Q(shape.size());
  LORAX_RUN(launch_restore(pieces.data(), gain.data(), Q.data(), batch, rows, columns, nullptr));
  const std::vector<float> got = Q.read();
  Expect expect("restore_kernel, %ldx%ld", rows, columns);
  for (int64_t e = 0; e < shape.size(); ++e) {
    const int64_t row = e / columns, j = e % columns, at = row * 2 * padded + j;
    const double by = factors[row / rows * columns + j] * 0x1p-14;
    const double left = __half2float(p[at]), right = __half2float(p[at + padded]);
    expect.near(got[e], (left + right) * by,
                2 * kUlp * (std::fabs(left) + std::fabs(right)) * std::fabs(by));
  }
}

void check_shift(const Shape& shape, int offset) {
  const auto [batch, rows, columns] = shape;
  const std::vector<float> z = normals(shape.size()), x = normals(shape.size());
  const std::vector<float> roots = normals(batch), factors = normals(batch * columns);
  const Buffer<float> Z(z, offset), X(x), a(roots), s(factors), out(shape.size());
  LORAX_RUN(launch_shift(Z.data(), X.data(), a.data(), s.data(), out.data(), batch, rows, columns,
                         nullptr));
  const std::vector<float> got = out.read();
  Expect expect("shift_kernel, %ldx%ld", rows, columns);
  for (int64_t e = 0; e < shape.size(); ++e) {
    const int64_t b = e / columns / rows;
    const double left = z[e], right = static_cast<double>(roots[b]) * x[e];
    const double by = factors[b * columns + e % columns];
    expect.near(got[e], (left - right) * by,
                2 * kUlp * (std::fabs(left) + std::fabs(right)) * std::fabs(by));
  }
}

void check_error(int64_t batch, int l, int k, bool is_full) {
  std::vector<float> c = normals(batch * l * (is_full ? l : 1)), t(batch * l);
  for (float& x : c) x = 1e-3f * std::fabs(x);
  for (int64_t e = 0; e < batch * l; ++e) t[e] = 2.f - static_cast<float>(e % l) / l;
  const Buffer<float> C(c), theta(t);
  const Buffer<double> error(3 * batch);
  LORAX_RUN(launch_subspace_error(C.data(), theta.data(), error.data(), is_full, batch, l, l, k,
                                  {1e-12, 1e-7, 1e-8}, nullptr));
  const std::vector<double> got = error.read();
  Expect expect("subspace_error_kernel, %d of %d values", k, l);
  for (int64_t b = 0; b < batch; ++b) {
    const auto own = [&](int i) -> double {
      return is_full ? c[(b * l + i) * l + i] : c[b * l + i];
    };
    const auto value = [&](int i) -> double { return t[b * l + i]; };
    const double end = value(l - 1) + (is_full ? std::sqrt(own(l - 1)) : 0);
    const double least = 1e-7 * 1e-12 * value(0);
    const double last = std::max(value(k - 1) - end, least);
    double sums[3] = {};
    for (int i = 0; i < k; ++i) {
      const double gap = std::max(value(i) - end, least), outside = own(i) / (gap * gap);
      double mixed = 0, rounded = 0;
      for (int j = k; j < l && is_full; ++j) {
        const double apart = value(i) - own(i) / std::max(value(i) - end, last) - value(j) -
                             own(j) / std::max(value(j) - end, last);
        const double tilt = c[(b * l + i) * l + j] / (gap * std::max(apart, 1e-300));
        const double turn = 1e-8 * std::sqrt(value(i) * value(j)) / (value(i) - value(j));
        mixed += tilt * tilt;
        rounded += turn * turn;
      }
      sums[0] += is_full ? std::min(1., outside + mixed + rounded) : outside;
      sums[1] += outside;
      sums[2] += std::min(1., mixed);
    }
    for (int s = 0; s < 3; ++s) {
      const double wanted = std::sqrt(2. / k * sums[s]);
      expect.near(got[s * batch + b], wanted, 1e-6 * wanted);
    }
  }
}

}  // namespace

void check_merge() {
  for (const bool is_full : {false, true}) {
    check_error(1, 1, 1, is_full);
    check_error(2, 63, 20, is_full);
    check_error(3, 199, 198, is_full);
  }
  for (const Shape& shape : kBlockShapes) {
    for (const bool flag : {false, true}) {
      check_sum(shape, 2, flag);
      check_sum(shape, 3, flag);
      check_correct(shape, flag);
      check_shift(shape, flag);
    }
    check_restore(shape);
  }
}

}  // namespace lorax::check
