"""What `training.prepare` writes with: the tables, and the count of what is lost on the way."""

from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from training.data.contents import Contents
from training.data.rig import EXTRA_VIEWS, Rig
from training.data.rows import CONTENTS_SCHEMA, FRAME_KEYS, QUESTION_SCHEMA

_EXAMPLES = 5
_ROWS_PER_WRITE = 10_000


class Report:
    """Counts of what was dropped, filtered and noted, by reason, with the first few examples of each."""

    def __init__(self) -> None:
        self.losses: dict[str, dict[str, dict[str, Any]]] = {"dropped": {}, "filtered": {}, "noted": {}}

    def add(self, kind: str, reason: str, example: str) -> None:
        """Count one loss; kind is "dropped", "filtered" or "noted"."""
        entry = self.losses[kind].setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < _EXAMPLES:
            entry["examples"].append(example)


class TableWriter:
    """Writes the questions of each split as they come and the frames at the end, into a folder of its own."""

    def __init__(self, folder: Path, rig: Rig, files: ExitStack) -> None:
        self._folder = folder
        self._rig = rig
        self._files = files
        self._writers: dict[str, pq.ParquetWriter] = {}
        self._questions: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._frames: dict[str, list[dict[str, str | None]]] = defaultdict(list)
        self._contents: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.splits: dict[str, str] = {}
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)

    def add(
        self,
        split: str,
        frame: dict[str, str | None],
        questions: list[dict[str, Any]],
        contents: Contents | None = None,
    ) -> None:
        """Add one frame (tokens and an image path per view), its rows of the questions table, and what it shows."""
        scene_token = str(frame["scene_token"])
        self.counts[split].update({"scenes": scene_token not in self.splits, "frames": 1, "questions": len(questions)})
        self.counts[split].update(row["category"] for row in questions)
        self.splits[scene_token] = split
        self._frames[split].append(frame)
        self._questions[split] += questions
        if contents is not None:
            keys = {key: frame[key] for key in FRAME_KEYS}
            self._contents[split].append({**keys, **contents, "words": list(contents["words"].items())})
        if len(self._questions[split]) >= _ROWS_PER_WRITE:
            self._write_questions(split)

    def finish(self) -> None:
        """Write what is left. Extra views get a column only if some frame has them, cameras always do."""
        used = {name for frames in self._frames.values() for frame in frames for name in frame}
        columns = (*FRAME_KEYS, *self._rig.names, *(view for view in EXTRA_VIEWS if view in used))
        schema = pa.schema([(column, pa.string()) for column in columns])
        for split, frames in self._frames.items():
            self._write_questions(split)
            pq.write_table(pa.Table.from_pylist(frames, schema=schema), self._file("frames", split))
            if self._contents[split]:
                table = pa.Table.from_pylist(self._contents[split], schema=CONTENTS_SCHEMA)
                pq.write_table(table, self._file("contents", split))

    def _write_questions(self, split: str) -> None:
        if split not in self._writers:
            writer = pq.ParquetWriter(self._file("questions", split), QUESTION_SCHEMA)
            self._writers[split] = self._files.enter_context(writer)
        self._writers[split].write_table(pa.Table.from_pylist(self._questions[split], schema=QUESTION_SCHEMA))
        self._questions[split] = []

    def _file(self, table: str, split: str) -> Path:
        folder = self._folder / table
        folder.mkdir(exist_ok=True)
        return folder / f"{split}-00000-of-00001.parquet"
