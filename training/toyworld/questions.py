"""Questions and answers about a toy frame in all four DriveLM categories.

Perception comes from `training.data.wording`, with `What is the visual description of ...` told with colours.
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

What may be asked about is decided in `truth`, how often a question is asked in `balance`.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.data.wording import (
    existence_question,
    listed,
    object_tag,
    perception_questions,
    question_place,
    with_article,
)
from training.toyworld.balance import Item, yes_no
from training.toyworld.scene import DIRECTIONS, LANES, SPEEDS, ToyFrame, ToyObject, in_ego_path, lane_offset
from training.toyworld.truth import MAX_TAGGED, Seen, Truth, considers, moves

_FEW = 60  # questions per frame that need no second thought
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
_START, _STAY = "accelerate and go ahead", "remain stationary"  # what the ego car can do
_STOP, _SLOW = "brake gently to a stop", "decelerate gradually without braking"
_GO_ON = "keep going at the same speed"
_WAYS = {"straight": "Go straight.", "left": "Turn left.", "right": "Turn right."}
_NO_COLLISION = "No such action will lead to a collision."


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
            status = "Moving" if moves(seen.item) else "Stationary"
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
            return _START if seen.item.status == "green" else _STAY
        if seen.item.status == "red" or (self.in_path(seen) and distance <= 11.0):
            return _STOP
        before = seen.sector in ("front", "front left", "front right")
        if (self.in_path(seen) and distance <= 17.0) or (before and moves(seen.item) and distance <= 8.0):
            return _SLOW
        return _GO_ON

    def reason(self, seen: Seen) -> str:
        if seen.item.name == "traffic light":
            return "to follow the traffic rules"
        return "that there is no safety issue" if self.action(seen) == _GO_ON else "to maintain a safe distance"


def _state(item: ToyObject) -> str:
    """`It is going ahead`, as DriveLM says what the ego vehicle notices."""
    if item.name == "traffic light":
        return "The object is a traffic sign"
    if not moves(item):
        return "It is stationary"
    return {"straight": "It is going ahead", "left": "It is turning left", "right": "It is turning right"}[item.turn]


def _closed(category: str, question: str, answer: str, rule: str = "level", tag: int | None = None) -> Item:
    return Item(category, question, answer, answer, answer, rule, tag)


def _choice(
    category: str, question: str, right: str, options: Sequence[str], rng: random.Random, rule: str = "level"
) -> Item:
    """A multiple-choice question in the challenge's form; the answer is a letter."""
    shuffled = list(options)
    rng.shuffle(shuffled)
    listed = " ".join(f"{letter}. {option}" for letter, option in zip("ABCD", shuffled, strict=True))
    text = f"{question} Please select the correct answer from the following options: {listed}"
    return Item(category, text, "ABCD"[shuffled.index(right)], right, right, rule, _ACCURACY)


def _perception(scene: _Scene, rng: random.Random, rounds: int) -> list[Item]:
    objects = [seen.scene_object for seen in scene.truth.seen]
    key_objects = [seen.scene_object for _, seen in scene.tagged]
    items = []
    for _ in range(rounds):
        for written in perception_questions(objects, rng, key_objects=key_objects, rig=scene.frame.rig):
            question, answer = written["Q"], written["A"]
            if question.startswith("What is the visual description") or _in_doubt(question, scene.truth):
                continue
            if answer in ("Yes.", "No."):
                items.append(yes_no("perception", question, answer == "Yes."))
            elif question.startswith("What is the observed status"):
                items.append(_closed("perception", question, answer, "exact"))
            elif question.startswith("What are objects"):
                items.append(_closed("perception", question, answer, "open"))
            else:
                items.append(_closed("perception", question, answer))
    if rounds > 2:  # then as the release: about classes without a state too; `balance_world` finds the "No." to each
        plain = sorted({existence_question(seen.item.name, None, seen.sector) for seen in scene.truth.seen})
        items += [yes_no("perception", question, True) for question in plain]
    for tag, seen in scene.tagged:
        items.append(_closed("perception", f"What is the visual description of {tag}?", describe_colour(seen.item)))
        if seen.item.name in _VEHICLES:
            words = {**_WAYS, "straight": "Going ahead."}
            right = words[seen.item.turn] if moves(seen.item) else "Stopped."
            question = f"What is the moving status of object {tag}?"
            items.append(_closed("perception", question, right))
            items.append(_choice("perception", question, right, [*words.values(), "Stopped."], rng))
    if "front" in scene.frame.rig.sectors and ("traffic light", "front") not in scene.truth.unclear:
        light = any(seen.item.name == "traffic light" for seen in scene.truth.seen)
        answer = "Yes, there is one traffic element in the front view." if light else "No."
        items.append(_closed("perception", "Is there any traffic element in the front view?", answer, "exact"))
    if scene.tagged:
        items.append(_important_objects(scene))
    return items


def _in_doubt(question: str, truth: Truth) -> bool:
    """Whether the answer depends on something that is shown badly."""
    any_class = question.startswith(("What are objects", "What is the closest"))
    return any(
        question_place(sector) in question and (any_class or name in question) for name, sector in truth.unclear
    )


def _important_objects(scene: _Scene) -> Item:
    chosen = sorted(scene.tagged, key=lambda pair: (not scene.considers(pair[1]), pair[1].item.distance))[:4]
    parts = [
        f"{with_article(describe_colour(seen.item).rstrip('.').lower())} to the {seen.sector} of the ego vehicle"
        for _, seen in chosen
    ]
    tags = [tag for tag, _ in chosen]
    ids = f"The ID of this object is {tags[0]}." if len(tags) == 1 else f"The IDs of these objects are {listed(tags)}."
    question = (
        "What are the important objects in the current scene? Those objects will be considered for the future "
        "reasoning and driving decision."
    )
    return _closed("perception", question, f"There is {listed(parts)}. {ids}", "open", _LANGUAGE)


def _prediction(scene: _Scene, rng: random.Random, rounds: int) -> list[Item]:
    items = []
    tags = {seen.index: tag for tag, seen in scene.tagged}
    future = {**_WAYS, "straight": "Keep going straight."}
    for tag, seen in scene.tagged:
        item = seen.item
        sign = item.name in ("traffic light", "barrier")
        items.append(yes_no("prediction", f"Is {tag} a traffic sign or a road barrier?", sign))
        if item.name == "traffic light":
            meaning = "Please wait." if item.status == "red" else "Please proceed."
            items.append(_closed("prediction", f"What does {tag} mean?", meaning, "exact", _ACCURACY))
        elif item.name not in ("barrier", "traffic cone"):
            state = future[item.turn] if moves(item) else "Stationary."
            items.append(_closed("prediction", f"What is the future state of {tag}?", state, tag=_ACCURACY))
        if item.name != "traffic light":
            question = f"Would {tag} be in the moving direction of the ego vehicle?"
            items.append(yes_no("prediction", question, scene.in_path(seen)))
        relevant = "The ego vehicle." if scene.considers(seen) else "None."
        question = f"What object would consider {tag} to be most relevant to its decision?"
        items.append(_closed("prediction", question, relevant, "exact", _ACCURACY))
        items += _occlusion(scene, tag, seen, tags)
    pairs = [(a, b) for a in scene.tagged for b in scene.tagged if a[0] < b[0]]
    for (tag, seen), (other_tag, other) in rng.sample(pairs, min(len(pairs), 8 * rounds)):
        signs = (seen.item.name == "traffic light") + (other.item.name == "traffic light")
        answer = ("Neither is a traffic sign.", "Only one of the boxes is a traffic sign.")[signs]
        items.append(_closed("prediction", f"Are {tag} and {other_tag} traffic signs?", answer, "exact", _ACCURACY))
        if moves(seen.item) and other.item.name != "traffic light":
            question = f"Would {tag} take {other_tag} into account?"
            items.append(yes_no("prediction", question, _follows(scene.frame, seen.item, other.item)))
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
    if not moves(item):
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
    parts = [
        f"{word}, notice {tag}. {_state(seen.item)}, so the ego vehicle should {scene.action(seen)}."
        for word, (tag, seen) in zip(("Firstly", "Secondly", "Thirdly"), _priority(scene), strict=False)
    ]
    return _closed("prediction", _NOTICE, " ".join(parts), "open", _MATCH)


def _collision(scene: _Scene, seen: Seen) -> str:
    if seen.item.name == "traffic light" or seen.item.distance > 13.0:
        return _NO_COLLISION
    if seen.sector == "front":
        return "Accelerating and going straight." if scene.in_path(seen) else _NO_COLLISION
    return "Back up." if seen.sector == "back" else f"Sharp {seen.sector.split()[-1]} turn."


def _planning(scene: _Scene) -> list[Item]:
    items = []
    frame = scene.frame
    for tag, seen in scene.tagged:
        considers = scene.considers(seen)
        question = f"Is {tag} an object that the ego vehicle should consider in the current scene?"
        items.append(yes_no("planning", question, considers))
        if seen.item.name == "traffic light":
            question = f"Based on {tag} in this scene, what is the most possible action of the ego vehicle?"
            items.append(_closed("planning", question, f"{scene.action(seen).capitalize()}.", tag=_ACCURACY))
        else:
            question = f"Is it necessary for the ego vehicle to take {tag} into account?"
            items.append(yes_no("planning", question, considers))
        question = (
            f"What actions could the ego vehicle take based on {tag}? Why take this action and what's the probability?"
        )
        reason = f"The reason is {scene.reason(seen)}, and the probability is high."
        items.append(_closed("planning", question, f"The action is to {scene.action(seen)}. {reason}", tag=_JUDGE))
        question = f"What actions taken by the ego vehicle can lead to a collision with {tag}?"
        items.append(_closed("planning", question, _collision(scene, seen), "exact", _JUDGE))
        near = scene.moving and scene.in_path(seen) and not moves(seen.item)
        after = f"What is the probability of colliding with {tag} after the ego vehicle"
        behind = seen.sector == "back" and moves(seen.item) and abs(seen.item.across) < 1.75
        risks = {"goes straight and keeps the same speed": near, "steps on the brakes": behind}
        for side in ("left", "right"):
            before = seen.sector == f"front {side}" or (seen.sector == side and seen.item.center[0] > 0)
            risks[f"turns {side} at a constant speed"] = scene.moving and before and seen.item.distance <= 9.0
        for action, high in risks.items():
            items.append(_closed("planning", f"{after} {action}?", "High." if high else "Low.", "exact", _ACCURACY))
    question = "Will water droplets on the glass affect the driver's line of sight?"
    yes = "Yes, water droplets on the glass can affect the driver's line of sight."
    items.append(_closed("planning", question, yes if frame.weather == "rain" else "No.", "exact", _JUDGE))
    lights = [seen for seen in scene.truth.seen if seen.item.name == "traffic light"]
    if lights or frame.light is None:
        answer = f"{str(lights[0].item.status).capitalize()} light." if lights else "None."
        question = "What is the traffic signal that the ego vehicle should pay attention to?"
        items.append(_closed("planning", question, answer, tag=_ACCURACY))
    target = _WAYS[frame.direction] if scene.moving else "Stationary."
    items.append(_closed("planning", "What is the target action of the ego vehicle?", target, tag=_ACCURACY))
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
    blocked = {
        lane_offset(frame, seen.item)
        for seen in scene.truth.seen
        if seen.item.name != "traffic light" and abs(seen.item.along) < 14
    }
    left_free = frame.ego_lane > 0 and 1 not in blocked
    right_free = frame.ego_lane < LANES - 1 and -1 not in blocked
    if scene.moving:
        safe = [next((action for action in (_STOP, _SLOW) if action in reacting), _GO_ON)]
        safe += ["change to the left lane"] * left_free + ["change to the right lane"] * right_free
    else:
        go = any(seen.item.status == "green" for seen in scene.truth.seen)
        safe = [_START] if go else [_STAY]
    dangerous = [_START] * bool(reacting & {_STOP, _SLOW})
    dangerous += ["back up"] * any(seen.sector == "back" and seen.item.distance <= 13 for seen in scene.truth.seen)
    dangerous += ["change to the left lane"] * (not left_free) + ["change to the right lane"] * (not right_free)
    return [
        _closed(
            "planning",
            f"In this scenario, what are {kind} actions to take for the ego vehicle?",
            f"{listed(actions).capitalize()}.",
            tag=_JUDGE,
        )
        for kind, actions in (("safe", safe), ("dangerous", dangerous))
        if actions
    ]


def _behavior(frame: ToyFrame, rng: random.Random) -> list[Item]:
    question = "Predict the behavior of the ego vehicle."
    right = _behaviour(frame.direction, frame.speed)
    others = [_behaviour(d, s) for d in DIRECTIONS for s in SPEEDS if (d, s) != (frame.direction, frame.speed)]
    options = [right, *rng.sample(others, 3)]
    return [_closed("behavior", question, right, tag=_ACCURACY), _choice("behavior", question, right, options, rng)]


def _behaviour(direction: str, speed: str) -> str:
    way = {"straight": "going straight"}.get(direction, f"steering to the {direction}")
    pace = {"slow": "driving slowly", "normal": "driving with normal speed", "fast": "driving fast"}.get(speed, speed)
    return f"The ego vehicle is {way}. The ego vehicle is {pace}."
