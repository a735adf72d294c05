"""Writes a toy world as a nuScenes-format data set (version `v1.0-toy`) that the real devkit loads.

All thirteen tables, a map mask and one LiDAR sweep per key frame. As in nuScenes, traffic lights are not annotated.
The map holds nine pieces of road, one for each way that the road bends and lane that the ego car is in; a frame's ego
pose lies on its piece, so a raster of the map around the car shows the road of the pictures.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pyquaternion import Quaternion

from training.toyworld.cameras import Camera, cameras
from training.toyworld.scene import CURVATURE, DIRECTIONS, LANES, ToyFrame, ToyObject, from_road, road_edges, token

Record = dict[str, Any]

VERSION = "v1.0-toy"
MAP_FILE = "maps/toyworld.png"
LIDAR = "LIDAR_TOP"
LIDAR_TRANSLATION = (0.95, 0.0, 1.84)
LIDAR_ROTATION = Quaternion(axis=(0, 0, 1), degrees=-90)  # nuScenes' LiDAR looks along its own y axis

CATEGORY_NAMES = {
    "car": "vehicle.car",
    "truck": "vehicle.truck",
    "bus": "vehicle.bus.rigid",
    "construction vehicle": "vehicle.construction",
    "pedestrian": "human.pedestrian.adult",
    "bicycle": "vehicle.bicycle",
    "motorcycle": "vehicle.motorcycle",
    "barrier": "movable_object.barrier",
    "traffic cone": "movable_object.trafficcone",
}
ATTRIBUTE_NAMES = """
    vehicle.moving vehicle.parked vehicle.stopped cycle.with_rider cycle.without_rider pedestrian.moving
    pedestrian.standing
""".split()
_VISIBILITY = (("1", "v0-40", 0.4), ("2", "v40-60", 0.6), ("3", "v60-80", 0.8), ("4", "v80-100", 1.01))
_BEAMS, _STEPS = 32, 120
_REACH = 50.0  # metres
_PIECE = 120.0  # metres of map on each side for a piece of road
_MAP_RESOLUTION = 0.1  # metres per pixel, the devkit's
_FIRST_TIMESTAMP = 1_600_000_000_000_000  # microseconds
_FRAME_GAP, _SCENE_GAP = 10_000_000, 3_600_000_000


def timestamp(frame: ToyFrame) -> int:
    """Microseconds; key frames are ten seconds apart, scenes an hour."""
    return _FIRST_TIMESTAMP + frame.scene * _SCENE_GAP + frame.frame * _FRAME_GAP


def logfile(frame: ToyFrame) -> str:
    return f"toy-s{frame.seed}-{frame.scene:05d}"


def image_file(frame: ToyFrame, camera: str) -> str:
    """Path of a picture below the nuScenes root."""
    return f"samples/{camera}/{logfile(frame)}__{camera}__{timestamp(frame)}.jpg"


def lidar_file(frame: ToyFrame) -> str:
    return f"samples/{LIDAR}/{logfile(frame)}__{LIDAR}__{timestamp(frame)}.pcd.bin"


def attribute_name(item: ToyObject) -> str | None:
    """nuScenes' attribute for an object's status."""
    if item.status is None:
        return None
    if item.name in ("bicycle", "motorcycle"):
        return f"cycle.{item.status.replace(' ', '_')}"
    return f"{'pedestrian' if item.name == 'pedestrian' else 'vehicle'}.{item.status}"


def ego_pose(frame: ToyFrame) -> tuple[NDArray[np.float64], Quaternion]:
    """Where the ego car is on the map: (x, y, z) in metres, rotation ego -> global."""
    return _piece(frame.direction, frame.ego_lane)


def _piece(direction: str, ego_lane: int) -> tuple[NDArray[np.float64], Quaternion]:
    column, row = DIRECTIONS.index(direction), ego_lane
    heading = 40.0 * (column * LANES + row)
    center = np.array([(column + 0.5) * _PIECE, (row + 0.5) * _PIECE, 0.0])
    return center, Quaternion(axis=(0, 0, 1), degrees=heading)


def scan(frame: ToyFrame) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """One turn of the LiDAR: points in its own frame with intensity and ring, (n, 5), and points on each object."""
    elevation = np.radians(np.linspace(-30.0, 10.0, _BEAMS))
    azimuth = np.linspace(0, 2 * math.pi, _STEPS, endpoint=False)
    ring, turn = (grid.ravel() for grid in np.meshgrid(np.arange(_BEAMS), azimuth, indexing="ij"))
    rise = elevation[ring]
    rays = np.stack([np.cos(rise) * np.cos(turn), np.cos(rise) * np.sin(turn), np.sin(rise)], axis=1)  # ego axes
    origin = np.array(LIDAR_TRANSLATION)
    with np.errstate(divide="ignore"):
        reach = np.where(rays[:, 2] < 0, -origin[2] / rays[:, 2], np.inf)  # the ground
    hit = np.zeros(len(rays), np.int64)
    for index, item in enumerate(frame.objects):
        near = _distance_to_box(item, origin, rays)
        closer = near < reach
        reach[closer] = near[closer]
        hit[closer] = index + 1
    returned = reach < _REACH
    points = rays[returned] * reach[returned, None] @ LIDAR_ROTATION.rotation_matrix  # ego axes -> LiDAR axes
    intensity = np.where(hit[returned] > 0, 60.0, 15.0)
    sweep = np.column_stack([points, intensity, ring[returned]]).astype(np.float32)
    return sweep, np.bincount(hit[returned], minlength=len(frame.objects) + 1)[1:]


def _distance_to_box(item: ToyObject, origin: NDArray[np.float64], rays: NDArray[np.float64]) -> NDArray[np.float64]:
    """Metres along each ray to where it enters an object's box, infinite if it does not; slab test, (n,)."""
    turn = item.axes
    start = (origin - np.array(item.center)) @ turn
    directions = rays @ turn
    directions = np.where(np.abs(directions) < 1e-9, 1e-9, directions)
    half = np.array(item.size) / 2
    a, b = (-half - start) / directions, (half - start) / directions
    enter, leave = np.minimum(a, b).max(axis=1), np.maximum(a, b).min(axis=1)
    return np.where((enter < leave) & (enter > 0), enter, np.inf)


def write_map(root: Path) -> None:
    """The mask of all nine pieces of road, 255 where one can drive."""
    side = _PIECE * 3
    pixels = round(side / _MAP_RESOLUTION)
    mask = Image.new("L", (pixels, pixels))
    draw = ImageDraw.Draw(mask)
    for direction in DIRECTIONS:
        for ego_lane in range(LANES):
            center, rotation = _piece(direction, ego_lane)
            left, right = road_edges(ego_lane)
            along = np.linspace(-55, 55, 111)
            outline = [from_road(s, left, CURVATURE[direction])[:2] for s in along]
            outline += [from_road(s, right, CURVATURE[direction])[:2] for s in along[::-1]]
            flat = np.column_stack([np.array(outline), np.zeros(len(outline))])
            points = flat @ rotation.rotation_matrix.T + center
            draw.polygon(
                [(x / _MAP_RESOLUTION, (side - y) / _MAP_RESOLUTION) for x, y, _ in points.tolist()], fill=255
            )
    path = root / MAP_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    mask.convert("1").convert("L").save(path, optimize=True)


def write_tables(
    root: Path,
    scenes: Sequence[Sequence[ToyFrame]],
    visibility: Sequence[Sequence[float]],
    lidar_points: Sequence[Sequence[int]],
    width: int,
) -> None:
    """Write the thirteen tables below `root`/v1.0-toy.

    Args:
        root: the nuScenes root.
        scenes: key frames by scene, in time order.
        visibility: per frame (all scenes in a row), the visible share of each object.
        lidar_points: per frame, the LiDAR points on each object.
        width: of the pictures, pixels.
    """
    rig = cameras(width, scenes[0][0].rig)
    tables = _fixed_tables(scenes[0][0].seed, rig, scenes)
    measured = zip(visibility, lidar_points, strict=True)
    for frames in scenes:
        for position in range(len(frames)):
            _add_frame(tables, frames, position, rig, *next(measured))
        tables["scene"].append(_scene_record(frames))
    folder = root / VERSION
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in tables.items():
        with open(folder / f"{name}.json", "w", encoding="utf-8") as file:
            json.dump(records, file, indent=0, separators=(",", ":"))


def _fixed_tables(seed: int, rig: dict[str, Camera], scenes: Sequence[Sequence[ToyFrame]]) -> dict[str, list[Record]]:
    """Tables that do not grow with the frames, and the others empty."""
    poses = {
        camera.name: (camera.translation, camera.rotation, [list(row) for row in camera.intrinsic])
        for camera in rig.values()
    }
    poses[LIDAR] = (LIDAR_TRANSLATION, LIDAR_ROTATION, [])
    logs = [
        {
            **_record(seed, "log", frames[0].scene),
            "logfile": logfile(frames[0]),
            "vehicle": "toy",
            "date_captured": "2020-09-13",
            "location": "toyworld",
        }
        for frames in scenes
    ]
    road_map = {"log_tokens": [log["token"] for log in logs], "category": "semantic_prior", "filename": MAP_FILE}
    return {
        "category": [
            {**_record(seed, "category", name), "name": name, "description": "", "index": index}
            for index, name in enumerate(CATEGORY_NAMES.values())
        ],
        "attribute": [
            {**_record(seed, "attribute", name), "name": name, "description": ""} for name in ATTRIBUTE_NAMES
        ],
        "visibility": [{"token": key, "level": level, "description": ""} for key, level, _ in _VISIBILITY],
        "sensor": [
            {**_record(seed, "sensor", name), "channel": name, "modality": "camera" if name in rig else "lidar"}
            for name in poses
        ],
        "calibrated_sensor": [
            {
                **_record(seed, "calibrated_sensor", name),
                "sensor_token": token(seed, "sensor", name),
                **_pose(translation, rotation),
                "camera_intrinsic": intrinsic,
            }
            for name, (translation, rotation, intrinsic) in poses.items()
        ],
        "log": logs,
        "map": [{**_record(seed, "map"), **road_map}],
        **{name: [] for name in ("scene", "sample", "sample_data", "ego_pose", "instance", "sample_annotation")},
    }


def _record(seed: int, *parts: object) -> Record:
    """The beginning of a record: its token, from what it stands for."""
    return {"token": token(seed, *parts)}


def _pose(translation: Iterable[float], rotation: Quaternion) -> Record:
    return {"translation": [*map(float, translation)], "rotation": rotation.elements.tolist()}


def _scene_record(frames: Sequence[ToyFrame]) -> Record:
    first = frames[0]
    return {
        "token": first.scene_token,
        "log_token": token(first.seed, "log", first.scene),
        "nbr_samples": len(frames),
        "first_sample_token": first.token,
        "last_sample_token": frames[-1].token,
        "name": f"scene-toy-{first.scene:05d}",
        "description": first.weather,
    }


def _add_frame(
    tables: dict[str, list[Record]],
    frames: Sequence[ToyFrame],
    position: int,
    rig: dict[str, Camera],
    visibility: Sequence[float],
    lidar_points: Sequence[int],
) -> None:
    frame, when = frames[position], timestamp(frames[position])
    before = frames[position - 1] if position else None
    after = frames[position + 1] if position + 1 < len(frames) else None
    beside = {"prev": before, "next": after}
    links = {key: other.token if other else "" for key, other in beside.items()}
    tables["sample"].append({"token": frame.token, "timestamp": when, "scene_token": frame.scene_token, **links})
    pose = _record(frame.seed, "ego_pose", frame.scene, frame.frame)
    tables["ego_pose"].append({**pose, "timestamp": when, **_pose(*ego_pose(frame))})
    for name in (*rig, LIDAR):
        camera = rig.get(name)
        tables["sample_data"].append(
            {
                "token": _data_token(frame, name),
                "sample_token": frame.token,
                "ego_pose_token": pose["token"],
                "calibrated_sensor_token": token(frame.seed, "calibrated_sensor", name),
                "timestamp": when,
                "fileformat": "jpg" if camera else "pcd",
                "is_key_frame": True,
                "height": camera.height if camera else 0,
                "width": camera.width if camera else 0,
                "filename": image_file(frame, name) if camera else lidar_file(frame),
                **{key: _data_token(other, name) if other else "" for key, other in beside.items()},
            }
        )
    for index, item in enumerate(frame.objects):
        if item.name in CATEGORY_NAMES:
            _add_annotation(tables, frame, index, visibility[index], lidar_points[index])


def _data_token(frame: ToyFrame, sensor: str) -> str:
    return token(frame.seed, "sample_data", frame.scene, frame.frame, sensor)


def _add_annotation(
    tables: dict[str, list[Record]], frame: ToyFrame, index: int, visibility: float, lidar_points: int
) -> None:
    """Each object is met once: key frames are far apart."""
    item, seed = frame.objects[index], frame.seed
    annotation, instance = (
        _record(seed, kind, frame.scene, frame.frame, index) for kind in ("annotation", "instance")
    )
    tables["instance"].append(
        {
            **instance,
            "category_token": token(seed, "category", CATEGORY_NAMES[item.name]),
            "nbr_annotations": 1,
            "first_annotation_token": annotation["token"],
            "last_annotation_token": annotation["token"],
        }
    )
    translation, rotation = ego_pose(frame)
    attribute = attribute_name(item)
    length, width, height = item.size
    tables["sample_annotation"].append(
        {
            **annotation,
            "sample_token": frame.token,
            "instance_token": instance["token"],
            "visibility_token": next(key for key, _, limit in _VISIBILITY if visibility < limit),
            "attribute_tokens": [token(seed, "attribute", attribute)] if attribute else [],
            "translation": (rotation.rotate(np.array(item.center)) + translation).tolist(),
            "size": [width, length, height],
            "rotation": (rotation * item.rotation).elements.tolist(),
            "prev": "",
            "next": "",
            "num_lidar_pts": int(lidar_points),
            "num_radar_pts": 0,
        }
    )
