"""Perception questions in DriveLM's wording, written from a list of objects.

Any source that knows what stands around the car (3-D boxes, a renderer's ground truth) becomes training data through
`perception_questions`. The sentences follow the DriveLM-nuScenes v1.1 release: its count words (one, two, three,
many), its "in front of" / "behind" / "to the back left of", its "One of the cars is parked, and one is moving.".
"How many ..." and "What is the closest object ..." are ours, in the same style.

Answers are spread so that a blind model gains little: every "Are there ..." comes as a pair, the same phrase once
where it is true and once where it is false; counts, states and closest objects are drawn evenly over their answers.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from training.data.rig import NUSCENES, Rig, question_place, whereabouts

T = TypeVar("T")

_VEHICLE = ("moving", "parked", "stopped")
_CYCLE = ("with rider", "without rider")

STATUSES: dict[str, tuple[str, ...]] = {
    "car": _VEHICLE,
    "truck": _VEHICLE,
    "bus": _VEHICLE,
    "trailer": _VEHICLE,
    "construction vehicle": _VEHICLE,
    "pedestrian": ("moving", "standing"),
    "bicycle": _CYCLE,
    "motorcycle": _CYCLE,
    "barrier": (),
    "traffic cone": (),
    "traffic light": ("red", "green"),
}
"""Class words (singular) and the states that each can have; the order is the order of an enumeration in an answer."""

MAX_STATUS = 5
MAX_EXISTENCE_PAIRS = 5
MAX_COUNTS = 4
MAX_CLOSEST = 2
MAX_KEY_OBJECTS = 4
CLOSEST_MARGIN = 1.0
"""Metres by which the closest object must beat the closest one of another class to be asked about."""


@dataclass(frozen=True)
class SceneObject:
    """One object around the ego car, seen best by one camera."""

    name: str  # class word, a key of `STATUSES`, for example "construction vehicle"
    camera: str  # that sees it best; the sector to which the rig has it look stands in the questions
    center: tuple[float, float]  # in that camera's image, in pixels of a 1600x900 image
    distance: float  # metres from the ego car
    status: str | None  # one of `STATUSES[name]`, or None where it has none or nobody knows it

    def __post_init__(self) -> None:
        if self.name not in STATUSES:
            raise ValueError(f"SceneObject.name must be one of {', '.join(STATUSES)}; got {self.name!r}.")
        if self.status is not None and self.status not in STATUSES[self.name]:
            known = ", ".join(STATUSES[self.name]) or "None only"
            raise ValueError(f"SceneObject.status of a {self.name} must be one of: {known}; got {self.status!r}.")


def object_tag(number: int, item: SceneObject) -> str:
    """DriveLM's reference to an object: `<c1,CAM_BACK,1088.3,497.5>`, one decimal, pixels of a 1600x900 image."""
    return f"<c{number},{item.camera},{item.center[0]:.1f},{item.center[1]:.1f}>"


def choose_key_objects(objects: Sequence[SceneObject]) -> list[SceneObject]:
    """The objects to tag as c1, c2, ...: the closest of each class, then the closest; `MAX_KEY_OBJECTS` at most."""
    ordered = _ordered(objects)
    firsts = {item.name: item for item in reversed(ordered)}
    # A stable sort: the first of each class, then the others, both from near to far.
    return sorted(ordered, key=lambda item: firsts[item.name] is not item)[:MAX_KEY_OBJECTS]


def perception_questions(
    objects: Sequence[SceneObject],
    rng: random.Random,
    *,
    key_objects: Sequence[SceneObject] | None = None,
    rig: Rig = NUSCENES,
) -> list[dict[str, str]]:
    """Write the perception questions of one key frame.

    The result depends on the set of objects and the state of `rng`, not on the order of `objects`.

    Args:
        objects: everything that is visible around the ego car.
        rng: decides which of the possible questions are asked.
        key_objects: tagged as c1, c2, ... in this order; if None, `choose_key_objects(objects)`.
        rig: the cameras of the car; questions are about the sectors that they look to.

    Returns:
        `[{"Q": question, "A": answer}, ...]`; empty if there are no objects.

    Raises:
        ValueError: the rig lacks the camera of an object.
    """
    ordered = _ordered(objects)
    sectors: dict[str, list[SceneObject]] = {sector: [] for sector in rig.sectors}
    for item in ordered:
        sectors[rig.sector(item.camera)].append(item)
    tagged = choose_key_objects(ordered) if key_objects is None else key_objects
    return [
        *_what_are_objects(sectors),
        *_statuses(sectors, rng),
        *_existence(sectors, rng),
        *_counts(sectors, rng),
        *_closest(sectors, rng),
        *_about_tags(tagged),
    ]


def plural(name: str) -> str:
    """`bus` -> `buses`, `traffic cone` -> `traffic cones`."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def with_article(words: str) -> str:
    """`a car`, `an orange truck`."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def in_state(words: str, status: str | None) -> str:
    """`moving car`, `bicycle without rider`, `barrier` (no status)."""
    if not status:
        return words
    return f"{words} {status}" if status in _CYCLE else f"{status} {words}"


def plural_in_state(name: str, status: str | None) -> str:
    """`moving cars`, `bicycles without riders`, `barriers` (no status)."""
    words = in_state(plural(name), status)
    return f"{words}s" if status in _CYCLE else words


def existence_question(name: str, status: str | None, sector: str) -> str:
    """`Are there moving cars to the back of the ego car?`."""
    return f"Are there {plural_in_state(name, status)} {question_place(sector)}?"


def count_question(name: str, sector: str) -> str:
    """`How many cars are there to the back of the ego car?`, ours."""
    return f"How many {plural(name)} are there {question_place(sector)}?"


def objects_question(sector: str) -> str:
    """`What are objects to the back of the ego car?`."""
    return f"What are objects {question_place(sector)}?"


def objects_answer(counts: Mapping[str, int], sector: str) -> str:
    """`There are two cars and one bus behind the ego car.`, of how many there are of each class, at least one."""
    parts = [_counted(counts[name], name) for name in STATUSES if counts.get(name)]
    verb = "is" if parts[0].startswith("one ") else "are"  # agrees with the first in the list, as DriveLM does
    return f"There {verb} {listed(parts)} {whereabouts(sector)}."


def count_word(count: int) -> str:
    """DriveLM's number words: one, two, three, then many. Zero is ours, for "How many ..."."""
    return ("zero", "one", "two", "three")[count] if count <= 3 else "many"


def _ordered(objects: Sequence[SceneObject]) -> list[SceneObject]:
    return sorted(objects, key=lambda item: (item.distance, item.name, item.camera, item.center, item.status or ""))


def _counted(count: int, name: str) -> str:
    return f"{count_word(count)} {name if count == 1 else plural(name)}"


def listed(parts: Sequence[str]) -> str:
    """`a`; `a and b`; `a, b, and c`."""
    if len(parts) < 3:
        return " and ".join(parts)
    return f"{', '.join(parts[:-1])}, and {parts[-1]}"


def _by_class(items: Sequence[SceneObject]) -> dict[str, list[SceneObject]]:
    """Objects by class, in the order of `STATUSES`, classes that are absent left out."""
    groups = {name: [item for item in items if item.name == name] for name in STATUSES}
    return {name: group for name, group in groups.items() if group}


def _what_are_objects(sectors: dict[str, list[SceneObject]]) -> list[dict[str, str]]:
    questions = []
    for sector, items in sectors.items():
        if not items:
            continue
        counts = Counter(item.name for item in items)
        questions.append({"Q": objects_question(sector), "A": objects_answer(counts, sector)})
    return questions


def _status_answer(name: str, group: Sequence[SceneObject]) -> str:
    counts = {status: sum(item.status == status for item in group) for status in STATUSES[name]}
    present = sorted((status for status in counts if counts[status]), key=lambda status: -counts[status])
    parts = []
    for index, status in enumerate(present):
        count, word = counts[status], count_word(counts[status])
        if index > 0:
            subject = word
        elif len(present) == 1 or word == "many":
            subject = _counted(count, name)
        else:
            subject = f"{word} of the {plural(name)}"
        predicate = status.replace(" rider", " a rider" if count == 1 else " riders")
        parts.append(f"{subject} {'is' if count == 1 else 'are'} {predicate}")
    head = ", ".join(parts[:-1])
    sentence = f"{head}, and {parts[-1]}" if head else parts[0]
    return f"{sentence[0].upper()}{sentence[1:]}."


def _statuses(sectors: dict[str, list[SceneObject]], rng: random.Random) -> list[dict[str, str]]:
    candidates: list[tuple[Hashable, dict[str, str]]] = []
    for sector, items in sectors.items():
        for name, group in _by_class(items).items():
            if any(item.status is None for item in group):  # part of the truth would be a wrong answer
                continue
            subject = f"the {name} that is" if len(group) == 1 else f"the {plural(name)} that are"
            question = f"What is the status of {subject} {question_place(sector)}?"
            states = frozenset(item.status for item in group)
            candidates.append((states, {"Q": question, "A": _status_answer(name, group)}))
    return _spread(candidates, MAX_STATUS, rng)


def _existence(sectors: dict[str, list[SceneObject]], rng: random.Random) -> list[dict[str, str]]:
    """Pairs of the same phrase, true in one sector and false in another, so that neither phrase nor sector tells.

    "" stands for no (known) status below.
    """
    items = [item for group in sectors.values() for item in group]
    stated = {item.name for item in items if item.status is not None}
    # Where a class has states in this frame it is only asked about with one: "moving cars", never also "cars".
    asked = sorted({(item.name, item.status or "") for item in items if item.status or item.name not in stated})
    rng.shuffle(asked)

    surplus = dict.fromkeys(sectors, 0)  # yes minus no, by sector
    questions: list[dict[str, str]] = []
    for name, status in asked:
        if len(questions) == 2 * MAX_EXISTENCE_PAIRS:
            break
        states = {sector: {item.status or "" for item in sectors[sector] if item.name == name} for sector in sectors}
        denied = status
        if name == "traffic light" and status:
            # They hang in the front view only, so another sector would give the answer away: ask for the other colour.
            denied = next(colour for colour in STATUSES[name] if colour != status)
        true = [sector for sector in sectors if status in states[sector]]
        # An object of unknown state leaves the question open.
        false = [sector for sector in sectors if denied not in states[sector] and "" not in states[sector]]
        if denied != status:
            true = false = [sector for sector in true if sector in false]
        if not true or not false:
            continue
        yes = min(true, key=lambda sector: (surplus[sector], rng.random()))
        no = max(false, key=lambda sector: (surplus[sector], rng.random()))
        surplus[yes] += 1
        surplus[no] -= 1
        questions.append({"Q": existence_question(name, status, yes), "A": "Yes."})
        questions.append({"Q": existence_question(name, denied, no), "A": "No."})
    rng.shuffle(questions)
    return questions


def _counts(sectors: dict[str, list[SceneObject]], rng: random.Random) -> list[dict[str, str]]:
    names = _by_class([item for items in sectors.values() for item in items])
    candidates: list[tuple[Hashable, dict[str, str]]] = []
    for sector, items in sectors.items():
        groups = _by_class(items)
        for name in names:
            word = count_word(len(groups.get(name, ())))
            candidates.append((word, {"Q": count_question(name, sector), "A": f"{word.capitalize()}."}))
    return _spread(candidates, MAX_COUNTS, rng)


def _closest(sectors: dict[str, list[SceneObject]], rng: random.Random) -> list[dict[str, str]]:
    candidates: list[tuple[Hashable, dict[str, str]]] = []
    for sector, items in sectors.items():
        others = [item.distance for item in items if item.name != items[0].name]
        if not others or min(others) - items[0].distance < CLOSEST_MARGIN:  # one class only, or too close to call
            continue
        question = f"What is the closest object {question_place(sector)}?"
        candidates.append((items[0].name, {"Q": question, "A": f"A {items[0].name}."}))
    return _spread(candidates, MAX_CLOSEST, rng)


def describe(item: SceneObject) -> str:
    """A short visual description like DriveLM's: `Car.`; `Green light.` for a traffic light of known colour."""
    if item.name == "traffic light" and item.status is not None:
        return f"{item.status.capitalize()} light."
    return f"{item.name.capitalize()}."


def observed_status(item: SceneObject) -> str | None:
    """`Moving` or `Stationary` as DriveLM's tagged objects have it; None where the status does not tell."""
    if item.status == "moving":
        return "Moving"
    return "Stationary" if item.status in ("parked", "stopped", "standing") else None


def _about_tags(tagged: Sequence[SceneObject]) -> list[dict[str, str]]:
    states, descriptions = [], []
    for number, item in enumerate(tagged, start=1):
        tag = object_tag(number, item)
        if status := observed_status(item):
            states.append({"Q": f"What is the observed status of object {tag}?", "A": f"{status}."})
        descriptions.append({"Q": f"What is the visual description of {tag}?", "A": describe(item)})
    return states + descriptions


def _spread(candidates: Sequence[tuple[Hashable, T]], limit: int, rng: random.Random) -> list[T]:
    """At most `limit` of `(answer, value)`, taken from the different answers in turn."""
    shuffled = list(candidates)
    rng.shuffle(shuffled)
    by_answer: dict[Hashable, list[T]] = defaultdict(list)
    for answer, value in shuffled:
        by_answer[answer].append(value)
    groups = list(by_answer.values())
    rng.shuffle(groups)  # or the most frequent answer would tend to come first and fill the last, partial turn
    longest = max(map(len, groups), default=0)
    turns = [group[turn] for turn in range(longest) for group in groups if turn < len(group)]
    return turns[:limit]
