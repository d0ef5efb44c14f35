// SPDX-License-Identifier: Apache-2.0
// Splits of blocks into 16-bit pieces, and the scales of their columns.
#include "check.h"
#include "kernels/columns.cuh"

namespace lorax::check {
namespace {

PieceLayout side_by_side(const Shape& shape, int count) {
  const int64_t padded = padded_columns(shape.columns);
  return {count * padded, padded, shape.rows * count * padded};
}

// Pieces add up to want(b, i, j), each rounding leaving 2^-8 (bfloat16) or 2^-11 (float16) of what
// was there, or 2^-25; columns added by padding are zeros.
template <typename Piece>
void expect_pieces(Expect& expect, const std::vector<Piece>& got, int64_t start, const Shape& shape,
                   int count, PieceLayout at,
                   const std::function<double(int64_t, int64_t, int64_t)>& want) {
  const bool is_half = std::is_same_v<Piece, __half>;
  const double share = std::pow(is_half ? 0x1p-11 : 0x1p-8, count);
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t i = 0; i < shape.rows; ++i) {
      for (int64_t j = 0; j < padded_columns(shape.columns); ++j) {
        const int64_t first = start + b * at.batch_stride + i * at.row_stride + j;
        double sum = 0;
        for (int p = 0; p < count; ++p) sum += widened(got[first + p * at.piece_stride]);
        if (j >= shape.columns) {
          expect.same(sum, 0);
          continue;
        }
        const double all = want(b, i, j);
        expect.near(sum, all, std::fabs(all) * (share + 2 * kUlp) + (is_half ? 0x1p-25 : 0));
      }
    }
  }
}

void check_split_bfloat16(const Shape& shape, int count, int offset) {
  const std::vector<float> x = blocks(shape);
  const PieceLayout at = side_by_side(shape, count);
  const Buffer<float> X(x, offset);
  const Buffer<__nv_bfloat16> pieces(shape.batch * at.batch_stride);
  LORAX_RUN(launch_split<__nv_bfloat16, Scaling::kNone>(X.data(), nullptr, nullptr, pieces.data(),
                                                        count, shape.batch, shape.rows,
                                                        shape.columns, at, 0, nullptr));
  Expect expect("split_kernel, %d bfloat16, %ld rows", count, shape.rows);
  expect_pieces(expect, pieces.read(), 0, shape, count, at, [&](int64_t b, int64_t i, int64_t j) {
    return x[(b * shape.rows + i) * shape.columns + j];
  });
}

// By 2^11, then again where that does not suit; `is_stacked`: the second piece above the first.
void check_split_block(const Shape& shape, int count, int offset, bool is_stacked) {
  const std::vector<float> x = blocks(shape);
  const std::vector<uint32_t> bits = largest_bits(x, shape.batch);
  const int64_t padded = padded_columns(shape.columns), depth = shape.rows;
  const PieceLayout at = is_stacked ? PieceLayout{padded, -depth * padded, 2 * depth * padded}
                                    : side_by_side(shape, count);
  const int64_t start = is_stacked ? depth * padded : 0;
  const Buffer<float> X(x, offset);
  const Buffer<uint32_t> largest{std::vector<uint32_t>(shape.batch)};
  const Buffer<__half> pieces(shape.batch * at.batch_stride);
  __half* to = pieces.data() + start;
  LORAX_RUN(launch_split<__half, Scaling::kBlock>(X.data(), nullptr, largest.data(), to, count,
                                                  shape.batch, shape.rows, shape.columns, at, 0,
                                                  nullptr));
  LORAX_RUN(launch_split<__half, Scaling::kAgain>(X.data(), nullptr, largest.data(), to, count,
                                                  shape.batch, shape.rows, shape.columns, at, 0,
                                                  nullptr));
  Expect expect("split_kernel, %d float16, %ld rows", count, shape.rows);
  const std::vector<uint32_t> found = largest.read();
  for (int64_t b = 0; b < shape.batch; ++b) expect.same(found[b], bits[b]);
  expect_pieces(expect, pieces.read(), start, shape, count, at,
                [&](int64_t b, int64_t i, int64_t j) {
                  return x[(b * shape.rows + i) * shape.columns + j] * suits(bits[b]);
                });
}

// Scales of columns of all sizes, one of zeros and one with a NaN; then the columns as pieces.
void check_columns(const Shape& shape, int count, int offset) {
  const auto [batch, rows, columns] = shape;
  std::vector<float> x = normals(shape.size());
  for (int64_t i = 0; i < shape.size(); ++i) {
    const int64_t column = i % columns;
    x[i] = column == 1 ? 0 : x[i] * std::pow(10.f, static_cast<float>(column % 7 - 3));
    if (column == 2 && i / columns % rows == rows / 2) x[i] = NAN;
  }
  const Buffer<float> X(x, offset), scale(batch * columns), square(batch * columns);
  const Buffer<double> partial(batch * norm_chunks(rows) * columns);
  LORAX_RUN(launch_column_scales(X.data(), partial.data(), scale.data(), square.data(), batch, rows,
                                 columns, 0.f, nullptr));
  const std::vector<float> scales = scale.read(), squares = square.read();
  {
    Expect expect("column_norms_kernel, column_scales_kernel, %ldx%ld", rows, columns);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t j = 0; j < columns; ++j) {
        double sum = 0;
        for (int64_t i = 0; i < rows; ++i) {
          const double v = x[(b * rows + i) * columns + j];
          sum += v * v;
        }
        const int e = sum > 0 ? std::ilogb(std::sqrt(sum)) + 1 : 0;
        const bool is_nan = std::isnan(sum), is_dead = sum == 0;
        expect.same(scales[b * columns + j], is_dead ? 0 : is_nan ? 1 : std::ldexp(1.0, 14 - e));
        expect.near(squares[b * columns + j], is_dead ? -1 : std::ldexp(sum, -2 * e), kUlp);
      }
    }
  }
  const uint32_t seed = 5;
  const PieceLayout at = side_by_side(shape, count);
  const Buffer<__half> pieces(batch * at.batch_stride);
  LORAX_RUN(launch_split<__half, Scaling::kColumns>(X.data(), scale.data(), nullptr, pieces.data(),
                                                    count, batch, rows, columns, at, seed,
                                                    nullptr));
  const double amplitude = std::ldexp(std::sqrt(3.0 / static_cast<double>(rows)), 14);
  Expect expect("split_kernel, %d float16 of columns, %ldx%ld", count, rows, columns);
  expect_pieces(expect, pieces.read(), 0, shape, count, at, [&](int64_t b, int64_t i, int64_t j) {
    const double by = scales[b * shape.columns + j];
    if (by == 0) return amplitude * noise_of(i, j, seed);
    return x[(b * shape.rows + i) * shape.columns + j] * by;
  });
}

}  // namespace

void check_split() {
  for (const Shape& shape : kBlockShapes) {
    for (int count = 1; count <= 3; ++count) {
      const int offset = count == 3;  // an address that rules vectors out
      check_split_bfloat16(shape, count, offset);
      check_split_block(shape, count, offset, false);
      check_columns(shape, count, offset);
    }
    check_split_block({3, 64, shape.columns}, 2, 0, true);
  }
}

}  // namespace lorax::check
