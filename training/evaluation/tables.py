"""The report's tables: metrics.json files to rows of text, each `{"columns": [...], "rows": [(name, cells)]}`."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from training.evaluation.controls import BLIND, Control
from training.evaluation.figures import figures_of, value_at, words
from training.evaluation.results import Run

Table = dict[str, Any]


def percent(value: float | None) -> str:
    """0.1234 → 12.3 %."""
    return "–" if value is None else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    """0.1234 → +12.3, a difference in points."""
    return "–" if value is None else f"{100 * value:+.1f}"


def decimal(value: float | None) -> str:
    """Three decimals."""
    return "–" if value is None else f"{value:.3f}"


def figure_text(value: Any) -> str:
    """A value of metrics.json as the last section prints it: numbers with six significant digits."""
    if isinstance(value, list):
        return ", ".join(figure_text(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value) if isinstance(value, bool) or value is None else str(value)


def flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested dicts to (path, text) rows; a list of dicts counts as a dict of numbered entries."""
    if isinstance(value, Mapping):
        return [row for key, item in value.items() for row in flat(item, f"{name} › {key}" if name else str(key))]
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return flat({str(number): item for number, item in enumerate(value)}, name)
    return [(name, figure_text(value))]


def headline_table(runs: Sequence[Run]) -> Table:
    """One column per model: what it reaches, what it costs, what remains of it without eyes."""
    rows = [
        ("accuracy", [_with_interval(run.metrics["intervals"]["sighted"]["accuracy"], percent) for run in runs]),
        ("visual tokens per scene", [f"{run.metrics['visual_tokens_per_scene']:g}" for run in runs]),
    ]
    balanced = [run.metrics["intervals"]["sighted"].get("yes_no_balanced_accuracy") for run in runs]
    if any(balanced):
        rows.append(("yes/no, balanced accuracy", [_with_interval(interval, percent) for interval in balanced]))
    for control in BLIND:
        gaps = [run.metrics["intervals"]["sighted_minus"].get(control, {}) for run in runs]
        for figure, place in (("accuracy", ""), ("perception", ", perception")):
            if any(figure in gap for gap in gaps):
                cells = [_with_interval(gap.get(figure), points) for gap in gaps]
                rows.append((f"sighted − {Control(control).title}{place}", cells))
    sighted = [run.metrics["results"]["sighted"] for run in runs]
    figures = [figure for scores in sighted for figure in figures_of(scores)]
    wording = {tuple(figure["place"]): figure["title"] for figure in figures if figure["interval"] is None}
    rows += [(title, [decimal(value_at(scores, place)) for scores in sighted]) for place, title in wording.items()]
    return {"columns": [run.name for run in runs], "rows": rows}


def looking_table(run: Run) -> Table | None:
    """Whether a model looks where a question points; None for an evaluation of before this was measured."""
    rows = []
    for row in run.metrics.get("headline", {}).values():
        blind = f"{Control(row['blind_control']).title} " if row["blind_control"] else ""
        true = percent(row["true_images"]["estimate"]) if row["true_images"] else "–"
        if row["swapped_images"]:
            true += f" → {percent(row['swapped_images']['estimate'])}"
        cells = [_with_interval(row["score"], percent), blind + _with_interval(row["blind"], percent), true]
        rows.append((row["title"], [*cells, str(row["answers"]), str(row["left_out"] or "–")]))
    columns = ["score", "best blind control, same questions", "true images, same questions", "answers", "left out"]
    return {"columns": columns, "rows": rows} if rows else None


def kinds_table(runs: Sequence[Run], field_name: str) -> Table:
    """Sighted accuracy by "by_category" or "by_type", and the difference to the best blind control."""
    kinds = list(dict.fromkeys(kind for run in runs for kind in run.metrics["results"]["sighted"][field_name]))
    rows = []
    for run in runs:
        results = run.metrics["results"]
        cells = []
        for kind in kinds:
            accuracy = results["sighted"][field_name].get(kind, {}).get("accuracy")
            blind = [
                results[control][field_name].get(kind, {}).get("accuracy") for control in BLIND if control in results
            ]
            blind = [value for value in blind if value is not None]
            gap = None if accuracy is None or not blind else accuracy - max(blind)
            cells.append(percent(accuracy) + (f" ({points(gap)})" if gap is not None else ""))
        rows.append((run.name, cells))
    return {"columns": [words(kind) for kind in kinds], "rows": rows}


def controls_table(run: Run, chosen: Callable[[Control], bool]) -> Table | None:
    """A run's controls of a choice: accuracy, difference to sighted, how many answers changed."""
    rows = []
    for control, scores in run.metrics["results"].items():
        if not chosen(Control.parse(control)):
            continue
        gap = run.metrics["intervals"]["sighted_minus"].get(control, {}).get("accuracy")
        cells = [percent(scores["accuracy"]), _with_interval(gap, points)]
        cells += [percent(scores.get("changed_from_sighted")), str(scores["answers"])]
        cells.append(percent(value_at(scores, ("named_camera", "accuracy"))))
        rows.append((Control.parse(control).title, cells))
    columns = ["accuracy", "sighted − control", "answers changed", "answers", "accuracy where it is named"]
    if all(cells[-1] == percent(None) for _, cells in rows):
        columns, rows = columns[:-1], [(name, cells[:-1]) for name, cells in rows]
    return {"columns": columns, "rows": rows} if rows else None


def calibration_table(runs: Sequence[Run]) -> Table | None:
    """ECE, Brier score, risk-coverage and abstention of each run and image condition."""
    rows = []
    for run in runs:
        found = run.metrics["calibration"]
        for control, kinds in found.items():
            if control == "abstention":
                continue
            kept = found.get("abstention", {}).get("kept", {}).get(control)
            for kind, scores in kinds.items():
                cells = [str(scores["answers"]), percent(scores["accuracy"]), percent(scores["confidence"])]
                cells += [decimal(scores[name]) for name in ("ece", "brier", "aurc")] + [percent(kept)]
                rows.append((f"{run.name}: {words(kind)}, {Control.parse(control).title}", cells))
    columns = ["answers", "accuracy", "confidence", "ECE", "Brier", "AURC", "kept at 80 % coverage"]
    return {"columns": columns, "rows": rows} if rows else None


def hallucination_table(runs: Sequence[Run]) -> Table | None:
    """How often each run says that an absent object is there."""
    results = {run.name: run.metrics["results"] for run in runs if "absent_object" in run.metrics["results"]}
    found = {name: scores["absent_object"]["hallucination"] for name, scores in results.items()}
    columns = list(dict.fromkeys(camera for rates in found.values() for camera in rates))
    rows = [(name, [percent(rates.get(c, {}).get("yes_rate")) for c in columns]) for name, rates in found.items()]
    return {"columns": columns, "rows": rows} if rows else None


def _with_interval(interval: Mapping[str, Any] | None, text: Any) -> str:
    if interval is None:
        return "–"
    shown = text(interval["estimate"])
    if interval["low"] is None:
        return shown
    ends = [text(interval[end]).removesuffix(" %") for end in ("low", "high")]
    return f"{shown} [{ends[0]}, {ends[1]}]"
