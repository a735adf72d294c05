"""What stands where in a toy frame: road and objects. No pixels, no words.

Everything is in the ego frame of nuScenes: x forward, y left, z up, metres, origin on the ground under the rear axle.
A frame is a function of (seed, scene number, frame number) alone, so any number of processes gives the same world.

The cameras are a rig's (`training.data.rig`), nuScenes' six unless another is asked for; what they cover overlaps a
little. Objects are placed so that one camera has most of an object and none of another sector more than a sliver of
it, or "to the front left" would have two answers.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from pyquaternion import Quaternion

from training.data.drivelm import IMAGE_SIZE
from training.data.rig import NUSCENES, Rig
from training.data.wording import STATUSES
from training.toyworld.cameras import Array, Camera, cameras

WEATHERS = ("day", "night", "rain", "fog")
DIRECTIONS = ("straight", "left", "right")
SPEEDS = ("not moving", "slow", "normal", "fast")
CURVATURE = {"straight": 0.0, "left": 1 / 50, "right": -1 / 50}  # 1/m, positive to the left
LANES = 3
LANE_WIDTH = 3.5
LIGHTS = (None, "red", "green")


class Kind(NamedTuple):
    """A class of objects. Small things are a little larger than life: a picture may be 112 pixels wide."""

    size: tuple[float, float, float]  # length, width, height in metres
    colours: tuple[str, ...]
    reach: tuple[float, float]  # metres from the ego car's origin to the object's centre


KINDS = {
    "car": Kind((4.4, 1.9, 1.7), ("white", "blue", "green"), (7.5, 18.0)),
    "truck": Kind((7.5, 2.6, 3.3), ("brown", "gray"), (10.0, 22.0)),
    "bus": Kind((10.0, 2.8, 3.3), ("yellow", "purple"), (11.0, 24.0)),
    "construction vehicle": Kind((5.6, 2.6, 3.3), ("orange",), (8.5, 18.0)),
    "pedestrian": Kind((0.8, 0.8, 1.9), ("pink", "cyan"), (5.5, 11.0)),
    "bicycle": Kind((1.9, 0.7, 1.2), ("light green",), (5.5, 10.5)),
    "motorcycle": Kind((2.2, 0.9, 1.3), ("red",), (5.5, 11.5)),
    "barrier": Kind((0.6, 2.4, 1.1), ("red and white",), (5.5, 11.5)),
    "traffic cone": Kind((0.8, 0.8, 1.15), ("orange",), (5.0, 9.0)),
    "traffic light": Kind((0.5, 1.1, 2.6), ("black",), (11.5, 15.0)),
}
RIDDEN_HEIGHT = 1.95
CLASSES = tuple(name for name in KINDS if name != "traffic light")  # traffic lights have a place of their own
LARGE = ("truck", "bus", "construction vehicle")
_WIDE, _NARROW = 75.0, 45.0  # degrees of view
_GROUPS = ((0, 34), (1, 44), (2, 22))  # groups of one class in a sector: (number, weight)
_GROUP_SIZES = ((1, 50), (2, 30), (3, 20))
_LARGE_GROUP_SIZES = ((1, 75), (2, 25))
_EGO_BACK, _EGO_FRONT = -1.5, 4.0
_ATTEMPTS = 25
_GAP = 0.4  # metres between two objects


@dataclass(frozen=True)
class ToyObject:
    """A box on the ground (a traffic light hangs) in the ego frame."""

    name: str  # as in `training.data.wording.STATUSES`
    status: str | None  # the same
    turn: str  # "straight", "left" or "right"; only a moving vehicle turns
    colour: str  # one of `KINDS[name].colours`
    center: tuple[float, float, float]  # x, y, z of the box's centre
    size: tuple[float, float, float]  # length, width, height
    yaw: float  # radians
    along: float  # metres along the road
    across: float  # metres to the left of the middle of the ego lane

    @property
    def rotation(self) -> Quaternion:
        return Quaternion(axis=(0, 0, 1), radians=self.yaw)

    @cached_property
    def axes(self) -> Array:
        """The object's axes in the ego frame, in columns, (3, 3)."""
        return self.rotation.rotation_matrix

    def to_ego(self, points: Array) -> Array:
        """Object frame (x forward, y left, origin at the middle of the bottom) -> ego frame, both (n, 3)."""
        bottom = np.array(self.center) - (0, 0, self.size[2] / 2)
        return points @ self.axes.T + bottom

    def corners(self) -> Array:
        """The box's corners in the ego frame, (8, 3)."""
        length, width, height = self.size
        signs = np.array([(x, y, z) for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (0, 1)])
        return self.to_ego(signs * (length, width, height))

    @cached_property
    def distance(self) -> float:
        """Metres on the ground from the ego car's origin to the nearest point of the box's footprint."""
        local = self.axes.T @ (-self.center[0], -self.center[1], 0.0)
        beyond = np.maximum(np.abs(local[:2]) - np.array(self.size[:2]) / 2, 0.0)
        return float(np.hypot(*beyond))


@dataclass(frozen=True)
class ToyFrame:
    """One key frame: the state of the world and the ego car."""

    seed: int
    scene: int
    frame: int
    weather: str
    direction: str
    speed: str
    ego_lane: int  # 0 is the leftmost
    light: str | None
    objects: tuple[ToyObject, ...]
    rig: Rig = NUSCENES

    @property
    def curvature(self) -> float:
        return CURVATURE[self.direction]

    @property
    def token(self) -> str:
        """DriveLM's frame token, which is nuScenes' sample token."""
        return token(self.seed, "sample", self.scene, self.frame)

    @property
    def scene_token(self) -> str:
        return token(self.seed, "scene", self.scene)

    def random(self, purpose: str) -> random.Random:
        """A generator of this frame's own for one purpose."""
        return random.Random(f"{self.seed}/{self.scene}/{self.frame}/{purpose}")


def token(seed: int, *parts: object) -> str:
    """32 hex digits, nuScenes' style, from what the token stands for."""
    text = "/".join(["toyworld", str(seed), *map(str, parts)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def road_coordinates(x: Array, y: Array, curvature: float) -> tuple[Array, Array]:
    """Ego frame -> (metres along the road, metres to the left of the ego lane's middle); the road is an arc."""
    if curvature == 0:
        return x, y
    radius = 1 / abs(curvature)
    side = math.copysign(1.0, curvature)
    return np.arctan2(x, radius - side * y) * radius, side * (radius - np.hypot(x, side * y - radius))


def from_road(along: float, across: float, curvature: float) -> tuple[float, float, float]:
    """(along, across) -> (x, y, heading of the road there in radians)."""
    if curvature == 0:
        return along, across, 0.0
    heading = along * curvature
    radius = 1 / curvature - across
    return radius * math.sin(heading), 1 / curvature - radius * math.cos(heading), heading


def lane_offset(frame: ToyFrame, item: ToyObject) -> int | None:
    """Lanes to the left of the ego lane (negative: to the right); None off the road."""
    lanes = round(item.across / LANE_WIDTH)
    return lanes if 0 <= frame.ego_lane - lanes < LANES else None


def in_ego_path(frame: ToyFrame, item: ToyObject) -> bool:
    """Whether it stands in the ego lane ahead."""
    return item.name != "traffic light" and item.along > 0 and abs(item.across) < LANE_WIDTH / 2


def road_edges(ego_lane: int) -> tuple[float, float]:
    """Metres to the left of the ego lane's middle of the road's left and right edge."""
    return (ego_lane + 0.5) * LANE_WIDTH, (ego_lane + 0.5 - LANES) * LANE_WIDTH


def sample_frame(
    seed: int, scene: int, frame: int, frames_per_scene: int, weathers: Sequence[str] = WEATHERS, rig: Rig = NUSCENES
) -> ToyFrame:
    """Draw one key frame.

    Weather belongs to the scene. Weather, behaviour of the ego car and traffic light go through shuffled rounds of
    all their values, so that each is as frequent as the others. Key frames of a scene are far apart in time: they
    share road, weather and skyline, and meet other objects. Without a camera that looks ahead there is no light.
    """
    number = scene * frames_per_scene + frame
    behaviours = [(direction, speed) for direction in DIRECTIONS for speed in SPEEDS]
    weather = _in_turn(seed, "weather", weathers, scene)
    direction, speed = _in_turn(seed, "behaviour", behaviours, number)
    light = _in_turn(seed, "light", LIGHTS, number) if "front" in rig.sectors else None
    ego_lane = _in_turn(seed, "lane", range(LANES), number)
    bare = ToyFrame(seed, scene, frame, weather, direction, speed, ego_lane, light, (), rig)
    return replace(bare, objects=tuple(_sample_objects(bare, bare.random("objects"))))


def _in_turn(seed: int, purpose: str, values, number: int):
    """The `number`-th value of endless rounds through `values`, each round shuffled."""
    order = list(values)
    random.Random(f"{seed}/{purpose}/{number // len(order)}").shuffle(order)
    return order[number % len(order)]


def _sample_objects(frame: ToyFrame, rng: random.Random) -> list[ToyObject]:
    placed: list[ToyObject] = []
    if frame.light is not None:
        placed.append(_place_light(frame, rng))
    views = list(cameras(IMAGE_SIZE[0], frame.rig).values())
    rng.shuffle(views)  # who comes first has more room: no camera shall always be first
    for camera in views:
        for name in rng.sample(CLASSES, _weighted(rng, _GROUPS)):
            for _ in range(_weighted(rng, _LARGE_GROUP_SIZES if name in LARGE else _GROUP_SIZES)):
                item = _place(frame, camera, name, placed, rng)
                if item is not None:
                    placed.append(item)
    return placed


def _weighted(rng: random.Random, choices: tuple[tuple[int, int], ...]) -> int:
    values, weights = zip(*choices, strict=True)
    return rng.choices(values, weights)[0]


def _place_light(frame: ToyFrame, rng: random.Random) -> ToyObject:
    """A traffic light ahead, over the lane or beside it; always well inside the front view."""
    name = "traffic light"
    x = rng.uniform(*KINDS[name].reach)
    y = rng.uniform(-0.24, 0.24) * x
    heading = float(from_road(x, 0.0, frame.curvature)[2])
    s, d = (float(v) for v in road_coordinates(np.array(x), np.array(y), frame.curvature))
    return ToyObject(name, frame.light, "straight", "black", (x, y, 3.75), KINDS[name].size, heading, s, d)


def _place(
    frame: ToyFrame, camera: Camera, name: str, placed: list[ToyObject], rng: random.Random
) -> ToyObject | None:
    """Draw an object for a camera to see; None if it found no free place in a fair number of attempts."""
    status = rng.choice(STATUSES[name]) if STATUSES[name] else None
    colour = rng.choice(KINDS[name].colours)
    length, width, height = (side * rng.uniform(0.94, 1.06) for side in KINDS[name].size)
    if status == "with rider":
        height = RIDDEN_HEIGHT * rng.uniform(0.97, 1.03)
    vehicle = status in ("moving", "parked", "stopped") and name != "pedestrian"
    turn = rng.choice(DIRECTIONS) if vehicle and status == "moving" else "straight"
    near, far = _range(name, camera)
    half = _drawn_angle(camera) / 2
    for _ in range(_ATTEMPTS):
        azimuth = math.radians(camera.azimuth + rng.uniform(-half, half))
        distance = rng.uniform(near, far)
        x, y = distance * math.cos(azimuth), distance * math.sin(azimuth)
        s, d = (float(v) for v in road_coordinates(np.array(x), np.array(y), frame.curvature))
        lane = round(d / LANE_WIDTH)
        if vehicle and status != "parked" and 0 <= frame.ego_lane - lane < LANES:
            d = lane * LANE_WIDTH + rng.uniform(-0.25, 0.25)  # traffic keeps to the lanes
        x, y, heading = from_road(s, d, frame.curvature)
        yaw = heading + _turned(name, status, turn, rng)
        item = ToyObject(name, status, turn, colour, (x, y, height / 2), (length, width, height), yaw, s, d)
        if _fits(item, placed) and _belongs_to(item, camera, frame.rig):
            return item
    return None


def _range(name: str, camera: Camera) -> tuple[float, float]:
    """Metres from the ego car's origin at which a camera shall see a class."""
    turn = math.radians(camera.azimuth)
    ahead = camera.translation[0] * math.cos(turn) + camera.translation[1] * math.sin(turn) > 1.6  # of the origin, far
    # A wide camera shows everything smaller, a narrow one larger.
    scale = 0.8 if camera.field_of_view > _WIDE else 1.5 if camera.field_of_view < _NARROW else 1.0
    near, far = ((distance + (1.5 if ahead else 0.0)) * scale for distance in KINDS[name].reach)
    return near, far


def _drawn_angle(camera: Camera) -> float:
    """Degrees of azimuth in which centres are drawn: some less than the view, 50 of 65, 80 of 89."""
    return max(10.0 * round((camera.field_of_view - 12) / 10), 10.0)


def _turned(name: str, status: str | None, turn: str, rng: random.Random) -> float:
    """Radians between the road and where an object faces."""
    if turn != "straight":
        return math.radians(20 if turn == "left" else -20)
    if name == "pedestrian":
        return rng.uniform(-math.pi, math.pi)
    if name in ("bicycle", "motorcycle"):
        return math.radians(rng.choice((0, 45, -45, 90, -90)) + rng.uniform(-8, 8))
    if name in ("barrier", "traffic cone"):
        return math.radians(rng.choice((0, 90)) + rng.uniform(-15, 15))
    return math.radians(rng.uniform(-5, 5) if status == "parked" else rng.uniform(-2, 2))


def _fits(item: ToyObject, placed: list[ToyObject]) -> bool:
    x, y = item.center[0], item.center[1]
    ego = ToyObject("car", None, "straight", "", ((_EGO_BACK + _EGO_FRONT) / 2, 0, 0.8), (5.5, 2.0, 1.6), 0.0, 0, 0)
    for other in (ego, *placed):
        if other.name == "traffic light":  # it hangs above
            continue
        apart = math.hypot(x - other.center[0], y - other.center[1])
        if apart < (math.hypot(*item.size[:2]) + math.hypot(*other.size[:2])) / 2 + _GAP and _overlap(item, other):
            return False
    return True


def _overlap(a: ToyObject, b: ToyObject) -> bool:
    """Whether two footprints come closer than `_GAP`: separating axis test."""
    between = np.array([b.center[0] - a.center[0], b.center[1] - a.center[1]])
    axes = np.array(
        [(math.cos(yaw + turn), math.sin(yaw + turn)) for yaw in (a.yaw, b.yaw) for turn in (0, math.pi / 2)]
    )
    reach = np.zeros(4)
    for item, first in ((a, 0), (b, 2)):
        sides = axes[first : first + 2] * (np.array(item.size[:2]) / 2)[:, None]  # (2 half sides, 2)
        reach += np.abs(axes @ sides.T).sum(axis=1)
    return bool((np.abs(axes @ between) < reach + _GAP).all())


def _belongs_to(item: ToyObject, camera: Camera, rig: Rig) -> bool:
    """Whether this camera has most of the object's width and none of another sector has more than a sliver."""
    corners = item.corners()
    views = cameras(IMAGE_SIZE[0], rig).values()
    others = [view.share_of_width(corners) for view in views if view.sector != camera.sector]
    return camera.share_of_width(corners) >= 0.75 and max(others, default=0.0) <= 0.12
