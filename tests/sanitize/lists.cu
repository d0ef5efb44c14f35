// SPDX-License-Identifier: Apache-2.0
// Kernels that take lists in their parameters: conversions of matrices, uploads of pointers.
#include <memory>

#include "check.h"
#include "kernels/convert.cuh"
#include "kernels/pointers.cuh"

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
  check_pointers();
}

}  // namespace lorax::check
