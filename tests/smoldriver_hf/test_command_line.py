"""The command line: what people type, what they get, and how they are told what is wrong."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import picture, tiny_model, tiny_processor

from smoldriver_hf import default
from smoldriver_hf.__main__ import main, named_images
from smoldriver_hf.configuration_smoldriver import CAMERAS

SCRIPT = Path(__file__).resolve().parents[2] / "smoldriver_hf" / "__main__.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model()
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
    return folder


@pytest.fixture
def frame(tmp_path):
    """A folder with nuScenes file names."""
    for index, camera in enumerate(CAMERAS):
        picture(index).save(tmp_path / f"n015-2018-07-24__{camera}__15324029276{index:05d}.jpg")
    return tmp_path


def test_folder_gives_every_camera_its_own_file(frame):
    images = named_images([], frame, list(CAMERAS))
    assert {camera: camera in Path(file).name.split("__") for camera, file in images.items()} == dict.fromkeys(
        CAMERAS, True
    )


def test_names_in_any_case_and_files_without_one(tmp_path, capsys):
    for number, name in enumerate(["cam_front", "Cam_Back", "x-CAM_FRONT_LEFT-1", "map", "cam_front_lower"]):
        picture(number).save(tmp_path / f"{name}.png")
    images = named_images([], tmp_path, list(CAMERAS))
    assert {camera: Path(file).stem for camera, file in images.items()} == {
        "CAM_FRONT": "cam_front",
        "CAM_BACK": "Cam_Back",
        "CAM_FRONT_LEFT": "x-CAM_FRONT_LEFT-1",
    }
    left_out = capsys.readouterr().err.splitlines()
    assert [line.rsplit("/", 1)[1] for line in left_out] == ["cam_front_lower.png", "map.png"]
    assert named_images([f"cam_back={tmp_path / 'map.png'}"], None, list(CAMERAS)) == {
        "CAM_BACK": f"{tmp_path / 'map.png'}"
    }


def test_answers_come_as_json_lines(checkpoint, frame, capsys):
    status = main(
        ["ask", "--checkpoint", str(checkpoint), "--folder", str(frame), "--json", "--num_queries", "2"]
        + ["--max-new-tokens", "3", "What is ahead?", "Is it safe?"]
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert status == 0
    assert [line["question"] for line in lines] == ["What is ahead?", "Is it safe?"]
    assert lines[0]["cameras"] == sorted(CAMERAS)


def test_answers_equal_generate(checkpoint, frame, capsys):
    model, images = tiny_model(), named_images([], frame, list(CAMERAS))
    processor = tiny_processor(model.config)
    inputs = processor(images=images, text="What is ahead?", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    for how in ([], ["--stream"]):
        common = ["ask", "--checkpoint", str(checkpoint), "--folder", str(frame), "--max-new-tokens", "6", *how]
        assert main([*common, "What is ahead?"]) == 0
        assert capsys.readouterr().out.strip() == processor.decode(output, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no image given"),
        (["--image", "CAM_FRONT"], "CAMERA=FILE"),
        (["--image", "CAM_FRONT=nowhere.jpg"], "no such file"),
        (["--image", f"CAM_ROOF={SCRIPT}"], "unknown camera 'CAM_ROOF'"),
        (["--image", f"CAM_FRONT={SCRIPT}"], "CAM_FRONT: .*expected a picture"),
        (["--folder", "nowhere"], "is not a folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(checkpoint, capsys, words, message):
    assert main(["ask", "--checkpoint", str(checkpoint), *words, "What?"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("smoldriver: ") and error.count("\n") == 1
    assert re.search(message, error)


def test_a_camera_twice_and_a_budget_out_of_range(checkpoint, frame, capsys):
    front = next(frame.glob("*CAM_FRONT__*"))
    common = ["ask", "--checkpoint", str(checkpoint), "--folder", str(frame)]
    assert main([*common, "--image", f"CAM_FRONT={front}", "What?"]) == 2
    assert "two images for CAM_FRONT" in capsys.readouterr().err
    assert main([*common, "--budget", "9", "What?"]) == 2
    assert "num_queries must be an integer from 1 to 8" in capsys.readouterr().err


def test_a_checkpoint_that_is_no_folder_is_said_to_be_taken_for_a_hub_id(frame, monkeypatch, capsys):
    def unknown(name, *_, **__):
        raise OSError(f"{name} is unknown")

    monkeypatch.setattr("smoldriver_hf.loading_smoldriver.cached_file", unknown)
    assert main(["ask", "--checkpoint", "no/where", "--folder", str(frame), "What?"]) == 2
    notice, error = capsys.readouterr().err.splitlines()
    assert "no/where is no folder here" in notice and error == "smoldriver: no/where is unknown"


def test_a_traceback_is_shown_if_asked_for(checkpoint):
    with pytest.raises(ValueError, match="no image given"):
        main(["ask", "--checkpoint", str(checkpoint), "--traceback", "What?"])


def test_a_checkpoint_that_is_not_whole_is_refused(checkpoint, frame, tmp_path, capsys):
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    del weights["model.multi_modal_projector.qformers.CAM_BACK.queries"]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    assert main(["ask", "--checkpoint", str(damaged), "--folder", str(frame), "What?"]) == 2
    assert "weights are missing: model.multi_modal_projector.qformers.CAM_BACK.queries" in capsys.readouterr().err


def test_bad_usage_is_status_2():
    with pytest.raises(SystemExit) as stop:
        main(["ask"])
    assert stop.value.code == 2


def test_without_a_checkpoint_the_default_model_answers(checkpoint, frame, monkeypatch, capsys):
    monkeypatch.setattr(default, "fetch_default", lambda model: {"smoldriver": checkpoint, "blind": frame}[model])
    common = ["ask", "--folder", str(frame), "--max-new-tokens", "4", "What?"]
    assert main(common) == 0
    said = capsys.readouterr().out
    assert main([*common, "--checkpoint", str(checkpoint)]) == 0 and said == capsys.readouterr().out
    assert (main(["default"]), main(["default", "--blind"])) == (0, 0)
    assert capsys.readouterr().out.split() == [str(checkpoint), str(frame)]


def test_no_default_model_is_one_line(frame, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(default, "SHIPPED", tmp_path / "nowhere")
    for words in (["ask", "--folder", str(frame), "What?"], ["default"]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("smoldriver: the default model lies in hub_export/default") and error.count("\n") == 1
    with pytest.raises(FileNotFoundError):
        main(["default", "--traceback"])


def test_runs_alone_where_the_package_is_not(checkpoint, frame, tmp_path):
    """The file itself, isolated: only transformers and the code in the checkpoint."""
    command = [sys.executable, "-I", str(SCRIPT), "ask", "--checkpoint", str(checkpoint), "--folder", str(frame)]
    done = subprocess.run(
        [*command, "--json", "--trust-remote-code", "--max-new-tokens", "2", "What?"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["question"] == "What?"


def test_alone_it_knows_no_default_model(frame, tmp_path):
    command = [sys.executable, "-I", str(SCRIPT), "ask", "--folder", str(frame), "--trust-remote-code", "?"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""})
    assert done.returncode == 2 and "name a checkpoint with --checkpoint" in done.stderr


def test_alone_it_runs_no_code_without_leave(checkpoint, frame, tmp_path):
    command = [sys.executable, "-I", str(SCRIPT), "ask", "--checkpoint", str(checkpoint), "--folder", str(frame), "?"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""})
    assert done.returncode == 2 and "needs --trust-remote-code" in done.stderr
