"""Every control changes exactly what it says, and says the same in every process."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import picture

from smoldriver_hf.configuration_smoldriver import CAMERAS
from training.data.rig import NUSCENES, read_rig
from training.evaluation.absent_objects import absent_object_questions
from training.evaluation.controls import (
    BLIND,
    CORRUPTIONS,
    Control,
    control_questions,
    control_views,
    expand_controls,
    permuted,
    wrong_scene,
)
from training.evaluation.corruptions import IMAGE_CORRUPTIONS, corrupt_image
from training.evaluation.paraphrases import PARAPHRASES, paraphrase
from training.metrics.answers import question_type


def make_frame(folder: Path, number: int, scene: str) -> dict:
    images = {}
    for index, camera in enumerate(CAMERAS):
        path = folder / f"{number}-{camera}.png"
        picture(10 * number + index, (96, 54)).save(path)
        images[camera] = str(path)
    return {"scene_token": scene, "frame_token": f"f{number}", "images": images}


def make_row(frame: dict, number: int, question: str, answer: str) -> dict:
    identifier = f"{frame['scene_token']}_{frame['frame_token']}_{number}"
    fixed = {"category": "perception", "tag": [0], "objects": []}
    return {**frame, **fixed, "question_id": identifier, "question": question, "answer": answer}


QUESTIONS = (
    ("What are objects to the front left of the ego car?", "There are two cars and one truck to the front left."),
    ("What are objects to the back of the ego car?", "There is one bus behind the ego car."),
    ("Are there moving pedestrians to the front of the ego car?", "No."),
    ("Are there bicycles with riders to the back right of the ego car?", "Yes."),
    ("What is the observed status of object <c1,CAM_FRONT_LEFT,20.0,30.0>?", "Moving."),
    ("Predict the behavior of the ego vehicle.", "The ego vehicle is going straight. The ego vehicle is slow."),
    ("Please sing a song.", "La."),
)


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("frames")
    return [make_frame(folder, number, f"s{number // 2}") for number in range(6)]


@pytest.fixture(scope="module")
def rows(frames) -> list[dict]:
    return [make_row(frames[0], number, *pair) for number, pair in enumerate(QUESTIONS)]


def shown(control: str, frames, rows, cameras=CAMERAS, seed: int = 0) -> dict:
    ((images, asked),) = control_views(Control.parse(control), frames[0], rows, frames, cameras, NUSCENES, seed)
    assert [row["question_id"] for row in asked] == [row["question_id"] for row in rows]
    assert all(row["asked"] == row["question"] for row in asked)
    return images


def test_sighted_and_text_only(frames, rows):
    assert shown("sighted", frames, rows) == frames[0]["images"]
    assert list(shown("sighted", frames, rows, ["CAM_BACK", "LIDAR_BEV", "CAM_FRONT"])) == ["CAM_BACK", "CAM_FRONT"]
    assert shown("text_only", frames, rows) == {}


def test_black_images_are_black_and_of_the_same_size(frames, rows):
    images = shown("black", frames, rows)
    assert list(images) == list(CAMERAS)
    for image in images.values():
        assert image.size == (96, 54) and image.mode == "RGB" and not np.asarray(image).any()


def test_wrong_scene_never_shows_the_same_scene(frames, rows):
    paths = {path: frame["scene_token"] for frame in frames for path in frame["images"].values()}
    chosen = set()
    for seed in range(40):
        for frame in frames:
            other = wrong_scene(frame, frames, seed)
            assert other["scene_token"] != frame["scene_token"]
            assert wrong_scene(frame, frames[::-1], seed) is other  # the order of frames is irrelevant
            chosen.add((frame["frame_token"], other["frame_token"]))
    assert len(chosen) == 6 * 4  # every frame of other scenes gets its turn
    images = shown("wrong_scene", frames, rows)
    assert list(images) == list(CAMERAS)
    assert {paths[path] for path in images.values()} != {"s0"} and len({paths[p] for p in images.values()}) == 1
    with pytest.raises(ValueError, match="only this one"):
        wrong_scene(frames[0], frames[:2])


def test_drop_takes_one_camera_away(frames, rows):
    for camera in CAMERAS:
        images = shown(f"drop:{camera}", frames, rows)
        assert images == {name: path for name, path in frames[0]["images"].items() if name != camera}


def test_drop_relevant_takes_the_named_cameras_away_from_each_question(frames, rows):
    views = control_views(Control("drop_relevant"), frames[0], rows, frames, CAMERAS, NUSCENES)
    asked = {row["question"]: images for images, group in views for row in group}
    assert list(asked) != [] and set(asked) == {question for question, _ in QUESTIONS[:5]}
    missing = {question: [camera for camera in CAMERAS if camera not in images] for question, images in asked.items()}
    assert list(missing.values()) == [list(NUSCENES.named_in(question)) for question in missing]
    assert missing[QUESTIONS[0][0]] == missing[QUESTIONS[4][0]] == ["CAM_FRONT_LEFT"]
    assert len(views) == 4  # questions that lose the same camera share a view
    assert len(control_questions(Control("drop_relevant"), rows, NUSCENES)) == 5


def test_black_relevant_blackens_the_named_cameras_of_each_question(frames, rows):
    views = control_views(Control("black_relevant"), frames[0], rows, frames, CAMERAS, NUSCENES)
    asked = {row["question"]: images for images, group in views for row in group}
    assert set(asked) == {question for question, _ in QUESTIONS[:5]}
    for question, images in asked.items():
        black = [camera for camera in CAMERAS if images[camera] != frames[0]["images"][camera]]
        assert list(images) == list(CAMERAS) and tuple(black) == NUSCENES.named_in(question)
        assert all(images[camera].size == (96, 54) and not np.asarray(images[camera]).any() for camera in black)


@pytest.mark.parametrize(
    ("question", "cameras"),
    [
        ("Are there cars to the back left of the ego car?", ("CAM_BACK_LEFT",)),
        ("Are there cars to the back of the ego car?", ("CAM_BACK",)),
        ("Is there any traffic element in the front view?", ("CAM_FRONT",)),
        ("What is in front of the ego car and what behind the ego car?", ("CAM_FRONT", "CAM_BACK")),
        ("Would <c1,CAM_BACK,1.0,2.0> see <c2,CAM_FRONT_RIGHT,0.1,0.2>?", ("CAM_FRONT_RIGHT", "CAM_BACK")),
        ("Is the ego car steering to the left? Will it back up?", ()),
        ("Predict the behavior of the ego vehicle.", ()),
    ],
)
def test_relevant_cameras(question, cameras):
    assert NUSCENES.named_in(question) == cameras


def test_permuted_keeps_labels_and_moves_every_image(frames, rows):
    original = frames[0]["images"]
    images = shown("permuted", frames, rows)
    assert list(images) == list(original) and sorted(images.values()) == sorted(original.values())
    assert all(images[camera] != original[camera] for camera in CAMERAS)
    shifts = {list(permuted(original, str(key)).values()).index(original["CAM_FRONT"]) for key in range(40)}
    assert len(shifts) == 5
    assert permuted({"CAM_FRONT": "a"}, "key") == {"CAM_FRONT": "a"}


def test_swap_left_right(frames, rows):
    original, images = frames[0]["images"], shown("swap_left_right", frames, rows)
    assert list(images) == list(CAMERAS)
    for side in ("FRONT", "BACK"):
        assert images[f"CAM_{side}"] == original[f"CAM_{side}"]
        assert images[f"CAM_{side}_LEFT"] == original[f"CAM_{side}_RIGHT"]
        assert images[f"CAM_{side}_RIGHT"] == original[f"CAM_{side}_LEFT"]
    alone = shown("swap_left_right", frames, rows, ["CAM_FRONT_LEFT", "CAM_FRONT"])
    assert alone == {camera: original[camera] for camera in ("CAM_FRONT_LEFT", "CAM_FRONT")}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_change_more_with_severity_and_are_reproducible(name, frames, rows):
    original = {camera: np.asarray(Image.open(path), dtype=float) for camera, path in frames[0]["images"].items()}

    def distances(severity: int) -> list[float]:
        images = shown(f"corrupt:{name}:{severity}", frames, rows)
        assert list(images) == list(CAMERAS)
        changed = [np.asarray(Image.open(i) if isinstance(i, str) else i, dtype=float) for i in images.values()]
        return [float(abs(c - o).mean()) for c, o in zip(changed, original.values(), strict=True)]

    means = [np.mean(distances(severity)) for severity in (1, 3, 5)]
    assert 0 < means[0] < means[1] < means[2]
    assert distances(2) == distances(2)
    if name == "frame_loss":
        assert [sum(d > 0 for d in distances(severity)) for severity in (1, 5)] == [1, 5]
    else:
        assert all(distance > 0 for distance in distances(5))


def test_corruption_size_and_seeds():
    image = picture(0, (100, 60)).convert("L")
    for name in IMAGE_CORRUPTIONS:
        result = corrupt_image(image, name, 3, seed=1)
        assert result.size == (100, 60) and result.mode == "RGB"
        deterministic = name in ("jpeg", "motion_blur")
        assert (corrupt_image(image, name, 3, seed=2).tobytes() == result.tobytes()) == deterministic, name
    with pytest.raises(ValueError, match="unknown corruption 'mist'; known: night, fog"):
        corrupt_image(image, "mist", 1, 0)
    with pytest.raises(ValueError, match="1 to 5; got 6"):
        corrupt_image(image, "fog", 6, 0)


def test_paraphrases_keep_question_words_and_images(frames, rows):
    ((images, asked),) = control_views(Control("paraphrase"), frames[0], rows, frames, CAMERAS, NUSCENES)
    assert images == frames[0]["images"]
    assert [row["question"] for row in asked] == [question for question, _ in QUESTIONS[:6]]
    for row in asked:
        assert row["asked"] != row["question"]
        # No class, sector, state, tag or number is lost.
        kept = r"<[^>]*>|front|back|left|right|moving|pedestrians|bicycles|riders|behav"
        assert sorted(re.findall(kept, row["question"])) == sorted(re.findall(kept, row["asked"]))
    options = " Please select the correct answer from the following options: A. Yes. B. No."
    rewritten = paraphrase("Predict the behavior of the ego vehicle." + options)
    assert rewritten is not None and rewritten.endswith("following options: A. Yes. B. No.")
    assert paraphrase("Are there cars to the back of the ego car? And why?") is None
    assert len({replacement for _, replacement in PARAPHRASES}) == len(PARAPHRASES)


def test_absent_objects_are_absent(rows):
    questions = absent_object_questions(rows, NUSCENES)
    assert [row["camera"] for row in questions] == ["CAM_FRONT_LEFT", "CAM_BACK"]
    assert [row["question_id"] for row in questions] == ["s0_f0_absent-CAM_FRONT_LEFT", "s0_f0_absent-CAM_BACK"]
    for row in questions:
        assert row["answer"] == "No." and question_type(row["asked"], row["answer"]) == "yes_no"
    left, back = (row["asked"] for row in questions)
    # Front left has cars and a truck; a bus and ridden bicycles stand elsewhere, not next to it: one of them is asked.
    assert left in [f"Are there {name} to the front left of the ego car?" for name in ("buses", "bicycles")]
    # Behind is the bus and next to it a bicycle; cars and trucks stand elsewhere.
    assert back in [f"Are there {name} to the back of the ego car?" for name in ("cars", "trucks")]
    assert absent_object_questions(rows[2:], NUSCENES) == []


def test_a_class_next_door_is_absent_where_the_frame_counts_zero(frames, rows):
    """Cars stand to the front left; in front only the frame's own "Zero." tells that none reaches into the picture."""
    front = make_row(frames[0], 7, "What are objects to the front of the ego car?", "There is one barrier in front.")
    zero = make_row(frames[0], 8, "How many cars are there to the front of the ego car?", "Zero.")
    one = make_row(frames[0], 8, "How many buses are there to the front of the ego car?", "One.")

    def asked(*more: dict) -> str:
        (question,) = [
            row for row in absent_object_questions([*rows, *more], NUSCENES) if row["camera"] == "CAM_FRONT"
        ]
        return question["asked"]

    assert asked(front, zero) == asked(front, zero, one) == "Are there cars to the front of the ego car?"
    assert asked(front) != asked(front, zero) != asked(front, one)
    written = make_row(frames[0], 9, asked(front, zero), "No.")
    assert asked(front, zero, written) not in (asked(front, zero), "Are there trucks to the front of the ego car?")


def test_control_views_of_a_frame_without_fitting_questions(frames, rows):
    assert control_views(Control("paraphrase"), frames[0], rows[6:], frames, CAMERAS, NUSCENES) == []
    assert control_views(Control("sighted"), frames[0], [], frames, CAMERAS, NUSCENES) == []


def test_expand_controls():
    cameras = ["CAM_FRONT", "CAM_BACK"]
    every = expand_controls(["all"], cameras, (1, 5))
    assert list(map(str, every[:5])) == ["sighted", *BLIND]
    assert len(every) == 5 + 2 + 4 + 2 * len(CORRUPTIONS) + 2 and len(set(every)) == len(every)
    assert expand_controls(["black", "sighted", "black"], cameras) == [Control("sighted"), Control("black")]
    for wrong, message in {
        "blur": "unknown control 'blur'; known: sighted, template_majority",
        "drop:CAM_LEFT": "is shown CAM_FRONT, CAM_BACK",
        "corrupt:fog:6": "expected corrupt:NAME:SEVERITY",
        "corrupt:fog": "unknown control",
    }.items():
        with pytest.raises(ValueError, match=message):
            expand_controls([wrong], cameras)


def test_choices_do_not_depend_on_the_process(frames, rows):
    # Python's own hash of a string differs from process to process.
    images = {camera: camera for camera in CAMERAS}
    assert [permuted(images, key)["CAM_FRONT_LEFT"] for key in "abcd"] == [
        "CAM_FRONT",
        "CAM_BACK_LEFT",
        "CAM_FRONT",
        "CAM_BACK_LEFT",
    ]


NAMES = ["sighted", "sighted@4", *BLIND, "drop:CAM_BACK", "drop_relevant", "black_relevant"]
NAMES += ["permuted", "swap_left_right", "corrupt:fog:3", "corrupt:frame_loss:5", "paraphrase", "absent_object"]


@pytest.mark.parametrize("name", NAMES)
def test_a_control_is_read_and_written_under_its_name(name):
    control = Control.parse(name)
    assert str(control) == name and Control.parse(str(control)) == control
    assert control.title and "{" not in control.title and "None" not in control.title


def test_parts_of_a_control():
    assert Control.parse("corrupt:motion_blur:2") == Control("corrupt", corruption="motion_blur", severity=2)
    assert Control.parse("corrupt:motion_blur:2").title == "motion blur, severity 2"
    assert Control.parse("sighted@16") == Control("sighted", budget=16)
    groups = {name: Control.parse(name).group for name in ("sighted", "sighted@2", "black", "drop:X", "paraphrase")}
    assert list(groups.values()) == ["sighted", "budgets", "blind", "cameras", "questions"]
    for wrong in ("sighted@", "sighted@x", "black@2", "drop", "drop:A:B", "corrupt:fog:0", ""):
        with pytest.raises(ValueError, match="unknown control|expected corrupt"):
            Control.parse(wrong)


def test_controls_of_another_rig(frames):
    """Four cameras of other names: mirror, neighbours and the words of questions are the rig's."""
    rig = read_rig("four")
    images = dict(zip(rig.names, frames[0]["images"].values(), strict=False))
    frame = {**frames[0], "images": images}
    questions = [
        make_row(frame, 0, "What are objects to the left of the ego car?", "There is one bus to the left."),
        make_row(frame, 1, "Are there moving pedestrians to the back of the ego car?", "Yes."),
        make_row(frame, 2, "What are objects to the right of the ego car?", "There is one truck to the right."),
        make_row(frame, 3, "What is the visual description of <c1,left,20.0,30.0>?", "Bus."),
    ]

    def views(name: str) -> list:
        return control_views(Control.parse(name), frame, questions, frames, rig.names, rig)

    ((swapped, _),) = views("swap_left_right")
    assert swapped == {**images, "left": images["right"], "right": images["left"]}
    ((dropped, _),) = views("drop:back")
    assert list(dropped) == ["front", "left", "right"]
    assert [(sorted(set(rig.names) - set(shown)), len(asked)) for shown, asked in views("drop_relevant")] == [
        (["left"], 2),
        (["back"], 1),
        (["right"], 1),
    ]
    ((permuted_images, _),) = views("permuted")
    assert all(permuted_images[camera] != images[camera] for camera in rig.names)
    left, right = absent_object_questions(questions, rig)
    assert (left["camera"], right["camera"]) == ("left", "right")
    # To the left is the bus and next to it, behind, a pedestrian: the truck on the other side is asked about.
    assert left["asked"] == "Are there trucks to the left of the ego car?"
    assert right["asked"] == "Are there buses to the right of the ego car?"


def test_two_lenses_of_one_sector_are_dropped_together(frames):
    rig = read_rig("seven")
    images = dict.fromkeys(rig.names, frames[0]["images"]["CAM_FRONT"])
    frame = {**frames[0], "images": images}
    row = make_row(frame, 0, "Are there cars to the front of the ego car?", "Yes.")
    ((shown_images, _),) = control_views(Control("drop_relevant"), frame, [row], frames, rig.names, rig)
    assert set(images) - set(shown_images) == {"CAM_FRONT", "CAM_FRONT_NARROW"}
