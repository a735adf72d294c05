"""What exactly a folder holds: noted beside an evaluation's figures, which are published with these weights only."""

import hashlib
from pathlib import Path

SUFFIXES = (".json", ".safetensors", ".bin", ".jinja", ".txt")


def fingerprint(folder: str | Path) -> str:
    """sha256 over a folder's weights and settings."""
    digest = hashlib.sha256()
    for file in sorted(file for file in Path(folder).iterdir() if file.suffix in SUFFIXES):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"
