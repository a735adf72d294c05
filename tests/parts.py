"""The real parts in tests: used where they are cached; elsewhere their tests are slow, or skip."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from smoldriver_hf.wheels import Part, PartUnavailableError, default_cache_dir


def needs(*parts: Part) -> pytest.MarkDecorator:
    """Slow unless every part is in the default cache already."""
    cached = all((default_cache_dir() / part.folder).is_dir() for part in parts)
    return pytest.mark.skipif(False, reason="") if cached else pytest.mark.slow


def obtain(fetch_part: Callable[[], Path]) -> Path:
    try:
        return fetch_part()
    except PartUnavailableError as error:
        pytest.skip(f"neither cached nor downloadable: {error}")


def pip_finds_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a new folder the only place where pip looks."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    folder.mkdir()
    return folder


def left_behind(cache: Path) -> list[str]:
    """Everything in the cache apart from the empty lock files."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")
