"""The toy world's cameras: a rig's, at a picture size, and how much of a box each of them shows."""

import math
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray
from pyquaternion import Quaternion

from training.data.drivelm import IMAGE_SIZE
from training.data.rig import NUSCENES, Mount, Rig

Array = NDArray[np.float64]

_HORIZON = 480 / 900  # of the picture's height
# camera axes (x right, y down, z forward) of a camera that looks along the ego frame's x axis
_LOOKING_FORWARD = Quaternion(matrix=np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]))


@dataclass(frozen=True)
class Camera:
    """A pinhole camera at a picture size: intrinsics in pixels, pose in the ego frame.

    `rotation` turns camera axes (x right, y down, z forward) into ego axes, as nuScenes' `calibrated_sensor` does.
    Pixel (column i, row j) is the ray through (i, j): centres are whole numbers.
    """

    name: str
    sector: str
    azimuth: float
    field_of_view: float
    width: int
    height: int
    translation: tuple[float, float, float]
    rotation: Quaternion
    intrinsic: tuple[tuple[float, float, float], ...]

    @cached_property
    def axes(self) -> Array:
        """The camera's axes in the ego frame, in columns, (3, 3)."""
        return self.rotation.rotation_matrix

    def to_camera(self, points: Array) -> Array:
        """Ego frame (n, 3) -> camera frame (n, 3)."""
        return (points - np.array(self.translation)) @ self.axes

    def project(self, points: Array) -> Array:
        """Camera frame (n, 3) with positive z -> pixels (n, 2)."""
        focal, (cx, cy) = self.intrinsic[0][0], (self.intrinsic[0][2], self.intrinsic[1][2])
        return points[:, :2] / points[:, 2:] * focal + (cx, cy)

    def share_of_width(self, corners: Array) -> float:
        """The share of a box's (8, 3, ego frame) width that lies in the picture; parts behind the camera do not."""
        local = self.to_camera(corners)
        if (local[:, 2] <= 0.1).all():
            return 0.0
        angles = np.arctan2(local[:, 0], local[:, 2])  # to the right of the optical axis; sound behind the camera too
        left, right = angles.min(), angles.max()
        if right - left > math.pi:  # astride the seam behind the camera
            return 0.0
        focal, cx = self.intrinsic[0][0], self.intrinsic[0][2]
        view = math.atan2(-cx, focal), math.atan2(self.width - cx, focal)
        return max(0.0, min(right, view[1]) - max(left, view[0])) / (right - left)

    def share_in_picture(self, corners: Array) -> float:
        """The share of a box's (8, 3, ego frame) outline that lies in the picture; none of one that reaches behind."""
        local = self.to_camera(corners)
        if (local[:, 2] <= 0.1).any():
            return 0.0
        pixels = self.project(local)
        low, high = pixels.min(axis=0), pixels.max(axis=0)
        inside = np.minimum(high, (self.width, self.height)) - np.maximum(low, 0.0)
        return float(np.prod(np.maximum(inside, 0.0) / (high - low)))


@cache
def cameras(width: int, rig: Rig = NUSCENES) -> dict[str, Camera]:
    """The cameras by name, for pictures that are `width` pixels wide where the rig's are 1600; others in proportion.

    Raises:
        ValueError: the rig does not tell all about a camera, or a picture's width or height would be no whole number.
    """
    return {mount.name: _camera(mount, width) for mount in rig.mounts}


def _camera(mount: Mount, width: int) -> Camera:
    if mount.place is None or mount.size is None or mount.field_of_view is None:
        raise ValueError(f"the toy world needs place, size and field_of_view of every camera; {mount.name} lacks some")
    full_width, full_height = mount.size
    if width < 1 or width * full_width % IMAGE_SIZE[0] or width * full_height % IMAGE_SIZE[0]:
        raise ValueError(
            f"the picture width must make the size of {mount.name}, {full_width}x{full_height} at a width of "
            f"{IMAGE_SIZE[0]}, whole pixels, as a multiple of 16 does with 1600x900; got {width}"
        )
    scale = width / IMAGE_SIZE[0]
    focal = round(full_width / 2 / math.tan(math.radians(mount.field_of_view / 2)), 1) * scale
    cx, cy = full_width / 2 * scale, full_height * _HORIZON * scale
    return Camera(
        mount.name,
        mount.sector,
        mount.azimuth,
        mount.field_of_view,
        width * full_width // IMAGE_SIZE[0],
        width * full_height // IMAGE_SIZE[0],
        mount.place,
        Quaternion(axis=(0, 0, 1), degrees=mount.azimuth) * _LOOKING_FORWARD,
        ((focal, 0.0, cx), (0.0, focal, cy), (0.0, 0.0, 1.0)),
    )
