"""Controls: what is changed about images or questions to find out whether a model looks, and at what.

A control is a name. `control_views` turns one frame and its questions into what the model is shown and asked:

    sighted                    everything as it is
    template_majority          no model at all: the most frequent training answer of each question template
    text_only                  no image
    black                      black images
    wrong_scene                the images of another scene
    drop:CAM_FRONT             without that camera's image
    drop_relevant              without the camera that the question names; questions that name none are left out
    permuted                   the images go round among the cameras, labels stay
    swap_left_right            the images of left and right cameras change places, labels stay
    corrupt:fog:3              corrupted images, see `corruptions`; `frame_loss` blackens 1 to 5 cameras
    paraphrase                 the question in other words; questions without a rule are left out
    absent_object              new questions about classes that are not in a sector; the answer is "No."

All of it is decided by hashes of scene, frame and `seed`: nothing depends on order or on what was evaluated before.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from training.data.rig import NUSCENES
from training.data.rows import Row
from training.data.wording import STATUSES, plural
from training.evaluation.corruptions import IMAGE_CORRUPTIONS, SEVERITIES, corrupt_image
from training.metrics.answers import parse_counts, parse_yes_no

Picture = str | Image.Image
Images = dict[str, Picture]  # camera -> path or picture
View = tuple[Images, list[Row]]  # what is shown, and the questions about it

BLIND = ("template_majority", "text_only", "black", "wrong_scene")
CAMERA_CONTROLS = ("drop_relevant", "permuted", "swap_left_right")
QUESTION_CONTROLS = ("absent_object", "paraphrase")
CORRUPTIONS = (*IMAGE_CORRUPTIONS, "frame_loss")
GROUPS = ("all", "blind", "cameras", "corruptions", "questions")

SECTORS = {name: NUSCENES.sector(name) for name in NUSCENES.names}
_MIRRORED = {"CAM_FRONT_LEFT": "CAM_FRONT_RIGHT", "CAM_BACK_LEFT": "CAM_BACK_RIGHT"}
_MIRROR = _MIRRORED | {right: left for left, right in _MIRRORED.items()}
_AROUND = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")

_SECTOR_WORDS = "|".join(sorted(SECTORS.values(), key=len, reverse=True))
_PLACE = re.compile(rf"\b(?:to|in|at) the ({_SECTOR_WORDS})(?: view\b| of (?:the )?ego\b)")
_IN_FRONT, _BEHIND = re.compile(r"\bin front of (?:the )?ego\b"), re.compile(r"\bbehind (?:the )?ego\b")
_CAMERA_OF_SECTOR = {sector: camera for camera, sector in SECTORS.items()}

# "traffic light" is left out: DriveLM lists lights by other questions, so a list without one does not mean that there
# is none.
ABSENT_CLASSES = tuple(name for name in STATUSES if name != "traffic light")
_CLASS = re.compile("|".join(rf"\b{plural(name)}\b|\b{name}\b" for name in sorted(STATUSES, key=len, reverse=True)))
_LISTING = re.compile(rf"What are objects to the ({_SECTOR_WORDS}) of the ego car\?")

_OPTIONS = " Please select the correct answer from the following options:"
_OPTIONS_REWRITTEN = " Which of the following options is correct? Answer with its letter. The following options:"
_TAG = r"(<c\d+,[^>]*>)"
# DriveLM's wordings and others for them. Each answer stays right: only words that carry no information change.
PARAPHRASES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"Are there (.+) to the (.+) of the ego car\?", r"Can any \1 be seen to the \2 of the ego vehicle?"),
        (r"What are objects to the (.+) of the ego car\?", r"Name the objects to the \1 of the ego vehicle."),
        (r"How many (.+) are there to the (.+) of the ego car\?", r"Count the \1 to the \2 of the ego vehicle."),
        (
            r"What is the closest object to the (.+) of the ego car\?",
            r"Which object to the \1 of the ego vehicle is nearest to it?",
        ),
        (
            r"What is the status of the (.+) that (is|are) to the (.+) of the ego car\?",
            r"The \1 to the \3 of the ego vehicle: what \2 their status?",
        ),
        (r"Is there any traffic element in the (.+) view\?", r"Can any traffic element be seen in the \1 view?"),
        (rf"What is the visual description of {_TAG}\?", r"Describe what \1 looks like."),
        (rf"What is the observed status of object {_TAG}\?", r"Which status does object \1 have?"),
        (rf"What is the moving status of object {_TAG}\?", r"How does object \1 move?"),
        (rf"What is the future state of {_TAG}\?", r"Which state will \1 be in next?"),
        (
            rf"Is {_TAG} an object that the ego vehicle should consider in the current scene\?",
            r"Should the ego vehicle consider \1 in the current scene?",
        ),
        (
            rf"Is it necessary for the ego vehicle to take {_TAG} into account\?",
            r"Does the ego vehicle have to take \1 into account?",
        ),
        (
            rf"Would {_TAG} be in the moving direction of the ego vehicle\?",
            r"Is \1 going to be in the direction in which the ego vehicle moves?",
        ),
        (rf"Is {_TAG} a traffic sign or a road barrier\?", r"Would you call \1 a traffic sign or a road barrier?"),
        (r"What is the target action of the ego vehicle\?", r"Which action does the ego vehicle aim at?"),
        (
            r"In this scenario, what are (safe|dangerous) actions to take for the ego vehicle\?",
            r"Which actions of the ego vehicle would be \1 in this scenario?",
        ),
        (
            r"What is the traffic signal that the ego vehicle should pay attention to\?",
            r"To which traffic signal should the ego vehicle pay attention?",
        ),
        (r"Predict the behavior of the ego vehicle\.", r"How will the ego vehicle behave?"),
    )
)


def expand_controls(names: Sequence[str], cameras: Sequence[str], severities: Sequence[int] = SEVERITIES) -> list[str]:
    """Names and groups ("all", "blind", "cameras", "corruptions", "questions") to control names, each once.

    "sighted" always comes first: every other control is read against it.

    Args:
        names: control names and groups.
        cameras: the cameras that the model is shown; "cameras" drops each of them.
        severities: of the group "corruptions".

    Raises:
        ValueError: a name that is neither, a camera that is not shown, an unknown corruption or severity.
    """
    groups = {
        "blind": list(BLIND),
        "cameras": [*(f"drop:{camera}" for camera in cameras), *CAMERA_CONTROLS],
        "corruptions": [f"corrupt:{name}:{severity}" for name in CORRUPTIONS for severity in severities],
        "questions": list(QUESTION_CONTROLS),
    }
    groups["all"] = [control for group in groups.values() for control in group]
    expanded = ["sighted"]
    for name in names:
        expanded += groups.get(name, [name])
    for name in expanded:
        check_control(name, cameras)
    return list(dict.fromkeys(expanded))


def check_control(name: str, cameras: Sequence[str]) -> None:
    """Raise a ValueError that lists what there is, if `name` is no control for a model shown `cameras`."""
    kind, *rest = name.split(":")
    if not rest and kind in ("sighted", *BLIND, *CAMERA_CONTROLS, *QUESTION_CONTROLS):
        return
    if kind == "drop" and len(rest) == 1:
        if rest[0] not in cameras:
            raise ValueError(f"{name}: the model is not shown {rest[0]!r}; it is shown {', '.join(cameras)}")
        return
    if kind == "corrupt" and len(rest) == 2:
        corruption, severity = rest
        if corruption not in CORRUPTIONS or severity not in map(str, SEVERITIES):
            raise ValueError(f"{name}: expected corrupt:NAME:SEVERITY with {', '.join(CORRUPTIONS)} and 1 to 5")
        return
    known = ", ".join(("sighted", *BLIND, *CAMERA_CONTROLS, *QUESTION_CONTROLS, "drop:CAMERA", "corrupt:NAME:1..5"))
    raise ValueError(f"unknown control {name!r}; known: {known}; groups: {', '.join(GROUPS)}")


def control_questions(control: str, rows: Sequence[Row]) -> list[Row]:
    """The questions that a control asks about a frame: its rows, each with the wording to ask in `asked`.

    `question` stays what it was, because the type of a question is read from DriveLM's wording. "absent_object" gives
    new rows with a `camera` of their own.
    """
    if control == "absent_object":
        return absent_object_questions(rows)
    asked = []
    for row in rows:
        if control == "paraphrase":
            wording = paraphrase(row["question"])
        elif control == "drop_relevant":
            wording = row["question"] if relevant_cameras(row["question"]) else None
        else:
            wording = row["question"]
        if wording is not None:
            asked.append({**row, "asked": wording})
    return asked


def control_views(
    control: str, frame: Row, rows: Sequence[Row], frames: Sequence[Row], cameras: Sequence[str], seed: int = 0
) -> list[View]:
    """What the model is shown and asked under a control.

    Args:
        control: any but "template_majority", which has no images.
        frame: scene_token, frame_token and `images` {camera: path}.
        rows: the frame's questions.
        frames: all frames that "wrong_scene" may choose from.
        cameras: what the model is shown, in this order; a camera that the frame lacks is left out.
        seed: another seed chooses other wrong scenes, permutations and noise.

    Returns:
        (images, questions) pairs that together hold `control_questions(control, rows)`; one pair for all controls but
        "drop_relevant", which shows different cameras to different questions. No pair without questions.

    Raises:
        ValueError: unknown control, or no other scene for "wrong_scene".
    """
    check_control(control, cameras)
    questions = control_questions(control, rows)
    if not questions:
        return []
    shown: dict[str, str] = {camera: frame["images"][camera] for camera in cameras if camera in frame["images"]}
    if control == "drop_relevant":
        return _without_relevant(shown, questions)
    key = f"{frame['scene_token']}/{frame['frame_token']}/{seed}"
    if control == "wrong_scene":
        other = wrong_scene(frame, frames, seed)["images"]
        return [({camera: other[camera] for camera in shown if camera in other}, questions)]
    return [(control_images(control, shown, key), questions)]


def control_images(control: str, images: Mapping[str, str], key: str) -> Images:
    """The images of a control that needs nothing but the frame's own.

    Args:
        control: "sighted", "text_only", "black", "drop:…", "permuted", "swap_left_right", "corrupt:…", or one of the
            question controls, which leave the images alone.
        images: {camera: path}.
        key: names the frame; decides permutations and noise.
    """
    kind, *rest = control.split(":")
    if kind in ("sighted", *QUESTION_CONTROLS):
        return dict(images)
    if kind == "text_only":
        return {}
    if kind == "black":
        return {camera: _black(path) for camera, path in images.items()}
    if kind == "drop":
        return {camera: path for camera, path in images.items() if camera != rest[0]}
    if kind == "permuted":
        return permuted(images, key)
    if kind == "swap_left_right":
        return {camera: images.get(_MIRROR.get(camera, camera), path) for camera, path in images.items()}
    if kind == "corrupt":
        return _corrupted(images, rest[0], int(rest[1]), key)
    raise ValueError(f"{control} is no control of a frame's own images")


def permuted(images: Mapping[str, str], key: str) -> Images:
    """The images go round by a number of cameras that the key decides: none keeps its place (if there are two)."""
    cameras, paths = list(images), list(images.values())
    if len(cameras) < 2:
        return dict(images)
    shift = 1 + _hash(f"permuted/{key}") % (len(cameras) - 1)
    return dict(zip(cameras, paths[shift:] + paths[:shift], strict=True))


def wrong_scene(frame: Row, frames: Sequence[Row], seed: int = 0) -> Row:
    """A frame of another scene, chosen by hash; one with all of this frame's cameras where there is one.

    Raises:
        ValueError: there is no other scene.
    """
    others = [other for other in frames if other["scene_token"] != frame["scene_token"]]
    complete = [other for other in others if frame["images"].keys() <= other["images"].keys()]
    others = sorted(complete or others, key=lambda other: (other["scene_token"], other["frame_token"]))
    if not others:
        raise ValueError(
            f"wrong_scene needs the images of another scene than {frame['scene_token']}; the split has only this one"
        )
    return others[_hash(f"wrong_scene/{frame['scene_token']}/{frame['frame_token']}/{seed}") % len(others)]


def relevant_cameras(question: str) -> tuple[str, ...]:
    """The cameras that a question names, by sector words or object tags, in canonical order.

    >>> relevant_cameras("Are there cars to the back left of the ego car?")
    ('CAM_BACK_LEFT',)
    """
    named = set(re.findall(r"\bCAM_[A-Z_]+\b", question))
    named |= {_CAMERA_OF_SECTOR[sector] for sector in _PLACE.findall(question)}
    if _IN_FRONT.search(question):
        named.add("CAM_FRONT")
    if _BEHIND.search(question):
        named.add("CAM_BACK")
    return tuple(camera for camera in SECTORS if camera in named)


def paraphrase(question: str) -> str | None:
    """The question in other words with the same answer, or None where there is no rule for it.

    >>> paraphrase("Are there moving cars to the back of the ego car?")
    'Can any moving cars be seen to the back of the ego vehicle?'
    """
    stem, options, listed = question.partition(_OPTIONS)
    for pattern, replacement in PARAPHRASES:
        if pattern.fullmatch(stem):
            rewritten = pattern.sub(replacement, stem)
            if " their status?" in rewritten and " is their" in rewritten:
                rewritten = rewritten.replace(" is their", " is its")
            return rewritten + (_OPTIONS_REWRITTEN + listed if options else "")
    return None


def absent_object_questions(rows: Sequence[Row]) -> list[Row]:
    """One question per sector about a class that is not there; the answer is "No.".

    Only sectors whose objects the frame lists ("What are objects to the back of the ego car?") are asked about. The
    class is neither there nor in a neighbouring sector, whose objects may reach into the picture; one that stands
    elsewhere around the car is preferred: a model that mixes up its cameras says "Yes.".

    Returns:
        rows with question_id `{scene}_{frame}_absent-{camera}`, `asked`, and the `camera` asked about.
    """
    present = _classes_by_camera(rows)
    everywhere = set().union(*present.values()) if present else set()
    questions: list[Row] = []
    for row in rows:
        listing = _LISTING.fullmatch(row["question"])
        if not listing:
            continue
        camera = _CAMERA_OF_SECTOR[listing[1]]
        place = _AROUND.index(camera)
        near = [camera, _AROUND[place - 1], _AROUND[(place + 1) % len(_AROUND)]]
        nearby = set().union(*(present.get(name, set()) for name in near))
        absent = [name for name in ABSENT_CLASSES if name not in nearby]
        candidates = [name for name in absent if name in everywhere] or absent
        if not candidates:
            continue
        identifier = f"{row['scene_token']}_{row['frame_token']}_absent-{camera}"
        if any(identifier == question["question_id"] for question in questions):
            continue
        name = candidates[_hash(identifier) % len(candidates)]
        text = f"Are there {plural(name)} to the {listing[1]} of the ego car?"
        new = {"question_id": identifier, "question": text, "asked": text, "answer": "No.", "camera": camera}
        questions.append({**row, **new, "objects": [], "tag": []})
    return questions


def _classes_by_camera(rows: Iterable[Row]) -> dict[str, set[str]]:
    """Class words that a frame's own questions and answers place in each camera's sector."""
    singular = {form: name for name in STATUSES for form in (name, plural(name))}
    present: dict[str, set[str]] = {}
    for row in rows:
        question, answer = row["question"], row["answer"]
        if parse_yes_no(answer) == "no" or 0 in parse_counts(answer).values():
            continue
        text = f"{question} {answer}" if _PLACE.search(question) else ""
        for camera in relevant_cameras(question):
            present.setdefault(camera, set()).update(singular[word] for word in _CLASS.findall(text))
    return present


def _without_relevant(images: Mapping[str, str], questions: Sequence[Row]) -> list[View]:
    views: dict[tuple[str, ...], list[Row]] = {}
    for row in questions:
        views.setdefault(relevant_cameras(row["question"]), []).append(row)
    return [
        ({camera: path for camera, path in images.items() if camera not in dropped}, asked)
        for dropped, asked in views.items()
    ]


def _corrupted(images: Mapping[str, str], name: str, severity: int, key: str) -> Images:
    if name == "frame_loss":
        lost = sorted(images, key=lambda camera: _hash(f"frame_loss/{key}/{camera}"))[:severity]
        return {camera: _black(path) if camera in lost else path for camera, path in images.items()}
    changed: Images = {}
    for camera, path in images.items():
        # Dirt stays on its lens from frame to frame, the other fields are drawn anew.
        seed = _hash(f"{name}/{camera}") if name == "lens_dirt" else _hash(f"{name}/{key}/{camera}")
        with Image.open(path) as image:
            changed[camera] = corrupt_image(image, name, severity, seed)
    return changed


def _black(path: str) -> Image.Image:
    with Image.open(path) as image:
        return Image.fromarray(np.zeros((image.height, image.width, 3), dtype=np.uint8))


def _hash(key: str) -> int:
    """A number that is the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
