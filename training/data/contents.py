"""What the cameras of a frame show, as objects and words: what a model's visual tokens should come to say.

A source that knows it (`training.toyworld`, `training.nuscenes`) leaves `contents.json` beside its drivelm.json,
`{frame token: contents}`; of DriveLM itself, key objects tell. `training.prepare` puts it into the prepared folder,
and `Rows.contents` gives it. It says what pictures show and nothing of questions or answers; no prompt ever holds it.
"""

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from training.data.wording import STATUSES, plural
from training.stages.files import write_json

CONTENTS_FILE = "contents.json"

_KINDS = {  # what DriveLM calls them → class words
    "sedan": "car",
    "suv": "car",
    "van": "car",
    "pickup": "truck",
    "lorry": "truck",
    "person": "pedestrian",
    "cyclist": "bicycle",
    "bike": "bicycle",
    "motorbike": "motorcycle",
    "cone": "traffic cone",
    **{f"{colour} light": "traffic light" for colour in ("red", "green", "yellow")},  # and no "light gray vehicle"
}
_CATEGORIES = ("vehicle", "traffic element", "obstacle")  # of what no class word is known; no free text travels on
_CLASS_OF = {**_KINDS, **{name: name for name in STATUSES}}
_CLASS_OF |= {plural(word): name for word, name in _CLASS_OF.items()}
_CLASS_WORD = re.compile(rf"\b({'|'.join(sorted(map(re.escape, _CLASS_OF), key=len, reverse=True))})\b")
_MOVING = {"Moving": ("moving", "with rider"), "Stationary": ("standing", "parked", "without rider")}


class Thing(TypedDict):
    """An object, in the camera that shows it best."""

    name: str  # class word, singular: a key of `wording.STATUSES`, or what a source calls it in small letters
    camera: str
    status: str | None  # one of `wording.STATUSES[name]`; None: it has none, or nobody knows
    distance: float | None  # metres from the ego car


class Contents(TypedDict):
    """What the cameras of one frame show."""

    objects: list[Thing]
    words: dict[str, list[str]]  # camera → words for what else it shows: weather, lane, the ego car's speed
    unclear: list[tuple[str, str]]  # (class, camera): something may or may not count as shown there


def shown_by(contents: Contents, camera: str) -> list[Thing]:
    """A camera's objects, from near to far; those of unknown distance last."""
    things = [thing for thing in contents["objects"] if thing["camera"] == camera]
    return sorted(things, key=lambda thing: (thing["distance"] is None, thing["distance"] or 0.0))


def moved(contents: Contents, places: Mapping[str, str]) -> Contents:
    """The same where each camera's picture is shown in another camera's place; cameras not in `places` keep theirs."""
    return {
        "objects": [
            {**thing, "camera": places.get(thing["camera"], thing["camera"])} for thing in contents["objects"]
        ],
        "words": {places.get(camera, camera): words for camera, words in contents["words"].items()},
        "unclear": [(name, places.get(camera, camera)) for name, camera in contents["unclear"]],
    }


def limited(contents: Contents, cameras: Collection[str]) -> Contents:
    """What these cameras alone show."""
    return {
        "objects": [thing for thing in contents["objects"] if thing["camera"] in cameras],
        "words": {camera: words for camera, words in contents["words"].items() if camera in cameras},
        "unclear": [(name, camera) for name, camera in contents["unclear"] if camera in cameras],
    }


def contents_of_key_objects(key_objects: Iterable[tuple[str, Mapping[str, str]]]) -> Contents:
    """What DriveLM's own annotations tell of a frame; distances and everything but key objects stay unknown.

    Args:
        key_objects: camera, and `Category`, `Status` and `Visual_description`: "Vehicle", "Moving", "Black sedan."
    """
    things: list[Thing] = []
    for camera, info in key_objects:
        description = info.get("Visual_description", "").lower()
        category = info.get("Category", "").strip().lower()
        name = _class_word(description) or _class_word(category) or (category if category in _CATEGORIES else None)
        if name is not None:
            status = _status(name, info.get("Status"), description)
            things.append({"name": name, "camera": camera, "status": status, "distance": None})
    return {"objects": things, "words": {}, "unclear": []}


def _class_word(text: str) -> str | None:
    """The class that a text names last: "white truck" → truck, "golden sedan" → car; None: none."""
    found = _CLASS_WORD.findall(text)
    return _CLASS_OF[found[-1]] if found else None


def _status(name: str, status: str | None, description: str) -> str | None:
    """One of the class's states, if the annotation tells which."""
    states = STATUSES.get(name, ())
    told = [state for state in states if re.search(rf"\b{state}\b", description)]
    told += [state for state in _MOVING.get(status or "", ()) if state in states]
    return told[0] if told else None


def write_contents(folder: str | os.PathLike[str], contents: Mapping[str, Contents]) -> None:
    """Leave `contents.json` in a folder, for `training.prepare`.

    Args:
        folder: where the DriveLM file lies.
        contents: by frame token.
    """
    write_json(Path(folder) / CONTENTS_FILE, contents)


def read_contents(file: Path) -> dict[str, Contents]:
    """`contents.json`: contents by frame token.

    Raises:
        ValueError: it is no such file.
    """
    try:
        told = json.loads(file.read_text(encoding="utf-8-sig"))
        return {token: _checked(frame) for token, frame in told.items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} does not hold {{frame token: {{objects, words, unclear}}}}: {type(error).__name__}: {error}"
        ) from error


def _checked(frame: Any) -> Contents:
    things: list[Thing] = [
        {"name": one["name"], "camera": one["camera"], "status": one["status"], "distance": one["distance"]}
        for one in frame["objects"]
    ]
    words = frame["words"]
    if not all(isinstance(told, list) for told in words.values()):
        raise TypeError("words of a camera are a list")
    unclear = [(name, camera) for name, camera in frame["unclear"]]
    texts = [text for thing in things for text in (thing["name"], thing["camera"])]
    texts += [thing["status"] for thing in things if thing["status"] is not None]
    texts += [word for told in words.values() for word in told] + [text for pair in unclear for text in pair]
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is no text")
    for thing in things:
        if not isinstance(thing["distance"], int | float | None):
            raise TypeError(f"{thing['distance']!r} is no distance")
    return {"objects": things, "words": words, "unclear": unclear}
