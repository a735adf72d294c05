import os
from pathlib import Path

import pytest
from PIL import Image

from tests.drivelm_files import make_world, write_json, write_world
from training.data.images import locate_image, places_of_image
from training.prepare import PrepareArguments, main

NAME = "nuscenes/samples/CAM_BACK/a.jpg"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    file = tmp_path / "fleet" / NAME
    file.parent.mkdir(parents=True)
    Image.new("RGB", (16, 9)).save(file)
    return tmp_path / "fleet"


@pytest.mark.parametrize(
    "path",
    [
        f"../{NAME}",
        f"./{NAME}",
        f"../../data/{NAME}",
        "data/" + NAME,
        r"..\nuscenes\samples\CAM_BACK\a.jpg",
        r"data\nuscenes/samples\CAM_BACK/a.jpg",
        r"D:\drives\nuscenes\samples\CAM_BACK\a.jpg",
        r"\\server\share\data\nuscenes\samples\CAM_BACK\a.jpg",
        "/srv/fleet/nuscenes/samples/CAM_BACK/a.jpg",
        "/volumes/data/nuscenes/samples/CAM_BACK/a.jpg",
    ],
)
def test_a_path_is_found_as_other_machines_write_it(root, path):
    assert locate_image(root, path) == (NAME, (root / NAME).stat().st_size)


def test_an_absolute_path_is_found_under_a_relative_root_and_behind_a_link(root, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    for given in (Path("fleet"), Path("link"), tmp_path / "link"):
        for path in (root / NAME, tmp_path / "link" / NAME):
            assert locate_image(given, str(path))[0] == NAME


def test_the_nuscenes_root_itself_takes_paths_of_another_machine(root):
    for path in (
        r"C:\nuscenes\samples\CAM_BACK\a.jpg",
        "/x/v1.0/samples/CAM_BACK/a.jpg",
        "data/samples/CAM_BACK/a.jpg",
    ):
        assert locate_image(root / "nuscenes", path)[0] == NAME.removeprefix("nuscenes/")


def test_a_backslash_in_a_name_comes_first(root):
    odd = root / r"samples\a.jpg"
    Image.new("RGB", (8, 8)).save(odd, format="JPEG")
    (root / "samples").mkdir()
    Image.new("RGB", (16, 9)).save(root / "samples" / "a.jpg")
    assert locate_image(root, r"samples\a.jpg") == (odd.name, odd.stat().st_size)


@pytest.mark.parametrize(
    "path", [r"..\nuscenes\..\..\a.jpg", "/etc/passwd", r"C:\Windows\a.jpg", "fleet/../../a.jpg", "", ".", "/"]
)
def test_nothing_outside_the_root_is_looked_for(root, path):
    Image.new("RGB", (8, 8)).save(root.parent / "a.jpg")
    assert locate_image(root, path) == (None, -1)
    assert not any(".." in Path(place).parts or os.path.isabs(place) for place in places_of_image(root, path))


def test_another_camera_s_picture_is_never_taken(root):
    """A file of the same name in the root, or in another camera's folder, is not the one that was named."""
    Image.new("RGB", (8, 8)).save(root / "a.jpg")
    for path in ("/x/drives/CAM_FRONT/a.jpg", "samples/CAM_FRONT/a.jpg", r"E:\CAM_FRONT\a.jpg"):
        assert locate_image(root, path) == (None, -1)


def test_preparing_shows_one_path_and_where_it_was_looked_for(tmp_path):
    world = make_world(1, frames=1)
    write_world(tmp_path / "root", world)
    for frame in world["scene-0"]["key_frames"].values():
        frame["image_paths"] = {"CAM_BACK": r"E:\fleet\nuscenes\samples\CAM_BACK\gone.jpg"}
    file = write_json(tmp_path / "root", world)
    with pytest.raises(
        ValueError, match=r"E:\\fleet\\.*gone.jpg was looked for under .*root at .*nuscenes/samples/CAM_"
    ):
        main(PrepareArguments(str(file), str(tmp_path / "root"), str(tmp_path / "out"), split="train"))
