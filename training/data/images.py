"""Finds the images that a DriveLM file names."""

import os
from pathlib import Path, PurePosixPath

from PIL import Image

from smoldriver_hf.image_processing_smoldriver import FORMATS, MAX_PIXELS


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
        if self._verify and not _is_readable(self._root / found):
            return None, "unreadable image"
        return found, None


def locate_image(root: Path, path: str) -> tuple[str | None, int]:
    """(path under the root, size in bytes) of an image by the rule of `training.prepare`, or (None, -1).

    A path that leaves the root on its way, or that no file can have (too long, a NUL inside), names no image.
    """
    parts = PurePosixPath(path).parts
    while parts and parts[0] == "..":
        parts = parts[1:]
    if ".." in parts:
        return None, -1
    for candidate in (parts, parts[1:] if parts[:1] == ("nuscenes",) else ()):
        if candidate and not candidate[0].startswith("/") and os.path.isfile(file := root.joinpath(*candidate)):
            return "/".join(candidate), file.stat().st_size
    return None, -1


def _is_readable(file: Path) -> bool:
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
