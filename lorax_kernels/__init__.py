# SPDX-License-Identifier: Apache-2.0
"""Truncated SVD of weight matrices and projection of LoRA factors: tensors in, tensors out."""

from importlib.metadata import PackageNotFoundError, version

from ._backends import Backend as Backend
from ._backends import backends as backends
from .alignment import align_lora as align_lora
from .alignment import inner_map as inner_map
from .alignment import match_depth as match_depth
from .alignment import procrustes as procrustes
from .anchor import anchor_lora as anchor_lora
from .drift import drift_product as drift_product
from .pieces import split_bfloat16 as split_bfloat16
from .product import svd_product as svd_product
from .restore import restore_embedding as restore_embedding
from .restore import restore_lora as restore_lora
from .similarity import Similarity as Similarity
from .similarity import subspace_similarity as subspace_similarity
from .svd import ConvergenceWarning as ConvergenceWarning
from .svd import truncated_svd as truncated_svd
from .svd_diff import svd_diff as svd_diff
from .svd_lowrank import svd_lowrank as svd_lowrank
from .svd_types import SVD as SVD
from .transfer import METHODS as METHODS
from .transfer import UnvalidatedTransferWarning as UnvalidatedTransferWarning
from .transfer import transfer_core as transfer_core
from .transfer import transfer_lora as transfer_lora
from .updates import update_inner as update_inner
from .updates import update_norm as update_norm

try:
    __version__ = version("lorax-kernels")
except PackageNotFoundError:  # used from a source tree that was never installed
    __version__ = "0+unknown"
