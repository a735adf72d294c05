"""A prepared data set as `training.prepare` writes it: what hub_export reads of it.

dataset.json                      image_root, split_hash, generated, …
frames/{split}-*.parquet          scene_token, frame_token, one column of image paths per view
questions/{split}-*.parquet       question_id, scene_token, frame_token, question, answer, …
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import pyarrow.parquet as pq

from hub_export.files import read_json

FRAME_KEYS = ("scene_token", "frame_token")
FrameKey = tuple[str, str]
"""Scene and frame token"""


class PreparedRow(TypedDict, total=False):
    """A question, as far as its columns were asked for."""

    question_id: str
    scene_token: str
    frame_token: str
    question: str
    answer: str


class Prepared:
    """A prepared folder.

    Attributes:
        image_root: where its images lie, absolute.
        generated: whether a toy world drew them; data prepared before that was noted have a `toyworld.json` there.

    Raises:
        ValueError: it is no prepared folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not is_prepared(self.folder):
            raise ValueError(f"{folder} is not a prepared folder (no dataset.json); write one with training.prepare")
        info = read_json(self.folder / "dataset.json")
        self.image_root = (self.folder / info["image_root"]).resolve()
        self.generated: bool = info.get("generated", is_world(self.image_root))

    def shards(self, split: str) -> list[Path]:
        """The files with a split's questions, sorted.

        Raises:
            ValueError: there is none.
        """
        shards = sorted((self.folder / "questions").glob(f"{split}-*.parquet"))
        if not shards:
            raise ValueError(f"{self.folder} has no questions of split {split!r}")
        return shards

    def images(self, split: str) -> dict[FrameKey, dict[str, str]]:
        """{frame: {view: absolute path}} of one split; a view that a frame lacks is left out."""
        frames = {}
        for shard in sorted((self.folder / "frames").glob(f"{split}-*.parquet")):
            for row in pq.read_table(shard).to_pylist():
                views = {view: path for view, path in row.items() if view not in FRAME_KEYS and path is not None}
                frames[frame_key(row)] = {view: str(self.image_root / path) for view, path in views.items()}
        return frames


def is_prepared(folder: Path) -> bool:
    """Whether `training.prepare` finished there."""
    return (folder / "dataset.json").is_file()


def is_world(folder: Path) -> bool:
    """Whether `training.toyworld` wrote a folder."""
    return (folder / "toyworld.json").is_file()


def frame_key(row: Any) -> FrameKey:
    """The frame of a question or of a row of the frames table."""
    return row["scene_token"], row["frame_token"]


def read_questions(shard: Path, columns: Sequence[str]) -> list[PreparedRow]:
    """The questions of one shard, in its order: the tokens of their frame and `columns`."""
    return pq.read_table(shard, columns=[*FRAME_KEYS, *columns]).to_pylist()
