# SPDX-License-Identifier: Apache-2.0
"""The building blocks: each a public function, its PyTorch reference beside it, and its kernels."""

from .cholesky_qr import cholesky_qr as cholesky_qr
from .gram import gram as gram
from .gram_halves import gram_halves as gram_halves
from .normal_matmul import normal_matmul as normal_matmul
from .orthonormalize import orthonormalize as orthonormalize
from .project import project as project
from .ritz import ritz as ritz
from .rotate import rotate as rotate
from .shift import shift as shift
from .stack_halves import stack_halves as stack_halves
from .subspace_error import subspace_error as subspace_error
from .symmetric_eigh import symmetric_eigh as symmetric_eigh
from .thin_matmul import thin_matmul as thin_matmul
