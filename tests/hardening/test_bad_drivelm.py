"""Whatever a DriveLM file holds: one ValueError that names it and leaves nothing, or each question accounted for."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import amounts, bomb, broken_bytes, for_each, junk, mutated, to_bytes
from drivelm_files import CAMERAS, TAG, make_world, write_json, write_world
from hypothesis import strategies as st

from training.data.drivelm import CATEGORIES, read_frames
from training.data.rows import load_rows
from training.prepare import PrepareArguments, main

WORLD = make_world(2, frames=1)
WORLD["scene-1"]["key_frames"]["frame-1-0"]["QA"]["planning"][0]["tag"] = [0, 2]
SAMPLES = "../nuscenes/samples"
BROKEN = {"cut.jpg": b"\xff\xd8\xff\xe0\0\x10JFIF", "empty.jpg": b"", "text.jpg": b"no picture", "bomb.png": bomb()}
paths = st.sampled_from([*(f"{SAMPLES}/{name}" for name in BROKEN), f"{SAMPLES}/CAM_BACK", f"{SAMPLES}/a\0b.jpg"])
texts = st.sampled_from([TAG, f"Is {TAG[:-1]} near?", "<c1,CAM_ROOF,1.0,2.0>", "", "x1, y1, x2, y2", "\ud83d"])
documents = mutated(WORLD, values=st.one_of(junk, paths, texts)).map(to_bytes)
contents = st.one_of(documents, documents, broken_bytes(to_bytes(WORLD)))
QUESTION_LOSSES = ("question on", "unknown category", "empty", "malformed tag", "tag names")


@amounts
def test_reading(amount, tmp_path):
    file = tmp_path / "drivelm.json"

    def check(content: bytes) -> bool:
        file.write_bytes(content)
        seen: list[int] = []
        try:
            frames = list(read_frames(file, seen.append))
        except ValueError as error:
            assert str(file) in str(error)
            return False
        held = json.loads(content.decode())
        assert sum(seen) == len(content)
        tokens = [(scene, frame) for scene, fields in held.items() for frame in fields["key_frames"]]
        assert [(frame.scene_token, frame.frame_token) for frame in frames] == tokens
        for frame in frames:
            fields = held[frame.scene_token]["key_frames"][frame.frame_token]
            assert frame.image_paths == (fields.get("image_paths") or {})
            there = [
                (category, (item.get("Q") or "").strip(), (item.get("A") or "").strip())
                for category, items in (fields.get("QA") or {}).items()
                for item in items or []
            ]
            read = [(question.category, question.question, question.answer) for question in frame.questions]
            assert sorted(read) == sorted(there)
            assert [question.number for question in frame.questions] == list(range(len(read)))
        return True

    for_each(amount, contents, check)


def held_by(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder: files with their content, folders with None."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


options = st.fixed_dictionaries(
    {
        "split": st.sampled_from(["by_scene", "train", "test"]),
        "coordinates": st.sampled_from(["pixels", "normalised", "none"]),
        "categories": st.sampled_from([list(CATEGORIES), ["perception"], ["planning", "behavior"]]),
        "strict": st.booleans(),
        "verify_images": st.booleans(),
    }
)
old_info = st.one_of(st.none(), mutated({"format_version": 1, "files": {"a": 1}, "source": {}}).map(to_bytes))


@amounts
def test_preparing(amount, tmp_path, capfd):
    root = tmp_path / "world"
    write_world(root, WORLD)
    for name, content in BROKEN.items():
        (root / "nuscenes/samples" / name).write_bytes(content)
    good, file = root / "drivelm.json", tmp_path / "changed.json"
    main(PrepareArguments(str(good), str(root), str(tmp_path / "before"), split="train"))
    before = held_by(tmp_path / "before")

    def check(case: tuple[bytes, dict[str, Any], str, bytes | None]) -> bool:
        content, chosen, output, info_before = case
        file.write_bytes(content)
        out = tmp_path / "outputs" / output
        shutil.rmtree(tmp_path / "outputs", ignore_errors=True)
        if output == "old":
            shutil.copytree(tmp_path / "before", out)
            if info_before is not None:
                (out / "dataset.json").write_bytes(info_before)
        expected = before | ({"dataset.json": info_before} if info_before is not None else {})
        try:
            info = main(PrepareArguments(str(file), str(root), str(out), **chosen))
        except ValueError as error:
            assert str(file) in str(error)
            assert held_by(out) == expected if output == "old" else not out.exists()
            assert not os.path.isdir(out.parent) or os.listdir(out.parent) == ["old"] * (output == "old")
            return False
        assert os.listdir(out.parent) == [output]
        assert json.loads((out / "dataset.json").read_text()) == info
        there = sum(
            len(items or [])
            for scene in json.loads(content.decode()).values()
            for frame in scene["key_frames"].values()
            for items in (frame.get("QA") or {}).values()
        )
        lost = sum(
            entry["count"]
            for kind in ("dropped", "filtered")
            for reason, entry in info["report"][kind].items()
            if kind == "filtered" or reason.startswith(QUESTION_LOSSES)
        )
        kept = {split: counts["questions"] for split, counts in info["counts"].items()}
        assert sum(kept.values()) + lost == there
        for split, count in kept.items():
            rows = load_rows(out, split)
            assert len(rows) == count and all(Path(path).is_file() for row in rows for path in row["images"].values())
        capfd.readouterr()  # or it holds the progress bars of all
        return True

    for_each(amount, st.tuples(contents, options, st.sampled_from(["new", "old"]), old_info), check)


def test_nesting_without_end(tmp_path):
    for content in (b'{"s": ' + b"[" * 1_000_000, b'{"s": ' * 100_000, b'{"s": {"k": ' + b'{"f": [' * 100_000):
        (tmp_path / "deep.json").write_bytes(content)
        with pytest.raises(ValueError, match="deep.json: .*nested too deeply, after byte"):
            list(read_frames(tmp_path / "deep.json"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("QA", 0, "QA: expected an object, got 0"),
        ("QA", [], "QA: expected an object, got a list"),
        ("image_paths", "", 'image_paths: expected an object, got ""'),
        ("image_paths", {"CAM_BACK": ["a.jpg"]}, "image_paths, CAM_BACK: expected a text, got a list"),
        ("image_paths", {"CAM_BACK": "\ud800"}, "image_paths, CAM_BACK: the text holds half of a surrogate pair"),
        ("QA", {"\udfff": []}, "the text holds half of a surrogate pair"),
        ("QA", {"planning": 0}, "QA, planning: expected a list, got 0"),
        ("QA", {"planning": [{"Q": False}]}, "question 0, Q: expected a text, got false"),
        ("QA", {"planning": [{"tag": [True]}]}, "tag: expected a whole number, got true"),
        ("QA", {"planning": [{"tag": [4]}]}, r"tag: expected numbers of metrics, 0 to 3, got \[4\]"),
        ("QA", {"planning": [{"tag": [10**30]}]}, "tag: expected numbers of metrics, 0 to 3"),
    ],
)
def test_wrong_types_are_not_taken_for_nothing(tmp_path, field, value, message):
    world = make_world(1, frames=1)
    world["scene-0"]["key_frames"]["frame-0-0"][field] = value
    (tmp_path / "drivelm.json").write_bytes(to_bytes(world))
    with pytest.raises(ValueError, match=f"scene scene-0 at byte 1, frame frame-0-0.*{message}"):
        list(read_frames(tmp_path / "drivelm.json"))


def test_image_paths_stay_under_the_root(tmp_path):
    """A path that climbs out of the root, or that no file can have, is a missing image."""
    world = make_world(1, frames=1)
    file = write_world(tmp_path / "root", world)
    (tmp_path / "root/nuscenes/samples/CAM_BACK/0-0.jpg").rename(tmp_path / "outside.jpg")
    frame = world["scene-0"]["key_frames"]["frame-0-0"]
    absolute = str(tmp_path / "outside.jpg")
    for name in ("../nuscenes/../../outside.jpg", "../../outside.jpg", absolute, "a" * 5000, "a\0b", "."):
        frame["image_paths"]["CAM_BACK"] = name
        write_json(tmp_path / "root", world)
        info = main(PrepareArguments(str(file), str(tmp_path / "root"), str(tmp_path / "out"), split="train"))
        assert info["report"]["dropped"]["missing image"]["examples"] == [name]
        assert list(load_rows(tmp_path / "out", "train")[0]["images"]) == [c for c in CAMERAS if c != "CAM_BACK"]


def test_wrong_options_and_outputs(tmp_path):
    file = write_world(tmp_path / "root", WORLD)
    arguments = (str(file), str(tmp_path / "root"), str(tmp_path / "out"))
    for name in ("split", "coordinates"):
        for value in ("", "bogus", None, 1, []):
            with pytest.raises(ValueError, match=f"--{name} takes one of .*; got"):
                PrepareArguments(*arguments, **{name: value})
    for taken in ("out", "out/frames", "out/questions"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / taken).parent.mkdir(exist_ok=True)
        (tmp_path / taken).write_text("somebody's notes")
        with pytest.raises(ValueError, match=f"{taken} is no folder"):
            main(PrepareArguments(*arguments))
        assert (tmp_path / taken).read_text() == "somebody's notes"
        (tmp_path / taken).unlink()


def test_scenes_and_frames_with_slashes_are_told_apart(tmp_path):
    """Scene a/b with frame c is not scene a with frame b/c."""
    first, second = (scene["key_frames"].popitem()[1] for scene in make_world(2, frames=1).values())
    second["QA"] = {"planning": [{"Q": "Whose question?", "A": "The second one's."}]}
    file = write_world(tmp_path, {"a/b": {"key_frames": {"c": first}}, "a": {"key_frames": {"b/c": second}}})
    main(PrepareArguments(str(file), str(tmp_path), str(tmp_path / "out"), split="train"))
    by_frame = {frame["frame_token"]: questions for frame, questions in load_rows(tmp_path / "out", "train").frames()}
    assert [row["question"] for row in by_frame["b/c"]] == ["Whose question?"] and len(by_frame["c"]) == 5
