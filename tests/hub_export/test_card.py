import json

import pytest
import yaml
from exported import export, save_checkpoint
from huggingface_hub import ModelCard

from hub_export.card import load_metrics, pinned, snippet, write_card

METRICS = {
    "dataset": "toyworld",
    "split": "test",
    "split_hash": "abc123",
    "seed": 4,
    "command": "python -m training.evaluate --model /Users/anna/run",
    "versions": {"torch": "2.13.0", "sacrebleu": "2.6.0"},
    "model": "/Users/anna/run",
    "results": {
        "accuracy": {"value": 0.8125, "low": 0.75, "high": 0.875, "n": 160},
        "counts": {"exact": 0.5, "mean_absolute_error": 1.25},
        "questions": 160,
        "calibrated": True,
    },
    "controls": {"text_only": {"accuracy": 0.625, "counts": {"exact": 0.5}}, "majority": {"accuracy": 0.5}},
}
COST = {"command": "python -m benchmarks.x", "device": "one thread", "rows": [{"budget": 64, "first token, s": 2.125}]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "final")


def card_with(folder, checkpoint, **changes):
    metrics, cost = folder.parent / "metrics.json", folder.parent / "cost.json"
    metrics.write_text(json.dumps({**METRICS, **changes}))
    cost.write_text(json.dumps(COST))
    export(folder, checkpoint, metrics=str(metrics), cost=str(cost), license="cc-by-nc-sa-4.0")
    return ModelCard.load(folder / "README.md")


def test_figures_stand_beside_their_blind_controls(checkpoint, tmp_path):
    card = card_with(tmp_path / "smoldriver", checkpoint)
    lines = card.text.splitlines()
    assert "| metric | sighted | text_only | majority | sighted − text_only |" in lines
    assert "| accuracy | 0.812 [0.750, 0.875] | 0.625 | 0.500 | +0.188 |" in lines
    assert "| counts/exact | 0.500 | 0.500 | – | +0.000 |" in lines
    assert "| counts/mean_absolute_error | 1.250 | – | – | – |" in lines
    assert "| questions | 160 | – | – | – |" in lines
    assert "calibrated" not in card.text
    assert "split `test` (split hash `abc123`), seed 4" in card.text
    assert "`python -m training.evaluate --model run` with torch 2.13.0, sacrebleu 2.6.0" in card.text
    assert "| budget | first token, s |\n|---|---|\n| 64 | 2.125 |" in card.text


def test_metadata_is_what_the_hub_reads(checkpoint, tmp_path):
    data = card_with(tmp_path / "smoldriver", checkpoint).data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        *("transformers", "image-text-to-text"),
        "cc-by-nc-sa-4.0",
    )
    assert "custom_code" in data.tags
    results = {result.metric_name: result for result in data.eval_results}
    accuracy = results["accuracy (text_only: 0.625)"]
    assert (accuracy.metric_value, accuracy.dataset_name, accuracy.dataset_split) == (0.8125, "toyworld", "test")
    assert results["counts/mean_absolute_error"].metric_value == 1.25


def test_every_number_of_the_results_stands_in_the_published_file(checkpoint, tmp_path):
    folder = tmp_path / "smoldriver"
    card_with(folder, checkpoint)
    published = json.loads((folder / "metrics.json").read_text())
    assert published == {**METRICS, "command": "python -m training.evaluate --model run", "model": "run"}


def test_eval_results_are_written_for_a_data_set_on_the_hub_only(checkpoint, tmp_path):
    (tmp_path / "local").mkdir()
    card_with(tmp_path / "local" / "smoldriver", checkpoint)
    assert not (tmp_path / "local" / "smoldriver" / ".eval_results").exists()
    (tmp_path / "hub").mkdir()
    card_with(tmp_path / "hub" / "smoldriver", checkpoint, dataset="anna/toyworld")
    entries = yaml.safe_load((tmp_path / "hub" / "smoldriver" / ".eval_results" / "smoldriver.yaml").read_text())
    assert entries[0] == {
        "dataset": {"id": "anna/toyworld", "task_id": "accuracy"},
        "value": 0.8125,
        "notes": "split test, split hash abc123, seed 4",
    }


@pytest.mark.parametrize("key", ["controls", "split_hash", "seed", "command", "versions", "results", "split"])
def test_figures_without_their_provenance_are_refused(tmp_path, key):
    (tmp_path / "metrics.json").write_text(json.dumps({name: value for name, value in METRICS.items() if name != key}))
    with pytest.raises(ValueError, match=f"lacks {key}"):
        load_metrics(tmp_path / "metrics.json")


def test_figures_without_a_control_are_refused(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({**METRICS, "controls": {}}))
    with pytest.raises(ValueError, match="blind control"):
        load_metrics(tmp_path / "metrics.json")


def test_rows_of_a_cost_table_have_the_same_columns(checkpoint, tmp_path):
    folder = export(tmp_path / "smoldriver", checkpoint)
    (folder / "cost.json").write_text(json.dumps({**COST, "rows": [{"a": 1}, {"b": 2}]}))
    with pytest.raises(ValueError, match="columns"):
        write_card(folder, "smoldriver", "apache-2.0")


def test_a_commit_goes_into_the_snippet_and_nowhere_else(checkpoint, tmp_path):
    folder = export(tmp_path / "smoldriver", checkpoint)
    card = (folder / "README.md").read_text()
    commit = "0123456789abcdef" * 2
    published = pinned(card, "smoldriver", "anna/smoldriver", commit)
    assert f'repository, revision = "anna/smoldriver", "{commit}"' in published
    compile(snippet("anna/smoldriver", commit), "snippet", "exec")
    assert published.replace(snippet("anna/smoldriver", commit), snippet("smoldriver", None)) == card
    with pytest.raises(ValueError, match="does not hold the snippet"):
        pinned(card.replace("AutoProcessor", "Auto"), "smoldriver", "anna/smoldriver", commit)
