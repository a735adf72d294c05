"""Controls: what is changed about images or questions to find out whether a model looks, and at what.

`control_views` turns one frame and its questions into what the model is shown and asked. On command lines and in files
a control has a name:

    sighted                    everything as it is; sighted@4 with a budget of 4 queries per camera
    template_majority          no model at all: the most frequent training answer of each question template
    text_only                  no image
    black                      black images
    wrong_scene                the images of another scene
    drop:CAM_FRONT             without that camera's image
    drop_relevant              without the camera that the question names; questions that name none are left out
    black_relevant             the camera that the question names is black; questions that name none are left out
    permuted                   the images go round among the cameras, labels stay
    swap_left_right            the images of left and right cameras change places, labels stay
    corrupt:fog:3              corrupted images, see `corruptions`; `frame_loss` blackens 1 to 5 cameras
    paraphrase                 the question in other words; questions without a rule are left out
    absent_object              new questions about classes that are not in a sector; the answer is "No."

All of it is decided by hashes of scene, frame and `seed`: nothing depends on order or on what was evaluated before.
Which cameras are left and right, and which one a question names, the rig of the data says.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from training.data.rig import Rig
from training.data.rows import FrameRow, Row
from training.evaluation.absent_objects import absent_object_questions, number_of
from training.evaluation.corruptions import IMAGE_CORRUPTIONS, SEVERITIES, corrupt_image
from training.evaluation.paraphrases import paraphrase

Picture = str | Image.Image
Images = dict[str, Picture]  # camera -> path or picture
View = tuple[Images, list[Row]]  # what is shown, and the questions about it

KINDS = {  # kind: (group, what a reader calls it)
    "sighted": ("sighted", "sighted"),
    "template_majority": ("blind", "template majority"),
    "text_only": ("blind", "text only"),
    "black": ("blind", "black"),
    "wrong_scene": ("blind", "wrong scene"),
    "drop": ("cameras", "without {camera}"),
    "drop_relevant": ("cameras", "no image of the camera that the question names"),
    "black_relevant": ("cameras", "a black image of the camera that the question names"),
    "permuted": ("cameras", "the images of other cameras, moved around among them"),
    "swap_left_right": ("cameras", "left cameras' images as the right ones', and the other way round"),
    "corrupt": ("corruptions", "{corruption}, severity {severity}"),
    "absent_object": ("questions", "questions about what is not there, new ones"),
    "paraphrase": ("questions", "the question in other words"),
}
BLIND = tuple(kind for kind, (group, _) in KINDS.items() if group == "blind")
RELEVANT = ("drop_relevant", "black_relevant")
"""Kinds that change the camera that a question names; questions that name none are left out."""
CORRUPTIONS = (*IMAGE_CORRUPTIONS, "frame_loss")
GROUPS = ("all", "blind", "cameras", "corruptions", "questions")


@dataclass(frozen=True)
class Control:
    """One control; `str` gives its name, `parse` reads it."""

    kind: str  # a key of `KINDS`
    camera: str | None = None  # the one that "drop" leaves out
    corruption: str | None = None  # of "corrupt", one of `CORRUPTIONS`
    severity: int | None = None  # of "corrupt", 1 to 5
    budget: int | None = None  # queries per camera, of "sighted" where it is not the run's own

    @classmethod
    def parse(cls, name: str) -> "Control":
        """A control by its name.

        Raises:
            ValueError: there is none of that name; the message lists what there is.
        """
        match name.split(":"):
            case [kind] if kind in KINDS and kind not in ("drop", "corrupt"):
                return cls(kind)
            case ["drop", camera]:
                return cls("drop", camera=camera)
            case ["corrupt", corruption, severity]:
                if corruption not in CORRUPTIONS or severity not in map(str, SEVERITIES):
                    raise ValueError(
                        f"{name}: expected corrupt:NAME:SEVERITY with {', '.join(CORRUPTIONS)} and 1 to 5"
                    )
                return cls("corrupt", corruption=corruption, severity=int(severity))
        kind, _, budget = name.partition("@")
        if kind == "sighted" and budget.isdecimal():
            return cls("sighted", budget=int(budget))
        plain = [kind for kind in KINDS if kind not in ("drop", "corrupt")]
        known = ", ".join((*plain, "drop:CAMERA", "corrupt:NAME:1..5", "sighted@QUERIES"))
        raise ValueError(f"unknown control {name!r}; known: {known}; groups: {', '.join(GROUPS)}")

    def __str__(self) -> str:
        if self.budget is not None:
            return f"{self.kind}@{self.budget}"
        parts = (self.kind, self.camera, self.corruption, self.severity)
        return ":".join(str(part) for part in parts if part is not None)

    @property
    def group(self) -> str:
        """ "sighted", "blind", "cameras", "corruptions", "questions", or "budgets" for sighted with another budget."""
        return KINDS[self.kind][0] if self.budget is None else "budgets"

    @property
    def title(self) -> str:
        """What a reader calls it: "fog, severity 3", "without CAM_BACK"."""
        if self.budget is not None:
            return f"sighted, {self.budget} queries per camera"
        corruption = (self.corruption or "").replace("_", " ")
        return KINDS[self.kind][1].format(camera=self.camera, corruption=corruption, severity=self.severity)


SIGHTED = Control("sighted")


def expand_controls(
    names: Sequence[str], cameras: Sequence[str], severities: Sequence[int] = SEVERITIES
) -> list[Control]:
    """Names and groups ("all", "blind", "cameras", "corruptions", "questions") to controls, each once.

    "sighted" always comes first: every other control is read against it. "cameras" drops each of `cameras`, which the
    model is shown; `severities` are those of the group "corruptions".

    Raises:
        ValueError: a name that is neither, a camera that is not shown, an unknown corruption or severity.
    """
    members = {
        "drop": [f"drop:{camera}" for camera in cameras],
        "corrupt": [f"corrupt:{name}:{severity}" for name in CORRUPTIONS for severity in severities],
    }
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for kind, (group, _) in KINDS.items():
        if group != "sighted":
            for each in (group, "all"):
                groups[each] += members.get(kind, [kind])
    expanded = [SIGHTED]
    for name in (one for given in names for one in groups.get(given, [given])):
        expanded.append(Control.parse(name))
        if expanded[-1].camera is not None and expanded[-1].camera not in cameras:
            shown = ", ".join(cameras)
            raise ValueError(f"{name}: the model is not shown {expanded[-1].camera!r}; it is shown {shown}")
    return list(dict.fromkeys(expanded))


def control_questions(control: Control, rows: Sequence[Row], rig: Rig) -> list[Row]:
    """The questions that a control asks about a frame: its rows, each with the wording to ask in `asked`.

    `question` stays what it was, because the type of a question is read from DriveLM's wording. "absent_object" gives
    new rows with a `camera` of their own.
    """
    if control.kind == "absent_object":
        return absent_object_questions(rows, rig)
    if control.kind in RELEVANT:
        rows = [row for row in rows if rig.named_in(row["question"])]
    wording = paraphrase if control.kind == "paraphrase" else str
    worded = [(row, wording(row["question"])) for row in rows]
    return [{**row, "asked": asked} for row, asked in worded if asked is not None]


def control_views(
    control: Control,
    frame: FrameRow,
    rows: Sequence[Row],
    frames: Sequence[FrameRow],
    cameras: Sequence[str],
    rig: Rig,
    seed: int = 0,
) -> list[View]:
    """What the model is shown and asked under a control.

    Args:
        control: any but "template_majority", which has no images.
        frame: scene_token, frame_token and `images` {camera: path}; `rows` are its questions.
        frames: all frames that "wrong_scene" may choose from.
        cameras: what the model is shown, in this order; a camera that the frame lacks is left out.
        seed: another seed chooses other wrong scenes, permutations and noise.

    Returns:
        (images, questions) pairs that together hold `control_questions(control, rows, rig)`; one pair for all controls
        but those of `RELEVANT`, which show different images to different questions. No pair without questions.

    Raises:
        ValueError: no other scene for "wrong_scene", or a control without images.
    """
    questions = control_questions(control, rows, rig)
    if not questions:
        return []
    shown: dict[str, str] = {camera: frame["images"][camera] for camera in cameras if camera in frame["images"]}
    if control.kind in RELEVANT:
        return _without_relevant(control, shown, questions, rig)
    key = f"{frame['scene_token']}/{frame['frame_token']}/{seed}"
    if control.kind == "wrong_scene":
        other = wrong_scene(frame, frames, seed)["images"]
        return [({camera: other[camera] for camera in shown if camera in other}, questions)]
    return [(control_images(control, shown, key, rig), questions)]


def control_images(control: Control, images: Mapping[str, str], key: str, rig: Rig) -> Images:
    """The images of a control that needs nothing but the frame's own; `key` decides permutations and noise."""
    match control:
        case Control(kind="sighted" | "absent_object" | "paraphrase"):
            return dict(images)
        case Control(kind="text_only"):
            return {}
        case Control(kind="black"):
            return {camera: _black(path) for camera, path in images.items()}
        case Control(kind="drop"):
            return {camera: path for camera, path in images.items() if camera != control.camera}
        case Control(kind="permuted"):
            return permuted(images, key)
        case Control(kind="swap_left_right"):
            return swapped(images, rig)
        case Control(kind="corrupt", corruption=str(name), severity=int(severity)):
            return _corrupted(images, name, severity, key)
    raise ValueError(f"{control} is no control of a frame's own images")


def swapped(images: Mapping[str, str], rig: Rig) -> Images:
    """Each camera shows the image of its counterpart on the other side, where both are there."""
    mirror = counterparts(images, rig)
    return {camera: images[mirror[camera]] for camera in images}


def counterparts(cameras: Iterable[str], rig: Rig) -> dict[str, str]:
    """Each camera's counterpart on the other side; its own name where that is not among them. A map has no side."""
    there = list(cameras)
    mirror = {camera: rig.mirror(camera) if camera in rig else camera for camera in there}
    return {camera: other if other in mirror else camera for camera, other in mirror.items()}


def permuted(images: Mapping[str, str], key: str) -> Images:
    """The images go round by a number of cameras that the key decides: none keeps its place (if there are two)."""
    if len(images) < 2:
        return dict(images)
    shift = 1 + number_of(f"permuted/{key}") % (len(images) - 1)
    paths = list(images.values())
    return dict(zip(images, paths[shift:] + paths[:shift], strict=True))


def wrong_scene(frame: FrameRow, frames: Sequence[FrameRow], seed: int = 0) -> FrameRow:
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
    return others[number_of(f"wrong_scene/{frame['scene_token']}/{frame['frame_token']}/{seed}") % len(others)]


def _without_relevant(control: Control, images: Mapping[str, str], questions: Sequence[Row], rig: Rig) -> list[View]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in questions:
        groups.setdefault(rig.named_in(row["question"]), []).append(row)
    views: list[View] = []
    for named, asked in groups.items():
        shown: Images = {camera: path for camera, path in images.items() if camera not in named}
        if control.kind == "black_relevant":
            shown = {camera: _black(path) if camera in named else path for camera, path in images.items()}
        views.append((shown, asked))
    return views


def _corrupted(images: Mapping[str, str], name: str, severity: int, key: str) -> Images:
    if name == "frame_loss":
        lost = sorted(images, key=lambda camera: number_of(f"frame_loss/{key}/{camera}"))[:severity]
        return {camera: _black(path) if camera in lost else path for camera, path in images.items()}
    changed: Images = {}
    for camera, path in images.items():
        # Dirt stays on its lens from frame to frame, the other fields are drawn anew.
        seed = number_of(f"{name}/{camera}") if name == "lens_dirt" else number_of(f"{name}/{key}/{camera}")
        with Image.open(path) as image:
            changed[camera] = corrupt_image(image, name, severity, seed)
    return changed


def _black(path: str) -> Image.Image:
    with Image.open(path) as image:
        return Image.fromarray(np.zeros((image.height, image.width, 3), dtype=np.uint8))
