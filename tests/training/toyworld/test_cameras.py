"""The toy world's cameras are a rig's, at a picture size; which share of a box a picture holds."""

import math

import numpy as np
import pytest

from training.data.rig import NUSCENES, make_rig, read_rig
from training.toyworld.cameras import cameras

BOX = np.array([(x, y, z) for x in (9.0, 11.0) for y in (-1.0, 1.0) for z in (0.0, 2.0)])  # ten metres ahead


@pytest.mark.parametrize("name", ["nuscenes", "four", "seven"])
def test_pictures_keep_the_rig_s_proportions_and_view(name):
    rig = read_rig(name)
    for width in (160, 1600):
        views = cameras(width, rig)
        assert tuple(views) == rig.names
        for mount in rig.mounts:
            view = views[mount.name]
            assert (view.width, view.height) == tuple(side * width // 1600 for side in mount.size)
            seen = 2 * math.degrees(math.atan(view.width / 2 / view.intrinsic[0][0]))
            assert seen == pytest.approx(mount.field_of_view, abs=0.01)
            ahead = view.axes[:, 2]  # the optical axis in the ego frame
            azimuth = math.degrees(math.atan2(ahead[1], ahead[0]))
            assert azimuth == pytest.approx(mount.azimuth) or azimuth == pytest.approx(mount.azimuth - 360)


@pytest.mark.parametrize(("width", "rig"), [(410, "nuscenes"), (0, "nuscenes"), (16, "four")])
def test_pictures_of_broken_pixels_are_refused(width, rig):
    with pytest.raises(ValueError, match="whole pixels"):
        cameras(width, read_rig(rig))


def test_a_rig_that_does_not_tell_all_cannot_be_drawn():
    with pytest.raises(ValueError, match="place, size and field_of_view of every camera; lens lacks some"):
        cameras(400, make_rig({"lens": {"azimuth": 0, "size": [1600, 900]}}, "here"))


def test_shares_of_a_box_in_a_picture():
    views = cameras(400, NUSCENES)
    front = views["CAM_FRONT"]
    assert front.share_in_picture(BOX) == front.share_of_width(BOX) == 1.0
    aside = BOX + (0.0, 5.2, 0.0)  # the left border cuts it
    assert 0.2 < front.share_in_picture(aside) < 0.8 and 0.2 < front.share_of_width(aside) < 0.8
    above = BOX + (0.0, 0.0, 4.0)  # the upper border cuts it, not its width
    assert 0.2 < front.share_in_picture(above) < 0.9 and front.share_of_width(above) == 1.0
    assert views["CAM_BACK"].share_in_picture(BOX) == views["CAM_BACK"].share_of_width(BOX) == 0.0
    assert front.share_in_picture(BOX - (8.0, 0.0, 0.0)) == 0.0, "part of it is behind the camera"
