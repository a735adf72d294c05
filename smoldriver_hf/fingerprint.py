"""Which weights a figure belongs to: `training.evaluate` writes it down, `hub_export` compares it."""

import hashlib
import os
from pathlib import Path

from transformers import PreTrainedConfig

FINGERPRINTED = (".json", ".safetensors", ".bin", ".jinja", ".txt")


def fingerprint(path: str | os.PathLike[str], config: PreTrainedConfig | None = None) -> str:
    """What exactly was evaluated: sha256 over a folder's weights and settings, or the commit of a Hub repository.

    Args:
        path: folder of a checkpoint or an adapter, or a Hub id.
        config: as it was loaded from the Hub id, which knows the commit.
    """
    folder = Path(path)
    if not folder.is_dir():
        commit = None if config is None else config._commit_hash
        return f"commit:{commit}"
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.suffix in FINGERPRINTED):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"
