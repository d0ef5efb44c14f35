# SPDX-License-Identifier: Apache-2.0
"""Put this package behind the SVDs of other tools, without a change in their code or yours.

    >>> from lorax_kernels import compat
    >>> with compat.enable("peft"):  # doctest: +SKIP
    ...     model = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights="pissa"))
    >>> compat.enable()  # doctest: +SKIP

The first form restores everything at the end of the block, the second lasts until `disable`.
`python -m lorax_kernels.compat PROGRAM ARGUMENTS` runs a script or a console command under it.
"""

from ._switch import Door as Door
from ._switch import Handle as Handle
from ._switch import disable as disable
from ._switch import doors as doors
from ._switch import enable as enable
