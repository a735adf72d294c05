"""What contents answer is what the wording answers, and a "No." has one reason."""

import random

import pytest

from training.data.asked import Asked, answer_from, asked_by, why_not
from training.data.contents import Contents
from training.data.rig import NUSCENES, read_rig
from training.data.wording import STATUSES, SceneObject, perception_questions


def contents_of(*things: tuple[str, str, str | None], unclear: tuple[tuple[str, str], ...] = ()) -> Contents:
    """Contents from (class, camera, status)."""
    objects = [{"name": n, "camera": c, "status": s, "distance": None} for n, c, s in things]
    return {"objects": objects, "words": {}, "unclear": list(unclear)}


@pytest.mark.parametrize("rig", [NUSCENES, read_rig("four"), read_rig("seven")])
def test_contents_answer_as_the_wording_does(rig):
    """Of random frames, every question of the three kinds, whoever of a sector's cameras shows a thing."""
    kinds = set()
    for seed in range(30):
        rng = random.Random(seed)
        names = [rng.choice([*STATUSES]) for _ in range(rng.randint(1, 25))]
        things = [(name, rng.choice(rig.names), rng.choice([*STATUSES[name], None])) for name in names]
        objects = [
            SceneObject(name, camera, (0.0, 0.0), float(i), status) for i, (name, camera, status) in enumerate(things)
        ]
        for pair in perception_questions(objects, rng, rig=rig):
            asked = asked_by(pair["Q"])
            if asked is not None:
                kinds.add((asked.kind, pair["A"] == "No."))
                assert answer_from(asked, contents_of(*things), rig) == pair["A"], pair
                reason = why_not(asked, contents_of(*things), rig) if asked.kind == "existence" else None
                assert reason is None or pair["A"] == "No."
    assert kinds == {("existence", True), ("existence", False), ("count", False), ("objects", False)}


@pytest.mark.parametrize(
    "question",
    ["Are there cars?", "Predict the behavior of the ego vehicle.", "Are there trams to the back of the ego car?"],
)
def test_other_questions_are_not_known(question):
    assert asked_by(question) is None


HERE, OTHER = "CAM_BACK", "CAM_FRONT_LEFT"
MOVING = Asked("existence", "back", "car", "moving")
CARS = Asked("existence", "back", "car")


@pytest.mark.parametrize(
    ("asked", "things", "reason"),
    [
        (MOVING, [], "nowhere"),
        (MOVING, [("truck", HERE, "moving"), ("car", OTHER, "parked")], "nowhere"),
        (MOVING, [("car", OTHER, "moving")], "elsewhere"),
        (MOVING, [("car", HERE, "parked")], "other_state"),
        (MOVING, [("car", HERE, "parked"), ("car", OTHER, "moving")], "elsewhere"),
        (MOVING, [("car", HERE, "moving"), ("car", OTHER, "moving")], None),  # it is "Yes."
        (MOVING, [("car", HERE, None)], None),
        (MOVING, [("car", OTHER, None)], None),
        (MOVING, [("car", OTHER, None), ("car", OTHER, "moving")], "elsewhere"),
        (CARS, [], "nowhere"),
        (CARS, [("car", OTHER, "parked")], "elsewhere"),
        (CARS, [("car", OTHER, None)], "elsewhere"),
    ],
)  # fmt: skip
def test_a_no_has_one_reason(asked, things, reason):
    assert why_not(asked, contents_of(*things), NUSCENES) == reason


def test_what_is_shown_badly_leaves_questions_open():
    parked = ("car", HERE, "parked")
    at_hand, far = contents_of(parked, unclear=(("car", HERE),)), contents_of(parked, unclear=(("car", OTHER),))
    assert answer_from(MOVING, at_hand, NUSCENES) is None and answer_from(CARS, at_hand, NUSCENES) == "Yes."
    assert answer_from(Asked("count", "back", "car"), at_hand, NUSCENES) is None
    assert answer_from(Asked("objects", "back"), at_hand, NUSCENES) is None
    assert answer_from(Asked("count", "back", "bus"), at_hand, NUSCENES) == "Zero."
    assert answer_from(MOVING, far, NUSCENES) == "No." and why_not(MOVING, far, NUSCENES) is None
    assert why_not(MOVING, at_hand, NUSCENES) is None


def test_nobody_asks_about_an_empty_sector_or_one_that_no_camera_sees():
    assert answer_from(Asked("objects", "back"), contents_of(), NUSCENES) is None
    assert answer_from(CARS, contents_of(), NUSCENES) == "No."
    assert answer_from(Asked("existence", "left", "car"), contents_of(), NUSCENES) is None
    assert why_not(Asked("existence", "left", "car"), contents_of(), NUSCENES) is None
    assert answer_from(Asked("objects", "back"), contents_of(("animal", HERE, None)), NUSCENES) is None
