"""A rig: which cameras a car has and where each looks. Sectors, neighbours, mirror and order follow from it.

A rig is a table, in a YAML or JSON file (`rigs/` here holds some, which go by their names: nuscenes, four, seven) and
under the key `rig` of a prepared folder's `dataset.json`:

    CAM_FRONT_LEFT: {azimuth: 55, place: [1.5, 0.5, 1.5], size: [1600, 900], field_of_view: 64.8}

`azimuth` is in degrees to the left of straight ahead and has to be said; `place` (x forward, y left, z up, metres from
the ground below the rear axle), `size` (pixels) and `field_of_view` (degrees from left to right) may be left out.

Read one with `read_rig("four")`, `read_rig("fleet.yaml")` or, of prepared data, `load_rig(info, cameras)` (which
`Rows.rig` has done already), and ask it:

    rig.names                       ("CAM_FRONT_LEFT", "CAM_FRONT", ...), in the table's order, which is the order of
                                    columns, prompts and reports
    rig.sector("CAM_BACK_LEFT")     "back left", the words of a question
    rig.sectors                     {"front left": ("CAM_FRONT_LEFT",), ...}: two lenses may share a sector
    rig.neighbours("CAM_BACK")      ("CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"): its own sector and those beside
    rig.mirror("CAM_BACK_LEFT")     "CAM_BACK_RIGHT"; a camera without counterpart is its own
    rig.named_in(question)          the cameras that a question names, by sector words or object tags
    question_place("back left")     "to the back left of the ego car"
    whereabouts("front")            "in front of the ego car", as an answer says it
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

RIGS = Path(__file__).with_name("rigs")
RIG_FILE = "rig.json"
"""What `training.toyworld` and `training.nuscenes` leave beside their drivelm.json, for `training.prepare`."""

EXTRA_VIEWS = ("LIDAR_BEV", "MAP_BEV")
"""Images that a frame may have beside its cameras' and that look to no side."""

# Sectors by the largest azimuth (to either side) that still belongs to them. A camera that looks to the side by 90
# degrees sees "left"; nuScenes' back cameras, at 110, see "back left".
_BORDERS = ((30.0, "front"), (80.0, "front {side}"), (100.0, "{side}"), (150.0, "back {side}"), (180.0, "back"))
SECTOR_WORDS = ("front left", "front right", "back left", "back right", "front", "back", "left", "right")
"""All words a sector can have, those of two words first, as a regular expression needs them."""

_FIELDS = ("azimuth", "place", "size", "field_of_view")
PLACE = re.compile(rf"\b(?:[Tt]o|[Ii]n|[Aa]t) the ({'|'.join(SECTOR_WORDS)})(?: view\b| of (?:the )?ego\b)")
_IN_FRONT, _BEHIND = re.compile(r"\b[Ii]n front of (?:the )?ego\b"), re.compile(r"\b[Bb]ehind (?:the )?ego\b")
_TAGGED = re.compile(r"<c\d+,(\w+),")


@dataclass(frozen=True)
class Mount:
    """A camera on the car; None is what the rig's table does not say."""

    name: str  # what data, prompts and weights call it
    azimuth: float  # degrees to the left of straight ahead, above -180 and up to 180
    place: tuple[float, float, float] | None = (
        None  # x ahead, y left, z up, metres from the ground below the rear axle
    )
    size: tuple[int, int] | None = None  # width and height of its pictures in pixels
    field_of_view: float | None = None  # degrees from the left to the right border

    @property
    def sector(self) -> str:
        """The words for where it looks."""
        words = next(words for border, words in _BORDERS if abs(self.azimuth) <= border)
        return words.format(side="left" if self.azimuth > 0 else "right")


@dataclass(frozen=True)
class Rig:
    """The cameras of a car, in the order in which they are shown; see the module's docstring for what to ask it."""

    mounts: tuple[Mount, ...]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Mount:
        """The camera of that name.

        Raises:
            ValueError: there is none; the message names those that are.
        """
        for mount in self.mounts:
            if mount.name == name:
                return mount
        raise ValueError(f"the rig has no camera {name!r}; it has {', '.join(self.names)}")

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(mount.name for mount in self.mounts)

    @cached_property
    def sectors(self) -> dict[str, tuple[str, ...]]:
        """{sector: its cameras}, in the rig's order; only sectors that some camera looks to."""
        words = dict.fromkeys(mount.sector for mount in self.mounts)
        return {sector: tuple(mount.name for mount in self.mounts if mount.sector == sector) for sector in words}

    def sector(self, name: str) -> str:
        """The words for where a camera looks."""
        return self[name].sector

    def neighbours(self, name: str) -> tuple[str, ...]:
        """The cameras of this one's sector and of the sectors beside it around the car, in the rig's order."""
        # Mounts of one sector share a rank: -180 and 180 are the same back.
        around = sorted(self.sectors, key=lambda sector: max(self[camera].azimuth for camera in self.sectors[sector]))
        here = around.index(self.sector(name))
        near = {around[here], around[here - 1], around[(here + 1) % len(around)]}
        return tuple(mount.name for mount in self.mounts if mount.sector in near)

    def mirror(self, name: str) -> str:
        """The camera that looks to the other side by as much; its own name where there is none."""
        other = self._counterpart(name)
        return other if other is not None and self._counterpart(other) == name else name

    def _counterpart(self, name: str) -> str | None:
        mount = self[name]
        swapped = {"left": "right", "right": "left"}
        words = " ".join(swapped.get(word, word) for word in mount.sector.split())
        if words == mount.sector:
            return None
        others = self.sectors.get(words, ())
        return min(others, key=lambda other: abs(self[other].azimuth + mount.azimuth), default=None)

    def named_in(self, question: str) -> tuple[str, ...]:
        """The cameras that a question names, by sector words or object tags, in the rig's order.

        >>> NUSCENES.named_in("Are there cars to the back left of the ego car?")
        ('CAM_BACK_LEFT',)
        """
        named = set(_TAGGED.findall(question))
        # Names in small letters may be everyday words.
        named |= {name for name in self.names if not name.islower() and re.search(rf"\b{name}\b", question)}
        places = set(PLACE.findall(question))
        places |= {word for word, said in (("front", _IN_FRONT), ("back", _BEHIND)) if said.search(question)}
        return tuple(mount.name for mount in self.mounts if mount.name in named or mount.sector in places)

    def to_table(self) -> dict[str, dict[str, Any]]:
        """As a rig file and `dataset.json` hold it: {name: {azimuth, ...}} without what is not known."""
        known = {
            mount.name: {key: value for key in _FIELDS if (value := getattr(mount, key)) is not None}
            for mount in self.mounts
        }
        return {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
            for name, fields in known.items()
        }


def question_place(sector: str) -> str:
    """The place of a sector as DriveLM's questions say it."""
    return f"to the {sector} of the ego car"


def whereabouts(sector: str) -> str:
    """The place of a sector as DriveLM's answers say it: "in front of", "behind" or "to the left of" the ego car."""
    return {"front": "in front of the ego car", "back": "behind the ego car"}.get(sector, question_place(sector))


def make_rig(table: Mapping[str, Any], where: str) -> Rig:
    """A rig from its table, {name: {azimuth, place, size, field_of_view}}; `where` is its file, for errors.

    Raises:
        ValueError: it is no such table, a name is none that data and weights can carry, an azimuth is missing or no
            number, or two cameras look the same way from the same place with the same view.
    """
    if not isinstance(table, Mapping) or not table:
        raise ValueError(f"{where}: expected a rig, {{camera: {{azimuth: degrees to the left, ...}}}}; got {table!r}")
    rig = Rig(tuple(_mount(name, fields, where) for name, fields in table.items()))
    seen: dict[tuple[Any, ...], str] = {}
    for mount in rig.mounts:
        other = seen.setdefault((mount.azimuth, mount.field_of_view, mount.place), mount.name)
        if other != mount.name:
            raise ValueError(
                f"{where}: {other} and {mount.name} both have azimuth {mount.azimuth:g}, and the same field_of_view "
                "and place; cameras of a rig look different ways, or differ in one of these"
            )
    return rig


def _mount(name: Any, fields: Any, where: str) -> Mount:
    if not isinstance(name, str) or not name.isidentifier() or name in EXTRA_VIEWS:
        raise ValueError(f"{where}: {name!r} is no name for a camera; expected letters, digits and underscores")
    if not isinstance(fields, Mapping) or "azimuth" not in fields:
        raise ValueError(f"{where}: {name} needs an azimuth, in degrees to the left of straight ahead; got {fields!r}")
    unknown = [key for key in fields if key not in _FIELDS]
    if unknown:
        raise ValueError(f"{where}: {name} has {', '.join(map(str, unknown))}; known: {', '.join(_FIELDS)}")
    azimuth = _number(fields["azimuth"], f"{where}: azimuth of {name}")
    if abs(azimuth) > 360:
        raise ValueError(f"{where}: azimuth of {name} must lie between -360 and 360 degrees; got {azimuth:g}")
    place, size, view = (fields.get(key) for key in ("place", "size", "field_of_view"))
    return Mount(
        name,
        180 - (180 - azimuth) % 360,  # above -180 and up to 180
        None if place is None else _numbers(place, 3, f"{where}: place of {name}"),  # type: ignore[arg-type]
        None if size is None else _size(size, f"{where}: size of {name}"),
        None if view is None else _view(view, f"{where}: field_of_view of {name}"),
    )


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ValueError(f"{what} must be a number; got {value!r}")
    return float(value)


def _numbers(value: Any, count: int, what: str) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or len(value) != count:
        raise ValueError(f"{what} must be {count} numbers; got {value!r}")
    return tuple(_number(one, what) for one in value)


def _size(value: Any, what: str) -> tuple[int, int]:
    width, height = _numbers(value, 2, what)
    if width < 1 or height < 1 or width % 1 or height % 1:
        raise ValueError(f"{what} must be a width and a height in whole pixels; got {value!r}")
    return int(width), int(height)


def _view(value: Any, what: str) -> float:
    degrees = _number(value, what)
    if not 0 < degrees < 180:
        raise ValueError(f"{what} must lie between 0 and 180 degrees; got {degrees:g}")
    return degrees


def read_rig(name_or_file: str | Path) -> Rig:
    """A rig by name (`nuscenes`, `four`, `seven`) or from a YAML or JSON file.

    Raises:
        ValueError: there is neither such a name nor such a file, or the file holds no rig.
    """
    known = {file.stem: file for file in sorted(RIGS.glob("*.yaml"))}
    file = known.get(str(name_or_file), Path(name_or_file))
    if not file.is_file():
        raise ValueError(f"rig {name_or_file} is neither a file nor one of {', '.join(known)}")
    try:
        table = _UniqueKeys(file.read_text(encoding="utf-8")).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is neither YAML nor JSON: {error}") from error
    return make_rig(table, str(file))


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a camera that a file names twice, which YAML would silently let win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice!r} appears twice")
        return super().construct_mapping(node, deep)


def write_rig(folder: Path, rig: Rig) -> None:
    """Leave a rig beside a DriveLM file, where `training.prepare` finds it."""
    (folder / RIG_FILE).write_text(json.dumps(rig.to_table(), indent=2) + "\n", encoding="utf-8")


def load_rig(info: Mapping[str, Any], cameras: Iterable[str], where: str = "the prepared folder") -> Rig:
    """The rig of prepared data.

    Args:
        info: the content of `dataset.json`.
        cameras: the views that its tables have. Folders that were prepared before rigs hold nuScenes' cameras.
        where: the folder, for the error.

    Raises:
        ValueError: an older folder without a rig has other cameras than nuScenes'.
    """
    if "rig" in info:
        return make_rig(info["rig"], f"{where}, rig in dataset.json")
    others = [name for name in cameras if name not in NUSCENES and name not in EXTRA_VIEWS]
    if others:
        raise ValueError(
            f"{where} does not tell where {', '.join(others)} look; prepare it again with training.prepare --rig FILE"
        )
    return NUSCENES


NUSCENES = read_rig("nuscenes")
"""nuScenes' six: the cameras of DriveLM, and of everything that names no others."""
