// SPDX-License-Identifier: Apache-2.0
// P_i (Q_i^T B_i) for lists of blocks and bases: two batched cuBLAS products for all layers of one
// shape. What cuBLAS cannot read as it lies is converted in one launch before, and results that it
// cannot write in one after.
//
// A basis in two bfloat16 pieces is multiplied piece by piece into one sum. What it is multiplied
// by, a block or coordinates, is cut into as many pieces as hold it, side by side, so that a basis
// is read once for all of them.
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

// Tensor cores truncate their running sums, by up to 2^-24 every 16 rows. After as many rows as
// here ordinary arithmetic takes over, where more than bfloat16 is asked for: about 2^-18 is left.
constexpr int64_t kSumRows = 1024;

bool fits_int(int64_t x) { return x <= std::numeric_limits<int>::max(); }

bool is_float(const at::Tensor& x) {
  const auto type = x.scalar_type();
  return type == at::kBFloat16 || type == at::kHalf || type == at::kFloat || type == at::kDouble;
}

bool is_basis(const at::Tensor& x) {
  return x.dim() == 2 || (x.dim() == 3 && x.size(0) == 2 && x.scalar_type() == at::kBFloat16);
}

// Of a basis, whole or in pieces.
int64_t rows_of(const at::Tensor& basis) { return basis.size(-2); }
int64_t rank_of(const at::Tensor& basis) { return basis.size(-1); }

void check_entry(size_t i, const at::Tensor& B, const at::Tensor& Q, const at::Tensor& P,
                 c10::Device device) {
  TORCH_CHECK_TYPE(is_float(B) && is_float(Q) && is_float(P), "entry ", i,
                   ": block and bases must be floating point of 16 to 64 bits, got ",
                   B.scalar_type(), ", ", Q.scalar_type(), " and ", P.scalar_type());
  TORCH_CHECK_VALUE(B.dim() == 2 && is_basis(Q) && is_basis(P), "entry ", i,
                    ": block and bases must be matrices, or a basis two bfloat16 pieces "
                    "(2, rows, rank), got shapes ",
                    B.sizes(), ", ", Q.sizes(), " and ", P.sizes(), " in ", B.scalar_type(), ", ",
                    Q.scalar_type(), " and ", P.scalar_type());
  TORCH_CHECK_VALUE(B.size(0) == rows_of(Q), "entry ", i,
                    ": rows of the block and of its read basis must agree, got ", B.size(0),
                    " and ", rows_of(Q));
  TORCH_CHECK_VALUE(rank_of(Q) == rank_of(P), "entry ", i,
                    ": ranks of the two bases must agree, got ", rank_of(Q), " and ", rank_of(P));
  TORCH_CHECK_VALUE(B.device() == device && Q.device() == device && P.device() == device, "entry ",
                    i, ": block and bases must be on ", device, " as the first block, got ",
                    B.device(), ", ", Q.device(), " and ", P.device());
  TORCH_CHECK_VALUE(fits_int(B.numel()) && fits_int(Q.numel()) && fits_int(P.numel()) &&
                        fits_int(rows_of(P) * B.size(1)),
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
  int block_parts, parts;  // that the block, and the coordinates, are cut into
};

// Bases in two bfloat16 pieces stay on the tensor cores, with sums in float32 and as many pieces of
// the block as hold it; of coordinates at least two, so that only the result is rounded to 8 bits.
// One 16-bit dtype is multiplied in it. A bfloat16 block with wider bases takes float32 sums, far
// below its result's rounding; not TF32, whose own rounding shows where a result that bfloat16
// holds exactly is left, as with a basis of the whole space. For anything else float32 is not
// enough: a batched product adds up a column in one float32 sum, ten times as wrong as PyTorch's
// split ones.
Precision precision_of(at::ScalarType block, const at::Tensor& Q, const at::Tensor& P) {
  const at::ScalarType read = Q.scalar_type(), write = P.scalar_type();
  const bool in_pieces =
      read == at::kBFloat16 && write == at::kBFloat16 && (Q.dim() == 3 || P.dim() == 3);
  if (in_pieces && block != at::kDouble) {
    const int parts = block == at::kBFloat16 ? 1 : block == at::kHalf ? 2 : kMostParts;
    return {at::kBFloat16, CUBLAS_COMPUTE_32F, parts, std::max(parts, 2)};
  }
  const bool is_half = block == at::kBFloat16 || block == at::kHalf;
  if (is_half && read == block && write == block) return {block, CUBLAS_COMPUTE_32F, 1, 1};
  if (block == at::kBFloat16) return {at::kFloat, CUBLAS_COMPUTE_32F, 1, 1};
  return {at::kDouble, CUBLAS_COMPUTE_64F, 1, 1};
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
  const char* data;    // null where it has to be converted
  bool is_transposed;  // its columns are what lies together
  int64_t stride;      // from one row, or column, to the next
  int parts;           // that it is the sum of
  int64_t part;        // from one to the next, in bytes
  Conversion source;   // without its target
  int64_t bytes;       // of that

  // With `is_wide` parts are side by side, as columns of one matrix: a product takes them at once.
  Operand(const at::Tensor& x, at::ScalarType type, int parts, bool is_wide) : parts(parts) {
    const int64_t element = c10::elementSize(type), vector = 16 / element;
    const int first = int(x.dim()) - 2;
    is_transposed = x.stride(first) == 1 && (x.stride(first + 1) != 1 || x.size(first + 1) == 1);
    const int across = is_transposed ? first + 1 : first, along = 2 * first + 1 - across;
    const int64_t height = x.size(across), length = x.size(along);
    const int from_parts = first == 1 ? 2 : 1;
    const int64_t from_part = first == 1 ? x.stride(0) : 0;
    data = static_cast<const char*>(x.const_data_ptr());
    stride = height == 1 ? round_up(length, vector) : x.stride(across);
    part = from_part * element;
    bytes = 0;
    // Batched products assume vectors of 16 bytes without looking at the pointers.
    const bool is_ready = x.scalar_type() == type && parts == from_parts &&
                          (x.stride(along) == 1 || length == 1) && stride >= length &&
                          stride % vector == 0 && fits_int(stride) &&
                          reinterpret_cast<uintptr_t>(data) % 16 == 0 && part % 16 == 0;
    if (is_ready) return;
    const bool is_beside = is_wide && !is_transposed;
    stride = round_up(is_beside ? parts * length : length, vector);
    const int64_t to_part = is_beside ? length : height * stride;
    source = {data,
              nullptr,
              x.stride(across),
              x.stride(along),
              stride,
              int(height),
              int(length),
              float_of(x.scalar_type()),
              float_of(type),
              from_parts,
              parts,
              from_part,
              to_part};
    data = nullptr;
    part = to_part * element;
    bytes = round_up((is_beside ? 1 : parts) * height * stride * element, 16);
  }
};

struct Layer {
  Operand B, Q, P;
  bool is_one_basis;
  void* out;
  Float out_type;
  int m, p, k, r;
  int parts;  // of the coordinates
};

// What the layers of one batched product have in common.
using Place = std::tuple<bool, int64_t, int64_t, int>;
Place place_of(const Operand& x) { return {x.is_transposed, x.stride, x.bytes, x.parts}; }
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
        is_cut_(layers[0].parts > 1),
        written_(is_cut_ ? at::kFloat : type_) {
    const Layer& x = layers[0];
    const int64_t vector = 16 / element_, written = c10::elementSize(written_);
    read_row_ = round_up(x.B.parts * x.r, vector);
    row_ = round_up(x.parts * x.r, vector);
    coordinates_ = round_up(x.k * read_row_ * written, 16);
    pieces_ = is_cut_ ? round_up(x.k * row_ * element_, 16) : 0;
    // Results have rows of r elements in the block's dtype; cuBLAS writes whole vectors of its own.
    is_direct_ = !is_cut_ && row_ == x.r && x.out_type == float_of(type_);
    out_ = is_direct_ ? 0 : round_up(x.p * row_ * written, 16);
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
    const Layer& x = layers_[first];
    const int64_t rows = x.B.parts > 1 ? std::min<int64_t>(x.m, kSumRows) : x.m;
    const int chunks = int((x.m + rows - 1) / rows);
    // Lists of a pointer a layer: three that are written, two for every product of the first kind
    // and one for every product of the second.
    enum { kCoordinates, kPieces, kOut, kReads };
    const int writes = kReads + 2 * chunks * x.Q.parts, lists = writes + x.P.parts;
    const int64_t pointer_bytes = round_up(int64_t(lists * count * sizeof(void*)), 16);
    const int64_t bytes = each + coordinates_ + pieces_;
    const at::Tensor scratch = at::empty({pointer_bytes + int64_t(count) * bytes}, options_);
    auto* next = static_cast<char*>(scratch.mutable_data_ptr()) + pointer_bytes;
    const auto take = [&](int64_t bytes) { return std::exchange(next, next + bytes); };
    std::vector<const void*> pointers(lists * count);
    std::vector<Conversion> before, between, after;
    const auto place = [&](const Operand& x) -> const char* {
      if (x.data != nullptr) return x.data;
      char* to = take(x.bytes);
      before.push_back(x.source);
      before.back().to = to;
      return to;
    };
    for (size_t i = 0; i < count; ++i) {
      const Layer& x = layers_[first + i];
      const auto list = [&](int which) -> const void*& { return pointers[which * count + i]; };
      const char *B = place(x.B), *Q = place(x.Q), *P = x.is_one_basis ? Q : place(x.P);
      char* C = take(coordinates_);
      list(kCoordinates) = list(kPieces) = C;
      if (is_cut_) {
        char* pieces = take(pieces_);
        list(kPieces) = pieces;
        between.push_back({C, pieces, read_row_, 1, row_, x.k, x.r, float_of(written_),
                           float_of(type_), x.B.parts, x.parts, x.r, x.r});
      }
      list(kOut) = x.out;
      if (!is_direct_) {
        char* out = take(out_);
        list(kOut) = out;
        after.push_back({out, x.out, row_, 1, x.r, x.p, x.r, float_of(written_), x.out_type,
                         x.parts, 1, x.r, 0});
      }
      int to = kReads;
      for (int64_t row = 0; row < x.m; row += rows) {
        for (int piece = 0; piece < x.Q.parts; ++piece) {
          list(to++) = B + row * row_bytes(x.B);
          list(to++) = Q + row * row_bytes(x.Q) + piece * x.Q.part;
        }
      }
      for (int piece = 0; piece < x.P.parts; ++piece) list(to++) = P + piece * x.P.part;
    }
    auto** device = static_cast<const void**>(scratch.mutable_data_ptr());
    C10_CUDA_CHECK(upload_pointers(pointers, device, stream));
    C10_CUDA_CHECK(launch_conversions(before, stream));
    // A row-major product is the column-major product of the transposes in the other order:
    // C^T = B^T Q, then out^T = C^T P^T.
    const auto list = [&](int which) { return device + which * count; };
    int from = kReads;
    for (int64_t row = 0; row < x.m; row += rows) {
      for (int piece = 0; piece < x.Q.parts; ++piece, from += 2) {
        multiply(x.B.is_transposed, !x.Q.is_transposed, columns(x.B.parts, piece), x.k,
                 int(std::min(rows, x.m - row)), list(from), x.B.stride, list(from + 1), x.Q.stride,
                 from > kReads, list(kCoordinates), read_row_, int(count));
      }
    }
    C10_CUDA_CHECK(launch_conversions(between, stream));
    for (int piece = 0; piece < x.P.parts; ++piece) {
      multiply(false, x.P.is_transposed, columns(x.parts, piece), x.p, x.k, list(kPieces), row_,
               list(from + piece), x.P.stride, piece > 0, list(kOut), row_, int(count));
    }
    C10_CUDA_CHECK(launch_conversions(after, stream));
  }

  // What a piece of a basis is multiplied by: the products below the last part's are left out.
  int columns(int parts, int piece) const { return layers_[0].r * std::max(1, parts - piece); }

  int64_t row_bytes(const Operand& x) const { return element_ * (x.is_transposed ? 1 : x.stride); }

  void multiply(bool transpose_left, bool transpose_right, int rows, int columns, int inner,
                const void** left, int64_t left_stride, const void** right, int64_t right_stride,
                bool is_added, const void** target, int64_t target_stride, int count) const {
    const cublasHandle_t handle = at::cuda::getCurrentCUDABlasHandle();
    const cudaDataType_t type = cublas_type(type_);
    const bool is_double = type_ == at::kDouble;
    const float one = 1.0f, kept = is_added ? 1.0f : 0.0f;
    const double one_double = one, kept_double = kept;
    const auto scalar = [&](const float& x, const double& y) {
      return is_double ? static_cast<const void*>(&y) : &x;
    };
    LORAX_CUBLAS_CHECK(cublasGemmBatchedEx(
        handle, transpose_left ? CUBLAS_OP_T : CUBLAS_OP_N,
        transpose_right ? CUBLAS_OP_T : CUBLAS_OP_N, rows, columns, inner, scalar(one, one_double),
        left, type, int(left_stride), right, type, int(right_stride), scalar(kept, kept_double),
        const_cast<void**>(target), cublas_type(written_), int(target_stride), count, compute_,
        CUBLAS_GEMM_DEFAULT));
  }

  at::ScalarType type_;
  cublasComputeType_t compute_;
  const std::vector<Layer>& layers_;
  at::TensorOptions options_;
  int64_t element_;
  bool is_cut_;                         // coordinates are summed in float32 and cut into pieces
  at::ScalarType written_;              // what products are written in
  int64_t read_row_, row_;              // elements of a row of C, and of its pieces and results
  int64_t coordinates_, pieces_, out_;  // bytes of a layer
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
    const int64_t p = rows_of(P), k = rank_of(Q);
    outputs.push_back(
        at::detail::empty_cuda({p, B.size(1)}, B.scalar_type(), device, std::nullopt));
    void* out = outputs.back().mutable_data_ptr();
    if (B.size(1) == 0 || p == 0) continue;
    if (B.size(0) == 0 || k == 0) {
      const int64_t bytes = p * B.size(1) * int64_t(B.element_size());
      C10_CUDA_CHECK(cudaMemsetAsync(out, 0, bytes, stream));
      continue;
    }
    const auto [type, compute, block_parts, parts] = precision_of(B.scalar_type(), Q, P);
    const auto basis = [type = type](const at::Tensor& x) {
      return Operand(x, type, x.dim() == 3 && type == at::kBFloat16 ? 2 : 1, false);
    };
    const Layer x{Operand(B, type, block_parts, true),
                  basis(Q),
                  basis(P),
                  P.is_same(Q),
                  out,
                  float_of(B.scalar_type()),
                  int(B.size(0)),
                  int(p),
                  int(k),
                  int(B.size(1)),
                  parts};
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
