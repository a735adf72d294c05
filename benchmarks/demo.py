"""The whole road on two CPU cores: train, compare, export, ask.

    python -m benchmarks.demo            # or make demo

On the embedded toy world, with training/recipes/demo.yaml: SmolDriver through all stages, SmolVLM fine-tuned, and the
blind control; each evaluated on scenes that no model has seen. SmolDriver is then exported and proved in a clean
process, the exported folder answers questions about a held-out scene, and `outputs/demo/report.html` shows it all.
What is finished is not done again: a second call shows the results in seconds.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.toyworld import run as toyworld
from benchmarks.toyworld.run import ToyworldArguments
from training.data.rows import load_rows
from training.metrics.answers import answer_correct
from training.overfit import ask
from training.run import ROOT
from training.stages.command_line import run
from training.stages.files import write_json
from training.stages.recipes import read_recipe

SHOWN_MODELS = {"smoldriver": "SmolDriver", "smolvlm-ft": "SmolVLM fine-tuned", "blind": "blind, trained alike"}
SHOWN = 12  # at most so many questions of the held-out scene


@dataclass
class DemoArguments:
    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder for everything."})
    recipe: str = field(default="demo", metadata={"help": "Recipe whose numbers all models have: name or file."})


def python(*words: str, log: Path) -> None:
    """Run a module of this checkout; what it says goes to a file.

    Raises:
        ChildProcessError: it failed; with the end of what it said.
    """
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("a") as out:
        out.write(f"$ python {shlex.join(words)}\n")
        out.flush()
        code = subprocess.run(
            [sys.executable, *words], env={**os.environ, "PYTHONPATH": paths}, stdout=out, stderr=out
        ).returncode
    if code:
        raise ChildProcessError(f"python {shlex.join(words)} failed; {log} ends: {log.read_text().splitlines()[-1]}")


def once(done: Path, title: str, *words: str) -> None:
    """Run a module unless the file that it ends with is there."""
    if done.exists():
        print(f"== {title}: finished before", flush=True)
        return
    print(f"== {title}", flush=True)
    python(*words, log=done.parent.parent / "log.txt")
    if not done.exists():
        raise ChildProcessError(f"python {shlex.join(words)} did not write {done}")


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def ask_held_out(export: Path, evaluation: Path, blind_evaluation: Path, answers: Path) -> list[dict[str, Any]]:
    """Ask the exported folder, in a process that cannot import this project, about a scene of the test split.

    The blind model's answers to the same questions stand beside, from its evaluation.
    """
    if answers.exists():
        return json.loads(answers.read_text())
    rows = predictions(evaluation / "sighted")
    scene = rows[0]["scene_token"]
    shown = [row for row in rows if row["scene_token"] == scene][:SHOWN]
    blind = {row["question_id"]: row["answer"] for row in predictions(blind_evaluation / "text_only")}
    images = held_out_images(evaluation, scene)
    print(f"== ask: python -m smoldriver_hf ask --checkpoint {export} --image CAM_FRONT=… …", flush=True)
    said = ask(export, images, [row["question"] for row in shown])
    result = [
        {
            "question": row["question"],
            "reference": row["reference"],
            "answer": answer,
            "blind_answer": blind[row["question_id"]],
        }
        for row, answer in zip(shown, said, strict=True)
    ]
    write_json(answers, result)
    return result


def losses_of(root: Path) -> list[str]:
    """NAME=FILE for `training.report`: every stage that wrote its losses."""
    stages = json.loads((root / "run.json").read_text())["stages"]
    files = {name: Path(stage["arguments"]["output_dir"]) / "metrics.jsonl" for name, stage in stages.items()}
    return [f"{name.rsplit('.', 1)[-1]}={file}" for name, file in files.items() if file.is_file()]


def held_out_images(evaluation: Path, scene: str) -> dict[str, str]:
    """{camera: file} of a scene's first frame, from the data that was evaluated on."""
    metrics = json.loads((evaluation / "metrics.json").read_text())
    rows = load_rows(metrics["arguments"]["data"], metrics["split"])
    return next(frame["images"] for frame, _ in rows.frames() if frame["scene_token"] == scene)


def show(results: dict[str, Any], answers: list[dict[str, Any]], report: Path, minutes: float) -> None:
    """The numbers and answers, for a terminal."""
    blind = results["models"]["blind"]
    print(f"\nA held-out scene, asked of the exported folder ({report.parent / 'export'}):")
    ours, blinds = (
        [answer_correct(row["question"], row["reference"], row[key]) for row in answers]
        for key in ("answer", "blind_answer")
    )
    for row, right in zip(answers, ours, strict=True):
        print(
            f"  {'✓' if right else '✗'} {row['question']}\n      {row['answer']}"
            + ("" if right else f"   (is: {row['reference']})")
        )
    print(f"{sum(ours)} of these {len(answers)} are right; of the blind model's {sum(blinds)}.")
    print(f"\n{'answered right':34} {'perception':>10} {'all':>7} {'visual tokens':>14}")
    for name, title in SHOWN_MODELS.items():
        model = results["models"][name]
        print(
            f"{title:34} {model['perception']['estimate']:10.1%} {model['accuracy']['estimate']:7.1%} "
            f"{model['visual_tokens_per_scene']:14.0f}"
        )
    gaps = results["minus_blind"]["smoldriver"]
    perception, every = (
        f"{100 * gap['estimate']:+.1f} points [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"
        for gap in (gaps["perception"], gaps["accuracy"])
    )
    print(
        f"\nSmolDriver minus the blind control: {every}, on perception {perception}; {blind['questions']} questions "
        f"about {gaps['accuracy']['scenes']} unseen scenes."
    )
    print(f"Everything, with pictures: {report}\n{minutes:.1f} minutes.")


def main(args: DemoArguments) -> Path:
    """Run what is not finished and show it; returns the report's path."""
    began = time.monotonic()
    root = Path(args.output_dir).absolute()
    file, export, report = root / "results.json", root / "export", root / "report.html"
    evaluation, answers = root / "seed0" / "smoldriver" / "evaluation", root / "answers.json"
    blind = root / "seed0" / "blind" / "evaluation"
    before = json.loads(file.read_text()) if report.exists() else None
    if before is not None and before["recipe"] == read_recipe(args.recipe).sections:
        print("finished before")
        show(before, ask_held_out(export, evaluation, blind, answers), report, 0.0)
        return report
    results = toyworld.main(
        ToyworldArguments(
            output_dir=str(root), output=str(file), recipe=args.recipe, seeds=[0], brief=True, only=["models"]
        )
    )
    asked = json.loads((evaluation / "metrics.json").read_text())["arguments"]
    baseline = root / "seed0" / "smolvlm-ft"
    once(
        export / "config.json",
        "export, and prove the export in a clean process",
        *("-m", "hub_export", "build", "--checkpoint", asked["checkpoint"]),
        *("--metrics", str(evaluation / "metrics.json"), "--out", str(export)),
        "--only_installed",  # the demo works without a network; other transformers would come from one
    )
    said = ask_held_out(export, evaluation, blind, answers)
    runs = (evaluation, baseline / "evaluation")
    once(
        report,
        "report",
        *("-m", "training.report", "--runs", *map(str, runs), "--data", asked["data"]),
        *(
            "--losses",
            *losses_of(root),
            "--output",
            str(report),
            "--title",
            "SmolDriver on the toy world: does it look?",
        ),
    )
    show(results, said, report, (time.monotonic() - began) / 60)
    return report


if __name__ == "__main__":
    run(main, DemoArguments)
