"""What a toy object looks like: flat faces in its own frame, all of them inside its box.

The convention that makes class and state visible (and is what a model has to learn):

    car                    low body in white, blue or green with a cabin
    truck                  small cab, tall brown or gray cargo box
    bus                    long tall yellow or purple box with one band of windows all around
    construction vehicle   orange on black tracks, tall cab, boom with a bucket
    pedestrian             pink or cyan top, dark legs, skin-coloured head
    bicycle                light green frame between two thin wheels; motorcycle: red, thick black wheels, white lamp
    barrier                red and white stripes, wide and low; traffic cone: orange cone with a white band
    traffic light          black housing on a pole, red disc above or green disc below, lit

    moving vehicle         bright cyan windows, light wheels, white streaks along and behind it; one that turns stands
                           at an angle to the road and has an amber bar on the roof on the side that it turns to
    stopped vehicle        bright cyan windows, red brake lamps at the four corners and a red bar across the roof
    parked vehicle         black windows, dull paint, no lamps, no streaks
    moving pedestrian      legs apart, arms swung out, short streaks; standing: legs together, arms down
    bicycle, motorcycle    with rider: a person in yellow (bicycle) or dark blue (motorcycle) on it; without: bare
"""

from typing import NamedTuple

import numpy as np

from training.toyworld.cameras import Array
from training.toyworld.scene import ToyObject

Colour = tuple[int, int, int]

PAINT: dict[str, Colour] = {
    "white": (238, 238, 238),
    "blue": (45, 85, 215),
    "green": (30, 150, 65),
    "brown": (150, 92, 45),
    "gray": (150, 152, 158),
    "yellow": (248, 205, 35),
    "purple": (135, 60, 175),
    "orange": (245, 125, 20),
    "pink": (245, 75, 165),
    "cyan": (40, 205, 225),
    "light green": (120, 235, 90),
    "red": (205, 30, 35),
}
BLACK: Colour = (24, 24, 28)
DARK: Colour = (52, 54, 62)
RUBBER: Colour = (38, 38, 40)
SKIN: Colour = (226, 178, 140)
GLASS_LIT: Colour = (165, 245, 255)
GLASS_DARK: Colour = (12, 12, 16)
LAMP_RED: Colour = (255, 20, 20)
LAMP_AMBER: Colour = (255, 170, 0)
LAMP_WHITE: Colour = (255, 255, 235)
STREAK: Colour = (255, 255, 255)

_TOP, _END, _SIDE = 1.1, 0.8, 0.95  # light on roofs, on front and back, on the sides


class Face(NamedTuple):
    """A flat convex polygon."""

    points: Array  # (n, 3) in the object's frame, counter-clockwise seen from outside
    colour: Colour  # red, green, blue
    glows: bool = False  # it shines by itself, also at night
    both_sides: bool = False  # it is seen from behind too
    layer: int = 0  # of faces in one plane the higher one is in front


def build_faces(item: ToyObject) -> list[Face]:
    """The faces of an object in its own frame: x forward, y left, z up, origin at the middle of its bottom, metres."""
    builders = {
        "car": _car,
        "truck": _truck,
        "bus": _bus,
        "construction vehicle": _construction_vehicle,
        "pedestrian": _pedestrian,
        "bicycle": _bicycle,
        "motorcycle": _motorcycle,
        "barrier": _barrier,
        "traffic cone": _traffic_cone,
        "traffic light": _traffic_light,
    }
    unit = builders[item.name](item)  # in a box of length, width and height 1
    return [face._replace(points=face.points * np.array(item.size)) for face in unit]


def build_streaks(item: ToyObject) -> list[Array]:
    """White streaks of something that moves, each (4, 3) in the object's frame; they are no part of the object."""
    if item.status != "moving":
        return []
    length, width, height = item.size
    if item.name == "pedestrian":
        x0, x1, apart, thick = -length / 2 - 0.7, -0.1, 0.05, height * 0.03
    else:
        x0, x1, apart, thick = -length / 2 - 1.8, length * 0.3, 0.18, min(0.13, height * 0.06)
    return [
        np.array([(x0, y, z), (x1, y, z), (x1, y, z + thick), (x0, y, z + thick)])
        for y in (-(width / 2 + apart), width / 2 + apart)
        for z in (height * 0.3, height * 0.55, height * 0.8)
    ]


def _shade(colour: Colour, light: float) -> Colour:
    red, green, blue = (min(255, int(value * light)) for value in colour)
    return red, green, blue


def _block(
    x: tuple[float, float],
    y: tuple[float, float],
    z: tuple[float, float],
    colour: Colour,
    *,
    glows: bool = False,
    taper: tuple[float, float] = (0.0, 0.0),
    roof: Colour | None = None,
    layer: int = 0,
) -> list[Face]:
    """A box without a bottom; `taper` draws the top in by so much at the ends and at the sides."""
    (x0, x1), (y0, y1), (z0, z1) = x, y, z
    tx, ty = taper
    low = [(x0, y0, z0), (x1, y0, z0), (x1, y1, z0), (x0, y1, z0)]
    high = [(x0 + tx, y0 + ty, z1), (x1 - tx, y0 + ty, z1), (x1 - tx, y1 - ty, z1), (x0 + tx, y1 - ty, z1)]
    faces = [Face(np.array(high), colour if glows else _shade(roof or colour, _TOP), glows, layer=layer)]
    for i, light in ((0, _SIDE), (1, _END), (2, _SIDE), (3, _END)):  # right, front, left, back
        j = (i + 1) % 4
        points = np.array([low[i], low[j], high[j], high[i]])
        faces.append(Face(points, colour if glows else _shade(colour, light), glows, layer=layer))
    return faces


def _disc(x: float, y: float, z: float, rx: float, rz: float, colour: Colour, layer: int = 1) -> Face:
    """An upright disc in the plane of length and height, seen from both sides."""
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    points = np.stack([x + rx * np.cos(angles), np.full(12, y), z + rz * np.sin(angles)], axis=1)
    return Face(points, colour, both_sides=True, layer=layer)


def _band(faces: list[Face], low: float, high: float, colour: Colour, glows: bool, margin: float = 0.06) -> list[Face]:
    """A band on the four upright faces of a block, from `low` to `high` of its height."""
    corners = ((margin, low), (1 - margin, low), (1 - margin, high), (margin, high))
    bands = []
    for face in faces[1:]:
        a, b, c, d = face.points  # bottom left, bottom right, top right, top left
        points = [a + (d - a) * v + ((b + (c - b) * v) - (a + (d - a) * v)) * u for u, v in corners]
        bands.append(Face(np.array(points), colour, glows, layer=face.layer + 1))
    return bands


def _glass(item: ToyObject) -> tuple[Colour, bool]:
    return (GLASS_DARK, False) if item.status == "parked" else (GLASS_LIT, True)


def _paint(item: ToyObject) -> Colour:
    return _shade(PAINT[item.colour], 0.62) if item.status == "parked" else PAINT[item.colour]


def _wheels(item: ToyObject, places: tuple[float, ...], rx: float, rz: float) -> list[Face]:
    hub = (205, 205, 205) if item.status == "moving" else (80, 80, 84)
    return [
        _disc(x, y, rz, rx * part, rz * part, colour, layer)
        for y in (-0.499, 0.499)
        for x in places
        for part, colour, layer in ((1.0, RUBBER, 2), (0.62, hub, 3))
    ]


def _lamps(item: ToyObject, low: float, high: float, roof: float, roof_x: tuple[float, float]) -> list[Face]:
    """Lamps by state; `low`, `high`: height of the lamps at the corners, `roof`: bottom of the bar on the roof."""
    faces: list[Face] = []
    if item.status == "stopped":
        for x in ((-0.5, -0.44), (0.44, 0.5)):
            for y in ((-0.5, -0.3), (0.3, 0.5)):
                faces += _block(x, y, (low, high), LAMP_RED, glows=True, layer=4)
        middle = sum(roof_x) / 2
        faces += _block((middle - 0.07, middle + 0.07), (-0.4, 0.4), (roof, 1.0), LAMP_RED, glows=True, layer=4)
    elif item.status == "moving":
        for y in ((-0.46, -0.26), (0.26, 0.46)):
            faces += _block((0.44, 0.5), y, (low, high), LAMP_WHITE, glows=True, layer=4)
        if item.turn != "straight":
            y = (0.1, 0.45) if item.turn == "left" else (-0.45, -0.1)
            faces += _block(roof_x, y, (roof, 1.0), LAMP_AMBER, glows=True, layer=4)
    return faces


def _car(item: ToyObject) -> list[Face]:
    paint = _paint(item)
    body = _block((-0.49, 0.49), (-0.49, 0.49), (0.16, 0.56), paint)
    cabin = _block((-0.34, 0.24), (-0.45, 0.45), (0.56, 0.9), paint, taper=(0.06, 0.07))
    glass, glows = _glass(item)
    return [
        *body,
        *cabin,
        *_band(cabin, 0.08, 0.86, glass, glows, margin=0.05),
        *_wheels(item, (-0.31, 0.31), 0.085, 0.21),
        *_lamps(item, 0.32, 0.52, 0.89, (-0.2, 0.1)),
    ]


def _truck(item: ToyObject) -> list[Face]:
    cab_paint = _shade((225, 225, 225), 0.62 if item.status == "parked" else 1.0)
    cab = _block((0.22, 0.49), (-0.46, 0.46), (0.13, 0.72), cab_paint)
    cargo = _block((-0.49, 0.19), (-0.49, 0.49), (0.2, 0.93), _paint(item))
    chassis = _block((-0.45, 0.4), (-0.4, 0.4), (0.1, 0.2), DARK)
    glass, glows = _glass(item)
    return [
        *cab,
        *cargo,
        *chassis,
        *_band(cab, 0.48, 0.92, glass, glows),
        *_band(cargo, 0.86, 1.0, _shade(_paint(item), 0.6), False, margin=0.0),
        *_wheels(item, (-0.36, -0.2, 0.35), 0.065, 0.145),
        *_lamps(item, 0.2, 0.36, 0.92, (-0.3, 0.05)),
    ]


def _bus(item: ToyObject) -> list[Face]:
    body = _block((-0.49, 0.49), (-0.49, 0.49), (0.1, 0.94), _paint(item))
    glass, glows = _glass(item)
    posts = []
    for band in _band(body, 0.5, 0.86, DARK, False, margin=0.0)[::2]:  # the two long sides
        a, b, c, d = band.points
        for u in np.linspace(0.1, 0.9, 5):
            half = (b - a) * 0.012
            low, high = a + (b - a) * u, d + (c - d) * u
            posts.append(Face(np.array([low - half, low + half, high + half, high - half]), _paint(item), layer=2))
    return [
        *body,
        *_band(body, 0.5, 0.86, glass, glows, margin=0.03),
        *posts,
        *_band(body, 0.0, 0.12, DARK, False, margin=0.0),
        *_wheels(item, (-0.32, 0.3), 0.05, 0.15),
        *_lamps(item, 0.16, 0.34, 0.93, (-0.2, 0.2)),
    ]


def _construction_vehicle(item: ToyObject) -> list[Face]:
    paint = _paint(item)
    tracks = [face for y in ((-0.49, -0.25), (0.25, 0.49)) for face in _block((-0.46, 0.2), y, (0.0, 0.24), BLACK)]
    body = _block((-0.49, 0.15), (-0.44, 0.44), (0.22, 0.52), paint)
    cab = _block((-0.16, 0.14), (-0.4, 0.1), (0.52, 0.9), paint)
    boom = _block((0.1, 0.42), (0.14, 0.34), (0.55, 0.68), paint)
    mast = _block((-0.02, 0.12), (0.14, 0.34), (0.5, 0.68), paint)
    stick = _block((0.36, 0.44), (0.14, 0.34), (0.2, 0.62), paint)
    bucket = _block((0.3, 0.5), (0.02, 0.46), (0.02, 0.24), DARK, taper=(0.03, 0.0))
    stripes = _band(body, 0.3, 0.65, BLACK, False, margin=0.1)
    glass, glows = _glass(item)
    lamps = _lamps(item, 0.3, 0.46, 0.89, (-0.16, 0.14))
    # This one ends at x = 0.15: the corner lamps sit on its body, the front ones too.
    lamps = [face._replace(points=face.points - (0.36, 0.0, 0.0) * (face.points[:, :1] > 0.4)) for face in lamps]
    return [*tracks, *body, *stripes, *cab, *_band(cab, 0.2, 0.9, glass, glows), *boom, *mast, *stick, *bucket, *lamps]


def _person(
    x: float, z0: float, z1: float, y: float, top: Colour, legs: Colour, stride: float, head: Colour = SKIN
) -> list[Face]:
    """A body from z0 to z1 around (x, 0), `y` half as wide as its shoulders; `stride` spreads legs and arms."""
    tall = z1 - z0
    hip, neck = z0 + tall * 0.42, z0 + tall * 0.8
    arm = y * 0.45
    faces = []
    for side in (-1, 1):
        foot = x + side * stride
        leg = _block((x - 0.14, x + 0.14), _ordered(side * y * 0.1, side * y * 0.75), (z0, hip), legs)
        hand = _block((x - 0.1, x + 0.1), _ordered(side * y, side * (y + arm)), (hip, neck), _shade(top, 0.85))
        faces += _sheared(leg, z0, hip, foot - x) + _sheared(hand, hip, neck, x - foot)
    faces += _block((x - 0.17, x + 0.17), (-y, y), (hip, neck), top)
    faces += _block((x - 0.15, x + 0.15), (-y * 0.6, y * 0.6), (neck, z1), head, taper=(0.03, y * 0.12))
    return faces


def _sheared(faces: list[Face], low: float, high: float, shift: float) -> list[Face]:
    """A limb that hangs from `high` and is moved ahead by `shift` at `low`."""
    ahead = [np.stack([(high - face.points[:, 2]) / (high - low) * shift] + [np.zeros(4)] * 2, 1) for face in faces]
    return [face._replace(points=face.points + moved) for face, moved in zip(faces, ahead, strict=True)]


def _ordered(a: float, b: float) -> tuple[float, float]:
    return (a, b) if a < b else (b, a)


def _pedestrian(item: ToyObject) -> list[Face]:
    return _person(0.0, 0.0, 1.0, 0.33, PAINT[item.colour], DARK, 0.34 if item.status == "moving" else 0.0)


def _bicycle(item: ToyObject) -> list[Face]:
    ridden = item.status == "with rider"
    top = 0.56 if ridden else 0.92  # of the bicycle itself
    frame = PAINT[item.colour]
    r = 0.18
    rz = top * 0.36
    faces = []
    for x in (-0.32, 0.32):
        faces += _block((x - r * 0.6, x + r * 0.6), (-0.07, 0.07), (0.0, rz * 2), RUBBER)
        for y in (-0.075, 0.075):
            faces += [_disc(x, y, rz, r, rz, RUBBER, 2), _disc(x, y, rz, r * 0.66, rz * 0.66, (190, 195, 195), 3)]
    faces += _block((-0.3, 0.3), (-0.09, 0.09), (top * 0.62, top * 0.76), frame)
    faces += _block((-0.06, 0.06), (-0.09, 0.09), (top * 0.3, top * 0.7), frame)
    faces += _block((0.22, 0.32), (-0.45, 0.45), (top * 0.92, top), frame)  # handlebar
    faces += _block((0.25, 0.31), (-0.08, 0.08), (top * 0.6, top), frame)
    faces += _block((-0.3, -0.12), (-0.22, 0.22), (top * 0.86, top * 0.95), BLACK)  # saddle
    if ridden:
        faces += _person(-0.08, top * 0.6, 1.0, 0.32, PAINT["yellow"], DARK, 0.0)
    return faces


def _motorcycle(item: ToyObject) -> list[Face]:
    ridden = item.status == "with rider"
    top = 0.62 if ridden else 0.95
    rz = top * 0.3
    faces = []
    for x in (-0.32, 0.32):
        faces += _block((x - 0.12, x + 0.12), (-0.14, 0.14), (0.0, rz * 2), BLACK)
        for y in (-0.15, 0.15):
            faces += [_disc(x, y, rz, 0.17, rz, BLACK, 2), _disc(x, y, rz, 0.07, rz * 0.45, (120, 120, 125), 3)]
    faces += _block((-0.42, 0.3), (-0.26, 0.26), (top * 0.42, top * 0.78), PAINT[item.colour], taper=(0.05, 0.06))
    faces += _block((-0.36, 0.0), (-0.22, 0.22), (top * 0.78, top * 0.86), BLACK)
    faces += _block((0.24, 0.34), (-0.48, 0.48), (top * 0.9, top), DARK)
    faces += _block((0.32, 0.42), (-0.2, 0.2), (top * 0.66, top * 0.92), LAMP_WHITE, layer=1)
    if ridden:
        faces += _person(-0.14, top * 0.62, 1.0, 0.32, (35, 50, 130), (30, 35, 80), 0.0, head=(240, 240, 240))
    return faces


def _barrier(item: ToyObject) -> list[Face]:
    body = _block((-0.3, 0.3), (-0.49, 0.49), (0.12, 1.0), PAINT["white"])
    feet = [face for y in ((-0.46, -0.34), (0.34, 0.46)) for face in _block((-0.5, 0.5), y, (0.0, 0.14), DARK)]
    stripes = []
    for face in body[1:]:
        a, b, c, d = face.points
        broad = np.ptp(face.points[:, 1]) > 0.5  # the front and the back carry four stripes, the ends one
        for left in (0.0, 0.27, 0.54, 0.81) if broad else (0.3,):
            right = left + (0.15 if broad else 0.4)
            points = np.array([a + (b - a) * left, a + (b - a) * right, d + (c - d) * right, d + (c - d) * left])
            stripes.append(Face(points, _shade((230, 25, 30), _END), layer=1))
    return [*body, *stripes, *feet]


def _traffic_cone(item: ToyObject) -> list[Face]:
    orange = (255, 95, 10)
    faces = _block((-0.49, 0.49), (-0.49, 0.49), (0.0, 0.07), (205, 70, 10))
    radius, levels = (0.38, 0.28, 0.18, 0.06), (0.07, 0.4, 0.68, 1.0)
    for i, colour in enumerate((orange, PAINT["white"], orange)):
        draw_in = radius[i] - radius[i + 1]
        low = (-radius[i], radius[i])
        faces += _block(low, low, (levels[i], levels[i + 1]), colour, taper=(draw_in, draw_in))
    return faces


def _traffic_light(item: ToyObject) -> list[Face]:
    faces = _block((-0.4, 0.4), (-0.5, 0.5), (0.0, 1.0), BLACK)
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    for level, status, lit in ((0.77, "red", LAMP_RED), (0.5, "yellow", LAMP_AMBER), (0.23, "green", (0, 255, 110))):
        colour = lit if status == item.status else (62, 62, 62)
        # it faces the traffic that comes from behind it: its own back; seen from there, y runs to the left
        points = np.stack([np.full(16, -0.401), -0.4 * np.cos(angles), level + 0.155 * np.sin(angles)], axis=1)
        faces.append(Face(points, colour, status == item.status, both_sides=True, layer=1))
    return faces
