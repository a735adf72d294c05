"""Bird's-eye views of a nuScenes key frame, as images that a model takes like any camera, and a proof picture.

`LIDAR_BEV` and `MAP_BEV` show the same square around the ego car: it stands in the middle and drives upwards, left is
left, `2 * BEV_RANGE` metres on `BEV_SIZE` pixels. Neither shows an annotation: they are model inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from training.data.rig import NUSCENES, Rig
from training.nuscenes.geometry import (
    CATEGORIES,
    LIDARS,
    Sensor,
    box_edges,
    class_word,
    read_sensors,
    reference_pose,
    see_box,
    transform,
)

if TYPE_CHECKING:
    from nuscenes.nuscenes import NuScenes

BEV_RANGE = 50.0
"""Metres from the ego car to each border."""

BEV_SIZE = 500
"""Pixels on a side: 0.2 metres a pixel."""

POINT_BYTES = 20
"""Of a point in a `.pcd.bin` file of nuScenes' format: five float32."""

HEIGHTS = (-0.5, 3.5)
"""Metres above the ground that `LIDAR_BEV` tells apart, from black to full red."""

ROAD = (128, 128, 128)
EGO = (0, 255, 0)
CLASS_COLORS: dict[str, str] = {
    "car": "orange",
    "truck": "tomato",
    "bus": "gold",
    "trailer": "sandybrown",
    "construction vehicle": "yellow",
    "pedestrian": "deepskyblue",
    "bicycle": "magenta",
    "motorcycle": "violet",
    "barrier": "lightgray",
    "traffic cone": "lime",
    "traffic light": "red",
}


def bev_pixels(points: np.ndarray) -> np.ndarray:
    """Ego coordinates to pixels of a bird's-eye view: (2 or 3, N) metres -> (2, N) column and row, not rounded.

    The whole number part is the pixel: the ego origin lies on the corner between the four middle pixels.
    """
    scale = BEV_SIZE / (2 * BEV_RANGE)
    return np.stack([(BEV_RANGE - points[1]) * scale, (BEV_RANGE - points[0]) * scale])


def lidar_file(nusc: NuScenes, sample: dict[str, Any]) -> Path:
    """The file of a key frame's LiDAR sweep, whole numbers of points by its size.

    Raises:
        ValueError: the key frame has no such LiDAR, or its file is missing, empty or cut.
    """
    channel = next((name for name in LIDARS if name in sample["data"]), None)
    if channel is None:
        raise ValueError(
            f"LIDAR_BEV needs {' or '.join(LIDARS)} in every key frame; {sample['token']} has "
            f"{', '.join(sample['data']) or 'no sensor data'}. Leave LIDAR_BEV out of --views."
        )
    path = Path(nusc.dataroot, nusc.get("sample_data", sample["data"][channel])["filename"])
    if not path.is_file():
        raise ValueError(f"LIDAR_BEV needs the point cloud of key frame {sample['token']}, which is missing: {path}")
    size = path.stat().st_size
    if size == 0 or size % POINT_BYTES:
        raise ValueError(
            f"LIDAR_BEV needs the point cloud of key frame {sample['token']} whole, {POINT_BYTES} bytes a point "
            f"(float32 x, y, z, intensity, ring) and one point at least; {path} has {size} bytes"
            + ("; is it cut off, or are there four numbers a point?" if size else "")
        )
    return path


def read_lidar(nusc: NuScenes, sensors: dict[str, Sensor], sample: dict[str, Any]) -> np.ndarray:
    """The LiDAR sweep of a key frame in the ego frame: (4, N), x, y, z in metres and intensity 0..255.

    Raises:
        ValueError: see `lidar_file`; or the file holds no point, only what are no numbers.
    """
    from nuscenes.utils.data_classes import LidarPointCloud

    path = lidar_file(nusc, sample)
    cloud = LidarPointCloud.from_file(str(path))
    cloud.points = cloud.points[:, np.isfinite(cloud.points).all(axis=0)]  # a beam that nothing sent back
    if not cloud.nbr_points():
        raise ValueError(f"LIDAR_BEV needs numbers; the point cloud {path} of key frame {sample['token']} has none")
    channel = next(name for name in LIDARS if name in sensors)
    cloud.transform(sensors[channel].ego_from_sensor)
    return cloud.points


def render_lidar(points: np.ndarray) -> Image.Image:
    """Draw a sweep (4, N) in the ego frame: red is the height of the highest point, green its strongest return,
    blue how many points there are; no point is black."""
    columns, rows = np.floor(bev_pixels(points[:2])).astype(int)  # (N,)
    inside = (columns >= 0) & (columns < BEV_SIZE) & (rows >= 0) & (rows < BEV_SIZE)
    cells = rows[inside] * BEV_SIZE + columns[inside]
    low, high = HEIGHTS
    height = np.clip((points[2, inside] - low) / (high - low), 0, 1)
    strength = np.log1p(np.clip(points[3, inside], 0, 255)) / np.log(256)  # most returns are weak
    red, green = np.zeros(BEV_SIZE**2), np.zeros(BEV_SIZE**2)
    np.maximum.at(red, cells, height)
    np.maximum.at(green, cells, strength)
    count = np.bincount(cells, minlength=BEV_SIZE**2)
    blue = np.where(count > 0, 0.4 + 0.6 * np.minimum(np.log2(np.maximum(count, 1)) / 5, 1), 0)  # full at 32 points
    pixels = np.stack([red, green, blue], axis=-1).reshape(BEV_SIZE, BEV_SIZE, 3)  # (rows, columns, RGB)
    image = Image.fromarray(np.rint(pixels * 255).astype(np.uint8))
    draw_ego(image)
    return image


def map_record(nusc: NuScenes, sample: dict[str, Any]) -> dict[str, Any]:
    """The record of the map that a key frame drives on.

    Raises:
        ValueError: no map is told for its log, or the map's mask is missing.
    """
    log = nusc.get("scene", sample["scene_token"])["log_token"]
    record = next((record for record in nusc.map if log in record["log_tokens"]), None)
    if record is None or not record["filename"]:
        told = f"which is missing: {record['missing']}" if record and record["missing"] else "and map.json names none"
        raise ValueError(
            f"MAP_BEV needs the map mask of key frame {sample['token']}, {told}. Leave MAP_BEV out of --views."
        )
    return record


def render_map(nusc: NuScenes, sample: dict[str, Any], global_from_ego: np.ndarray) -> Image.Image:
    """Draw the drivable surface around the ego car, from the map mask of the key frame's log: grey on black.

    Raises:
        ValueError: the map mask is missing, or the ego car is not on it (as with a placeholder for the map).
    """
    record = map_record(nusc, sample)
    path, mask = Path(nusc.dataroot, record["filename"]), record["mask"]
    height, width = mask.mask().shape[:2]
    x, y = global_from_ego[:2, 3]
    column, row = mask.to_pixel_coords(x, y)
    if not (0 <= column[0] < width and 0 <= row[0] < height):
        raise ValueError(
            f"MAP_BEV needs a map mask under the ego car: key frame {sample['token']} is at ({x:.1f}, {y:.1f}) m, "
            f"{path} covers (0, 0) to ({width * mask.resolution:g}, {height * mask.resolution:g}) m. If this is a "
            "placeholder for a map that you do not have, leave MAP_BEV out of --views."
        )
    centres = np.arange(BEV_SIZE) + 0.5
    step = 2 * BEV_RANGE / BEV_SIZE
    forward = np.repeat(BEV_RANGE - centres * step, BEV_SIZE)  # rows go back, columns go right
    left = np.tile(BEV_RANGE - centres * step, BEV_SIZE)
    ground = transform(global_from_ego, np.stack([forward, left, np.zeros_like(left)]))  # (3, BEV_SIZE**2)
    road = mask.is_on_mask(ground[0], ground[1]).reshape(BEV_SIZE, BEV_SIZE)
    pixels = np.zeros((BEV_SIZE, BEV_SIZE, 3), dtype=np.uint8)
    pixels[road] = ROAD
    image = Image.fromarray(pixels)
    draw_ego(image)
    return image


def draw_ego(image: Image.Image) -> None:
    """Mark the ego car: an arrow head of its length (4 m) and width (2 m) that points ahead."""
    corners = np.array([[3.0, -1.0, -1.0], [0.0, 1.0, -1.0]])  # x forward, y left; the origin is the rear axle
    ImageDraw.Draw(image).polygon([(float(column), float(row)) for column, row in bev_pixels(corners).T], fill=EGO)


def proof_picture(
    nusc: NuScenes,
    sample: dict[str, Any],
    rig: Rig = NUSCENES,
    categories: Mapping[str, str | None] = CATEGORIES,
) -> Image.Image:
    """Draw a key frame to be looked at: the cameras with all projected boxes, and points and boxes from above.

    Boxes appear in every camera that sees them, coloured by class; a class without a DriveLM word is left out.
    """
    sensors = read_sensors(nusc, sample)
    pose = reference_pose(sensors, sample, rig)
    boxes = []
    for token in sample["anns"]:
        name = class_word(nusc.get("sample_annotation", token)["category_name"], categories)
        if name is not None:
            boxes.append((name, nusc.get_box(token).corners()))
    width, height = 640, 360
    side = 2 * height
    columns = (len(rig.names) + 1) // 2
    picture = Image.new("RGB", (columns * width + side, side))
    for index, channel in enumerate(rig.names):
        tile = Image.new("RGB", (width, height), "dimgray")
        if channel in sensors:
            tile = _camera_tile(Path(nusc.dataroot, sensors[channel].path), sensors[channel], boxes, (width, height))
        ImageDraw.Draw(tile).text((6, 4), channel, fill="white", stroke_width=1, stroke_fill="black", font_size=18)
        picture.paste(tile, (index % columns * width, index // columns * height))
    points = read_lidar(nusc, sensors, sample) if any(name in sensors for name in LIDARS) else np.zeros((4, 0))
    picture.paste(_top_tile(points, np.linalg.inv(pose), boxes, side), (columns * width, 0))
    return picture


def _camera_tile(
    path: Path, camera: Sensor, boxes: list[tuple[str, np.ndarray]], size: tuple[int, int]
) -> Image.Image:
    with Image.open(path) as photo:
        tile = photo.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(tile)
    scale = np.array([size[0] / camera.size[0], size[1] / camera.size[1]])
    for name, corners in boxes:
        if see_box(camera, corners) is None:
            continue
        for start, end in box_edges(camera, corners) * scale:
            draw.line([*map(float, start), *map(float, end)], fill=CLASS_COLORS[name])
    return tile


def _top_tile(
    points: np.ndarray, ego_from_global: np.ndarray, boxes: list[tuple[str, np.ndarray]], side: int
) -> Image.Image:
    tile = render_lidar(points).resize((side, side), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(tile)
    scale = side / BEV_SIZE
    for name, corners in boxes:
        outline = bev_pixels(transform(ego_from_global, corners))[:, [2, 3, 7, 6]] * scale  # (2, 4), the lower face
        draw.polygon([(float(x), float(y)) for x, y in outline.T], outline=CLASS_COLORS[name])
        front = outline[:, :2].mean(axis=1)  # a stroke from the middle to the front tells the heading
        draw.line([*map(float, outline.mean(axis=1)), *map(float, front)], fill=CLASS_COLORS[name])
    for index, (name, color) in enumerate(CLASS_COLORS.items()):
        draw.text((6, 4 + 16 * index), name, fill=color, font_size=14)
    draw.text((6, side - 22), f"{2 * BEV_RANGE:g} m, ahead is up", fill="white", font_size=14)
    return tile
