"""nuScenes-format data: projection, sectors, views from above, questions from boxes, and the joined DriveLM file.

Most tests build a small root of their own, so they need the devkit but no data. Those on the real key frame prove that
the devkit's and our geometry agree on real calibration.
"""

import json
import math
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("nuscenes.nuscenes", reason="the nuScenes devkit is an optional extra")

import pyarrow.parquet as pq  # noqa: E402
from nuscenes.utils.data_classes import LidarPointCloud  # noqa: E402
from nuscenes.utils.geometry_utils import points_in_box, view_points  # noqa: E402
from pyquaternion import Quaternion  # noqa: E402

from training.data.contents import read_contents, shown_by  # noqa: E402
from training.data.rig import NUSCENES, read_rig  # noqa: E402
from training.nuscenes.convert import NuScenesArguments, main, open_nuscenes  # noqa: E402
from training.nuscenes.geometry import (  # noqa: E402
    EDGES,
    Sensor,
    best_camera,
    box_edges,
    class_word,
    read_objects,
    read_sensors,
    reference_pose,
    see_box,
)
from training.nuscenes.views import (  # noqa: E402
    BEV_SIZE,
    EGO,
    ROAD,
    bev_pixels,
    proof_picture,
    read_lidar,
    render_lidar,
    render_map,
)

SECTORS = {name: NUSCENES.sector(name) for name in NUSCENES.names}

REAL = Path(__file__).resolve().parents[3].parent / "shared" / "nuscenes-real1"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real key frame is not here")

YAWS = {  # degrees to the left of straight ahead, as on the nuScenes car
    "CAM_FRONT_LEFT": 55,
    "CAM_FRONT": 0,
    "CAM_FRONT_RIGHT": -55,
    "CAM_BACK_LEFT": 110,
    "CAM_BACK": 180,
    "CAM_BACK_RIGHT": -110,
}
LOOKING_AHEAD = Quaternion(0.5, -0.5, 0.5, -0.5)  # camera axes (right, down, ahead) in ego axes (ahead, left, up)
EGO_AT = (60.0, 40.0, 0.0)
EGO_YAW = 90.0  # the ego car drives north, along the map's y
VERSION = "v1.0-test"


def turned(degrees: float) -> Quaternion:
    return Quaternion(axis=(0, 0, 1), degrees=degrees)


def make_root(
    root: Path, boxes: list[dict[str, Any]], *, lidar: bool = True, size: tuple[int, int] = (320, 180)
) -> Path:
    """A nuScenes-format root of one key frame; boxes are given in the ego frame: name, at, and optionally more."""
    tables: dict[str, list[dict[str, Any]]] = {
        "log": [{"token": "log", "logfile": "", "vehicle": "", "date_captured": "", "location": ""}],
        "map": [{"token": "map", "log_tokens": ["log"], "category": "semantic_prior", "filename": "maps/mask.png"}],
        "scene": [
            {
                "token": "scene",
                "log_token": "log",
                "nbr_samples": 1,
                "first_sample_token": "sample",
                "last_sample_token": "sample",
                "name": "scene-0001",
                "description": "A test.",
            }
        ],
        "sample": [{"token": "sample", "timestamp": 0, "scene_token": "scene", "prev": "", "next": ""}],
        "visibility": [
            {"token": str(i), "level": level, "description": ""}
            for i, level in enumerate(["v0-40", "v40-60", "v60-80", "v80-100"], start=1)
        ],
        "attribute": [],
        "category": [],
        "instance": [],
        "sample_annotation": [],
        "sensor": [],
        "calibrated_sensor": [],
        "ego_pose": [],
        "sample_data": [],
    }
    channels = [*SECTORS, *(["LIDAR_TOP"] if lidar else [])]
    for channel in channels:
        camera = channel.startswith("CAM")
        filename = f"samples/{channel}/0.{'jpg' if camera else 'pcd.bin'}"
        focal = size[0] * 0.79
        intrinsic = [[focal, 0, size[0] / 2], [0, focal, size[1] / 2], [0, 0, 1]] if camera else []
        rotation = turned(YAWS[channel]) * LOOKING_AHEAD if camera else turned(-90)
        tables["sensor"].append({"token": channel, "channel": channel, "modality": "camera" if camera else "lidar"})
        tables["calibrated_sensor"].append(
            {
                "token": channel,
                "sensor_token": channel,
                "translation": [1.0, 0.0, 1.5] if camera else [0.5, 0.0, 2.0],
                "rotation": list(rotation),
                "camera_intrinsic": intrinsic,
            }
        )
        tables["ego_pose"].append(
            {"token": channel, "timestamp": 0, "translation": list(EGO_AT), "rotation": list(turned(EGO_YAW))}
        )
        tables["sample_data"].append(
            {
                "token": channel,
                "sample_token": "sample",
                "ego_pose_token": channel,
                "calibrated_sensor_token": channel,
                "timestamp": 0,
                "fileformat": "jpg" if camera else "pcd",
                "is_key_frame": True,
                "height": size[1] if camera else 0,
                "width": size[0] if camera else 0,
                "filename": filename,
                "prev": "",
                "next": "",
            }
        )
        (root / filename).parent.mkdir(parents=True)
        if camera:
            Image.new("RGB", size, "navy").save(root / filename)
        else:  # one point 10 m ahead and 5 m to the left of the ego origin, 1 m above the ground: the sensor is turned
            np.array([[-5.0, 9.5, -1.0, 100.0, 0.0]], dtype=np.float32).tofile(root / filename)
    for index, box in enumerate(boxes):
        name, attribute = box["name"], box.get("attribute")
        for table, token in (("category", name), ("attribute", attribute)):
            if token is not None and token not in [row["token"] for row in tables[table]]:
                tables[table].append({"token": token, "name": token, "description": ""})
        token = f"box{index}"
        position = turned(EGO_YAW).rotate(np.array([*box["at"], 0.75])) + np.array(EGO_AT)
        links = {"prev": "", "next": ""}
        tables["instance"].append(
            {
                "token": token,
                "category_token": name,
                "nbr_annotations": 1,
                "first_annotation_token": token,
                "last_annotation_token": token,
            }
        )
        tables["sample_annotation"].append(
            links
            | {
                "token": token,
                "sample_token": "sample",
                "instance_token": token,
                "visibility_token": box.get("visibility", "4"),
                "attribute_tokens": [attribute] if attribute else [],
                "translation": position.tolist(),
                "size": [1.8, 4.0, 1.5],
                "rotation": list(turned(EGO_YAW)),
                "num_lidar_pts": box.get("points", 5),
                "num_radar_pts": 0,
            }
        )
    (root / VERSION).mkdir()
    for table, rows in tables.items():
        (root / VERSION / f"{table}.json").write_text(json.dumps(rows))
    mask = np.zeros((1000, 1200), dtype=np.uint8)  # 120 m east, 100 m north
    mask[:, 580:650] = 255  # a road to the north, x from 58 to 65 m: the ego car (x = 60 m) drives on its left side
    (root / "maps").mkdir()
    Image.fromarray(mask).save(root / "maps" / "mask.png")
    return root


def at(camera: str, distance: float) -> tuple[float, float]:
    """Ego coordinates on the optical axis of a camera (which sits 1 m ahead of the origin)."""
    angle = math.radians(YAWS[camera])
    return 1.0 + distance * math.cos(angle), distance * math.sin(angle)


CAR_AHEAD = {"name": "vehicle.car", "at": (11.0, 0.0)}


def change(root: Path, table: str, rows: Any) -> None:
    """Another content of a table: rows, or a function of each row."""
    file = root / VERSION / f"{table}.json"
    file.write_text(json.dumps([rows(row) for row in json.loads(file.read_text())] if callable(rows) else rows))


def arguments(root: Path, output_dir: Path, **more: Any) -> NuScenesArguments:
    return NuScenesArguments(dataroot=str(root), version=VERSION, output_dir=str(output_dir), **more)


def read_frame(output_dir: Path) -> dict[str, Any]:
    scenes = json.loads((output_dir / "drivelm.json").read_text())
    (frame,) = (frame for scene in scenes.values() for frame in scene["key_frames"].values())
    return frame


# ---------------------------------------------------------------------------------------------- projection


@needs_real
def test_projection_agrees_with_the_devkit_and_with_plain_algebra_on_the_real_frame() -> None:
    """Three ways to the same pixels: ours, the devkit's boxes and view_points, and matrices written out here."""
    nusc = open_nuscenes(REAL, "v1.0-real1")
    sample = nusc.sample[0]
    sensors = read_sensors(nusc, sample)

    def rotation(q: list[float]) -> np.ndarray:
        w, x, y, z = q
        return np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
            ]
        )

    compared = 0
    for channel in SECTORS:
        data = nusc.get("sample_data", sample["data"][channel])
        pose = nusc.get("ego_pose", data["ego_pose_token"])
        calibration = nusc.get("calibrated_sensor", data["calibrated_sensor_token"])
        _, boxes, intrinsic = nusc.get_sample_data(sample["data"][channel])  # boxes in the camera's frame
        for box in boxes:
            if (box.corners()[2] < 1).any():
                continue
            devkit = view_points(box.corners(), intrinsic, normalize=True)[:2].T  # (8, 2)
            ours = box_edges(sensors[channel], nusc.get_box(box.token).corners())  # (12, 2, 2)
            np.testing.assert_allclose(ours, devkit[np.array(EDGES)], atol=1e-6)

            annotation = nusc.get("sample_annotation", box.token)
            width, length, height = annotation["size"]
            signs = np.array([[1, 1, 1], [1, -1, 1], [1, -1, -1], [1, 1, -1]])
            local = np.concatenate([signs, signs * [-1, 1, 1]]) * np.array([length, width, height]) / 2
            world = local @ rotation(annotation["rotation"]).T + annotation["translation"]
            ego = (world - pose["translation"]) @ rotation(pose["rotation"])
            camera = (ego - calibration["translation"]) @ rotation(calibration["rotation"])
            pixels = camera @ np.array(intrinsic).T
            np.testing.assert_allclose(pixels[:, :2] / pixels[:, 2:], devkit, atol=1e-2)
            compared += 1
    assert compared > 60


@needs_real
def test_lidar_points_in_the_ego_frame_fall_into_the_real_boxes() -> None:
    """The annotators' own count of LiDAR points per box checks the LiDAR's calibration and the ego pose."""
    nusc = open_nuscenes(REAL, "v1.0-real1")
    sample = nusc.sample[0]
    sensors = read_sensors(nusc, sample)
    points = read_lidar(nusc, sensors, sample)
    ego_from_global = np.linalg.inv(reference_pose(sensors, sample))
    path, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])  # the devkit's way: all in the LiDAR's frame
    sweep = LidarPointCloud.from_file(path).points
    annotated, found, devkit = [], [], []
    for in_lidar in boxes:
        box = nusc.get_box(in_lidar.token)
        box.rotate(Quaternion(matrix=ego_from_global[:3, :3], atol=1e-6))
        box.translate(ego_from_global[:3, 3])
        found.append(int(points_in_box(box, points[:3]).sum()))
        devkit.append(int(points_in_box(in_lidar, sweep[:3]).sum()))
        annotated.append(nusc.get("sample_annotation", in_lidar.token)["num_lidar_pts"])
    assert found == devkit
    # The annotators' counts are a little higher than what the devkit finds as well (495 against 479 in the truck).
    assert np.abs(np.array(found) - annotated).sum() < 0.04 * sum(annotated)


def test_boxes_are_cut_off_in_front_of_the_camera(tmp_path: Path) -> None:
    """A box beside the camera reaches behind it: what lies behind must not come back mirrored."""
    nusc = open_nuscenes(make_root(tmp_path, [{"name": "vehicle.car", "at": (1.5, 2.0)}]), VERSION)
    sensors = read_sensors(nusc, nusc.sample[0])
    corners = nusc.get_box("box0").corners()
    edges = box_edges(sensors["CAM_FRONT"], corners)
    assert 0 < len(edges) < 12
    assert (edges[..., 0] < sensors["CAM_FRONT"].size[0] / 2).all()  # all of it is to the left
    assert len(box_edges(sensors["CAM_BACK_RIGHT"], corners)) in range(9)
    assert see_box(sensors["CAM_BACK_RIGHT"], corners) is None


# ---------------------------------------------------------------------------------------------- sectors and objects


def test_sector_is_the_camera_that_sees_the_box_best(tmp_path: Path) -> None:
    boxes = [{"name": "vehicle.car", "at": at(camera, 12.0)} for camera in YAWS]
    nusc = open_nuscenes(make_root(tmp_path, boxes), VERSION)
    sensors = read_sensors(nusc, nusc.sample[0])
    best = [best_camera(sensors, nusc.get_box(f"box{index}").corners()) for index in range(len(boxes))]
    assert [found[0] for found in best if found] == list(YAWS)
    seen = best[0][1] if best[0] else None
    assert seen is not None and seen.share == pytest.approx(1.0) and seen.offset < 0.1
    objects = read_objects(nusc, nusc.sample[0], min_pixels=10, max_distance=60, skipped=Counter())
    assert [o.item.camera for o in objects] == list(YAWS)
    # The optical axis is the middle of a 1600 x 900 image, whatever the size of the real image.
    assert all(abs(o.item.center[0] - 800) < 60 and abs(o.item.center[1] - 450) < 160 for o in objects)
    assert [round(o.item.distance, 3) for o in objects] == [round(math.hypot(*at(camera, 12.0)), 3) for camera in YAWS]


def test_overlap_goes_to_the_camera_that_shows_more_and_then_to_the_more_central_one() -> None:
    def camera(name: str, yaw: float) -> Sensor:
        pose = np.eye(4)
        pose[:3, :3] = (turned(yaw) * LOOKING_AHEAD).rotation_matrix
        return Sensor(name, "", (1600, 900), np.array([[1266.0, 0, 800], [0, 1266, 450], [0, 0, 1]]), pose, np.eye(4))

    sensors = {name: camera(name, yaw) for name, yaw in YAWS.items()}
    signs = np.array([[1, 1, 1], [1, -1, 1], [1, -1, -1], [1, 1, -1]])
    cube = np.concatenate([signs, signs * [-1, 1, 1]]).T * 0.2

    def seen_at(degrees: float) -> tuple[str, float]:
        centre = np.array([20 * math.cos(math.radians(degrees)), 20 * math.sin(math.radians(degrees)), 0.0])
        found = best_camera(sensors, cube + centre[:, None])
        assert found is not None
        return found[0], found[1].share

    assert seen_at(27) == ("CAM_FRONT", pytest.approx(1.0))  # both show all of it, 27 against 28 degrees off
    assert seen_at(28) == ("CAM_FRONT_LEFT", pytest.approx(1.0))
    name, share = seen_at(-32.2)
    assert (name, share) == ("CAM_FRONT_RIGHT", pytest.approx(1.0))


def test_what_nobody_can_see_is_left_out_and_counted(tmp_path: Path) -> None:
    ahead = at("CAM_FRONT", 10.0)
    boxes = [
        {"name": "vehicle.bus.rigid", "at": ahead, "attribute": "vehicle.stopped"},
        {"name": "vehicle.car", "at": ahead, "visibility": "1"},
        {"name": "vehicle.car", "at": ahead, "visibility": "", "points": 0},
        {"name": "human.pedestrian.adult", "at": ahead, "visibility": "", "points": 1},
        {"name": "animal", "at": ahead},
        {"name": "vehicle.car", "at": (70.0, 0.0)},
        {"name": "vehicle.car", "at": (50.0, 0.0)},
        {"name": "human.pedestrian.adult", "at": at("CAM_BACK", 9.0), "attribute": "pedestrian.sitting_lying_down"},
    ]
    nusc = open_nuscenes(make_root(tmp_path, boxes), VERSION)
    skipped: Counter[str] = Counter()
    objects = read_objects(nusc, nusc.sample[0], min_pixels=100, max_distance=60, skipped=skipped)
    assert [(o.item.name, o.item.status) for o in objects] == [
        ("bus", "stopped"),
        ("pedestrian", None),
        ("pedestrian", None),
    ]
    assert sum(skipped.values()) == 5
    reasons = " / ".join(skipped)
    for reason in ("hidden", "animal has no word", "further than 60 m", "smaller than 100 pixels"):
        assert reason in reasons
    assert next(count for reason, count in skipped.items() if reason.startswith("hidden")) == 2


def test_class_words() -> None:
    assert class_word("vehicle.bus.bendy") == "bus"
    assert class_word("human.pedestrian.construction_worker") == "pedestrian"
    assert class_word("movable_object.trafficcone") == "traffic cone"
    assert class_word("movable_object.debris") is None
    assert class_word("vehicle.carriage") is None  # a prefix counts only up to a dot


# ---------------------------------------------------------------------------------------------- views from above


def test_points_land_on_the_expected_pixel() -> None:
    # 0.2 m a pixel, the ego origin between the four middle pixels; ahead is up, left is left.
    points = np.array([[10.0, -20.0, 0.1], [5.0, -7.5, -0.1]])
    assert bev_pixels(points).T.tolist() == [[225.0, 200.0], [287.5, 350.0], pytest.approx([250.5, 249.5])]


def test_lidar_view_shows_height_strength_and_count(tmp_path: Path) -> None:
    nusc = open_nuscenes(make_root(tmp_path, []), VERSION)
    sample = nusc.sample[0]
    points = read_lidar(nusc, read_sensors(nusc, sample), sample)
    np.testing.assert_allclose(points[:, 0], [10.0, 5.0, 1.0, 100.0], atol=1e-5)
    points = np.concatenate(
        [
            points + np.array([[0.01], [-0.01], [0], [0]]),  # off the border between two pixels
            np.array([[30.05, -20.05, 0.0, 255.0]]).T,
            np.array([[30.05, -20.05, 3.5, 0.0]]).T,
            np.array([[500.0, 0, 0, 255.0]]).T,  # outside
        ],
        axis=1,
    )
    image = np.array(render_lidar(points))
    assert image.shape == (BEV_SIZE, BEV_SIZE, 3)
    height, strength = (1.0 + 0.5) / 4, math.log(101) / math.log(256)
    assert image[199, 225].tolist() == [round(255 * height), round(255 * strength), round(255 * 0.4)]
    assert image[99, 350].tolist() == [255, 255, round(255 * (0.4 + 0.6 / 5))]  # the highest, the strongest, two
    lit = (image != 0).any(axis=-1)
    marker = (image == EGO).all(axis=-1)
    assert lit.sum() - marker.sum() == 2
    assert marker[245, 250] and not marker[225, 250] and not marker[262, 250]


def test_map_view_turns_with_the_ego_car(tmp_path: Path) -> None:
    """The ego car drives north at x = 60 m on a road from x = 58 to 65 m: 2 m of it to its left, 5 m to its right."""
    nusc = open_nuscenes(make_root(tmp_path, []), VERSION)
    sample = nusc.sample[0]
    pose = reference_pose(read_sensors(nusc, sample), sample)
    image = np.array(render_map(nusc, sample, pose))
    road = (image == ROAD).all(axis=-1)
    columns = np.flatnonzero(road[50])  # 40 m ahead, at y = 80 m
    assert columns.min() == pytest.approx(250 - 2 / 0.2, abs=1) and columns.max() == pytest.approx(250 + 25, abs=1)
    rows = np.flatnonzero(road[:, 270])
    assert rows.min() == 0  # 50 m ahead is y = 90 m, still on the map (100 m)
    assert rows.max() == pytest.approx(250 + 40 / 0.2, abs=1)  # 40 m behind, y = 0, the map ends
    assert (image[246, 250] == EGO).all()


def test_map_without_the_ego_car_is_an_error(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root", [CAR_AHEAD])
    Image.new("L", (20, 20), 255).save(root / "maps" / "mask.png")
    with pytest.raises(ValueError, match=r"at \(60.0, 40.0\) m, .*mask.png covers \(0, 0\) to \(2, 2\) m.*--views"):
        main(arguments(root, tmp_path / "out", views=["MAP_BEV"]))
    (root / "maps" / "mask.png").unlink()
    with pytest.raises(ValueError, match="map"):
        main(arguments(root, tmp_path / "out", views=["MAP_BEV"]))
    assert not (tmp_path / "out" / "drivelm.json").exists()


@needs_real
def test_the_real_placeholder_map_is_refused(tmp_path: Path) -> None:
    args = NuScenesArguments(str(REAL), "v1.0-real1", str(tmp_path), views=["MAP_BEV"])
    with pytest.raises(ValueError, match="placeholder for a map"):
        main(args)


def test_proof_picture_draws_boxes_where_they_are(tmp_path: Path) -> None:
    root = make_root(tmp_path, [{"name": "vehicle.car", "at": at("CAM_BACK", 12.0)}])
    nusc = open_nuscenes(root, VERSION)
    picture = np.array(proof_picture(nusc, nusc.sample[0]))
    assert picture.shape == (720, 3 * 640 + 720, 3)
    orange = (picture == (255, 165, 0)).all(axis=-1)
    tiles = {name: orange[index // 3 * 360 :, index % 3 * 640 :][:360, :640] for index, name in enumerate(YAWS)}
    assert [name for name, tile in tiles.items() if tile.any()] == ["CAM_BACK"]
    # From above: 11 m behind the origin, 4 m long; the legend is in the left corner.
    rows, columns = np.nonzero(orange[:, 3 * 640 + 200 :])
    assert rows.mean() == pytest.approx(360 + 11 / 50 * 360, abs=4)
    assert columns.mean() + 200 == pytest.approx(360, abs=4)


# ---------------------------------------------------------------------------------------------- the stage


def fleet(root: Path) -> Path:
    return make_root(
        root,
        [
            {"name": "vehicle.car", "at": at("CAM_BACK", 12.0), "attribute": "vehicle.moving"},
            {"name": "vehicle.car", "at": at("CAM_BACK", 18.0), "attribute": "vehicle.parked"},
            {"name": "vehicle.bicycle", "at": at("CAM_FRONT", 8.0), "attribute": "cycle.without_rider"},
            {"name": "movable_object.barrier", "at": at("CAM_FRONT_LEFT", 9.0)},
        ],
    )


def test_questions_and_views_from_a_fleet(tmp_path: Path) -> None:
    root, out = fleet(tmp_path / "fleet"), tmp_path / "out"
    counts = main(arguments(root, out, views=["LIDAR_BEV", "MAP_BEV"], picture=str(tmp_path / "proof.png")))
    frame = read_frame(out)
    said = {row["Q"]: row["A"] for row in frame["QA"]["perception"]}
    assert said["What are objects to the back of the ego car?"] == "There are two cars behind the ego car."
    assert said["What is the status of the cars that are to the back of the ego car?"] == (
        "One of the cars is moving, and one is parked."
    )
    assert said["What is the status of the bicycle that is to the front of the ego car?"] == (
        "One bicycle is without a rider."
    )
    assert counts["questions"] == len(said) == sum(map(len, frame["QA"].values()))
    assert set(frame["QA"]) == {"perception", "prediction", "planning", "behavior"}
    for tag, info in frame["key_object_infos"].items():
        x, y = map(float, tag.strip("<>").split(",")[2:])
        left, top, right, bottom = info["2d_bbox"]
        assert (x, y) == (pytest.approx((left + right) / 2, abs=0.11), pytest.approx((top + bottom) / 2, abs=0.11))
        assert any(tag in question for question in said)
    assert set(frame["image_paths"]) == {*SECTORS, "LIDAR_BEV", "MAP_BEV"}
    for path in frame["image_paths"].values():  # DriveLM's paths, with the output folder as image root
        assert path.startswith("../")
        with Image.open(out / path.removeprefix("../")) as image:
            image.load()
    with Image.open(tmp_path / "proof.png") as picture:
        picture.load()
    assert not list(out.rglob("*.tmp*"))
    behind = shown_by(read_contents(out / "contents.json")["sample"], "CAM_BACK")
    assert {(thing["name"], thing["status"]) for thing in behind} == {("car", "moving"), ("car", "parked")}
    assert all(0 < thing["distance"] < 60 for thing in behind)


def test_calibration_is_written(tmp_path: Path) -> None:
    root, out = fleet(tmp_path / "fleet"), tmp_path / "out"
    main(arguments(root, out))
    rows = {row["channel"]: row for row in pq.read_table(out / "calibration.parquet").to_pylist()}
    assert set(rows) == {*SECTORS, "LIDAR_TOP"}
    assert rows["LIDAR_TOP"]["intrinsic"] == []
    assert rows["CAM_BACK"]["intrinsic"][2] == 160.0
    pose = np.array(rows["CAM_BACK"]["global_from_ego"]).reshape(4, 4)
    np.testing.assert_allclose(pose @ [1, 0, 0, 1], [60, 41, 0, 1], atol=1e-9)  # ahead is north
    mount = np.array(rows["CAM_BACK"]["ego_from_sensor"]).reshape(4, 4)
    np.testing.assert_allclose(mount @ [0, 0, 1, 1], [0, 0, 1.5, 1], atol=1e-9)  # it looks back


def test_same_seed_same_file_and_another_seed_another(tmp_path: Path) -> None:
    root = fleet(tmp_path / "fleet")
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(arguments(root, tmp_path / name, seed=seed))
        files.append((tmp_path / name / "drivelm.json").read_bytes())
    assert files[0] == files[1] != files[2]


def test_drivelm_frames_are_joined_by_sample_token(tmp_path: Path) -> None:
    root, out = fleet(tmp_path / "fleet"), tmp_path / "out"
    rows = [{"Q": "Is it day?", "A": "Yes.", "C": None}]
    frame = {"key_object_infos": {}, "QA": {"perception": rows}, "image_paths": {"CAM_FRONT": "../nuscenes/x.jpg"}}
    drivelm = {
        "scene": {"scene_description": "", "key_frames": {"sample": frame}},
        "elsewhere": {"scene_description": "", "key_frames": {"unknown": frame}},
    }
    source = tmp_path / "drivelm.json"
    source.write_text(json.dumps(drivelm))
    counts = main(arguments(root, out, drivelm_json=str(source), views=["LIDAR_BEV"]))
    assert (counts["frames"], counts["frames joined"], counts["questions"]) == (2, 1, 2)
    joined = json.loads((out / "drivelm.json").read_text())
    paths = joined["scene"]["key_frames"]["sample"]["image_paths"]
    assert paths == {"CAM_FRONT": "../nuscenes/x.jpg", "LIDAR_BEV": "../views/LIDAR_BEV/sample.png"}
    del paths["LIDAR_BEV"]
    assert joined == drivelm  # nothing else has changed
    assert set(read_contents(out / "contents.json")) == {"sample"}

    drivelm.pop("scene")
    source.write_text(json.dumps(drivelm))
    with pytest.raises(ValueError, match="None of the 1 frames.*v1.0-trainval"):
        main(arguments(root, out, drivelm_json=str(source)))
    source.write_text(json.dumps(drivelm)[:-5])
    with pytest.raises(ValueError, match=r"no complete JSON file: .*char \d+"):
        main(arguments(root, out, drivelm_json=str(source)))
    source.write_text('{"scene": []}')
    with pytest.raises(ValueError, match="not in DriveLM's format"):
        main(arguments(root, out, drivelm_json=str(source)))


@needs_real
def test_questions_from_the_real_frame(tmp_path: Path) -> None:
    main(NuScenesArguments(str(REAL), "v1.0-real1", str(tmp_path), views=["LIDAR_BEV"]))
    frame = read_frame(tmp_path)
    said = {row["Q"]: row["A"] for row in frame["QA"]["perception"]}
    # What a person sees in the six images: a truck and barriers ahead, a bus and parked cars far behind.
    ahead = said["What are objects to the front of the ego car?"]
    assert "two trucks" in ahead and "many barriers" in ahead and ahead.endswith("in front of the ego car.")
    assert "one bus" in said["What are objects to the back of the ego car?"]
    assert not any("status" in question for question in said)  # this frame has no attributes
    existence = [answer for question, answer in said.items() if question.startswith("Are there")]
    assert existence.count("Yes.") == existence.count("No.") >= 3
    for question in said:
        for name, x, y in re.findall(r"<c\d+,(CAM_[A-Z_]+),(\d+\.\d),(\d+\.\d)>", question):
            assert name in SECTORS and 0 <= float(x) <= 1600 and 0 <= float(y) <= 900
    assert all((tmp_path / path.removeprefix("../")).is_file() for path in frame["image_paths"].values())


# ---------------------------------------------------------------------------------------------- other makers


def questions_of(root: Path, output_dir: Path, **more: Any) -> list[tuple[str, str]]:
    main(arguments(root, output_dir, **more))
    return [(entry["Q"], entry["A"]) for entry in read_frame(output_dir)["QA"]["perception"]]


SHORT_NAMES = {"vehicle.car": "car", "human.pedestrian.adult": "pedestrian", "vehicle.bicycle": "bicycle"}
STATES = {
    "lyft": {
        "vehicle.parked": "object_action_parked",
        "pedestrian.standing": "object_action_standing",
        "cycle.with_rider": "",  # Lyft says where a bicycle goes, not who rides it
    },
    "t4": {
        "vehicle.parked": "vehicle_state.parked",
        "pedestrian.standing": "pedestrian_state.standing",
        "cycle.with_rider": "cycle_state.with_rider",
    },
}


def objects_of(root: Path) -> list[tuple[str, str | None]]:
    nusc = open_nuscenes(root, VERSION)
    found = read_objects(nusc, nusc.sample[0], min_pixels=1, max_distance=60, skipped=Counter())
    return [(one.item.name, one.item.status) for one in found]


@pytest.mark.parametrize("maker", ["lyft", "t4"])
def test_other_makers_names_mean_the_same(tmp_path: Path, maker: str) -> None:
    boxes = [
        {"name": "vehicle.car", "at": (11.0, 0.0), "attribute": "vehicle.parked"},
        {"name": "human.pedestrian.adult", "at": (9.0, 3.0), "attribute": "pedestrian.standing"},
        {"name": "vehicle.bicycle", "at": (12.0, -4.0), "attribute": "cycle.with_rider"},
    ]
    root = make_root(tmp_path / "root", boxes)
    assert objects_of(root) == [("car", "parked"), ("pedestrian", "standing"), ("bicycle", "with rider")]
    change(root, "category", lambda row: row | {"name": SHORT_NAMES[row["name"]]})
    change(
        root,
        "attribute",
        lambda row: row | {"name": STATES[maker][row["name"]] or "object_action_driving_straight_forward"},
    )
    rider = "with rider" if maker == "t4" else None
    assert objects_of(root) == [("car", "parked"), ("pedestrian", "standing"), ("bicycle", rider)]


@pytest.mark.parametrize(
    ("visibility", "points", "seen"),
    [
        ("", -1, True),  # nobody has counted
        ("", 0, False),
        ("", 3, True),
        ("gone", 3, True),  # names no level
        ("gone", 0, False),
        ("none", 5, False),
        ("full", 0, True),
        ("unavailable", 0, False),
        ("unavailable", -1, True),
    ],
)
def test_what_can_be_seen_where_others_write_it_differently(
    tmp_path: Path, visibility: str, points: int, seen: bool
) -> None:
    root = make_root(tmp_path / "root", [{**CAR_AHEAD, "visibility": visibility, "points": points}])
    levels = ("full", "most", "partial", "none", "unavailable")
    change(root, "visibility", [{"token": level, "level": level, "description": ""} for level in levels])
    assert objects_of(root) == ([("car", None)] if seen else [])


def test_boxes_without_point_counts_are_asked_about(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root", [{**CAR_AHEAD, "visibility": ""}])
    drop = {"num_lidar_pts", "num_radar_pts"}
    change(root, "sample_annotation", lambda row: {key: value for key, value in row.items() if key not in drop})
    assert objects_of(root) == [("car", None)]


def test_dummy_maps_and_logs_cost_only_the_map_view(tmp_path: Path) -> None:
    wanted = questions_of(make_root(tmp_path / "whole", [CAR_AHEAD]), tmp_path / "out")
    lost = {"token": "map", "log_tokens": ["log"], "category": "", "filename": "maps/gone.png"}
    for name, tables in {
        "empty": {"map": [], "log": []},
        "no map": {"map": []},
        "no log": {"log": []},
        "no file": {"map": [lost]},
        "no logs named": {"map": [{**lost, "log_tokens": []}]},
    }.items():
        root = make_root(tmp_path / name, [CAR_AHEAD])
        for table, rows in tables.items():
            change(root, table, rows)
        assert questions_of(root, tmp_path / f"{name} out", views=["LIDAR_BEV"]) == wanted
        if name != "no log":
            told = "missing: maps/gone.png" if name == "no file" else "map.json names none"
            with pytest.raises(ValueError, match=f"MAP_BEV needs the map mask of key frame sample.*{told}"):
                main(arguments(root, tmp_path / f"{name} map", views=["MAP_BEV"]))


def test_t4_joins_its_lidars_to_one(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root", [CAR_AHEAD])
    change(root, "sensor", lambda row: {**row, "channel": row["channel"].replace("LIDAR_TOP", "LIDAR_CONCAT")})
    main(arguments(root, tmp_path / "out", views=["LIDAR_BEV"], picture=str(tmp_path / "proof.png")))
    view = np.asarray(Image.open(tmp_path / "out" / "views" / "LIDAR_BEV" / "sample.png"))
    assert view[BEV_SIZE // 2 - 50, BEV_SIZE // 2 - 25].any()  # 10 m ahead, 5 m to the left


def test_a_file_extends_the_categories(tmp_path: Path) -> None:
    boxes = [CAR_AHEAD, {"name": "other_vehicle", "at": (9.0, 3.0)}, {"name": "animal", "at": (9.0, -3.0)}]
    root = make_root(tmp_path / "root", boxes)
    file = tmp_path / "categories.yaml"
    file.write_text("Other_Vehicle: truck\nvehicle.car: null\n")
    questions = questions_of(root, tmp_path / "out", categories=str(file))
    assert "truck" in str(questions) and "car is" not in str(questions)
    (info,) = read_frame(tmp_path / "out")["key_object_infos"].values()
    assert "truck" in info["Visual_description"].lower()
    file.write_text('{"animal": "elephant"}')
    with pytest.raises(ValueError, match="categories.yaml: animal is one of car, truck.*got 'elephant'"):
        main(arguments(root, tmp_path / "out", categories=str(file)))
    for content in ("- car", "car", "{", "1: car"):
        file.write_text(content)
        with pytest.raises(ValueError, match="--categories .*categories.yaml (must hold|cannot be read)"):
            main(arguments(root, tmp_path / "out", categories=str(file)))
    with pytest.raises(ValueError, match="--categories .*gone.yaml cannot be read"):
        main(arguments(root, tmp_path / "out", categories=str(tmp_path / "gone.yaml")))


def test_a_fleet_about_which_nothing_can_be_asked_is_an_error(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root", [{"name": "tram", "at": (11.0, 0.0)}] * 2)
    with pytest.raises(ValueError, match="nothing can be asked about the 2 boxes.*category tram.*--categories FILE"):
        main(arguments(root, tmp_path / "out"))
    assert not (tmp_path / "out" / "drivelm.json").exists()


# ---------------------------------------------------------------------------------------------- teaching errors


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\0" * 21, np.full(10, np.nan, np.float32).tobytes()])
def test_a_broken_lidar_file_is_named(tmp_path: Path, content: bytes) -> None:
    root = make_root(tmp_path / "root", [CAR_AHEAD])
    (root / "samples" / "LIDAR_TOP" / "0.pcd.bin").write_bytes(content)
    for more in ({"views": ["LIDAR_BEV"]}, {"picture": str(tmp_path / "proof.png")}):
        with pytest.raises(ValueError, match=r"key frame sample.*0\.pcd\.bin|0\.pcd\.bin of key frame sample"):
            main(arguments(root, tmp_path / "out", **more))
    assert not (tmp_path / "out" / "drivelm.json").exists() and not (tmp_path / "proof.png").exists()


def test_beams_that_nothing_sent_back_are_no_points(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root", [CAR_AHEAD])
    file = root / "samples" / "LIDAR_TOP" / "0.pcd.bin"
    points = np.fromfile(file, dtype=np.float32)
    np.concatenate([points, np.full(5, np.nan, np.float32), points]).tofile(file)
    nusc = open_nuscenes(root, VERSION)
    assert read_lidar(nusc, read_sensors(nusc, nusc.sample[0]), nusc.sample[0]).shape == (4, 2)


def test_missing_devkit_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nuscenes.nuscenes", None)
    with pytest.raises(ImportError, match="pip install nuscenes-devkit==1.2.0"):
        open_nuscenes(tmp_path, VERSION)


def test_missing_tables_are_explained(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root", [])
    with pytest.raises(ValueError, match=f"has no folder v1.0-mini; it holds: maps, samples, {VERSION}"):
        open_nuscenes(root, "v1.0-mini")
    (root / VERSION / "map.json").unlink()
    with pytest.raises(ValueError, match="All 13 must be there"):
        open_nuscenes(root, VERSION)


def test_missing_lidar_is_explained(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root", [CAR_AHEAD], lidar=False)
    with pytest.raises(ValueError, match="LIDAR_BEV needs LIDAR_TOP.*Leave LIDAR_BEV out"):
        main(arguments(root, tmp_path / "out", views=["LIDAR_BEV"]))
    main(arguments(root, tmp_path / "out", picture=str(tmp_path / "proof.png")))  # everything else works without
    other = make_root(tmp_path / "other", [CAR_AHEAD])
    shutil.rmtree(other / "samples" / "LIDAR_TOP")
    with pytest.raises(ValueError, match="point cloud of key frame sample, which is missing"):
        main(arguments(other, tmp_path / "out", views=["LIDAR_BEV"]))


def test_wrong_options_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LIDAR_BEV and MAP_BEV; got RADAR"):
        arguments(tmp_path, tmp_path, views=["RADAR"])
    with pytest.raises(ValueError, match="add --picture"):
        arguments(tmp_path, tmp_path, frame_token="sample")
    root = make_root(tmp_path / "root", [])
    with pytest.raises(ValueError, match="none of the 1 samples"):
        main(arguments(root, tmp_path / "out", picture=str(tmp_path / "p.png"), frame_token="other"))
    (tmp_path / "full" / "nuscenes").mkdir(parents=True)
    with pytest.raises(ValueError, match="in the way"):
        main(arguments(root, tmp_path / "full"))


# ---------------------------------------------------------------------------------------------- other cameras

NAMES = {"CAM_FRONT": "bow", "CAM_FRONT_LEFT": "port_bow", "CAM_BACK": "stern", "CAM_BACK_LEFT": "port_quarter"}


def rename_cameras(root: Path, names: dict[str, str]) -> Path:
    """Another fleet's names for cameras; only the table of sensors has them."""
    table = root / VERSION / "sensor.json"
    sensors = json.loads(table.read_text())
    table.write_text(json.dumps([{**one, "channel": names.get(one["channel"], one["channel"])} for one in sensors]))
    return root


def test_cameras_of_other_names_are_taken_by_where_the_calibration_has_them_look(tmp_path: Path) -> None:
    root, out = rename_cameras(fleet(tmp_path / "fleet"), NAMES), tmp_path / "out"
    counts = main(arguments(root, out, picture=str(tmp_path / "proof.png")))
    renamed = {NAMES.get(name, name): name for name in SECTORS}
    assert counts["cameras"] == list(renamed) and counts["cameras left out"] == {}
    rig = read_rig(out / "rig.json")
    assert {name: rig.sector(name) for name in rig.names} == {name: SECTORS[old] for name, old in renamed.items()}
    stern = rig["stern"]
    assert (stern.size, stern.place) == ((320, 180), (1.0, 0.0, 1.5)) and abs(stern.azimuth) == 180
    assert stern.field_of_view == pytest.approx(64.7, abs=0.1)
    frame = read_frame(out)
    assert set(frame["image_paths"]) == set(renamed)
    assert any(tag.split(",")[1] == "stern" for tag in frame["key_object_infos"])
    # The questions are those of nuScenes' six but for the tags.
    same = tmp_path / "same"
    main(arguments(fleet(tmp_path / "six"), same))
    text = json.dumps(read_frame(same)["QA"])
    for old, new in NAMES.items():
        text = text.replace(f",{old},", f",{new},")
    assert json.loads(text) == frame["QA"]


def test_nothing_drops_a_camera_without_a_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = fleet(tmp_path / "fleet"), tmp_path / "out"
    table = root / VERSION / "sample_data.json"
    records = [one for one in json.loads(table.read_text()) if one["token"] != "CAM_BACK_RIGHT"]
    table.write_text(json.dumps(records))
    counts = main(arguments(root, out))
    assert counts["cameras left out"] == {"CAM_BACK_RIGHT is not in the key frame": 1}
    assert "1 frames: CAM_BACK_RIGHT is not in the key frame" in capsys.readouterr().out

    theirs = tmp_path / "theirs.json"
    scenes = json.loads((out / "drivelm.json").read_text())
    paths = scenes["scene"]["key_frames"]["sample"]["image_paths"]
    paths["CAM_ROOF"] = paths.pop("CAM_FRONT")
    theirs.write_text(json.dumps(scenes))
    assert main(arguments(root, tmp_path / "joined", drivelm_json=str(theirs)))["cameras left out"] == {
        "CAM_FRONT is not in the DriveLM file": 1,
        "CAM_BACK_RIGHT is not in the key frame": 1,
        "CAM_ROOF of the DriveLM file is not in the data": 1,
    }


def test_a_rig_of_one_s_own_must_have_all_cameras(tmp_path: Path) -> None:
    root, rig = fleet(tmp_path / "fleet"), tmp_path / "rig.yaml"
    rig.write_text("".join(f"{name}: {{azimuth: {index * 60 - 120}}}\n" for index, name in enumerate(SECTORS)))
    main(arguments(root, tmp_path / "out", rig=str(rig)))
    assert read_rig(tmp_path / "out" / "rig.json") == read_rig(rig)
    rig.write_text("CAM_FRONT: {azimuth: 0}\nCAM_BACK: {azimuth: 180}\n")
    with pytest.raises(ValueError, match="has CAM_FRONT, CAM_BACK; the data has CAM_BACK_LEFT, CAM_BACK_RIGHT, CAM_F"):
        main(arguments(root, tmp_path / "two", rig=str(rig)))
    assert not (tmp_path / "two").exists()
    assert not (tmp_path / "two" / "drivelm.json").exists()
