"""Evaluate a checkpoint on prepared data, together with the controls that show whether it looks.

    python -m training.evaluate --checkpoint outputs/final --data outputs/data --output_dir outputs/eval
    python -m training.evaluate --checkpoint outputs/final --data outputs/data --output_dir outputs/eval \\
        --controls all --budgets 1 2 4 8 16 --num_queries 16
    python -m training.evaluate --checkpoint HuggingFaceTB/SmolVLM2-2.2B-Instruct --load_in_4bit --data outputs/data \\
        --output_dir outputs/eval-smolvlm --controls blind

Any SmolDriver, SmolVLM or Idefics3 checkpoint, with or without an adapter. `training.evaluation.controls` lists the
controls and their groups; "sighted" always runs. It writes into `output_dir`:

    {control}/predictions.jsonl   one line per answer, appended frame by frame
    metrics.json                  all figures, with command, seed, split hash, fingerprint and versions
    output.json                   the sighted answers in the DriveLM challenge's submission format
    attention.npz                 for a few frames, where each camera's Q-Former looks (SmolDriver)
    run.json                      what the predictions were made with

Run again after a kill, it goes on behind the last whole frame; run with more controls or frames, it adds them and
metrics.json covers everything that is complete. Other settings need another folder.
"""

import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from tqdm import tqdm
from transformers import HfArgumentParser

from training.data.priors import majority_answers, template_of
from training.data.rows import Row, Rows, load_rows
from training.evaluation.answering import Answerer, SmolDriverAnswerer, fingerprint, load_answerer
from training.evaluation.controls import BLIND, control_questions, control_views, expand_controls
from training.evaluation.scoring import (
    Prediction,
    calibration,
    choices_of,
    control_scores,
    dropped_camera_scores,
    hallucination_scores,
    intervals,
    submission,
)
from training.metrics.answers import question_type
from training.metrics.language import load_bert_scorer

SCORED = ("sighted", "text_only", "black", "wrong_scene")
"""Controls under which the likelihoods of fixed choices are kept, for calibration."""

Frame = tuple[Row, list[Row]]  # a frame and its questions


@dataclass
class EvaluateArguments:
    checkpoint: str = field(metadata={"help": "SmolDriver, SmolVLM or Idefics3 checkpoint: folder or Hub id."})
    data: str = field(metadata={"help": "Folder written by training.prepare."})
    output_dir: str = field(metadata={"help": "Folder for predictions and figures; continued if it is there."})
    split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    adapter: str | None = field(default=None, metadata={"help": "Folder of a LoRA adapter for the checkpoint."})
    controls: list[str] = field(
        default_factory=lambda: ["blind"],
        metadata={"help": "Control names and groups: all, blind, cameras, corruptions, questions."},
    )
    severities: list[int] = field(
        default_factory=lambda: [1, 3, 5], metadata={"help": "Severities of the group corruptions, 1 to 5."}
    )
    budgets: list[int] = field(
        default_factory=list, metadata={"help": "Also evaluate sighted with these numbers of queries per camera."}
    )
    num_queries: int | None = field(
        default=None, metadata={"help": "Queries per camera (SmolDriver); default: the checkpoint's."}
    )
    cameras: list[str] | None = field(default=None, metadata={"help": "Cameras to show; default: all there are."})
    image_splitting: bool = field(default=False, metadata={"help": "Show a SmolVLM tiles, as it ships."})
    load_in_4bit: bool = field(default=False, metadata={"help": "The language model in NF4."})
    precision: str = field(default="fp32", metadata={"help": "fp32, bf16 or int8 (SmolDriver on a CPU)."})
    max_frames: int | None = field(
        default=None, metadata={"help": "Evaluate only so many frames, chosen by hash: fewer are among more."}
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of the longest answer."})
    batch_size: int = field(default=16, metadata={"help": "Questions decoded side by side."})
    seed: int = field(default=0, metadata={"help": "Of wrong scenes, permutations, noise and bootstrap."})
    resamples: int = field(default=2000, metadata={"help": "Of the bootstrap."})
    bert_model: str | None = field(default=None, metadata={"help": "Encoder for BERTScore: folder or Hub id."})
    attention_frames: int = field(default=8, metadata={"help": "Frames whose Q-Former attention is kept."})


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


def frame_key(row: Mapping[str, Any]) -> tuple[str, str]:
    """Scene and frame token of a frame, question or prediction."""
    return row["scene_token"], row["frame_token"]


def predict(
    control: str,
    answer: Callable[[Row, list[Row]], list[Prediction]],
    frames: Sequence[Frame],
    file: Path,
) -> list[Prediction]:
    """The predictions of a control, frame by frame; what `file` already holds is not asked again.

    Args:
        control: for messages and for which questions it asks.
        answer: frame and questions → predictions, all of `control_questions`.
        frames: to be answered.
        file: JSONL; a frame is appended as a whole. A frame that a kill cut short is removed and asked again.

    Raises:
        ValueError: `file` holds an answer to another question than the data now asks.
    """
    wanted = {frame_key(frame): control_questions(control, questions) for frame, questions in frames}
    kept = _stored(file, wanted)
    done = {frame_key(row) for row in kept}
    missing = [(frame, questions) for frame, questions in frames if wanted[frame_key(frame)]]
    missing = [(frame, questions) for frame, questions in missing if frame_key(frame) not in done]
    made: list[Prediction] = []
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        for frame, questions in tqdm(missing, desc=control, unit="frame", disable=not missing):
            answered = answer(frame, questions)
            lines.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answered))
            lines.flush()
            os.fsync(lines.fileno())
            made += answered
    by_frame: dict[tuple[str, str], dict[str, Prediction]] = {}
    for row in [*kept, *made]:
        by_frame.setdefault(frame_key(row), {})[row["question_id"]] = row
    # In the data's order, however often the run was interrupted.
    return [by_frame[key][row["question_id"]] for key, questions in wanted.items() for row in questions]


def _stored(file: Path, wanted: Mapping[tuple[str, str], Sequence[Row]]) -> list[Prediction]:
    """The whole frames of a predictions file; the file is rewritten without broken ones."""
    if not file.exists():
        return []
    frames: dict[tuple[str, str], list[Prediction]] = {}
    broken = 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
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
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
        os.replace(unfinished, file)
    return [row for row in kept if frame_key(row) in wanted]


class ControlledModel:
    """A model asked under controls: `answer(control, …)` is what `predict` calls.

    Args:
        answerer: the model.
        args: of the run.
        cameras: to show.
        pool: frames whose images "wrong_scene" may show.
    """

    def __init__(self, answerer: Answerer, args: EvaluateArguments, cameras: Sequence[str], pool: Sequence[Row]):
        self.answerer, self.args, self.cameras, self.pool = answerer, args, cameras, pool

    def answer(self, control: str, frame: Row, questions: list[Row]) -> list[Prediction]:
        """Predictions for the questions that the control asks about a frame; "sighted@4" has a budget of 4."""
        name, _, budget = control.partition("@")
        predictions: dict[str, Prediction] = {}
        for images, rows in control_views(name, frame, questions, self.pool, self.cameras, self.args.seed):
            sight = self.answerer.look(images, int(budget) if budget else None)
            given = sight.answers([row["asked"] for row in rows], self.args.max_new_tokens, self.args.batch_size)
            for row, said in zip(rows, given, strict=True):
                predictions[row["question_id"]] = prediction = _prediction(row, said.text, said.error)
                prediction["visual_tokens"] = sight.visual_tokens
                choices = choices_of(row["question"], row["answer"]) if control in SCORED else []
                if choices and said.error is None:
                    prediction |= {"choices": choices, "log_likelihoods": sight.scores(row["asked"], choices)}
        return [predictions[row["question_id"]] for row in control_questions(name, questions)]


def majority_predictions(train: Rows) -> Callable[[Row, list[Row]], list[Prediction]]:
    """The control without a model: each template's most frequent answer in the train split."""
    by_template, constant = majority_answers(train)

    def answer(frame: Row, questions: list[Row]) -> list[Prediction]:
        answers = [by_template.get(template_of(row["question"]), constant) for row in questions]
        rows = control_questions("template_majority", questions)
        return [{**_prediction(row, text, None), "visual_tokens": 0} for row, text in zip(rows, answers, strict=True)]

    return answer


def _prediction(row: Row, answer: str, error: str | None) -> Prediction:
    keys = ("question_id", "scene_token", "frame_token", "category", "tag", "question", "asked")
    prediction = {key: row[key] for key in keys}
    prediction |= {"type": question_type(row["question"], row["answer"]), "reference": row["answer"]}
    if "camera" in row:
        prediction["camera"] = row["camera"]
    return {**prediction, "answer": answer, "error": error}


def save_attention(answerer: SmolDriverAnswerer, frames: Sequence[Frame], cameras: Sequence[str], file: Path) -> None:
    """Where the Q-Formers look on some frames: arrays named `{scene}/{frame}/{camera}`, (rows, columns)."""
    maps = {}
    for frame, questions in frames:
        ((images, _),) = control_views("sighted", frame, questions, [], cameras)
        for camera, weights in answerer.attention(images).items():
            maps["/".join((*frame_key(frame), camera))] = weights.astype(np.float32)
    unfinished = file.with_suffix(".unfinished")
    with unfinished.open("wb") as content:
        np.savez_compressed(content, **maps)
    os.replace(unfinished, file)


def evaluate_predictions(
    results: Mapping[str, Sequence[Prediction]], args: EvaluateArguments, bert_scorer: Any = None
) -> dict[str, Any]:
    """The figures of metrics.json that follow from predictions: results, intervals, calibration, visual tokens."""
    scored: dict[str, Any] = {}
    for control, predictions in results.items():
        language = control in BLIND or control.startswith("sighted")
        scorer = None if "@" in control else bert_scorer  # minutes on a CPU, which a curve over budgets need not cost
        scored[control] = control_scores(predictions, results["sighted"], language, scorer)
        if control.startswith("drop:"):
            scored[control] |= dropped_camera_scores(predictions, control.partition(":")[2])
        if control == "absent_object":
            scored[control] |= hallucination_scores(predictions)
    return {
        "results": scored,
        "intervals": intervals(results, args.resamples, args.seed),
        "calibration": calibration(results),
        "visual_tokens_per_scene": scored["sighted"]["visual_tokens_per_scene"],
    }


def control_file(output_dir: Path, control: str) -> Path:
    """Where a control's predictions lie; no control has a "-" in its name, and not every disk takes a ":"."""
    return output_dir / control.replace(":", "-") / "predictions.jsonl"


def check_run(args: EvaluateArguments, identity: dict[str, Any], output_dir: Path) -> None:
    """Note what predictions are made with, or make sure that it is what earlier ones were made with.

    Raises:
        ValueError: `output_dir` holds predictions made with other settings.
    """
    options = ("split", "num_queries", "image_splitting", "load_in_4bit", "precision", "max_new_tokens", "seed")
    identity = {**identity, **{name: getattr(args, name) for name in options}}
    file = output_dir / "run.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != identity:
            names = [name for name in identity if before.get(name) != identity[name]]
            changes = ", ".join(f"{name} was {before.get(name)!r}, is {identity[name]!r}" for name in names)
            raise ValueError(f"{output_dir} holds predictions made with other settings: {changes}. Use another folder")
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    _write_json(file, identity)


def main(args: EvaluateArguments) -> dict[str, Any]:
    """Predict, score, write; returns the content of metrics.json.

    Raises:
        ValueError: bad options, data without the asked split or cameras, or an output folder of another run.
    """
    output_dir = Path(args.output_dir)
    rows = load_rows(args.data, args.split)
    frames = choose_frames(rows, args.max_frames)
    pool = [frame for frame, _ in rows.frames()]
    answerer = load_answerer(
        args.checkpoint,
        args.cameras or rows.cameras,
        adapter=args.adapter,
        load_in_4bit=args.load_in_4bit,
        precision=args.precision,
        num_queries=args.num_queries,
        image_splitting=args.image_splitting,
    )
    cameras = shown_cameras(args.cameras, answerer.cameras, rows)
    if args.budgets and not isinstance(answerer, SmolDriverAnswerer):
        raise ValueError("budgets are for a SmolDriver; other models have one number of visual tokens")
    if isinstance(answerer, SmolDriverAnswerer):
        for budget in args.budgets:
            answerer.processor.num_image_tokens(budget)
    controls = expand_controls(args.controls, cameras, args.severities)
    controls += [f"sighted@{budget}" for budget in dict.fromkeys(args.budgets)]
    if args.controls == ["all"] and len({frame["scene_token"] for frame in pool}) == 1:
        print(f"{rows.path} has one scene in split {args.split!r}: left out wrong_scene", file=sys.stderr)
        controls.remove("wrong_scene")
    model_files = {"path": str(args.checkpoint), "fingerprint": fingerprint(args.checkpoint, answerer.model.config)}
    if args.adapter is not None:
        model_files |= {"adapter": args.adapter, "adapter_fingerprint": fingerprint(args.adapter)}
    prints = {name: value for name, value in model_files.items() if name.endswith("fingerprint")}
    check_run(args, {**prints, "split_hash": rows.split_hash, "cameras": cameras}, output_dir)

    controlled = ControlledModel(answerer, args, cameras, pool)
    results: dict[str, list[Prediction]] = {}
    for control in _in_order([*controls, *_finished_before(output_dir, controls, frames)], cameras):
        if control == "template_majority":
            ask = majority_predictions(load_rows(args.data, "train"))
        else:

            def ask(frame: Row, questions: list[Row], control: str = control) -> list[Prediction]:
                return controlled.answer(control, frame, questions)

        predictions = predict(control, ask, frames, control_file(output_dir, control))
        if predictions:
            results[control] = predictions
        else:
            print(f"{control}: no question of these frames fits", file=sys.stderr)
    if isinstance(answerer, SmolDriverAnswerer) and args.attention_frames > 0:
        save_attention(answerer, frames[: args.attention_frames], cameras, output_dir / "attention.npz")

    scorer = load_bert_scorer(args.bert_model) if args.bert_model else None
    report = {
        "command": "python -m training.evaluate " + " ".join(sys.argv[1:]),
        "arguments": asdict(args),
        "seed": args.seed,
        "split": args.split,
        "split_hash": rows.split_hash,
        "checkpoint": model_files,
        "cameras": cameras,
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, peft, np)},
        },
        "counts": {
            "scenes": len({frame["scene_token"] for frame, _ in frames}),
            "frames": len(frames),
            "questions": sum(len(questions) for _, questions in frames),
            "errors": sum(row["error"] is not None for row in results["sighted"]),
            "answers": {control: len(predictions) for control, predictions in results.items()},
        },
        **evaluate_predictions(results, args, scorer),
    }
    report = without_nan(report)
    _write_json(output_dir / "output.json", submission(results["sighted"]))
    _write_json(output_dir / "metrics.json", report)
    _print_summary(report, output_dir)
    return report


def shown_cameras(asked: Sequence[str] | None, known: Sequence[str], rows: Rows) -> list[str]:
    """The cameras to show, in the model's order.

    Raises:
        ValueError: a camera that model or data do not have, or none in common.
    """
    common = [camera for camera in known if camera in rows.cameras]
    wrong = [camera for camera in asked or [] if camera not in common]
    if wrong or not common:
        raise ValueError(
            f"cameras {wrong or asked or []} cannot be shown: the model knows {list(known)}, "
            f"the data has {list(rows.cameras)}"
        )
    return [camera for camera in common if asked is None or camera in asked]


def without_nan(value: Any) -> Any:
    """The same with None for numbers that are not finite: JSON has none of these."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finished_before(output_dir: Path, controls: Sequence[str], frames: Sequence[Frame]) -> list[str]:
    """Controls that an earlier run has answered for all of these frames."""
    finished = []
    for file in sorted(output_dir.glob("*/predictions.jsonl")):
        control = file.parent.name.replace("-", ":")
        if control in controls:
            continue
        wanted = {frame_key(f): control_questions(control.partition("@")[0], questions) for f, questions in frames}
        done = {frame_key(row) for row in _stored(file, wanted)}
        if done >= {key for key, questions in wanted.items() if questions}:
            finished.append(control)
    return finished


def _in_order(controls: Sequence[str], cameras: Sequence[str]) -> list[str]:
    """In the order of the groups, budgets last: metrics.json does not tell in how many runs it came about."""
    order = expand_controls(["all"], cameras)
    budgets = sorted((control for control in controls if "@" in control), key=lambda name: int(name.partition("@")[2]))
    named = [control for control in order if control in controls]
    return [*named, *(control for control in controls if control not in (*named, *budgets)), *budgets]


def _write_json(file: Path, content: Any) -> None:
    unfinished = file.with_name(file.name + ".unfinished")
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, file)


def _print_summary(report: dict[str, Any], output_dir: Path) -> None:
    differences = report["intervals"]["sighted_minus"]
    for control, scores in report["results"].items():
        line = f"{control:24} {scores['answers']:6} answers  accuracy {scores['accuracy']:6.1%}"
        if control in differences:
            gap = differences[control]["accuracy"]
            line += f"  sighted - control {100 * gap['estimate']:+6.1f} points"
            if gap["low"] is not None:
                line += f" [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"
        print(line)
    print(f"{output_dir / 'metrics.json'}: {report['visual_tokens_per_scene']:.0f} visual tokens per scene")


if __name__ == "__main__":
    main(HfArgumentParser(EvaluateArguments).parse_args_into_dataclasses()[0])
