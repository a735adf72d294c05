"""The over-fitting check's own logic: whose images are swapped in, and that answers come from a foreign process."""

import json
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from drivelm_files import make_world, write_world
from tiny import scene, tiny_model, tiny_processor, tiny_text_config, tiny_tokenizer, tiny_vision_config
from transformers import Dinov2Model, HfArgumentParser, LlamaForCausalLM
from trl import SFTConfig, TrlParser

from training import assemble, finetune, prepare, run
from training.data.rows import load_rows
from training.overfit import OverfitArguments, answers, fit, swaps
from training.stages.files import read_notes
from training.stages.recipes import kinds_of, module_of


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Three frames that agree on every answer but one."""
    folder = tmp_path_factory.mktemp("world")
    world = make_world(scenes=1, frames=3)
    frames = list(world["scene-0"]["key_frames"].values())
    frames[1]["QA"]["perception"][0]["A"] = "No."
    file = write_world(folder, world)
    prepare.main(
        prepare.PrepareArguments(
            drivelm_json=str(file),
            image_root=str(folder),
            output_dir=str(folder / "data"),
            coordinates="none",
            split="train",
        )
    )
    return load_rows(folder / "data", "train")


def test_only_questions_with_differing_answers_are_swapped(rows):
    swapped = swaps(rows)
    assert {rows[index]["question"] for index in swapped} == {"Are there cars to the back of the ego car?"}
    assert len(swapped) == 3
    for index, other in swapped.items():
        assert other["answer"] != rows[index]["answer"]
        assert other["images"] != rows[index]["images"]


def test_answers_come_from_a_process_without_the_package(tmp_path):
    model = tiny_model()
    processor = tiny_processor(model.config)
    checkpoint = tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    images = {}
    for camera, image in scene().items():
        image.save(tmp_path / f"{camera}.png")
        images[camera] = str(tmp_path / f"{camera}.png")
    given = answers(checkpoint, {4: "What is ahead?", 7: "Is it safe?"}, {4: images, 7: images}, budget=8)
    expected = model.encode_scene(images, processor).ask_all(["What is ahead?", "Is it safe?"], max_new_tokens=64)
    assert given == {4: expected[0].text, 7: expected[1].text}


def in_process(command: list[str], env: dict[str, str]) -> SimpleNamespace:
    """Stands in for `subprocess.run`: a stage's command, parsed and run here."""
    module, *words = command[command.index("-m") + 1 :]
    stage = module_of(module.removeprefix("training."))
    stage.main(*HfArgumentParser(kinds_of(stage)).parse_args_into_dataclasses(words))
    return SimpleNamespace(returncode=0)


def test_a_fit_is_a_recipe_of_its_own_frames(tmp_path, monkeypatch):
    """Its stages are commands that can be typed: `run.json` holds them, and the runner records what they read."""
    torch.manual_seed(0)
    Dinov2Model(tiny_vision_config()).save_pretrained(tmp_path / "vision")
    LlamaForCausalLM(tiny_text_config()).save_pretrained(tmp_path / "text")
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    monkeypatch.setattr(finetune, "loss_curve", lambda *_: None)
    monkeypatch.setattr(run.subprocess, "run", in_process)
    monkeypatch.setattr(assemble, "fetch_dinov2_small", lambda: tmp_path / "vision")
    monkeypatch.setattr(assemble, "fetch_smollm2_135m", lambda: tmp_path / "text")
    monkeypatch.setattr(assemble, "OFFLINE_IMAGE_SIZE", 28)
    monkeypatch.setattr(sys, "argv", ["pytest", "--nonsense"])
    steps = {"num_queries": [2], "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none"}
    recipe = {
        "data": "frames",
        "frames": {"module": "prepare", "coordinates": "none", "split": "train"},
        "start": {"module": "assemble", "offline": True},
        "end": {"module": "finetune", "from": "start", "gradient_checkpointing": False, **steps},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    file = write_world(tmp_path, make_world(scenes=1, frames=1))
    args = OverfitArguments(str(file), str(tmp_path), str(tmp_path / "out"), str(tmp_path / "recipe.yaml"))
    assert fit(args) == (tmp_path / "out" / "frames", tmp_path / "out" / "end" / "final", 2)
    stages = json.loads((tmp_path / "out" / "run.json").read_text())["stages"]
    assert [stage["status"] for stage in stages.values()] == ["finished"] * 3
    assert f"--drivelm_json {file} --image_root {tmp_path}" in stages["frames"]["command"].replace(
        " --coordinates none --split train", ""
    )
    assert stages["end"]["command"].startswith("python -m training.finetune --output_dir ")
    (note,) = read_notes(tmp_path / "out" / "end" / "final")
    (before,) = note["history"]
    assert before["parts"] == [assemble.OFFLINE_VISION, assemble.OFFLINE_TEXT]
    assert before["command"] == f"python -m training.assemble --output_dir {tmp_path}/out/start --offline true"
    words = shlex.split(note["command"])
    assert words[:5] == ["python", "-m", "training.finetune", "--checkpoint", str(tmp_path / "out" / "start")]
    read, config = TrlParser((finetune.FinetuneArguments, SFTConfig)).parse_args_and_config(words[3:])
    assert read.num_queries == [2] and config.max_steps == 1 and not config.bf16
    monkeypatch.setattr(run.subprocess, "run", None)
    assert fit(args)[2] == 2  # nothing runs again
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"data": "elsewhere"}, sort_keys=False))
    with pytest.raises(ValueError, match="data must name the section that prepares the frames; got 'elsewhere'"):
        fit(args)
