// SPDX-License-Identifier: Apache-2.0
// Attaches the CUDA kernels to the ops that lorax_kernels/_ops.py defines.
#include <torch/library.h>

#include "ops.h"

TORCH_LIBRARY_IMPL(lorax_kernels, CUDA, m) {
  m.impl("thin_matmul", TORCH_FN(lorax::thin_matmul));
  m.impl("normal_matmul", TORCH_FN(lorax::normal_matmul));
  m.impl("gram", TORCH_FN(lorax::gram));
  m.impl("gram_halves", TORCH_FN(lorax::gram_halves));
  m.impl("orthonormalize", TORCH_FN(lorax::orthonormalize));
  m.impl("symmetric_eigh", TORCH_FN(lorax::symmetric_eigh));
  m.impl("rotate", TORCH_FN(lorax::rotate));
  m.impl("subspace_error", TORCH_FN(lorax::subspace_error));
  m.impl("cholesky_qr", TORCH_FN(lorax::cholesky_qr));
  m.impl("ritz", TORCH_FN(lorax::ritz));
  m.impl("stack_halves", TORCH_FN(lorax::stack_halves));
  m.impl("shift", TORCH_FN(lorax::shift));
  m.impl("project", TORCH_FN(lorax::project));
}
