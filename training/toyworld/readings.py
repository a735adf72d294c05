"""Scenes to read: endless toy frames without pictures, what their cameras show, and a few questions about each.

A reading is a function of (seed, index) alone. Its frame is drawn as `scene.sample_frame` draws all; nothing is
rendered, so every object is taken to be seen by the camera that has most of it, but for a few that are taken to be
hidden. Questions are the world's own, even in kind; those with tags are left out, as `training.prepare` does with
`coordinates: none`. Existence questions of an easy kind are added, because a question about a thing that no camera
shows is the first that a model learns to answer.
"""

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from training.data.contents import Contents
from training.data.drivelm import IMAGE_SIZE, uses_coordinates
from training.data.rig import NUSCENES, Rig
from training.data.wording import STATUSES, SceneObject
from training.toyworld.balance import Item, yes_no
from training.toyworld.cameras import cameras
from training.toyworld.contents import AHEAD, BEHIND, contents_of
from training.toyworld.questions import write_questions
from training.toyworld.scene import KINDS, ToyFrame, sample_frame
from training.toyworld.truth import Seen, Truth, existence_question

HIDDEN, HIDDEN_LIGHT = 0.06, 0.4
"""Chance that an object, or a traffic light, is not shown: two thirds of the frames have a light, 40 % show one."""

EXISTENCE, OTHER = "existence", "other"
PLAN = {"objects": 2, "status": 2, "count": 1, "closest": 1, OTHER: 5}
"""Questions of a reading by kind, beside those of existence."""
EXISTENCE_EACH, EASY_PAIRS = 1, 2
_BEGINNINGS = {
    "Are there ": EXISTENCE,
    "What are objects ": "objects",
    "What is the status ": "status",
    "How many ": "count",
    "What is the closest ": "closest",
    "Is there any traffic element ": "traffic light",
}
_BOX = (760.0, 500.0, 840.0, 580.0)
_WEATHER = "Will water droplets"
APART = 1_000_000  # from the seeds of worlds: nobody shall read what a test will show


class Asked(NamedTuple):
    """A question about a reading.

    Attributes:
        kind: existence, objects, status, count, closest or traffic light, else the category.
        cameras: where its answer stands by the world's rules, although it names no camera; else empty.
    """

    question: str
    answer: str
    kind: str
    cameras: tuple[str, ...]


class Reading(NamedTuple):
    """What a frame shows, and questions about it."""

    contents: Contents
    asked: list[Asked]


def make_reading(seed: int, index: int, rig: Rig = NUSCENES) -> Reading:
    """The `index`-th scene to read of a seed."""
    frame = sample_frame(APART + seed, index, 0, 1, rig=rig)
    rng = frame.random("reading")
    truth = imagined_truth(frame, rng)
    by_kind: dict[str, list[Item]] = defaultdict(list)
    for item in write_questions(frame, truth, 0):
        if not uses_coordinates(item.question, item.answer):
            by_kind[kind_of(item)].append(item)
    by_kind[OTHER] = [item for kind, items in by_kind.items() if kind not in (*PLAN, EXISTENCE) for item in items]
    chosen = [
        item for kind, count in PLAN.items() for item in rng.sample(by_kind[kind], min(count, len(by_kind[kind])))
    ]
    for answer in ("Yes.", "No."):
        same = [item for item in by_kind[EXISTENCE] if item.answer == answer]
        chosen += rng.sample(same, min(EXISTENCE_EACH, len(same)))
    chosen += easy_existence(truth, rig, rng)
    asked = [
        Asked(item.question, item.answer, kind_of(item), rig.sectors.get(_told_in(item) or "", ())) for item in chosen
    ]
    return Reading(contents_of(frame, [(seen.item, seen.camera) for seen in truth.seen]), asked)


def kind_of(item: Item) -> str:
    """What a question of the world asks: a kind of perception, or its category."""
    return next(
        (kind for beginning, kind in _BEGINNINGS.items() if item.question.startswith(beginning)), item.category
    )


def _told_in(item: Item) -> str | None:
    """The sector that `contents_of` tells what the ego car does, or how the weather is, of a question about these."""
    if item.question.startswith(_WEATHER):
        return BEHIND
    return AHEAD if item.category in ("planning", "behavior") else None


def imagined_truth(frame: ToyFrame, rng: random.Random) -> Truth:
    """What the pictures of a frame might show well, had they been drawn."""
    views = cameras(IMAGE_SIZE[0], frame.rig)
    seen = []
    for index, item in enumerate(frame.objects):
        if rng.random() < (HIDDEN_LIGHT if item.name == "traffic light" else HIDDEN):
            continue
        corners = item.corners()
        camera = max(views, key=lambda name: views[name].share_of_width(corners))
        center = ((_BOX[0] + _BOX[2]) / 2, (_BOX[1] + _BOX[3]) / 2)
        scene_object = SceneObject(item.name, camera, center, item.distance, item.status)
        seen.append(Seen(index, item, scene_object, frame.rig.sector(camera), _BOX))
    return Truth(tuple(seen), frozenset(), frozenset(), (1.0,) * len(frame.objects), {})


def easy_existence(truth: Truth, rig: Rig, rng: random.Random) -> Iterator[Item]:
    """Pairs of a question that is true and one that is not: of something that stands elsewhere, then of nothing."""
    there = sorted(
        {(seen.item.name, status or "", seen.sector) for seen in truth.seen for status in (None, seen.item.status)}
    )
    elsewhere = [
        (name, status, sector)
        for name, status in dict.fromkeys((name, status) for name, status, _ in there)
        for sector in rig.sectors
        if (name, status, sector) not in there
    ]
    shown = {(name, status) for name, status, _ in there}
    kinds = [(name, status) for name in KINDS for status in ("", *STATUSES[name])]
    nowhere = [(*kind, sector) for kind in kinds if kind not in shown for sector in rig.sectors]
    for number in range(EASY_PAIRS):
        no = nowhere if number % 2 else elsewhere
        if there and no:
            for choices, answer in ((there, True), (no, False)):
                name, status, sector = rng.choice(choices)
                yield yes_no("perception", existence_question(name, status or None, sector), answer)
