"""Where the boxes of a nuScenes key frame are: in the camera images, around the ego car, and in which sector.

Geometry comes from the real nuscenes-devkit, which is imported inside the functions because it is an optional extra.
Frames: global (map) -> ego (x forward, y left, z up, origin on the ground below the rear axle) -> sensor (a camera's z
looks ahead). Every sensor has an ego pose of its own, because sensors do not fire at the same moment.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from training.data.drivelm import IMAGE_SIZE
from training.data.rig import NUSCENES, Rig, make_rig
from training.data.wording import STATUSES, SceneObject

if TYPE_CHECKING:
    from nuscenes.nuscenes import NuScenes

CATEGORIES: dict[str, str] = {
    "vehicle.car": "car",
    "vehicle.emergency.police": "car",
    "vehicle.emergency.ambulance": "truck",
    "vehicle.truck": "truck",
    "vehicle.bus": "bus",
    "vehicle.trailer": "trailer",
    "vehicle.construction": "construction vehicle",
    "vehicle.bicycle": "bicycle",
    "vehicle.motorcycle": "motorcycle",
    "human.pedestrian": "pedestrian",
    "movable_object.barrier": "barrier",
    "movable_object.trafficcone": "traffic cone",
    # Lyft Level 5 and TIER IV's T4, which name the class alone
    "car": "car",
    "police_car": "car",
    "truck": "truck",
    "ambulance": "truck",
    "fire_truck": "truck",
    "bus": "bus",
    "trailer": "trailer",
    "construction": "construction vehicle",
    "bicycle": "bicycle",
    "motorcycle": "motorcycle",
    "pedestrian": "pedestrian",
    "construction_worker": "pedestrian",
    "police_officer": "pedestrian",
    "barrier": "barrier",
    "trafficcone": "traffic cone",
    "traffic_cone": "traffic cone",
}
"""Categories and DriveLM's words for them, in small letters; a prefix up to a dot is enough (vehicle.bus.rigid).

nuScenes does not annotate traffic lights, so no question from boxes is about them."""

ATTRIBUTES: dict[str, str] = {
    "vehicle.moving": "moving",
    "vehicle.parked": "parked",
    "vehicle.stopped": "stopped",
    "pedestrian.moving": "moving",
    "pedestrian.standing": "standing",
    "cycle.with_rider": "with rider",
    "cycle.without_rider": "without rider",
    # TIER IV's T4
    "vehicle_state.driving": "moving",
    "vehicle_state.moving": "moving",
    "vehicle_state.parked": "parked",
    "vehicle_state.stopped": "stopped",
    "pedestrian_state.moving": "moving",
    "pedestrian_state.walking": "moving",
    "pedestrian_state.standing": "standing",
    "cycle_state.with_rider": "with rider",
    "cycle_state.without_rider": "without rider",
    # Lyft Level 5
    "object_action_driving_straight_forward": "moving",
    "object_action_left_turn": "moving",
    "object_action_right_turn": "moving",
    "object_action_lane_change_left": "moving",
    "object_action_lane_change_right": "moving",
    "object_action_u_turn": "moving",
    "object_action_reversing": "moving",
    "object_action_parked": "parked",
    "object_action_stopped": "stopped",
    "object_action_walking": "moving",
    "object_action_running": "moving",
    "object_action_standing": "standing",
}
"""Attributes and the states that DriveLM has for them, where the class can have that state."""

EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))
"""The twelve edges of a box, as pairs of the devkit's corners: 0-3 are the front face, 4-7 the rear face."""

NEAR = 0.1
"""Metres in front of a camera where boxes are cut off; what is behind it has no image."""

HIDDEN_LEVELS = ("v0-40", "partial", "none")
"""Visibility levels that nobody can be asked about: at most 40 % of the object shows in all cameras (nuScenes), or
less than half of it (T4's words)."""

LIDARS = ("LIDAR_TOP", "LIDAR_CONCAT")
"""Names of the LiDAR that looks all around; T4 joins the points of several to one."""


@dataclass(frozen=True)
class Sensor:
    """Calibration and pose of one sensor at one key frame."""

    channel: str  # for example CAM_FRONT or LIDAR_TOP
    path: str  # its file, relative to the data root
    size: tuple[int, int]  # width and height of the image in pixels, (0, 0) for a LiDAR
    intrinsic: np.ndarray  # (3, 3) pinhole matrix in pixels; empty (0, 0) for a LiDAR
    ego_from_sensor: np.ndarray  # (4, 4), metres
    global_from_ego: np.ndarray  # (4, 4), metres, at the moment the sensor fired

    @property
    def is_camera(self) -> bool:
        return self.intrinsic.size > 0

    @property
    def sensor_from_global(self) -> np.ndarray:
        """(4, 4), metres."""
        return np.linalg.inv(self.global_from_ego @ self.ego_from_sensor)


@dataclass(frozen=True)
class SeenBox:
    """The image of a 3-D box in one camera."""

    bounds: tuple[float, float, float, float]  # left, top, right, bottom in pixels, cut off at the image's borders
    share: float  # of the box's image that lies inside the borders, 0..1
    offset: float  # distance of its middle from the middle of the image, 0 (centre) .. 1 (left or right border)


def read_sensors(nusc: NuScenes, sample: dict[str, Any]) -> dict[str, Sensor]:
    """Calibration and ego pose of every sensor of a key frame, by channel."""
    from nuscenes.utils.geometry_utils import transform_matrix
    from pyquaternion import Quaternion

    sensors = {}
    for channel, token in sample["data"].items():
        data = nusc.get("sample_data", token)
        calibration = nusc.get("calibrated_sensor", data["calibrated_sensor_token"])
        pose = nusc.get("ego_pose", data["ego_pose_token"])
        sensors[channel] = Sensor(
            channel=channel,
            path=data["filename"],
            size=(data["width"], data["height"]),
            intrinsic=np.array(calibration["camera_intrinsic"], dtype=float).reshape(-1, 3),
            ego_from_sensor=transform_matrix(calibration["translation"], Quaternion(calibration["rotation"])),
            global_from_ego=transform_matrix(pose["translation"], Quaternion(pose["rotation"])),
        )
    return sensors


def find_rig(nusc: NuScenes) -> Rig:
    """The cameras of a nuScenes-format folder: nuScenes' own where its names are used, else as the calibration has it.

    A camera counts that any key frame has. Azimuth, place, size and field of view are those of the first such frame.

    Raises:
        ValueError: no key frame has a camera, or two cameras look the same way.
    """
    found: dict[str, Sensor] = {}
    for sample in nusc.sample:
        if sample["data"].keys() - found.keys():
            for channel, sensor in read_sensors(nusc, sample).items():
                found.setdefault(channel, sensor)
    cameras = {channel: sensor for channel, sensor in found.items() if sensor.is_camera}
    if cameras and all(channel in NUSCENES for channel in cameras):
        return NUSCENES
    table = {}
    for channel, sensor in cameras.items():
        x, y = sensor.ego_from_sensor[:2, 2]  # where the camera's z axis points
        table[channel] = {
            "azimuth": round(float(np.degrees(np.arctan2(y, x))), 2),
            "place": [round(float(value), 3) for value in sensor.ego_from_sensor[:3, 3]],
            "size": list(sensor.size),
            "field_of_view": round(float(2 * np.degrees(np.arctan(sensor.size[0] / 2 / sensor.intrinsic[0, 0]))), 2),
        }
    return make_rig(table, f"calibrated_sensor of {nusc.dataroot}")


def reference_pose(sensors: dict[str, Sensor], sample: dict[str, Any], rig: Rig = NUSCENES) -> np.ndarray:
    """(4, 4) `global_from_ego` of the key frame: at the LiDAR's moment, at a camera's where there is no LiDAR.

    Raises:
        ValueError: the key frame has neither.
    """
    for channel in (*LIDARS, *rig.sectors.get("front", ()), *rig.names):
        if channel in sensors:
            return sensors[channel].global_from_ego
    raise ValueError(
        f"Key frame {sample['token']} needs one of {', '.join((*LIDARS, *rig.names))} to know where the ego car is; "
        f"it has {', '.join(sensors) or 'no sensor data'}."
    )


def transform(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply a (4, 4) matrix to points (3, N) -> (3, N)."""
    return matrix[:3, :3] @ points + matrix[:3, 3:]


def box_edges(camera: Sensor, corners: np.ndarray) -> np.ndarray:
    """Project the edges of a box into a camera, cut off at `NEAR` metres in front of it and not at the borders.

    Args:
        camera: the camera.
        corners: (3, 8) in the global frame, in the devkit's order.

    Returns:
        (E, 2, 2) pixels, E <= 12: the two ends (x, y) of every edge that is in front of the camera at least in part.
    """
    from nuscenes.utils.geometry_utils import view_points

    points = transform(camera.sensor_from_global, corners)  # (3, 8) in the camera's frame
    ends = []
    for first, second in EDGES:
        a, b = points[:, first], points[:, second]
        if max(a[2], b[2]) <= NEAR:
            continue
        if min(a[2], b[2]) < NEAR:
            cut = a + (b - a) * (NEAR - a[2]) / (b[2] - a[2])
            a, b = (cut, b) if a[2] < NEAR else (a, cut)
        ends.append(np.stack([a, b], axis=1))  # (3, 2)
    if not ends:
        return np.zeros((0, 2, 2))
    pixels = view_points(np.concatenate(ends, axis=1), camera.intrinsic, normalize=True)[:2]  # (2, 2 E)
    return pixels.T.reshape(-1, 2, 2)


def see_box(camera: Sensor, corners: np.ndarray) -> SeenBox | None:
    """The image of a box (corners (3, 8), global frame) in a camera, None if it lies outside."""
    edges = box_edges(camera, corners)
    if len(edges) == 0:
        return None
    left, top = edges.min(axis=(0, 1))
    right, bottom = edges.max(axis=(0, 1))
    width, height = camera.size
    x0, y0 = float(max(left, 0.0)), float(max(top, 0.0))
    x1, y1 = float(min(right, width)), float(min(bottom, height))
    if x0 >= x1 or y0 >= y1:
        return None
    share = (x1 - x0) * (y1 - y0) / ((right - left) * (bottom - top))
    return SeenBox((x0, y0, x1, y1), float(share), abs((x0 + x1) / width - 1))


def best_camera(sensors: dict[str, Sensor], corners: np.ndarray, rig: Rig = NUSCENES) -> tuple[str, SeenBox] | None:
    """The camera that sees a box best: the largest share of it inside the image, then closest to the middle.

    Returns:
        (camera, what it sees), or None if no camera sees the box (corners (3, 8), global frame).
    """
    seen = {name: see_box(sensors[name], corners) for name in rig.names if name in sensors}
    found = {name: view for name, view in seen.items() if view is not None}
    if not found:
        return None
    # Shares are compared to a tenth: where two cameras overlap, 0.98 against 1.0 says less than being near the middle.
    name = max(found, key=lambda name: (round(found[name].share, 1), -found[name].offset))
    return name, found[name]


@dataclass(frozen=True)
class Annotated:
    """An object of the questions, with the box in its camera: bounds in pixels of a 1600x900 image."""

    item: SceneObject
    bounds: tuple[float, float, float, float]


def read_objects(
    nusc: NuScenes,
    sample: dict[str, Any],
    *,
    min_pixels: float,
    max_distance: float,
    skipped: Counter[str],
    rig: Rig = NUSCENES,
    categories: Mapping[str, str | None] = CATEGORIES,
) -> list[Annotated]:
    """The annotated objects of a key frame that a person could make out in the images.

    Args:
        sample: a record of the sample table.
        min_pixels: the box's longer side must have this many pixels (of a 1600x900 image) in its best camera.
        max_distance: in metres from the ego car.
        skipped: counts, by reason, the boxes that are left out.
        categories: DriveLM's words, see `read_categories`.
    """
    sensors = read_sensors(nusc, sample)
    ego_from_global = np.linalg.inv(reference_pose(sensors, sample, rig))
    objects = []
    for token in sample["anns"]:
        annotation = nusc.get("sample_annotation", token)
        name = class_word(annotation["category_name"], categories)
        if name is None:
            skipped[f"category {annotation['category_name']} has no word in DriveLM"] += 1
            continue
        if not _can_be_seen(nusc, annotation):
            skipped["hidden (little of it visible, or nothing known of that and no LiDAR or radar point)"] += 1
            continue
        position = transform(ego_from_global, np.array(annotation["translation"], dtype=float)[:, None])[:, 0]
        distance = float(np.hypot(position[0], position[1]))
        if distance > max_distance:
            skipped[f"further than {max_distance:g} m"] += 1
            continue
        best = best_camera(sensors, nusc.get_box(token).corners(), rig)
        if best is None:
            skipped["outside all cameras"] += 1
            continue
        camera, seen = best
        x, y = IMAGE_SIZE[0] / sensors[camera].size[0], IMAGE_SIZE[1] / sensors[camera].size[1]
        bounds = seen.bounds[0] * x, seen.bounds[1] * y, seen.bounds[2] * x, seen.bounds[3] * y
        if max(bounds[2] - bounds[0], bounds[3] - bounds[1]) < min_pixels:
            skipped[f"smaller than {min_pixels:g} pixels"] += 1
            continue
        center = ((bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2)
        item = SceneObject(name, camera, center, distance, read_status(nusc, annotation, name))
        objects.append(Annotated(item, bounds))
    return objects


def read_categories(file: str | os.PathLike[str]) -> dict[str, str | None]:
    """`CATEGORIES`, extended or changed by a YAML or JSON file `{category: DriveLM's word}`; null leaves one out.

    Raises:
        ValueError: no such file, no mapping, or a word that DriveLM does not have.
    """
    try:
        given = yaml.safe_load(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--categories {file} cannot be read as YAML: {error}") from None
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"--categories {file} must hold lines like `other_vehicle: truck`; got {given!r:.200}")
    for name, word in given.items():
        if word is not None and word not in STATUSES:
            raise ValueError(f"--categories {file}: {name} is one of {', '.join(STATUSES)}, or null; got {word!r}")
    return {**CATEGORIES, **{name.lower(): word for name, word in given.items()}}


def class_word(category: str, categories: Mapping[str, str | None] = CATEGORIES) -> str | None:
    """DriveLM's word for a category, None if it has none: `vehicle.bus.rigid` -> `bus`."""
    category = category.lower()
    while category and category not in categories:
        category = category.rpartition(".")[0]
    return categories.get(category)


def read_status(nusc: NuScenes, annotation: dict[str, Any], name: str) -> str | None:
    """The status from the annotation's attributes, None if there is none that DriveLM has for the class `name`."""
    found = (ATTRIBUTES.get(nusc.get("attribute", token)["name"]) for token in annotation["attribute_tokens"])
    return next((status for status in found if status in STATUSES[name]), None)


def _can_be_seen(nusc: NuScenes, annotation: dict[str, Any]) -> bool:
    """By the visibility, where the data tells it, or else by the number of points; -1: nobody has counted them."""
    levels = {record["token"]: record["level"] for record in nusc.visibility}
    level = levels.get(annotation["visibility_token"])
    if level is not None and level != "unavailable":
        return level not in HIDDEN_LEVELS
    points = [annotation.get(name, -1) for name in ("num_lidar_pts", "num_radar_pts")]
    return sum(points) != 0 or min(points) < 0
