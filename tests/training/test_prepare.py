import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.drivelm_files import BOX, CAMERAS, TAG, make_frame, make_world, qa, write_json, write_world
from training.data.contents import write_contents
from training.data.drivelm import scene_split, split_hash
from training.data.rows import SPLITS, load_rows
from training.prepare import PrepareArguments, main

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "drivelm"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the optional real data is absent")


def prepare(file: Path, root: Path, output: Path, **options) -> dict:
    return main(PrepareArguments(str(file), str(root), str(output), **options))


def table(output: Path, name: str, split: str = "train") -> list[dict]:
    return [
        row for file in sorted((output / name).glob(f"{split}-*.parquet")) for row in pq.read_table(file).to_pylist()
    ]


def dropped(info: dict) -> dict[str, int]:
    return {reason: entry["count"] for reason, entry in info["report"]["dropped"].items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with drivelm.json (30 scenes of one frame) and its images."""
    folder = tmp_path / "world"
    write_world(folder, make_world(30, frames=1))
    return folder


def test_tables(world, tmp_path):
    info = prepare(world / "drivelm.json", world, tmp_path / "out", strict=True)
    assert info == json.loads((tmp_path / "out" / "dataset.json").read_text())
    splits = {f"scene-{n}": scene_split(f"scene-{n}") for n in range(30)}
    assert set(splits.values()) == set(SPLITS)
    for split in SPLITS:
        scenes = {token for token, name in splits.items() if name == split}
        frames, questions = table(tmp_path / "out", "frames", split), table(tmp_path / "out", "questions", split)
        assert {row["scene_token"] for row in frames} == {row["scene_token"] for row in questions} == scenes
        assert list(frames[0]) == ["scene_token", "frame_token", *CAMERAS]
        assert info["counts"][split] == {
            "scenes": len(scenes), "frames": len(scenes), "questions": 5 * len(scenes), "perception": 2 * len(scenes),
            "prediction": len(scenes), "planning": len(scenes), "behavior": len(scenes),
        }  # fmt: skip
    assert info["split_hash"] == split_hash(splits)
    row = next(row for row in table(tmp_path / "out", "questions") if TAG in row["question"])
    assert row == {
        "question_id": f"{row['scene_token']}_{row['frame_token']}_1",
        "scene_token": row["scene_token"],
        "frame_token": row["scene_token"].replace("scene", "frame") + "-0",
        "category": "perception",
        "tag": [],
        "question": f"What is the visual description of {TAG}?",
        "answer": 'Brown SUV – größer, "quoted" \\ and 日本.',
        "objects": [TAG],
    }
    assert not any(b"SECRET" in data.upper() for data in contents(tmp_path / "out").values())


@settings(max_examples=15, deadline=None)
@given(old=st.sets(st.integers(0, 200), min_size=1, max_size=6), new=st.sets(st.integers(0, 200), max_size=6))
def test_a_scene_keeps_its_split_when_data_is_added(old, new, tmp_path_factory):
    folder = tmp_path_factory.mktemp("added")
    found = []
    for name, scenes in (("old", old), ("both", old | new)):
        full = make_world(1, frames=2)["scene-0"]["key_frames"]
        world = {f"s{n}": {"key_frames": {f"{n}-{key}": frame for key, frame in full.items()}} for n in scenes}
        prepare(write_world(folder, world), folder, folder / name)
        by_split = {split: {row["scene_token"] for row in table(folder / name, "frames", split)} for split in SPLITS}
        assert sum(map(len, by_split.values())) == len(set().union(*by_split.values())) == len(scenes)  # disjoint
        found.append({scene: split for split, members in by_split.items() for scene in members})
    assert found[0].items() <= found[1].items()


def test_same_command_again_does_nothing_and_any_change_prepares_again(world, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = (world / "drivelm.json", world, out)
    file = out / "frames" / "train-00000-of-00001.parquet"

    def ran(**options) -> bool:
        before = file.stat().st_ino
        info = prepare(*arguments, **options)
        assert info == json.loads((out / "dataset.json").read_text())
        again = file.stat().st_ino != before
        assert ("nothing has changed" in capsys.readouterr().out) != again
        return again

    prepare(*arguments)
    capsys.readouterr()
    assert not ran()
    assert ran(coordinates="normalised") and ran() and not ran()
    image = next(world.rglob("*.jpg"))
    image.unlink()
    assert ran() and not ran()
    Image.new("RGB", (64, 64), (200, 0, 0)).save(image)
    assert ran() and not ran()
    file.write_bytes(b"")
    assert ran()
    write_json(world, make_world(29, frames=1))
    assert ran() and not ran()


@pytest.mark.parametrize("layout", ["holds nuscenes", "is nuscenes"])
def test_image_root_is_the_folder_that_holds_nuscenes_or_nuscenes_itself(world, tmp_path, layout):
    root = world if layout == "holds nuscenes" else world / "nuscenes"
    prepare(world / "drivelm.json", root, tmp_path / "out", strict=True)
    prefix = "nuscenes/samples" if layout == "holds nuscenes" else "samples"
    assert all(row["CAM_BACK"].startswith(f"{prefix}/CAM_BACK/") for row in table(tmp_path / "out", "frames"))
    for row in load_rows(tmp_path / "out", "train"):
        assert all(Path(path).is_file() for path in row["images"].values())


def test_extra_views_get_a_column_and_absent_cameras_are_no_loss(tmp_path):
    world = {"s": {"key_frames": {"a": make_frame("a", (*CAMERAS, "LIDAR_BEV")), "b": make_frame("b", ("CAM_BACK",))}}}
    info = prepare(write_world(tmp_path, world), tmp_path, tmp_path / "out", split="train", strict=True)
    first, second = table(tmp_path / "out", "frames")
    assert list(first) == ["scene_token", "frame_token", *CAMERAS, "LIDAR_BEV"] and all(first.values())
    assert [name for name, value in second.items() if value] == ["scene_token", "frame_token", "CAM_BACK"]
    assert info["report"]["noted"]["camera not in image_paths"]["count"] == 5


def test_coordinates_and_categories(world, tmp_path):
    arguments = (world / "drivelm.json", world)
    info = prepare(*arguments, tmp_path / "none", coordinates="none", strict=True)
    assert not any("<c" in row["question"] or BOX in row["answer"] for row in table(tmp_path / "none", "questions"))
    assert info["report"]["filtered"]["coordinates"]["count"] == 60  # a tag and a box in each of 30 frames
    prepare(*arguments, tmp_path / "shares", coordinates="normalised")
    row = next(row for row in table(tmp_path / "shares", "questions") if row["objects"])
    assert row["objects"] == ["<c1,CAM_BACK,0.680,0.553>"] and row["objects"][0] in row["question"]
    info = prepare(*arguments, tmp_path / "two", categories=["planning", "behavior"], strict=True)
    assert {row["category"] for row in table(tmp_path / "two", "questions")} == {"planning", "behavior"}
    assert {row["question_id"][-2:] for row in table(tmp_path / "two", "questions")} == {"_3", "_4"}  # ids stay
    assert info["report"]["filtered"]["category perception"]["count"] == 60
    with pytest.raises(ValueError, match="--categories takes some of perception"):
        prepare(*arguments, tmp_path / "x", categories=["percept"])


def test_questions(world, tmp_path):
    arguments = (world / "drivelm.json", world)

    def asked(name, **options):
        prepare(*arguments, tmp_path / name, **options)
        return table(tmp_path / name, "questions")

    every = {row["question"] for row in asked("all")}
    kept = {row["question"] for row in asked("some", questions="^What")}
    assert kept == {question for question in every if question.startswith("What")} and kept < every
    with pytest.raises(ValueError, match="--questions takes a regular expression"):
        prepare(*arguments, tmp_path / "x", questions="(")


def test_hidden_answers(world, tmp_path):
    hidden = make_world(1, frames=1)
    for items in hidden["scene-0"]["key_frames"]["frame-0-0"]["QA"].values():
        for item in items:
            item["A"] = ""
    file = write_json(tmp_path, hidden)
    with pytest.raises(ValueError, match="no question is left.*--split test"):
        prepare(file, world, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prepare(file, world, tmp_path / "out", split="test", strict=True)
    assert [row["answer"] for row in table(tmp_path / "out", "questions", "test")] == [""] * 5
    for items in hidden["scene-0"]["key_frames"]["frame-0-0"]["QA"].values():
        for item in items:
            item["tag"] = [0, 2]  # what only challenge files have
    prepare(write_json(tmp_path, hidden), world, tmp_path / "tagged", split="train", strict=True)
    assert [row["tag"] for row in table(tmp_path / "tagged", "questions")] == [[0, 2]] * 5


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_leaves_nothing_and_keeps_what_was_there(share, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    file = write_world(folder, make_world(2, frames=1))
    prepare(file, folder, folder / "old", split="train")
    before = contents(folder / "old")
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    names = sorted(os.listdir(folder))
    for output in ("old", "new"):
        with pytest.raises(ValueError, match=r"at byte \d+ of \d+"):
            prepare(file, folder, folder / output, split="train")
    assert contents(folder / "old") == before
    assert sorted(os.listdir(folder)) == names


def test_interrupted_installation_is_noticed(world, tmp_path, monkeypatch):
    arguments = (world / "drivelm.json", world, tmp_path / "out")
    prepare(*arguments)
    replace = os.replace

    def fail_at_questions(source, target):
        if Path(target).name == "questions":
            raise OSError("the disk is full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_questions)
    with pytest.raises(OSError, match="disk"):
        prepare(*arguments, coordinates="none")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no dataset.json"):
        load_rows(tmp_path / "out", "train")
    prepare(*arguments)
    assert load_rows(tmp_path / "out", "train")


def test_foreign_files_are_never_replaced(world, tmp_path):
    (tmp_path / "out" / "frames").mkdir(parents=True)
    (tmp_path / "out" / "frames" / "thesis.txt").write_text("years of work")
    (tmp_path / "out" / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="did not write"):
        prepare(world / "drivelm.json", world, tmp_path / "out")
    (tmp_path / "out" / "frames" / "thesis.txt").rename(tmp_path / "out" / "thesis.txt")
    prepare(world / "drivelm.json", world, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "keep me"


def test_a_challenge_file_loses_no_question(tmp_path):
    """The server counts every one, whatever is wrong with it."""
    world = make_world(1, frames=1)
    (frame,) = world["scene-0"]["key_frames"].values()
    flaws = ["", "Is <c1,CAM_BACK,10,20> there?", "Is <c1,CAM_NOWHERE,10.0,20.0> there?", "Is it?"]
    frame["QA"]["prediction"] = [qa(text, "", tag=[0]) for text in flaws]
    file = write_world(tmp_path / "root", world)
    arguments = (file, tmp_path / "root", tmp_path / "out")
    info = prepare(*arguments, split="test", strict=True)
    rows = table(tmp_path / "out", "questions", "test")
    assert [row["question_id"] for row in rows] == [f"scene-0_frame-0-0_{number}" for number in range(8)]
    assert [row["question"] for row in rows if row["category"] == "prediction"] == flaws
    noted = {reason: entry["examples"] for reason, entry in info["report"]["noted"].items()}
    assert noted == {
        "empty question": ["scene-0_frame-0-0_2"],
        "malformed tag": ["scene-0_frame-0-0_3"],
        "tag names an unknown camera": ["scene-0_frame-0-0_4"],
    }
    learnt = prepare(*arguments, split="train")
    assert dropped(learnt) == {"empty question": 1, "malformed tag": 1, "tag names an unknown camera": 1}
    fewer = prepare(*arguments, split="test", questions="there")
    assert fewer["counts"]["test"]["prediction"] == 2  # what an option leaves out is left out


def test_missing_inputs(world, tmp_path):
    with pytest.raises(ValueError, match="--drivelm_json .* is not a file"):
        prepare(tmp_path / "no.json", world, tmp_path / "out")
    with pytest.raises(ValueError, match="--image_root .* is not a folder"):
        prepare(world / "drivelm.json", tmp_path / "no", tmp_path / "out")


def test_frames_without_any_image_are_dropped(world, tmp_path):
    shutil.rmtree(world / "nuscenes")
    (world / "nuscenes").mkdir()
    with pytest.raises(
        ValueError, match="no question is left.*'missing image': 180, 'frame without images': 30, .* 150"
    ):
        prepare(world / "drivelm.json", world, tmp_path / "out")


def test_command_line(world, tmp_path):
    command = [sys.executable, "-m", "training.prepare", "--drivelm_json", str(world / "drivelm.json")]
    command += ["--image_root", str(world), "--output_dir", str(tmp_path / "out"), "--strict", "--split", "test"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "test: 30 scenes, 30 frames, 150 questions" in done.stdout
    assert "drivelm.json: 100%" in done.stderr  # the progress bar


def break_real_bundle(folder: Path) -> tuple[Path, dict[str, int]]:
    """A copy of the real bundle with one fault of each kind, and what the report must say about it."""
    for image in (SHARED / "nuscenes").rglob("*.jpg"):
        copy = folder / image.relative_to(SHARED)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(image)
    world = json.loads((SHARED / "drivelm_9frames.json").read_text())
    frames = [frame for scene in world.values() for frame in scene["key_frames"].values()]
    images = [folder / frames[0]["image_paths"][name].removeprefix("../") for name in CAMERAS]
    images[0].unlink()
    whole = images[1].read_bytes()
    images[1].unlink()
    images[1].write_bytes(whole[: len(whole) // 2])
    frames[1]["image_paths"]["CAM_ROOF"] = frames[1]["image_paths"]["CAM_FRONT"]
    frames[2]["image_paths"] = {}
    perception = frames[3]["QA"]["perception"]
    perception[0]["Q"] = "   "
    perception[1]["A"] = ""
    perception[2]["A"] = None
    perception[3]["Q"] = "What is <c1,CAM_BACK,1088.3>?"
    perception[4]["A"] = "It is <c7,CAM_ROOF,10.0,20.0>."
    frames[3]["QA"]["karaoke"] = [qa("Which song is playing?", "None.")]
    frames[3]["QA"]["perception"].append({**perception[6], "A": "something else"})
    return write_json(folder, world), {
        "missing image": 1,
        "unreadable image": 1,
        "unknown camera in image_paths": 1,
        "frame without images": 1,
        "question on a frame without images": 77,
        "empty question": 1,
        "empty answer": 2,
        "malformed tag": 1,
        "tag names an unknown camera": 1,
        "unknown category": 1,
    }


QUESTION_LOSSES = ("question", "empty", "malformed tag", "tag names", "unknown category")


@needs_shared
def test_report_on_a_broken_copy_of_the_real_bundle(tmp_path):
    file, expected = break_real_bundle(tmp_path / "broken")
    info = prepare(file, tmp_path / "broken", tmp_path / "out", split="train", verify_images=True)
    assert dropped(info) == expected
    assert info["report"]["noted"]["question repeated on one frame with another answer"]["count"] == 3  # 2 are real
    assert info["counts"]["train"]["frames"] == 8
    lost = sum(count for reason, count in expected.items() if reason.startswith(QUESTION_LOSSES))
    assert info["counts"]["train"]["questions"] == 790 + 2 - lost == len(load_rows(tmp_path / "out", "train"))
    assert all(entry["examples"] and len(entry["examples"]) <= 5 for entry in info["report"]["dropped"].values())
    with pytest.raises(ValueError, match="--strict, and these would be dropped") as caught:
        prepare(file, tmp_path / "broken", tmp_path / "strict", split="train", verify_images=True, strict=True)
    assert all(f"{count} x {reason}" in str(caught.value) for reason, count in expected.items())
    assert not (tmp_path / "strict").exists()


@needs_shared
def test_real_bundle(tmp_path):
    arguments = {"strict": True, "verify_images": True}
    info = prepare(SHARED / "drivelm_9frames.json", SHARED, tmp_path / "train", **arguments)
    assert info["report"]["dropped"] == {} and sum(counts["questions"] for counts in info["counts"].values()) == 790
    prepare(SHARED / "test_eval.json", SHARED / "nuscenes", tmp_path / "test", split="test", **arguments)
    rows = load_rows(tmp_path / "test", "test")
    official = json.loads((SHARED / "output.json").read_text())
    assert [row["question_id"] for row in rows] == [item["id"] for item in official]
    assert {tuple(row["tag"]) for row in rows} == {(0,), (1,), (2,), (3,)}
    assert all(Path(path).is_file() for row in rows for path in row["images"].values())


def four_camera_world(folder: Path) -> Path:
    """A DriveLM file of cameras that nuScenes does not have, and its images."""
    names = {"CAM_FRONT_LEFT": "side_left", "CAM_FRONT": "front", "CAM_FRONT_RIGHT": "side_right", "CAM_BACK": "back"}
    world = json.loads(json.dumps(make_world(6, frames=1)).replace("<c1,CAM_BACK,", "<c1,back,"))
    for scene in world.values():
        for frame in scene["key_frames"].values():
            paths = frame["image_paths"]
            frame["image_paths"] = {names[camera]: paths[camera] for camera in names}
    return write_world(folder, world)


def write_rig_file(file: Path, **azimuths: float) -> Path:
    file.write_text(json.dumps({name: {"azimuth": azimuth} for name, azimuth in azimuths.items()}))
    return file


def test_a_rig_travels_to_the_rows(tmp_path):
    file = four_camera_world(tmp_path / "world")
    rig = write_rig_file(tmp_path / "fleet.json", front=0, side_left=80, side_right=-80, back=180)
    info = prepare(file, tmp_path / "world", tmp_path / "out", rig=str(rig), strict=True)
    assert info["rig"] == {"front": {"azimuth": 0}, "side_left": {"azimuth": 80}, "side_right": {"azimuth": -80},
                           "back": {"azimuth": 180}}  # fmt: skip
    assert "rig" not in info["options"] and info["generated"] is False
    rows = load_rows(tmp_path / "out", "train")
    assert rows.cameras == rows.rig.names == ("front", "side_left", "side_right", "back")
    assert rows.rig.sector("side_left") == "front left"
    tagged = next(row for row in rows if row["objects"])
    assert tagged["objects"] == ["<c1,back,1088.3,497.5>"] and set(tagged["images"]) == set(rows.cameras)
    rig.rename(tmp_path / "world" / "rig.json")  # where the toy world and nuScenes-format fleets leave theirs
    assert prepare(file, tmp_path / "world", tmp_path / "beside")["rig"] == info["rig"]
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "beside").keys()


def test_another_rig_prepares_again(world, tmp_path):
    six = prepare(world / "drivelm.json", world, tmp_path / "out")["rig"]
    assert list(six) == list(CAMERAS)
    turned = tmp_path / "turned.json"
    turned.write_text(json.dumps({**six, "CAM_BACK": {"azimuth": 170}}))
    again = prepare(world / "drivelm.json", world, tmp_path / "out", rig=str(turned))
    assert again["rig"]["CAM_BACK"] == {"azimuth": 170}
    assert load_rows(tmp_path / "out", "train").rig["CAM_BACK"].azimuth == 170


def test_a_wrong_rig_is_one_clear_error_and_writes_nothing(tmp_path):
    file = four_camera_world(tmp_path / "world")
    three = write_rig_file(tmp_path / "three.json", front=0, side_left=80, back=180)
    with pytest.raises(ValueError, match=r"rig .*three.json has front, side_left, back; .* has images of side_right"):
        prepare(file, tmp_path / "world", tmp_path / "out", rig=str(three))
    with pytest.raises(ValueError, match=r"other cameras than CAM_FRONT_LEFT, .* needs --rig FILE"):
        prepare(file, tmp_path / "world", tmp_path / "out")
    for text, problem in (("front: {azimuth: east}", "must be a number"), ("front: {}", "needs an azimuth")):
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(ValueError, match=problem):
            prepare(file, tmp_path / "world", tmp_path / "out", rig=str(tmp_path / "wrong.yaml"))
    assert not (tmp_path / "out").exists()


def test_data_of_a_toy_world_say_that_they_were_generated(world, tmp_path):
    (world / "toyworld.json").write_text("{}")
    assert prepare(world / "drivelm.json", world, tmp_path / "out")["generated"] is True


def test_what_the_cameras_show(world, tmp_path):
    """From `contents.json` beside the file, else from its key objects; only of cameras whose images are there."""
    root = tmp_path / "key-objects"
    scenes = make_world(30, frames=1)
    black = {"Category": "Vehicle", "Status": "Moving", "Visual_description": "Black sedan."}
    scenes["scene-3"]["key_frames"]["frame-3-0"]["key_object_infos"] = {TAG: black}
    write_json(world, scenes)
    prepare(world / "drivelm.json", world, root, split="train")
    told = load_rows(root, "train").contents[("scene-3", "frame-3-0")]
    assert told["objects"] == [{"name": "car", "camera": "CAM_BACK", "status": "moving", "distance": None}]

    car = {"name": "car", "status": "parked", "distance": 7.5}
    shown = {
        "objects": [{**car, "camera": "CAM_BACK"}, {**car, "camera": "CAM_FRONT"}],
        "words": {"CAM_BACK": ["rain"], "CAM_FRONT": ["path", "near"]},
        "unclear": [("bus", "CAM_FRONT")],
    }
    write_contents(world, {"frame-3-0": shown})
    (world / "nuscenes/samples/CAM_BACK/3-0.jpg").unlink()
    before = json.loads((root / "dataset.json").read_text())
    info = prepare(world / "drivelm.json", world, root, split="train")
    assert info["contents"] != before["contents"] and info["split_hash"] == before["split_hash"]
    told = load_rows(root, "train").contents
    assert told[("scene-3", "frame-3-0")] == {
        "objects": shown["objects"][1:],
        "words": {"CAM_FRONT": ["path", "near"]},
        "unclear": [("bus", "CAM_FRONT")],
    }
    assert len(told) == 30

    for scene in scenes.values():
        for frame in scene["key_frames"].values():
            frame["key_object_infos"] = {}
    (world / "contents.json").unlink()
    write_json(world, scenes)
    prepare(world / "drivelm.json", world, root, split="train")
    with pytest.raises(ValueError, match="does not tell what the pictures of its train split show"):
        load_rows(root, "train").contents  # noqa: B018  it is read only when it is asked for
    assert not (root / "contents").exists()


def test_a_folder_of_before_is_prepared_anew_and_a_toy_world_of_before_tells_nothing(world, tmp_path):
    scenes = make_world(30, frames=1)
    black = {"Category": "Vehicle", "Status": "Moving", "Visual_description": "Black sedan."}
    scenes["scene-3"]["key_frames"]["frame-3-0"]["key_object_infos"] = {TAG: black, "<c2>": black, "a": None}
    write_json(world, scenes)
    out = tmp_path / "out"
    new = prepare(world / "drivelm.json", world, out, split="train")
    frames = (out / "frames/train-00000-of-00001.parquet").read_bytes()
    shutil.rmtree(out / "contents")
    old = {key: value for key, value in new.items() if key != "contents"}
    old["files"] = {name: size for name, size in new["files"].items() if not name.startswith("contents/")}
    (out / "dataset.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match=rf"{out} does not tell .* run training.prepare again"):
        load_rows(out, "train").contents  # noqa: B018
    assert prepare(world / "drivelm.json", world, out, split="train") == new
    told = load_rows(out, "train").contents[("scene-3", "frame-3-0")]["objects"]
    assert [thing["name"] for thing in told] == ["car"]
    assert (out / "frames/train-00000-of-00001.parquet").read_bytes() == frames

    (world / "toyworld.json").write_text("{}")
    prepare(world / "drivelm.json", world, out, split="train")
    assert not (out / "contents").exists()


def test_a_contents_file_of_another_form_changes_nothing(world, tmp_path):
    out = tmp_path / "out"
    before = prepare(world / "drivelm.json", world, out)
    (world / "contents.json").write_text('{"frame-3-0": {"objects": [{}], "words": {}, "unclear": []}}')
    with pytest.raises(ValueError, match="contents.json does not hold"):
        prepare(world / "drivelm.json", world, out)
    assert json.loads((out / "dataset.json").read_text()) == before


def test_a_stop_between_tables_leaves_no_finished_folder_and_the_next_run_mends_it(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_contents(world, {f"frame-{n}-0": {"objects": [], "words": {}, "unclear": []} for n in range(30)})
    before = prepare(world / "drivelm.json", world, out, split="train")
    write_contents(world, {"frame-3-0": {"objects": [], "words": {"CAM_BACK": ["fog"]}, "unclear": []}})
    replace = os.replace

    def stop(source, target):
        if Path(target).name == "contents":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("training.prepare.os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(world / "drivelm.json", world, out, split="train")
    with pytest.raises(ValueError, match="no dataset.json"):
        load_rows(out, "train")
    monkeypatch.undo()
    after = prepare(world / "drivelm.json", world, out, split="train")
    assert after["split_hash"] == before["split_hash"]
    assert load_rows(out, "train").contents[("scene-3", "frame-3-0")]["words"] == {"CAM_BACK": ["fog"]}
