# SPDX-License-Identifier: Apache-2.0
"""The pictures of the text-to-image measurement: the same emoji, drawn in four styles.

One file holds everything that a run needs, so a machine without a network can make it:

- `images`: uint8 `(styles, names, side, side, 3)`, drawn from the SVG of four npm packages;
- `text`: float16 `(names, tokens, width)`, the caption as a frozen sentence encoder reads it: the
  mean of its hidden states, then the hidden states themselves, zeros where the caption is short;
- `names` and `styles`.

A caption is the emoji's name. Skin tones and flags are left out: the first repeat one picture, and
no one can draw a flag from the name of its country.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

SIDE = 32
TOKENS = 10
WIDTH = 128

# version and SHA-256 of each npm archive; the licence is that of the drawings
PACKAGES = {
    "noto": ("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "openmoji": ("1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    "twemoji": ("1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "fluent-emoji-flat": (
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
}
STYLES = tuple(PACKAGES)


@dataclass(frozen=True)
class Emoji:
    """What the file holds, with the pictures as float tensors in [-1, 1].

    Attributes:
        images: `(styles, names, 3, side, side)`.
        text: `(names, tokens, width)`.
        names: captions, words joined by hyphens.
        styles: the drawing style of each slice of `images`.
        roles: for every name "adapt", "tune", "test" or "new", see `role`.
    """

    images: torch.Tensor
    text: torch.Tensor
    names: tuple[str, ...]
    styles: tuple[str, ...]
    roles: tuple[str, ...]

    def style(self, name: str) -> torch.Tensor:
        """Pictures of one style, `(names, 3, side, side)`."""
        return self.images[self.styles.index(name)]

    def indices(self, *roles: str) -> torch.Tensor:
        """Positions of the names with one of these roles."""
        chosen = [i for i, role in enumerate(self.roles) if role in roles]
        return torch.tensor(chosen, device=self.images.device)


def subject(name: str) -> str:
    """What a picture shows, whoever it shows: these pictures differ in little."""
    return re.sub(r"^(man|woman|person|men|women|people)-", "", name)


def role(name: str) -> str:
    """Which part a name plays, by the hash of its subject.

    "adapt" (54 %): the adapter's training pictures. "test" (25 %): the source knows the thing, the
    adapter has not seen it in its style. "tune" (6 %): as "test", to choose learning rates by.
    "new" (15 %): the source never saw it, the target did.
    """
    share = int(hashlib.sha256(subject(name).encode()).hexdigest()[:8], 16) / 2**32
    for part, end in (("adapt", 0.54), ("tune", 0.6), ("test", 0.85)):
        if share < end:
            return part
    return "new"


def fetch(package: str, folder: Path) -> dict:
    """The icons of one package, from npm, or from the archive that an earlier call left."""
    version, expected = PACKAGES[package]
    archive = folder / f"iconify-json-{package}-{version}.tgz"
    if not archive.exists():
        command = ["npm", "pack", "--silent", f"@iconify-json/{package}@{version}"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    content = archive.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise SystemExit(f"{archive} should have SHA-256 {expected} but has {found}; remove it.")
    with tarfile.open(fileobj=io.BytesIO(content)) as files:
        member = files.extractfile("package/icons.json")
        if member is None:
            raise SystemExit(f"{archive} holds no package/icons.json.")
        return json.load(member)


def draw(icons: dict, name: str, side: int = SIDE) -> np.ndarray:
    """One picture, uint8 `(side, side, 3)` on white; drawn four times as large, then averaged."""
    import resvg_py
    from PIL import Image

    icon = icons["icons"][name]
    box = [icon.get(key, icons.get(key, 16 if key in ("width", "height") else 0)) for key in BOX]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
    )
    # Without the machine's fonts, so that every machine draws the same.
    png = resvg_py.svg_to_bytes(
        svg, width=4 * side, height=4 * side, background="#ffffff", skip_system_fonts=True
    )
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX))


BOX = ("left", "top", "width", "height")


@torch.no_grad()
def encode(names: list[str]) -> np.ndarray:
    """Captions as a frozen MiniLM reads them, cut to the leading principal components."""
    from transformers import AutoModel, AutoTokenizer

    from lorax_transfer.demo.models import SOURCE, model_directory

    folder = model_directory(SOURCE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    captions = [name.replace("-", " ") for name in names]
    hidden, kept = [], []
    for start in range(0, len(captions), 256):
        batch = tokenizer(
            captions[start : start + 256],
            padding="max_length",
            truncation=True,
            max_length=TOKENS - 1,
            return_tensors="pt",
        )
        hidden.append(model(**batch).last_hidden_state)
        kept.append(batch["attention_mask"].bool())
    tokens, mask = torch.cat(hidden), torch.cat(kept)
    mean = (tokens * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
    text = torch.cat([mean, tokens], 1)
    mask = torch.cat([mask[:, :1], mask], 1)
    used = text[mask]
    _, _, axes = torch.linalg.svd(used - used.mean(0), full_matrices=False)
    text = (text - used.mean(0)) @ axes[:WIDTH].mT
    text = text / text[mask].std() * mask[..., None]
    return text.half().numpy()


def prepare(output: Path, archives: Path) -> None:
    """Make the file: fetch, draw, encode."""
    archives.mkdir(parents=True, exist_ok=True)
    icons = {style: fetch(style, archives) for style in STYLES}
    common = set.intersection(*(set(entry["icons"]) for entry in icons.values()))
    names = sorted(n for n in common if "skin-tone" not in n and not n.startswith("flag-"))
    images = np.stack([np.stack([draw(icons[s], n) for n in names]) for s in STYLES])
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".tmp.npz")
    np.savez_compressed(
        temporary, images=images, text=encode(names), names=np.array(names), styles=np.array(STYLES)
    )
    temporary.replace(output)


def load(path: Path, device: str | torch.device = "cpu", side: int = SIDE) -> Emoji:
    """Read the file; a smaller side averages pixels."""
    with np.load(path) as data:
        names, styles = tuple(data["names"].tolist()), tuple(data["styles"].tolist())
        images = torch.from_numpy(data["images"]).permute(0, 1, 4, 2, 3)
        text = torch.from_numpy(data["text"]).float()
    images = images.to(device, torch.float32) / 127.5 - 1
    if side != images.shape[-1]:
        flat = torch.nn.functional.adaptive_avg_pool2d(images.flatten(0, 1), side)
        images = flat.unflatten(0, images.shape[:2])
    return Emoji(images, text.to(device), names, styles, tuple(map(role, names)))
