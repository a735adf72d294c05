"""Asking a model under controls, frame by frame, so that a run can be killed and go on.

A frame is answered as a whole and its predictions are appended to the control's file at once; what a file holds is not
asked again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from training.data.priors import majority_answers, template_of
from training.data.rig import Rig
from training.data.rows import FrameRow, Row, Rows
from training.evaluation.answering import Answerer
from training.evaluation.controls import Control, control_questions, control_views
from training.evaluation.results import Prediction, control_of, frame_key, lines_of
from training.evaluation.scoring import choices_of
from training.metrics.answers import question_type
from training.stages.files import write_text

SCORED = ("sighted", "text_only", "black", "wrong_scene")
"""Kinds of control under which the likelihoods of fixed choices are kept, for calibration."""

Frame = tuple[FrameRow, list[Row]]  # a frame and its questions
Ask = Callable[[FrameRow, list[Row]], list[Prediction]]  # frame and its questions → predictions


def choose_frames(rows: Rows, max_frames: int | None) -> list[Frame]:
    """The frames that have questions, or `max_frames` of them by hash, in the data's order.

    Raises:
        ValueError: no frame has a question.
    """
    frames = [(frame, questions) for frame, questions in rows.frames() if questions]
    if not frames:
        raise ValueError(f"{rows.path} has no questions in split {rows.split!r}")
    if max_frames is None or max_frames >= len(frames):
        return frames
    if max_frames < 1:
        raise ValueError(f"max_frames must be at least 1; got {max_frames}")

    def rank(index: int) -> str:
        return hashlib.sha256("/".join(frame_key(frames[index][0])).encode()).hexdigest()

    chosen = sorted(range(len(frames)), key=rank)[:max_frames]
    return [frames[index] for index in sorted(chosen)]


def predict(control: Control, ask: Ask, frames: Sequence[Frame], rig: Rig, file: Path) -> list[Prediction]:
    """The predictions of a control, frame by frame; what `file` already holds is not asked again.

    A frame is appended to `file` as a whole. One that a kill cut short is removed and asked again.

    Raises:
        ValueError: `file` holds an answer to another question than the data now asks.
    """
    wanted = wanted_questions(control, frames, rig)
    kept = _stored(file, wanted)
    done = {frame_key(row) for row in kept}
    missing = [frame for frame in frames if wanted[frame_key(frame[0])] and frame_key(frame[0]) not in done]
    made: list[Prediction] = []
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        for frame, questions in tqdm(missing, desc=str(control), unit="frame", disable=not missing):
            answered = ask(frame, questions)
            lines.write(_lines(answered))
            lines.flush()
            os.fsync(lines.fileno())
            made += answered
    by_frame: dict[tuple[str, str], dict[str, Prediction]] = {}
    for row in [*kept, *made]:
        by_frame.setdefault(frame_key(row), {})[row["question_id"]] = row
    # In the data's order, however often the run was interrupted.
    return [by_frame[key][row["question_id"]] for key, questions in wanted.items() for row in questions]


def wanted_questions(control: Control, frames: Sequence[Frame], rig: Rig) -> dict[tuple[str, str], list[Row]]:
    """What a control asks about each frame."""
    return {frame_key(frame): control_questions(control, questions, rig) for frame, questions in frames}


def finished_before(output_dir: Path, controls: Iterable[Control], frames: Sequence[Frame], rig: Rig) -> list[Control]:
    """Controls other than these that an earlier run has answered for all of the frames."""
    finished = []
    for file in sorted(output_dir.glob("*/predictions.jsonl")):
        control = control_of(file)
        if control not in controls:
            wanted = wanted_questions(control, frames, rig)
            done = {frame_key(row) for row in _stored(file, wanted)}
            if done >= {key for key, questions in wanted.items() if questions}:
                finished.append(control)
    return finished


def _stored(file: Path, wanted: Mapping[tuple[str, str], Sequence[Row]]) -> list[Prediction]:
    """The whole frames of a predictions file; the file is rewritten without broken ones."""
    if not file.exists():
        return []
    frames: dict[tuple[str, str], list[Prediction]] = {}
    broken = 0
    for line in lines_of(file):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line that was being written
            broken += 1
            continue
        frames.setdefault(frame_key(row), []).append(row)
    kept: list[Prediction] = []
    for key, rows in frames.items():
        if key not in wanted:  # of a run with more frames
            kept += rows
            continue
        asked = {row["question_id"]: row for row in wanted[key]}
        for row in rows:
            now = asked.get(row["question_id"])
            before = (row["asked"], row["reference"])
            if now is None or before != (now["asked"], now["answer"]):
                raise ValueError(
                    f"{file} holds an answer to {row['question_id']}: {row['asked']!r}, which the data does not ask "
                    "any more; choose another output_dir or remove this one"
                )
        if {row["question_id"] for row in rows} == asked.keys() and len(rows) == len(asked):
            kept += rows
        else:
            broken += len(rows)
    if broken:
        write_text(file, _lines(kept))
    return [row for row in kept if frame_key(row) in wanted]


def _lines(predictions: Iterable[Prediction]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)


@dataclass(frozen=True)
class ControlledModel:
    """A model asked under controls."""

    answerer: Answerer
    cameras: Sequence[str]  # to show
    pool: Sequence[FrameRow]  # frames whose images "wrong_scene" may show
    rig: Rig  # of the data
    max_new_tokens: int
    batch_size: int  # questions decoded side by side
    seed: int  # of wrong scenes, permutations and noise

    def asking(self, control: Control) -> Ask:
        """What `predict` calls under a control."""
        return lambda frame, questions: self.answer(control, frame, questions)

    def answer(self, control: Control, frame: FrameRow, questions: list[Row]) -> list[Prediction]:
        """Predictions for the questions that the control asks about a frame."""
        predictions: dict[str, Prediction] = {}
        views = control_views(control, frame, questions, self.pool, self.cameras, self.rig, self.seed)
        for images, rows in views:
            sight = self.answerer.look(images, control.budget)
            given = sight.answers([row["asked"] for row in rows], self.max_new_tokens, self.batch_size)
            for row, said in zip(rows, given, strict=True):
                prediction = make_prediction(row, said.text, said.error, sight.visual_tokens)
                scored = control.kind in SCORED and control.budget is None and said.error is None
                choices = choices_of(row["question"], row["answer"]) if scored else []
                if choices:
                    prediction["choices"] = choices
                    prediction["log_likelihoods"] = sight.scores(row["asked"], choices)
                predictions[row["question_id"]] = prediction
        return [predictions[row["question_id"]] for row in control_questions(control, questions, self.rig)]


def majority_predictions(train: Rows, rig: Rig) -> Ask:
    """The control without a model: each template's most frequent answer in the train split."""
    by_template, constant = majority_answers(train)

    def answer(frame: FrameRow, questions: list[Row]) -> list[Prediction]:
        rows = control_questions(Control("template_majority"), questions, rig)
        answers = [by_template.get(template_of(row["question"]), constant) for row in rows]
        return [make_prediction(row, text, None, 0) for row, text in zip(rows, answers, strict=True)]

    return answer


def make_prediction(row: Row, answer: str, error: str | None, visual_tokens: int) -> Prediction:
    """The prediction of a question that a control asks."""
    prediction: Prediction = {
        "question_id": row["question_id"],
        "scene_token": row["scene_token"],
        "frame_token": row["frame_token"],
        "category": row["category"],
        "tag": row["tag"],
        "question": row["question"],
        "asked": row["asked"],
        "type": question_type(row["question"], row["answer"]),
        "reference": row["answer"],
        "answer": answer,
        "error": error,
        "visual_tokens": visual_tokens,
    }
    if "camera" in row:
        prediction["camera"] = row["camera"]
    return prediction
