import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from exported import save_checkpoint
from tiny import CAMERAS, scene

from hub_export import label
from hub_export.label import LabelArguments
from smoldriver_hf import SmolDriverForConditionalGeneration, SmolDriverProcessor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "final")


@pytest.fixture
def data(tmp_path):
    """Three frames (the third has a broken image), four shards of questions that mix frames."""
    folder = tmp_path / "data"
    frames = []
    for number in range(3):
        paths = {}
        for camera, image in scene(number).items():
            if number == 1 and camera == "CAM_BACK":
                continue
            paths[camera] = f"images/{number}-{camera}.png"
            (folder / "images").mkdir(parents=True, exist_ok=True)
            image.save(folder / paths[camera])
        row = {camera: paths.get(camera) for camera in CAMERAS}
        frames.append({"scene_token": "s", "frame_token": f"f{number}", **row, "LIDAR_BEV": "images/none.png"})
    (folder / "images" / "2-CAM_FRONT.png").write_bytes(b"broken")
    (folder / "frames").mkdir()
    (folder / "questions").mkdir()
    pq.write_table(pa.Table.from_pylist(frames), folder / "frames" / "test-00000.parquet")
    for shard in range(4):
        rows = [
            {
                "question_id": f"s_f{i % 3}_{shard}",
                "scene_token": "s",
                "frame_token": f"f{i % 3}",
                "question": f"Q{i}?",
            }
            for i in range(shard, shard + 5)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "questions" / f"test-{shard:05d}.parquet")
    (folder / "dataset.json").write_text(json.dumps({"image_root": "."}))
    return folder


def arguments(checkpoint, data, **changes):
    return LabelArguments(str(checkpoint), str(data), str(data.parent / "out"), max_new_tokens=4, **changes)


def read(folder):
    return {path.name: pq.read_table(path).to_pylist() for path in sorted(Path(folder).glob("*.parquet"))}


def test_each_shard_is_answered_in_its_own_order(checkpoint, data):
    answers = read(label.main(arguments(checkpoint, data, batch_size=2)))
    model = SmolDriverForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = SmolDriverProcessor.from_pretrained(checkpoint)
    assert list(answers) == [f"test-{shard:05d}.parquet" for shard in range(4)]
    for shard, rows in enumerate(answers.values()):
        assert [row["question"] for row in rows] == [f"Q{i}?" for i in range(shard, shard + 5)]
        for row in rows:
            number = int(row["frame_token"][1:])
            if number == 2:
                assert row["answer"] is None and "CAM_FRONT" in row["error"]
                continue
            cameras = [camera for camera in CAMERAS if not (number == 1 and camera == "CAM_BACK")]
            images = {camera: str(data / "images" / f"{number}-{camera}.png") for camera in cameras}
            inputs = processor(images=images, text=row["question"], return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
            assert row["error"] is None
            assert row["answer"] == processor.tokenizer.decode(output, skip_special_tokens=True).strip()


def run_label(*words):
    command = [sys.executable, "-m", "hub_export", "label", *map(str, words), "--max_new_tokens", "2"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_rows_without_an_answer_end_in_a_status(checkpoint, data, monkeypatch):
    """Whoever called must not take the folder for whole; also when nothing is left to do."""
    args = arguments(checkpoint, data)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"6 questions have no answer, the first is s_f2_0: .*CAM_FRONT.*out"):
            label.command(args)
        monkeypatch.setattr(label, "Labeller", None)
    assert sum(row["answer"] is not None for rows in read(args.out).values() for row in rows) == 14
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="2 questions have no answer, the first is s_f2_1"):
        label.command(args)  # each process tells of its own


def test_the_command_ends_with_status_2_or_0(checkpoint, data):
    done = run_label(checkpoint, data, "--out", data.parent / "out")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("hub_export label: 6 questions have no")
    assert "Traceback" not in done.stderr
    scene(2)["CAM_FRONT"].save(data / "images" / "2-CAM_FRONT.png")
    assert run_label(checkpoint, data, "--out", data.parent / "whole").returncode == 0


def test_a_budget_that_the_model_does_not_have_is_told_before(checkpoint, data):
    with pytest.raises(ValueError, match="from 1 to"):
        label.main(arguments(checkpoint, data, num_queries=99))
    assert not (data.parent / "out").exists()


def test_what_is_done_is_not_done_again(checkpoint, data, monkeypatch):
    args = arguments(checkpoint, data)
    out = label.main(args)
    whole = read(out)
    (out / "test-00002.parquet").unlink()
    done = []
    work = label.Labeller.label
    monkeypatch.setattr(label.Labeller, "label", lambda self, shard: (done.append(shard.name), work(self, shard))[1])
    label.main(args)
    assert done == ["test-00002.parquet"] and read(out) == whole
    monkeypatch.setattr(label, "Labeller", None)  # nothing left: not even the model is loaded
    label.main(args)


def test_an_interrupted_shard_leaves_nothing(checkpoint, data, monkeypatch):
    def interrupted(table, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(label.pq, "write_table", interrupted)
        with pytest.raises(KeyboardInterrupt):
            label.main(arguments(checkpoint, data))
    assert read(data.parent / "out") == {}
    assert len(read(label.main(arguments(checkpoint, data)))) == 4


def test_two_processes_share_the_shards(checkpoint, data, monkeypatch):
    args = arguments(checkpoint, data)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in (("0", [0, 2]), ("1", [0, 1, 2, 3])):
        monkeypatch.setenv("RANK", rank)
        assert list(read(label.main(args))) == [f"test-{shard:05d}.parquet" for shard in expected]


def test_missing_data_is_a_clear_error(checkpoint, data, tmp_path):
    with pytest.raises(ValueError, match="no dataset.json"):
        label.main(arguments(checkpoint, tmp_path / "nothing"))
    with pytest.raises(ValueError, match="no questions of split 'train'"):
        label.main(arguments(checkpoint, data, split="train"))
    pq.write_table(
        pq.read_table(data / "frames" / "test-00000.parquet").slice(1), data / "frames" / "test-00000.parquet"
    )
    with pytest.raises(ValueError, match="has no frame"):
        label.main(arguments(checkpoint, data))


@pytest.mark.slow
def test_torchrun_and_ray_give_the_same_answers(checkpoint, data):
    whole = read(label.main(arguments(checkpoint, data)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ["-m", "hub_export", "label", str(checkpoint), str(data), "--max_new_tokens", "4"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    subprocess.run([*torchrun, *command, "--out", str(data.parent / "torchrun")], cwd=ROOT, env=environment)
    assert read(data.parent / "torchrun") == whole

    pytest.importorskip("ray")
    ray = [sys.executable, *command, "--out", str(data.parent / "ray"), "--ray_actors", "2"]
    subprocess.run(ray, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)})
    assert read(data.parent / "ray") == whole


def test_cameras_that_the_model_does_not_know_are_told(checkpoint, data, capsys):
    """All images left out would be answers of a blind model."""
    label.main(arguments(checkpoint, data))
    assert "knows no LIDAR_BEV: these images are left out" in capsys.readouterr().out
    (shard,) = (data / "frames").glob("*.parquet")
    table = pq.read_table(shard)
    pq.write_table(table.rename_columns([name.replace("CAM_", "EYE_") for name in table.column_names]), shard)
    with pytest.raises(ValueError, match="has images of .*'EYE_BACK'.*knows .*'CAM_BACK'"):
        label.main(LabelArguments(str(checkpoint), str(data), str(data.parent / "other")))
    assert not (data.parent / "other").exists()
