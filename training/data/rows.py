"""Prepared data -> rows.

Every stage that needs driving questions (training, evaluation, benchmarks) uses only `load_rows`, whatever road the
data came by: DriveLM, a nuScenes-format fleet or the toy world.

A prepared folder is written by `python -m training.prepare`:

    dataset.json                      image_root, source, options, rig, generated, split_hash, counts, report
    frames/{split}-*.parquet          scene_token, frame_token, one column of image paths per view
    questions/{split}-*.parquet       question_id, scene_token, frame_token, category, tag, question, answer, objects
    contents/{split}-*.parquet        scene_token, frame_token, and what its cameras show, where that is known

All tables are plain Parquet, so `datasets.load_dataset("parquet", data_files=...)` reads them as well.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from training.data.contents import Contents
from training.data.rig import load_rig

SPLITS = ("train", "validation", "test")
FRAME_KEYS = ("scene_token", "frame_token")
QUESTION_SCHEMA = pa.schema(
    [
        ("question_id", pa.string()),
        ("scene_token", pa.string()),
        ("frame_token", pa.string()),
        ("category", pa.string()),
        ("tag", pa.list_(pa.int32())),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("objects", pa.list_(pa.string())),
    ]
)
CONTENTS_SCHEMA = pa.schema(  # `training.data.contents.Contents`
    [
        ("scene_token", pa.string()),
        ("frame_token", pa.string()),
        (
            "objects",
            pa.list_(
                pa.struct(
                    [
                        ("name", pa.string()),
                        ("camera", pa.string()),
                        ("status", pa.string()),
                        ("distance", pa.float64()),
                    ]
                )
            ),
        ),
        ("words", pa.map_(pa.string(), pa.list_(pa.string()))),
        ("unclear", pa.list_(pa.list_(pa.string()))),
    ]
)


class FrameRow(TypedDict):
    """A key frame of prepared data."""

    scene_token: str
    frame_token: str
    images: dict[str, str]  # view -> absolute path, only of views that the frame has


class Row(FrameRow):
    """A question of prepared data with its frame: the columns of `QUESTION_SCHEMA` and the images."""

    question_id: str
    category: str
    tag: list[int]
    question: str
    answer: str
    objects: list[str]  # object tags in question and answer
    asked: NotRequired[str]  # the wording that a control of the evaluation asks
    camera: NotRequired[str]  # whose sector a question of its own is about


class DatasetInfo(TypedDict):
    """`dataset.json`: what a prepared folder says of itself. Older ones lack `rig`, `generated` and `contents`."""

    format_version: int
    image_root: str  # relative to the folder where one holds the other
    source: dict[str, Any]  # file, bytes and sha256 of the DriveLM file
    options: dict[str, Any]
    rig: NotRequired[dict[str, dict[str, Any]]]
    generated: NotRequired[bool]
    contents: NotRequired[str]  # sha256 of the contents.json that it was made from, or key_object_infos
    split_hash: str
    counts: dict[str, dict[str, int]]  # by split
    report: dict[str, dict[str, dict[str, Any]]]  # {dropped, filtered, noted: {reason: count and examples}}
    files: dict[str, int]  # sizes in bytes


class Rows(Sequence[Row]):
    """The questions of one split with the images of their frames; make one with `load_rows`.

    `rows[i]` is a dict with the columns of `QUESTION_SCHEMA` and `images`, a dict from camera name to absolute path
    that holds only the views the frame has. Pickling stores where the data lies and not the data itself, so a data
    loader's worker processes start quickly.
    """

    def __init__(self, path: Path, split: str, info: DatasetInfo, frames: pa.Table, questions: pa.Table) -> None:
        self.path = path  # the prepared folder, absolute
        self.split = split
        self.split_hash: str = info["split_hash"]  # of the whole data set, to publish with results
        self.image_root = (path / info["image_root"]).resolve()
        # The views that this data set has, the rig's cameras in its order and then extra ones.
        self.cameras = tuple(name for name in frames.column_names if name not in FRAME_KEYS)
        self.rig = load_rig(info, self.cameras, str(path))
        self._frames = [self._frame(record) for record in frames.to_pylist()]
        self._questions = questions.select(QUESTION_SCHEMA.names).combine_chunks()  # one chunk: constant-time access
        self._frame_of_question = _match_frames(self._questions, frames, path)  # (questions,) row numbers of frames

    def __len__(self) -> int:
        return self._questions.num_rows

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # rows are picked one by one, never sliced
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"row {index} of a split with {len(self)} rows")
        (row,) = self._questions.slice(position, 1).to_pylist()
        return cast(Row, {**row, "images": dict(self._frames[self._frame_of_question[position]]["images"])})

    def frames(self) -> Iterator[tuple[FrameRow, list[Row]]]:
        """Yield (frame, its question rows) frame by frame; a frame without questions comes with an empty list.

        A frame is a dict with scene_token, frame_token and images; its questions are the same dicts as `rows[i]`.
        """
        order = np.argsort(self._frame_of_question, kind="stable")
        bounds = np.searchsorted(self._frame_of_question[order], np.arange(len(self._frames) + 1))
        for number, frame in enumerate(self._frames):
            numbers = order[bounds[number] : bounds[number + 1]]
            yield {**frame, "images": dict(frame["images"])}, [self[int(i)] for i in numbers]

    @cached_property
    def contents(self) -> dict[tuple[str, str], Contents]:
        """What the cameras of each frame show, by scene and frame token; frames of which nobody knows are not there.

        Raises:
            ValueError: nobody knows of any.
        """
        files = sorted((self.path / "contents").glob(f"{self.split}-*.parquet"))
        if not files:
            raise ValueError(
                f"{self.path} does not tell what the pictures of its {self.split} split show: run training.prepare "
                "again, on a file with DriveLM's key_object_infos or beside a contents.json, which training.toyworld "
                "and training.nuscenes write anew"
            )
        return {
            (record["scene_token"], record["frame_token"]): {
                "objects": record["objects"],
                "words": dict(record["words"]),
                "unclear": [(name, camera) for name, camera in record["unclear"]],
            }
            for file in files
            for record in pq.read_table(file).to_pylist()
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return load_rows, (str(self.path), self.split)

    def _frame(self, record: dict[str, Any]) -> FrameRow:
        images = {name: str(self.image_root / value) for name in self.cameras if (value := record[name]) is not None}
        return {"scene_token": record["scene_token"], "frame_token": record["frame_token"], "images": images}


def load_rows(path: str | Path, split: str) -> Rows:
    """Load one split ("train", "validation" or "test") of a folder written by `python -m training.prepare`.

    Raises:
        ValueError: the folder is not a finished prepared folder, has no such split or no rig, its images have
            moved, or a question refers to a frame that is not in the frames table.
    """
    folder = Path(path).resolve()
    info = read_dataset_info(folder)
    tables = {}
    for name in ("frames", "questions"):
        files = sorted((folder / name).glob(f"{split}-*.parquet"))
        if not files:
            known = [known for known in SPLITS if list((folder / name).glob(f"{known}-*.parquet"))]
            raise ValueError(f"{folder} has no {name} for split {split!r}; it has {', '.join(known) or 'none'}")
        tables[name] = pa.concat_tables([pq.read_table(file) for file in files])
    rows = Rows(folder, split, info, tables["frames"], tables["questions"])
    if not rows.image_root.is_dir():
        raise ValueError(
            f"the images of {folder} were prepared from {rows.image_root}, which is no longer a folder; "
            "run training.prepare again with the new --image_root"
        )
    return rows


def read_dataset_info(folder: Path) -> DatasetInfo:
    """Return the parsed `dataset.json` of a prepared folder.

    Raises:
        ValueError: there is none, so the folder was never prepared or the run did not finish.
    """
    file = folder / "dataset.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a prepared folder (no dataset.json); write one with training.prepare")
    return json.loads(file.read_text(encoding="utf-8"))


def _match_frames(questions: pa.Table, frames: pa.Table, path: Path) -> np.ndarray:
    """Row number in `frames` for every question, shape (questions,)."""

    def keys(table: pa.Table) -> pa.ChunkedArray:
        # With the length in front, or scene "a/b" with frame "c" would be scene "a" with frame "b/c".
        length = pc.cast(pc.binary_length(table["scene_token"]), pa.string())
        return pc.binary_join_element_wise(length, table["scene_token"], table["frame_token"], "/")

    numbers = pc.index_in(keys(questions), value_set=keys(frames).combine_chunks())
    if numbers.null_count:
        lost = questions["question_id"][pc.index(numbers.is_null(), True).as_py()].as_py()
        raise ValueError(f"{path}: question {lost} refers to a frame that is not in the frames table")
    return numbers.to_numpy()
