"""From the evaluations of benchmarks.toyworld to its results: means over seeds, and paired intervals over scenes.

A question's score is its mean over the seeds that are there; intervals resample scenes (`training.metrics.intervals`),
so they tell how far the test scenes carry, not how far seeds differ: the seeds' own figures stand beside them. Two
variants are compared on the seeds that both have.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.toyworld.variants import GROUPS, STUDY, WORLDS, Variant
from training.evaluation.controls import Control
from training.evaluation.figures import value_at
from training.evaluation.results import control_file, read_predictions, without_nan
from training.metrics.answers import answer_correct
from training.metrics.intervals import mean_difference_interval, mean_interval

FORMAT = 2
"""Of the results; those of the road without reading and aligning had none."""

MAIN = tuple(GROUPS["models"])
GROUPS_OF_QUESTIONS = ("accuracy", "perception")
LANGUAGE = {
    "seed_bleu": "seed_bleu.bleu",
    "bert_score_f1": "bert_score.f1",
    "rouge_l": "coco.rouge_l",
    "exact_match": "exact_match",
}
"""Figures of wording that the results keep, by their names in `training.evaluation.figures`."""

SETTINGS = ("arguments", "trained_on")  # of a note, among what `training.transfer` reached
Scores = dict[str, tuple[str, str, float]]
"""question_id → scene, category, score"""


def collect(root: Path, seeds: Sequence[int], variants: Mapping[str, Variant]) -> dict[str, Any]:
    """What can be said from the evaluations that are finished."""
    there = {name: [folder for seed in seeds if is_asked(folder := root / f"seed{seed}" / name)] for name in variants}
    there = {name: folders for name, folders in there.items() if folders}
    spoilt = {name: tuple(one for one in of if is_asked(one, "corruptions")) for name, of in there.items()}
    models = {name: summary(tuple(of), own_control(variants[name]), spoilt[name]) for name, of in there.items()}

    def compare(one: str | None, other: str | None) -> dict[str, Any]:
        if one not in there or other not in there:
            return {}
        return compared(there[one], own_control(variants[one]), there[other], own_control(variants[other]))

    minus_blind = {name: compare(name, variants[name].blind) for name in there}
    reference_minus = {name: compare(variants[name].reference, name) for name in there}
    ours, baseline = there.get("smoldriver", []), there.get("smolvlm-ft", [])
    asked = sorted(budget for name in controls_of(ours) if (budget := Control.parse(name).budget))
    at_budget = {str(budget): compared(ours, f"sighted@{budget}", baseline, "sighted") for budget in asked}
    return {
        "format": FORMAT,
        "split_hash": next(iter(models.values()))["split_hash"] if models else None,
        "models": models,
        "minus_blind": {name: found for name, found in minus_blind.items() if found},
        "reference_minus": {name: found for name, found in reference_minus.items() if found},
        "at_budget_minus_smolvlm_ft": {budget: found for budget, found in at_budget.items() if found},
        "worlds": {title: found for title in WORLDS if (found := on_world(there, title))},
        "stages": stages(root),
    }


def is_asked(folder: Path, evaluation: str = "evaluation") -> bool:
    return (folder / evaluation / "metrics.json").is_file()


def own_control(variant: Variant) -> str:
    """What a variant's own answers are: those without pictures of one that never had any."""
    return "text_only" if variant.blind is None else "sighted"


def on_world(there: Mapping[str, Sequence[Path]], title: str) -> dict[str, Any]:
    """The models' answers about another world, and SmolDriver's minus those of the others."""
    folders = {name: [one for one in there.get(name, []) if is_asked(one, title)] for name in MAIN}
    own = {name: "text_only" if name == "blind" else "sighted" for name in MAIN}
    scores = {name: scores_of(folders[name], title, own[name]) for name in MAIN if folders[name]}
    found: dict[str, Any] = {
        name: {key: asdict(one) for key, one in intervals(of).items()} for name, of in scores.items()
    }
    if "smoldriver" in scores:
        for other in ("smolvlm-ft", "blind"):
            minus = compared(folders["smoldriver"], "sighted", folders[other], own[other], title)
            found |= {f"smoldriver_minus_{other}": minus} if minus else {}
    return found


def undecided(report: Mapping[str, Any]) -> list[str]:
    """Variants whose difference on perception from what they are compared with may be none."""
    found = {name: groups.get("perception") for name, groups in report["reference_minus"].items()}
    return [name for name, one in found.items() if one and one["low"] is not None and one["low"] <= 0 <= one["high"]]


def best_values(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Of each factor of the study the value with most right answers on perception, where it is not the recipe's own.

    Nothing until all of the study is there.
    """
    right = {name: model["perception"]["estimate"] for name, model in report["models"].items()}
    if not set(GROUPS["study"]) <= set(right):
        return ()
    best = []
    for values in STUDY.values():
        value = max(values, key=lambda value: right[f"study-{value}"])
        if right[f"study-{value}"] > right["study"]:
            best.append(value)
    return tuple(best)


def compared(
    one: Sequence[Path], control: str, other: Sequence[Path], other_control: str, evaluation: str = "evaluation"
) -> dict[str, Any]:
    """Intervals of one variant's runs minus another's, on the seeds that both have; empty if there is none."""
    seeds = {folder.parent for folder in one} & {folder.parent for folder in other}
    one, other = ([folder for folder in of if folder.parent in seeds] for of in (one, other))
    return differences(scores_of(one, evaluation, control), scores_of(other, evaluation, other_control))


@cache  # of what is finished: it is collected after every evaluation
def summary(folders: tuple[Path, ...], own: str, spoilt: tuple[Path, ...]) -> dict[str, Any]:
    """One variant: figures per seed, their means, and every control and budget.

    Args:
        own: the control under which it gives its own answers.
        spoilt: those of the folders that were asked with corrupted images.
    """
    metrics = [json.loads((folder / "evaluation" / "metrics.json").read_text()) for folder in folders]
    scores = scores_of(folders, "evaluation", own)
    seeds = [means(scores_of([folder], "evaluation", own)) for folder in folders]
    results = [item["results"][own] for item in metrics]
    found: dict[str, Any] = {
        "seeds": len(folders),
        "split_hash": metrics[0]["split_hash"],
        "questions": len(scores),
        "visual_tokens_per_scene": results[0]["visual_tokens_per_scene"],
        **{group: asdict(interval) for group, interval in intervals(scores).items()},
        "per_seed": {group: [figures[group] for figures in seeds] for group in GROUPS_OF_QUESTIONS},
        **{name: mean_of([value_at(one, figure.split(".")) for one in results]) for name, figure in LANGUAGE.items()},
        "by_category": averaged([one["by_category"] for one in results]),
        "by_type": averaged([one["by_type"] for one in results]),
        "headline": headline([item["headline"] for item in metrics]) if own == "sighted" else {},
        "controls": controls(folders, "evaluation"),
    }
    return without_nan(found | ({"corruptions": controls(spoilt, "corruptions")} if spoilt else {}))


def headline(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`training.evaluation.headline` over seeds: means of the figures and of the ends of their intervals."""

    def mean(name: str, field: str) -> dict[str, float] | None:
        rows = [run[name][field] for run in runs]
        if None in rows:
            return None
        return {end: mean_of([row[end] for row in rows]) for end in ("estimate", "low", "high")}

    return {
        name: {
            "title": row["title"],
            "answers": row["answers"],
            "blind_control": row["blind_control"],
            "per_seed": [run[name]["score"]["estimate"] for run in runs],
            **{field: mean(name, field) for field in ("score", "blind", "true_images", "swapped_images")},
        }
        for name, row in runs[0].items()
        if all(name in run for run in runs)
    }


def controls(folders: Sequence[Path], evaluation: str) -> dict[str, dict[str, Any]]:
    """Each control's figures over the runs that were asked it, and its difference from true images.

    The difference is on the questions that both were asked, of those runs; a control with questions of its own has
    none.
    """
    found: dict[str, dict[str, Any]] = {}
    sighted: dict[tuple[Path, ...], Scores] = {}  # all controls of the same runs stand beside the same answers
    for control in controls_of(folders, evaluation):
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
        for key, scene, category, right in answers_in(file):
            found.setdefault(key, []).append(float(right))
            places[key] = (scene, category)
    return {key: (*places[key], float(np.mean(values))) for key, values in found.items()}


@cache
def answers_in(file: Path) -> list[tuple[str, str, str, bool]]:
    """question_id, scene, category and whether it is right, of each answer; of an evaluation that is finished."""
    return [
        (
            row["question_id"],
            row["scene_token"],
            row["category"],
            answer_correct(row["question"], row["reference"], row["answer"]),
        )
        for row in read_predictions(file)
    ]


def chosen(scores: Scores, group: str) -> Scores:
    """The questions of a category, or all for "accuracy"."""
    return scores if group == "accuracy" else {key: row for key, row in scores.items() if row[1] == group}


def means(scores: Scores) -> dict[str, float | None]:
    """The share of right answers in each group; None where it has no question."""
    values = {group: [score for _, _, score in chosen(scores, group).values()] for group in GROUPS_OF_QUESTIONS}
    return {group: float(np.mean(found)) if found else None for group, found in values.items()}


def intervals(scores: Scores) -> dict[str, Any]:
    found = {}
    for group in GROUPS_OF_QUESTIONS:
        rows = list(chosen(scores, group).values())
        if rows:
            found[group] = mean_interval([row[2] for row in rows], [row[0] for row in rows])
    return found


def differences(one: Scores, other: Scores) -> dict[str, Any]:
    """Intervals of one minus other, on the questions that both answered."""
    found = {}
    for group in GROUPS_OF_QUESTIONS:
        keys = [key for key in chosen(one, group) if key in other]
        if keys:
            ours, theirs = ([of[key][2] for key in keys] for of in (one, other))
            found[group] = asdict(mean_difference_interval(ours, theirs, [one[key][0] for key in keys]))
    return found


def controls_of(folders: Sequence[Path], evaluation: str = "evaluation") -> list[str]:
    """The controls that the first of these was asked."""
    return [
        control
        for folder in folders[:1]
        for control in json.loads((folder / evaluation / "metrics.json").read_text())["results"]
    ]


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


def stages(root: Path) -> dict[str, Any]:
    """Minutes of each stage that is finished and, but for evaluations, what it reached, by its name in the recipe."""
    if not (root / "run.json").is_file():
        return {}
    record = json.loads((root / "run.json").read_text())["stages"]
    return {
        name: {
            "minutes": stage["minutes"],
            **({} if "training.evaluate " in stage["command"] else numbers(stage["figures"])),
        }
        for name, stage in record.items()
        if stage["status"] == "finished"
    }


def numbers(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers among a stage's figures, without its note's settings."""
    nested = {key: numbers(one) for key, one in figures.items() if isinstance(one, dict) and key not in SETTINGS}
    plain = {key: one for key, one in figures.items() if isinstance(one, int | float)}
    return {**plain, **{key: one for key, one in nested.items() if one}}


def mean_of(values: Sequence[float | None]) -> float:
    """The mean of what was measured; NaN where nothing was."""
    return float(np.mean([value for value in values if value is not None] or [np.nan]))
