"""Rows of a prepared split → training examples: a frame's images and some of its questions."""

import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image

from training.data.rows import Rows
from training.learning.collate import SceneCollator
from training.stages.files import whole


def training_examples(
    rows: Rows,
    cameras: list[str],
    pairs_per_sequence: int,
    black: Path | None = None,
    questions: str | None = None,
    reword: float = 0.0,
) -> Dataset:
    """One example per sequence: cameras, image paths, questions and answers, all lists, and `reword`.

    Args:
        rows: what to learn from.
        cameras: which images to show; an empty list shows none.
        pairs_per_sequence: most questions per example.
        black: where to write a black picture of the images' size, to be shown in place of every image.
        questions: a regular expression; questions in which it finds nothing are left out.
        reword: share of the questions to ask in other words, drawn anew each epoch.

    Raises:
        ValueError: no questions (left), a question without an answer, or a frame that has none of the cameras.
    """
    examples: list[dict[str, Any]] = []
    for frame, asked in rows.frames():
        asked = [row for row in asked if questions is None or re.search(questions, row["question"])]
        images = {camera: frame["images"][camera] for camera in cameras if camera in frame["images"]}
        if asked and cameras and not images:
            raise ValueError(
                f"{rows.path}: frame {frame['frame_token']} has images of {list(frame['images'])}, none of {cameras}"
            )
        if black is not None:
            images = {camera: black_picture(black, like) for camera, like in images.items()}
        if empty := [row["question_id"] for row in asked if not row["answer"].strip()]:
            raise ValueError(f"{rows.path}: question {empty[0]} has an empty answer; there is nothing to learn")
        for start in range(0, len(asked), pairs_per_sequence):
            chunk = asked[start : start + pairs_per_sequence]
            examples.append(
                {
                    "cameras": list(images),
                    "images": list(images.values()),
                    "questions": [row["question"] for row in chunk],
                    "answers": [row["answer"] for row in chunk],
                    "reword": reword,
                }
            )
    if not examples:
        like = f" like {questions!r}" if questions else ""
        raise ValueError(f"{rows.path} split {rows.split!r} has no questions{like} to train on")
    return Dataset.from_list(examples)


def black_picture(path: Path, like: str) -> str:
    """The path of a black picture, made once, of the size of the first image that it stands for."""
    if not path.exists():
        with Image.open(like) as image:
            size = image.size
        with whole(path) as unfinished:
            Image.new("RGB", size).save(unfinished)
    return str(path)


def collate_rows(collator: SceneCollator, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of `training_examples` → a batch."""
    return collator([as_example(row) for row in rows])


def as_example(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `training_examples` as collators take it."""
    return {
        "images": dict(zip(row["cameras"], row["images"], strict=True)),
        "pairs": list(zip(row["questions"], row["answers"], strict=True)),
        "reword": row["reword"],
    }
