"""Evaluate a checkpoint on prepared data, together with the controls that show whether it looks.

    python -m training.evaluate --checkpoint outputs/final --data outputs/data --output_dir outputs/eval
    python -m training.evaluate --data outputs/data --output_dir outputs/eval   # the model that the repository ships
    python -m training.evaluate --checkpoint outputs/final --data outputs/data --output_dir outputs/eval \\
        --controls all --budgets 1 2 4 8 16 --num_queries 16
    python -m training.evaluate --checkpoint HuggingFaceTB/SmolVLM2-2.2B-Instruct --load_in_4bit --data outputs/data \\
        --output_dir outputs/eval-smolvlm --controls blind

Any SmolDriver, SmolVLM or Idefics3 checkpoint, with or without an adapter. `training.evaluation.controls` lists the
controls and their groups; "sighted" always runs. It writes into `output_dir`:

    {control}/predictions.jsonl   one line per answer, appended frame by frame
    metrics.json                  all figures, with command, seed, split hash, fingerprint and versions
    output.json                   the sighted answers in the DriveLM challenge's submission format
                                  (complete even where the data hide the answers, which no score counts then)
    attention.npz                 for a few frames, where each camera's Q-Former looks (SmolDriver)
    made_with.json                what the predictions were made with

Data whose coordinates are shares of the image are scored, and written for the challenge, in pixels.

Encoder, pictures, room on the disk and controls are checked before the first answer; a control of a group that the
data cannot answer (no train split, one scene) is left out and told.

Run again after a kill, it goes on behind the last whole frame; run with more controls or frames, it adds them and
metrics.json covers everything that is complete. Other settings need another folder.
"""

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from smoldriver_hf.budgets_smoldriver import argument
from smoldriver_hf.default import fetch_default
from training.data.rig import Rig
from training.data.rows import Rows, load_rows, read_dataset_info
from training.evaluation.answering import Answerer, SmolDriverAnswerer, fingerprint, load_answerer
from training.evaluation.controls import SIGHTED, Control, control_views, expand_controls
from training.evaluation.figures import words_of
from training.evaluation.headline import headline
from training.evaluation.predictions import (
    ControlledModel,
    Frame,
    choose_frames,
    finished_before,
    majority_predictions,
    predict,
)
from training.evaluation.preflight import check_pictures, check_room, possible_controls
from training.evaluation.results import Counts, Metrics, Prediction, control_file, frame_key, without_nan
from training.evaluation.scoring import all_scores, in_pixels, submission, with_references, without_scores
from training.evaluation.surroundings import Around, surroundings
from training.metrics.language import load_bert_scorer
from training.stages.command_line import run
from training.stages.files import command_of, is_done, whole, write_json
from training.stages.recipes import Stage

VERSIONS = (torch, transformers, peft, np)
LOADED_WITH = ("num_queries", "image_splitting", "load_in_4bit", "precision")  # options of `load_answerer`


@dataclass
class EvaluateArguments:
    data: str = field(metadata={"help": "Folder written by training.prepare."})
    output_dir: str = field(metadata={"help": "Folder for predictions and figures; continued if it is there."})
    checkpoint: str | None = field(
        default=None,
        metadata={"help": "SmolDriver, SmolVLM or Idefics3: folder or Hub id; default: the repository's own model."},
    )
    split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    adapter: str | None = field(default=None, metadata={"help": "Folder of a LoRA adapter for the checkpoint."})
    controls: list[str] = field(
        default_factory=lambda: ["blind"],
        metadata={"help": "Control names and groups: all, blind, cameras, corruptions, questions."},
    )
    severities: list[int] = field(default_factory=lambda: [1, 3, 5], metadata={"help": "Of corruptions, 1 to 5."})
    budgets: list[int] = field(default_factory=list, metadata={"help": "Sighted with so many queries per camera too."})
    num_queries: int | str | None = field(
        default=None, metadata={"help": "Queries per camera, or CAM_FRONT=16,CAM_BACK=2; default: the SmolDriver's."}
    )
    cameras: list[str] | None = field(default=None, metadata={"help": "Cameras to show; default: all there are."})
    image_splitting: bool = field(default=False, metadata={"help": "Show a SmolVLM tiles, as it ships."})
    load_in_4bit: bool = field(default=False, metadata={"help": "The language model in NF4."})
    precision: str = field(default="fp32", metadata={"help": "fp32, bf16 or int8 (SmolDriver on a CPU)."})
    max_frames: int | None = field(default=None, metadata={"help": "Only so many, by hash: fewer are among more."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of the longest answer."})
    batch_size: int = field(default=16, metadata={"help": "Questions decoded side by side."})
    seed: int = field(default=0, metadata={"help": "Of wrong scenes, permutations, noise and bootstrap."})
    resamples: int = field(default=2000, metadata={"help": "Of the bootstrap."})
    bert_model: str | None = field(default=None, metadata={"help": "Encoder for BERTScore: folder or Hub id."})
    attention_frames: int = field(default=8, metadata={"help": "Frames whose Q-Former attention is kept."})

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("resamples", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        self.num_queries = argument(self.num_queries)


def asked_controls(
    args: EvaluateArguments, answerer: Answerer, cameras: Sequence[str], rows: Rows, frames: Sequence[Frame]
) -> list[Control]:
    """The controls that the options name and the data can answer, budgets last.

    Raises:
        ValueError: unknown controls, a budget that the model does not have, see also `possible_controls`.
    """
    controls = expand_controls(args.controls, cameras, args.severities)
    controls += [Control("sighted", budget=budget) for budget in args.budgets]
    for budget in (control.budget for control in controls if control.budget is not None):
        if not isinstance(answerer, SmolDriverAnswerer):
            raise ValueError("budgets are for a SmolDriver; other models have one number of visual tokens")
        answerer.processor.num_image_tokens(budget)
    return possible_controls(list(dict.fromkeys(controls)), args.controls, rows, frames, cameras)


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


def model_files(args: EvaluateArguments, checkpoint: str, answerer: Answerer) -> dict[str, str]:
    """What is evaluated: the checkpoint's path and fingerprint, and the adapter's."""
    files = {"path": args.checkpoint or "default", "fingerprint": fingerprint(checkpoint, answerer.model.config)}
    if args.adapter is not None:
        files |= {"adapter": args.adapter, "adapter_fingerprint": fingerprint(args.adapter)}
    return files


def check_run(args: EvaluateArguments, identity: dict[str, Any], output_dir: Path) -> None:
    """Note what predictions are made with, or make sure that it is what earlier ones were made with.

    Raises:
        ValueError: `output_dir` holds predictions made with other settings.
    """
    options = (*LOADED_WITH, "split", "max_new_tokens", "seed")
    identity = {**identity, **{name: getattr(args, name) for name in options}}
    file = output_dir / "made_with.json"
    older = output_dir / "run.json"  # its name when it was also that of a recipe's record, which is another thing
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (file, older) if path.is_file()]
    before = next((content for content in found if "split_hash" in content), None)
    if not is_done(before is not None, before, identity, output_dir):
        write_json(file, identity)


def answer_controls(
    model: ControlledModel, controls: Sequence[Control], frames: Sequence[Frame], args: EvaluateArguments
) -> dict[str, list[Prediction]]:
    """Predictions by control, of these and of what an earlier run has finished, in the order of metrics.json."""
    output_dir = Path(args.output_dir)
    results: dict[str, list[Prediction]] = {}
    for control in _in_order([*controls, *finished_before(output_dir, controls, frames, model.rig)], model.cameras):
        if control.kind == "template_majority":
            ask = majority_predictions(load_rows(args.data, "train"), model.rig)
        else:
            ask = model.asking(control)
        predictions = predict(control, ask, frames, model.rig, control_file(output_dir, control))
        if predictions:
            results[str(control)] = predictions
    return results


def _in_order(controls: Sequence[Control], cameras: Sequence[str]) -> list[Control]:
    """In the order of the groups, budgets last: metrics.json does not tell in how many runs it came about."""
    order = expand_controls(["all"], cameras)

    def place(control: Control) -> tuple[int, int]:
        return order.index(control) if control in order else len(order), control.budget or 0

    return sorted(controls, key=place)


def save_attention(
    answerer: SmolDriverAnswerer, frames: Sequence[Frame], cameras: Sequence[str], rig: Rig, file: Path
) -> None:
    """Where the Q-Formers look on some frames: arrays named `{scene}/{frame}/{camera}`, (rows, columns)."""
    maps: dict[str, Any] = {}
    for frame, questions in frames:
        ((images, _),) = control_views(SIGHTED, frame, questions, [], cameras, rig)
        for camera, weights in answerer.attention(images).items():
            maps["/".join((*frame_key(frame), camera))] = weights.astype(np.float32)
    with whole(file) as unfinished:
        np.savez_compressed(unfinished, **maps)


def known_surroundings(rows: Rows, frames: Sequence[Frame], cameras: Sequence[str]) -> Around:
    """What stands around the car; says what cannot be measured where the data do not tell."""
    lost = "left out why an answer is “No.” and which answers follow swapped images"
    try:
        contents = rows.contents
    except ValueError as error:
        print(f"{error}; {lost}", file=sys.stderr)
        return {}
    around = surroundings(frames, contents, cameras, rows.rig)
    if len(around) < len(frames):
        unknown = f"{len(frames) - len(around)} of {len(frames)} frames"
        print(f"{rows.path}: {unknown} are not known, or disagree with the data's answers: {lost}", file=sys.stderr)
    return around


def counts_of(frames: Sequence[Frame], results: Mapping[str, Sequence[Prediction]]) -> Counts:
    """How much was evaluated."""
    return {
        "scenes": len({frame["scene_token"] for frame, _ in frames}),
        "frames": len(frames),
        "questions": sum(len(questions) for _, questions in frames),
        "errors": sum(row["error"] is not None for row in results["sighted"]),
        "answers": {control: len(predictions) for control, predictions in results.items()},
        "references": sum(bool(row["reference"]) for row in results["sighted"]),
    }


def shares_right(folder: Path) -> dict[str, float]:
    """Right answers under each control, from metrics.json."""
    results = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["results"]
    return {control: scores["accuracy"] for control, scores in results.items()}


STAGE = Stage(start="checkpoint", inputs=("checkpoint", "data", "adapter"), resumes=True, figures=shares_right)


def main(args: EvaluateArguments) -> Metrics:
    """Predict, score, write; returns the content of metrics.json.

    Raises:
        ValueError: bad options, data without the asked split or cameras, or an output folder of another run.
        OSError: no checkpoint is named, and the default one cannot be had.
    """
    output_dir = Path(args.output_dir)
    rows = load_rows(args.data, args.split)
    rig, coordinates = rows.rig, read_dataset_info(rows.path)["options"]["coordinates"]
    in_pixels([], coordinates)
    if args.bert_model is not None:
        load_bert_scorer(args.bert_model, device="cpu")  # again at the end: its memory is the model's until then
    frames = choose_frames(rows, args.max_frames)
    pool = [frame for frame, _ in rows.frames()]
    options = {name: getattr(args, name) for name in (*LOADED_WITH, "adapter")}
    source = args.checkpoint or str(fetch_default())
    answerer = load_answerer(source, args.cameras or rows.cameras, **options)
    cameras = shown_cameras(args.cameras, answerer.cameras, rows)
    controls = asked_controls(args, answerer, cameras, rows, frames)
    check_pictures(frames, cameras)
    check_room(output_dir, len(controls), frames, args.max_new_tokens)
    checkpoint = model_files(args, source, answerer)
    prints = {name: value for name, value in checkpoint.items() if name.endswith("fingerprint")}
    check_run(args, {**prints, "split_hash": rows.split_hash, "cameras": cameras}, output_dir)
    model = ControlledModel(answerer, cameras, pool, rig, args.max_new_tokens, args.batch_size, args.seed)
    results = answer_controls(model, controls, frames, args)
    write_json(output_dir / "output.json", submission(in_pixels(results["sighted"], coordinates)))
    if isinstance(answerer, SmolDriverAnswerer) and args.attention_frames > 0:
        save_attention(answerer, frames[: args.attention_frames], cameras, rig, output_dir / "attention.npz")
    bootstrap = {"resamples": args.resamples, "seed": args.seed}
    known = with_references(results)
    if "sighted" in known:
        scores = all_scores(known, rig, coordinates, bert_model=args.bert_model, **bootstrap)
        scores["headline"] = headline(known, known_surroundings(rows, frames, cameras), rig, **bootstrap)
    else:
        scores = without_scores(results)
    metrics: Metrics = without_nan(
        {
            "command": command_of("evaluate", args),
            "arguments": asdict(args),
            "seed": args.seed,
            "split": args.split,
            "split_hash": rows.split_hash,
            "checkpoint": checkpoint,
            "cameras": cameras,
            "coordinates": coordinates,
            "versions": {"python": platform.python_version(), **{one.__name__: one.__version__ for one in VERSIONS}},
            "counts": counts_of(frames, results),
            **words_of(scores["results"]),
            **scores,
        }
    )
    write_json(output_dir / "metrics.json", metrics)
    _print_summary(metrics, output_dir)
    return metrics


def _print_summary(metrics: Metrics, output_dir: Path) -> None:
    differences = metrics["intervals"]["sighted_minus"]
    for control, scores in metrics["results"].items():
        line = f"{control:24} {scores['answers']:6} answers"
        if scores["accuracy"] is not None:
            line += f"  accuracy {scores['accuracy']:6.1%}"
        if control in differences:
            gap = differences[control]["accuracy"]
            line += f"  sighted - control {100 * gap['estimate']:+6.1f} points"
            if gap["low"] is not None and gap["high"] is not None:
                line += f" [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"
        print(line)
    hidden = metrics["counts"]["answers"]["sighted"] - metrics["counts"]["references"]
    if hidden:
        print(f"{hidden} answers have no reference to compare with: they are in output.json, and no score counts them")
    for row in metrics["headline"].values():
        print(f"{row['title']:48} {row['answers']:6} answers  {row['score']['estimate']:6.1%}")
    print(f"{output_dir / 'metrics.json'}: {metrics['visual_tokens_per_scene']:.0f} visual tokens per scene")


if __name__ == "__main__":
    run(main, EvaluateArguments)
