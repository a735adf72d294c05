"""Checkpoints as folders: saved whole with their note, and not made twice."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from training.stages.files import is_done, whole, write_note

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def dtype_named(name: str) -> torch.dtype:
    """The type of saved weights.

    Raises:
        ValueError: another than bfloat16 or float32.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype must be {' or '.join(DTYPES)}; got {name!r}")
    return DTYPES[name]


def save_whole(folder: str | os.PathLike[str], *parts: Any, note: Mapping[str, Any]) -> Path:
    """Save model, processor, … and the stage's note as one folder that appears complete or not at all.

    Raises:
        ValueError: the folder holds something already.
    """
    with whole(folder) as unfinished:
        for part in parts:
            part.save_pretrained(unfinished)
        write_note(unfinished, note)
    return Path(folder)


def is_saved(stage: str, args: Any) -> bool:
    """Whether `args.output_dir` holds what this stage makes of these arguments, wherever the folder lies; says so.

    Raises:
        ValueError: it holds what other arguments made, with what differs, or anything else.
    """
    folder = Path(args.output_dir)
    file = folder / f"{stage}.json"
    before = json.loads(file.read_text(encoding="utf-8"))["arguments"] if file.is_file() else None
    now = dataclasses.asdict(args)
    for arguments in (before or {}, now):
        arguments.pop("output_dir", None)
    there = is_done(folder.is_dir() and any(folder.iterdir()), before, now, folder)
    if there:
        print(f"{folder} is there already: nothing to do")
    return there
