"""The toy world's nuScenes root: read by the real devkit where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import Delaunay

from training.toyworld.cameras import cameras
from training.toyworld.make import ToyWorldArguments, main
from training.toyworld.nuscenes_tables import CATEGORY_NAMES, VERSION, attribute_name, scan
from training.toyworld.render import render
from training.toyworld.scene import CLASSES, sample_frame

SCENES, FRAMES, WIDTH = 3, 2, 320
TABLES = {
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample",
    "sample_annotation", "sample_data", "scene", "sensor", "visibility",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "world"
    return main(
        ToyWorldArguments(
            scenes=SCENES, frames_per_scene=FRAMES, width=WIDTH, output_dir=str(folder), num_workers=1, seed=4
        )
    )


@pytest.fixture(scope="module")
def devkit(world):
    nuscenes = pytest.importorskip("nuscenes.nuscenes", reason="nuscenes-devkit is not installed")
    return nuscenes.NuScenes(version=VERSION, dataroot=str(world / "nuscenes"), verbose=False)


def frame_of(number: int):
    return sample_frame(4, number // FRAMES, number % FRAMES, FRAMES)


def test_all_thirteen_tables_refer_to_each_other(world):
    folder = world / "nuscenes" / VERSION
    assert {path.stem for path in folder.iterdir()} == TABLES
    tables = {name: json.loads((folder / f"{name}.json").read_text()) for name in TABLES}
    tokens = {name: {record["token"] for record in records} for name, records in tables.items()}
    assert all(len(tokens[name]) == len(tables[name]) > 0 for name in TABLES)
    for name, records in tables.items():
        for record in records:
            for key, value in record.items():
                table = key.removesuffix("_token")
                if key.endswith("_token") and table in TABLES:
                    assert value in tokens[table], (name, key)
    for record in tables["sample_data"]:
        assert (world / "nuscenes" / record["filename"]).is_file()


def test_samples_are_the_frames_of_drivelm(world):
    scenes = json.loads((world / "drivelm.json").read_text())
    samples = json.loads((world / "nuscenes" / VERSION / "sample.json").read_text())
    assert [sample["token"] for sample in samples] == [token for s in scenes.values() for token in s["key_frames"]]
    assert {sample["scene_token"] for sample in samples} == set(scenes)


def test_every_state_has_an_attribute_of_nuscenes():
    names = {
        attribute_name(item) for i in range(20) for item in sample_frame(0, i, 0, 1).objects if item.name in CLASSES
    }
    assert names == {
        None, "vehicle.moving", "vehicle.parked", "vehicle.stopped", "cycle.with_rider", "cycle.without_rider",
        "pedestrian.moving", "pedestrian.standing",
    }  # fmt: skip


def test_lidar_points_lie_on_the_ground_and_on_boxes():
    frame = frame_of(1)
    sweep, counts = scan(frame)
    assert sweep.dtype == np.float32 and sweep.shape[1] == 5
    on_objects = sweep[sweep[:, 3] == 60.0]
    ground = sweep[sweep[:, 3] == 15.0]
    assert len(on_objects) == counts.sum() > 0
    assert np.abs(ground[:, 2] + 1.84).max() < 1e-3


def test_devkit_walks_through_scenes(devkit):
    assert len(devkit.scene) == SCENES and len(devkit.sample) == SCENES * FRAMES
    for scene in devkit.scene:
        sample = devkit.get("sample", scene["first_sample_token"])
        count = 1
        while sample["next"]:
            sample = devkit.get("sample", sample["next"])
            count += 1
        assert sample["token"] == scene["last_sample_token"] and count == FRAMES
        assert set(sample["data"]) == {*cameras(WIDTH), "LIDAR_TOP"}


def test_devkit_boxes_project_onto_the_drawn_pixels(devkit):
    from nuscenes.utils.geometry_utils import view_points

    compared = 0
    for number, sample in enumerate(devkit.sample):
        frame = frame_of(number)
        assert sample["token"] == frame.token
        annotated = [index for index, item in enumerate(frame.objects) if item.name in CATEGORY_NAMES]
        assert len(annotated) == len(sample["anns"])
        by_token = dict(zip(sample["anns"], annotated, strict=True))
        for name, view in render(frame, WIDTH).items():
            path, boxes, intrinsic = devkit.get_sample_data(sample["data"][name])
            assert Path(path).is_file()
            corners = {by_token[box.token]: box.corners() for box in boxes}
            for index in annotated:
                rows, columns = np.nonzero(view.numbers == index + 1)
                if not len(rows):
                    continue
                assert index in corners, "drawn, but out of the picture for the devkit"
                if corners[index][2].min() < 0.5:
                    continue
                outline = view_points(corners[index], intrinsic, normalize=True)[:2].T
                center = outline.mean(axis=0)
                grown = center + (outline - center) * (1 + 1.5 / np.abs(outline - center).max(axis=0))  # 1.5 pixels
                inside = Delaunay(grown).find_simplex(np.column_stack([columns, rows])) >= 0
                assert inside.mean() > 0.97, (name, frame.objects[index].name)
                whole = (outline.min(axis=0) > 1).all() and (
                    outline.max(axis=0) < (WIDTH - 2, WIDTH * 9 // 16 - 2)
                ).all()
                if whole and view.visible()[index] == view.unhidden[index]:
                    compared += 1
                    drawn = np.array([columns.min(), rows.min(), columns.max(), rows.max()])
                    boxed = np.concatenate([outline.min(axis=0), outline.max(axis=0)])
                    size = boxed[2:] - boxed[:2]
                    assert (np.abs(drawn - boxed) <= 0.3 * np.tile(size, 2) + 2).all(), frame.objects[index].name
    assert compared > 10


def test_devkit_reads_lidar_and_counts_the_same_points(devkit):
    from nuscenes.utils.data_classes import LidarPointCloud
    from nuscenes.utils.geometry_utils import points_in_box

    for sample in devkit.sample[:2]:
        path, boxes, _ = devkit.get_sample_data(sample["data"]["LIDAR_TOP"])
        points = LidarPointCloud.from_file(path).points[:3]
        for box in boxes:
            expected = devkit.get("sample_annotation", box.token)["num_lidar_pts"]
            box.wlh = box.wlh + 0.01  # the points are on its surface
            on_top = np.count_nonzero(points_in_box(box, points) & (points[2] > -1.83))
            assert abs(on_top - expected) <= 2


def test_devkit_finds_the_ego_car_on_the_road_of_the_map(devkit):
    mask = devkit.map[0]["mask"]
    for sample in devkit.sample:
        data = devkit.get("sample_data", sample["data"]["CAM_FRONT"])
        x, y, _ = devkit.get("ego_pose", data["ego_pose_token"])["translation"]
        assert mask.is_on_mask(np.array([x]), np.array([y])).all()
        assert not mask.is_on_mask(np.array([x + 59.0]), np.array([y + 59.0])).any()


def test_devkit_gives_status_and_visibility(devkit):
    for sample, number in zip(devkit.sample, range(SCENES * FRAMES), strict=True):
        frame = frame_of(number)
        items = [item for item in frame.objects if item.name in CATEGORY_NAMES]
        for token, item in zip(sample["anns"], items, strict=True):
            annotation = devkit.get("sample_annotation", token)
            assert annotation["category_name"] == CATEGORY_NAMES[item.name]
            attributes = [devkit.get("attribute", value)["name"] for value in annotation["attribute_tokens"]]
            assert attributes == [name for name in [attribute_name(item)] if name]
            assert annotation["visibility_token"] in "1234"
