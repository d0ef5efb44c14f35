# SPDX-License-Identifier: Apache-2.0
"""LoRA-X adapters in PEFT: `dW = scale * U C V^T`, with only the core `C` trained.

    >>> from lorax_transfer.peft import add_lorax_adapter, load_lorax_adapter, save_as_lora
    >>> model = add_lorax_adapter(model, rank=64, core="full")  # doctest: +SKIP
    >>> model.save_pretrained("my-adapter")  # doctest: +SKIP
    >>> model = load_lorax_adapter(base, "my-adapter")  # doctest: +SKIP
    >>> save_as_lora(model, "my-lora")  # an ordinary LoRA of the same update  # doctest: +SKIP

Models are ordinary `PeftModel`s: train, save and switch them as any other. An adapted layer is a
`LoraXLayer`: `core_of(name).weight` is what is trained, `get_delta_weight(name)` the update.
`LoraXConfig` is the adapter's configuration for PEFT's own functions. docs/lorax_adapter.md is the
guide.
"""

from .config import LoraXConfig as LoraXConfig
from .folding import save_as_lora as save_as_lora
from .layers import LoraXConv2d as LoraXConv2d
from .layers import LoraXLayer as LoraXLayer
from .layers import LoraXLinear as LoraXLinear
from .model import add_lorax_adapter as add_lorax_adapter
from .model import load_lorax_adapter as load_lorax_adapter
from .model import lorax_layers as lorax_layers
