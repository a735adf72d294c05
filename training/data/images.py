"""Finds the images that a DriveLM file names."""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image

from smoldriver_hf.image_processing_smoldriver import FORMATS, MAX_PIXELS

_FOLDERS_ABOVE = ("data", "nuscenes")  # that may stand before a path in a file and be the image root itself
_FOLDERS_OF_NUSCENES = ("samples", "sweeps")


class ImageFinder:
    """Finds the files of image paths under one root and remembers every path it was asked for."""

    def __init__(self, root: Path, verify: bool) -> None:
        self._root = root
        self._verify = verify
        self.asked: dict[str, tuple[str | None, int]] = {}  # path in the file -> path under the root, size in bytes

    def find(self, path: str) -> tuple[str | None, str | None]:
        """Return (path under the root, None), or (None, why there is none)."""
        if path not in self.asked:
            self.asked[path] = locate_image(self._root, path)
        found, _ = self.asked[path]
        if found is None:
            return None, "missing image"
        if self._verify and not is_readable(self._root / found):
            return None, "unreadable image"
        return found, None


def locate_image(root: Path, path: str) -> tuple[str | None, int]:
    """(path under the root, size in bytes) of an image by the rule of `training.prepare`, or (None, -1)."""
    for place in places_of_image(root, path):
        if os.path.isfile(file := root / place):
            return place, file.stat().st_size
    return None, -1


def places_of_image(root: Path, path: str) -> list[str]:
    """The paths under the root where an image may lie by the rule of `training.prepare`, the likeliest first.

    There is none for a path that leaves the root on its way. What Windows wrote (`..\\nuscenes\\samples\\NAME.jpg`)
    counts too, after the path as it stands: elsewhere a backslash may be part of a name.
    """
    places: dict[str, None] = {}
    on_windows = PureWindowsPath(path)
    for written in (PurePosixPath(path), PurePosixPath(on_windows.as_posix())):
        starts = [] if written.is_absolute() else [list(written.parts)]
        if written.is_absolute() or on_windows.drive:
            starts += _behind_root(root, written)
        for parts in starts:
            while parts and parts[0] == "..":
                parts = parts[1:]
            while parts and ".." not in parts:
                places["/".join(parts)] = None
                parts = parts[1:] if parts[0] in _FOLDERS_ABOVE else []
    return list(places)


def _behind_root(root: Path, path: PurePosixPath) -> list[list[str]]:
    """The parts of an absolute path behind the root, or, of another machine's, behind what may be the same folder."""
    for here in (os.path.abspath(root), root.resolve()):
        if path.is_relative_to(here):
            parts = list(path.relative_to(here).parts)
            return [] if ".." in parts else [parts]
    parts = list(path.parts)
    starts = [index + 1 for index, part in enumerate(parts) if part == Path(os.path.abspath(root)).name]
    starts += [index for index, part in enumerate(parts) if part in (*_FOLDERS_ABOVE, *_FOLDERS_OF_NUSCENES)]
    return [parts[start:] for start in sorted(set(starts))]


def is_readable(file: Path) -> bool:
    """Whether the model's image processor will take it."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                return False
            image.draft("RGB", (200, 112))  # a JPEG is read to its end but decoded small, which is faster
            image.load()
    except Exception:  # broken files make Pillow's parsers raise almost anything
        return False
    return True
