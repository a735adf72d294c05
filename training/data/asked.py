"""Perception questions read back: what one asks about, and what a frame's contents answer to it.

Known are the wordings of `training.data.wording` whose answer follows from what stands in a sector: "Are there ...",
"How many ..." and "What are objects ...".
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

from training.data.contents import Contents
from training.data.rig import SECTOR_WORDS, Rig
from training.data.wording import (
    STATUSES,
    count_question,
    count_word,
    existence_question,
    objects_answer,
    objects_question,
)

WhyNot = Literal["nowhere", "elsewhere", "other_state"]
WHY_NOT: tuple[WhyNot, ...] = get_args(WhyNot)


@dataclass(frozen=True)
class Asked:
    """What a question asks about."""

    kind: Literal["existence", "count", "objects"]
    sector: str
    name: str = ""  # class word, a key of `STATUSES`; of "objects" none
    status: str | None = None  # that an "existence" question asks for


_QUESTIONS = {
    **{objects_question(sector): Asked("objects", sector) for sector in SECTOR_WORDS},
    **{count_question(name, sector): Asked("count", sector, name) for sector in SECTOR_WORDS for name in STATUSES},
    **{
        existence_question(name, status, sector): Asked("existence", sector, name, status)
        for sector in SECTOR_WORDS
        for name, statuses in STATUSES.items()
        for status in (None, *statuses)
    },
}


def asked_by(question: str) -> Asked | None:
    """What a question asks about; None for one whose answer does not follow from contents.

    >>> asked_by("Are there moving cars to the back left of the ego car?")
    Asked(kind='existence', sector='back left', name='car', status='moving')
    """
    return _QUESTIONS.get(question)


def answer_from(asked: Asked, contents: Contents, rig: Rig) -> str | None:
    """The right answer of a frame with these contents.

    Returns:
        None where nobody knows (something is shown badly there, or in a state that is not known), where the rig does
        not look, and for the objects of an empty sector, about which no data set asks.
    """
    cameras = rig.sectors.get(asked.sector, ())
    if not cameras:
        return None
    if asked.kind == "existence":
        stands = _stands(asked, contents, cameras)
        return None if stands is None else "Yes." if stands else "No."
    counts = Counter(thing["name"] for thing in contents["objects"] if thing["camera"] in cameras)
    unclear = {name for name, camera in contents["unclear"] if camera in cameras}
    if asked.kind == "count":
        return None if asked.name in unclear else f"{count_word(counts[asked.name]).capitalize()}."
    return (
        None if unclear or not counts or not counts.keys() <= STATUSES.keys() else objects_answer(counts, asked.sector)
    )


def why_not(asked: Asked, contents: Contents, rig: Rig) -> WhyNot | None:
    """Why the answer to an "existence" question is "No.":

    - "elsewhere": another camera shows what is asked about, the class in the state if one is asked for;
    - "other_state": no camera shows it, but the class stands in the named sector in another state;
    - "nowhere": no camera shows it, and the class does not stand in the named sector.

    Returns:
        one of the three; None where the answer is not "No." or nobody knows.
    """
    here = rig.sectors.get(asked.sector, ())
    others = {thing["camera"] for thing in contents["objects"]} | {camera for _, camera in contents["unclear"]}
    elsewhere = _stands(asked, contents, others - set(here))
    if not here or _stands(asked, contents, here) is not False or elsewhere is None:
        return None
    if elsewhere:
        return "elsewhere"
    there = any(thing["name"] == asked.name and thing["camera"] in here for thing in contents["objects"])
    return "other_state" if there else "nowhere"


def _stands(asked: Asked, contents: Contents, cameras: Collection[str]) -> bool | None:
    """Whether one of these cameras shows what is asked about; None where nobody knows."""
    states = [t["status"] for t in contents["objects"] if t["name"] == asked.name and t["camera"] in cameras]
    if states and asked.status in (None, *states):
        return True
    unclear = any(name == asked.name and camera in cameras for name, camera in contents["unclear"])
    return None if unclear or None in states else False
