"""`make demo`: says what is right, and runs from nothing to a report, once."""

import json
from pathlib import Path

import pytest
import transformers
import yaml

from benchmarks.demo import SHOWN_MODELS, DemoArguments, main, show
from hub_export.check import read_stamp
from training.run import ROOT

FEW = {"scenes": 20, "max_steps": 2, "per_device_train_batch_size": 2}


def test_right_answers_are_counted(capsys):
    ask = "Are there cars to the front of the ego car?"
    answers = [
        {"question": ask, "reference": "Yes.", "answer": "Yes.", "blind_answer": "No."},
        {"question": ask, "reference": "No.", "answer": "Yes.", "blind_answer": "Yes."},
        {"question": ask, "reference": "No.", "answer": "No.", "blind_answer": "No."},
    ]
    share = {"estimate": 0.5}
    model = {"perception": share, "accuracy": share, "visual_tokens_per_scene": 24, "questions": 77}
    gap = {"estimate": 0.246, "low": 0.187, "high": 0.306, "scenes": 5}
    results = {
        "models": {name: model for name in SHOWN_MODELS},
        "minus_blind": {"smoldriver": {"perception": gap, "accuracy": gap}},
    }
    show(results, answers, Path("report.html"), 1.0)
    said = capsys.readouterr().out
    assert said.count("✓") == 2 and said.count("(is: No.)") == 1
    assert "2 of these 3 are right; of the blind model's 1." in said
    assert "+24.6 points [+18.7, +30.6]" in said and "77 questions about 5 unseen scenes" in said


@pytest.mark.slow
def test_from_nothing_to_a_report(tmp_path, capsys):
    recipe = yaml.safe_load((ROOT / "training" / "recipes" / "demo.yaml").read_text())
    for section in recipe.values():
        if isinstance(section, dict):
            section.update({name: value for name, value in FEW.items() if name in section})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    args = DemoArguments(str(tmp_path / "a demo"), str(tmp_path / "tiny.yaml"))
    report = main(args)
    assert "<html" in report.read_text()
    (environment,) = read_stamp(report.parent / "export")["environments"]  # nothing was fetched for the check
    assert environment["versions"]["transformers"] == transformers.__version__
    assert all(row["blind_answer"] for row in json.loads((report.parent / "answers.json").read_text()))
    capsys.readouterr()
    assert main(args) == report
    assert capsys.readouterr().out.startswith("finished before")
