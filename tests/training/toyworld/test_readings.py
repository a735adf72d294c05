"""Readings: the same from seed and number, balanced, true to their contents, and of no world."""

from collections import Counter

import pytest

from training.data.drivelm import uses_coordinates
from training.data.rig import NUSCENES, read_rig
from training.data.wording import plural
from training.toyworld.contents import all_words
from training.toyworld.readings import APART, make_reading
from training.toyworld.scene import sample_frame
from training.toyworld.truth import existence_question

READINGS = [make_reading(0, number) for number in range(60)]
ASKED = [asked for reading in READINGS for asked in reading.asked]


def test_a_reading_is_a_function_of_seed_and_number():
    assert make_reading(0, 7) == READINGS[7]
    assert make_reading(1, 7) != READINGS[7]
    world = [len(sample_frame(0, number, 0, 1).objects) for number in range(60)]
    drawn = [len(sample_frame(APART, number, 0, 1).objects) for number in range(60)]
    assert world != drawn  # a world of seed 0 is another one


def test_kinds_are_even_and_existence_is_balanced():
    kinds = Counter(asked.kind for asked in ASKED)
    assert kinds["existence"] == 6 * len(READINGS)
    assert kinds["objects"] > 1.7 * len(READINGS) and kinds["status"] > 1.7 * len(READINGS)
    assert kinds["planning"] and kinds["behavior"] and kinds["traffic light"] and kinds["closest"] and kinds["count"]
    answers = Counter(asked.answer for asked in ASKED if asked.kind == "existence")
    assert answers["Yes."] == answers["No."]
    assert not any(uses_coordinates(asked.question, asked.answer) for asked in ASKED)
    lit = [any(thing["name"] == "traffic light" for thing in reading.contents["objects"]) for reading in READINGS]
    assert 0.25 < sum(lit) / len(lit) < 0.55


@pytest.mark.parametrize("name", ["nuscenes", "four"])
def test_answers_are_what_the_contents_say(name):
    rig = read_rig(name)
    for reading in READINGS if name == "nuscenes" else [make_reading(0, number, rig) for number in range(8)]:
        assert {thing["camera"] for thing in reading.contents["objects"]} <= set(rig.names)
        for asked in reading.asked:
            cameras = rig.named_in(asked.question)
            shown = [thing for thing in reading.contents["objects"] if thing["camera"] in cameras]
            if asked.kind == "existence":
                true = {
                    existence_question(thing["name"], status, rig.sector(thing["camera"]))
                    for thing in shown
                    for status in (None, thing["status"])
                }
                assert (asked.question in true) == (asked.answer == "Yes."), (asked, shown)
            elif asked.kind == "closest":
                nearest = min(shown, key=lambda thing: thing["distance"])
                assert asked.answer == f"A {nearest['name']}."


def test_no_is_said_of_what_is_nowhere_and_of_what_stands_elsewhere():
    nowhere = elsewhere = 0
    for reading in READINGS:
        there = {plural(thing["name"]) for thing in reading.contents["objects"]}
        for asked in reading.asked:
            if asked.kind == "existence" and asked.answer == "No.":
                found = any(name in asked.question for name in there)
                nowhere, elsewhere = nowhere + (not found), elsewhere + found
    assert nowhere > len(READINGS) / 2 and elsewhere > len(READINGS)


def test_questions_look_where_contents_tell_what_they_ask_for():
    for asked in ASKED:
        about_ego = ("CAM_FRONT",) if asked.kind in ("planning", "behavior") else ()
        assert asked.cameras == (("CAM_BACK",) if "droplets" in asked.question else about_ego), asked


def test_all_words_of_contents_are_known():
    known = {word for words in all_words(NUSCENES)["words"].values() for word in words}
    assert {word for reading in READINGS for words in reading.contents["words"].values() for word in words} <= known
