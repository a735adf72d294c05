"""What is true in a toy frame: which objects the pictures show well, and what the ego car should consider.

Two kinds of object are not asked about. What is hidden by more than half, or tiny, is not named at all; and where its
rest could still be seen, no question is asked whose answer depends on whether it was noticed (`Truth.unclear`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap

import numpy as np

from training.data.drivelm import IMAGE_SIZE
from training.data.wording import STATUSES, SceneObject, existence_question
from training.toyworld.cameras import cameras
from training.toyworld.render import View
from training.toyworld.scene import ToyFrame, ToyObject, in_ego_path

MAX_TAGGED = 8

_VISIBLE_SHARE = 0.5  # of the pixels that an object would have if nothing stood before it
_DOUBTFUL_SHARE = 0.06
_VISIBLE_AREA = 0.0012  # of the picture
_DOUBTFUL_AREA = 0.0002


@dataclass(frozen=True)
class Seen:
    """An object that the pictures show well."""

    index: int  # into `frame.objects`
    item: ToyObject
    scene_object: SceneObject  # what `training.data.wording` needs of it
    sector: str  # the words for where the camera looks that sees it best
    box: tuple[float, float, float, float]  # left, top, right, bottom of its visible pixels there, of a 1600x900 image

    @property
    def camera(self) -> str:
        return self.scene_object.camera


@dataclass(frozen=True)
class Truth:
    """What can be asked about a frame."""

    seen: tuple[Seen, ...]  # objects that are shown well, in the order of their tags c1, c2, ...
    doubtful: frozenset[tuple[str, str]]  # (class, camera), shown so badly there that an answer could be disputed
    unclear: frozenset[tuple[str, str]]  # (class, sector), the same without what its other cameras show well
    visibility: tuple[float, ...]  # (objects,) share of each that is visible, over all cameras; 0 if it is in none
    hider: Mapping[int, int]  # index of the object that hides most of an object, by index of the hidden object


def find_truth(frame: ToyFrame, views: Mapping[str, View]) -> Truth:
    """Decide from the pictures' object numbers what is visible, where, and what hides what."""
    visible = {name: view.visible() for name, view in views.items()}
    sector = frame.rig.sector
    seen: list[Seen] = []
    doubtful: set[tuple[str, str]] = set()
    unclear: set[tuple[str, str]] = set()
    visibility: list[float] = []
    hider: dict[int, int] = {}
    for index, item in enumerate(frame.objects):
        best = _best_lens(frame, item, {name: int(visible[name][index]) for name in views})
        total = sum(int(view.unhidden[index]) for view in views.values())
        visibility.append(sum(int(visible[name][index]) for name in views) / total if total else 0.0)
        clear = _shows_well(views[best], index)
        if clear:
            seen.append(_describe(index, item, best, sector(best), views[best]))
        for name, view in views.items():
            enough = max(_DOUBTFUL_AREA * view.numbers.size, _DOUBTFUL_SHARE * int(view.unhidden[index]))
            if not (name == best and clear) and visible[name][index] >= enough:
                doubtful.add((item.name, name))
                if not clear or sector(name) != sector(best):
                    unclear.add((item.name, sector(name)))
    seen = _in_tag_order(frame, seen)
    for hidden in seen:
        before = _find_hider(hidden, views[hidden.camera])
        if before is not None:
            hider[hidden.index] = before
    return Truth(tuple(seen), frozenset(doubtful), frozenset(unclear), tuple(visibility), hider)


def _best_lens(frame: ToyFrame, item: ToyObject, pixels: Mapping[str, int]) -> str:
    """The camera that shows most of an object; of two that look the same way, one whose picture does not cut it."""
    best = max(pixels, key=lambda name: pixels[name])
    lenses = frame.rig.sectors[frame.rig.sector(best)]
    if len(lenses) == 1:
        return best
    rig, corners = cameras(IMAGE_SIZE[0], frame.rig), item.corners()
    return max(lenses, key=lambda name: (round(rig[name].share_in_picture(corners), 1), pixels[name]))


def _shows_well(view: View, index: int) -> bool:
    pixels = int(view.visible()[index])
    return pixels >= _VISIBLE_AREA * view.numbers.size and pixels >= _VISIBLE_SHARE * int(view.unhidden[index])


def _in_tag_order(frame: ToyFrame, seen: Sequence[Seen]) -> list[Seen]:
    """Those to consider get tags before others do, but c1 tells nothing: the tagged ones are shuffled."""
    rng = frame.random("tags")
    order = list(seen)
    rng.shuffle(order)
    order.sort(key=lambda entry: not considers(frame, entry.item))
    tagged = order[:MAX_TAGGED]
    rng.shuffle(tagged)
    return tagged + order[MAX_TAGGED:]


def _describe(index: int, item: ToyObject, camera: str, sector: str, view: View) -> Seen:
    rows, columns = np.nonzero(view.numbers == index + 1)
    x_scale, y_scale = IMAGE_SIZE[0] / view.numbers.shape[1], IMAGE_SIZE[1] / view.numbers.shape[0]
    left, right = columns.min() * x_scale, (columns.max() + 1) * x_scale
    top, bottom = rows.min() * y_scale, (rows.max() + 1) * y_scale
    center = (round(float(left + right) / 2, 1), round(float(top + bottom) / 2, 1))
    box = tuple(round(float(value), 1) for value in (left, top, right, bottom))
    scene_object = SceneObject(item.name, camera, center, item.distance, item.status)
    return Seen(index, item, scene_object, sector, box)  # type: ignore[arg-type]


def _find_hider(hidden: Seen, view: View) -> int | None:
    """The object that covers most of what is hidden of a well-seen object; None if it is (nearly) whole."""
    covers = view.covers[hidden.index, 1:]
    if not len(covers) or covers.max() < 0.1 * view.unhidden[hidden.index]:
        return None
    return int(covers.argmax())


def considers(frame: ToyFrame, item: ToyObject) -> bool:
    """Whether the ego vehicle should consider an object: see the rules in `questions`."""
    return item.name == "traffic light" or in_ego_path(frame, item) or (moves(item) and item.distance <= 12.0)


def moves(item: ToyObject) -> bool:
    return item.status in ("moving", "with rider")


def existence_truth(truth: Truth) -> tuple[frozenset[str], frozenset[str]]:
    """Existence questions that are true, and those that must not be asked because the answer is in doubt."""
    true = ((seen.item.name, status, seen.sector) for seen in truth.seen for status in (None, seen.item.status))
    doubtful = ((name, status, sector) for name, sector in truth.unclear for status in (None, *STATUSES[name]))
    return frozenset(starmap(existence_question, true)), frozenset(starmap(existence_question, doubtful))
