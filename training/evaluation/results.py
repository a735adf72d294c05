"""What an evaluation leaves: the form of its files, and how they are read again.

    {control}/predictions.jsonl   a `Prediction` a line
    metrics.json                  `Metrics`

`hub_export` reads metrics.json by this form alone: it carries the words for readers, `figures` and `controls`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from training.evaluation.controls import Control

FrameKey = tuple[str, str]  # scene and frame token


def frame_key(row: Mapping[str, Any]) -> FrameKey:
    """Scene and frame token of a frame, question or prediction."""
    return row["scene_token"], row["frame_token"]


class Prediction(TypedDict):
    """One answer."""

    question_id: str
    scene_token: str
    frame_token: str
    category: str
    tag: list[int]
    question: str  # in the data's wording
    asked: str  # in the wording of the control
    type: str  # one of training.metrics.answers.QUESTION_TYPES
    reference: str
    answer: str
    error: str | None  # why it could not be asked; then the answer is empty
    visual_tokens: int  # that the language model was given
    camera: NotRequired[str]  # that "absent_object" asks about
    choices: NotRequired[list[str]]  # the possible answers, and
    log_likelihoods: NotRequired[list[float]]  # how likely each is, in nats


class IntervalFigures(TypedDict):
    """A figure with its bootstrap interval over scenes; `low` and `high` are None with fewer than two scenes."""

    estimate: float
    low: float | None
    high: float | None
    scenes: int
    confidence: float
    resamples: int


class Intervals(TypedDict):
    """What `training.evaluation.scoring.intervals` returns."""

    sighted: dict[str, IntervalFigures]
    sighted_minus: dict[str, dict[str, IntervalFigures]]  # by control, on the questions that both answered


class HeadlineRow(TypedDict):
    """A figure that tells whether a model looks where a question points, see `training.evaluation.headline`."""

    title: str
    answers: int
    left_out: int  # questions of its kind that it could not be measured on
    score: IntervalFigures
    blind: IntervalFigures | None  # what the best blind control reaches on the same questions, and
    blind_control: str | None  # which that is
    true_images: IntervalFigures | None  # right answers to the same questions, where `score` is not with true images
    swapped_images: IntervalFigures | None  # of "follow", right answers when left and right cameras are swapped


class FigureWords(TypedDict):
    """A figure that tables show; the higher, the better."""

    title: str
    place: list[str]  # the keys that lead to it in the scores of a control
    interval: str | None  # its name under `intervals`


class ControlWords(TypedDict):
    """A control: `group` is "sighted", "budgets", "blind", "cameras", "corruptions" or "questions"."""

    title: str
    group: str
    corruption: str | None
    severity: int | None
    budget: int | None


class Words(TypedDict):
    """What readers call figures and controls, so that whoever shows the figures needs no table of their own."""

    figures: list[FigureWords]
    controls: dict[str, ControlWords]


class Counts(TypedDict):
    """How much was evaluated; `answers` by control."""

    scenes: int
    frames: int
    questions: int
    errors: int
    answers: dict[str, int]
    references: NotRequired[int]  # sighted answers that have one to be compared with; older files lack it


class Metrics(TypedDict):
    """metrics.json. Numbers that are not finite are None."""

    command: str
    arguments: dict[str, Any]
    seed: int
    split: str
    split_hash: str
    checkpoint: dict[str, str]  # path and fingerprint, with an adapter adapter and adapter_fingerprint
    cameras: list[str]
    coordinates: NotRequired[str]  # of the data; files written before it was there scored all of them as pixels
    versions: dict[str, str]
    counts: Counts
    figures: NotRequired[list[FigureWords]]  # what readers call figures and controls: older files lack both,
    controls: NotRequired[dict[str, ControlWords]]  # and `training.evaluate` with the same output_dir adds them
    results: dict[str, dict[str, Any]]  # by control, see `training.evaluation.scoring.control_scores`
    intervals: Intervals
    calibration: dict[str, Any]
    visual_tokens_per_scene: float
    headline: NotRequired[dict[str, HeadlineRow]]  # older files lack it


@dataclass(frozen=True)
class Run:
    """One evaluation: its name in the report, its folder and its metrics.json."""

    name: str
    folder: Path
    metrics: Metrics

    def predictions(self, control: str) -> dict[str, Prediction]:
        """Predictions of a control by question_id; empty if there are none."""
        file = control_file(self.folder, control)
        return {row["question_id"]: row for row in read_predictions(file)} if file.is_file() else {}


def read_predictions(file: Path) -> list[Prediction]:
    """The rows of a finished predictions file."""
    return [json.loads(line) for line in lines_of(file)]


def lines_of(file: Path) -> list[str]:
    """The lines of a JSONL file; what a model says may hold characters at which `str.splitlines` breaks lines too."""
    return [line for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if line]


def load_runs(folders: Sequence[str]) -> list[Run]:
    """The runs, named by their folders; by more of the path where two folders have one name.

    Raises:
        ValueError: a folder without metrics.json, the same folder twice, or runs on different splits, which no table
            may put side by side.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if len(set(paths)) != len(paths):
        raise ValueError(f"each run may come once; got {list(folders)}")
    runs = []
    for path in paths:
        file = path / "metrics.json"
        if not file.is_file():
            raise ValueError(f"{path} is no finished evaluation (no metrics.json); run training.evaluate")
        same = [other for other in paths if other.name == path.name]
        name = path.name if len(same) == 1 else f"{path.parent.name}/{path.name}"
        runs.append(Run(name, path, json.loads(file.read_text(encoding="utf-8"))))
        if runs[-1].metrics["results"]["sighted"]["accuracy"] is None:
            raise ValueError(f"{path} has no scores: its data hide the answers, and there is nothing to report")
    splits = {(run.metrics["split"], run.metrics["split_hash"]) for run in runs}
    if len(splits) > 1:
        raise ValueError(f"runs on different data cannot be compared: {sorted(splits)}")
    return runs


def control_file(output_dir: Path, control: Control | str) -> Path:
    """Where a control's predictions lie; no control has a "-" in its name, and not every disk takes a ":"."""
    return output_dir / str(control).replace(":", "-") / "predictions.jsonl"


def control_of(file: Path) -> Control:
    """The control of a predictions file, from its place."""
    return Control.parse(file.parent.name.replace("-", ":"))


def without_nan(value: Any) -> Any:
    """The same with None for numbers that are not finite: JSON has none of these."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
