"""What the pictures show, against a second computation that shares nothing with the renderer but the shapes.

The renderer fills polygons with Pillow and compares depths that it gets from planes in the picture. Here a ray goes
through the middle of a pixel into the world and is intersected with every triangle (Möller and Trumbore, 1997).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoldriver_hf.configuration_smoldriver import CAMERAS
from training.data.rig import NUSCENES, read_rig
from training.toyworld.cameras import cameras
from training.toyworld.models import build_faces
from training.toyworld.questions import write_questions
from training.toyworld.render import render
from training.toyworld.scene import (
    CURVATURE,
    DIRECTIONS,
    ToyFrame,
    ToyObject,
    from_road,
    road_coordinates,
    sample_frame,
)
from training.toyworld.truth import find_truth

SECTORS = {name: NUSCENES.sector(name) for name in NUSCENES.names}

WIDTH, STEP = 208, 3
SCENES = (0, 7, 13)


def triangles_of(item: ToyObject) -> np.ndarray:
    """All faces of an object as triangles in the ego frame, (n, 3, 3), turned by hand."""
    cos, sin = math.cos(item.yaw), math.sin(item.yaw)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    bottom = np.array(item.center) - (0, 0, item.size[2] / 2)
    return np.concatenate([fan(face.points @ turn.T + bottom) for face in build_faces(item)])


def fan(points: np.ndarray) -> np.ndarray:
    return np.array([(points[0], points[i], points[i + 1]) for i in range(1, len(points) - 1)])


def pole_of(item: ToyObject, origin: np.ndarray) -> np.ndarray:
    """The pole under a traffic light: a strip that faces the camera; scenery, but it hides what is behind it."""
    x, y, z = item.center
    length = math.hypot(x - origin[0], y - origin[1])
    side = 0.09 * np.array([origin[1] - y, x - origin[0], 0]) / length
    foot, head = np.array([x, y, 0.0]), np.array([x, y, z])
    return fan(np.array([foot - side, foot + side, head + side, head - side]))


def distances(origin: np.ndarray, rays: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Along each ray to the first triangle, infinite where there is none, (rays,)."""
    a, edge1, edge2 = triangles[:, 0], triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    p = np.cross(rays[:, None], edge2[None])  # (rays, triangles, 3)
    determinant = (p * edge1).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        u = (p * (origin - a)).sum(-1) / determinant
        q = np.cross(origin - a, edge1)  # (triangles, 3)
        v = rays @ q.T / determinant
        t = (edge2 * q).sum(-1) / determinant
        inside = (np.abs(determinant) > 1e-12) & (u >= 0) & (v >= 0) & (u + v <= 1) & (t > 0.2)
    return np.where(inside, t, np.inf).min(axis=1)


def cast(frame: ToyFrame, camera_name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, columns) of pixels, depth of each object along each of their rays (objects + 1, pixels); last: poles."""
    camera = cameras(WIDTH)[camera_name]
    rows, columns = (grid.ravel() for grid in np.mgrid[0 : camera.height : STEP, 0 : camera.width : STEP])
    matrix = np.linalg.inv(np.array(camera.intrinsic))
    local = np.column_stack([columns, rows, np.ones(len(rows))]) @ matrix.T
    rays = np.array([camera.rotation.rotate(ray) for ray in local])
    origin = np.array(camera.translation)
    shapes = [triangles_of(item) for item in frame.objects]
    poles = [pole_of(item, origin) for item in frame.objects if item.name == "traffic light"]
    shapes.append(np.concatenate(poles) if poles else np.zeros((1, 3, 3)))
    return rows, columns, np.array([distances(origin, rays, shape) for shape in shapes])


@pytest.fixture(scope="module", params=SCENES)
def pictured(request):
    frame = sample_frame(1, request.param, 0, 1)
    views = render(frame, WIDTH)
    return frame, views, {name: cast(frame, name) for name in views}


def test_every_pixel_shows_the_object_that_a_ray_meets_first(pictured):
    frame, views, casts = pictured
    compared = 0
    for name, view in views.items():
        rows, columns, depth = casts[name]
        expected = np.where(np.isfinite(depth.min(axis=0)), depth.argmin(axis=0) + 1, 0)
        expected[expected == len(depth)] = 0  # a pole
        # On outlines the two may differ by a pixel: compare where the surroundings are all one object.
        padded = np.pad(view.numbers, 1, mode="edge")
        around = [padded[rows + i, columns + j] for i in range(3) for j in range(3)]
        inner = np.all(np.array(around) == view.numbers[rows, columns], axis=0)
        wrong = np.count_nonzero(inner & (view.numbers[rows, columns] != expected))
        objects = np.count_nonzero(inner & (expected > 0))
        compared += objects
        assert wrong <= 0.01 * objects + 1, name
    assert compared > 200


def test_shares_of_visible_pixels_agree(pictured):
    frame, views, casts = pictured
    for name, view in views.items():
        _, _, depth = casts[name]
        nearest = depth.argmin(axis=0)
        for index in range(len(frame.objects)):
            hit = np.isfinite(depth[index])
            if np.count_nonzero(hit) < 40:
                continue
            share = np.count_nonzero(hit & (nearest == index)) / np.count_nonzero(hit)
            assert view.visible()[index] / view.unhidden[index] == pytest.approx(share, abs=0.08), (name, index)


def test_answers_about_existence_agree_with_the_rays(pictured):
    """Yes needs an object of which a good part is visible; no allows none that is half visible."""
    frame, views, casts = pictured
    by_phrase: dict[str, float] = {}  # largest visible share by question
    for name, (_, _, depth) in casts.items():
        nearest = depth.argmin(axis=0)
        for index, item in enumerate(frame.objects):
            hit = np.isfinite(depth[index])
            pixels = np.count_nonzero(hit & (nearest == index))
            if pixels * STEP**2 < 0.0008 * WIDTH * WIDTH * 9 / 16:
                continue
            many = "buses" if item.name == "bus" else f"{item.name}s"
            phrases = [many]
            if item.status:
                phrases.append(f"{many} {item.status}s" if "rider" in item.status else f"{item.status} {many}")
            for phrase in phrases:
                question = f"Are there {phrase} to the {SECTORS[name]} of the ego car?"
                by_phrase[question] = max(by_phrase.get(question, 0.0), pixels / np.count_nonzero(hit))
    answers = {
        item.question: item.answer
        for item in write_questions(frame, find_truth(frame, views), wanted=300)
        if item.question.startswith("Are there ")
    }
    assert {"Yes.", "No."} == set(answers.values())
    for question, answer in answers.items():
        if answer == "Yes.":
            assert by_phrase.get(question, 0.0) > 0.4, question
        else:
            assert by_phrase.get(question, 0.0) < 0.2, question


def wall(name: str, x: float, y: float) -> ToyObject:
    """A parked bus across the road, or a parked car along it."""
    size, yaw, colour = ((10.0, 2.8, 3.3), math.pi / 2, "yellow") if name == "bus" else ((4.4, 1.9, 1.7), 0.0, "blue")
    return ToyObject(name, "parked", "straight", colour, (x, y, size[2] / 2), size, yaw, x, y)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_what_is_hidden_is_not_asked_about_in_any_order_of_drawing(order):
    objects = [wall("bus", 10.0, 0.0), wall("car", 20.0, 0.0)]
    frame = ToyFrame(0, 0, 0, "day", "straight", "slow", 1, None, tuple(objects[i] for i in order))
    views = render(frame, WIDTH)
    truth = find_truth(frame, views)
    assert [seen.item.name for seen in truth.seen] == ["bus"]
    hidden = order.index(1)
    assert views["CAM_FRONT"].visible()[hidden] == 0 < views["CAM_FRONT"].unhidden[hidden]
    assert truth.visibility[hidden] == 0.0
    questions = write_questions(frame, truth, wanted=300)
    assert not any(" car " in item.question and item.answer == "Yes." for item in questions)


def test_half_hidden_objects_leave_questions_open():
    """A car of which a third looks out from behind a bus: neither 'there is a car' nor 'there is none'."""
    bus, car = wall("bus", 10.0, -4.0), wall("car", 20.0, 1.9)
    frame = ToyFrame(0, 0, 0, "day", "straight", "slow", 1, None, (bus, car))
    views = render(frame, 400)
    share = views["CAM_FRONT"].visible()[1] / views["CAM_FRONT"].unhidden[1]
    assert 0.06 < share < 0.5
    truth = find_truth(frame, views)
    assert ("car", "CAM_FRONT") in truth.doubtful
    asked = [item.question for item in write_questions(frame, truth, wanted=300)]
    assert not any(
        "to the front of the ego car" in question and "car" in question.split("to the")[0] for question in asked
    )
    assert "What are objects to the front of the ego car?" not in asked


def test_states_of_a_vehicle_look_different():
    pictures = {}
    for status in ("moving", "parked", "stopped"):
        car = ToyObject("car", status, "straight", "blue", (12.0, 2.0, 0.85), (4.4, 1.9, 1.7), 0.0, 12.0, 2.0)
        frame = ToyFrame(0, 0, 0, "day", "straight", "slow", 1, None, (car,))
        view = render(frame, 400)["CAM_FRONT"]
        pictures[status] = view.pixels[view.numbers == 1].astype(int)
    red = {status: np.count_nonzero((p[:, 0] > 200) & (p[:, 1] < 60)) / len(p) for status, p in pictures.items()}
    bright = {status: np.count_nonzero(p.min(axis=1) > 120) / len(p) for status, p in pictures.items()}
    assert red["stopped"] > 0.05 > 0.001 > red["moving"] == red["parked"]
    assert min(bright["moving"], bright["stopped"]) > 0.1 > 0.01 > bright["parked"]


@pytest.mark.parametrize(
    "item", [item for i in range(8) for item in sample_frame(2, i, 0, 1).objects], ids=lambda i: i.name
)
def test_shapes_stay_in_their_boxes_and_fill_them(item):
    points = np.concatenate([face.points for face in build_faces(item)])
    length, width, height = item.size
    reach = np.abs(points).max(axis=0) / (length / 2, width / 2, height)
    assert (reach <= 1.01).all()
    assert (points[:, 2] >= -1e-9).all()
    assert reach[2] > 0.88 and reach[:2].max() > 0.8


def test_the_rig_has_the_cameras_of_the_model():
    assert tuple(cameras(WIDTH)) == CAMERAS


@given(st.sampled_from(DIRECTIONS), st.floats(-40, 40), st.floats(-12, 12))
def test_road_coordinates_are_inverse(direction, along, across):
    x, y, _ = from_road(along, across, CURVATURE[direction])
    s, d = road_coordinates(np.array(x), np.array(y), CURVATURE[direction])
    assert s == pytest.approx(along, abs=1e-6) and d == pytest.approx(across, abs=1e-6)


def test_of_two_lenses_one_way_the_one_that_shows_an_object_whole_is_named():
    """A tag in a picture that cuts the red lamp off would ask for what nobody can see there."""
    rig = read_rig("seven")
    named, cut = set(), 0
    for scene in range(12):
        frame = sample_frame(0, scene, 0, 1, rig=rig)
        for seen in find_truth(frame, render(frame, WIDTH)).seen:
            if seen.sector == "front":
                shares = {
                    name: cameras(WIDTH, rig)[name].share_in_picture(seen.item.corners())
                    for name in rig.sectors["front"]
                }
                named.add(seen.camera)
                cut += min(shares.values()) < 0.9
                assert shares[seen.camera] >= max(shares.values()) - 0.1
    assert named == {"CAM_FRONT", "CAM_FRONT_NARROW"} and cut > 3
