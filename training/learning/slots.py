"""Visual tokens made of words: what each of a camera's tokens should say about its picture.

A token is the weighted sum of the language model's own word embeddings, as long as a word is on average. A language
model can learn to read such tokens before it ever sees a picture (`training.read`), and a projector to write them
without a language model (`training.align`).

Tokens are nested as budgets are: the first holds all that the picture shows, its closest class loudest; the next six
are the rows and columns of a grid of classes, so that two classes that share a token do not share the other (trailers
stand with trucks, lights with bicycles); then what is closest, then single classes, then single objects from near to
far. So more tokens add and never take away. A class is told by its name, how many there are, and each state by its
share: "two of three parked" reads off the weights.
"""

from collections.abc import Iterable, Sequence
from zlib import crc32

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from training.data.contents import Contents, Thing, shown_by
from training.data.wording import STATUSES, count_word

Bag = dict[str, float]
"""Word → weight: what one token says."""

NOTHING, CLOSEST = "nothing", "closest"
COUNTS = tuple(count_word(count) for count in range(1, 5))
_ROWS = (
    ("car", "pedestrian", "barrier"),
    ("truck", "trailer", "bicycle", "traffic cone", "traffic light"),
    ("bus", "motorcycle", "construction vehicle"),
)
_COLUMNS = (
    ("car", "truck", "trailer", "bus"),
    ("pedestrian", "bicycle", "motorcycle", "traffic light"),
    ("barrier", "traffic cone", "construction vehicle"),
)
_SINGLE = (
    ("car",),
    ("truck",),
    ("bus", "trailer"),
    ("pedestrian",),
    ("bicycle", "traffic light"),
    ("motorcycle",),
    ("construction vehicle",),
    ("barrier", "traffic cone"),
)
GROUPS: tuple[tuple[str, ...], ...] = (*_ROWS, *_COLUMNS, (), *_SINGLE)
"""Classes of token 1, 2, …; the empty one tells what is closest."""

CLOSEST_TOKEN = 1 + GROUPS.index(())
FIRST_OBJECT = 1 + len(GROUPS)
"""From this token on, a token is one object."""

_FARTHER, _SCENE, _PART = 0.6, 1.0, 1.2


def words_of(name: str, things: Sequence[Thing]) -> Bag:
    """Of all objects of a class: its name, how many, and each state by its share."""
    bag = dict.fromkeys(name.split(), 1.0)
    bag[count_word(min(len(things), 4))] = 1.0
    for status in dict.fromkeys(thing["status"] for thing in things):
        if status is not None:
            share = sum(thing["status"] == status for thing in things) / len(things)
            for word in status_words(status):
                bag[word] = 1.0 if share == 1 else _PART * share
    return bag


def status_words(status: str) -> list[str]:
    """`moving` → moving; `with rider` → with, rider."""
    return status.split()


def groups_of(name: str) -> tuple[int, ...]:
    """The tokens, beside the first, that hold a class; one that no group names has a row, a column and a single."""
    found = tuple(token for token, names in enumerate(GROUPS, start=1) if name in names)
    if found:
        return found
    number, side = crc32(name.encode()), len(_ROWS)
    return 1 + number % side, 1 + side + number // side % side, CLOSEST_TOKEN + 1 + number % len(_SINGLE)


def bags_of(contents: Contents, camera: str, count: int) -> list[Bag]:
    """What the first `count` tokens of a camera should say."""
    things = shown_by(contents, camera)
    by_class: dict[str, list[Thing]] = {}  # the closest class first
    for thing in things:
        by_class.setdefault(thing["name"], []).append(thing)
    told = {name: words_of(name, group) for name, group in by_class.items()}
    scene = dict.fromkeys(contents["words"].get(camera, []), _SCENE)
    bags: list[Bag] = [{} for _ in range(max(count, FIRST_OBJECT))]
    for place, (name, words) in enumerate(told.items()):
        add(bags[0], words, 1.0 if place == 0 else _FARTHER)
        for token in groups_of(name):
            add(bags[token], words)
    if things:
        add(bags[CLOSEST_TOKEN], {CLOSEST: 1.0} | told[things[0]["name"]])
    for token, thing in zip(range(FIRST_OBJECT, count), things, strict=False):
        add(bags[token], words_of(thing["name"], [thing]))
    for bag in bags:
        if not bag:
            bag[NOTHING] = 1.0
    for token in (0, CLOSEST_TOKEN):
        add(bags[token], scene)
    return bags[:count]


def add(bag: Bag, words: Bag, weight: float = 1.0) -> None:
    """Add words to a bag."""
    for word, value in words.items():
        bag[word] = bag.get(word, 0.0) + weight * value


def words_of_tokens(contents: Iterable[Contents]) -> list[str]:
    """The words that tokens are made of: those of all classes, states and numbers, and of these frames."""
    words = dict.fromkeys([NOTHING, CLOSEST, *COUNTS])
    for name, statuses in STATUSES.items():
        words |= dict.fromkeys([*name.split(), *(word for status in statuses for word in status_words(status))])
    for frame in contents:
        words |= dict.fromkeys(word for more in frame["words"].values() for word in more)
        words |= dict.fromkeys(word for thing in frame["objects"] for word in thing["name"].split())
    return list(words)


class WordTable:
    """The words that tokens are made of, and what a language model's embeddings make of them.

    Args:
        tokenizer: of the language model.
        contents: frames whose words there are beside those of all classes, states and numbers.

    Raises:
        ValueError: the tokenizer cannot write a word.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, contents: Iterable[Contents]):
        self.words = words_of_tokens(contents)
        self.index = {word: place for place, word in enumerate(self.words)}
        self.pieces = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in self.words]
        unknown = [
            word
            for word, pieces in zip(self.words, self.pieces, strict=True)
            if not pieces or tokenizer.unk_token_id in pieces
        ]
        if unknown:
            raise ValueError(f"the language model's tokenizer has no pieces for: {', '.join(unknown)}")

    def weights(self, bags: Sequence[Bag]) -> torch.Tensor:
        """(bags, words)"""
        weights = torch.zeros(len(bags), len(self.words))
        for row, bag in enumerate(bags):
            for word, weight in bag.items():
                weights[row, self.index[word]] = weight
        return weights

    def vectors(self, embeddings: torch.Tensor) -> torch.Tensor:
        """A word's embedding, (words, hidden); of a word in pieces their mean, as long as a word is on average."""
        length = length_of(embeddings)
        counts = torch.tensor([len(pieces) for pieces in self.pieces], device=embeddings.device)
        flat = torch.tensor([piece for pieces in self.pieces for piece in pieces], device=embeddings.device)
        # One look-up, whose gradient is one tensor as large as all embeddings.
        means = nn.functional.embedding_bag(flat, embeddings, counts.cumsum(0) - counts, mode="mean")
        whole = counts == 1
        return torch.where(whole[:, None], means, nn.functional.normalize(means, dim=-1) * length)


def length_of(embeddings: torch.Tensor) -> torch.Tensor:
    """How long a word is on average."""
    return embeddings.norm(dim=-1).mean()


def tokens_of(weights: torch.Tensor, vectors: torch.Tensor, length: torch.Tensor | float) -> torch.Tensor:
    """Visual tokens (…, hidden) of bags (…, words), given the words' vectors (words, hidden)."""
    return nn.functional.normalize(weights @ vectors, dim=-1) * length
