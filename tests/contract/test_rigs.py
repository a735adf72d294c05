"""Cameras are data: a car with four cameras, and a fleet that calls its cameras otherwise, go the whole road.

World or fleet → prepare → aligning → a short training → evaluation → report, by the stages' own `main`, with nothing
but a rig.
"""

import json
from pathlib import Path

import pytest
from prepared import write_smoldriver
from transformers import TrainingArguments
from trl import SFTConfig

from training import align, evaluate, finetune, report
from training.data.rig import Rig, read_rig
from training.data.rows import load_rows
from training.prepare import PrepareArguments
from training.prepare import main as prepare
from training.toyworld.make import ToyWorldArguments
from training.toyworld.make import main as make_world

SEED = 31  # of four scenes, two are in the train split and two in the test split

FLEET = {
    "CAM_FRONT_LEFT": "port_bow",
    "CAM_FRONT": "bow",
    "CAM_FRONT_RIGHT": "starboard_bow",
    "CAM_BACK_LEFT": "port_quarter",
    "CAM_BACK": "stern",
    "CAM_BACK_RIGHT": "starboard_quarter",
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """No Java program for each score, no picture of the losses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.metrics.language.available_tokenizer", lambda: "python")
        patch.setattr(finetune, "loss_curve", lambda *_: None)
        yield


def world(folder: Path, rig: str) -> Path:
    return make_world(
        ToyWorldArguments(4, str(folder), seed=SEED, rig=rig, questions_per_frame=60, width=160, num_workers=1)
    )


def prepared(drivelm_json: Path, folder: Path, **options: str) -> Path:
    prepare(PrepareArguments(str(drivelm_json), str(drivelm_json.parent), str(folder), **options))
    return folder


def renamed_fleet(root: Path) -> Path:
    """A nuScenes-format folder whose cameras have the names of `FLEET`; only the table of sensors tells."""
    world(root, "nuscenes")
    table = root / "nuscenes" / "v1.0-toy" / "sensor.json"
    sensors = json.loads(table.read_text())
    table.write_text(json.dumps([{**one, "channel": FLEET.get(one["channel"], one["channel"])} for one in sensors]))
    return root / "nuscenes"


def go_on(data: Path, root: Path, rig: Rig) -> None:
    """Training, evaluation with every control of cameras, and the report, of data that a rig's cameras saw."""
    rows = load_rows(data, "test")
    assert rows.rig == rig and rows.cameras == rig.names
    assert list(rows[0]["images"]) == list(rig.names)
    losses = json.loads((data / "dataset.json").read_text())["report"]
    assert not losses["dropped"], "a camera got lost"

    checkpoint = write_smoldriver(root / "checkpoint", cameras=list(rig.names))
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "max_steps": 2}
    aligned = align.main(
        align.AlignArguments(str(checkpoint), str(data), str(root / "features")),
        TrainingArguments(output_dir=str(root / "align"), per_device_train_batch_size=1, **settings),
    )
    told = align.STAGE.figures(root / "align")
    assert told["frames"] == 1 and None not in told["cosine"][1:]
    trained = finetune.main(
        finetune.FinetuneArguments(str(aligned), str(data)),
        SFTConfig(output_dir=str(root / "run"), save_steps=2, logging_steps=1, **settings),
    )
    controls = ["blind", "cameras", "absent_object", "corrupt:fog:3"]
    run = root / "eval"
    figures = evaluate.main(
        evaluate.EvaluateArguments(
            str(data), str(run), str(trained), controls=controls, max_frames=1, max_new_tokens=2, resamples=9
        )
    )
    results = figures["results"]
    assert [name for name in results if name.startswith("drop:")] == [f"drop:{name}" for name in rig.names]
    assert results["drop_relevant"]["answers"] > 0, "questions name the rig's sectors"
    assert set(results["absent_object"]["hallucination"]) <= {*rig.names, "all"}

    page = report.main(report.ReportArguments([str(run)], str(root / "report.html"), str(data), gallery_frames=1))
    text = page.read_text()
    assert all(f"without {name}" in text for name in rig.names)


@pytest.mark.parametrize("name", ["four", "seven"])
def test_a_rig_s_toy_world_goes_the_whole_road(tmp_path, name):
    rig = read_rig(name)
    folder = world(tmp_path / "world", name)
    data = prepared(folder / "drivelm.json", tmp_path / "data")
    go_on(data, tmp_path, rig)
    asked = {row["question"] for row in load_rows(data, "train")}
    for sector in rig.sectors:
        assert any(f"to the {sector} of the ego car" in question for question in asked)


def test_a_fleet_with_other_camera_names_goes_the_whole_road(tmp_path):
    pytest.importorskip("nuscenes.nuscenes", reason="the nuScenes devkit is an optional extra")
    from training.nuscenes.convert import NuScenesArguments
    from training.nuscenes.convert import main as convert

    fleet = renamed_fleet(tmp_path / "fleet")
    convert(NuScenesArguments(str(fleet), "v1.0-toy", str(tmp_path / "boxes")))
    data = prepared(tmp_path / "boxes" / "drivelm.json", tmp_path / "data")
    rig = load_rows(data, "test").rig
    six = read_rig("nuscenes")
    assert {name: rig.sector(name) for name in rig.names} == {FLEET[name]: six.sector(name) for name in six.names}
    assert rig.mirror("port_bow") == "starboard_bow"
    go_on(data, tmp_path, rig)


def test_a_fleet_s_cameras_are_counted_where_no_rig_tells_of_them(tmp_path):
    """A DriveLM file alone says nothing about where its cameras look: they are counted and named, not forgotten."""
    folder = world(tmp_path / "world", "four")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "nuscenes").symlink_to(folder / "nuscenes", target_is_directory=True)
    (alone / "drivelm.json").write_text((folder / "drivelm.json").read_text())
    with pytest.raises(ValueError, match=r"--rig"):
        prepared(alone / "drivelm.json", tmp_path / "without")
    data = prepared(alone / "drivelm.json", tmp_path / "with", rig="four")
    assert load_rows(data, "train").rig == read_rig("four")
