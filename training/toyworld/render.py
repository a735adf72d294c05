"""Draws a toy frame: a picture for each camera, and for every pixel the object that it shows.

Objects are sets of flat faces (`models`). Each face is filled by Pillow and wins a pixel where it is nearest,
so occlusion is right in every order of drawing and the buffer of object numbers is exactly what the picture shows.

What tells about the ego car: the lane markings bend to where it steers; the faster it drives, the longer the dashes
and the more the grain of the road is drawn out along the lane (standing: short dashes, round grain). The left edge of
the road is yellow, the right one white, dashes between the lanes.
Weather: blue sky; night with lit lamps and the ego car's own headlights; rain with grey light, streaks and drops on
the lens; fog that swallows what is far.
"""

import math
import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from training.toyworld.cameras import Array, Camera, cameras
from training.toyworld.models import STREAK, build_faces, build_streaks
from training.toyworld.scene import LANE_WIDTH, LANES, ToyFrame, ToyObject, road_coordinates, road_edges

Pixels = NDArray[np.uint8]
Block = tuple[slice, slice]  # rows, columns

_NEAR = 0.2  # metres; nothing nearer to a camera is drawn
_DASH_PERIOD = 8.0
_DASH_LENGTH = {"not moving": 1.0, "slow": 2.6, "normal": 4.6, "fast": 6.8}  # metres
_GRAIN_LENGTH = {"not moving": 0.15, "slow": 0.6, "normal": 2.0, "fast": 8.0}  # metres along the lane
_GRAIN_WIDTH = 0.15
_GRAIN_SIZE = 256
_LINE_WIDTH = 0.26
_SKYLINE_BINS = 720
_FOG_LENGTH = 15.0  # metres in which fog takes 63 % of the contrast
_FOG_COLOUR = (186, 190, 194)
_ASPHALT, _APRON = (88, 88, 94), (138, 132, 120)
_SKY = {
    "day": ((96, 156, 232), (204, 224, 242)),
    "night": ((8, 10, 28), (26, 30, 54)),
    "rain": ((104, 112, 122), (146, 152, 158)),
    "fog": (_FOG_COLOUR, _FOG_COLOUR),
}  # overhead, at the horizon


@dataclass(frozen=True)
class View:
    """One camera's picture."""

    pixels: Pixels  # (height, width, 3)
    numbers: NDArray[np.int16]  # (height, width), 1 + index into `frame.objects` of what a pixel shows; 0 is scenery
    unhidden: NDArray[np.int64]  # (objects,) pixels that each would have in this picture if nothing stood before it
    covers: NDArray[np.int64]  # (objects, 1 + objects), pixels of the first that show another: 0 is scenery (a pole)

    def visible(self) -> NDArray[np.int64]:
        """Pixels that each object has, (objects,)."""
        return np.bincount(self.numbers.ravel(), minlength=len(self.unhidden) + 1)[1:]


def render(frame: ToyFrame, width: int) -> dict[str, View]:
    """Draw all cameras of a frame; `width` as in `cameras`."""
    return {name: _render_camera(frame, camera) for name, camera in cameras(width, frame.rig).items()}


class _Canvas:
    """The buffers of one picture while it is drawn."""

    def __init__(self, camera: Camera, background: Pixels) -> None:
        shape = (camera.height, camera.width)
        self.camera = camera
        self.pixels = background
        self.nearness = np.zeros(shape, np.float32)  # 1 / depth of the nearest object, 0 where there is none
        self.numbers = np.zeros(shape, np.int16)
        self.glows = np.zeros(shape, bool)
        self.shapes: dict[int, tuple[Block, NDArray[np.bool_]]] = {}  # by object: what it would fill alone

    def to_view(self, pixels: Pixels, objects: int) -> View:
        covers = np.zeros((objects, objects + 1), np.int64)
        for index, (block, shape) in self.shapes.items():
            covers[index] = np.bincount(self.numbers[block][shape], minlength=objects + 1)
        unhidden = covers.sum(axis=1)
        covers[np.arange(objects), np.arange(objects) + 1] = 0
        return View(pixels, self.numbers, unhidden, covers)


@dataclass(frozen=True)
class _Rays:
    """What each pixel of a camera looks at, if nothing stands there."""

    ground: NDArray[np.bool_]  # (height, width)
    x: Array  # (ground pixels,) where the ray meets the ground, ego frame
    y: Array
    nearness: NDArray[np.float32]  # (height, width) 1 / depth of the ground, 0 in the sky
    azimuth_bin: NDArray[np.int64]  # (sky pixels,)
    slope: NDArray[np.float32]  # (sky pixels,) tangent of the elevation


@cache
def _rays(camera: Camera) -> _Rays:
    focal, cx, cy = camera.intrinsic[0][0], camera.intrinsic[0][2], camera.intrinsic[1][2]
    columns, rows = np.meshgrid(np.arange(camera.width), np.arange(camera.height))
    local = np.stack([(columns - cx) / focal, (rows - cy) / focal, np.ones(columns.shape)], axis=-1)
    world = local @ camera.axes.T  # (height, width, 3)
    ground = world[..., 2] < -0.005  # farther away it is sky
    down = world[ground]
    depth = -camera.translation[2] / down[:, 2]
    nearness = np.zeros(ground.shape, np.float32)
    nearness[ground] = 1 / depth
    up = world[~ground]
    azimuth = np.degrees(np.arctan2(up[:, 1], up[:, 0])) % 360
    bins = (azimuth * _SKYLINE_BINS / 360).astype(np.int64) % _SKYLINE_BINS
    slope = (up[:, 2] / np.hypot(up[:, 0], up[:, 1])).astype(np.float32)
    x = camera.translation[0] + depth * down[:, 0]
    y = camera.translation[1] + depth * down[:, 1]
    return _Rays(ground, x, y, nearness, bins, slope)


@cache
def _road_rays(camera: Camera, curvature: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rays = _rays(camera)
    along, across = road_coordinates(rays.x, rays.y, curvature)
    return along.astype(np.float32), across.astype(np.float32)


@cache
def _grain_cells(camera: Camera, curvature: float, speed: str) -> NDArray[np.int32]:
    along, across = _road_rays(camera, curvature)
    rows = np.floor(across / _GRAIN_WIDTH).astype(np.int32) % _GRAIN_SIZE
    return rows * _GRAIN_SIZE + np.floor(along / _GRAIN_LENGTH[speed]).astype(np.int32) % _GRAIN_SIZE


@cache
def _grain() -> NDArray[np.int16]:
    values = np.random.default_rng(0).normal(0, 11, _GRAIN_SIZE * _GRAIN_SIZE)
    return np.clip(values, -26, 26).astype(np.int16)


def _render_camera(frame: ToyFrame, camera: Camera) -> View:
    canvas = _Canvas(camera, _background(frame, camera))
    near = [(index, item) for index, item in enumerate(frame.objects) if _may_show(camera, item)]
    for _, item in near:
        _draw_shadow(canvas, item)
    for index, item in near:
        if item.name == "traffic light":
            _draw_pole(canvas, item)
        _draw_object(canvas, index, item)
    for _, item in near:
        _draw_streaks(canvas, item)
    pixels = _weathered(frame, canvas, frame.random(f"weather/{camera.name}"))
    return canvas.to_view(pixels, len(frame.objects))


def _may_show(camera: Camera, item: ToyObject) -> bool:
    """Whether the picture can show anything of an object, its shadow or its streaks: a ball around it, before it."""
    x, y, z = camera.to_camera(np.array([item.center]))[0]
    reach = max(item.size) + 2.5
    slack = reach * math.hypot(1.0, camera.width / 2 / camera.intrinsic[0][0])
    return z > -reach and abs(x) < max(z, 0) * camera.width / 2 / camera.intrinsic[0][0] + slack


def _background(frame: ToyFrame, camera: Camera) -> Pixels:
    rays = _rays(camera)
    pixels = np.empty((camera.height, camera.width, 3), np.uint8)
    pixels[rays.ground] = _ground(frame, camera)
    pixels[~rays.ground] = _sky(frame, rays)
    return pixels


def _ground(frame: ToyFrame, camera: Camera) -> Pixels:
    """Road, markings and what lies beside it, (ground pixels, 3)."""
    along, across = _road_rays(camera, frame.curvature)
    rng = frame.random("ground")
    left, right = road_edges(frame.ego_lane)
    on_road = (across < left) & (across > right)
    colours = np.where(on_road[:, None], np.array(_ASPHALT, np.int16), np.array(_APRON, np.int16))
    cells = (_grain_cells(camera, frame.curvature, frame.speed) + rng.randrange(_GRAIN_SIZE)) % _grain().size
    colours += _grain()[cells][:, None]
    half = _LINE_WIDTH / 2
    colours[np.abs(across - left) < half] = (240, 200, 40)
    colours[np.abs(across - right) < half] = (235, 235, 235)
    dashed = (along + rng.uniform(0, _DASH_PERIOD)) % _DASH_PERIOD < _DASH_LENGTH[frame.speed]
    for lane in range(1, LANES):
        colours[(np.abs(across - (left - lane * LANE_WIDTH)) < half) & dashed] = (235, 235, 235)
    return np.clip(colours, 0, 255).astype(np.uint8)


def _sky(frame: ToyFrame, rays: _Rays) -> Pixels:
    """Sky and the scene's skyline, (sky pixels, 3)."""
    heights, colours = _skyline(frame.seed, frame.scene)
    overhead, horizon = (np.array(colour, np.float32) for colour in _SKY[frame.weather])
    blend = np.clip(rays.slope / 0.45, 0, 1)[:, None]
    sky = horizon + (overhead - horizon) * blend
    built = rays.slope < heights[rays.azimuth_bin]
    sky[built] = colours[rays.azimuth_bin[built]]
    return sky.astype(np.uint8)


@cache
def _skyline(seed: int, scene: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Houses and trees all around: tangent of their height and colour by azimuth."""
    rng = random.Random(f"{seed}/{scene}/skyline")
    heights = np.zeros(_SKYLINE_BINS, np.float32)
    colours = np.zeros((_SKYLINE_BINS, 3), np.float32)
    start = 0
    while start < _SKYLINE_BINS:
        end = start + rng.randrange(6, 30)
        if rng.random() < 0.45:
            height, colour = rng.uniform(0.03, 0.08), (70 + rng.randrange(20), 100 + rng.randrange(25), 66)
        else:
            grey = rng.randrange(112, 176)
            height, colour = rng.uniform(0.02, 0.15), (grey, grey - rng.randrange(4, 18), grey - rng.randrange(8, 30))
        heights[start:end] = height
        colours[start:end] = colour
        start = end
    return heights, colours


def _visible_polygon(camera: Camera, points: Array) -> Array | None:
    """Camera frame (n, 3) -> pixels (m, 2) of the part before the near plane; None if there is none."""
    before = points[:, 2] > _NEAR
    if before.all():
        return camera.project(points)
    kept = []
    for i in range(len(points)):
        a, b = points[i - 1], points[i]
        if before[i - 1] != before[i]:
            kept.append(a + (b - a) * ((_NEAR - a[2]) / (b[2] - a[2])))
        if before[i]:
            kept.append(b)
    return camera.project(np.array(kept)) if kept else None


def _block_of_box(camera: Camera, corners: Array) -> Block | None:
    """The rows and columns that a box (camera frame, (8, 3)) can touch; None if it is out of the picture."""
    before = corners[:, 2] > _NEAR
    if not before.any():
        return None
    if not before.all():  # rare, and then the object is close: take the whole picture
        return slice(0, camera.height), slice(0, camera.width)
    return _block_of(camera.project(corners), (slice(0, camera.height), slice(0, camera.width)), margin=1)


def _block_of(polygon: Array, within: Block, margin: int = 0) -> Block | None:
    """The rows and columns of a polygon in pixels (n, 2), as far as they lie within a block; None if none does."""
    (x0, y0), (x1, y1) = polygon.min(axis=0), polygon.max(axis=0)
    left, right = max(math.floor(x0) - margin, within[1].start), min(math.ceil(x1) + margin + 1, within[1].stop)
    top, bottom = max(math.floor(y0) - margin, within[0].start), min(math.ceil(y1) + margin + 1, within[0].stop)
    return (slice(top, bottom), slice(left, right)) if right > left and bottom > top else None


def _fill(camera: Camera, points: Array, within: Block | None = None) -> tuple[Block, NDArray[np.bool_]] | None:
    """A face (camera frame, (n, 3)) -> a block of the picture and the mask of its pixels there; None if outside."""
    polygon = _visible_polygon(camera, points)
    if polygon is None:
        return None
    block = _block_of(polygon, within or (slice(0, camera.height), slice(0, camera.width)))
    if block is None:
        return None
    (top, bottom), (left, right) = ((side.start, side.stop) for side in block)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in polygon.tolist()], fill=1)
    return block, np.asarray(mask, bool)


def _normal(points: Array) -> Array:
    """The normal of a flat polygon (n, 3), not normalised; plain arithmetic because `np.cross` is slow on one pair."""
    (ax, ay, az), (bx, by, bz) = (points[1] - points[0]).tolist(), (points[2] - points[0]).tolist()
    return np.array([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx])


def _plane_nearness(camera: Camera, points: Array, block: Block) -> NDArray[np.float32] | None:
    """1 / depth of a face's plane for a block of pixels (it is linear in pixels); None if the face is seen edge-on."""
    rows, columns = block
    normal = _normal(points)
    offset = float(normal @ points[0])
    if abs(offset) < 1e-9 * float(np.abs(normal).max() + 1e-12):
        return None
    a, b, c = normal / offset
    focal, cx, cy = camera.intrinsic[0][0], camera.intrinsic[0][2], camera.intrinsic[1][2]
    x = (np.arange(columns.start, columns.stop) - cx) * (a / focal)
    y = (np.arange(rows.start, rows.stop) - cy) * (b / focal) + c
    return (x[None, :] + y[:, None]).astype(np.float32)


def _draw_object(canvas: _Canvas, index: int, item: ToyObject) -> None:
    """Draw one object into buffers of its own, then where it is nearest into the picture."""
    camera = canvas.camera
    block = _block_of_box(camera, camera.to_camera(item.corners()))
    if block is None:
        return
    shape = (block[0].stop - block[0].start, block[1].stop - block[1].start)
    nearness = np.zeros(shape, np.float32)
    colours = np.zeros((*shape, 3), np.uint8)
    glows = np.zeros(shape, bool)
    faces = build_faces(item)
    points = camera.to_camera(item.to_ego(np.concatenate([face.points for face in faces])))
    ends = np.cumsum([len(face.points) for face in faces])
    for face, local in zip(faces, np.split(points, ends[:-1]), strict=True):
        if not face.both_sides and _normal(local) @ local[0] >= 0:
            continue  # its back
        filled = _fill(camera, local, block)
        if filled is None:
            continue
        area, mask = filled
        near = _plane_nearness(camera, local, area)
        if near is None:
            continue
        # Pillow fills the pixels on the edge too, where the plane may be beyond the face: stay within the face.
        near = np.clip(near, 1 / local[:, 2].max(), 1 / max(local[:, 2].min(), _NEAR)) * (1 + 0.002 * face.layer)
        here = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(area, block, strict=True))
        nearest = mask & (near > nearness[here])
        nearness[here][nearest] = near[nearest]
        colours[here][nearest] = face.colour
        glows[here][nearest] = face.glows
    canvas.shapes[index] = block, nearness > 0
    wins = nearness > canvas.nearness[block]
    canvas.nearness[block][wins] = nearness[wins]
    canvas.pixels[block][wins] = colours[wins]
    canvas.glows[block][wins] = glows[wins]
    canvas.numbers[block][wins] = index + 1


def _draw_shadow(canvas: _Canvas, item: ToyObject) -> None:
    if item.name == "traffic light":
        return
    length, width, _ = item.size
    corners = np.array([(x, y, 0.0) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]) / 2
    filled = _fill(canvas.camera, canvas.camera.to_camera(item.to_ego(corners * (length + 0.25, width + 0.25, 1))))
    if filled is not None:
        block, mask = filled
        pixels = canvas.pixels[block]
        pixels[mask] = (pixels[mask] * 0.55).astype(np.uint8)


def _draw_pole(canvas: _Canvas, item: ToyObject) -> None:
    """The pole of a traffic light is scenery: it hides what is behind it and belongs to no object."""
    x, y, z = item.center
    camera = canvas.camera
    away = math.atan2(y - camera.translation[1], x - camera.translation[0])
    side = np.array([-math.sin(away), math.cos(away), 0.0]) * 0.09  # a strip that faces the camera
    foot, head = np.array([x, y, 0.0]), np.array([x, y, z])
    local = camera.to_camera(np.array([foot - side, foot + side, head + side, head - side]))
    filled = _fill(camera, local)
    if filled is None:
        return
    block, mask = filled
    near = np.float32(1 / max(float(local[:, 2].mean()), _NEAR))
    nearest = mask & (canvas.nearness[block] < near)
    canvas.nearness[block][nearest] = near
    canvas.pixels[block][nearest] = (70, 72, 76)
    canvas.glows[block][nearest] = False
    canvas.numbers[block][nearest] = 0


def _draw_streaks(canvas: _Canvas, item: ToyObject) -> None:
    camera = canvas.camera
    for streak in build_streaks(item):
        local = camera.to_camera(item.to_ego(streak))
        filled = _fill(camera, local)
        if filled is None:
            continue
        block, mask = filled
        near = _plane_nearness(camera, local, block)
        if near is None:
            continue
        shown = mask & (near > canvas.nearness[block])
        pixels = canvas.pixels[block]
        pixels[shown] = (pixels[shown] * 0.3 + np.array(STREAK) * 0.7).astype(np.uint8)
        canvas.glows[block][shown] = True  # a mark of the picture, not paint: the night does not take it


def _weathered(frame: ToyFrame, canvas: _Canvas, rng: random.Random) -> Pixels:
    if frame.weather == "day":
        return canvas.pixels
    pixels = canvas.pixels.astype(np.float32)
    nearness = np.maximum(canvas.nearness, _rays(canvas.camera).nearness)
    if frame.weather == "night":
        return _at_night(canvas, pixels, nearness)
    if frame.weather == "fog":
        through = np.exp(-1 / (_FOG_LENGTH * np.maximum(nearness, 1e-3)))
        through = np.where(canvas.glows, np.sqrt(through), through)[..., None]  # lamps carry farther
        fog = np.array(_FOG_COLOUR, np.float32)
        return (fog + (pixels - fog) * through).astype(np.uint8)
    return _in_rain(canvas, pixels, rng)


def _at_night(canvas: _Canvas, pixels: NDArray[np.float32], nearness: NDArray[np.float32]) -> Pixels:
    light = np.full(nearness.shape, 0.42, np.float32)
    beam = {"front": 0.75, "front left": 0.25, "front right": 0.25}.get(canvas.camera.sector, 0.12)
    light += beam * np.clip(nearness * 9, 0, 1) ** 1.2 * (nearness > 0)
    sky = nearness == 0
    lit = pixels * np.minimum(light, 1.0)[..., None] * np.array((0.9, 0.95, 1.12), np.float32)
    lit[canvas.glows] = pixels[canvas.glows]
    lit[sky] = pixels[sky] * np.where(pixels[sky].sum(axis=1) > 130, 0.25, 1.0)[:, None]  # houses are dark, the sky is
    return np.clip(lit, 0, 255).astype(np.uint8)


def _in_rain(canvas: _Canvas, pixels: NDArray[np.float32], rng: random.Random) -> Pixels:
    height, width = canvas.nearness.shape
    grey = pixels.mean(axis=2, keepdims=True)
    lit = (pixels * 0.65 + grey * 0.35) * 0.72 + 8
    lit[canvas.glows] = pixels[canvas.glows]
    unit = width / 400
    overlay = Image.new("L", (width, height))
    draw = ImageDraw.Draw(overlay)
    for _ in range(110):
        x, y = rng.uniform(-10, width), rng.uniform(-20, height)
        long = rng.uniform(9, 22) * unit
        draw.line((x, y, x + long * 0.22, y + long), fill=rng.randrange(60, 130), width=max(1, round(unit)))
    for _ in range(7):
        x, y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(2, 5) * unit
        draw.ellipse((x - radius, y - radius, x + radius, y + radius * 1.3), fill=rng.randrange(50, 90))
    alpha = np.asarray(overlay, np.float32)[..., None] / 255
    return np.clip(lit + (215 - lit) * alpha, 0, 255).astype(np.uint8)
