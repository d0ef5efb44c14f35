# SPDX-License-Identifier: Apache-2.0
"""What limits kernels that keep whole matrices in one CTA's shared memory."""

import functools

import torch

# Of every device since compute capability 8.0, some have more.
_LEAST = 99 << 10


@functools.cache
def _bytes_of(index: int) -> int:
    properties = torch.cuda.get_device_properties(index)
    return getattr(properties, "shared_memory_per_block_optin", _LEAST)


def fits(bytes_needed: int, device: torch.device) -> bool:
    """Whether a CTA can have this much shared memory on a CUDA device."""
    return bytes_needed <= _LEAST or bytes_needed <= _bytes_of(device.index or 0)
