# SPDX-License-Identifier: Apache-2.0
"""Pairs of small base models, an adapter of the first, and what the equations make of it."""

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import peft
import torch
from adapter_makers import gpt2, llama, save_adapter
from safetensors.torch import load_file, save_file

from lorax_transfer.settings import DEFAULT_DIRECTIONS, restored_share


@dataclass
class Pair:
    """A source, a target and an adapter of the source, on disk and in memory."""

    source: Path
    target: Path
    adapter: Path
    source_model: torch.nn.Module
    target_model: torch.nn.Module


def make_pair(
    root: Path,
    make: Any,
    *,
    drift: float = 0.2,
    target: torch.nn.Module | None = None,
    **lora: Any,
) -> Pair:
    """Save a model, a perturbed copy of it (or another target) and an adapter with random factors.

    Args:
        root: an empty directory.
        make: makes the model.
        drift: relative size of the perturbation of every weight.
        target: another target.
        **lora: of peft.LoraConfig.
    """
    source_model = make()
    target_model = copy.deepcopy(source_model) if target is None else target
    if target is None:
        perturb(target_model, drift)
    pair = Pair(root / "source", root / "target", root / "adapter", source_model, target_model)
    save_model(source_model, pair.source)
    save_model(target_model, pair.target)
    save_adapter(copy.deepcopy(source_model), pair.adapter, **{"r": 4, "lora_alpha": 6, **lora})
    return pair


# Language models with the layers that an adapter is on, and the name of their embeddings.
LANGUAGE = {
    "llama": (llama, ["q_proj", "down_proj"], "embed_tokens"),
    "gpt2": (gpt2, ["c_attn", "c_proj"], "wte"),
}


def language_pair(root: Path, name: str, tied: bool, *more: str, **options: Any) -> Pair:
    """A pair of `LANGUAGE`, with the output layer tied or not, and an adapter on `more` too."""
    make, modules, _ = LANGUAGE[name]
    lora = {"target_modules": [*modules, *more], "fan_in_fan_out": name == "gpt2"}
    return make_pair(root, lambda: make(tied), **lora, **options)


def perturb(model: torch.nn.Module, drift: float) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += drift * noise * (parameter.norm() / noise.norm())


def save_model(model: torch.nn.Module, path: Path, **options: Any) -> None:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(path, **options)
        return
    path.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path / "model.safetensors")


def updates(model: torch.nn.Module, adapter: Path) -> dict[str, torch.Tensor]:
    """`dW` of every module as a matrix (out, in), as stock PEFT computes it."""
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter)
    return {
        name: as_matrix(module, module.get_delta_weight("default").detach()).double()
        for name, module in loaded.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def as_matrix(module: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A module's weight, or what has its layout, as (out, in)."""
    kind = type(getattr(module, "base_layer", module)).__name__
    return weight.T if kind == "Conv1D" else weight.flatten(1)


def expected(pair: Pair, method: str, rank: int) -> dict[str, torch.Tensor]:
    """What the method makes of every update, from the equations alone."""
    found = {}
    for name, dW in updates(pair.source_model, pair.adapter).items():
        cuts, weights = [], []
        for model in (pair.source_model, pair.target_model):
            module = model.get_submodule(name)
            weight = as_matrix(module, module.weight.detach())
            weights.append(weight.double())
            cuts.append(oracle.exact_svd(weight, min(rank, *weight.shape)))
        source, target = cuts
        if method == "copy":
            found[name] = dW
        elif method == "lorax":
            found[name] = oracle.lorax(dW, target)
        elif method == "transport":
            left, right = (oracle.direct_rotation(source[i], target[i]) for i in (0, 2))
            found[name] = left @ dW @ right.T
        elif method == "anchor":
            lora_rank = torch.linalg.matrix_rank(dW, rtol=1e-5)
            left, _, right = oracle.exact_svd(dW, lora_rank)
            undone = oracle.anchor(dW, left, right.T, weights[1] - weights[0], "both", 1.0)
            found[name] = oracle.best_rank(undone, lora_rank)
        elif method == "restore":
            drift = weights[1] - weights[0]
            share = restored_share(float(drift.norm() / weights[0].norm()))
            U, S, V = oracle.exact_svd(drift, min(DEFAULT_DIRECTIONS, *drift.shape))
            found[name] = dW - share * (U * S) @ V.T
        else:
            lora_rank = torch.linalg.matrix_rank(dW, rtol=1e-5)  # dW was formed in float32
            found[name] = oracle.best_rank(oracle.prolora(dW, source, target), lora_rank)
    return found


def with_updates(model: torch.nn.Module, dW: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A float64 copy of a model with updates added to its weights."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, update in dW.items():
            module = model.get_submodule(name)
            turned = update.T if type(module).__name__ == "Conv1D" else update
            module.weight += turned.reshape(module.weight.shape)
    return model


def with_adapter(model: torch.nn.Module, adapter: Path) -> torch.nn.Module:
    """A float64 copy of a model with an adapter loaded by stock PEFT."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter).double().eval()


def run_model(model: torch.nn.Module) -> torch.Tensor:
    """Outputs on a fixed input: token ids, or an image."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        if hasattr(model, "config") and hasattr(model.config, "vocab_size"):
            ids = torch.randint(model.config.vocab_size, (2, 9), generator=generator)
            return model(input_ids=ids).logits
        return model(torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64))


def write_gguf(path: Path, model: torch.nn.Module) -> Path:
    """Write a Llama as llama.cpp's converter does: renamed, q and k interleaved per head."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        values = tensor.numpy()
        for key, count in heads.items():
            if f".{key}." in name:
                halves = values.reshape(count, 2, -1, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        base = names.get_name(name.removesuffix(".weight"))
        writer.add_tensor(f"{base}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rename_tensors(directory: Path, rename: Any) -> None:
    """Rename the tensors of a checkpoint of one file, in place."""
    file = directory / "model.safetensors"
    save_file({rename(name): t for name, t in load_file(file).items()}, file, {"format": "pt"})


def everything_in(directory: Path) -> list[str]:
    """Every path below a directory, hidden ones included."""
    return sorted(
        os.path.relpath(os.path.join(parent, name), directory)
        for parent, folders, files in os.walk(directory)
        for name in (*folders, *files)
    )
