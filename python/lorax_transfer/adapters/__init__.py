# SPDX-License-Identifier: Apache-2.0
"""Adapters: files in, LoRA factors by module name, and back to files."""

from lorax_transfer.adapters.adapter import Adapter, LoraLayer
from lorax_transfer.adapters.files import read_adapter, write_adapter
from lorax_transfer.adapters.kinds import DROPPABLE

__all__ = ["DROPPABLE", "Adapter", "LoraLayer", "read_adapter", "write_adapter"]
