// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>

#include <map>
#include <tuple>

#include "graphs.h"

namespace lorax {
namespace {

// More than a model has.
constexpr size_t kMostSizes = 64;

}  // namespace

std::shared_ptr<Sequence> sequence(SequenceOf kind, int64_t batch, int64_t extent, int64_t bytes,
                                   const at::TensorOptions& options, c10::cuda::CUDAStream stream,
                                   const std::function<cudaError_t(void*, cudaStream_t)>& record) {
  using Sizes = std::map<std::tuple<SequenceOf, int64_t, int64_t>, std::shared_ptr<Sequence>>;
  static std::mutex mutex;
  // Never destroyed: the driver may be gone by then.
  static auto& all = *new std::map<std::pair<int, cudaStream_t>, Sizes>;
  const std::lock_guard<std::mutex> lock(mutex);
  Sizes& sizes = all[{stream.device_index(), stream.stream()}];
  const auto known = sizes.find({kind, batch, extent});
  if (known != sizes.end()) return known->second;
  if (sizes.size() >= kMostSizes) sizes.clear();
  const auto made = std::make_shared<Sequence>();
  made->where = at::empty({bytes}, options.dtype(at::kByte));
  cudaStream_t aside;
  C10_CUDA_CHECK(cudaStreamCreateWithFlags(&aside, cudaStreamNonBlocking));
  C10_CUDA_CHECK(cudaStreamBeginCapture(aside, cudaStreamCaptureModeThreadLocal));
  const cudaError_t status = record(made->where.mutable_data_ptr(), aside);
  cudaGraph_t graph = nullptr;
  C10_CUDA_CHECK(cudaStreamEndCapture(aside, &graph));
  C10_CUDA_CHECK(status);
  C10_CUDA_CHECK(cudaGraphInstantiate(&made->graph, graph, 0));
  C10_CUDA_CHECK(cudaGraphDestroy(graph));
  C10_CUDA_CHECK(cudaStreamDestroy(aside));
  sizes[{kind, batch, extent}] = made;
  return made;
}

}  // namespace lorax
