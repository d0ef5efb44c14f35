# SPDX-License-Identifier: Apache-2.0
"""LoRA-X adapters in PEFT: `dW = scale * U C V^T`, only `C` trained.

    >>> from lorax_transfer.peft import add_lorax_adapter
    >>> model = add_lorax_adapter(model, rank=64, core="full")  # doctest: +SKIP

`add_lorax_adapter` computes all bases in one call and returns an ordinary `PeftModel`: train it as
any other. Each adapted layer is a `LoraXLayer`: `layer.lora_core[name].weight` is what is trained,
`layer.get_delta_weight(name)` is the update as a matrix.
"""

from .config import LoraXConfig as LoraXConfig
from .layers import LoraXConv2d as LoraXConv2d
from .layers import LoraXLayer as LoraXLayer
from .layers import LoraXLinear as LoraXLinear
from .model import add_lorax_adapter as add_lorax_adapter
from .model import load_lorax_adapter as load_lorax_adapter
from .model import lorax_layers as lorax_layers
from .model import save_as_lora as save_as_lora
