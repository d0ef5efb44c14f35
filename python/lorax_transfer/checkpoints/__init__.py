# SPDX-License-Identifier: Apache-2.0
"""Lazy readers of base weights: safetensors, GGUF and the Hugging Face cache, a tensor at a time.

`open_checkpoint` reads headers only; `Checkpoint.read` brings one tensor into memory, in the
layout and under the name that Hugging Face's own file of the model would use.
"""

from ._base import Checkpoint
from ._open import open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
