"""DriveLM JSON, read as frames and questions and written. No image is opened here.

Understands DriveLM-nuScenes v1.0 and v1.1 train files and the challenge's validation and test files, which share one
structure (OpenDriveLab/DriveLM, docs/data_prep_nus.md, and the sample files of its challenge folder):

    {scene_token: {"scene_description": ...,
                   "key_frames": {frame_token: {"key_object_infos": ...,
                                                "QA": {category: [{"Q": ..., "A": ..., "tag": [0]}, ...]},
                                                "image_paths": {"CAM_FRONT": "../nuscenes/samples/...", ...}}}}}

`scene_description` tells the future and `key_object_infos` holds the boxes: both are ground truth, so neither is
carried into a `Frame` and they cannot reach a prompt; of the key objects only classes and states are kept, as
`contents`. Only challenge files have `tag`; their hidden answers are empty.

The release is too large to hold as Python objects beside a training job, and an error in it must name a byte. json
reads only whole files and ijson reports no byte positions, hence the scene-by-scene reader here.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from training.data.contents import Contents, contents_of_key_objects

CATEGORIES = ("perception", "prediction", "planning", "behavior")
"""In the order in which the challenge numbers a frame's questions, whatever the order in the file."""

METRICS = ("accuracy", "GPT", "language", "match")
"""What the challenge's tags, 0 to 3, ask for."""

IMAGE_SIZE = (1600, 900)
"""Width and height in pixels of the images that the coordinates refer to."""

PIXEL_TAG = re.compile(r"<(c\d+),([A-Za-z_]\w*),(\d+\.\d),(\d+\.\d)>")
"""The challenge's object reference, for example `<c1,CAM_BACK,1088.3,497.5>`: id, camera, x and y of the centre."""

NORMALISED_TAG = re.compile(r"<(c\d+),([A-Za-z_]\w*),(\d\.\d{3}),(\d\.\d{3})>")
"""The same with x and y as shares of the image's width and height, for example `<c1,CAM_BACK,0.680,0.553>`."""

_NUMBER = r"(\d+\.\d+)"
_BOX = re.compile(rf"\(([^(),]+), ([^(),]+), {_NUMBER}, {_NUMBER}, {_NUMBER}, {_NUMBER}\)")
"""A traffic element, `(traffic light, green, 674.86, 0.14, 723.33, 109.18)`: category, state, x1, y1, x2, y2."""

_BOX_REQUEST = "x1, y1, x2, y2"
_READ_BYTES = 1 << 22
_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_TOKEN = 16
"""More characters than any JSON token but a string has: an error further from the end is no matter of a cut token."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a key frame."""

    number: int  # position among all questions of the frame, as the challenge counts them
    category: str  # a key of the frame's `QA`, normally one of `CATEGORIES`
    question: str  # stripped; empty where the file has none
    answer: str  # the same; challenge files with hidden answers have none
    tag: tuple[int, ...] | None  # the `METRICS` that the challenge applies, by number; None in train files


@dataclass(frozen=True, slots=True)
class Frame:
    """One key frame: tokens, image paths by camera as the file has them, and its questions in challenge order."""

    scene_token: str
    frame_token: str
    image_paths: dict[str, str]
    questions: list[Question]
    contents: Contents | None  # what its key objects tell; None: it has none

    def question_id(self, question: Question) -> str:
        """The challenge's id of a question, `{scene_token}_{frame_token}_{number}`."""
        return f"{self.scene_token}_{self.frame_token}_{question.number}"


def read_frames(path: str | os.PathLike[str], on_bytes: Callable[[int], object] | None = None) -> Iterator[Frame]:
    """Yield the key frames of a DriveLM file, holding one scene in memory at a time.

    Args:
        path: a DriveLM train or challenge JSON file.
        on_bytes: called with the number of bytes read since the last call, for a progress bar.

    Raises:
        ValueError: the JSON is truncated, malformed or nested without end, a key or a frame token appears twice, or
            the structure is not DriveLM's. The message has the byte position; frames before it have been yielded by
            then.
    """
    owners: dict[str, str] = {}
    with open(path, "rb") as file:
        reader = _ObjectReader(file, os.fspath(path), on_bytes)
        for scene_token, scene, position in reader.items():
            _reject_surrogates(scene_token, f"{os.fspath(path)}: the scene at byte {position}")
            where = f"{os.fspath(path)}: scene {scene_token} at byte {position}"
            key_frames = _expect(scene, dict, where).get("key_frames")
            for frame_token, frame in _expect(key_frames, dict, f"{where}, key_frames").items():
                if frame_token in owners:  # it could land in two splits
                    raise ValueError(f"{where}: frame {frame_token} appears in scene {owners[frame_token]} as well")
                owners[frame_token] = scene_token
                _reject_surrogates(frame_token, where)
                yield _parse_frame(scene_token, frame_token, frame, f"{where}, frame {frame_token}")


def qa_entry(question: str, answer: str, tag: int | None = None) -> dict[str, Any]:
    """A question as a key frame holds it; `tag` is the challenge's metric."""
    entry = {"Q": question, "A": answer, **dict.fromkeys(("C", "con_up", "con_down", "cluster", "layer"))}  # all null
    return entry if tag is None else {**entry, "tag": [tag]}


def key_frame(
    questions: Mapping[str, list[dict[str, Any]]],
    image_paths: dict[str, str],
    key_objects: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A key frame of a DriveLM file.

    Args:
        questions: {category: its `qa_entry`s}; a category that has none may be left out.
        image_paths: {camera: path}, as the release has them: `../nuscenes/samples/...`.
        key_objects: by tag, what a person annotated.
        more: keys that DriveLM does not have, such as the weather.
    """
    by_category = {category: questions.get(category, []) for category in CATEGORIES}
    return {"key_object_infos": dict(key_objects or {}), "QA": by_category, "image_paths": image_paths, **more}


def write_scenes(path: str | os.PathLike[str], scenes: Iterable[tuple[str, str, Mapping[str, Any]]]) -> None:
    """Write a DriveLM file scene by scene: the whole file as objects would take a multiple of its size.

    Args:
        path: the file.
        scenes: (scene token, description, {frame token: `key_frame`}).
    """
    with open(path, "w", encoding="utf-8") as file:
        file.write("{")
        for number, (token, description, key_frames) in enumerate(scenes):
            content = {"scene_description": description, "key_frames": key_frames}
            file.write(f"{',' if number else ''}\n{json.dumps(token)}: {json.dumps(content)}")
        file.write("\n}\n")


def read_scenes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A whole DriveLM file as objects, to be written again with changes.

    Raises:
        ValueError: the file is no complete JSON, or its frames lack what DriveLM's have.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            scenes = json.load(file)
        for scene in scenes.values():
            for frame in scene["key_frames"].values():
                frame["image_paths"], frame["QA"]  # noqa: B018  both are used further on
    except json.JSONDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is no complete JSON file: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{os.fspath(path)} is not in DriveLM's format "
            f"{{scene: {{key_frames: {{frame: {{QA, image_paths}}}}}}}}: {type(error).__name__}: {error}"
        ) from error
    return scenes


def find_tags(text: str) -> list[str]:
    """The object tags in a text, in pixels or normalised, in order of first occurrence and without repeats."""
    spans = [match for pattern in (PIXEL_TAG, NORMALISED_TAG) for match in pattern.finditer(text)]
    return list(dict.fromkeys(match.group() for match in sorted(spans, key=lambda match: match.start())))


def tag_camera(tag: str) -> str:
    """The camera that an object tag names."""
    return tag.split(",")[1]


def has_malformed_tag(text: str) -> bool:
    """Whether something in the text starts like an object tag but is none."""
    return "<c" in text and "<c" in PIXEL_TAG.sub("", text)


def uses_coordinates(question: str, answer: str) -> bool:
    """Whether a question or its answer holds object tags or boxes, or asks for boxes."""
    held = (pattern.search(text) for text in (question, answer) for pattern in (PIXEL_TAG, _BOX))
    return _BOX_REQUEST in question or any(held)


def normalise_coordinates(text: str) -> str:
    """Replace pixels in object tags and traffic element boxes by shares of the image, with three decimals."""
    return _scale(text, PIXEL_TAG, tag_decimals=3, box_decimals=3, factors=(1 / IMAGE_SIZE[0], 1 / IMAGE_SIZE[1]))


def denormalise_coordinates(text: str) -> str:
    """Undo `normalise_coordinates` to within half a thousandth of the image (0.8 pixels in x, 0.45 in y).

    The challenge's metrics take pixels, so predictions of a model that was trained on shares go through here.
    """
    return _scale(text, NORMALISED_TAG, tag_decimals=1, box_decimals=2, factors=(IMAGE_SIZE[0], IMAGE_SIZE[1]))


def scene_split(scene_token: str) -> str:
    """The split of a scene: 80 % train, 10 % validation, 10 % test, from the sha256 of its token alone.

    All frames of a scene share it, and it stays the same when scenes are added or removed.
    """
    share = int.from_bytes(hashlib.sha256(scene_token.encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.8 else "validation" if share < 0.9 else "test"


def split_hash(splits: Mapping[str, str]) -> str:
    """sha256 over the sorted (scene_token, split) pairs: equal hashes mean equal splits of equal scenes."""
    lines = "".join(f"{scene_token}\t{split}\n" for scene_token, split in sorted(splits.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _parse_frame(scene_token: str, frame_token: str, frame: Any, where: str) -> Frame:
    fields = _expect(frame, dict, where)
    by_category = _optional(fields.get("QA"), dict, f"{where}, QA")
    image_paths = _optional(fields.get("image_paths"), dict, f"{where}, image_paths")
    for name in (*by_category, *image_paths):
        _reject_surrogates(name, where)
    for camera, image_path in image_paths.items():
        _expect(image_path, str, f"{where}, image_paths, {camera}")
        _reject_surrogates(image_path, f"{where}, image_paths, {camera}")
    items = [
        (category, item)
        for category in dict.fromkeys((*CATEGORIES, *by_category))
        for item in _optional(by_category.get(category), list, f"{where}, QA, {category}")
    ]
    questions = [_parse_question(number, *item, f"{where}, question {number}") for number, item in enumerate(items)]
    return Frame(scene_token, frame_token, image_paths, questions, _contents(fields.get("key_object_infos")))


def _contents(infos: Any) -> Contents | None:
    """What `key_object_infos` tell; nothing is asked about them, so that what is malformed is left out."""
    objects = [
        (tag_camera(tag), {key: value for key, value in info.items() if isinstance(value, str)})
        for tag, info in (infos.items() if isinstance(infos, dict) else ())
        if PIXEL_TAG.fullmatch(tag) and isinstance(info, dict)
    ]
    return contents_of_key_objects(objects) if objects else None


def _parse_question(number: int, category: str, item: Any, where: str) -> Question:
    fields = _expect(item, dict, where)
    texts = [_optional(fields.get(key), str, f"{where}, {key}").strip() for key in ("Q", "A")]
    for text in texts:
        _reject_surrogates(text, where)
    tag = None
    if "tag" in fields:
        values = _expect(fields["tag"], list, f"{where}, tag")
        tag = tuple(_expect(value, int, f"{where}, tag") for value in values)
        if not all(0 <= value < len(METRICS) for value in tag):
            raise ValueError(f"{where}, tag: expected numbers of metrics, 0 to {len(METRICS) - 1}, got {list(tag)}")
    return Question(number, category, texts[0], texts[1], tag)


def _expect(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}
        given = names[type(value)] if isinstance(value, dict | list) else json.dumps(value)[:80]
        raise ValueError(f"{where}: expected {names[kind]}, got {given}")
    return value


def _optional(value: Any, kind: type, where: str) -> Any:
    """The value, or an empty one of its kind where the file has null or nothing."""
    return kind() if value is None else _expect(value, kind, where)


def _reject_surrogates(text: str, where: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the text holds half of a surrogate pair, {text[error.start]!a}") from None


def _scale(text: str, tag: re.Pattern[str], tag_decimals: int, box_decimals: int, factors: tuple[float, float]) -> str:
    def scaled(match: re.Match[str], decimals: int, comma: str) -> str:
        values = [float(value) * factors[i % 2] for i, value in enumerate(match.groups()[2:])]  # x, y, x, y
        parts = [match[1], match[2], *(f"{value:.{decimals}f}" for value in values)]
        return f"{match[0][0]}{comma.join(parts)}{match[0][-1]}"  # in the same brackets

    text = tag.sub(lambda match: scaled(match, tag_decimals, ","), text)
    return _BOX.sub(lambda match: scaled(match, box_decimals, ", "), text)


class _ObjectReader:
    """Reads one JSON object from a file, value by value, knowing the byte position of everything.

    It decodes from a window of text that grows while a value is cut by the window's end and drops what is read.
    """

    def __init__(self, file: BinaryIO, name: str, on_bytes: Callable[[int], object] | None) -> None:
        self._file = file
        self._name = name
        self._on_bytes = on_bytes
        self._size = os.fstat(file.fileno()).st_size
        self._json = json.JSONDecoder(object_pairs_hook=_unique_keys)
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._window = ""
        self._index = 0  # characters of the window that are read
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:  # editors on Windows begin a file with one
            file.seek(0)
        self._loaded = file.tell()  # bytes read from the file
        self._mark = (0, self._loaded)  # a place at or before the index: characters in the window, bytes in the file

    def items(self) -> Iterator[tuple[str, Any, int]]:
        """Yield (key, value, byte position of the key); raise ValueError with a byte position if that fails."""
        seen: set[str] = set()
        self._take("{", "a JSON object of scenes")
        more = self._peek() != "}"
        while more:
            position = self._position(self._index)
            self._mark = (self._index, position)
            if self._peek() != '"':
                self._fail("expected a scene token in quotes", self._index)
            key = self._value()
            if key in seen:
                raise ValueError(f"{self._name}: key {key!r} appears a second time at byte {position}")
            seen.add(key)
            self._take(":", "':'")
            yield key, self._value(), position
            more = self._peek() == ","
            if more:
                self._take(",", "','")
                self._peek()
        self._take("}", "',' or '}'")
        if self._peek():
            self._fail("expected the end of the file", self._index)

    def _value(self) -> Any:
        if self._peek() not in ("{", "[", '"'):  # a number could be cut by the window without an error
            self._fail("expected an object, a list or a text", self._index)
        while True:
            try:
                value, self._index = self._json.raw_decode(self._window, self._index)
                return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._window) - _LONGEST_TOKEN
                failure = error
            except ValueError as error:
                raise ValueError(f"{self._name}: {error}, after byte {self._position(self._index)}") from None
            except RecursionError:
                where = f"after byte {self._position(self._index)}"
                raise ValueError(f"{self._name}: objects and lists are nested too deeply, {where}") from None
            if not (cut and self._load()):
                self._fail(failure.msg, failure.pos)

    def _peek(self) -> str:
        """Skip white space; return the next character without reading it, "" at the end of the file."""
        while True:
            self._index = _SPACE.match(self._window, self._index).end()  # type: ignore[union-attr]  # matches always
            if self._index < len(self._window):
                return self._window[self._index]
            if not self._load():
                return ""

    def _take(self, character: str, meaning: str) -> None:
        if self._peek() != character:
            self._fail(f"expected {meaning}", self._index)
        self._index += 1

    def _load(self) -> bool:
        """Drop what is read from the window and at least double the rest of it; False at the end of the file."""
        rest = len(self._window) - self._index
        data = self._file.read(max(_READ_BYTES, rest))
        pending = len(self._utf8.getstate()[0])
        try:
            text = self._utf8.decode(data, final=not data)
        except UnicodeDecodeError as error:
            where = f"at byte {self._loaded - pending + error.start} of {self._size}"
            raise ValueError(f"{self._name} is no UTF-8 text {where}: {error.reason}") from None
        if not data:
            return False
        self._mark = (0, self._position(self._index))
        self._window = self._window[self._index :] + text
        self._index = 0
        self._loaded += len(data)
        if self._on_bytes is not None:
            self._on_bytes(len(data))
        return True

    def _position(self, index: int) -> int:
        """Bytes into the file of a character of the window; counts from the mark, or many small scenes take long."""
        characters, position = self._mark
        return position + len(self._window[characters:index].encode())

    def _fail(self, problem: str, index: int) -> None:
        found = "the file ends" if index >= len(self._window) else f"found {self._window[index : index + 20]!r}"
        raise ValueError(
            f"{self._name}: truncated or malformed JSON at byte {self._position(index)} of {self._size}: "
            f"{problem}; {found}"
        )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice in one object")
    return fields
