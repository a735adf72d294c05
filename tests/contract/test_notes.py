"""The note of a stage: what `training.stages.files` writes, `hub_export.lineage` reads and a card tells."""

import json
import shutil

import pytest
from exported import export, save_checkpoint
from prepared import write_prepared

from hub_export.lineage import notes_of
from hub_export.prepared import Prepared
from training.assemble import AssembleArguments
from training.data.rows import load_rows
from training.finetune import FinetuneArguments
from training.merge import MergeArguments
from training.stages.files import make_note, read_notes, write_note


def leave(folder, *note, **more):
    folder.mkdir(parents=True, exist_ok=True)
    write_note(folder, make_note(*note, **more))
    return folder


@pytest.fixture
def merged(tmp_path):
    """The folders of a recipe that invents a stage, heals, adapts and merges: notes without weights."""
    data = write_prepared(tmp_path / "data", frames=1)
    part = "The tower fell from a wheel."
    first = leave(
        tmp_path / "assembled", "assemble", AssembleArguments(str(tmp_path / "assembled")), parts=[part], words=["a"]
    )
    arguments = FinetuneArguments(checkpoint=str(first), data=str(data))
    invented = leave(tmp_path / "dreamt", "rooms.dream", arguments, made_from=[first], trained_on=data, depth=3)
    arguments = FinetuneArguments(checkpoint=str(invented), data=str(data))
    adapter = leave(tmp_path / "adapter", "finetune", arguments, made_from=[invented], trained_on=data, steps=4)
    arguments = MergeArguments(str(invented), str(adapter), str(tmp_path / "merged"))
    return leave(tmp_path / "merged", "merge", arguments, made_from=[adapter, invented])


def test_a_reader_finds_every_note_that_was_written(merged, tmp_path):
    (written,) = read_notes(merged)
    for folder in ("assembled", "dreamt", "adapter"):  # the last note knows them all
        shutil.rmtree(tmp_path / folder)
    notes = notes_of(merged)
    assert [note["stage"] for note in notes] == ["assemble", "dream", "finetune", "merge"]
    assert notes == [*written["history"], {key: value for key, value in written.items() if key != "history"}]


def test_a_history_goes_on_with_the_notes_of_before_it(merged, tmp_path):
    (tmp_path / "assembled" / "assemble.json").unlink()
    old = {"command": "python -m training.assemble --offline", "arguments": {"offline": True, "vision": "a/b"}}
    leave(tmp_path / "new", "merge", MergeArguments("assembled", "x", "new"), made_from=[tmp_path / "assembled"])
    (tmp_path / "assembled" / "assemble.json").write_text(json.dumps(old))
    assert [note["stage"] for note in notes_of(tmp_path / "new")] == ["assemble", "merge"]


def test_card_and_export_name_every_stage(merged, tmp_path):
    source = save_checkpoint(tmp_path / "final")
    shutil.copyfile(merged / "merge.json", source / "merge.json")
    folder = export(tmp_path / "smoldriver", source, license="mit")
    names = sorted(path.name for path in (folder / "recipe").iterdir())
    assert names == ["1-assemble.json", "2-dream.json", "3-finetune.json", "4-merge.json"]
    card = (folder / "README.md").read_text()
    for note in notes_of(merged):
        assert f"**{note['stage']}**" in card
    assert "The tower fell from a wheel." in card and "- depth: 3" in card
    assert "Stage dream trained on `data`, which is not a generated world" in card
    assert str(tmp_path) not in "".join(path.read_text() for path in (folder / "recipe").iterdir())


def test_both_halves_read_the_same_prepared_data(tmp_path):
    data = write_prepared(tmp_path / "data", frames=3, cameras=("CAM_BACK", "CAM_FRONT"))
    rows, images = load_rows(data, "train"), Prepared(data).images("train")
    frames = {(frame["scene_token"], frame["frame_token"]): frame["images"] for frame, _ in rows.frames()}
    assert images == frames and len(images) == 3 and Prepared(data).image_root == rows.image_root
