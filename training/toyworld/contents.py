"""What the cameras of a toy frame show, in words, as `training.data.contents` has it.

What is no object is told where it shows: ahead, how the ego car steers, how fast it goes and what stands in its path;
behind, the weather and the lane.
"""

from collections.abc import Iterable

from training.data.contents import Contents, Thing
from training.data.rig import Rig
from training.toyworld.scene import DIRECTIONS, SPEEDS, WEATHERS, ToyFrame, ToyObject, in_ego_path

AHEAD, BEHIND = "front", "back"
"""The sectors that tell what the ego car does, and weather and lane."""
LANE_WORDS = ("left", "middle", "right")
SPEED_WORDS = {"not moving": "standing"}  # one word each: "not" beside "moving" would say that it moves
NEAR, PATH = 11.0, 17.0
"""Metres at which what stands in the path makes the ego car stop, and slow down: the rules of `questions`."""


def contents_of(
    frame: ToyFrame, seen: Iterable[tuple[ToyObject, str]], unclear: Iterable[tuple[str, str]] = ()
) -> Contents:
    """Contents of a frame.

    Args:
        frame: tells what is no object.
        seen: objects that are shown, each with its camera.
        unclear: (class, camera) where something may or may not count as shown.
    """
    shown = list(seen)
    things: list[Thing] = [
        {"name": item.name, "camera": camera, "status": item.status, "distance": round(item.distance, 2)}
        for item, camera in shown
    ]
    rig = frame.rig
    path = min((item.distance for item, _ in shown if in_ego_path(frame, item)), default=None)
    ahead = [frame.direction, SPEED_WORDS.get(frame.speed, frame.speed)]
    if path is not None and path <= PATH:
        ahead += ["path", "near"] if path <= NEAR else ["path"]
    words: dict[str, list[str]] = {}
    for sector, told in ((AHEAD, ahead), (BEHIND, [frame.weather, LANE_WORDS[frame.ego_lane], "lane"])):
        for camera in rig.sectors.get(sector, ()):
            words[camera] = told
    return {"objects": things, "words": words, "unclear": sorted(unclear)}


def all_words(rig: Rig) -> Contents:
    """A frame that says all that is no object: for the words that there are."""
    ahead = [*DIRECTIONS, *(SPEED_WORDS.get(speed, speed) for speed in SPEEDS), "path", "near"]
    behind = [*WEATHERS, *LANE_WORDS, "lane"]
    told = {AHEAD: ahead, BEHIND: behind}
    words = {camera: told[sector] for sector in told for camera in rig.sectors.get(sector, ())}
    return {"objects": [], "words": words, "unclear": []}
