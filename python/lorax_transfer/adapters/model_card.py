# SPDX-License-Identifier: Apache-2.0
"""The README.md of a transferred adapter: Markdown under the metadata that model hubs read."""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath


def model_card(
    *,
    base_model: str,
    source_model: str,
    adapter: str,
    method: str,
    rank: str | int | None,
    version: str,
    command: str | None = None,
    totals: Mapping[str, object] | None = None,
    dropped: Sequence[str] = (),
    dropped_kinds: Sequence[str] = (),
    tags: Sequence[str] = (),
    is_lorax: bool = False,
) -> str:
    """Describe a transferred adapter.

    Args:
        base_model: name or path of the base model that the adapter now belongs to.
        source_model: name or path of the base model that it was trained on.
        adapter: name or path of the adapter that was transferred.
        method: ``"lorax"``, ``"prolora"`` or ``"copy"``.
        rank: rank of the bases, or a phrase such as ``"energy 0.9"``; None leaves the row out.
        version: version of this package.
        command: the command line, or None where there was none.
        totals: rows of the table of results, label to value.
        dropped: names of the tensors that were left out.
        dropped_kinds: their kinds, for the sentence above the names.
        tags: more tags for the metadata.
        is_lorax: whether it is written as cores, which stock PEFT does not load.

    Returns:
        Markdown with YAML front matter, ending with a newline.

    Example:
        >>> card = model_card(
        ...     base_model="org/target",
        ...     source_model="org/source",
        ...     adapter="org/adapter",
        ...     method="lorax",
        ...     rank=320,
        ...     version="0.1.0",
        ... )
        >>> print(card.splitlines()[1])
        base_model: "org/target"
    """
    lines = [
        "---",
        f"base_model: {_yaml(base_model)}",
        "library_name: peft",
        "tags:",
        *(f"- {_yaml(tag)}" for tag in ("lora", f"base_model:adapter:{base_model}", *tags)),
        "---",
        "",
        f"# {_short(adapter)} on {_short(base_model)}",
        "",
        f"A LoRA adapter trained on {_code(source_model)} and moved to {_code(base_model)} "
        "without training or data.",
        "",
    ]
    facts: dict[str, object] = {
        "Adapter": _code(adapter),
        "Source base": _code(source_model),
        "Target base": _code(base_model),
        "Method": method,
        "Rank": rank,
        "Made with": f"lorax-transfer {version}",
    }
    lines += _table("Transfer", {key: value for key, value in facts.items() if value is not None})
    if command:
        fence = "`" * max(3, _longest_run(command) + 1)
        lines += [f"{fence}shell", command, fence, ""]
    if totals:
        lines += ["## Result", "", *_table("Measure", totals)]
    if dropped or dropped_kinds:
        kinds = f" ({', '.join(dropped_kinds)})" if dropped_kinds else ""
        lines += ["## Left out", "", f"On request, parts of the adapter were not carried{kinds}."]
        lines += ["", *(f"- {_code(name)}" for name in dropped), *([""] if dropped else [])]
    lines += [
        "## Use",
        "",
        "```python",
        "from lorax_transfer.peft import load_lorax_adapter"
        if is_lorax
        else "from peft import PeftModel",
        "",
        f"# model: {_short(base_model)}, loaded with the library that it belongs to",
        'model = load_lorax_adapter(model, "path/to/this/directory")'
        if is_lorax
        else 'model = PeftModel.from_pretrained(model, "path/to/this/directory")',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _table(title: str, rows: Mapping[str, object]) -> list[str]:
    body = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
    return [f"| {title} | |", "|---|---|", *body, ""]


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return _inline(text).replace("|", r"\|")


def _inline(text: str) -> str:
    return " ".join(str(text).split())


def _short(name: str) -> str:
    """A hub id as it is, of a path on this machine the last part only."""
    text = _inline(name)
    return PurePath(text).name if PurePath(text).is_absolute() else text


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _code(text: str) -> str:
    """A code span that survives backticks in its text."""
    text = _inline(text)
    if "`" not in text:
        return f"`{text}`"
    fence = "`" * (_longest_run(text) + 1)
    return f"{fence} {text} {fence}"


def _yaml(text: str) -> str:
    """A double-quoted YAML scalar: the one style that can hold any string."""
    return '"' + "".join(map(_yaml_character, text)) + '"'


def _yaml_character(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
