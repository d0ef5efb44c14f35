# SPDX-License-Identifier: Apache-2.0
"""Move a LoRA adapter from one base model to another without training or data: files to files.

    >>> import lorax_transfer
    >>> report = lorax_transfer.scan("adapter", "old-base", "new-base")  # doctest: +SKIP
    >>> report.recommendation.verdict  # doctest: +SKIP
    'anchor'

`transfer` writes the moved adapter, `scan` only measures; both return a `Report`. `resize` cuts an
adapter to fewer directions and `merge` adds several up; both return a `Recompression`. `fold` makes
an ordinary LoRA of a LoRA-X adapter; `lorax_transfer.peft` trains such adapters. What they raise on
bad input is in `lorax_transfer.errors`, and the same calls are the command line's.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._api import scan as scan
    from ._api import transfer as transfer
    from ._fold import fold as fold
    from ._merge import merge as merge
    from ._recompression import Recompression as Recompression
    from ._resize import resize as resize
    from .report import Report as Report

_HOMES = {
    "transfer": "._api",
    "scan": "._api",
    "fold": "._fold",
    "resize": "._resize",
    "merge": "._merge",
    "Report": ".report",
    "Recompression": "._recompression",
}
__all__ = ["Recompression", "Report", "fold", "merge", "resize", "scan", "transfer"]


def __getattr__(name: str) -> Any:
    # Loaded when used: torch takes seconds to import, and `lorax-transfer --help` needs none of it.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
