"""The report: one file with everything inside, every figure of metrics.json in it, and nothing from elsewhere."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import prepared
import pytest
from evaluated import EVIL, write_run

from smoldriver_hf import CAMERAS
from training.data.rows import load_rows
from training.evaluation.curves import named_losses
from training.evaluation.results import load_runs
from training.evaluation.tables import flat
from training.report import ReportArguments, main


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepared.write_prepared(tmp_path_factory.mktemp("data"), frames=4, splits=("test",))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / "first", data, {1, 2}, attention=True), write_run(root / "second", data, {2, 5, 9})]


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("training") / "metrics.jsonl"
    lines = [{"step": step, "loss": 2.0 / step} for step in range(1, 9)] + [{"step": 8, "eval_loss": 0.3}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def page(runs, data, losses) -> str:
    output = runs[0].parent / "report.html"
    main(ReportArguments([str(run) for run in runs], str(output), str(data), [f"mine={losses}"], gallery_frames=3))
    return output.read_text()


class Elements(HTMLParser):
    """Tags with their attributes, and the text outside style and script."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.silent = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.silent = tag in ("style", "script")

    def handle_endtag(self, tag):
        self.silent = False

    def handle_data(self, data):
        if not self.silent:
            self.texts.append(data)

    def having(self, tag: str, name: str, value: str) -> list[dict]:
        return [found for kind, found in self.tags if kind == tag and value in (found.get(name) or "").split()]


def test_nothing_is_loaded_from_elsewhere(page):
    for tag, attributes in Elements(page).tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), (tag, attributes)
    assert not re.search(r"https?:|//\w+\.\w|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", page))
    assert [tag for tag, _ in Elements(page).tags].count("script") == 1


def test_every_figure_of_metrics_json_is_there(page, runs):
    text = "".join(Elements(page).texts)
    for run in runs:
        rows = flat(json.loads((run / "metrics.json").read_text()))
        assert len(rows) > 100
        for name, value in rows:
            assert name in text and value in text, name


def test_what_models_say_is_text(page):
    assert EVIL not in page and EVIL in "".join(Elements(page).texts)


def test_gallery(page, data, runs):
    elements = Elements(page)
    assert len(elements.having("article", "class", "frame")) == 3
    pictures = [found for tag, found in elements.tags if tag == "img" and found.get("alt") in CAMERAS]
    assert [found["alt"] for found in pictures] == [*CAMERAS] * 3
    assert all(found["src"].startswith("data:image/jpeg;base64,") for found in pictures)
    overlays = elements.having("img", "class", "overlay")
    assert [found["data-run"] for found in overlays] == ["first"] * 6
    questions = elements.having("div", "class", "question")
    rows = load_rows(data, "test")
    assert len(questions) == 12 and {found["data-category"] for found in questions} == {"perception"}
    expected = ["".join("01"[index not in wrong] for wrong in ({1, 2}, {2, 5, 9})) for index in range(12)]
    assert [found["data-right"] for found in questions] == expected
    text = "".join(elements.texts)
    assert all(row["question"] in text and row["answer"] in text for row in [rows[index] for index in range(12)])
    assert len(elements.having("li", "class", "wrong")) == 5 and text.count("on black images:") == 24 - 5


def test_figures_and_tables(page):
    text = "".join(Elements(page).texts)
    for title in ("Sighted minus blind", "Accuracy over visual tokens", "Reliability, yes/no", "Loss: mine"):
        assert title in text
    for title in ("Corruptions: first", "without CAM_BACK", "fog, severity 5", "Loss: mine, held out"):
        assert title in text
    images = [found for tag, found in Elements(page).tags if tag == "img" and "svg" in found["src"]]
    assert len(images) == 8 and all(found["alt"] for found in images)
    assert "87.5 %" in text and "+87.5" in text  # 14 of 16 right, none on black images


def test_without_data_there_is_no_gallery(runs, tmp_path):
    output = main(ReportArguments([str(runs[0])], str(tmp_path / "deep" / "report.html")))
    assert "Gallery" not in output.read_text() and len(list(output.parent.iterdir())) == 1


def test_errors_teach(runs, data, tmp_path):
    with pytest.raises(ValueError, match="no finished evaluation"):
        load_runs([str(tmp_path)])
    with pytest.raises(ValueError, match="each run may come once"):
        load_runs([str(runs[0]), str(runs[0])])
    other = shutil.copytree(runs[0], tmp_path / "elsewhere" / "first")
    assert [run.name for run in load_runs([str(runs[0]), str(other)])] == [
        f"{runs[0].parent.name}/first",
        "elsewhere/first",
    ]
    metrics = json.loads((other / "metrics.json").read_text())
    (other / "metrics.json").write_text(json.dumps({**metrics, "split_hash": "x"}))
    with pytest.raises(ValueError, match="different data cannot be compared"):
        load_runs([str(runs[0]), str(other)])
    with pytest.raises(ValueError, match="the runs x"):
        main(ReportArguments([str(other)], str(tmp_path / "a.html"), str(data)))
    with pytest.raises(ValueError, match="no such file"):
        named_losses(["a=b.jsonl"])
    assert not (tmp_path / "a.html").exists()
