"""Curves of a run, and of a training's losses."""

import json

import prepared
from evaluated import write_run

from training.evaluation.curves import corruption_curves, loss_lines, token_curve
from training.evaluation.results import load_runs


def test_curves(tmp_path):
    data = prepared.write_prepared(tmp_path / "data", frames=4, splits=("test",))
    first = load_runs([str(write_run(tmp_path / "first", data, {1, 2}))])[0]
    assert token_curve(first) == [(12.0, 0.875), (48.0, 0.875)]
    assert corruption_curves(first) == {"fog": [(0, 0.875), (1, 0.875), (5, 0.875)]}


def test_losses(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 0.5}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert loss_lines("mine", file) == {"mine": [(1, 2.0), (2, 1.0)], "mine, held out": [(2, 0.5)]}
