"""Questions and answers about a toy frame in all four DriveLM categories, balanced over the whole world.

Perception comes from `training.data.questions`, with `What is the visual description of ...` told with colours.
Prediction, planning and behavior are written here in the wording of the DriveLM-nuScenes v1.1 release, answered by
fixed rules on what the pictures show:

    path        an object stands in the ego lane ahead
    consider    the traffic light, what is in the path, and what moves (ridden cycles too) within 12 m
    collision   going straight endangers what stands still in the path of a moving ego car, turning endangers what is
                within 9 m on that side before it, braking endangers what moves behind it in its lane
    action      a standing ego car remains stationary, unless the light is green: then it accelerates and goes ahead;
                a moving one brakes gently to a stop for a red light and for what is in its path within 11 m,
                decelerates for what is in its path up to 17 m and for what moves within 8 m before it,
                and keeps going at the same speed for everything else

Two kinds of object are not asked about. What is hidden by more than half, or tiny, is not named at all; and where its
rest could still be seen, no question is asked whose answer depends on whether it was noticed (`Seen.doubtful`).

Balance: a template is a question without its numbers and coordinates (sector and camera stay). Yes and no, and any
other pair of answers, are equally frequent in every template (`exact`); of more answers, the most frequent is cut to
the second (`level`); free descriptions are left as they fall (`open`).
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from training.data.questions import (
    SECTORS,
    STATUSES,
    SceneObject,
    object_tag,
    perception_questions,
    plural_in_state,
    with_article,
)
from training.toyworld.render import View
from training.toyworld.scene import DIRECTIONS, LANES, SPEEDS, TAG_WIDTH, ToyFrame, ToyObject, in_ego_path, lane_offset

CATEGORIES = ("perception", "prediction", "planning", "behavior")
MAX_TAGGED = 8
_FEW = 60  # questions per frame that need no second thought
_SHARES = {"perception": 0.45, "prediction": 0.30, "planning": 0.25}  # of a frame's questions, after behavior

_VISIBLE_SHARE = 0.5  # of the pixels that an object would have if nothing stood before it
_DOUBTFUL_SHARE = 0.06
_VISIBLE_AREA = 0.0012  # of the picture
_DOUBTFUL_AREA = 0.0002
_VEHICLES = ("car", "truck", "bus", "construction vehicle")

_ACCURACY, _JUDGE, _LANGUAGE, _MATCH = 0, 1, 2, 3  # the challenge's tags

_NOTICE = (
    "What object should the ego vehicle notice first when the ego vehicle is getting to the next possible location? "
    "What is the state of the object that is first noticed by the ego vehicle and what action should the ego vehicle "
    "take? What object should the ego vehicle notice second when the ego vehicle is getting to the next possible "
    "location? What is the state of the object perceived by the ego vehicle as second and what action should the ego "
    "vehicle take? What object should the ego vehicle notice third? What is the state of the object perceived by the "
    "ego vehicle as third and what action should the ego vehicle take?"
)


_NO_COLLISION = "No such action will lead to a collision."


@dataclass(frozen=True)
class Seen:
    """An object that the pictures show well.

    Attributes:
        index: into `frame.objects`.
        item: the object.
        scene_object: what `training.data.questions` needs of it.
        box: left, top, right, bottom of its visible pixels in a 1600x900 image, in the camera that sees it best.
    """

    index: int
    item: ToyObject
    scene_object: SceneObject
    box: tuple[float, float, float, float]

    @property
    def camera(self) -> str:
        return self.scene_object.camera


@dataclass(frozen=True)
class Truth:
    """What can be asked about a frame.

    Attributes:
        seen: objects that are shown well, in the order of their tags c1, c2, ...
        doubtful: (class, camera) where something is shown so badly that an answer could be disputed.
        visibility: (objects,) share of each object that is visible, over all cameras; 0 if it is in none.
        hider: index of the object that hides most of an object, by index of the hidden object.
    """

    seen: tuple[Seen, ...]
    doubtful: frozenset[tuple[str, str]]
    visibility: tuple[float, ...]
    hider: Mapping[int, int]


class Item(NamedTuple):
    """One question with what the balance needs.

    Attributes:
        value: what a blind model would have to guess; the answer, or the text of the right option.
        group: what is balanced: the value, or a class of values where most of them occur once.
        rule: "exact", "level" or "open".
        tag: the challenge's metric, or None where the challenge asks no such question.
    """

    category: str
    question: str
    answer: str
    value: str
    group: str
    rule: str
    tag: int | None


def template(question: str) -> str:
    """A question without what differs from frame to frame: tag numbers, coordinates, the order of options."""
    bare = re.sub(r"<c\d+,(CAM_[A-Z_]+),[^>]*>", r"<c,\1>", question)
    return re.sub(r"(following options:).*", r"\1", bare)


def find_truth(frame: ToyFrame, views: Mapping[str, View]) -> Truth:
    """Decide from the pictures' object numbers what is visible, where, and what hides what."""
    visible = {name: view.visible() for name, view in views.items()}
    area = next(iter(views.values())).numbers.size
    seen: list[Seen] = []
    doubtful: set[tuple[str, str]] = set()
    visibility: list[float] = []
    hider: dict[int, int] = {}
    for index, item in enumerate(frame.objects):
        best = max(views, key=lambda name: visible[name][index])
        total = sum(int(view.unhidden[index]) for view in views.values())
        visibility.append(sum(int(visible[name][index]) for name in views) / total if total else 0.0)
        for name, view in views.items():
            pixels, unhidden = int(visible[name][index]), int(view.unhidden[index])
            clear = pixels >= _VISIBLE_AREA * area and pixels >= _VISIBLE_SHARE * unhidden
            if name == best and clear:
                seen.append(_describe(index, item, name, view))
            elif pixels >= _DOUBTFUL_AREA * area and pixels >= _DOUBTFUL_SHARE * unhidden:
                doubtful.add((item.name, name))
    seen = _in_tag_order(frame, seen)
    for hidden in seen:
        before = _find_hider(hidden, views[hidden.camera])
        if before is not None:
            hider[hidden.index] = before
    return Truth(tuple(seen), frozenset(doubtful), tuple(visibility), hider)


def _in_tag_order(frame: ToyFrame, seen: Sequence[Seen]) -> list[Seen]:
    """Those to consider get tags before others do, but c1 tells nothing: the tagged ones are shuffled."""
    rng = frame.random("tags")
    order = list(seen)
    rng.shuffle(order)
    order.sort(key=lambda entry: not considers(frame, entry.item))
    tagged = order[:MAX_TAGGED]
    rng.shuffle(tagged)
    return tagged + order[MAX_TAGGED:]


def _describe(index: int, item: ToyObject, camera: str, view: View) -> Seen:
    rows, columns = np.nonzero(view.numbers == index + 1)
    scale = TAG_WIDTH / view.numbers.shape[1]
    left, right = columns.min() * scale, (columns.max() + 1) * scale
    top, bottom = rows.min() * scale, (rows.max() + 1) * scale
    center = (round(float(left + right) / 2, 1), round(float(top + bottom) / 2, 1))
    box = tuple(round(float(value), 1) for value in (left, top, right, bottom))
    scene_object = SceneObject(item.name, camera, center, item.distance, item.status)
    return Seen(index, item, scene_object, box)  # type: ignore[arg-type]


def _find_hider(hidden: Seen, view: View) -> int | None:
    """The object that covers most of what is hidden of a well-seen object; None if it is (nearly) whole."""
    covers = view.covers[hidden.index, 1:]
    if not len(covers) or covers.max() < 0.1 * view.unhidden[hidden.index]:
        return None
    return int(covers.argmax())


def describe_colour(item: ToyObject) -> str:
    """`White car.`, `Red light.`, `Pedestrian wearing a pink top.`"""
    if item.name == "traffic light":
        return f"{str(item.status).capitalize()} light."
    if item.name == "pedestrian":
        return f"Pedestrian wearing a {item.colour} top."
    return f"{item.colour.capitalize()} {item.name}."


def key_object_infos(truth: Truth) -> dict[str, dict[str, object]]:
    """DriveLM's `key_object_infos`: by tag, the category, status, description and box in pixels of 1600x900."""
    infos: dict[str, dict[str, object]] = {}
    for number, seen in enumerate(truth.seen[:MAX_TAGGED], start=1):
        if seen.item.name in ("traffic light", "barrier", "traffic cone"):
            category = "Traffic element" if seen.item.name == "traffic light" else "Obstacle"
            status = None
        else:
            category = "Pedestrian" if seen.item.name == "pedestrian" else "Vehicle"
            status = "Moving" if _moves(seen.item) else "Stationary"
        infos[object_tag(number, seen.scene_object)] = {
            "Category": category,
            "Status": status,
            "Visual_description": describe_colour(seen.item),
            "2d_bbox": list(seen.box),
        }
    return infos


def write_questions(frame: ToyFrame, truth: Truth, wanted: int) -> list[Item]:
    """All questions that can be asked about a frame, before balancing; more perception if many are wanted."""
    rng = frame.random("questions")
    tagged = [(object_tag(number, seen.scene_object), seen) for number, seen in enumerate(truth.seen[:MAX_TAGGED], 1)]
    scene = _Scene(frame, truth, tagged)
    rounds = 2 if wanted <= _FEW else wanted // 8  # each round may write other perception questions
    items = [
        *_perception(scene, rng, rounds),
        *_prediction(scene, rng, rounds),
        *_planning(scene),
        *_behavior(frame, rng),
    ]
    return list({item.question: item for item in items}.values())


@dataclass(frozen=True)
class _Scene:
    """A frame with its tags: everything that the templates below look at."""

    frame: ToyFrame
    truth: Truth
    tagged: list[tuple[str, Seen]]

    @property
    def moving(self) -> bool:
        return self.frame.speed != "not moving"

    def considers(self, seen: Seen) -> bool:
        return considers(self.frame, seen.item)

    def in_path(self, seen: Seen) -> bool:
        return in_ego_path(self.frame, seen.item)

    def action(self, seen: Seen) -> str:
        """What the ego car should do because of an object, as the rest of `should ...`."""
        distance = seen.item.distance
        if not self.moving:
            green = seen.item.status == "green"
            return "accelerate and go ahead" if green else "remain stationary"
        if seen.item.status == "red" or (self.in_path(seen) and distance <= 11.0):
            return "brake gently to a stop"
        before = seen.camera in ("CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT")
        if (self.in_path(seen) and distance <= 17.0) or (before and _moves(seen.item) and distance <= 8.0):
            return "decelerate gradually without braking"
        return "keep going at the same speed"

    def reason(self, seen: Seen) -> str:
        if seen.item.name == "traffic light":
            return "to follow the traffic rules"
        if self.action(seen) == "keep going at the same speed":
            return "that there is no safety issue"
        return "to maintain a safe distance"


def considers(frame: ToyFrame, item: ToyObject) -> bool:
    """Whether the ego vehicle should consider an object: see the module's rules."""
    return item.name == "traffic light" or in_ego_path(frame, item) or (_moves(item) and item.distance <= 12.0)


def _moves(item: ToyObject) -> bool:
    return item.status in ("moving", "with rider")


def _state(item: ToyObject) -> str:
    """`It is going ahead`, as DriveLM says what the ego vehicle notices."""
    if item.name == "traffic light":
        return "The object is a traffic sign"
    if not _moves(item):
        return "It is stationary"
    return {"straight": "It is going ahead", "left": "It is turning left", "right": "It is turning right"}[item.turn]


def _closed(category: str, question: str, answer: str, rule: str = "level", tag: int | None = None) -> Item:
    return Item(category, question, answer, answer, answer, rule, tag)


def _yes_no(category: str, question: str, answer: bool) -> Item:
    return _closed(category, question, "Yes." if answer else "No.", "exact", _ACCURACY)


def _choice(
    category: str, question: str, right: str, options: Sequence[str], rng: random.Random, rule: str = "level"
) -> Item:
    """A multiple-choice question in the challenge's form; the answer is a letter."""
    shuffled = list(options)
    rng.shuffle(shuffled)
    listed = " ".join(f"{letter}. {option}" for letter, option in zip("ABCD", shuffled, strict=True))
    text = f"{question} Please select the correct answer from the following options: {listed}"
    return Item(category, text, "ABCD"[shuffled.index(right)], right, right, rule, _ACCURACY)


def existence_question(name: str, status: str | None, camera: str) -> str:
    """`Are there moving cars to the back of the ego car?`, the wording of `training.data.questions`."""
    return f"Are there {plural_in_state(name, status)} to the {SECTORS[camera]} of the ego car?"


def existence_truth(truth: Truth) -> tuple[frozenset[str], frozenset[str]]:
    """Existence questions that are true, and those that must not be asked because the answer is in doubt."""
    true = set()
    for seen in truth.seen:
        for status in {None, seen.item.status}:
            true.add(existence_question(seen.item.name, status, seen.camera))
    open_ = {
        existence_question(name, status, camera)
        for name, camera in truth.doubtful
        for status in (None, *STATUSES[name])
    }
    return frozenset(true), frozenset(open_)


def _perception(scene: _Scene, rng: random.Random, rounds: int) -> list[Item]:
    objects = [seen.scene_object for seen in scene.truth.seen]
    key_objects = [seen.scene_object for _, seen in scene.tagged]
    items = []
    for _ in range(rounds):
        for written in perception_questions(objects, rng, key_objects=key_objects):
            question, answer = written["Q"], written["A"]
            if question.startswith("What is the visual description") or _in_doubt(question, scene.truth):
                continue
            if answer in ("Yes.", "No."):
                items.append(_yes_no("perception", question, answer == "Yes."))
            elif question.startswith("What is the observed status"):
                items.append(_closed("perception", question, answer, "exact"))
            elif question.startswith("What are objects"):
                items.append(_closed("perception", question, answer, "open"))
            else:
                items.append(_closed("perception", question, answer))
    if (
        rounds > 2
    ):  # as many as that: the release asks about classes without a state too; `balance_world` finds the "No." to each
        plain = sorted({existence_question(seen.item.name, None, seen.camera) for seen in scene.truth.seen})
        items += [_yes_no("perception", question, True) for question in plain]
    for tag, seen in scene.tagged:
        question = f"What is the visual description of {tag}?"
        items.append(_closed("perception", question, describe_colour(seen.item)))
        if seen.item.name in _VEHICLES:
            words = {"straight": "Going ahead.", "left": "Turn left.", "right": "Turn right."}
            right = words[seen.item.turn] if _moves(seen.item) else "Stopped."
            question = f"What is the moving status of object {tag}?"
            items.append(_closed("perception", question, right))
            items.append(_choice("perception", question, right, [*words.values(), "Stopped."], rng))
    if ("traffic light", "CAM_FRONT") not in scene.truth.doubtful:
        light = any(seen.item.name == "traffic light" for seen in scene.truth.seen)
        answer = "Yes, there is one traffic element in the front view." if light else "No."
        question = "Is there any traffic element in the front view?"
        items.append(_closed("perception", question, answer, "exact"))
    if scene.tagged:
        items.append(_important_objects(scene))
    return items


def _in_doubt(question: str, truth: Truth) -> bool:
    """Whether the answer depends on something that is shown badly."""
    for name, camera in truth.doubtful:
        if f"to the {SECTORS[camera]} of the ego" in question and (
            question.startswith(("What are objects", "What is the closest")) or name in question
        ):
            return True
    return False


def _important_objects(scene: _Scene) -> Item:
    chosen = sorted(scene.tagged, key=lambda pair: (not scene.considers(pair[1]), pair[1].item.distance))[:4]
    parts = []
    for _, seen in chosen:
        words = describe_colour(seen.item).rstrip(".").lower()
        parts.append(f"{with_article(words)} to the {SECTORS[seen.camera]} of the ego vehicle")
    tags = [tag for tag, _ in chosen]
    ids = (
        f"The ID of this object is {tags[0]}." if len(tags) == 1 else f"The IDs of these objects are {_listed(tags)}."
    )
    question = (
        "What are the important objects in the current scene? Those objects will be considered for the future "
        "reasoning and driving decision."
    )
    return _closed("perception", question, f"There is {_listed(parts)}. {ids}", "open", _LANGUAGE)


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(parts) if len(parts) < 3 else f"{', '.join(parts[:-1])}, and {parts[-1]}"


def _prediction(scene: _Scene, rng: random.Random, rounds: int) -> list[Item]:
    items = []
    tags = {seen.index: tag for tag, seen in scene.tagged}
    future = {"straight": "Keep going straight.", "left": "Turn left.", "right": "Turn right."}
    for tag, seen in scene.tagged:
        item = seen.item
        sign = item.name in ("traffic light", "barrier")
        items.append(_yes_no("prediction", f"Is {tag} a traffic sign or a road barrier?", sign))
        if item.name == "traffic light":
            meaning = "Please wait." if item.status == "red" else "Please proceed."
            items.append(_closed("prediction", f"What does {tag} mean?", meaning, "exact", _ACCURACY))
        elif item.name not in ("barrier", "traffic cone"):
            state = future[item.turn] if _moves(item) else "Stationary."
            items.append(_closed("prediction", f"What is the future state of {tag}?", state, tag=_ACCURACY))
        if item.name != "traffic light":
            question = f"Would {tag} be in the moving direction of the ego vehicle?"
            items.append(_yes_no("prediction", question, scene.in_path(seen)))
        relevant = "The ego vehicle." if scene.considers(seen) else "None."
        question = f"What object would consider {tag} to be most relevant to its decision?"
        items.append(_closed("prediction", question, relevant, "exact", _ACCURACY))
        items += _occlusion(scene, tag, seen, tags)
    pairs = [(a, b) for a in scene.tagged for b in scene.tagged if a[0] < b[0]]
    for (tag, seen), (other_tag, other) in rng.sample(pairs, min(len(pairs), 8 * rounds)):
        signs = (seen.item.name == "traffic light") + (other.item.name == "traffic light")
        answer = ("Neither is a traffic sign.", "Only one of the boxes is a traffic sign.")[signs]
        items.append(_closed("prediction", f"Are {tag} and {other_tag} traffic signs?", answer, "exact", _ACCURACY))
        if _moves(seen.item) and other.item.name != "traffic light":
            question = f"Would {tag} take {other_tag} into account?"
            items.append(_yes_no("prediction", question, _follows(scene.frame, seen.item, other.item)))
    ordered = [(a, b) for a in scene.tagged for b in scene.tagged if a is not b and b[1].item.status is not None]
    for (other_tag, other), (tag, seen) in rng.sample(ordered, min(len(ordered), 2 * rounds)):
        if seen.item.name != "traffic light":
            question = f"Based on the observations of {other_tag}, what are possible actions to be taken by {tag}?"
            answer = _next_action(scene.frame, seen.item, other.item)
            items.append(_closed("prediction", f"{question} What is the reason?", answer, tag=_JUDGE))
    if len(scene.tagged) >= 3:
        items.append(_notice(scene))
    return items


def _next_action(frame: ToyFrame, item: ToyObject, other: ToyObject) -> str:
    """What an object will do about another one, with the reason."""
    if not _moves(item):
        return "The action is none, the reason is that there is no safety issue."
    if item.turn != "straight":
        return f"The action is to turn {item.turn}, the reason is that there is no safety issue."
    if _follows(frame, item, other):
        return "The action is to decelerate, the reason is to maintain a safe distance."
    return "The action is to keep going at the same speed, the reason is that there is no safety issue."


def _follows(frame: ToyFrame, item: ToyObject, other: ToyObject) -> bool:
    """Whether `other` stands before `item` in the same lane."""
    lane = lane_offset(frame, item)
    return lane is not None and lane == lane_offset(frame, other) and other.along > item.along


def _occlusion(scene: _Scene, tag: str, seen: Seen, tags: Mapping[int, str]) -> list[Item]:
    """What the object hides. Only a tagged object can be the answer, so others make the question unaskable."""
    hidden = [index for index, hider in scene.truth.hider.items() if hider == seen.index]
    behind = [entry for entry in scene.tagged if entry[1].index in hidden]
    question = (
        f"Which object is most likely to be occluded by {tag}? Would this object affect the ego vehicle? Based on "
        "this object, what action of the ego vehicle is dangerous?"
    )
    if not hidden:
        return [_closed("prediction", question, "None, no, none.", "exact", _JUDGE)]
    if len(behind) != 1:
        return []
    other_tag, other = behind[0]
    affects = scene.considers(other)
    collision = _collision(scene, other)
    danger = collision.rstrip(".").lower() if affects and collision != _NO_COLLISION else "none"
    answer = f"{other_tag}, {'yes' if affects else 'no'}, {danger}."
    return [_closed("prediction", question, answer, "exact", _JUDGE)._replace(group="something")]


def _priority(scene: _Scene) -> list[tuple[str, Seen]]:
    """What to consider before what: traffic light, path, movers, the rest; the nearer first."""

    def rank(entry: tuple[str, Seen]) -> tuple[int, float]:
        seen = entry[1]
        if seen.item.name == "traffic light":
            return 0, 0.0
        return (1 if scene.in_path(seen) else 2 if scene.considers(seen) else 3), seen.item.distance

    return sorted(scene.tagged, key=rank)


def _notice(scene: _Scene) -> Item:
    parts = []
    for word, (tag, seen) in zip(("Firstly", "Secondly", "Thirdly"), _priority(scene), strict=False):
        parts.append(f"{word}, notice {tag}. {_state(seen.item)}, so the ego vehicle should {scene.action(seen)}.")
    return _closed("prediction", _NOTICE, " ".join(parts), "open", _MATCH)


def _collision(scene: _Scene, seen: Seen) -> str:
    if seen.item.name == "traffic light" or seen.item.distance > 13.0:
        return _NO_COLLISION
    if seen.camera == "CAM_FRONT":
        return "Accelerating and going straight." if scene.in_path(seen) else _NO_COLLISION
    return {
        "CAM_FRONT_LEFT": "Sharp left turn.",
        "CAM_BACK_LEFT": "Sharp left turn.",
        "CAM_FRONT_RIGHT": "Sharp right turn.",
        "CAM_BACK_RIGHT": "Sharp right turn.",
        "CAM_BACK": "Back up.",
    }[seen.camera]


def _planning(scene: _Scene) -> list[Item]:
    items = []
    frame = scene.frame
    for tag, seen in scene.tagged:
        considers = scene.considers(seen)
        question = f"Is {tag} an object that the ego vehicle should consider in the current scene?"
        items.append(_yes_no("planning", question, considers))
        if seen.item.name == "traffic light":
            action = scene.action(seen).capitalize()
            question = f"Based on {tag} in this scene, what is the most possible action of the ego vehicle?"
            items.append(_closed("planning", question, f"{action}.", tag=_ACCURACY))
        else:
            question = f"Is it necessary for the ego vehicle to take {tag} into account?"
            items.append(_yes_no("planning", question, considers))
        question = (
            f"What actions could the ego vehicle take based on {tag}? Why take this action and what's the probability?"
        )
        answer = (
            f"The action is to {scene.action(seen)}. The reason is {scene.reason(seen)}, and the probability is high."
        )
        items.append(_closed("planning", question, answer, tag=_JUDGE))
        question = f"What actions taken by the ego vehicle can lead to a collision with {tag}?"
        items.append(_closed("planning", question, _collision(scene, seen), "exact", _JUDGE))
        near = scene.moving and scene.in_path(seen) and not _moves(seen.item)
        after = f"What is the probability of colliding with {tag} after the ego vehicle"
        question = f"{after} goes straight and keeps the same speed?"
        items.append(_closed("planning", question, "High." if near else "Low.", "exact", _ACCURACY))
        behind = seen.camera == "CAM_BACK" and _moves(seen.item) and abs(seen.item.across) < 1.75
        question = f"{after} steps on the brakes?"
        items.append(_closed("planning", question, "High." if behind else "Low.", "exact", _ACCURACY))
        for side in ("left", "right"):
            near = scene.moving and seen.camera == f"CAM_FRONT_{side.upper()}" and seen.item.distance <= 9.0
            question = f"{after} turns {side} at a constant speed?"
            items.append(_closed("planning", question, "High." if near else "Low.", "exact", _ACCURACY))
    question = "Will water droplets on the glass affect the driver's line of sight?"
    answer = (
        "Yes, water droplets on the glass can affect the driver's line of sight." if frame.weather == "rain" else "No."
    )
    items.append(_closed("planning", question, answer, "exact", _JUDGE))
    lights = [seen for seen in scene.truth.seen if seen.item.name == "traffic light"]
    if lights or frame.light is None:
        answer = f"{str(lights[0].item.status).capitalize()} light." if lights else "None."
        question = "What is the traffic signal that the ego vehicle should pay attention to?"
        items.append(_closed("planning", question, answer, tag=_ACCURACY))
    target = {"straight": "Go straight.", "left": "Turn left.", "right": "Turn right."}[frame.direction]
    question = "What is the target action of the ego vehicle?"
    items.append(_closed("planning", question, target if scene.moving else "Stationary.", tag=_ACCURACY))
    items += _actions(scene)
    considered = [tag for tag, seen in _priority(scene) if scene.considers(seen)]
    if considered:
        question = "What is the priority of the objects that the ego vehicle should consider?(in descending order)"
        items.append(_closed("planning", question, f"{', '.join(considered)}.", "open", _MATCH))
    return items


def _actions(scene: _Scene) -> list[Item]:
    """Safe and dangerous actions, from the light, the path, the lanes that exist and what is in them."""
    frame = scene.frame
    reacting = {scene.action(seen) for seen in scene.truth.seen}
    must_stop = "brake gently to a stop" in reacting
    slows = "decelerate gradually without braking" in reacting
    blocked = {
        lane_offset(frame, seen.item)
        for seen in scene.truth.seen
        if seen.item.name != "traffic light" and abs(seen.item.along) < 14
    }
    left_free = frame.ego_lane > 0 and 1 not in blocked
    right_free = frame.ego_lane < LANES - 1 and -1 not in blocked
    if not scene.moving:
        go = any(seen.item.status == "green" for seen in scene.truth.seen)
        safe = ["accelerate and go ahead"] if go else ["remain stationary"]
    elif must_stop:
        safe = ["brake gently to a stop"]
    elif slows:
        safe = ["decelerate gradually without braking"]
    else:
        safe = ["keep going at the same speed"]
    if scene.moving:
        safe += ["change to the left lane"] * left_free + ["change to the right lane"] * right_free
    dangerous = ["accelerate and go ahead"] * (must_stop or slows)
    dangerous += ["back up"] * any(seen.camera == "CAM_BACK" and seen.item.distance <= 13 for seen in scene.truth.seen)
    dangerous += ["change to the left lane"] * (not left_free) + ["change to the right lane"] * (not right_free)
    items = [
        _closed(
            "planning",
            "In this scenario, what are safe actions to take for the ego vehicle?",
            f"{_listed(safe).capitalize()}.",
            tag=_JUDGE,
        )
    ]
    if dangerous:
        question = "In this scenario, what are dangerous actions to take for the ego vehicle?"
        items.append(_closed("planning", question, f"{_listed(dangerous).capitalize()}.", tag=_JUDGE))
    return items


def _behavior(frame: ToyFrame, rng: random.Random) -> list[Item]:
    question = "Predict the behavior of the ego vehicle."
    right = _behaviour(frame.direction, frame.speed)
    others = [_behaviour(d, s) for d in DIRECTIONS for s in SPEEDS if (d, s) != (frame.direction, frame.speed)]
    options = [right, *rng.sample(others, 3)]
    return [
        _closed("behavior", question, right, "level", _ACCURACY),
        _choice("behavior", question, right, options, rng),
    ]


def _behaviour(direction: str, speed: str) -> str:
    way = {"straight": "going straight", "left": "steering to the left", "right": "steering to the right"}[direction]
    pace = {
        "not moving": "not moving",
        "slow": "driving slowly",
        "normal": "driving with normal speed",
        "fast": "driving fast",
    }[speed]
    return f"The ego vehicle is {way}. The ego vehicle is {pace}."


@dataclass
class FrameQuestions:
    """A frame's questions on their way through the balance, with what decides existence questions."""

    items: list[Item]
    true: frozenset[str]
    open: frozenset[str]


def balance_world(frames: Sequence[FrameQuestions], per_frame: int, seed: int) -> None:
    """Balance all templates over all frames and leave about `per_frame` questions in each, in place.

    1. level and exact templates lose what is too frequent;
    2. every frame keeps as many, the categories in DriveLM's proportions; where some have less to ask about, the
       others keep more, so that the mean is `per_frame`;
    3. exact templates are made exact again: an existence question with too many "Yes." gets a "No." from another
       frame where that is true, everything else loses the surplus.
    """
    rng = random.Random(f"{seed}/balance")
    _cut_surplus(frames, rng)
    cap = _fair_cap([len(frame.items) for frame in frames], per_frame)
    for frame in frames:
        frame.items = _choose(frame.items, cap, rng)
    _complete_existence(frames, rng)
    _cut_surplus(frames, rng)


def _cut_surplus(frames: Sequence[FrameQuestions], rng: random.Random) -> None:
    places: dict[str, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    rules: dict[str, str] = {}
    for number, frame in enumerate(frames):
        for position, item in enumerate(frame.items):
            if item.rule != "open":
                key = template(item.question)
                rules[key] = item.rule
                places[key][item.group].append((number, position))
    dropped: set[tuple[int, int]] = set()
    for key, by_group in places.items():
        counts = sorted((len(where) for where in by_group.values()), reverse=True)
        if rules[key] == "exact":
            keep = counts[1] if len(counts) > 1 else 0
        else:
            keep = max(counts[1] if len(counts) > 1 else 0, 1)
        for where in by_group.values():
            if len(where) > keep:
                dropped.update(rng.sample(where, len(where) - keep))
    for number, frame in enumerate(frames):
        frame.items = [item for position, item in enumerate(frame.items) if (number, position) not in dropped]


def _fair_cap(sizes: Sequence[int], mean: int) -> int:
    """The smallest cap with which the sizes have at least this mean, or the largest size."""
    for cap in range(mean, max(sizes, default=mean)):
        if sum(min(size, cap) for size in sizes) >= mean * len(sizes):
            return cap
    return max(mean, *sizes) if sizes else mean


def _choose(items: Iterable[Item], per_frame: int, rng: random.Random) -> list[Item]:
    by_category: dict[str, list[Item]] = {category: [] for category in CATEGORIES}
    for item in items:
        by_category[item.category].append(item)
    for group in by_category.values():
        rng.shuffle(group)
    chosen = {"behavior": by_category["behavior"][:per_frame]}
    room = per_frame - len(chosen["behavior"])
    for category, share in _SHARES.items():
        chosen[category] = by_category[category][: round(room * share)]
    left = [item for category in _SHARES for item in by_category[category][len(chosen[category]) :]]
    rng.shuffle(left)
    spare = per_frame - sum(map(len, chosen.values()))
    for item in left[: max(spare, 0)]:
        chosen[item.category].append(item)
    return [item for category in CATEGORIES for item in chosen[category]]


def _complete_existence(frames: Sequence[FrameQuestions], rng: random.Random) -> None:
    """Ask existence questions that are mostly answered yes in other frames too, where the answer is no."""
    surplus: Counter[str] = Counter()
    asked: list[set[str]] = []
    for frame in frames:
        asked.append({item.question for item in frame.items})
        for item in frame.items:
            if item.question.startswith("Are there "):
                surplus[item.question] += 1 if item.answer == "Yes." else -1
    order = list(range(len(frames)))
    rng.shuffle(order)
    turn = 0
    for question, missing in sorted(surplus.items()):
        for _ in range(missing):
            for step in range(len(frames)):
                number = order[(turn + step) % len(frames)]
                frame = frames[number]
                if question not in frame.true and question not in frame.open and question not in asked[number]:
                    turn += step + 1
                    asked[number].add(question)
                    frame.items.append(_yes_no("perception", question, False))
                    break
