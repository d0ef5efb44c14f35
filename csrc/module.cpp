// SPDX-License-Identifier: Apache-2.0
// The pybind11 module `lorax_kernels._C`: facts of the build. Importing it also loads whatever
// op registrations were linked in (registration.cpp); tensors cross through torch's dispatcher.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#ifdef LORAX_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#ifndef LORAX_CUDA_ARCHS
#define LORAX_CUDA_ARCHS ""
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled part of lorax_kernels.";
#ifdef LORAX_WITH_CUDA
  m.attr("cuda_version") = CUDART_VERSION;
#else
  m.attr("cuda_version") = pybind11::none();
#endif
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("cuda_archs") = LORAX_CUDA_ARCHS;
}
