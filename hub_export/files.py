"""Files read with an error that names them, written whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(content).__name__}")
    return content


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A name for a file or a folder to be written under: it gets the name `target` at the end, or is gone if it fails.

    Raises:
        ValueError: `target` is a folder that is there: it is not overwritten.
    """
    if target.is_dir():
        raise ValueError(f"{target} exists; name another folder or remove it")
    unfinished = target.with_name(target.name + ".unfinished")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    remove(unfinished)
    try:
        yield unfinished
        os.replace(unfinished, target)
    finally:
        remove(unfinished)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_model(name: str) -> None:
    """Tell early, and in one line, that a model's name is neither a checkpoint's folder nor a Hub id.

    Raises:
        ValueError: it is a folder without `config.json`, or not there and not like `owner/name`.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no checkpoint: there is no config.json")
    if not folder.is_dir() and (name.count("/") != 1 or folder.is_absolute() or name.startswith(".")):
        raise ValueError(f"{name} is neither a folder here nor a Hub id (owner/name)")
