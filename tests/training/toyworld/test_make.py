"""The toy world as a whole: its files, that it is reproducible, and that its questions are balanced."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from PIL import Image

from smoldriver_hf.configuration_smoldriver import CAMERAS
from training.data.contents import limited, read_contents
from training.data.drivelm import CATEGORIES
from training.data.rig import read_rig
from training.toyworld.balance import template
from training.toyworld.make import ToyWorldArguments, main
from training.toyworld.scene import CLASSES, WEATHERS, sample_frame

TAG = re.compile(r"<c\d+,(CAM_[A-Z_]+),(\d+\.\d),(\d+\.\d)>")
SCENES = 100


def make(folder: Path, **options) -> Path:
    settings = {"scenes": 4, "width": 160, "num_workers": 1} | options
    return main(ToyWorldArguments(output_dir=str(folder), **settings))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("toy") / "world", scenes=SCENES)


@pytest.fixture(scope="module")
def frames(world) -> list[dict]:
    scenes = json.loads((world / "drivelm.json").read_text())
    return [frame for scene in scenes.values() for frame in scene["key_frames"].values()]


@pytest.fixture(scope="module")
def questions(frames) -> list[tuple[str, dict]]:
    return [(category, item) for frame in frames for category, items in frame["QA"].items() for item in items]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_settings_give_the_same_bytes_with_any_number_of_workers(tmp_path):
    one = contents(make(tmp_path / "one", frames_per_scene=2, scenes=3, seed=5))
    two = contents(make(tmp_path / "two", frames_per_scene=2, scenes=3, seed=5, num_workers=2))
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_another_seed_is_another_world_and_more_scenes_keep_the_first_pictures(tmp_path):
    small = contents(make(tmp_path / "small", scenes=2))
    large = contents(make(tmp_path / "large", scenes=3))
    other = contents(make(tmp_path / "other", scenes=2, seed=1))
    pictures = {name for name in small if name.endswith(".jpg")}
    assert all(large[name] == small[name] for name in pictures)
    assert not pictures & other.keys()
    assert not set(json.loads(small["drivelm.json"])) & set(json.loads(other["drivelm.json"]))


def test_structure_is_that_of_drivelm(world, frames):
    assert len(frames) == SCENES
    for frame in frames:
        assert {"key_object_infos", "QA", "image_paths", "weather"} == frame.keys()
        assert tuple(frame["QA"]) == CATEGORIES
        assert set(frame["image_paths"]) == set(CAMERAS)
        for items in frame["QA"].values():
            for item in items:
                assert {"Q", "A", "C", "con_up", "con_down", "cluster", "layer"} <= item.keys()
                assert item["Q"] and item["A"]


def test_every_image_is_there_when_the_leading_dots_are_replaced(world, frames):
    for frame in frames[:10]:
        for camera, path in frame["image_paths"].items():
            assert path.startswith(f"../nuscenes/samples/{camera}/")
            with Image.open(world / path.removeprefix("../")) as image:
                assert image.size == (160, 90)


def test_every_tag_is_an_object_of_its_frame_in_pixels_of_1600x900(frames):
    for frame in frames:
        text = json.dumps(frame["QA"])
        assert text.count("<c") == len(TAG.findall(text))
        for match in TAG.finditer(text):
            assert match.group() in frame["key_object_infos"]
            camera, x, y = match.groups()
            assert camera in CAMERAS and 0 <= float(x) <= 1600 and 0 <= float(y) <= 900
        for tag, info in frame["key_object_infos"].items():
            left, top, right, bottom = info["2d_bbox"]
            _, x, y = TAG.fullmatch(tag).groups()
            assert left < float(x) < right and top < float(y) < bottom


def test_all_categories_classes_states_and_weathers_occur(frames, questions):
    assert {category for category, _ in questions} == set(CATEGORIES)
    assert Counter(frame["weather"] for frame in frames) == dict.fromkeys(WEATHERS, SCENES // len(WEATHERS))
    descriptions = {info["Visual_description"] for frame in frames for info in frame["key_object_infos"].values()}
    shown = {name for name in CLASSES if any(name in text.lower() for text in descriptions)}
    assert shown == set(CLASSES) and len(CLASSES) >= 7
    assert {"Red light.", "Green light."} <= descriptions
    answers = " ".join(item["A"] for _, item in questions)
    for state in ("moving", "parked", "stopped", "standing", "with a rider", "without a rider"):
        assert state in answers


def test_existence_is_asked_as_often_with_yes_as_with_no(questions):
    by_question = defaultdict(Counter)
    for _, item in questions:
        if item["Q"].startswith("Are there "):
            by_question[item["Q"]][item["A"]] += 1
    assert sum(map(Counter.total, by_question.values())) >= 3 * SCENES
    assert {question: counts for question, counts in by_question.items() if counts["Yes."] != counts["No."]} == {}


def test_yes_and_no_are_equally_frequent_in_every_template(questions):
    by_template = defaultdict(Counter)
    for _, item in questions:
        word = re.match("Yes|No(?=[.])", item["A"])  # "Yes, there is ..." too
        if word:
            by_template[template(item["Q"])][word.group()] += 1
    assert len([key for key in by_template if key.startswith(("Is ", "Will ", "Would "))]) > 10
    assert {key: counts for key, counts in by_template.items() if counts["Yes"] != counts["No"]} == {}


def test_priors_are_those_of_the_written_file_and_low(world, questions):
    report = json.loads((world / "priors.json").read_text())
    for category in CATEGORIES:
        answers = Counter(item["A"] for name, item in questions if name == category)
        entry = report["priors"][category]
        assert entry["questions"] == answers.total()
        assert entry["best_constant"]["accuracy"] == answers.most_common(1)[0][1] / answers.total() < 0.3
        assert entry["best_per_template"] < 0.55
    assert report["existence"]["yes"] == report["existence"]["no"]


def test_multiple_choice_answers_are_letters_of_the_right_option(frames):
    found = 0
    for frame in frames:
        behavior = {item["Q"]: item["A"] for item in frame["QA"]["behavior"]}
        right = behavior.get("Predict the behavior of the ego vehicle.")
        for question, letter in behavior.items():
            if "Please select" in question and right:
                found += 1
                assert re.search(rf"{letter}\. {re.escape(right)}( [B-D]\. |$)", question)
    assert found > SCENES / 2


def test_a_frame_keeps_about_as_many_questions_as_asked_for(frames):
    counts = [sum(map(len, frame["QA"].values())) for frame in frames]
    assert 34 <= sum(counts) / len(counts) <= 42


def test_many_questions_per_frame(tmp_path):
    world = make(tmp_path / "many", scenes=2, frames_per_scene=6, questions_per_frame=91)
    scenes = json.loads((world / "drivelm.json").read_text())
    frames = [frame for scene in scenes.values() for frame in scene["key_frames"].values()]
    counts = [sum(map(len, frame["QA"].values())) for frame in frames]
    assert len(frames) == 12 and sum(counts) / 12 > 65  # balancing costs more in a small world


def test_a_scene_has_four_to_ten_visible_objects(world):
    assert 4 <= json.loads((world / "priors.json").read_text())["visible_objects_per_frame"] <= 10


def test_behaviour_of_the_ego_car_is_uniform():
    behaviours = Counter((frame.direction, frame.speed) for frame in (sample_frame(3, i, 0, 1) for i in range(24)))
    assert set(behaviours.values()) == {2} and len(behaviours) == 12


def test_made_twice_is_made_once_and_nothing_is_overwritten(tmp_path, capsys):
    folder = make(tmp_path / "world", scenes=2)
    before = (folder / "drivelm.json").stat().st_mtime_ns
    make(tmp_path / "world", scenes=2, num_workers=2)
    assert "already there" in capsys.readouterr().out
    assert (folder / "drivelm.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="other settings"):
        make(tmp_path / "world", scenes=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="does not tell what it came from"):
        make(tmp_path / "mine")
    assert {path.name for path in tmp_path.iterdir()} == {"world", "mine"}


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.toyworld.make.write_map", fail)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "world", scenes=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["scenes", "frames_per_scene", "questions_per_frame", "num_workers"])
def test_numbers_must_be_positive(tmp_path, option):
    with pytest.raises(ValueError, match=f"--{option} must be at least 1; got 0"):
        make(tmp_path / "world", **{option: 0})


def test_width_must_give_a_whole_height(tmp_path):
    with pytest.raises(ValueError, match="multiple of 16.*got 150"):
        make(tmp_path / "world", width=150)


@pytest.mark.parametrize(("name", "size"), [("four", (128, 80)), ("seven", (160, 90))])
def test_a_world_of_another_rig(tmp_path, name, size):
    rig = read_rig(name)
    folder = make(tmp_path / "world", scenes=8, rig=name)
    assert read_rig(folder / "rig.json") == rig
    frames = [f for s in json.loads((folder / "drivelm.json").read_text()).values() for f in s["key_frames"].values()]
    text = json.dumps([frame["QA"] for frame in frames])
    for frame in frames:
        assert tuple(frame["image_paths"]) == rig.names
        for path in frame["image_paths"].values():
            with Image.open(folder / path.removeprefix("../")) as image:
                assert image.size == size
    assert {tag.split(",")[1] for frame in frames for tag in frame["key_object_infos"]} == set(rig.names)
    asked = set(re.findall(r"to the ((?:front|back)? ?(?:left|right)?) of the ego car", text))
    assert asked == set(rig.sectors)
    with pytest.raises(ValueError, match="other settings"):
        make(tmp_path / "world", scenes=8)


def test_a_rig_that_does_not_tell_all_cannot_be_drawn(tmp_path):
    (tmp_path / "rig.yaml").write_text("front: {azimuth: 0, place: [1, 0, 1.5], size: [1600, 900]}")
    with pytest.raises(ValueError, match="needs place, size and field_of_view of every camera; front lacks some"):
        make(tmp_path / "world", rig=str(tmp_path / "rig.yaml"))
    with pytest.raises(ValueError, match="rig five is neither a file nor one of four, nuscenes, seven"):
        make(tmp_path / "world", rig="five")
    assert not (tmp_path / "world").exists()


def test_contents_are_what_the_questions_are_about(world):
    """A class that a question says to stand somewhere is there, and what contents tell is never denied."""
    contents = read_contents(world / "contents.json")
    rig, checked = read_rig("nuscenes"), Counter()
    for scene in json.loads((world / "drivelm.json").read_text()).values():
        for token, frame in scene["key_frames"].items():
            for item in frame["QA"]["perception"]:
                asked = re.fullmatch(r"Are there (\w+)s to the ([a-z ]+) of the ego car\?", item["Q"])
                if asked is None:
                    continue
                shown = {
                    thing["name"] for thing in contents[token]["objects"] if rig.sector(thing["camera"]) == asked[2]
                }
                assert (asked[1] in shown) == (item["A"] == "Yes.")
                checked[item["A"]] += 1
    assert min(checked["Yes."], checked["No."]) > 5


def test_contents_of_single_pictures_and_of_two_cameras_that_look_the_same_way(tmp_path):
    """A picture's frame has its part, and what a second camera may show of a class is not told to be absent."""
    world = make(tmp_path / "seven", rig="seven", scenes=12)
    told, rig = read_contents(world / "contents.json"), read_rig("seven")
    pictures = json.loads((world / "pictures.json").read_text())
    for scene in pictures.values():
        for token, frame in scene["key_frames"].items():
            (camera,) = frame["image_paths"]
            whole = told[token.removesuffix(f"-{camera}")]
            assert told[token] == limited(whole, {camera})
    assert len(told) == 12 * (1 + len(rig.names))
    two = set(rig.sectors["front"])
    assert {camera for frame in told.values() for _, camera in frame["unclear"]} >= two
    there = {(thing["name"], thing["camera"]) for frame in told.values() for thing in frame["objects"]}
    assert {camera for _, camera in there} >= two


def test_a_world_of_an_older_version_says_that_it_has_no_contents(tmp_path, capsys):
    world = make(tmp_path / "world", scenes=1)
    make(world, scenes=1)
    assert "older version" not in capsys.readouterr().out
    (world / "contents.json").unlink()
    make(world, scenes=1)
    assert "An older version made it, without contents.json" in capsys.readouterr().out
