"""Prepare a DriveLM file: validate it, split it by scene and write the tables that `training.data.rows` reads.

    python -m training.prepare --drivelm_json v1_1_train_nus.json --image_root data --output_dir prepared

The same command again does nothing if neither the file, the options nor the images have changed. Variants:

    --strict                       any loss is an error and nothing is written
    --coordinates normalised       <c1,CAM_BACK,0.680,0.553> instead of pixels of a 1600x900 image
    --coordinates none             without the questions that hold or ask for coordinates
    --categories perception behavior
    --questions 'front|traffic'    only questions in which this regular expression finds something
    --split test                   everything in one split, for challenge files: hidden answers stay empty, and a
                                   question with a flaw is kept and noted, because the server counts every one
    --rig fleet.yaml               the cameras, if not nuScenes' six: a name or a file, see `training.data.rig`
    --verify_images                decode every image to find broken files (minutes for the full release)

Where images are looked for: DriveLM writes `../nuscenes/samples/CAM_FRONT/NAME.jpg`. A leading `../` is dropped, and
the rest is looked up under `--image_root`, once as it is and once without its leading `data/` and `nuscenes/`. So
`--image_root` is either the folder that holds `nuscenes/` or the nuScenes root itself. Of an absolute path what lies
under the root counts, or, of another machine's, what lies under a folder of the root's name or begins with `data/`,
`nuscenes/`, `samples/` or `sweeps/`; Windows' backslashes are read. The tables hold paths relative to the root.

The rig is that of `--rig`, or of the `rig.json` that `training.toyworld` and `training.nuscenes` leave beside their
DriveLM files, or nuScenes' six. `dataset.json` keeps it under `rig`, for every stage that follows. A camera of the
file that a given rig lacks is an error; without one it is counted.

Nothing but questions, answers and image paths reaches their tables: no scene description and no boxes. What the
cameras of a frame show goes into a table of its own, for stages that teach a model to see (`training.data.contents`):
from the `contents.json` that `training.toyworld` and `training.nuscenes` leave beside their files, or from DriveLM's
key objects. A toy world without that file, of an older version, tells nothing: its key objects are some of many.

What is lost is counted in `dataset.json` under `report`, with examples: `dropped` (missing or unreadable images, empty
questions or answers, malformed tags, unknown cameras and categories, frames without any image), `filtered` (left out
by an option) and `noted` (kept, but suspicious).
"""

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from training.data.contents import CONTENTS_FILE, limited, read_contents
from training.data.drivelm import (
    CATEGORIES,
    Frame,
    Question,
    find_tags,
    has_malformed_tag,
    normalise_coordinates,
    read_frames,
    scene_split,
    split_hash,
    tag_camera,
    uses_coordinates,
)
from training.data.images import ImageFinder, locate_image, places_of_image
from training.data.rig import EXTRA_VIEWS, NUSCENES, RIG_FILE, Rig, read_rig
from training.data.rows import SPLITS
from training.data.tables import Report, TableWriter
from training.stages.command_line import run
from training.stages.files import sha256, write_json
from training.stages.recipes import Stage

FORMAT_VERSION = 1  # raise it when the tables change, so that folders of older code are written anew
_TOLD_ELSEWHERE = ("drivelm_json", "image_root", "output_dir", "rig")  # options that `dataset.json` has as other keys
_TABLES = ("frames", "questions", "contents")
_IMAGE_SCHEMA = pa.schema([("path", pa.string()), ("file", pa.string()), ("bytes", pa.int64())])


@dataclass
class PrepareArguments:
    """Options of `python -m training.prepare`."""

    drivelm_json: str = field(metadata={"help": "DriveLM v1.0 or v1.1 train file, or a challenge file"})
    image_root: str = field(metadata={"help": "folder that holds nuscenes/, or the nuScenes root itself"})
    output_dir: str = field(metadata={"help": "folder for dataset.json, frames/, questions/ and contents/"})
    strict: bool = field(default=False, metadata={"help": "make any loss an error"})
    coordinates: Literal["pixels", "normalised", "none"] = field(
        default="pixels", metadata={"help": "keep coordinates, make them shares of the image, or drop such questions"}
    )
    categories: list[str] = field(default_factory=lambda: list(CATEGORIES), metadata={"help": "categories to keep"})
    questions: str | None = field(default=None, metadata={"help": "regular expression that finds something in them"})
    split: Literal["by_scene", "train", "validation", "test"] = field(
        default="by_scene", metadata={"help": "80/10/10 by scene, or one split for everything"}
    )
    rig: str | None = field(default=None, metadata={"help": "name or file; default: rig.json beside it, or nuScenes'"})
    verify_images: bool = field(default=False, metadata={"help": "decode every image to find broken files"})

    def __post_init__(self) -> None:
        unknown = [category for category in self.categories if category not in CATEGORIES]
        if unknown or not self.categories:
            raise ValueError(f"--categories takes some of {', '.join(CATEGORIES)}; got {self.categories}")
        if self.questions is not None:
            try:
                re.compile(self.questions)
            except re.error as error:
                raise ValueError(f"--questions takes a regular expression; {self.questions!r}: {error}") from error
        for name in ("coordinates", "split"):
            allowed = get_args(get_type_hints(PrepareArguments)[name])
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} takes one of {', '.join(allowed)}; got {getattr(self, name)!r}")


STAGE = Stage(start="image_root", inputs=("drivelm_json",))


def main(args: PrepareArguments) -> dict[str, Any]:
    """Prepare one DriveLM file and return the content of `dataset.json`.

    The output folder changes only at the very end; whatever goes wrong before leaves it as it was.

    Raises:
        ValueError: an input does not exist; the JSON is truncated, malformed or not DriveLM's (with the byte
            position); the rig is none or lacks a camera of the file; nothing is left; `strict` and something was
            dropped; the output folder holds other files.
    """
    source, image_root, output_dir = Path(args.drivelm_json), Path(args.image_root), Path(args.output_dir).resolve()
    if not source.is_file():
        raise ValueError(f"--drivelm_json {source} is not a file")
    if not image_root.is_dir():
        raise ValueError(f"--image_root {image_root} is not a folder")
    _check_output(output_dir)
    given = args.rig or next((str(file) for file in [source.with_name(RIG_FILE)] if file.is_file()), None)
    rig = NUSCENES if given is None else read_rig(given)
    shown = source.with_name(CONTENTS_FILE)

    info: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "image_root": _stored_root(image_root.resolve(), output_dir),
        "source": {"file": source.name, "bytes": source.stat().st_size, "sha256": sha256(source)},
        "options": {key: value for key, value in asdict(args).items() if key not in _TOLD_ELSEWHERE},
        "rig": rig.to_table(),
        "generated": _is_generated(image_root),
        "contents": sha256(shown) if shown.is_file() else "key_object_infos",  # folders of before have none: anew
    }
    done = _unchanged(output_dir, image_root, info)
    if done is not None:
        print(f"{output_dir}: nothing has changed since it was prepared")
        return done

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}-", dir=output_dir.parent))
    try:
        info |= _write(source, image_root, staging, args, rig, given)
        _install(staging, output_dir, info)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(_summary(output_dir, info))
    return info


def _write(
    source: Path, image_root: Path, folder: Path, args: PrepareArguments, rig: Rig, given: str | None
) -> dict[str, Any]:
    """Write all tables into `folder` and return what `dataset.json` says about them; `given` says whose rig it is."""
    report, images = Report(), ImageFinder(image_root, args.verify_images)
    shown = source.with_name(CONTENTS_FILE)
    contents = read_contents(shown) if shown.is_file() else {}
    annotated = not _is_generated(image_root)
    with ExitStack() as files:
        tables = TableWriter(folder, rig, files)
        progress = files.enter_context(tqdm(total=source.stat().st_size, unit="B", unit_scale=True, desc=source.name))
        for frame in read_frames(source, progress.update):
            if given is not None:
                _check_cameras(frame, rig, f"{source}: rig {given}")
            views = dict(_views(frame, rig, images, report))
            if not views:
                report.add("dropped", "frame without images", f"{frame.scene_token}_{frame.frame_token}")
                for question in frame.questions:
                    report.add("dropped", "question on a frame without images", frame.question_id(question))
                continue
            split = scene_split(frame.scene_token) if args.split == "by_scene" else args.split
            tokens = {"scene_token": frame.scene_token, "frame_token": frame.frame_token}
            questions = list(_questions(frame, rig, args, report))
            known = contents.get(frame.frame_token, frame.contents if annotated else None)
            seen = known and limited(known, set(rig.names) & set(views))
            tables.add(split, {**tokens, **views}, questions, seen)
        tables.finish()
    dropped = {reason: entry["count"] for reason, entry in report.losses["dropped"].items()}
    if args.strict and dropped:
        lines = [f"{source}: --strict, and these would be dropped:", *_told(report.losses["dropped"])]
        raise ValueError("\n  ".join(lines))
    if not sum(counts["questions"] for counts in tables.counts.values()):
        hint = "; a file with hidden answers needs --split test" if "empty answer" in dropped else ""
        if lost := next((path for path, (found, _) in images.asked.items() if found is None), None):
            tried = ", ".join(places_of_image(image_root, lost)) or "no place, for the path leaves it"
            hint += f"; {lost} was looked for under {image_root} at {tried}"
        if any("unknown camera" in reason for reason in dropped):
            hint += f"; a file with other cameras than {', '.join(rig.names)} needs --rig FILE"
        raise ValueError(f"{source}: no question is left; dropped: {dropped or 'nothing'}{hint}")

    asked = [{"path": path, "file": file, "bytes": size} for path, (file, size) in images.asked.items()]
    pq.write_table(pa.Table.from_pylist(asked, schema=_IMAGE_SCHEMA), folder / "images.parquet")
    return {
        "split_hash": split_hash(tables.splits),
        "counts": {split: _in_order(tables.counts[split]) for split in SPLITS if split in tables.counts},
        "report": report.losses,
        "files": {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*.parquet"))},
    }


def _is_generated(image_root: Path) -> bool:
    return (image_root / "toyworld.json").is_file()


def _check_cameras(frame: Frame, rig: Rig, what: str) -> None:
    unknown = ", ".join(name for name in frame.image_paths if name not in rig and name not in EXTRA_VIEWS)
    if unknown:
        where = f"frame {frame.scene_token}_{frame.frame_token}"
        raise ValueError(f"{what} has {', '.join(rig.names)}; {where} has images of {unknown}")


def _views(frame: Frame, rig: Rig, images: ImageFinder, report: Report) -> Iterator[tuple[str, str]]:
    """The views of a frame that have an image: (name, path under the image root)."""
    where = f"{frame.scene_token}_{frame.frame_token}"
    for name, path in frame.image_paths.items():
        if name not in rig and name not in EXTRA_VIEWS:
            report.add("dropped", "unknown camera in image_paths", f"{name} in {where}")
            continue
        found, problem = images.find(path)
        if found is not None:
            yield name, found
        else:
            report.add("dropped", str(problem), path)
    for name in rig.names:
        if name not in frame.image_paths:
            report.add("noted", "camera not in image_paths", f"{name} in {where}")


def _questions(frame: Frame, rig: Rig, args: PrepareArguments, report: Report) -> Iterator[dict[str, Any]]:
    """The rows of the questions table for one frame."""
    answers: dict[str, str] = {}
    for question in frame.questions:
        question_id = frame.question_id(question)
        loss, flaw = _loss(question, rig, args), _flaw(question, rig)
        if loss is not None:
            report.add(*loss, question_id)
            continue
        if flaw is not None:
            report.add("noted", flaw, question_id)
        if answers.setdefault(question.question, question.answer) != question.answer:
            report.add("noted", "question repeated on one frame with another answer", question_id)
        texts = [question.question, question.answer]
        if args.coordinates == "normalised":
            texts = [normalise_coordinates(text) for text in texts]
        yield {
            "question_id": question_id,
            "scene_token": frame.scene_token,
            "frame_token": frame.frame_token,
            "category": question.category,
            "tag": list(question.tag or ()),
            "question": texts[0],
            "answer": texts[1],
            "objects": find_tags("\n".join(texts)),
        }


def _loss(question: Question, rig: Rig, args: PrepareArguments) -> tuple[str, str] | None:
    """(kind, reason) if the question is not to be kept."""
    if question.category not in CATEGORIES:
        return "dropped", "unknown category"
    flaw = _flaw(question, rig)
    if flaw is not None and args.split != "test":
        return "dropped", flaw
    if not question.answer and question.tag is None and args.split != "test":
        return "dropped", "empty answer"
    if question.category not in args.categories:
        return "filtered", f"category {question.category}"
    if args.coordinates == "none" and uses_coordinates(question.question, question.answer):
        return "filtered", "coordinates"
    if args.questions is not None and not re.search(args.questions, question.question):
        return "filtered", "questions"
    return None


def _flaw(question: Question, rig: Rig) -> str | None:
    """What is wrong with a question's text, or its answer's."""
    text = f"{question.question}\n{question.answer}"
    if not question.question:
        return "empty question"
    if has_malformed_tag(text):
        return "malformed tag"
    if any(tag_camera(tag) not in rig for tag in find_tags(text)):
        return "tag names an unknown camera"
    return None


def _stored_root(image_root: Path, output_dir: Path) -> str:
    """The image root for `dataset.json`: relative where one folder holds the other, so both can move together."""
    if image_root.is_relative_to(output_dir) or output_dir.is_relative_to(image_root):
        return os.path.relpath(image_root, output_dir)
    return str(image_root)


def _check_output(output_dir: Path) -> None:
    """Refuse to replace what `training.prepare` cannot have written."""
    tables = [output_dir / name for name in _TABLES]
    for folder in (output_dir, *tables):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is no folder; use another --output_dir")
    for folder in tables:
        if folder.exists() and any(file.suffix != ".parquet" for file in folder.iterdir()):
            raise ValueError(f"{folder} holds files that training.prepare did not write; use another folder")


def _unchanged(output_dir: Path, image_root: Path, info: dict[str, Any]) -> dict[str, Any] | None:
    """The old `dataset.json` if it belongs to the same inputs and options and all files are as they were."""
    try:
        done = json.loads((output_dir / "dataset.json").read_text(encoding="utf-8"))
        if any(done.get(key) != value for key, value in info.items()):
            return None
        if any((output_dir / name).stat().st_size != size for name, size in done["files"].items()):
            return None
        images = pq.read_table(output_dir / "images.parquet").to_pylist()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or not whole: prepare again
        return None
    same = all(locate_image(image_root, image["path"]) == (image["file"], image["bytes"]) for image in images)
    return done if same else None


def _install(staging: Path, output_dir: Path, info: dict[str, Any]) -> None:
    """Move the finished tables in. Without `dataset.json`, removed first and written last, a folder is unfinished."""
    write_json(staging / "dataset.json", info)
    output_dir.mkdir(exist_ok=True)
    (output_dir / "dataset.json").unlink(missing_ok=True)
    for name in _TABLES:
        shutil.rmtree(output_dir / name, ignore_errors=True)
        if (staging / name).is_dir():
            os.replace(staging / name, output_dir / name)
    for name in ("images.parquet", "dataset.json"):
        os.replace(staging / name, output_dir / name)


def _in_order(counts: Counter[str]) -> dict[str, int]:
    return {key: int(counts[key]) for key in ("scenes", "frames", "questions", *CATEGORIES)}


def _summary(output_dir: Path, info: dict[str, Any]) -> str:
    lines = [f"{output_dir}: split hash {info['split_hash'][:12]}"]
    for split, counts in info["counts"].items():
        lines.append(f"  {split}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    lines += [f"  {kind}: {line}" for kind, reasons in info["report"].items() for line in _told(reasons)]
    return "\n".join(lines)


def _told(reasons: dict[str, dict[str, Any]]) -> list[str]:
    return [f"{entry['count']} x {reason}, e.g. {entry['examples'][0]}" for reason, entry in reasons.items()]


if __name__ == "__main__":
    run(main, PrepareArguments)
