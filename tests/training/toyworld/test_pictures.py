"""Single pictures of the toy world: what is asked about them is true, needs one camera, and is not DriveLM's."""

import json
import re
from collections import Counter

import pytest

from training.data.rig import NUSCENES
from training.data.wording import STATUSES
from training.toyworld.make import ToyWorldArguments, main
from training.toyworld.pictures import SHOWS

SECTORS = {name: NUSCENES.sector(name) for name in NUSCENES.names}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toyworld") / "world"
    main(
        ToyWorldArguments(scenes=8, output_dir=str(folder), seed=3, width=160, weathers=["day", "fog"], num_workers=1)
    )
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("pictures", "documents", "drivelm")}


def frames(world, name):
    return [frame for scene in world[name].values() for frame in scene["key_frames"].values()]


def pairs(frame):
    return [(item["Q"], item["A"]) for group in frame["QA"].values() for item in group]


def test_every_picture_is_a_frame_of_one_camera(world):
    pictures, driving = frames(world, "pictures"), frames(world, "drivelm")
    assert len(pictures) == 6 * len(driving) == 48
    shown = {path for frame in pictures for path in frame["image_paths"].values()}
    assert all(len(frame["image_paths"]) == 1 and not frame["key_object_infos"] for frame in pictures)
    assert shown == {path for frame in driving for path in frame["image_paths"].values()}


def test_only_the_weathers_that_were_asked_for(world):
    assert Counter(frame["weather"] for frame in frames(world, "drivelm")) == {"day": 4, "fog": 4}
    for frame in frames(world, "pictures"):
        answers = dict(pairs(frame))
        assert (
            answers["What is the weather in the picture?"]
            == {"day": "It is day.", "fog": "There is fog."}[frame["weather"]]
        )


def test_no_question_is_drivelms_nor_about_the_ego_car(world):
    driving = {question for frame in frames(world, "drivelm") for question, _ in pairs(frame)}
    for frame in frames(world, "pictures"):
        for question, _ in pairs(frame):
            assert question not in driving
            assert not re.search(r"\bego\b|CAM_|Are there", question)


def test_six_pictures_come_with_the_questions_of_each_and_tell_which_camera_looks_where(world):
    alone = {path: pairs(frame) for frame in frames(world, "pictures") for path in frame["image_paths"].values()}
    for frame in frames(world, "documents"):
        if len(frame["image_paths"]) == 1:
            continue
        cameras, asked = frame["image_paths"], pairs(frame)
        assert ("Which camera looks to the back left?", "CAM_BACK_LEFT.") in asked
        assert sum(question.startswith("Which camera looks") for question, _ in asked) == len(cameras) == 6
        others = [(question, answer) for question, answer in asked if not question.startswith("Which camera looks")]
        for asked_there, answer in others:
            place = re.search(r"(CAM_[A-Z_]+|[Tt]o the (front|back)( left| right)?)", asked_there)
            before = rf"^{place[1]}: "  # or inside, or after
            question = re.sub(rf"{before}|(?<=[.?]) {place[1]}\.$| {place[1]}(?=[ ?.])", "", asked_there)
            if question == "Name everything in the picture.":
                prefix = f"{place[1][0].upper()}{place[1][1:]}: "
                assert answer.startswith(prefix)
                answer = answer.removeprefix(prefix)
            camera = "CAM_" + re.sub("^(CAM_|[Tt]o the )", "", place[1]).upper().replace(" ", "_")
            assert (question, answer) in alone[cameras[camera]]
        assert len(others) == sum(len(alone[path]) for path in cameras.values())


def test_existence_is_balanced_and_agrees_with_the_listing(world):
    count = Counter()
    patterns = [re.escape(wording).replace(r"\{\}", "(?:a |an |any )?(.+)") for wording in SHOWS]
    for frame in frames(world, "pictures"):
        answers = dict(pairs(frame))
        listing = answers.get("Name everything in the picture.")
        for question, answer in answers.items():
            shows = next((pattern for pattern in patterns if re.fullmatch(pattern, question)), None)
            count[answer] += shows is not None
            if shows and listing is not None:
                kind = re.fullmatch(shows, question)[1]
                name = next((name for name in STATUSES if kind in (name, f"{name}s", f"{name}es")), None)
                assert name is None or (name in listing) == (answer == "Yes.")  # None: with a state
    assert count["Yes."] > 20 and 0 <= count["No."] - count["Yes."] <= 48  # an empty picture has one "No."


def test_an_unknown_weather_is_told(tmp_path):
    with pytest.raises(ValueError, match="day, night, rain, fog; got \\['snow'\\]"):
        main(ToyWorldArguments(scenes=1, output_dir=str(tmp_path / "x"), weathers=["snow"]))


def test_documents_are_six_pictures_and_each_alone(world):
    for scene in world["documents"].values():
        whole = {token: frame for token, frame in scene["key_frames"].items() if len(frame["image_paths"]) == 6}
        for token, frame in whole.items():
            alone = [scene["key_frames"][f"{token}-{camera}"] for camera in frame["image_paths"]]
            assert sorted(pairs(frame)) == sorted(pair for picture in alone for pair in pairs(picture))
            for picture in alone:
                (camera,) = picture["image_paths"]
                assert (f"Which camera looks to the {SECTORS[camera]}?", f"{camera}.") in pairs(picture)
                assert not any(
                    name in question
                    for question, _ in pairs(picture)
                    for name in {*SECTORS} - {camera}
                    if not name.startswith(camera) and not camera.startswith(name)
                )
        assert len(scene["key_frames"]) == 7 * len(whole)
