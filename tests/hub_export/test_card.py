import json

import pytest
import yaml
from exported import export, save_checkpoint
from huggingface_hub import ModelCard

from hub_export.card import pinned, snippet, write_card
from hub_export.results import load_metrics
from smoldriver_hf.fingerprint import fingerprint


def interval(estimate, low=None, high=None):
    return {"estimate": estimate, "low": low, "high": high, "scenes": 9, "confidence": 0.95, "resamples": 50}


def scores(accuracy, balanced, exact, **more):
    kinds = {"yes_no": {"answers": 60, "accuracy": accuracy, "balanced_accuracy": balanced}}
    return {"answers": 160, "accuracy": accuracy, "by_type": kinds, "exact_match": exact, **more}


def words(title, group, corruption=None):
    return {"title": title, "group": group, "corruption": corruption}


# As training.evaluate writes it; the figures are made up.
METRICS = {
    "command": "python -m training.evaluate --checkpoint /Users/anna/run",
    "arguments": {"checkpoint": "/Users/anna/run", "data": "/Users/anna/toyworld"},
    "seed": 4,
    "split": "test",
    "split_hash": "abc123",
    "versions": {"python": "3.11.9", "torch": "2.13.0"},
    "counts": {"scenes": 9, "frames": 16, "questions": 160},
    "results": {
        "sighted": scores(0.8125, 0.75, 0.5, visual_tokens_per_scene=48.0, sacrebleu={"score": 31.25}),
        "template_majority": scores(0.625, 0.5, 0.4375),
        "black": scores(0.5, 0.5625, 0.25),
        "drop:CAM_BACK": {"answers": 160, "accuracy": 0.75, "changed_from_sighted": 0.125},
        "corrupt:fog:1": {"answers": 160, "accuracy": 0.78125, "changed_from_sighted": 0.0625},
        "corrupt:fog:3": {"answers": 160, "accuracy": 0.6875, "changed_from_sighted": 0.375},
        "sighted@2": scores(0.71875, 0.7, 0.4, visual_tokens_per_scene=12.0),
    },
    "intervals": {
        "sighted": {"accuracy": interval(0.8125, 0.75, 0.875)},
        "sighted_minus": {
            "template_majority": {"accuracy": interval(0.1875, 0.0625, 0.25)},
            "drop:CAM_BACK": {"accuracy": interval(0.0625)},
        },
    },
}
METRICS["controls"] = {
    "sighted": words("sighted", "sighted"),
    "template_majority": words("template majority", "blind"),
    "black": words("black", "blind"),
    "drop:CAM_BACK": words("without CAM_BACK", "cameras"),
    "corrupt:fog:1": words("fog, severity 1", "corruptions", "fog"),
    "corrupt:fog:3": words("fog, severity 3", "corruptions", "fog"),
    "sighted@2": words("sighted, 2 queries per camera", "budgets"),
}
METRICS["figures"] = [
    {"title": "accuracy", "place": ["accuracy"], "interval": "accuracy"},
    {
        "title": "balanced accuracy, yes/no",
        "place": ["by_type", "yes_no", "balanced_accuracy"],
        "interval": "yes_no_balanced_accuracy",
    },
    {"title": "exact match", "place": ["exact_match"], "interval": None},
    {"title": "BLEU (sacrebleu)", "place": ["sacrebleu", "score"], "interval": None},
]
COST = {"command": "python -m benchmarks.x", "device": "one thread", "rows": [{"budget": 64, "first token, s": 2.125}]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "final")


def write_metrics(folder, evaluated, **changes):
    (folder / "metrics.json").write_text(
        json.dumps({**METRICS, "checkpoint": {"path": "x", "fingerprint": fingerprint(evaluated)}, **changes})
    )
    return str(folder / "metrics.json")


def card_with(folder, checkpoint, **options):
    (folder.parent / "cost.json").write_text(json.dumps(COST))
    metrics = write_metrics(folder.parent, checkpoint)
    options |= {"metrics": metrics, "cost": str(folder.parent / "cost.json"), "license": "cc-by-nc-sa-4.0"}
    export(folder, checkpoint, **options)
    return ModelCard.load(folder / "README.md")


def test_figures_stand_beside_their_blind_controls(checkpoint, tmp_path):
    card = card_with(tmp_path / "smoldriver", checkpoint)
    lines = card.text.splitlines()
    assert "| figure | answers | sighted | template majority | black | sighted − best blind |" in lines
    assert "| accuracy | 160 | 0.812 [0.750, 0.875] | 0.625 | 0.500 | +0.188 [+0.062, +0.250] |" in lines
    assert "| balanced accuracy, yes/no | 60 | 0.750 | 0.500 | 0.562 | +0.188 |" in lines  # black is the best here
    assert "| exact match | 160 | 0.500 | 0.438 | 0.250 | +0.062 |" in lines
    assert "| BLEU (sacrebleu) | – | 31.250 | – | – | – |" in lines
    assert "| 12 | 0.719 | 0.700 |\n| 48 | 0.812 | 0.750 |" in card.text
    assert "| without CAM_BACK | 160 | 0.750 | 0.125 | +0.062 |" in lines
    assert "| fog, severity 3 | 160 | 0.688 | 0.375 | – |" in lines and "severity 1" not in card.text
    assert "On **toyworld**, split `test` (by scene, split hash `abc123`), seed 4" in card.text
    assert "160 questions about 16 frames of 9 scenes" in card.text
    assert "`python -m training.evaluate --checkpoint run` with python 3.11.9, torch 2.13.0" in card.text
    assert "| budget | first token, s |\n|---|---|\n| 64 | 2.125 |" in card.text


def test_metadata_is_what_the_hub_reads(checkpoint, tmp_path):
    data = card_with(tmp_path / "smoldriver", checkpoint).data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        *("transformers", "image-text-to-text"),
        "cc-by-nc-sa-4.0",
    )
    assert "custom_code" in data.tags
    results = {result.metric_name: result for result in data.eval_results}
    accuracy = results["accuracy (blind, template_majority: 0.625)"]
    assert (accuracy.metric_value, accuracy.dataset_name, accuracy.dataset_split) == (0.8125, "toyworld", "test")
    assert results["balanced accuracy, yes/no (blind, black: 0.562)"].metric_value == 0.75


def test_every_number_of_the_results_stands_in_the_published_file(checkpoint, tmp_path):
    folder = tmp_path / "smoldriver"
    card_with(folder, checkpoint)
    published = json.loads((folder / "metrics.json").read_text())
    assert published == {
        **METRICS,
        "checkpoint": {"path": "x", "fingerprint": fingerprint(checkpoint)},
        "command": "python -m training.evaluate --checkpoint run",
        "arguments": {"checkpoint": "run", "data": "toyworld"},
    }


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
        "notes": "split test, split hash abc123, seed 4; blind, template_majority: 0.625",
    }


@pytest.mark.parametrize("key", ["split_hash", "seed", "command", "versions", "results", "split", "checkpoint"])
def test_figures_without_their_provenance_are_refused(tmp_path, key):
    content = {**METRICS, "checkpoint": {}}
    (tmp_path / "metrics.json").write_text(json.dumps({name: content[name] for name in content if name != key}))
    with pytest.raises(ValueError, match=f"lacks {key}"):
        load_metrics(tmp_path / "metrics.json")


def test_figures_without_a_control_are_refused(tmp_path):
    results = {"sighted": METRICS["results"]["sighted"], "corrupt:fog:1": METRICS["results"]["corrupt:fog:1"]}
    (tmp_path / "metrics.json").write_text(json.dumps({**METRICS, "checkpoint": {}, "results": results}))
    with pytest.raises(ValueError, match="blind control"):
        load_metrics(tmp_path / "metrics.json")


def test_figures_of_another_checkpoint_are_refused(checkpoint, tmp_path):
    metrics = write_metrics(tmp_path, checkpoint, checkpoint={"path": "x", "fingerprint": "sha256:0"})
    with pytest.raises(ValueError, match="of another model"):
        export(tmp_path / "smoldriver", checkpoint, metrics=metrics)


def test_a_figure_that_nobody_knows_is_shown_under_its_own_title(checkpoint, tmp_path):
    figures = [*METRICS["figures"], {"title": "smoothness", "place": ["smooth", "mean"], "interval": None}]
    results = {**METRICS["results"], "sighted": {**METRICS["results"]["sighted"], "smooth": {"mean": 0.5}}}
    metrics = write_metrics(tmp_path, checkpoint, figures=figures, results=results)
    card = (export(tmp_path / "smoldriver", checkpoint, metrics=metrics) / "README.md").read_text()
    assert "| smoothness | – | 0.500 | – | – | – |" in card.splitlines()


def test_a_control_without_words_is_an_error(tmp_path):
    results = {**METRICS["results"], "mirrored": scores(0.5, 0.5, 0.5)}
    (tmp_path / "metrics.json").write_text(json.dumps({**METRICS, "checkpoint": {}, "results": results}))
    with pytest.raises(ValueError, match="does not say what the controls mirrored are"):
        load_metrics(tmp_path / "metrics.json")


def test_a_file_of_before_the_words_is_shown_by_its_accuracies(checkpoint, tmp_path, capsys):
    old = {key: value for key, value in METRICS.items() if key not in ("controls", "figures")}
    content = {**old, "checkpoint": {"path": "x", "fingerprint": fingerprint(checkpoint)}}
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    folder = export(tmp_path / "smoldriver", checkpoint, metrics=str(tmp_path / "metrics.json"))
    lines = (folder / "README.md").read_text().splitlines()
    assert "| accuracy | 160 | 0.812 [0.750, 0.875] | 0.625 | 0.500 | +0.188 [+0.062, +0.250] |" in lines
    assert "| accuracy, yes_no | 60 | 0.812 | 0.625 | 0.500 | +0.188 |" in lines
    assert "| corrupt:fog:1 | 160 | 0.781 | 0.062 | – |" in lines and "| 12 | 0.719 | 0.700 |" in lines
    assert "writes it anew and asks nothing again" in capsys.readouterr().err


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
