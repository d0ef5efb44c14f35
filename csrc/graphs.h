// SPDX-License-Identifier: Apache-2.0
// Sequences of small kernels as one launch: each costs the host more than it costs the device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAStream.h>

#include <functional>
#include <memory>
#include <mutex>

namespace lorax {

// Kernels of a sequence read what they work on from `where`, so that the sequence is the same for
// all work of one size.
struct Sequence {
  at::Tensor where;  // bytes on the device
  cudaGraphExec_t graph = nullptr;
  // For whoever has put work to `where`, until the last launch for it: threads may share a stream.
  std::mutex in_use;

  Sequence() = default;
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;
  // One that still runs is destroyed when it has.
  ~Sequence() { cudaGraphExecDestroy(graph); }
};

enum class SequenceOf { kSweep, kFactorization };

// The sequence of a kind for a batch of one extent on a stream. `record` launches it on the stream
// that it is given; it is called the first time.
//
// `where` has `bytes` bytes. What has been recorded is kept, some dozens of sizes a stream.
std::shared_ptr<Sequence> sequence(SequenceOf kind, int64_t batch, int64_t extent, int64_t bytes,
                                   const at::TensorOptions& options, c10::cuda::CUDAStream stream,
                                   const std::function<cudaError_t(void*, cudaStream_t)>& record);

}  // namespace lorax
