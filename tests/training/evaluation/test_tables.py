"""Tables of a run: numbers as text, and words that come from the one table of figures."""

import prepared
import pytest
from evaluated import write_run

from training.evaluation.controls import Control
from training.evaluation.results import Run, load_runs
from training.evaluation.tables import controls_table, figure_text, flat, headline_table, kinds_table, looking_table


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = prepared.write_prepared(folder / "data", frames=4, splits=("test",))
    return load_runs([str(write_run(folder / "run", data, {1, 2}))])[0]


def test_text():
    assert figure_text(0.1234567) == "0.123457" and figure_text(None) == "null" and figure_text([1, 2.5]) == "1, 2.5"
    assert flat({"a": {"b": [{"c": 1}]}}) == [("a › b › 0 › c", "1")]


def test_headline(run):
    rows = dict(headline_table([run, run])["rows"])
    assert rows["visual tokens per scene"] == ["48", "48"] and rows["exact match"] == ["0.875", "0.875"]
    assert rows["sighted − black"][0].startswith("+87.5 [") and "sighted − template majority" not in rows
    assert "BLEU-4 (COCO)" in rows and "BERTScore F1" not in rows


def test_kinds(run):
    table = kinds_table([run], "by_type")
    assert "yes/no" in table["columns"] and table["rows"][0][0] == "run"


def test_controls(run):
    table = controls_table(run, lambda control: control.group == "corruptions")
    assert [name for name, _ in table["rows"]] == ["fog, severity 1", "fog, severity 5"]
    assert controls_table(run, lambda control: control == Control("wrong_scene")) is None


def test_looking(run):
    table = looking_table(run)
    assert "best blind control, same questions" in table["columns"]
    (title, cells), *_ = table["rows"]
    assert title == "perception" and cells[0].startswith("87.5 % [") and cells[1].startswith("text only 87.5 % [")
    assert cells[2:] == ["–", "16", "–"]
    share = {"estimate": 0.5, "low": 0.25, "high": 0.75, "scenes": 2, "confidence": 0.95, "resamples": 20}
    row = {"title": "follow", "answers": 8, "left_out": 3, "score": share, "blind": None, "blind_control": None}
    row |= {"true_images": {**share, "estimate": 0.9}, "swapped_images": {**share, "estimate": 0.1}}
    changed = Run(run.name, run.folder, {**run.metrics, "headline": {"follow": row}})
    follow = ("follow", ["50.0 % [25.0, 75.0]", "–", "90.0 % → 10.0 %", "8", "3"])
    assert looking_table(changed)["rows"] == [follow]
    older = {name: value for name, value in run.metrics.items() if name != "headline"}
    assert looking_table(Run(run.name, run.folder, older)) is None
