"""Evaluations as `training.evaluate` leaves them, of a few questions in two scenes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.evaluation.results import control_file


def interval(estimate: float) -> dict[str, float]:
    return {"estimate": estimate, "low": estimate - 0.1, "high": estimate + 0.1}


def headline_row(title: str, estimate: float, **others: Any) -> dict[str, Any]:
    row = {"title": title, "answers": 6, "left_out": 0, "score": interval(estimate), "blind": interval(0.3)}
    return {**row, "blind_control": "black", "true_images": None, "swapped_images": None, **others}


def write_evaluation(folder: Path, right: Mapping[str, list[bool]]) -> None:
    """Each control answers three questions in each of two scenes right or wrong."""
    results = {}
    for control, answers in right.items():
        lines = []
        for number, good in enumerate(answers):
            row = {"question_id": str(number), "scene_token": f"scene{number // 3}", "category": "perception"}
            row |= {"question": "Are there cars?", "reference": "Yes.", "answer": "Yes." if good else "No."}
            lines.append(json.dumps(row) + "\n")
        file = control_file(folder, control)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(lines))
        share = sum(answers) / len(answers)
        results[control] = {
            "visual_tokens_per_scene": 96.0,
            "accuracy": share,
            "by_category": {"perception": {"answers": len(answers), "accuracy": share}},
            "by_type": {},
            "exact_match": 0.5,
        }
    follow = {"true_images": interval(0.8), "swapped_images": interval(0.1)}
    headline = {
        "existence": headline_row("existence, yes and no weighing alike", results["sighted"]["accuracy"]),
        "follow": headline_row("left and right swapped: answers that follow", 0.9, blind=None, **follow),
    }
    metrics = {"results": results, "split_hash": "0" * 64, "arguments": {}, "headline": headline}
    (folder / "metrics.json").write_text(json.dumps(metrics))
