// SPDX-License-Identifier: Apache-2.0
// Eigendecomposition of a batch of symmetric matrices, largest eigenvalue first.
//
// float32 matrices wider than 128 by block Jacobi (kernels/jacobi.cuh), which gains from matrices
// that are nearly diagonal already. The others through cuSOLVER's XsyevBatched (CUDA 12.6.2 and
// newer), which takes the whole batch where torch.linalg.eigh loops; above 256 columns it issues
// thousands of small kernels.
//
// cuSOLVER's functions are looked up in the cuSOLVER that torch has loaded, so that the extension
// neither links a second one nor fails to load beside an older one.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cusolverDn.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <tuple>

#include "checks.h"
#include "graphs.h"
#include "kernels/jacobi.cuh"
#include "ops.h"

namespace lorax {
namespace {

struct Solver {
  decltype(&cusolverDnCreate) create = nullptr;
  decltype(&cusolverDnSetStream) set_stream = nullptr;
  decltype(&cusolverDnCreateParams) create_params = nullptr;
  decltype(&cusolverDnXsyevBatched_bufferSize) buffer_size = nullptr;
  decltype(&cusolverDnXsyevBatched) run = nullptr;
};

void* open_library() {
  for (const char* name : {"libcusolver.so.12", "libcusolver.so.11"}) {
    if (void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) return library;
  }
  return nullptr;
}

// Null where this cuSOLVER has no batched solver.
const Solver* find_solver(const at::Tensor& H) {
  static const Solver solver = [&] {
    Solver found;
    void* library = open_library();
    if (library == nullptr) {
      // torch loads its linear algebra when it is first used.
      at::linalg_eigh(at::ones({1, 1}, H.options()));
      library = open_library();
    }
    if (library == nullptr) return found;
    const auto look_up = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
    };
    look_up(found.create, "cusolverDnCreate");
    look_up(found.set_stream, "cusolverDnSetStream");
    look_up(found.create_params, "cusolverDnCreateParams");
    look_up(found.buffer_size, "cusolverDnXsyevBatched_bufferSize");
    look_up(found.run, "cusolverDnXsyevBatched");
    return found;
  }();
  return solver.run != nullptr ? &solver : nullptr;
}

#define LORAX_CUSOLVER_CHECK(call)                                                           \
  do {                                                                                       \
    const cusolverStatus_t status_ = (call);                                                 \
    TORCH_CHECK(status_ == CUSOLVER_STATUS_SUCCESS, "cuSOLVER failed in " #call ": status ", \
                static_cast<int>(status_));                                                  \
  } while (0)

// What a solve needs beside its matrices, kept for one device and stream: calls on one stream run
// one after the other, so they may share it.
struct State {
  cusolverDnHandle_t handle = nullptr;
  cusolverDnParams_t params = nullptr;
  // Sizes asked from cuSOLVER, which takes it longer than a small solve: (dtype, l, batch).
  std::map<std::tuple<int, int64_t, int64_t>, std::pair<size_t, size_t>> sizes;
};

State& state_of(const Solver& solver, int device, cudaStream_t stream) {
  static std::map<std::pair<int, cudaStream_t>, State> states;
  State& state = states[{device, stream}];
  if (state.handle == nullptr) {
    LORAX_CUSOLVER_CHECK(solver.create(&state.handle));
    LORAX_CUSOLVER_CHECK(solver.set_stream(state.handle, stream));
    LORAX_CUSOLVER_CHECK(solver.create_params(&state.params));
  }
  return state;
}

// Up to here cuSOLVER keeps a matrix in one CTA's shared memory, in one kernel.
constexpr int64_t kLibraryColumns = 128;

// Sweeps until every matrix has settled. The next sweep is queued before the count of the last one
// is looked at, so that the device does not wait for the host; at most one sweep is for nothing.
void sweep(cudaGraphExec_t graph, const int* left, c10::cuda::CUDAStream stream) {
  std::array<at::cuda::CUDAEvent, kMaxSweeps> done;
  int last = 0;
  for (int s = 0; s < kMaxSweeps; ++s, ++last) {
    C10_CUDA_CHECK(cudaGraphLaunch(graph, stream));
    done[s].record(stream);
    if (s == 0) continue;
    done[s - 1].synchronize();
    if (left[s - 1] == 0) break;
  }
  // The last count lands in memory that is about to be given back.
  done[std::min(last, kMaxSweeps - 1)].synchronize();
}

std::tuple<at::Tensor, at::Tensor> by_jacobi(const at::Tensor& H) {
  const int64_t batch = H.size(0), l = H.size(1), extent = jacobi_extent(l), pairs = extent / kTile;
  const auto options = H.options(), integers = options.dtype(at::kInt);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const bool captured = is_capturing(stream);
  const at::Tensor kept = H.contiguous();
  const at::Tensor work = at::empty({batch, extent, extent}, options);
  const at::Tensor vectors = at::empty({batch, extent, extent}, options);
  {
    const at::Tensor rotations =
        at::empty({batch, pairs, 2, kTile, kTile}, options.dtype(at::kHalf));
    const at::Tensor is_active = at::empty({batch, pairs}, integers);
    const at::Tensor notes = at::zeros({batch * (1 + 2 * kMaxSweeps) + 1}, integers);
    const at::Tensor left = at::empty(
        {kMaxSweeps}, captured ? integers : integers.device(at::kCPU).pinned_memory(true));
    auto* seen = reinterpret_cast<uint2*>(notes.mutable_data_ptr<int>());
    auto* largest = reinterpret_cast<uint32_t*>(seen + batch * kMaxSweeps);
    const Jacobi state{work.mutable_data_ptr<float>(),
                       vectors.mutable_data_ptr<float>(),
                       reinterpret_cast<__half*>(rotations.mutable_data_ptr<at::Half>()),
                       is_active.mutable_data_ptr<int>(),
                       largest,
                       seen,
                       reinterpret_cast<int*>(largest + batch),
                       left.mutable_data_ptr<int>(),
                       batch,
                       extent};
    if (captured) {
      const at::Tensor room = at::empty({int64_t{sizeof(Jacobi)}}, options.dtype(at::kByte));
      auto* where = static_cast<Jacobi*>(room.mutable_data_ptr());
      C10_CUDA_CHECK(launch_jacobi_start(state, where, kept.const_data_ptr<float>(), l, stream));
      for (int s = 0; s < kMaxSweeps; ++s) {
        C10_CUDA_CHECK(launch_jacobi_sweep(where, batch, extent, stream));
      }
    } else {
      const auto one =
          sequence(SequenceOf::kSweep, batch, extent, sizeof(Jacobi), options, stream,
                   [&](void* where, cudaStream_t aside) {
                     return launch_jacobi_sweep(static_cast<Jacobi*>(where), batch, extent, aside);
                   });
      const std::lock_guard<std::mutex> lock(one->in_use);
      auto* where = static_cast<Jacobi*>(one->where.mutable_data_ptr());
      C10_CUDA_CHECK(launch_jacobi_start(state, where, kept.const_data_ptr<float>(), l, stream));
      sweep(one->graph, left.const_data_ptr<int>(), stream);
    }
  }
  const auto [values, order] = work.diagonal(0, 1, 2).narrow(1, 0, l).sort(-1, /*descending=*/true);
  const at::Tensor sorted =
      vectors.narrow(2, 0, l).gather(1, order.unsqueeze(2).expand({-1, -1, l}));
  return {values, sorted.mT().contiguous()};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> symmetric_eigh(const at::Tensor& H) {
  check_block(H, "H");
  const c10::cuda::CUDAGuard guard(H.device());
  const int64_t batch = H.size(0), l = H.size(1);
  at::Tensor values = at::empty({batch, l}, H.options());
  if (H.numel() == 0) return {values, at::empty(H.sizes(), H.options())};
  if (H.scalar_type() == at::kFloat && l > kLibraryColumns) return by_jacobi(H);
  const Solver* solver = find_solver(H);
  if (solver == nullptr) {
    const auto [ascending, vectors] = at::linalg_eigh(H);
    return {ascending.flip({-1}), vectors.flip({-1}).contiguous()};
  }
  // Ascending eigenvalues of -H are the descending ones of H; the solver overwrites its input.
  at::Tensor work = H.neg().contiguous();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const cudaDataType_t type = H.scalar_type() == at::kDouble ? CUDA_R_64F : CUDA_R_32F;
  const at::Tensor info = at::empty({batch}, H.options().dtype(at::kInt));
  {
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    State& state = state_of(*solver, H.get_device(), stream);
    auto& [device_bytes, host_bytes] = state.sizes[{static_cast<int>(type), l, batch}];
    if (device_bytes == 0) {
      LORAX_CUSOLVER_CHECK(
          solver->buffer_size(state.handle, state.params, CUSOLVER_EIG_MODE_VECTOR,
                              CUBLAS_FILL_MODE_LOWER, l, type, work.const_data_ptr(), l, type,
                              values.const_data_ptr(), type, &device_bytes, &host_bytes, batch));
    }
    const auto bytes = H.options().dtype(at::kByte);
    // From torch's caching allocator: kept between calls, and given back under memory pressure.
    const at::Tensor scratch = at::empty({static_cast<int64_t>(device_bytes)}, bytes);
    const at::Tensor host = at::empty({static_cast<int64_t>(host_bytes)}, bytes.device(at::kCPU));
    LORAX_CUSOLVER_CHECK(
        solver->run(state.handle, state.params, CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER, l,
                    type, work.mutable_data_ptr(), l, type, values.mutable_data_ptr(), type,
                    scratch.mutable_data_ptr(), device_bytes, host.mutable_data_ptr(), host_bytes,
                    info.mutable_data_ptr<int>(), batch));
  }
  // Column-major eigenvectors are the rows of the row-major view.
  return {values.neg_(), work.mT().contiguous()};
}

}  // namespace lorax
