// SPDX-License-Identifier: Apache-2.0
// Device buffers, random numbers and comparisons for the program that launches every kernel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace lorax::check {

// One function a family of kernels, each in a file of its name.
void check_split();
void check_merge();
void check_lists();
void check_factor();
void check_eigen();
void check_narrow();

// Outputs and scratch hold NaN before a launch, but where initcheck is to see what is never
// written: it takes a fill for a write.
inline bool is_poisoned = true;
inline int passed = 0, failed = 0;

inline void require(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  std::printf("%s: %s\n", call, cudaGetErrorString(status));
  std::exit(2);
}

#define LORAX_RUN(...) ::lorax::check::require((__VA_ARGS__), #__VA_ARGS__)

/// Device memory of its own, so that an overrun of one element leaves it.
///
/// `offset` elements lie before what data() points to: addresses that are not aligned.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count, int offset = 0) : count_(count), offset_(offset) {
    LORAX_RUN(cudaMalloc(&start_, bytes(count + offset)));
    if (is_poisoned) LORAX_RUN(cudaMemset(start_, 0xff, bytes(count + offset)));
  }
  explicit Buffer(const std::vector<T>& values, int offset = 0)
      : Buffer(static_cast<int64_t>(values.size()), offset) {
    LORAX_RUN(cudaMemcpy(data(), values.data(), bytes(count_), cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(start_); }

  T* data() const { return start_ + offset_; }
  // Waits for the device.
  std::vector<T> read() const {
    std::vector<T> values(count_);
    LORAX_RUN(cudaMemcpy(values.data(), data(), bytes(count_), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  static size_t bytes(int64_t count) { return static_cast<size_t>(count) * sizeof(T); }
  T* start_ = nullptr;
  int64_t count_;
  int offset_;
};

// One result: counted and, if an element of it is wrong, printed when it goes out of scope.
class Expect {
 public:
  __attribute__((format(printf, 2, 3))) explicit Expect(const char* format, ...) {
    char text[200];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    name_ = text;
  }
  Expect(const Expect&) = delete;
  Expect& operator=(const Expect&) = delete;
  ~Expect() {
    const bool is_good = wrong_ == 0 && count_ > 0;
    ++(is_good ? passed : failed);
    if (is_good) return;
    std::printf("WRONG %s: %ld of %ld%s\n", name_.c_str(), wrong_, count_, first_.c_str());
  }

  // NaN is near NaN alone.
  void near(double got, double want, double slack) {
    const bool is_near = std::isnan(want) ? std::isnan(got) : std::fabs(got - want) <= slack;
    if (!is_near && wrong_ == 0) {
      char text[200];
      std::snprintf(text, sizeof(text), "; element %ld is %.9g, not %.9g within %.2g", count_, got,
                    want, slack);
      first_ = text;
    }
    ++count_;
    wrong_ += !is_near;
  }
  void same(double got, double want) { near(got, want, 0); }

 private:
  std::string name_, first_;
  long count_ = 0, wrong_ = 0;
};

constexpr double kUlp = 0x1p-23;  // of float32

struct Shape {
  int64_t batch, rows, columns;
  int64_t size() const { return batch * rows * columns; }
};

inline std::mt19937_64& generator() {
  static std::mt19937_64 numbers(2026);
  return numbers;
}

inline std::vector<float> normals(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& x : values) x = normal(generator());
  return values;
}

inline double widened(__half x) { return __half2float(x); }
inline double widened(__nv_bfloat16 x) { return __bfloat162float(x); }
inline double widened(float x) { return x; }
inline double widened(double x) { return x; }

// left^T right of row-major matrices with `rows` rows, in double.
template <typename Left, typename Right>
std::vector<double> gram_of(const Left* left, int64_t left_columns, const Right* right,
                            int64_t right_columns, int64_t rows) {
  std::vector<double> sums(left_columns * right_columns);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < left_columns; ++i) {
      const double x = left[row * left_columns + i];
      for (int64_t j = 0; j < right_columns; ++j) {
        sums[i * right_columns + j] += x * static_cast<double>(right[row * right_columns + j]);
      }
    }
  }
  return sums;
}

template <typename T>
std::vector<double> transposed(const T* x, int64_t rows, int64_t columns) {
  std::vector<double> result(rows * columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) result[j * rows + i] = x[i * columns + j];
  }
  return result;
}

// Uniform noise in [-1, 1) as kernels make it from a position.
inline double noise_of(int64_t row, int64_t column, uint32_t seed) {
  uint32_t h = static_cast<uint32_t>(row) * 0x9E3779B1u ^
               (static_cast<uint32_t>(column) + 0x7F4A7C15u) * 0x85EBCA77u ^ seed * 0xC2B2AE3Du;
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = (h ^ (h >> 15)) * 0x846CA68Bu;
  h ^= h >> 16;
  return static_cast<int32_t>(h) / 2147483648.0;
}

// For splits and what undoes them: shapes, and blocks of several sizes, of which 2^11 suits the
// first and not the others.
constexpr Shape kBlockShapes[] = {{1, 1, 1}, {3, 63, 199}, {2, 199, 63}, {3, 1025, 64}};

inline std::vector<float> blocks(const Shape& shape) {
  const float sizes[] = {1.f, 1e6f, 1e-6f};
  std::vector<float> x = normals(shape.size());
  for (int64_t i = 0; i < shape.size(); ++i) x[i] *= sizes[i / (shape.rows * shape.columns) % 3];
  return x;
}

inline std::vector<uint32_t> largest_bits(const std::vector<float>& x, int64_t batch) {
  std::vector<uint32_t> bits(batch);
  const int64_t each = static_cast<int64_t>(x.size()) / batch;
  for (int64_t b = 0; b < batch; ++b) {
    float largest = 0;
    for (int64_t i = b * each; i < (b + 1) * each; ++i) {
      largest = std::max(largest, std::fabs(x[i]));
    }
    std::memcpy(&bits[b], &largest, sizeof(largest));
  }
  return bits;
}

// The power of two that suits a float16 block with this largest element.
inline double suits(uint32_t bits) {
  float largest;
  std::memcpy(&largest, &bits, sizeof(largest));
  if (largest == 0 || (largest >= 0x1p-8f && largest <= 16)) return 0x1p11;
  return std::ldexp(1.0, std::min(14 - std::ilogb(largest), 110));
}

}  // namespace lorax::check
