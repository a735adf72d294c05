"""The balance of a toy world's questions over all its frames.

A template is a question without its numbers and coordinates (sector and camera stay). Yes and no, and any
other pair of answers, are equally frequent in every template (`exact`); of more answers, the most frequent is cut to
the second (`level`); free descriptions are left as they fall (`open`).
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from training.data.drivelm import CATEGORIES

_SHARES = {"perception": 0.45, "prediction": 0.30, "planning": 0.25}  # of a frame's questions, after behavior
_ACCURACY = 0  # the challenge's tag


class Item(NamedTuple):
    """One question with what the balance needs."""

    category: str
    question: str
    answer: str
    value: str  # what a blind model would have to guess; the answer, or the text of the right option
    group: str  # what is balanced: the value, or a class of values where most of them occur once
    rule: str  # "exact", "level" or "open"
    tag: int | None  # the challenge's metric, or None where the challenge asks no such question


def template(question: str) -> str:
    """A question without what differs from frame to frame: tag numbers, coordinates, the order of options."""
    bare = re.sub(r"<c\d+,(\w+),[^>]*>", r"<c,\1>", question)
    return re.sub(r"(following options:).*", r"\1", bare)


def yes_no(category: str, question: str, answer: bool) -> Item:
    """A question to which the answer is yes or no."""
    text = "Yes." if answer else "No."
    return Item(category, question, text, text, text, "exact", _ACCURACY)


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
        second = counts[1] if len(counts) > 1 else 0
        keep = second if rules[key] == "exact" else max(second, 1)
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
    asked = [{item.question for item in frame.items} for frame in frames]
    surplus: Counter[str] = Counter()
    for item in (item for frame in frames for item in frame.items):
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
                    frame.items.append(yes_no("perception", question, False))
                    break
