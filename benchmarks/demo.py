"""Five minutes on two CPU cores: ask the default model, teach it fog, export it.

    python -m benchmarks.demo            # or make demo

With training/recipes/demo.yaml, two stages side by side: scenes are drawn that no model has seen; the default model
and its blind twin are asked about them, with the controls that tell whether a model looks where a question points; and
the model is fine-tuned on fog, asked before and after. What came of it is exported and proved in a clean process. What
is finished is not done again: a second call shows the results in seconds.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hub_export import build
from hub_export.build import BuildArguments
from hub_export.files import remove
from smoldriver_hf.default import fetch_default
from training import report
from training.evaluation.results import HeadlineRow, IntervalFigures, Prediction, control_file
from training.evaluation.scoring import accuracy_interval
from training.metrics.answers import answer_correct
from training.report import ReportArguments
from training.run import run as run_recipe
from training.stages.command_line import run
from training.stages.recipes import Recipe, plan, read_recipe

CHECKPOINTS = {"learn": "smoldriver", "ask": "smoldriver", "ask_blind": "blind", "before": "smoldriver"}
"""Section of the recipe → the default model that it starts from"""
SHOWN = 12  # at most so many questions of the held-out scene
BOOTSTRAP = {"resamples": 2000, "seed": 0}


@dataclass
class DemoArguments:
    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder for everything."})
    recipe: str = field(default="demo", metadata={"help": "Recipe with the sections of `demo`: name or file."})
    jobs: int = field(default=2, metadata={"help": "Stages side by side, one thread each."})


def from_default(recipe: Recipe) -> Recipe:
    """The recipe with the default models' folders; they are made whole on the first call.

    Raises:
        ValueError: the recipe lacks a section.
        OSError: no default model, or its tower cannot be had.
    """
    if missing := [name for name in (*CHECKPOINTS, "after") if name not in recipe.sections]:
        raise ValueError(f"{recipe.file}: a demo needs the sections {', '.join(missing)}")
    sections = {name: dict(section) for name, section in recipe.sections.items()}
    for name, model in CHECKPOINTS.items():
        sections[name]["checkpoint"] = str(fetch_default(model))
    return replace(recipe, sections=sections)


def predictions(evaluation: Path, control: str = "sighted") -> list[Prediction]:
    return [json.loads(line) for line in control_file(evaluation, control).read_text(encoding="utf-8").splitlines()]


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def compared(rows: Sequence[Prediction], others: Sequence[Prediction]) -> dict[str, IntervalFigures]:
    """Right answers of two evaluations to the same questions, and the first minus the second, paired by scenes."""
    by_id = {row["question_id"]: row for row in others}
    same = [by_id[row["question_id"]] for row in rows]
    return {
        "first": accuracy_interval(rows, **BOOTSTRAP),
        "second": accuracy_interval(same, **BOOTSTRAP),
        "difference": accuracy_interval(rows, same, **BOOTSTRAP),
    }


def export(checkpoint: Path, evaluation: Path, data: str, folder: Path) -> None:
    """Export the fine-tuned model and prove it in a clean process, unless that has been done with these weights."""
    evaluated = metrics_of(evaluation)["checkpoint"]["fingerprint"]
    if folder.is_dir() and metrics_of(folder)["checkpoint"]["fingerprint"] != evaluated:
        remove(folder)
    if not folder.is_dir():
        metrics = str(evaluation / "metrics.json")
        # The demo works without a network; other versions of transformers would come from one.
        build.main(BuildArguments(str(checkpoint), str(folder), metrics=metrics, examples=data, only_installed=True))


def in_percent(figure: IntervalFigures, sign: str = "") -> str:
    """An estimate with its interval, where there is one."""
    words = f"{100 * figure['estimate']:{sign}.1f}"
    if figure["low"] is None or figure["high"] is None:
        return words
    return f"{words} [{100 * figure['low']:{sign}.1f}, {100 * figure['high']:{sign}.1f}]"


def show_scene(asked: Sequence[Prediction], blind: Sequence[Prediction]) -> None:
    """One held-out scene: questions, the model's answers, and its blind twin's."""
    scene = [row for row in asked if row["scene_token"] == asked[0]["scene_token"]]
    shown = scene[:: max(1, len(scene) // SHOWN)][:SHOWN]
    twins = {row["question_id"]: row["answer"] for row in blind}
    right = [0, 0]
    print("\nA scene that was drawn just now; in brackets what the blind twin says:")
    for row in shown:
        answers = (row["answer"], twins[row["question_id"]])
        is_right = [answer_correct(row["question"], row["reference"], answer) for answer in answers]
        right = [count + one for count, one in zip(right, is_right, strict=True)]
        marks = ["✓" if one else "✗" for one in is_right]
        print(f"  {row['question']}\n    {marks[0]} {answers[0]}   ({marks[1]} {answers[1]})")
        if not is_right[0]:
            print(f"      is: {row['reference']}")
    print(f"{right[0]} of these {len(shown)} are right; of the blind twin's {right[1]}.")


def show_headline(rows: dict[str, HeadlineRow]) -> None:
    """Whether the model looks where a question points."""
    print(f"\n{'right answers, %':52} {'questions':>9}  {'score':22} blind or true images")
    for row in rows.values():
        beside = row["blind"] or row["true_images"]
        other = in_percent(beside) if beside else "–"
        print(f"{row['title']:52} {row['answers']:9}  {in_percent(row['score']):22} {other}")


def show(ask: Path, blind: Path, before: Path, after: Path) -> None:
    """What the evaluations in these folders found."""
    asked, twins = predictions(ask), predictions(blind, "text_only")
    show_scene(asked, twins)
    show_headline(metrics_of(ask)["headline"])
    twin, fog = compared(asked, twins), compared(predictions(after), predictions(before))
    for title, names, found in (
        (f"{len(asked)} questions about these scenes", ("the model", "its blind twin"), twin),
        (f"{fog['first']['scenes']} scenes with fog", ("after fine-tuning", "before"), fog),
    ):
        scores = ", ".join(f"{name} {in_percent(found[key])} %" for name, key in zip(names, found, strict=False))
        print(f"\n{title}: {scores}; difference {in_percent(found['difference'], '+')} points")


def main(args: DemoArguments) -> Path:
    """Run what is not finished and show it; returns the report's path.

    Raises:
        ValueError: a recipe without the demo's sections, or an output folder of other settings.
        OSError: no default model, or its tower cannot be had.
        ChildProcessError: stages failed.
    """
    began = time.monotonic()
    root = Path(args.output_dir).absolute()
    recipe = from_default(read_recipe(args.recipe))
    run_recipe(recipe, root, jobs=args.jobs)
    stages = plan(recipe.sections, root, recipe.data)
    ask, blind, before, after = (stages[name].folder for name in ("ask", "ask_blind", "before", "after"))
    fog = str(stages["after"].arguments["data"])
    export(stages["learn"].result, after, fog, root / "export")
    page, fog_page = root / "report.html", root / "fog.html"
    report.main(
        ReportArguments(
            [str(ask)], str(page), str(stages["ask"].arguments["data"]), title="The default model: does it look?"
        )
    )
    losses = [f"learn={stages['learn'].folder / 'metrics.jsonl'}"]
    report.main(ReportArguments([str(after), str(before)], str(fog_page), fog, losses, title="Before and after fog"))

    show(ask, blind, before, after)
    print(
        f"Exported and proved in a clean process: {root / 'export'}\nWith pictures: {page} and {fog_page}\n"
        f"{(time.monotonic() - began) / 60:.1f} minutes."
    )
    return page


if __name__ == "__main__":
    run(main, DemoArguments)
