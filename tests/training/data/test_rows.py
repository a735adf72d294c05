import pickle
import shutil
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from tests.drivelm_files import CAMERAS, make_world, write_world
from training.data.rows import load_rows
from training.prepare import PrepareArguments, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The world of five scenes with two frames each, prepared into `data` beside its images, all in train."""
    folder = tmp_path_factory.mktemp("rows")
    world = make_world(5)
    world["scene-1"]["key_frames"]["frame-1-1"]["QA"] = {}
    file = write_world(folder, world)
    (folder / "nuscenes/samples/CAM_BACK/0-0.jpg").unlink()
    main(PrepareArguments(str(file), str(folder), str(folder / "data"), split="train"))
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return load_rows(folder / "data", "train")


def test_rows(rows, folder):
    assert len(rows) == 45 == len(list(rows))
    assert rows[44] == rows[-1] and rows[0]["question_id"] == "scene-0_frame-0-0_0"
    assert [row["question_id"] for row in rows] == [rows[i]["question_id"] for i in range(45)]
    assert set(rows[0]) == {
        "question_id", "scene_token", "frame_token", "category", "tag", "question", "answer", "objects", "images",
    }  # fmt: skip
    assert rows.cameras == CAMERAS and rows.image_root == folder.resolve() and len(rows.split_hash) == 64
    for index in (45, -46):
        with pytest.raises(IndexError, match="a split with 45 rows"):
            rows[index]


def test_images_are_those_of_the_frame_by_name(rows, folder):
    for row in rows:
        name = row["frame_token"].removeprefix("frame-")
        expected = {camera: str(folder / f"nuscenes/samples/{camera}/{name}.jpg") for camera in CAMERAS}
        if name == "0-0":
            del expected["CAM_BACK"]  # its file is missing
        assert row["images"] == expected and list(row["images"]) == list(expected)


def test_a_row_can_be_changed_without_changing_others(rows):
    rows[0]["images"].clear()
    next(rows.frames())[0]["images"].clear()
    assert rows[0]["images"] and rows[1]["images"]


def test_frames(rows):
    frames = list(rows.frames())
    assert [frame["frame_token"] for frame, _ in frames] == [f"frame-{s}-{f}" for s in range(5) for f in range(2)]
    assert [len(questions) for _, questions in frames] == [5, 5, 5, 0, 5, 5, 5, 5, 5, 5]
    assert [row for _, questions in frames for row in questions] == list(rows)
    assert all(row["images"] == frame["images"] for frame, questions in frames for row in questions)


def test_pickling_is_small_and_complete(rows):
    data = pickle.dumps(rows)
    assert len(data) < 1000
    assert list(pickle.loads(data)) == list(rows)


def test_both_tables_load_with_datasets(folder, tmp_path):
    for name, count in (("frames", 10), ("questions", 45)):
        files = {"train": str(folder / "data" / name / "train-*.parquet")}
        assert len(datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path), split="train")) == count


def test_a_folder_moves_together_with_its_images(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "moved")
    rows = load_rows(tmp_path / "moved" / "data", "train")
    assert rows[5]["images"]["CAM_BACK"] == str(tmp_path / "moved/nuscenes/samples/CAM_BACK/0-1.jpg")


def test_errors_teach(folder, tmp_path):
    with pytest.raises(ValueError, match="not a prepared folder"):
        load_rows(tmp_path, "train")
    with pytest.raises(ValueError, match="no frames for split 'test'; it has train"):
        load_rows(folder / "data", "test")
    shutil.copytree(folder / "data", tmp_path / "alone" / "data")
    shutil.copytree(folder / "data", tmp_path / "lost" / "data")
    info = tmp_path / "lost" / "data" / "dataset.json"
    info.write_text(info.read_text().replace('"image_root": ".."', '"image_root": "../nowhere"'))
    with pytest.raises(ValueError, match="nowhere, which is no longer a folder"):
        load_rows(tmp_path / "lost" / "data", "train")
    frames = next((tmp_path / "alone" / "data" / "frames").glob("train-*"))
    pq.write_table(pq.read_table(frames).slice(1), frames)
    with pytest.raises(ValueError, match="question scene-0_frame-0-0_0 refers to a frame that is not in"):
        load_rows(tmp_path / "alone" / "data", "train")
