"""metrics.json between `training.evaluate`, which writes it, and the model card, which shows it."""

import prepared
import pytest
from evaluated import write_run

from hub_export import results as card
from training.evaluate import fingerprint
from training.evaluation import results as evaluation
from training.evaluation.figures import METRICS, Metric, figures_of
from training.report import ReportArguments, main


def answer_length(answers, references):
    return {"words": sum(len(answer.split()) for answer in answers) / len(answers)}


def test_a_metric_is_a_function_and_a_title(tmp_path, monkeypatch):
    """Both, in two files: it is measured, and has its row in the report and in the card."""
    monkeypatch.setitem(METRICS, "length", Metric(answer_length, {"words": "words per answer"}))
    data = prepared.write_prepared(tmp_path / "data", frames=4, splits=("test",))
    run = write_run(tmp_path / "run", data, {1, 2})
    metrics = card.load_metrics(run / "metrics.json")
    value = metrics["results"]["sighted"]["length"]["words"]
    rows = {row[0]: row for row in card.results_table(metrics)["rows"]}
    assert value > 1 and rows["words per answer"][2] == f"{value:.3f}"
    page = main(ReportArguments([str(run)], str(tmp_path / "report.html"))).read_text()
    assert "words per answer" in page


def test_a_figure_without_a_title_is_an_error():
    scores = {"accuracy": 0.5, "length": {"words": 2.0}}
    with pytest.raises(ValueError, match=r"length\.words has no title.*figures\.py"):
        figures_of(scores)


def test_the_card_names_controls_as_the_evaluation_does(tmp_path):
    data = prepared.write_prepared(tmp_path / "data", frames=4, splits=("test",))
    metrics = card.load_metrics(write_run(tmp_path / "run", data, set()) / "metrics.json")
    assert card.blind_of(metrics) == ["black", "text_only"]
    assert [row[0] for row in card.controls_table(metrics)["rows"]] == ["fog, severity 5", "without CAM_BACK"]
    assert len(card.budgets_table(metrics)["rows"]) == 2


@pytest.mark.parametrize("form", ["Metrics", "FigureWords", "ControlWords"])
def test_the_card_reads_what_is_written(form):
    read, written = (getattr(module, form).__annotations__ for module in (card, evaluation))
    assert read.keys() <= written.keys()


def test_figures_are_of_these_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    metrics = {"checkpoint": {"fingerprint": fingerprint(str(tmp_path))}}
    card.check_fingerprint(metrics, tmp_path, None)
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="metrics.json is of another model"):
        card.check_fingerprint(metrics, tmp_path, None)
