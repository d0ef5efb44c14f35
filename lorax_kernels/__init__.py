# SPDX-License-Identifier: Apache-2.0
"""Truncated SVD of weight matrices and projection of LoRA factors: tensors in, tensors out."""

from importlib.metadata import PackageNotFoundError, version

from ._backends import Backend as Backend
from ._backends import backends as backends
from .svd import ConvergenceWarning as ConvergenceWarning
from .svd import truncated_svd as truncated_svd
from .svd_types import SVD as SVD

try:
    __version__ = version("lorax-kernels")
except PackageNotFoundError:  # used from a source tree that was never installed
    __version__ = "0+unknown"
