// SPDX-License-Identifier: Apache-2.0
// P_i (Q_i^T B_i) for lists of blocks and bases: two batched cuBLAS products for all layers of one
// shape. What cuBLAS cannot read as it lies is converted in one launch before, and results that it
// cannot write in one after.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"
#include "kernels/convert.cuh"
#include "kernels/pointers.cuh"
#include "ops.h"

namespace lorax {
namespace {

// Converted bases live in scratch memory of about this size, some layers at a time.
constexpr int64_t kScratchBytes = int64_t{512} << 20;

bool fits_int(int64_t x) { return x <= std::numeric_limits<int>::max(); }

bool is_float(const at::Tensor& x) {
  const auto type = x.scalar_type();
  return type == at::kBFloat16 || type == at::kHalf || type == at::kFloat || type == at::kDouble;
}

void check_entry(size_t i, const at::Tensor& B, const at::Tensor& Q, const at::Tensor& P,
                 c10::Device device) {
  TORCH_CHECK_VALUE(B.dim() == 2 && Q.dim() == 2 && P.dim() == 2, "entry ", i,
                    ": block and bases must be matrices, got shapes ", B.sizes(), ", ", Q.sizes(),
                    " and ", P.sizes());
  TORCH_CHECK_TYPE(is_float(B) && is_float(Q) && is_float(P), "entry ", i,
                   ": block and bases must be floating point of 16 to 64 bits, got ",
                   B.scalar_type(), ", ", Q.scalar_type(), " and ", P.scalar_type());
  TORCH_CHECK_VALUE(B.size(0) == Q.size(0), "entry ", i,
                    ": rows of the block and of its read basis must agree, got ", B.size(0),
                    " and ", Q.size(0));
  TORCH_CHECK_VALUE(Q.size(1) == P.size(1), "entry ", i,
                    ": ranks of the two bases must agree, got ", Q.size(1), " and ", P.size(1));
  TORCH_CHECK_VALUE(B.device() == device && Q.device() == device && P.device() == device, "entry ",
                    i, ": block and bases must be on ", device, " as the first block, got ",
                    B.device(), ", ", Q.device(), " and ", P.device());
  TORCH_CHECK_VALUE(fits_int(B.numel()) && fits_int(Q.numel()) && fits_int(P.numel()) &&
                        fits_int(P.size(0) * B.size(1)),
                    "entry ", i, ": matrices must have under 2^31 elements");
}

Float float_of(at::ScalarType type) {
  switch (type) {
    case at::kBFloat16:
      return Float::kBFloat16;
    case at::kHalf:
      return Float::kFloat16;
    case at::kFloat:
      return Float::kFloat32;
    default:
      return Float::kFloat64;
  }
}

// How an entry is multiplied.
struct Precision {
  at::ScalarType type;
  cublasComputeType_t compute;
};

// One 16-bit dtype is multiplied in it. A bfloat16 block with wider bases takes float32 sums, far
// below its result's rounding; not TF32, whose own rounding shows where a result that bfloat16
// holds exactly is left, as with a basis of the whole space. For anything else float32 is not
// enough: a batched product adds up a column in one float32 sum, ten times as wrong as PyTorch's
// split ones.
Precision precision_of(at::ScalarType block, at::ScalarType read, at::ScalarType write) {
  const bool is_half = block == at::kBFloat16 || block == at::kHalf;
  if (is_half && read == block && write == block) return {block, CUBLAS_COMPUTE_32F};
  if (block == at::kBFloat16) return {at::kFloat, CUBLAS_COMPUTE_32F};
  return {at::kDouble, CUBLAS_COMPUTE_64F};
}

cudaDataType_t cublas_type(at::ScalarType type) {
  switch (type) {
    case at::kBFloat16:
      return CUDA_R_16BF;
    case at::kHalf:
      return CUDA_R_16F;
    case at::kFloat:
      return CUDA_R_32F;
    default:
      return CUDA_R_64F;
  }
}

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A matrix as cuBLAS reads it, or will once it was converted.
struct Operand {
  const void* data;    // null where it has to be converted
  bool is_transposed;  // its columns are what lies together
  int64_t stride;      // from one row, or column, to the next
  Conversion source;   // without its target
  int64_t bytes;       // of that

  Operand(const at::Tensor& x, at::ScalarType type) {
    const int64_t element = c10::elementSize(type), vector = 16 / element;
    is_transposed = x.stride(0) == 1 && (x.stride(1) != 1 || x.size(1) == 1);
    const int across = is_transposed ? 1 : 0, along = 1 - across;
    const void* from = x.const_data_ptr();
    stride = x.size(across) == 1 ? round_up(x.size(along), vector) : x.stride(across);
    bytes = 0;
    // Batched products assume vectors of 16 bytes without looking at the pointers.
    const bool is_ready = x.scalar_type() == type && (x.stride(along) == 1 || x.size(along) == 1) &&
                          stride >= x.size(along) && stride % vector == 0 && fits_int(stride) &&
                          reinterpret_cast<uintptr_t>(from) % 16 == 0;
    data = is_ready ? from : nullptr;
    if (is_ready) return;
    source = {from,
              nullptr,
              x.stride(across),
              x.stride(along),
              stride = round_up(x.size(along), vector),
              int(x.size(across)),
              int(x.size(along)),
              float_of(x.scalar_type()),
              float_of(type)};
    bytes = round_up(x.size(across) * stride * element, 16);
  }
};

struct Layer {
  Operand B, Q, P;
  bool is_one_basis;
  void* out;
  Float out_type;
  int m, p, k, r;
};

// What the layers of one batched product have in common.
using Place = std::tuple<bool, int64_t, int64_t>;
Place place_of(const Operand& x) { return {x.is_transposed, x.stride, x.bytes}; }
using Shape = std::tuple<at::ScalarType, cublasComputeType_t, Float, int, int, int, int, Place,
                         Place, Place, bool>;

class Batch {
 public:
  Batch(const Shape& shape, const std::vector<Layer>& layers, const at::TensorOptions& options)
      : type_(std::get<0>(shape)),
        compute_(std::get<1>(shape)),
        layers_(layers),
        options_(options.dtype(at::kByte)),
        element_(c10::elementSize(type_)),
        vector_(16 / element_) {
    const Layer& x = layers[0];
    row_ = round_up(x.r, vector_);
    coordinates_ = round_up(x.k * row_ * element_, 16);
    // Results have rows of r elements in the block's dtype; cuBLAS writes whole vectors of its own.
    is_direct_ = row_ == x.r && x.out_type == float_of(type_);
    out_ = is_direct_ ? 0 : round_up(x.p * row_ * element_, 16);
  }

  void run(cudaStream_t stream) const {
    const Layer& x = layers_[0];
    const int64_t each = x.B.bytes + x.Q.bytes + (x.is_one_basis ? 0 : x.P.bytes) + out_;
    const auto some =
        size_t(each == 0 ? layers_.size() : std::max<int64_t>(1, kScratchBytes / each));
    for (size_t first = 0; first < layers_.size(); first += some) {
      run(first, std::min(some, layers_.size() - first), each, stream);
    }
  }

 private:
  // Scratch memory goes back to a stream-ordered allocator while the products are queued.
  void run(size_t first, size_t count, int64_t each, cudaStream_t stream) const {
    const int64_t pointer_bytes = round_up(int64_t(5 * count * sizeof(void*)), 16);
    const at::Tensor scratch =
        at::empty({pointer_bytes + int64_t(count) * (each + coordinates_)}, options_);
    auto* next = static_cast<char*>(scratch.mutable_data_ptr()) + pointer_bytes;
    const auto take = [&](int64_t bytes) { return std::exchange(next, next + bytes); };
    std::vector<const void*> pointers(5 * count);
    std::vector<Conversion> before, after;
    const auto place = [&](const Operand& x) -> const void* {
      if (x.data != nullptr) return x.data;
      before.push_back(x.source);
      return before.back().to = take(x.bytes);
    };
    for (size_t i = 0; i < count; ++i) {
      const Layer& x = layers_[first + i];
      pointers[i] = place(x.B);
      pointers[count + i] = place(x.Q);
      pointers[2 * count + i] = take(coordinates_);
      pointers[3 * count + i] = x.is_one_basis ? pointers[count + i] : place(x.P);
      pointers[4 * count + i] = x.out;
      if (is_direct_) continue;
      pointers[4 * count + i] = take(out_);
      after.push_back(
          {pointers[4 * count + i], x.out, row_, 1, x.r, x.p, x.r, float_of(type_), x.out_type});
    }
    auto** device = static_cast<const void**>(scratch.mutable_data_ptr());
    C10_CUDA_CHECK(upload_pointers(pointers, device, stream));
    C10_CUDA_CHECK(launch_conversions(before, stream));
    const Layer& x = layers_[first];
    // A row-major product is the column-major product of the transposes in the other order:
    // C^T = B^T Q, then out^T = C^T P^T.
    multiply(x.B.is_transposed, !x.Q.is_transposed, x.r, x.k, x.m, device, x.B.stride,
             device + count, x.Q.stride, device + 2 * count, int(count));
    multiply(false, x.P.is_transposed, x.r, x.p, x.k, device + 2 * count, row_, device + 3 * count,
             x.P.stride, device + 4 * count, int(count));
    C10_CUDA_CHECK(launch_conversions(after, stream));
  }

  void multiply(bool transpose_left, bool transpose_right, int rows, int columns, int inner,
                const void** left, int64_t left_stride, const void** right, int64_t right_stride,
                const void** target, int count) const {
    const cublasHandle_t handle = at::cuda::getCurrentCUDABlasHandle();
    const cudaDataType_t type = cublas_type(type_);
    const bool is_double = type_ == at::kDouble;
    const float one = 1.0f, zero = 0.0f;
    const double one_double = 1.0, zero_double = 0.0;
    const auto scalar = [&](const float& x, const double& y) {
      return is_double ? static_cast<const void*>(&y) : &x;
    };
    LORAX_CUBLAS_CHECK(cublasGemmBatchedEx(
        handle, transpose_left ? CUBLAS_OP_T : CUBLAS_OP_N,
        transpose_right ? CUBLAS_OP_T : CUBLAS_OP_N, rows, columns, inner, scalar(one, one_double),
        left, type, int(left_stride), right, type, int(right_stride), scalar(zero, zero_double),
        const_cast<void**>(target), type, int(row_), count, compute_, CUBLAS_GEMM_DEFAULT));
  }

  at::ScalarType type_;
  cublasComputeType_t compute_;
  const std::vector<Layer>& layers_;
  at::TensorOptions options_;
  int64_t element_, vector_;
  int64_t row_;                // elements of a row of C and of what cuBLAS writes
  int64_t coordinates_, out_;  // bytes of a layer
  bool is_direct_;
};

}  // namespace

std::vector<at::Tensor> project(at::TensorList blocks, at::TensorList read, at::TensorList write) {
  TORCH_CHECK_VALUE(blocks.size() == read.size() && blocks.size() == write.size(),
                    "blocks, read and write bases must be lists of one length, got ", blocks.size(),
                    ", ", read.size(), " and ", write.size());
  if (blocks.empty()) return {};
  const size_t count = blocks.size();
  const c10::Device device = blocks[0].device();
  const c10::cuda::CUDAGuard guard(device);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  for (size_t i = 0; i < count; ++i) check_entry(i, blocks[i], read[i], write[i], device);

  std::vector<at::Tensor> outputs;
  outputs.reserve(count);
  std::map<Shape, std::vector<Layer>> batches;
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor &B = blocks[i], &Q = read[i], &P = write[i];
    // Each its own memory, as results of an op must be; past the dispatcher, which would take
    // longer than the allocator.
    outputs.push_back(
        at::detail::empty_cuda({P.size(0), B.size(1)}, B.scalar_type(), device, std::nullopt));
    void* out = outputs.back().mutable_data_ptr();
    if (B.size(1) == 0 || P.size(0) == 0) continue;
    if (B.size(0) == 0 || Q.size(1) == 0) {
      const int64_t bytes = P.size(0) * B.size(1) * int64_t(B.element_size());
      C10_CUDA_CHECK(cudaMemsetAsync(out, 0, bytes, stream));
      continue;
    }
    const auto [type, compute] = precision_of(B.scalar_type(), Q.scalar_type(), P.scalar_type());
    const Layer x{Operand(B, type),
                  Operand(Q, type),
                  Operand(P, type),
                  P.is_same(Q),
                  out,
                  float_of(B.scalar_type()),
                  int(B.size(0)),
                  int(P.size(0)),
                  int(Q.size(1)),
                  int(B.size(1))};
    const Shape shape(type, compute, x.out_type, x.m, x.p, x.k, x.r, place_of(x.B), place_of(x.Q),
                      place_of(x.P), x.is_one_basis);
    batches[shape].push_back(x);
  }
  for (const auto& [shape, layers] : batches) {
    Batch(shape, layers, blocks[0].options()).run(stream);
  }
  return outputs;
}

}  // namespace lorax
