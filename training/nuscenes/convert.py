"""nuScenes-format data -> DriveLM JSON: questions from 3-D boxes, extra views, calibration, and a proof picture.

Needs the real devkit: `pip install nuscenes-devkit==1.2.0 "numpy<2"` (the extra `nuscenes`).

Questions for a fleet without any, from its boxes, in DriveLM's wording:

    python -m training.nuscenes --dataroot data/nuscenes --version v1.0-trainval --output_dir boxes

DriveLM's own questions, joined by frame_token (nuScenes' sample_token) with a LiDAR and a map view from above:

    python -m training.nuscenes --dataroot data/nuscenes --version v1.0-trainval --output_dir joined \\
        --drivelm_json v1_1_train_nus.json --views LIDAR_BEV MAP_BEV

Other makers' data in this format (Lyft Level 5, TIER IV's T4) counts too; what their categories are in DriveLM's words
`--categories FILE` can extend, a line each: `other_vehicle: truck`.

Look at a key frame, boxes drawn into the cameras and from above (the first one, or `--frame_token TOKEN`):

    python -m training.nuscenes --dataroot data/nuscenes --version v1.0-mini --output_dir boxes --picture proof.png

OUTPUT_DIR then holds

    drivelm.json          DriveLM v1.1 format; its image_paths name the cameras and the extra views
    views/LIDAR_BEV/*.png views/MAP_BEV/*.png, one per key frame, drawn without any annotation
    contents.json         what each frame's cameras show, from the boxes, for `training.prepare`
    rig.json              where each camera looks: nuScenes' six, or as the calibration or `--rig` has it
    calibration.parquet   one row per key frame and sensor: intrinsics, mounting and ego pose
    nuscenes              a link to DATAROOT, so that OUTPUT_DIR serves as the image root of all paths

and continues as any DriveLM file does:

    python -m training.prepare --drivelm_json boxes/drivelm.json --image_root boxes --output_dir prepared
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from training.data.contents import Contents, write_contents
from training.data.drivelm import key_frame, qa_entry, read_scenes, write_scenes
from training.data.rig import EXTRA_VIEWS, Rig, read_rig, write_rig
from training.data.wording import choose_key_objects, describe, object_tag, observed_status, perception_questions
from training.nuscenes.geometry import (
    CATEGORIES,
    Annotated,
    Sensor,
    find_rig,
    read_categories,
    read_objects,
    read_sensors,
    reference_pose,
)
from training.nuscenes.views import lidar_file, map_record, proof_picture, read_lidar, render_lidar, render_map
from training.stages.files import whole

if TYPE_CHECKING:
    from nuscenes.nuscenes import NuScenes

KINDS: dict[str, str] = {"pedestrian": "Pedestrian", "barrier": "Barrier", "traffic cone": "Traffic cone"}
"""DriveLM's `Category` of a tagged object; everything else is a Vehicle."""

CALIBRATION_SCHEMA = pa.schema(
    [
        ("scene_token", pa.string()),
        ("frame_token", pa.string()),
        ("channel", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("intrinsic", pa.list_(pa.float64())),  # 9 numbers, row by row, in pixels; empty for a LiDAR
        ("ego_from_sensor", pa.list_(pa.float64())),  # 16 numbers, row by row, in metres
        ("global_from_ego", pa.list_(pa.float64())),  # 16 numbers, at the moment the sensor fired
    ]
)


_FILES_OF_VIEWS = {"LIDAR_BEV": lidar_file, "MAP_BEV": map_record}  # raise a ValueError where they are missing


@dataclass
class NuScenesArguments:
    """Where the data is and what to make of it."""

    dataroot: str = field(metadata={"help": "folder in nuScenes format: samples/, maps/ and the tables' folder"})
    version: str = field(metadata={"help": "name of the tables' folder, for example v1.0-trainval"})
    output_dir: str = field(metadata={"help": "folder to write; see the top of this file for what it holds"})
    drivelm_json: str | None = field(default=None, metadata={"help": "keep its questions, write none from boxes"})
    views: list[str] = field(default_factory=list, metadata={"help": f"extra ones to draw: {' '.join(EXTRA_VIEWS)}"})
    seed: int = field(default=0, metadata={"help": "decides which questions are asked; every frame has its own draw"})
    max_distance: float = field(default=60.0, metadata={"help": "ask about objects up to so many metres away"})
    min_pixels: float = field(default=24.0, metadata={"help": "and whose longer side has so many pixels of 1600x900"})
    rig: str | None = field(default=None, metadata={"help": "name or file, with all cameras; default: as calibrated"})
    categories: str | None = field(default=None, metadata={"help": "file of categories and DriveLM's words for them"})
    picture: str | None = field(default=None, metadata={"help": "draw a proof picture of one key frame to this file"})
    frame_token: str | None = field(default=None, metadata={"help": "the key frame of --picture; default: the first"})

    def __post_init__(self) -> None:
        unknown = sorted(set(self.views) - set(EXTRA_VIEWS))
        if unknown:
            raise ValueError(f"--views knows {' and '.join(EXTRA_VIEWS)}; got {', '.join(unknown)}.")
        if self.frame_token is not None and self.picture is None:
            raise ValueError("--frame_token chooses the key frame of the proof picture; add --picture FILE.")


def open_nuscenes(dataroot: str | os.PathLike[str], version: str) -> NuScenes:
    """Load the tables of a nuScenes-format folder with the real devkit.

    Raises:
        ImportError: the devkit is not installed; the message says how to install it.
        ValueError: the tables are missing or incomplete.
    """
    try:
        from nuscenes.nuscenes import NuScenes
    except ImportError as error:
        raise ImportError(
            "nuScenes-format data needs the devkit, which is not part of the training extra. Install it with "
            f'pip install nuscenes-devkit==1.2.0 "numpy<2" (it does not run with numpy 2). Python said: {error}'
        ) from error
    tables = Path(dataroot, version)
    if not tables.is_dir():
        raise ValueError(f"--dataroot {dataroot} has no folder {version}; it holds: {_listing(Path(dataroot))}.")

    class Tables(NuScenes):
        """The devkit's, but logs may have no map, and maps no mask: other makers leave both out."""

        def __load_table__(self, table_name: str) -> Any:
            records = super().__load_table__(table_name)
            if table_name != "map":
                return records
            mapped = {log for record in records for log in record.get("log_tokens", ())}
            unmapped = [log["token"] for log in super().__load_table__("log") if log["token"] not in mapped]
            maps = []
            for record in [*records, {"token": "", "filename": "", "log_tokens": unmapped}]:
                named = record.get("filename", "")
                here = named if Path(dataroot, named).is_file() else ""  # the devkit insists on a path that is there
                maps.append({"log_tokens": [], **record, "filename": here, "missing": "" if here else named})
            return maps

    try:
        return Tables(version=version, dataroot=str(dataroot), verbose=False)
    except (AssertionError, AttributeError, KeyError, IndexError, TypeError, OSError, ValueError) as error:
        raise ValueError(
            f"{tables} does not load as nuScenes tables. All 13 must be there (category, attribute, visibility, "
            "instance, sensor, calibrated_sensor, ego_pose, log, scene, sample, sample_data, sample_annotation, map) "
            f"and their tokens must fit together. The devkit said: {type(error).__name__}: {error}"
        ) from error


def main(args: NuScenesArguments) -> dict[str, Any]:
    """Write the DriveLM file, the views, the calibration and the picture; returns what was counted.

    Raises:
        ImportError: the devkit is not installed.
        ValueError: a table, a file or a view that was asked for is missing, or nothing can be asked about the boxes;
            no drivelm.json is written then.
    """
    categories = CATEGORIES if args.categories is None else read_categories(args.categories)
    nusc = open_nuscenes(args.dataroot, args.version)
    output_dir = Path(args.output_dir)
    rig = _choose_rig(nusc, args.rig)
    output_dir.mkdir(parents=True, exist_ok=True)
    _link(output_dir / "nuscenes", Path(args.dataroot))
    if args.picture is not None:
        sample = _find_sample(nusc, args.frame_token)
        _save_image(proof_picture(nusc, sample, rig, categories), Path(args.picture))

    skipped: Counter[str] = Counter()
    scenes = read_scenes(args.drivelm_json) if args.drivelm_json else {}
    joined_tokens = {token for scene in scenes.values() for token in scene["key_frames"]}
    wanted = [sample for sample in nusc.sample if not args.drivelm_json or sample["token"] in joined_tokens]
    objects = _read_all_objects(nusc, args, wanted, skipped, rig, categories)
    if not args.drivelm_json:
        scenes = box_scenes(nusc, args, objects, rig)
    frames = [
        (scene_token, token, frame)
        for scene_token, scene in scenes.items()
        for token, frame in scene["key_frames"].items()
    ]
    if not args.drivelm_json and not any(rows for *_, frame in frames for rows in frame["QA"].values()):
        raise ValueError(
            f"nothing can be asked about the {sum(skipped.values())} boxes of {args.version} in {args.dataroot}; left "
            f"out: {dict(skipped.most_common()) or 'none'}. --categories FILE gives categories a word of DriveLM's."
        )
    lacking = count_lacking(nusc, rig, {token: frame for _, token, frame in frames})
    joined = _add_views(nusc, args, frames, rig, output_dir)
    write_rig(output_dir, rig)
    write_contents(output_dir, {token: contents_of(objects[token]) for _, token, _ in frames if token in objects})
    content = [(token, scene.get("scene_description", ""), scene["key_frames"]) for token, scene in scenes.items()]
    with whole(output_dir / "drivelm.json") as unfinished:
        write_scenes(unfinished, content)
    counts = {
        "scenes": len(scenes),
        "frames": len(frames),
        "frames joined": joined,
        "questions": sum(len(rows) for *_, frame in frames for rows in frame["QA"].values()),
        "cameras": list(rig.names),
        "cameras left out": dict(lacking.most_common()),
        "boxes left out": {} if args.drivelm_json else dict(skipped.most_common()),
    }
    print(_summary(output_dir, counts))
    return counts


def _choose_rig(nusc: NuScenes, asked: str | None) -> Rig:
    """The rig that was asked for, if it has all cameras of the data, or that of the calibration."""
    if asked is None:
        return find_rig(nusc)
    rig = read_rig(asked)
    cameras = {sensor["channel"] for sensor in nusc.sensor if sensor["modality"] == "camera"}
    if cameras - set(rig.names):
        raise ValueError(
            f"--rig {asked} has {', '.join(rig.names)}; the data has {', '.join(sorted(cameras - set(rig.names)))} too"
        )
    return rig


def count_lacking(nusc: NuScenes, rig: Rig, frames: Mapping[str, Any]) -> Counter[str]:
    """By reason, the images that key frames have and `frames` ({token: of a DriveLM file}) lack, and vice versa."""
    lacking: Counter[str] = Counter()
    for sample in nusc.sample:
        if sample["token"] not in frames:
            continue
        named = frames[sample["token"]]["image_paths"].keys()
        for camera in rig.names:
            if camera not in named:
                where = "in the DriveLM file" if camera in sample["data"] else "in the key frame"
                lacking[f"{camera} is not {where}"] += 1
        for camera in named - set(rig.names) - set(EXTRA_VIEWS):
            lacking[f"{camera} of the DriveLM file is not in the data"] += 1
    return lacking


def _add_views(
    nusc: NuScenes, args: NuScenesArguments, frames: list[tuple[str, str, dict[str, Any]]], rig: Rig, output_dir: Path
) -> int:
    """Draw the extra views of (scene token, frame token, key frame), name them there and write the calibration.

    Returns:
        how many of the frames are samples of the data.
    """
    samples = {sample["token"]: sample for sample in nusc.sample}
    joined = [entry for entry in frames if entry[1] in samples]
    if not joined:
        raise ValueError(
            f"None of the {len(frames)} frames of {args.drivelm_json} is a sample of {args.version} in "
            f"{args.dataroot}, which has {len(samples)}. DriveLM needs v1.0-trainval; is --version another one?"
        )
    for _, token, _ in joined:  # before the first is drawn
        for view in args.views:
            _FILES_OF_VIEWS[view](nusc, samples[token])
    calibration: list[dict[str, Any]] = []
    for scene_token, token, frame in tqdm(joined, desc="views and calibration", unit="frame"):
        sensors = read_sensors(nusc, samples[token])
        calibration += _calibration_rows(scene_token, token, sensors)
        for view in args.views:
            path = Path("views", view, f"{token}.png")
            _save_image(_render(view, nusc, samples[token], sensors, rig), output_dir / path)
            frame["image_paths"][view] = f"../{path.as_posix()}"
    with whole(output_dir / "calibration.parquet") as unfinished:
        pq.write_table(pa.Table.from_pylist(calibration, CALIBRATION_SCHEMA), unfinished)
    return len(joined)


def _read_all_objects(
    nusc: NuScenes,
    args: NuScenesArguments,
    samples: list[dict[str, Any]],
    skipped: Counter[str],
    rig: Rig,
    categories: Mapping[str, str | None],
) -> dict[str, list[Annotated]]:
    """By key frame of these samples, what can be asked about; `skipped` counts boxes that are left out, by reason."""
    limits = {"min_pixels": args.min_pixels, "max_distance": args.max_distance}
    return {
        sample["token"]: read_objects(nusc, sample, **limits, skipped=skipped, rig=rig, categories=categories)
        for sample in tqdm(samples, desc="boxes", unit="frame")
    }


def contents_of(objects: list[Annotated]) -> Contents:
    """What the cameras of a key frame show."""
    items = [annotated.item for annotated in objects]
    return {
        "objects": [
            {"name": item.name, "camera": item.camera, "status": item.status, "distance": round(item.distance, 2)}
            for item in items
        ],
        "words": {},
        "unclear": [],
    }


def box_scenes(
    nusc: NuScenes, args: NuScenesArguments, boxes: Mapping[str, list[Annotated]], rig: Rig
) -> dict[str, Any]:
    """Every key frame of a nuScenes-format folder in DriveLM's structure, with perception questions from its boxes."""
    scenes: dict[str, Any] = {
        scene["token"]: {"scene_description": scene.get("description", ""), "key_frames": {}} for scene in nusc.scene
    }
    for sample in tqdm(nusc.sample, desc="questions from boxes", unit="frame"):
        objects = boxes[sample["token"]]
        # A draw of its own for every frame: adding frames changes no other frame's questions.
        rng = random.Random(f"{args.seed} {sample['token']}")
        written = perception_questions([annotated.item for annotated in objects], rng, rig=rig)
        sensors = read_sensors(nusc, sample)
        scenes[sample["scene_token"]]["key_frames"][sample["token"]] = key_frame(
            {"perception": [qa_entry(row["Q"], row["A"]) for row in written]},
            {camera: f"../nuscenes/{sensors[camera].path}" for camera in sensors if camera in rig},
            _key_object_infos(objects),
        )
    return scenes


def _key_object_infos(objects: list[Annotated]) -> dict[str, dict[str, Any]]:
    bounds = {annotated.item: annotated.bounds for annotated in objects}
    infos = {}
    for number, item in enumerate(choose_key_objects([annotated.item for annotated in objects]), start=1):
        infos[object_tag(number, item)] = {
            "Category": KINDS.get(item.name, "Vehicle"),
            "Status": observed_status(item),
            "Visual_description": describe(item),
            "2d_bbox": [round(value, 1) for value in bounds[item]],
        }
    return infos


def _render(view: str, nusc: NuScenes, sample: dict[str, Any], sensors: dict[str, Sensor], rig: Rig) -> Image.Image:
    if view == "LIDAR_BEV":
        return render_lidar(read_lidar(nusc, sensors, sample))
    return render_map(nusc, sample, reference_pose(sensors, sample, rig))


def _calibration_rows(scene_token: str, token: str, sensors: dict[str, Sensor]) -> Iterator[dict[str, Any]]:
    for sensor in sensors.values():
        size = dict(zip(("width", "height"), sensor.size, strict=True))
        names = ("intrinsic", "ego_from_sensor", "global_from_ego")
        matrices = {name: getattr(sensor, name).ravel().tolist() for name in names}
        yield {"scene_token": scene_token, "frame_token": token, "channel": sensor.channel, **size, **matrices}


def _find_sample(nusc: NuScenes, token: str | None) -> dict[str, Any]:
    for sample in nusc.sample:
        if token in (None, sample["token"]):
            return sample
    raise ValueError(f"--frame_token {token} is none of the {len(nusc.sample)} samples of {nusc.version}.")


def _link(link: Path, target: Path) -> None:
    """Point `link` at `target`, so that DriveLM's paths `../nuscenes/samples/...` are found from the output folder."""
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise ValueError(f"{link} is in the way of a link to --dataroot. Use another --output_dir.")
    link.symlink_to(target.resolve(), target_is_directory=True)


def _save_image(image: Image.Image, path: Path) -> None:
    with whole(path) as unfinished:
        image.save(unfinished)


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "nothing, it does not exist"
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:12]) or "nothing"


def _summary(output_dir: Path, counts: dict[str, Any]) -> str:
    numbers = ", ".join(f"{value} {key}" for key, value in counts.items() if isinstance(value, int))
    lines = [f"{output_dir}: {numbers}; cameras: {', '.join(counts['cameras'])}"]
    lines += [f"  {number} frames: {reason}" for reason, number in counts["cameras left out"].items()]
    lines += [f"  {number} boxes left out: {reason}" for reason, number in counts["boxes left out"].items()]
    return "\n".join(lines)
