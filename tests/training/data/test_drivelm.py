import codecs
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.drivelm_files import BOX, TAG, make_frame, make_world, qa, write_json
from training.data import drivelm
from training.data.drivelm import (
    Frame,
    denormalise_coordinates,
    find_tags,
    has_malformed_tag,
    normalise_coordinates,
    read_frames,
    scene_split,
    split_hash,
    uses_coordinates,
)

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "drivelm"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the optional real data is absent")
tokens = st.sets(st.text(min_size=1, max_size=12), min_size=1, max_size=30)


def reference(world: dict) -> list[tuple]:
    """What a plain json.load gives: (scene, frame, image paths, questions in challenge order)."""
    return [
        (
            scene_token,
            frame_token,
            frame["image_paths"],
            [item["Q"] for items in frame["QA"].values() for item in items],
        )
        for scene_token, scene in world.items()
        for frame_token, frame in scene["key_frames"].items()
    ]


def flat(frames: list[Frame]) -> list[tuple]:
    return [(f.scene_token, f.frame_token, f.image_paths, [q.question for q in f.questions]) for f in frames]


def test_reads_what_json_reads(tmp_path):
    world = make_world(3)
    assert flat(list(read_frames(write_json(tmp_path, world)))) == reference(world)


@pytest.mark.parametrize("read_bytes", [1, 2, 3, 7, 16, 100, 1000])
def test_window_size_does_not_matter(tmp_path, monkeypatch, read_bytes):
    world = make_world(2)
    file = write_json(tmp_path, world)
    monkeypatch.setattr(drivelm, "_READ_BYTES", read_bytes)
    seen: list[int] = []
    assert flat(list(read_frames(file, seen.append))) == reference(world)
    assert sum(seen) == file.stat().st_size


def test_a_window_may_end_at_any_byte(tmp_path, monkeypatch):
    """Inside a literal, a number, an escape or a character of several bytes."""
    infos = {"a": [None, True, False, -1.5e-3, 12, '\u00fc\n"', "日本"]}
    world = {"ü": {"key_frames": {"f": {"key_object_infos": infos, "QA": {"perception": [qa("Q–?", "A\t")]}}}}}
    file = tmp_path / "drivelm.json"
    for ascii_only in (True, False):
        file.write_text(json.dumps(world, ensure_ascii=ascii_only), encoding="utf-8")
        for read_bytes in range(1, file.stat().st_size + 1):
            monkeypatch.setattr(drivelm, "_READ_BYTES", read_bytes)
            assert flat(list(read_frames(file))) == [("ü", "f", {}, ["Q–?"])]


def test_an_early_mistake_is_found_without_reading_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(drivelm, "_READ_BYTES", 64)
    file = write_json(tmp_path, make_world(5))
    file.write_bytes(file.read_bytes().replace(b'"key_frames":', b'"key_frames";', 1))
    seen: list[int] = []
    with pytest.raises(ValueError, match="Expecting ':' delimiter"):
        list(read_frames(file, seen.append))
    assert sum(seen) < file.stat().st_size / 10


def test_categories_are_numbered_as_the_challenge_does_whatever_their_order_in_the_file(tmp_path):
    frame = make_frame("a")
    frame["QA"] = {"extra": [qa("e", "e")], **dict(reversed(frame["QA"].items()))}
    file = write_json(tmp_path, {"s": {"key_frames": {"f": frame}}})
    (read,) = read_frames(file)
    assert [q.category for q in read.questions] == [*["perception"] * 2, "prediction", "planning", "behavior", "extra"]
    assert [read.question_id(q) for q in read.questions] == [f"s_f_{n}" for n in range(6)]


def test_missing_parts_are_read_as_empty(tmp_path):
    frames = {"a": {"QA": {"perception": [{"Q": " x "}, {"A": None, "tag": [0, 2]}]}}, "b": {}}
    first, second = read_frames(write_json(tmp_path, {"s": {"key_frames": frames}}))
    assert [(q.question, q.answer, q.tag) for q in first.questions] == [("x", "", None), ("", "", (0, 2))]
    assert (first.image_paths, second.image_paths, second.questions) == ({}, {}, [])


def test_nothing_secret_is_read(tmp_path):
    assert "SECRET" not in repr(list(read_frames(write_json(tmp_path, make_world(1))))).upper()


@pytest.mark.parametrize("read_bytes", [16, 1 << 22])
def test_truncated_at_any_byte_names_a_byte_inside_the_file(tmp_path, monkeypatch, read_bytes):
    monkeypatch.setattr(drivelm, "_READ_BYTES", read_bytes)
    data = write_json(tmp_path, make_world(1, frames=1)).read_bytes()
    file = tmp_path / "cut.json"
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"at byte \d+ of \d+") as caught:
            list(read_frames(file))
        position, size = map(int, re.search(r"at byte (\d+) of (\d+)", str(caught.value)).groups())
        assert 0 <= position <= size == length


@pytest.mark.parametrize("read_bytes", [16, 1 << 22])
def test_malformed_json_names_the_exact_byte(tmp_path, monkeypatch, read_bytes):
    monkeypatch.setattr(drivelm, "_READ_BYTES", read_bytes)
    file = write_json(tmp_path, make_world(2, frames=1))
    data = bytearray(file.read_bytes())
    position = data.rindex(b'"A": "Go') + 3  # after many characters that are longer in bytes
    data[position : position + 1] = b";"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"at byte {position} of {len(data)}: Expecting ':' delimiter"):
        list(read_frames(file))


@pytest.mark.parametrize("read_bytes", [1, 16, 1 << 22])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, monkeypatch, read_bytes):
    monkeypatch.setattr(drivelm, "_READ_BYTES", read_bytes)
    file = write_json(tmp_path, make_world(2, frames=1))
    plain, size = list(read_frames(file)), file.stat().st_size
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert list(read_frames(file)) == plain
    assert [*drivelm.read_scenes(file)] == ["scene-0", "scene-1"]
    data = file.read_bytes()[:-2]
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"at byte {size + 1} of {size + 1}"):
        list(read_frames(file))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_changed_byte_gives_an_error_or_what_json_reads(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    content = bytearray(write_json(folder, make_world(1, frames=1)).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = folder / "changed.json"
    file.write_bytes(content)
    try:
        frames = list(read_frames(file))
    except ValueError:
        return
    json.loads(content)  # read_frames accepts nothing that json does not
    assert len(frames) <= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at byte 0 of 0: expected a JSON object of scenes; the file ends"),
        (b"[]", "at byte 0 of 2: expected a JSON object of scenes; found"),
        (b'{"s": 1}', "at byte 6 of 8: expected an object"),
        (b'{"s": "x"}', r"scene s at byte 1: expected an object, got \"x\""),
        (b'{"s": {}} x', "scene s at byte 1, key_frames: expected an object, got null"),
        (b'{"s": {"key_frames": {}}} x', "at byte 26 of 27: expected the end of the file"),
        (b'{"s": {"key_frames": {}}, }', "at byte 26 of 27: expected a scene token in quotes"),
        (b'{"s": {"key_frames": {}} "t": 1}', "at byte 25 of 32: expected ',' or '}'"),
        (b'{"s": {"key_frames": {}}, "s": {}}', "key 's' appears a second time at byte 26"),
        (b'{"s": {"key_frames": {"f": {}, "f": {}}}}', "key 'f' appears twice"),
        (b'{"s": {"key_frames": {"f": {}}}, "t": {"key_frames": {"f": {}}}}', "frame f appears in scene s as well"),
        (b'{"s": {"key_frames": {"f": {"QA": {"perception": {"q": []}}}}}}', "QA, perception: expected a list"),
        (b'{"s": {"key_frames": {"f": {"QA": {"perception": [{"Q": 3}]}}}}}', "question 0, Q: expected a text, got 3"),
        (b'{"s": {"key_frames": {"f": {"QA": {"perception": [{"tag": 0}]}}}}}', "tag: expected a list"),
        (b'{"s": {"key_frames": {"f": {"QA": {"perception": [{"Q": "\\ud800"}]}}}}}', "half of a surrogate pair"),
        (b'{"s": {"key_frames": {"\xff": {}}}}', "no UTF-8 text at byte 23 of 32"),
    ],
)
def test_errors_teach(tmp_path, content, message):
    file = tmp_path / "broken.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_frames(file))


def test_empty_object_has_no_frames(tmp_path):
    assert list(read_frames(write_json(tmp_path, {}))) == []


def test_tags():
    text = f"{TAG} and <c2,CAM_FRONT,0.500,0.250> and {TAG}"
    assert find_tags(text) == [TAG, "<c2,CAM_FRONT,0.500,0.250>"]
    assert not has_malformed_tag(f"Is {TAG} a sign?") and not has_malformed_tag("a < b")
    for broken in ("<c1,CAM_BACK,1088.3>", "<c1,CAM_BACK,1088,497>", "<c1>", "<c,CAM_BACK,1.0,2.0>", f"{TAG[:-1]}."):
        assert has_malformed_tag(f"Is {TAG} or {broken} a sign?"), broken


def test_coordinates():
    assert normalise_coordinates(f"{TAG} {BOX}") == (
        "<c1,CAM_BACK,0.680,0.553> (traffic light, green, 0.422, 0.000, 0.452, 0.121)"
    )
    assert uses_coordinates(TAG, "") and uses_coordinates("", f"[{BOX}]")
    assert uses_coordinates("a list formatted as (c, s, x1, y1, x2, y2)", "There is none.")
    assert not uses_coordinates("Are there cars (moving, parked) 3.5 m away?", "Yes.")


@given(x=st.integers(0, 16000), y=st.integers(0, 9000))
def test_normalised_coordinates_return_to_the_same_place(x, y):
    there = f"<c1,CAM_FRONT,{x / 10:.1f},{y / 10:.1f}>"
    (tag,) = find_tags(normalise_coordinates(there))
    back = denormalise_coordinates(f"Is {tag} a sign?").split(",")
    assert back[:2] == ["Is <c1", "CAM_FRONT"]
    assert abs(float(back[2]) - x / 10) <= 0.86 and abs(float(back[3].split(">")[0]) - y / 10) <= 0.51


@given(tokens, tokens)
def test_splits_are_stable_when_scenes_are_added_and_share_no_scene(old, added):
    before = {token: scene_split(token) for token in old}
    after = {token: scene_split(token) for token in old | added}
    assert before.items() <= after.items()
    assert (split_hash(before) == split_hash(after)) == (before == after)
    assert split_hash(after) == split_hash(dict(sorted(after.items(), reverse=True)))


def test_split_shares():
    counts = {split: 0 for split in ("train", "validation", "test")}
    for number in range(5000):
        counts[scene_split(f"scene-{number}")] += 1
    assert 3900 < counts["train"] < 4100 and 430 < counts["validation"] < 570 and 430 < counts["test"] < 570


def test_the_split_rule_never_changes():
    """A changed rule would let published test scenes slip into train."""
    assert [scene_split(f"scene-{n}") for n in (0, 1, 2, 3, 4, 5, 6, 7)] == EXPECTED_SPLITS
    assert scene_split("f0f120e4d4b0441da90ec53b16ee169d") == "train"


EXPECTED_SPLITS = ["train", "train", "train", "test", "train", "train", "train", "train"]


@needs_shared
def test_real_train_file():
    frames = list(read_frames(SHARED / "drivelm_9frames.json"))
    assert flat(frames) == reference(json.loads((SHARED / "drivelm_9frames.json").read_text()))
    assert (len(frames), sum(len(frame.questions) for frame in frames)) == (9, 790)
    assert not any(has_malformed_tag(q.question + q.answer) for frame in frames for q in frame.questions)


@needs_shared
def test_ids_of_the_challenge_file_are_those_of_the_official_output():
    official = json.loads((SHARED / "output.json").read_text())
    read = [
        (frame.question_id(question), f"<image>\n{question.question}", question.answer)
        for frame in read_frames(SHARED / "test_eval.json")
        for question in frame.questions
    ]
    assert read == [(item["id"], item["question"], item["gt_answer"]) for item in official]
