"""What the cameras of a frame show, as objects and words: what a model's visual tokens should come to say.

A source that knows it (`training.toyworld`, `training.nuscenes`) leaves `contents.json` beside its drivelm.json,
`{frame token: contents}`; of DriveLM itself, key objects tell. `training.prepare` puts it into the prepared folder,
and `Rows.contents` gives it. It says what pictures show and nothing of questions or answers; no prompt ever holds it.
"""

from typing import TypedDict

CONTENTS_FILE = "contents.json"


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
