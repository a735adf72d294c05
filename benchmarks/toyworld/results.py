"""From the evaluations of benchmarks.toyworld to its results: means over seeds, and paired intervals over scenes.

A question's score is its mean over the seeds that are there; intervals resample scenes (`training.metrics.intervals`),
so they tell how far the test scenes carry, not how far seeds differ: the seeds' own figures stand beside them. Two
models are compared on the seeds that both have.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from training.evaluation.controls import Control
from training.evaluation.figures import value_at
from training.evaluation.results import control_file, read_predictions, without_nan
from training.metrics.answers import answer_correct
from training.metrics.intervals import mean_difference_interval, mean_interval

GROUPS = ("accuracy", "perception")
LANGUAGE = {
    "seed_bleu": "seed_bleu.bleu",
    "bert_score_f1": "bert_score.f1",
    "rouge_l": "coco.rouge_l",
    "exact_match": "exact_match",
}
"""Figures of wording that the results keep, by their names in `training.evaluation.figures`."""

Scores = dict[str, tuple[str, str, float]]
"""question_id → scene, category, score"""


def collect(root: Path, seeds: Sequence[int], variants: Sequence[str]) -> dict[str, Any]:
    """What can be said from the evaluations that are finished."""
    folders = {"smolvlm": [root / "smolvlm"]}
    folders |= {name: [root / f"seed{seed}" / name for seed in seeds] for name in variants if name != "smolvlm"}
    there = {
        name: [folder for folder in of if (folder / "evaluation" / "metrics.json").is_file()]
        for name, of in folders.items()
    }
    models = {name: summary(of) for name, of in there.items() if of}
    blind = there.get("blind", [])
    report: dict[str, Any] = {
        "models": models,
        "split_hash": next(iter(models.values()))["split_hash"] if models else None,
        "pretraining": training(root / "common"),
    }
    report["sighted_minus_trained_blind"] = {
        name: found
        for name, of in there.items()
        if name != "blind" and (found := compared(of, "sighted", blind, "text_only"))
    }
    ours, baseline = there.get("smoldriver", []), there.get("smolvlm-ft", [])
    if ours:
        report["smoldriver_minus"] = {
            name: found
            for name, of in there.items()
            if name not in ("smoldriver", "blind") and (found := compared(ours, "sighted", of, "sighted"))
        }
        budgets = sorted(budget for name in controls_of(ours[0]) if (budget := Control.parse(name).budget))
        report["smoldriver_at_budget_minus_smolvlm_ft"] = {
            str(budget): found
            for budget in budgets
            if (found := compared(ours, f"sighted@{budget}", baseline, "sighted"))
        }
    return report


def compared(one: Sequence[Path], control: str, other: Sequence[Path], other_control: str) -> dict[str, Any]:
    """Intervals of one model's runs minus another's, on the seeds that both have; empty if there is none.

    The pre-trained SmolVLM has one run for all seeds, whose folder lies beside those of the seeds.
    """
    seeds = {folder.parent for folder in one} & {folder.parent for folder in other}
    if seeds:
        one, other = ([folder for folder in of if folder.parent in seeds] for of in (one, other))
    elif not {"smolvlm"} & {folder.name for folder in (*one, *other)}:
        return {}
    return differences(scores_of(one, "evaluation", control), scores_of(other, "evaluation", other_control))


def summary(folders: Sequence[Path]) -> dict[str, Any]:
    """One model: figures per seed, their means, and every control and budget."""
    metrics = [json.loads((folder / "evaluation" / "metrics.json").read_text()) for folder in folders]
    blind = "text_only" in metrics[0]["arguments"]["controls"]
    own = "text_only" if blind else "sighted"  # the blind model's own figure is the one without images
    scores = scores_of(folders, "evaluation", own)
    seeds = [means(scores_of([folder], "evaluation", own)) for folder in folders]
    found: dict[str, Any] = {
        "seeds": len(folders),
        "split_hash": metrics[0]["split_hash"],
        "questions": len(scores),
        "visual_tokens_per_scene": metrics[0]["results"][own]["visual_tokens_per_scene"],
        **{group: asdict(interval) for group, interval in intervals(scores).items()},
        "per_seed": {group: [figures[group] for figures in seeds] for group in GROUPS},
        **{
            name: mean_of([value_at(item["results"][own], figure.split(".")) for item in metrics])
            for name, figure in LANGUAGE.items()
        },
        "by_category": averaged([item["results"][own]["by_category"] for item in metrics]),
        "by_type": averaged([item["results"][own]["by_type"] for item in metrics]),
        "controls": controls(folders, "evaluation"),
        "training": [stages for folder in folders if (stages := training(folder))],
    }
    for name in ("unseen", "corruptions"):
        done = [folder for folder in folders if (folder / name / "metrics.json").is_file()]
        if done:
            found[name] = controls(done, name)
    return without_nan(found)


def controls(folders: Sequence[Path], evaluation: str) -> dict[str, dict[str, Any]]:
    """Each control's figures over the runs that were asked it, and its difference from true images.

    The difference is on the questions that both were asked, of those runs; a control with questions of its own has
    none.
    """
    found: dict[str, dict[str, Any]] = {}
    sighted: dict[tuple[Path, ...], Scores] = {}  # all controls of the same runs stand beside the same answers
    for control in controls_of(folders[0], evaluation):
        asked = tuple(folder for folder in folders if control_file(folder / evaluation, control).is_file())
        if asked not in sighted:
            sighted[asked] = scores_of(asked, evaluation, "sighted")
        scores = scores_of(asked, evaluation, control)
        minus = differences(scores, sighted[asked])
        found[control] = {**means(scores), "seeds": len(asked), "minus_sighted": minus}
    return found


def scores_of(folders: Sequence[Path], evaluation: str, control: str) -> Scores:
    """Mean over runs of whether each question was answered right; empty if a run lacks the control."""
    found: dict[str, list[float]] = {}
    places: dict[str, tuple[str, str]] = {}
    for folder in folders:
        file = control_file(folder / evaluation, control)
        if not file.is_file():
            return {}
        for row in read_predictions(file):
            right = answer_correct(row["question"], row["reference"], row["answer"])
            found.setdefault(row["question_id"], []).append(float(right))
            places[row["question_id"]] = (row["scene_token"], row["category"])
    return {key: (*places[key], float(np.mean(values))) for key, values in found.items()}


def chosen(scores: Scores, group: str) -> Scores:
    """The questions of a category, or all for "accuracy"."""
    return scores if group == "accuracy" else {key: row for key, row in scores.items() if row[1] == group}


def means(scores: Scores) -> dict[str, float | None]:
    """The share of right answers in each group; None where it has no question."""
    values = {group: [score for _, _, score in chosen(scores, group).values()] for group in GROUPS}
    return {group: float(np.mean(found)) if found else None for group, found in values.items()}


def intervals(scores: Scores) -> dict[str, Any]:
    found = {}
    for group in GROUPS:
        rows = list(chosen(scores, group).values())
        if rows:
            found[group] = mean_interval([row[2] for row in rows], [row[0] for row in rows])
    return found


def differences(one: Scores, other: Scores) -> dict[str, Any]:
    """Intervals of one minus other, on the questions that both answered."""
    found = {}
    for group in GROUPS:
        keys = [key for key in chosen(one, group) if key in other]
        if keys:
            ours, theirs = ([of[key][2] for key in keys] for of in (one, other))
            found[group] = asdict(mean_difference_interval(ours, theirs, [one[key][0] for key in keys]))
    return found


def controls_of(folder: Path, evaluation: str = "evaluation") -> list[str]:
    return list(json.loads((folder / evaluation / "metrics.json").read_text())["results"])


def averaged(tables: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Means of the numbers of tables with the same rows."""
    return {
        row: {
            name: float(np.mean([table[row][name] for table in tables]))
            for name, value in tables[0][row].items()
            if isinstance(value, int | float)
            and all(isinstance(t.get(row, {}).get(name), int | float) for t in tables)
        }
        for row in tables[0]
    }


def training(folder: Path) -> dict[str, Any]:
    """Minutes and figures of a run's stages; none of a run that is not there yet."""
    if not (folder / "run.json").is_file():
        return {}
    stages = json.loads((folder / "run.json").read_text())["stages"]
    kept = ("first", "last", "start", "end", "pictures", "area_under_curve")  # figures, not where things lie
    return {
        name: {
            "minutes": stage["minutes"],
            **{key: value for key, value in stage.get("figures", {}).items() if key in kept},
        }
        for name, stage in stages.items()
    }


def mean_of(values: Sequence[float | None]) -> float:
    """The mean of what was measured; NaN where nothing was."""
    return float(np.mean([value for value in values if value is not None] or [np.nan]))
