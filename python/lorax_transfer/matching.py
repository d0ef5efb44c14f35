# SPDX-License-Identifier: Apache-2.0
"""Which weight tensor of a checkpoint each module of an adapter updates.

The same layer has different names in different files: ``model.layers.0.mlp`` may be
``language_model.model.layers.0.mlp`` inside a vision-language model. A rule renames every module
of the adapter in the same way, and the first kind of rule that finds them all decides:

1. exact: the weight of ``<module>`` is ``<module>.weight``;
2. one prefix of `PREFIXES` is added to every module, or removed from every module;
3. one prefix is replaced by another.

Under rules 2 and 3 a module at the top of the model, such as ``lm_head``, may keep its name. A tied
output layer, which a checkpoint does not store, is found under its embedding's name unless the
model's configuration denies that it is tied; the embedding may have an update of its own beside it.
Two rules of one kind that lead to different tensors are an error, never a choice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .checkpoints import Checkpoint
from .errors import MatchError

PREFIXES = (
    "model.",
    "base_model.model.",
    "language_model.",
    "language_model.model.",
    "model.language_model.",
    "text_model.",
    "model.text_model.",
    "transformer.",
    "decoder.",
    "model.decoder.",
    "encoder.",
    "bert.",
    "roberta.",
    "distilbert.",
    "electra.",
    "albert.",
    "deberta.",
    "mpnet.",
    "gpt_neox.",
    "backbone.",
    "auto_model.",
    "0.auto_model.",
    "module.",
    "unet.",
    "diffusion_model.",
    "model.diffusion_model.",
)
HEADS = ("lm_head", "embed_out")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass(frozen=True)
class Rule:
    """One way to rename modules: take a prefix off, put another one on.

    Attributes:
        removed: prefix that the adapter's modules lose; empty for none.
        added: prefix that they get; empty for none.
    """

    removed: str = ""
    added: str = ""

    @property
    def name(self) -> str:
        """The rule in words, for the report."""
        if self.removed and self.added:
            return f"prefix '{self.removed}' replaced by '{self.added}'"
        if self.added:
            return f"prefix '{self.added}' added"
        return f"prefix '{self.removed}' removed" if self.removed else "exact"

    def apply(self, module: str) -> str | None:
        """The module's name in the checkpoint, or None where the rule does not apply."""
        if not module.startswith(self.removed) or module == self.removed.rstrip("."):
            return None
        return self.added + module.removeprefix(self.removed)


@dataclass(frozen=True)
class Match:
    """Where a checkpoint holds the weights of an adapter's modules.

    Attributes:
        rule: the rule that found them, in words.
        tensors: weight tensor's name by module path.
    """

    rule: str
    tensors: dict[str, str]


def match(modules: Sequence[str], checkpoint: Checkpoint, role: str) -> Match:
    """Find the weight of every module.

    Args:
        modules: module paths of the adapter.
        checkpoint: where to look.
        role: "source" or "target", for messages.

    Returns:
        The match; it covers every module.

    Raises:
        MatchError: no rule finds them all, or several disagree.

    Example:
        >>> match(["encoder.layer.0.dense"], checkpoint, "source").rule  # doctest: +SKIP
        "prefix 'bert.' added"
    """
    tied = tied_tensor(checkpoint)
    names = set(checkpoint.names())
    best: tuple[Rule, dict[str, str]] = (Rule(), {})
    for rules in _kinds_of_rules():
        complete: dict[tuple[str, ...], tuple[Rule, dict[str, str]]] = {}
        for rule in rules:
            found = _find(rule, modules, names, tied)
            if len(found) == len(modules):
                complete.setdefault(tuple(found.values()), (rule, found))
            elif len(found) > len(best[1]):
                best = (rule, found)
        if len(complete) > 1:
            raise _ambiguous(modules[0], list(complete.values()), checkpoint, role)
        for rule, found in complete.values():
            is_tied = any(name == tied and is_head(module) for module, name in found.items())
            return Match(rule.name + (", output layer tied" if is_tied else ""), found)
    raise _incomplete(modules, best, checkpoint, role)


def _kinds_of_rules() -> Iterator[list[Rule]]:
    yield [Rule()]
    yield [Rule(added=p) for p in PREFIXES] + [Rule(removed=p) for p in PREFIXES]
    yield [Rule(removed=p, added=q) for p in PREFIXES for q in PREFIXES if p != q]


def _find(rule: Rule, modules: Sequence[str], names: set[str], tied: str | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for module in modules:
        renamed = rule.apply(module)
        candidates = [] if renamed is None else [f"{renamed}.weight"]
        if "." not in module:
            candidates.append(f"{module}.weight")
        name = next((name for name in candidates if name in names), None)
        if name is None and tied is not None and is_head(module):
            name = tied
        if name is not None:
            found[module] = name
    # Two modules on one tensor would be two updates of one weight; only a table that is read at one
    # end of the model and written to at the other may have two.
    own = [name for module, name in found.items() if not (name == tied and is_head(module))]
    return found if len(set(own)) == len(own) else {}


def is_head(module: str) -> bool:
    """Whether a module, or the module of a weight, is an output layer by its name."""
    return module.removesuffix(".weight").rpartition(".")[2] in HEADS


def tied_tensor(checkpoint: Checkpoint) -> str | None:
    """The embeddings that are the output layer too.

    Where no configuration says so or denies it, as with a lone file, a checkpoint without an output
    layer has to tie it, if the model has one at all.

    Args:
        checkpoint: the model.

    Returns:
        The tensor's name, or None.
    """
    config, names = checkpoint.config(), checkpoint.names()
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    said = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    is_tied = True in said if said else not any(map(is_head, names))
    found = [name for name in names if name.endswith(EMBEDDINGS)]
    return found[0] if is_tied and len(found) == 1 else None


def _ambiguous(
    module: str, complete: list[tuple[Rule, dict[str, str]]], checkpoint: Checkpoint, role: str
) -> MatchError:
    ways = "; ".join(f"{found[module]} ({rule.name})" for rule, found in complete)
    return MatchError(
        f"{module} fits several tensors of the {role} {checkpoint.location}: {ways}; rename the "
        "adapter's modules so that one of them is meant."
    )


def _incomplete(
    modules: Sequence[str],
    best: tuple[Rule, dict[str, str]],
    checkpoint: Checkpoint,
    role: str,
) -> MatchError:
    rule, found = best
    if not found:
        weights = [name for name in checkpoint.names() if name.endswith(".weight")]
        example = (weights or checkpoint.names() or ["no tensor at all"])[len(weights) // 2]
        return MatchError(
            f"no module of the adapter is in the {role} {checkpoint.location}: the adapter updates "
            f"{modules[0]} (and {len(modules) - 1} more), the checkpoint holds {example} (and "
            f"{max(0, len(checkpoint.names()) - 1)} more); the adapter belongs to another "
            "architecture, or this is not the checkpoint you mean."
        )
    missing = [module for module in modules if module not in found]
    shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    return MatchError(
        f"the {role} {checkpoint.location} has no weight for {len(missing)} of the adapter's "
        f"{len(modules)} modules: {shown} (looked up by the rule: {rule.name}); to move the others "
        "only, leave these out with --exclude; for a model of another depth there is --method "
        "aligned."
    )
