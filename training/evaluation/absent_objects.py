"""Questions about what is not there: new ones, whose answer is "No."."""

import hashlib
import re
from collections.abc import Iterable, Sequence

from training.data.asked import asked_by
from training.data.rig import PLACE, SECTOR_WORDS, Rig
from training.data.rows import Row
from training.data.wording import STATUSES, existence_question, plural
from training.metrics.answers import parse_counts, parse_yes_no

_SECTOR = "|".join(SECTOR_WORDS)
# "traffic light" is left out: DriveLM lists lights by other questions, so a list without one does not mean that there
# is none.
ABSENT_CLASSES = tuple(name for name in STATUSES if name != "traffic light")
_CLASS = re.compile("|".join(rf"\b{plural(name)}\b|\b{name}\b" for name in sorted(STATUSES, key=len, reverse=True)))
_LISTING = re.compile(rf"What are objects to the ({_SECTOR}) of the ego car\?")


def absent_object_questions(rows: Sequence[Row], rig: Rig) -> list[Row]:
    """One question per sector about a class that is not there; the answer is "No.".

    Only sectors whose objects the frame lists ("What are objects to the back of the ego car?") are asked about. The
    class is one of which the frame counts zero there, which lets cars be asked about: they stand nearly everywhere.
    Else it is neither there nor in a neighbouring sector, whose objects may reach into the picture; one that stands
    elsewhere around the car is preferred: a model that mixes up its cameras says "Yes.".

    Returns:
        rows with question_id `{scene}_{frame}_absent-{camera}`, `asked`, and the `camera` asked about.
    """
    known = [row for row in rows if row["answer"]]  # a hidden answer lists nothing, and rules nothing out
    present = _classes_by_camera(known, rig)
    denied = _denied(known)
    written = {row["question"] for row in rows}
    everywhere = set().union(*present.values()) if present else set()
    questions: list[Row] = []
    for row in known:
        listing = _LISTING.fullmatch(row["question"])
        if not listing or listing[1] not in rig.sectors:
            continue
        camera = rig.sectors[listing[1]][0]
        nearby = set().union(*(present.get(name, set()) for name in rig.neighbours(camera)))
        absent = [name for name in ABSENT_CLASSES if name not in nearby or (name, listing[1]) in denied]
        absent = [name for name in absent if existence_question(name, None, listing[1]) not in written]
        counted = [name for name in absent if (name, listing[1]) in denied]
        candidates = counted or [name for name in absent if name in everywhere] or absent
        if not candidates:
            continue
        identifier = f"{row['scene_token']}_{row['frame_token']}_absent-{camera}"
        if any(identifier == question["question_id"] for question in questions):
            continue
        name = candidates[number_of(identifier) % len(candidates)]
        text = existence_question(name, None, listing[1])
        questions.append(
            {
                **row,
                "question_id": identifier,
                "question": text,
                "asked": text,
                "answer": "No.",
                "camera": camera,
                "objects": [],
                "tag": [],
            }
        )
    return questions


def _classes_by_camera(rows: Iterable[Row], rig: Rig) -> dict[str, set[str]]:
    """Class words that a frame's own questions and answers place in each camera's sector."""
    singular = {form: name for name in STATUSES for form in (name, plural(name))}
    present: dict[str, set[str]] = {}
    for row in rows:
        question, answer = row["question"], row["answer"]
        if parse_yes_no(answer) == "no" or 0 in parse_counts(answer).values():
            continue
        text = f"{question} {answer}" if PLACE.search(question) else ""
        for camera in rig.named_in(question):
            present.setdefault(camera, set()).update(singular[word] for word in _CLASS.findall(text))
    return present


def _denied(rows: Iterable[Row]) -> set[tuple[str, str]]:
    """(class, sector) of which a frame itself says that there are zero."""
    counted = [(asked_by(row["question"]), row["answer"]) for row in rows]
    return {
        (asked.name, asked.sector)
        for asked, answer in counted
        if asked and asked.kind == "count" and set(parse_counts(answer).values()) == {0}
    }


def number_of(key: str) -> int:
    """A number that is the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
