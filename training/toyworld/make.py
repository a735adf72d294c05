"""The embedded data set: synthetic scenes with questions in DriveLM's wording. Needs no download.

    python -m training.toyworld --scenes 1000 --seed 0 --output_dir outputs/toyworld
    python -m training.prepare --drivelm_json outputs/toyworld/drivelm.json --image_root outputs/toyworld \
        --output_dir outputs/toyworld-prepared

With other cameras than nuScenes' six (`training.data.rig`: a name or a file; every camera needs place, size and view):

    python -m training.toyworld --scenes 100 --rig four --output_dir outputs/four

A file of the full DriveLM release's size (4,072 frames, about 378,000 questions):

    python -m training.toyworld --scenes 509 --frames_per_scene 8 --questions_per_frame 95 --output_dir outputs/large

It writes, all at once or not at all:

    OUTPUT_DIR/drivelm.json          DriveLM v1.1; image paths begin with ../nuscenes as in the release, and the
                                     leading .. stands for OUTPUT_DIR
    OUTPUT_DIR/pictures.json         questions about single pictures, to pre-train on (`pictures`), as a
                                     DriveLM file whose frames have one camera each
    OUTPUT_DIR/documents.json        the same questions with all pictures, the one in question named, and so worded
                                     with their picture alone
    OUTPUT_DIR/nuscenes/             a nuScenes root, version v1.0-toy: samples, tables, map mask, LiDAR sweeps
    OUTPUT_DIR/priors.json           what a model without eyes can reach: best constant and best per-template answers
    OUTPUT_DIR/rig.json              the cameras, for `training.prepare`
    OUTPUT_DIR/contents.json         what each frame's cameras show, for `training.prepare` (`training.data.contents`)
    OUTPUT_DIR/toyworld.json         the settings that made it

The same settings give the same bytes on one Pillow and numpy version, with any number of worker processes. Every scene
depends on the seed and its number only, so a world with more scenes has the same first pictures; which questions are
asked depends on all scenes, because they are balanced over the whole world.

Pixels in tags and boxes are those of a 1600x900 image as in DriveLM, whatever `--width` is; the calibration in the
nuScenes tables is that of the pictures as written. `weather` (day, night, rain or fog) stands in every key frame
beside DriveLM's own keys, so that an evaluation can hold one weather out. How class, state, speed and steering look is
told in `models` and `render`, what is asked and by which rules in `questions`.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from training.data.contents import CONTENTS_FILE, Contents, limited, write_contents
from training.data.drivelm import CATEGORIES, key_frame, qa_entry, write_scenes
from training.data.priors import answer_priors
from training.data.rig import NUSCENES, Rig, read_rig, write_rig
from training.stages.files import is_done, whole, write_json
from training.toyworld.balance import FrameQuestions, balance_world
from training.toyworld.cameras import cameras
from training.toyworld.contents import LANE_WORDS, contents_of
from training.toyworld.nuscenes_tables import image_file, lidar_file, scan, write_map, write_tables
from training.toyworld.pictures import document_frames, picture_frame
from training.toyworld.questions import key_object_infos, write_questions
from training.toyworld.render import render
from training.toyworld.scene import WEATHERS, ToyFrame, sample_frame
from training.toyworld.truth import existence_truth, find_truth

_JPEG_QUALITY = 88


@dataclass
class ToyWorldArguments:
    """What the world is made of; `output_dir` must not hold anything else."""

    scenes: int = field(metadata={"help": "number of scenes"})
    output_dir: str = field(metadata={"help": "folder to write; it must be empty or not exist"})
    seed: int = field(default=0, metadata={"help": "another seed is another world"})
    frames_per_scene: int = field(default=1, metadata={"help": "key frames in each scene"})
    questions_per_frame: int = field(default=40, metadata={"help": "on average; balancing moves it by a few"})
    weathers: list[str] = field(default_factory=lambda: list(WEATHERS), metadata={"help": "those that there are"})
    width: int = field(
        default=400,
        metadata={"help": "picture width in pixels of a camera of 1600x900, a multiple of 16; others in proportion"},
    )
    rig: str = field(default="nuscenes", metadata={"help": "the cameras: nuscenes, four, seven or a file"})
    num_workers: int = field(default_factory=lambda: os.cpu_count() or 1, metadata={"help": "processes; same result"})


class _Made(NamedTuple):
    """What a worker hands back: everything about a frame but its pictures, which it has written."""

    frame: ToyFrame
    questions: FrameQuestions
    key_objects: dict[str, dict[str, object]]
    visible: int
    visibility: tuple[float, ...]
    lidar_points: list[int]
    pictures: dict[str, Any]
    contents: Contents


def main(args: ToyWorldArguments) -> Path:
    """Make a toy world and return its folder. If it is there already with the same settings, nothing is done.

    Raises:
        ValueError: a number is not positive, the width is no multiple of 16, `rig` is none or does not tell all, or
            `output_dir` holds something else.
    """
    for name in ("scenes", "frames_per_scene", "questions_per_frame", "num_workers"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1; got {getattr(args, name)}")
    if not args.weathers or not set(args.weathers) <= set(WEATHERS):
        raise ValueError(f"--weathers takes some of {', '.join(WEATHERS)}; got {args.weathers}")
    rig = read_rig(args.rig)
    cameras(args.width, rig)
    output = Path(args.output_dir).absolute()
    settings = {key: value for key, value in asdict(args).items() if key not in ("output_dir", "num_workers", "rig")}
    if rig != NUSCENES:  # older worlds, which all have these, do not tell
        settings["rig"] = rig.to_table()
    there = output.exists() and not (output.is_dir() and not any(output.iterdir()))
    record = output / "toyworld.json"
    if is_done(there, json.loads(record.read_text()) if record.is_file() else None, settings, output):
        older = "" if (output / CONTENTS_FILE).is_file() else f" An older version made it, without {CONTENTS_FILE}."
        print(f"{output} is already there with these settings.{older}")
        return output
    with whole(output) as unfinished:
        _make(args, rig, settings, unfinished)
    return output


def _make(args: ToyWorldArguments, rig: Rig, settings: dict[str, Any], output: Path) -> None:
    root = output / "nuscenes"
    for sensor in (*rig.names, "LIDAR_TOP"):
        (root / "samples" / sensor).mkdir(parents=True)
    count = args.scenes * args.frames_per_scene
    made = list(tqdm(_make_frames(args, rig, root), total=count, desc="frames", unit="frame"))
    balance_world([item.questions for item in made], args.questions_per_frame, args.seed)
    scenes = [made[start : start + args.frames_per_scene] for start in range(0, len(made), args.frames_per_scene)]
    _write_drivelm(output / "drivelm.json", scenes, lambda item: {item.frame.token: _key_frame(item)})
    _write_drivelm(output / "pictures.json", scenes, lambda item: item.pictures)
    _write_drivelm(output / "documents.json", scenes, lambda item: document_frames(item.frame, item.pictures.values()))
    write_map(root)
    frames = [[item.frame for item in scene] for scene in scenes]
    write_tables(root, frames, [item.visibility for item in made], [item.lidar_points for item in made], args.width)
    priors = _measure_priors(made)
    write_json(output / "priors.json", priors)
    write_rig(output, rig)
    write_contents(output, {token: contents for item in made for token, contents in _contents(item).items()})
    write_json(output / "toyworld.json", settings)
    _print_priors(priors)


def _make_frames(args: ToyWorldArguments, rig: Rig, root: Path) -> Iterator[_Made]:
    places = [(scene, frame) for scene in range(args.scenes) for frame in range(args.frames_per_scene)]
    make = partial(_make_frame, args, rig, root)
    if args.num_workers == 1:
        yield from map(make, places)
        return
    # Fresh processes, not forks: a caller may have started threads, which do not survive a fork.
    with ProcessPoolExecutor(min(args.num_workers, len(places)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(make, places, chunksize=4)  # in order; a worker that dies raises, where a Pool would hang


def _make_frame(args: ToyWorldArguments, rig: Rig, root: Path, place: tuple[int, int]) -> _Made:
    frame = sample_frame(args.seed, *place, args.frames_per_scene, args.weathers, rig)
    views = render(frame, args.width)
    for camera, view in views.items():
        Image.fromarray(view.pixels).save(root / image_file(frame, camera), quality=_JPEG_QUALITY)
    sweep, lidar_points = scan(frame)
    np.asarray(sweep, "<f4").tofile(root / lidar_file(frame))
    truth = find_truth(frame, views)
    questions = FrameQuestions(write_questions(frame, truth, args.questions_per_frame), *existence_truth(truth))
    pictures = {
        f"{frame.token}-{camera}": picture_frame(frame, truth, camera, f"../nuscenes/{image_file(frame, camera)}")
        for camera in views
    }
    key_objects, points = key_object_infos(truth), lidar_points.tolist()
    contents = contents_of(frame, [(seen.item, seen.camera) for seen in truth.seen], truth.doubtful)
    return _Made(frame, questions, key_objects, len(truth.seen), truth.visibility, points, pictures, contents)


def _contents(made: _Made) -> dict[str, Contents]:
    """Contents of a frame, and of its pictures, which are frames of their own in `pictures.json`."""
    pictures = {token: limited(made.contents, picture["image_paths"]) for token, picture in made.pictures.items()}
    return {made.frame.token: made.contents, **pictures}


def _describe_scene(frame: ToyFrame) -> str:
    """DriveLM has this text too. It tells the answer: it must never get into a prompt."""
    weather = "A clear day" if frame.weather == "day" else frame.weather.capitalize()
    return f"{weather}. The ego vehicle is in the {LANE_WORDS[frame.ego_lane]} lane of a road with three lanes."


def _write_drivelm(
    path: Path, scenes: list[list[_Made]], key_frames: Callable[[_Made], dict[str, dict[str, Any]]]
) -> None:
    def content(scene: list[_Made]) -> tuple[str, str, dict[str, Any]]:
        frames = {token: frame for item in scene for token, frame in key_frames(item).items()}
        return scene[0].frame.scene_token, _describe_scene(scene[0].frame), frames

    write_scenes(path, map(content, scenes))


def _key_frame(made: _Made) -> dict[str, Any]:
    by_category: dict[str, list[dict[str, Any]]] = {category: [] for category in CATEGORIES}
    for item in made.questions.items:
        by_category[item.category].append(qa_entry(item.question, item.answer, item.tag))
    paths = {camera: f"../nuscenes/{image_file(made.frame, camera)}" for camera in made.frame.rig.names}
    return key_frame(by_category, paths, made.key_objects, weather=made.frame.weather)


def _measure_priors(made: list[_Made]) -> dict[str, Any]:
    """What a model without eyes can reach in this world.

    Coordinates in tags say where an object is, which goes beyond these figures: `training.prepare` can leave
    questions with tags out where that matters.
    """
    items = [item for frame in made for item in frame.questions.items]
    existence = Counter(item.answer for item in items if item.question.startswith("Are there "))
    rows = (item._asdict() for item in items)
    return {
        "frames": len(made),
        "visible_objects_per_frame": round(sum(item.visible for item in made) / len(made), 2),
        "existence": {"yes": existence["Yes."], "no": existence["No."]},
        "priors": answer_priors(rows),
    }


def _print_priors(report: dict[str, Any]) -> None:
    yes, no = report["existence"]["yes"], report["existence"]["no"]
    print(f"{report['frames']} frames; 'Are there ...': {yes} yes, {no} no; right without looking:")
    for name in (*CATEGORIES, "overall"):
        entry = report["priors"][name]
        print(
            f"  {name:10} {entry['questions']:7} questions  "
            f"best constant {entry['best_constant']['accuracy']:6.1%} ({entry['best_constant']['answer']!r})  "
            f"best per template {entry['best_per_template']:6.1%}  per wording {entry['best_per_wording_others']:6.1%}"
        )
