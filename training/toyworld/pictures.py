"""Questions about single pictures of the toy world: what a small SmolVLM is pre-trained on, before any driving data.

They stand for the captions and visual questions that a published SmolVLM has seen. On purpose none is worded like
DriveLM's, none needs a second camera, and none asks what the ego car should do. They come with their picture alone
(`picture_frame`), and as documents (`document_frames`), where the picture in question, the only one or one of six, is
named by its camera or by where it looks: a published SmolVLM has seen documents of several images too, finds one of
them, and can read "back left" in CAM_BACK_LEFT.
"""

import random
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from training.data.drivelm import IMAGE_SIZE, key_frame, qa_entry
from training.data.rig import Rig
from training.data.wording import STATUSES, count_word, in_state, plural, plural_in_state, with_article
from training.toyworld.scene import CLASSES, ToyFrame
from training.toyworld.truth import Seen, Truth

_LISTING = "Name everything in the picture."
SHOWS = ("Does the picture show {}?", "Can {} be seen in the picture?", "Is it true that the picture shows {}?")
_COUNTS = ("What number of {} does the picture show?", "Count the {} in the picture.")
_NEAR_METRES = 11.0
_MAX_DESCRIBED = 6
_ASKED_EACH_WAY = 3  # existence questions per picture that are true, and that are false
_WEATHER = {"day": "It is day", "night": "It is night", "rain": "It rains", "fog": "There is fog"}
_BEND = {"straight": "It goes straight.", "left": "It bends to the left.", "right": "It bends to the right."}
_DASHES = {"not moving": "Very short.", "slow": "Short.", "normal": "Long.", "fast": "Very long."}


def picture_questions(frame: ToyFrame, truth: Truth, camera: str) -> list[tuple[str, str]]:
    """`[(question, answer), …]` about one picture; the same on every call.

    A class of which the picture shows something badly is not asked about (`Truth.doubtful`).
    """
    rng = frame.random(f"picture/{camera}")
    seen = sorted((item for item in truth.seen if item.camera == camera), key=lambda item: item.box[0])
    doubtful = {name for name, where in truth.doubtful if where == camera}
    pairs = [
        ("What is the weather in the picture?", f"{_WEATHER[frame.weather]}."),
        *_about_one(seen, doubtful, rng),
        *_existence(seen, doubtful, rng),
        *_counts(seen, doubtful, rng),
    ]
    if not doubtful:
        pairs += [("Describe the picture.", _description(frame, seen)), (_LISTING, _listing(seen))]
        nearest = min(seen, key=lambda item: item.item.distance, default=None)
        if nearest is not None:
            pairs.append(("What is nearest to the camera?", f"The {nearest.item.name}."))
    if frame.rig.sector(camera) in ("front", "back"):
        pairs.append(("How does the road go on?", _BEND[frame.direction]))
        pairs.append(("How long are the dashes on the road?", _DASHES[frame.speed]))
    rng.shuffle(pairs)
    return pairs


def _place(item: Seen) -> str:
    middle = (item.box[0] + item.box[2]) / 2 / IMAGE_SIZE[0]
    return "on the left" if middle < 1 / 3 else "on the right" if middle > 2 / 3 else "in the middle"


def _phrase(item: Seen) -> str:
    """`a parked white car`, `a moving pedestrian in pink`, `a red light`."""
    thing, status = item.item, item.item.status
    if thing.name == "traffic light":
        return f"a {status} light"
    words = f"pedestrian in {thing.colour}" if thing.name == "pedestrian" else f"{thing.colour} {thing.name}"
    return with_article(in_state(words, status))


def _description(frame: ToyFrame, seen: Sequence[Seen]) -> str:
    parts = [
        f"{_phrase(item)} {_place(item)}, {'near' if item.item.distance < _NEAR_METRES else 'far'}"
        for item in seen[:_MAX_DESCRIBED]
    ]
    return ". ".join(part[0].upper() + part[1:] for part in [_WEATHER[frame.weather], *parts]) + "."


def _listing(seen: Sequence[Seen]) -> str:
    counts = {name: sum(item.item.name == name for item in seen) for name in STATUSES}
    parts = [f"{count_word(count)} {name if count == 1 else plural(name)}" for name, count in counts.items() if count]
    text = ", ".join(parts) or "nothing"
    return f"{text[0].upper()}{text[1:]}."


def _about_one(seen: Sequence[Seen], doubtful: set[str], rng: random.Random) -> list[tuple[str, str]]:
    """Colour, state and place of objects that are the only ones of their class."""
    pairs = []
    for item in seen:
        name, status = item.item.name, item.item.status
        if name in doubtful or sum(other.item.name == name for other in seen) > 1:
            continue
        pairs.append((f"Where is the {name}?", f"{_place(item).capitalize()}."))
        if status is not None:
            pairs.append((f"Which state is the {name} in?", f"{status.capitalize()}."))
        if name not in ("traffic light", "barrier", "traffic cone"):
            pairs.append((f"Which colour has the {name}?", f"{item.item.colour.capitalize()}."))
    return rng.sample(pairs, min(len(pairs), 4))


def _existence(seen: Sequence[Seen], doubtful: set[str], rng: random.Random) -> list[tuple[str, str]]:
    """As many "Yes." as "No.", with and without a state."""
    kinds = [(name, status) for name in (*CLASSES, "traffic light") for status in (None, *STATUSES[name])]
    there = {(item.item.name, status) for item in seen for status in (None, item.item.status)}
    asked = [kind for kind in kinds if kind[0] not in doubtful]
    true = [kind for kind in asked if kind in there]
    false = [kind for kind in asked if kind not in there]
    count = min(_ASKED_EACH_WAY, len(true), len(false)) or 1
    return [
        (rng.choice(SHOWS).format(_kind(name, status, rng)), answer)
        for chosen, answer in ((true, "Yes."), (false, "No."))
        for name, status in rng.sample(chosen, min(count, len(chosen)))
    ]


def _kind(name: str, status: str | None, rng: random.Random) -> str:
    """`a moving car`, `any moving cars` or `moving cars`."""
    article = rng.choice(("a ", "any ", ""))
    if article == "a ":
        return with_article(in_state(name, status))
    return article + plural_in_state(name, status)


def _counts(seen: Sequence[Seen], doubtful: set[str], rng: random.Random) -> list[tuple[str, str]]:
    names = [name for name in CLASSES if name not in doubtful]
    shown = [name for name in names if any(item.item.name == name for item in seen)]
    chosen = {*rng.sample(shown, min(2, len(shown))), *rng.sample(names, min(1, len(names)))}
    counts = {name: sum(item.item.name == name for item in seen) for name in sorted(chosen)}
    return [
        (rng.choice(_COUNTS).format(plural(name)), f"{count_word(count).capitalize()}.")
        for name, count in counts.items()
    ]


def picture_frame(frame: ToyFrame, truth: Truth, camera: str, path: str) -> dict[str, Any]:
    """A picture with its questions as a key frame of a DriveLM file, one that has a single camera."""
    perception = [qa_entry(question, answer) for question, answer in picture_questions(frame, truth, camera)]
    return _key_frame(perception, {camera: path}, frame)


def document_frames(frame: ToyFrame, pictures: Collection[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`{token: key frame}`: a frame's pictures, as `picture_frame` writes them, all together and each alone.

    Every question says which picture is meant: `CAM_BACK: Describe the picture.`, `Describe the picture. To the back.`
    or `Describe the picture to the back.`; and once for each camera it is `Which camera looks to the back?` A listing
    repeats where it looks before it tells what is there, `To the back: One car.`: from that a small language model
    learns within minutes which of six pictures is meant, and from bare answers it does not, because a word of the
    question must reach the answer first. Comparing what is asked with what is seen comes with single pictures first.
    """
    rng = frame.random("picture/scene")
    placed = _placed(frame.rig, pictures, rng)
    paths = {camera: path for picture in pictures for camera, path in picture["image_paths"].items()}
    perception = [pair for asked in placed.values() for pair in asked]
    rng.shuffle(perception)
    alone = {
        f"{frame.token}-{camera}": _key_frame(placed[camera], {camera: path}, frame) for camera, path in paths.items()
    }
    return {frame.token: _key_frame(perception, paths, frame), **alone}


def _placed(rig: Rig, pictures: Iterable[dict[str, Any]], rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    """{camera: its picture's questions, each with the place in front or behind}."""
    placed: dict[str, list[dict[str, Any]]] = {}
    for picture in pictures:
        for camera in picture["image_paths"]:
            sector = rig.sector(camera)
            alone = rig.sectors[sector] == (camera,)  # or the sector's words would tell of two pictures
            placed[camera] = [qa_entry(f"Which camera looks to the {sector}?", f"{camera}.")] if alone else []
            for item in picture["QA"]["perception"]:
                place = rng.choice((camera, f"to the {sector}")) if alone else camera
                where = place if place == camera else f"{place[0].upper()}{place[1:]}"
                wordings = [f"{where}: {item['Q']}", f"{item['Q']} {where}."]
                if "picture" in item["Q"]:
                    wordings.append(item["Q"].replace("picture", f"picture {place}"))
                answer = f"{where}: {item['A']}" if item["Q"] == _LISTING else item["A"]
                placed[camera].append({**item, "Q": rng.choice(wordings), "A": answer})
    return placed


def _key_frame(perception: list[dict[str, Any]], paths: dict[str, str], frame: ToyFrame) -> dict[str, Any]:
    return key_frame({"perception": perception}, paths, weather=frame.weather)
