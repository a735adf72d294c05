"""The report's gallery: frames with their pictures, where each model looks, and what it answers."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from training.data.rows import FrameRow, Row, load_rows
from training.evaluation.results import Run
from training.metrics.answers import answer_correct

THUMBNAIL_WIDTH = 320


def gallery(runs: Sequence[Run], data: str, frames: int, questions: int) -> list[dict[str, Any]]:
    """Frames that all runs answered, with pictures, attention, and every model's answers.

    Raises:
        ValueError: the data has another split hash than the runs.
    """
    rows = load_rows(data, runs[0].metrics["split"])
    if rows.split_hash != runs[0].metrics["split_hash"]:
        raise ValueError(f"{data} has split hash {rows.split_hash}, the runs {runs[0].metrics['split_hash']}")
    sighted = {run.name: run.predictions("sighted") for run in runs}
    black = {run.name: run.predictions("black") for run in runs}
    maps = {run.name: _attention(run.folder) for run in runs}
    shown: list[dict[str, Any]] = []
    for frame, asked in tqdm(rows.frames(), desc="gallery", unit="frame"):
        common = [row for row in asked if all(row["question_id"] in sighted[run.name] for run in runs)]
        if not common or len(shown) == frames:
            continue
        step = max(1, -(-len(common) // questions))  # spread over the frame's questions
        images = [_picture(frame, camera, maps) for camera in frame["images"]]
        asked = [_question(row, runs, sighted, black) for row in common[::step][:questions]]
        tokens = {"scene": frame["scene_token"], "frame": frame["frame_token"]}
        shown.append({**tokens, "images": images, "questions": asked})
    return shown


def thumbnail(path: str) -> str:
    """A JPEG of at most `THUMBNAIL_WIDTH` pixels as a data address."""
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL_WIDTH, THUMBNAIL_WIDTH))
    return _image_address(small, "JPEG", quality=72)


def overlay(weights: NDArray[np.float32], size: tuple[int, int] = (64, 36)) -> str:
    """Attention weights (rows, columns) as a see-through PNG: the darker the red, the more is looked at."""
    span = float(weights.max() - weights.min())
    scaled = (weights - weights.min()) / span if span else np.zeros_like(weights)
    alpha = np.asarray(Image.fromarray(scaled.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    pixels = np.zeros((size[1], size[0], 4), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = 255, 40, 0
    pixels[..., 3] = (alpha * 190).astype(np.uint8)
    return _image_address(Image.fromarray(pixels), "PNG")


def _picture(frame: FrameRow, camera: str, maps: Mapping[str, Mapping[str, NDArray[np.float32]]]) -> dict[str, Any]:
    key = f"{frame['scene_token']}/{frame['frame_token']}/{camera}"
    overlays = {name: overlay(found[key]) for name, found in maps.items() if key in found}
    return {"camera": camera, "image": thumbnail(frame["images"][camera]), "overlays": overlays}


def _question(row: Row, runs: Sequence[Run], sighted: Mapping[str, Any], black: Mapping[str, Any]) -> dict[str, Any]:
    answers = []
    for run in runs:
        identifier = row["question_id"]
        answer = sighted[run.name][identifier]["answer"]
        blind = black[run.name].get(identifier, {}).get("answer")
        right = answer_correct(row["question"], row["answer"], answer)
        answers.append({"run": run.name, "answer": answer, "right": right, "blind": blind})
    kind = sighted[runs[0].name][row["question_id"]]["type"]
    shown = {"question": row["question"], "reference": row["answer"], "category": row["category"]}
    return {**shown, "type": kind, "answers": answers}


def _attention(folder: Path) -> dict[str, NDArray[np.float32]]:
    file = folder / "attention.npz"
    if not file.is_file():
        return {}
    with np.load(file) as maps:
        return {name: maps[name] for name in maps.files}


def _image_address(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
