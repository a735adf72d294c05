"""What may be said of a picture, one statement each: a car, a moving car, two cars.

Visual tokens made of words (`slots`) are right when such statements can be read off them by dot product with the same
words: that is what a language model does, and what a projector learns in `training.align`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from training.data.contents import Contents, Thing, shown_by
from training.data.wording import STATUSES, count_word
from training.learning.slots import CLOSEST_TOKEN, COUNTS, FIRST_OBJECT, Bag, groups_of, status_words

KINDS = ("class", "state", "number")
ALL_CLASSES = 0
"""The token that tells of every class."""


@dataclass(frozen=True)
class Statement:
    """A class is shown; in a state; or so many times (four and more are "many")."""

    name: str
    kind: str  # of KINDS
    told: str | None = None  # the state, or the word for the number

    def bag(self) -> Bag:
        """The words that say it."""
        return dict.fromkeys([*self.name.split(), *status_words(self.told or "")], 1.0)

    def holds(self, things: Sequence[Thing]) -> bool:
        """Whether it is true where these things are shown."""
        of_class = [thing for thing in things if thing["name"] == self.name]
        if self.kind == "number":
            return bool(of_class) and count_word(min(len(of_class), len(COUNTS))) == self.told
        return any(self.told in (None, thing["status"]) for thing in of_class)


def statements_about(contents: Iterable[Contents]) -> list[Statement]:
    """All statements about the classes that there are, those that only these frames know behind the others."""
    others = {thing["name"] for frame in contents for thing in frame["objects"]} - set(STATUSES)
    names = [*STATUSES, *sorted(others)]
    return [
        *(Statement(name, "class") for name in names),
        *(Statement(name, "state", status) for name in names for status in STATUSES.get(name, ())),
        *(Statement(name, "number", count) for name in names for count in COUNTS),
    ]


def read_from(statements: Sequence[Statement], count: int) -> torch.Tensor:
    """(tokens, statements): which of `count` tokens tell whether a statement is true."""
    tells = torch.zeros(count, len(statements), dtype=torch.bool)
    for column, statement in enumerate(statements):
        for token in (ALL_CLASSES, *groups_of(statement.name)):
            if token < count:
                tells[token, column] = True
    return tells


def truth_of(statements: Sequence[Statement], contents: Contents, camera: str) -> tuple[list[bool], list[bool]]:
    """Per statement whether it is true of a camera's picture, and whether anybody could say so."""
    things = shown_by(contents, camera)
    unclear = unclear_at(contents, camera)
    unknown = {thing["name"] for thing in things if thing["status"] is None}  # their states
    true = [one.holds(things) for one in statements]
    clear = [
        one.name not in unclear and (holds or one.kind != "state" or one.name not in unknown)
        for one, holds in zip(statements, true, strict=True)
    ]
    return true, clear


def certain_tokens(contents: Contents, camera: str, count: int) -> list[bool]:
    """Per token whether what it should say is certain: it tells of no class that may or may not count as shown."""
    unclear = unclear_at(contents, camera)
    if not unclear:
        return [True] * count
    doubtful = {ALL_CLASSES, CLOSEST_TOKEN}.union(*map(groups_of, unclear))
    return [token < FIRST_OBJECT and token not in doubtful for token in range(count)]


def unclear_at(contents: Contents, camera: str) -> set[str]:
    """The classes that a camera may or may not show."""
    return {name for name, where in contents["unclear"] if where == camera}
