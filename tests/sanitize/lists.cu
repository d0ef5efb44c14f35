// SPDX-License-Identifier: Apache-2.0
// Kernels that take lists in their parameters: conversions and stacks of matrices, uploads of
// pointers.
#include <memory>

#include "check.h"
#include "kernels/convert.cuh"
#include "kernels/pointers.cuh"
#include "kernels/stack.cuh"

namespace lorax::check {
namespace {

// A matrix of `From` with some layout into one of `To`, in a list with others.
struct Converted {
  Conversion entry;
  std::function<void(Expect&)> check;
};

template <typename To, typename From>
Converted conversion(Float to_type, Float from_type, int rows, int columns, bool is_transposed) {
  const int64_t from_row = is_transposed ? 1 : columns + 3;
  const int64_t from_column = is_transposed ? rows + 1 : 1;
  // Gaps in the result stay what they were, which only poison shows.
  const int64_t to_row = columns + (is_poisoned ? 2 : 0);
  const std::vector<float> values =
      normals(is_transposed ? int64_t{columns} * (rows + 1) : int64_t{rows} * (columns + 3));
  std::vector<From> from(values.size());
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<From>(values[i]);
  const auto source = std::make_shared<Buffer<From>>(from, 1);
  const auto target = std::make_shared<Buffer<To>>(rows * to_row, 1);
  const Conversion entry{source->data(), target->data(), from_row,  from_column, to_row,
                         rows,           columns,        from_type, to_type};
  return {entry, [=](Expect& expect) {
            const std::vector<To> got = target->read();
            for (int64_t e = 0; e < rows * to_row; ++e) {
              const int64_t i = e / to_row, j = e % to_row;
              const double want = j < columns ? widened(static_cast<To>(static_cast<float>(
                                                    widened(from[i * from_row + j * from_column]))))
                                              : NAN;
              expect.same(widened(got[e]), want);
            }
            (void)source;
          }};
}

template <typename To>
void add_conversions(Float to, std::vector<Converted>& list) {
  list.push_back(conversion<To, __nv_bfloat16>(to, Float::kBFloat16, 63, 7, true));
  list.push_back(conversion<To, __half>(to, Float::kFloat16, 1, 199, false));
  list.push_back(conversion<To, float>(to, Float::kFloat32, 199, 63, true));
  list.push_back(conversion<To, double>(to, Float::kFloat64, 1025, 7, false));
}

void check_conversions() {
  std::vector<Converted> matrices;
  add_conversions<__nv_bfloat16>(Float::kBFloat16, matrices);
  add_conversions<__half>(Float::kFloat16, matrices);
  add_conversions<float>(Float::kFloat32, matrices);
  add_conversions<double>(Float::kFloat64, matrices);
  // More than one launch takes.
  const std::vector<float> values = normals(kConversions);
  const Buffer<float> from(values);
  const Buffer<double> to(kConversions);
  std::vector<Conversion> list;
  for (const Converted& matrix : matrices) list.push_back(matrix.entry);
  for (int i = 0; i < kConversions; ++i) {
    list.push_back(
        {from.data() + i, to.data() + i, 1, 1, 1, 1, 1, Float::kFloat32, Float::kFloat64});
  }
  LORAX_RUN(launch_conversions(list, nullptr));
  for (const Converted& matrix : matrices) {
    Expect expect("convert_kernel, %dx%d", matrix.entry.rows, matrix.entry.columns);
    matrix.check(expect);
  }
  const std::vector<double> got = to.read();
  Expect expect("convert_kernel, single elements");
  for (int i = 0; i < kConversions; ++i) expect.same(got[i], values[i]);
}

// A matrix in parts that add up to it, into others: side by side, or one below the other.
template <typename To, typename From>
void check_parts(Float to_type, Float from_type, int from_parts, int to_parts, bool is_beside) {
  const int rows = 63, columns = 7;
  const int64_t from_row = columns + 3, from_part = rows * from_row + 1;
  const int64_t to_part = is_beside ? columns : rows * columns;
  const int64_t to_row = is_beside ? to_parts * columns : columns;
  const std::vector<float> values = normals(from_parts * from_part);
  std::vector<From> from(values.size());
  for (size_t i = 0; i < from.size(); ++i) {
    const double share = std::pow(0x1p-8, static_cast<double>(i / from_part));
    from[i] = static_cast<From>(static_cast<float>(values[i] * share));
  }
  const Buffer<From> source(from);
  const Buffer<To> target(int64_t{to_parts} * rows * columns);
  LORAX_RUN(launch_conversions({{source.data(), target.data(), from_row, 1, to_row, rows, columns,
                                 from_type, to_type, from_parts, to_parts, from_part, to_part}},
                               nullptr));
  const std::vector<To> got = target.read();
  const double left = std::pow(std::is_same_v<To, float> ? 0x1p-24 : 0x1p-8, to_parts);
  Expect expect("convert_kernel, %d parts to %d", from_parts, to_parts);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double want = 0, sum = 0, size = 0;
      for (int p = 0; p < from_parts; ++p) {
        const double part = widened(from[i * from_row + j + p * from_part]);
        want += part;
        size += std::fabs(part);
      }
      for (int p = 0; p < to_parts; ++p) sum += widened(got[i * to_row + j + p * to_part]);
      expect.near(sum, want, std::fabs(want) * left + size * kUlp);
    }
  }
}

// Matrices that lie in one buffer, `gap` elements apart; more of them than one launch takes if
// there are so many. The last element of the second is its largest, the first of the last is NaN.
template <typename T>
void check_stack(int matrices, int64_t count, int64_t gap) {
  std::vector<float> values = normals(matrices * (count + gap));
  values[2 * count + gap - 1] = -60000.f;
  values[(matrices - 1) * (count + gap)] = NAN;
  std::vector<T> from(values.size());
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<T>(values[i]);
  const Buffer<T> source(from);
  const Buffer<__half> to(matrices * count);
  const Buffer<uint32_t> largest{std::vector<uint32_t>(matrices)};
  std::vector<StackEntry> entries;
  for (int b = 0; b < matrices; ++b) {
    entries.push_back(
        {source.data() + b * (count + gap), std::ldexp(1.f, b % 5), std::ldexp(1.f, -b % 7)});
  }
  LORAX_RUN(launch_stack_halves<T>(entries, to.data(), largest.data(), count, nullptr));
  const std::vector<__half> got = to.read();
  const std::vector<uint32_t> bits = largest.read();
  Expect expect("stack_halves_kernel, %d of %ld elements", matrices, count);
  for (int64_t e = 0; e < matrices * count; ++e) {
    const int64_t b = e / count;
    const double value = std::ldexp(widened(from[e + b * gap]), static_cast<int>(b % 5 - b % 7));
    expect.same(widened(got[e]), widened(__float2half(static_cast<float>(value))));
  }
  Expect expect_largest("stack_halves_kernel, largest of %d of %ld elements", matrices, count);
  for (int b = 0; b < matrices; ++b) {
    double want = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double size = std::fabs(widened(from[b * (count + gap) + i]));
      if (std::isnan(size) || size > want) want = size;
    }
    float found;
    std::memcpy(&found, &bits[b], sizeof(found));
    expect_largest.same(found, want);
  }
}

void check_pointers() {
  const int count = kUploadPointers + 63;
  std::vector<const void*> pointers(count);
  for (int i = 0; i < count; ++i) pointers[i] = reinterpret_cast<const void*>(uintptr_t(i) * 24);
  const Buffer<const void*> target(count);
  LORAX_RUN(upload_pointers(pointers, target.data(), nullptr));
  const std::vector<const void*> got = target.read();
  Expect expect("upload_pointers_kernel");
  for (int i = 0; i < count; ++i) {
    expect.same(static_cast<double>(reinterpret_cast<uintptr_t>(got[i])), i * 24.0);
  }
}

}  // namespace

void check_lists() {
  check_conversions();
  check_parts<__nv_bfloat16, float>(Float::kBFloat16, Float::kFloat32, 1, 3, true);
  check_parts<__nv_bfloat16, double>(Float::kBFloat16, Float::kFloat64, 1, 2, false);
  check_parts<__nv_bfloat16, __half>(Float::kBFloat16, Float::kFloat16, 1, 2, true);
  check_parts<__nv_bfloat16, __nv_bfloat16>(Float::kBFloat16, Float::kBFloat16, 2, 3, true);
  check_parts<float, __nv_bfloat16>(Float::kFloat32, Float::kBFloat16, 3, 1, false);
  check_stack<__half>(3, 1024, 0);
  check_stack<__nv_bfloat16>(3, 1032, 8);
  check_stack<__nv_bfloat16>(2, 1025, 0);
  check_stack<__half>(kStackEntries + 3, 7, 2);
  check_pointers();
}

}  // namespace lorax::check
