"""Reading: a language model learns to look and to read, its eyes stay as they are, a kill costs nothing."""

import json
import sys
from pathlib import Path

import pytest
import torch
from prepared import write_smoldriver, write_smolvlm
from safetensors.torch import load_file
from tiny import tiny_processor
from trl import SFTConfig, TrlParser

from smoldriver_hf import load_strictly
from training import finetune, read
from training.data.rig import NUSCENES
from training.learning.collate import SceneCollator
from training.learning.slots import length_of, tokens_of
from training.read import ReadArguments, training_example
from training.stages.command_line import parse


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("read")
    write_smoldriver(root / "smoldriver")
    write_smolvlm(root / "smolvlm")
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few questions of a scene, and no picture: tokens are bytes here."""
    original = read.scene_at

    def shorter(*args):
        scene = original(*args)
        return {**scene, **{name: scene[name][-5:] for name in ("pairs", "look_at", "kinds")}}

    monkeypatch.setattr(read, "scene_at", shorter)
    monkeypatch.setattr(read, "HELD_OUT_BUDGETS", (1, 4))
    monkeypatch.setattr(finetune, "loss_curve", lambda *_: None)


def run(root: Path, output_dir: Path, checkpoint: str = "smoldriver", config=None, **changes) -> Path:
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "max_steps": 4}
    settings |= {"save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    settings |= {"per_device_train_batch_size": 1, "save_total_limit": 1}
    args = ReadArguments(str(root / checkpoint), **{"budgets": [1, 2, 4], "held_out": 2, **changes})
    return read.main(args, SFTConfig(output_dir=str(output_dir), **{**settings, **(config or {})}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def logged(output_dir: Path, name: str) -> list[float]:
    lines = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize("checkpoint", ["smoldriver", "smolvlm"])
def test_a_language_model_learns_to_look_and_its_eyes_stay(root, tmp_path, checkpoint):
    final = run(root, tmp_path / "run", checkpoint, {"max_steps": 40}, camera_attention_loss=1.0)
    shares, losses = logged(tmp_path / "run", "camera_attention"), logged(tmp_path / "run", "loss")
    assert sum(shares[-8:]) > 1.3 * sum(shares[:8])
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    before, after = weights(root / checkpoint), weights(final)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("language_model" in name or "text_model" in name or "lm_head" in name for name in changed)
    assert any("embed_tokens" in name for name in changed)
    load_strictly(str(final))
    note = json.loads((final / "read.json").read_text())
    assert note["steps"] == 40 and note["made_from"] == [str(root / checkpoint)] and note["trained_on"] is None
    figures = read.STAGE.figures(tmp_path / "run")
    assert figures["scenes"] == 2 and {"perception", "existence", "camera_attention"} <= figures["tokens_4"].keys()
    assert run(root, tmp_path / "run", checkpoint, {"max_steps": 40}, camera_attention_loss=1.0) == final


def test_a_killed_run_ends_with_the_same_weights(root, tmp_path):
    whole = weights(run(root, tmp_path / "whole"))

    class Killed(Exception):
        pass

    class StopsAfterTwo(read.ReadingTrainer):
        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise Killed
            return super().compute_loss(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "ReadingTrainer", StopsAfterTwo)
        with pytest.raises(Killed):
            run(root, tmp_path / "killed")
    assert (tmp_path / "killed" / "checkpoint-2").is_dir()
    resumed = weights(run(root, tmp_path / "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert logged(tmp_path / "whole", "loss") == logged(tmp_path / "killed", "loss")
    with pytest.raises(ValueError, match=r"of other settings \(noise was 0.3, is 0.5\)"):
        run(root, tmp_path / "whole", noise=0.5)


def test_an_adapter_reads_too(root, tmp_path):
    final = run(root, tmp_path / "run", language_model="lora", train_embeddings=True, lora_r=4)
    before, after = weights(root / "smoldriver"), weights(final)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in changed) and any("embed_tokens" in name for name in changed)
    assert not any("vision_tower" in name or "projector" in name for name in changed)


def test_tokens_are_made_of_the_model_s_own_words(root, tmp_path, monkeypatch):
    seen = []

    class Looks(read.ReadingTrainer):
        def with_tokens(self, inputs):
            given = super().with_tokens(inputs)
            embeddings = self.model.get_input_embeddings().weight.detach().clone()
            seen.append((inputs, given, self, embeddings))
            return given

    monkeypatch.setattr(read, "ReadingTrainer", Looks)
    run(root, tmp_path / "run", config={"max_steps": 1}, noise=0.0)
    inputs, given, trainer, embeddings = seen[0]
    tokens = tokens_of(inputs["word_weights"], trainer.table.vectors(embeddings), length_of(embeddings))
    places = inputs["input_ids"] == trainer.image_token_id
    assert torch.allclose(given["inputs_embeds"][places], tokens)
    assert torch.equal(given["inputs_embeds"][~places], embeddings[inputs["input_ids"][~places]])
    assert "input_ids" not in given


def test_scenes_differ_in_budgets_and_words_and_are_drawn_from_their_number():
    args = ReadArguments("nowhere")
    scenes = [training_example(args, NUSCENES, 0, number) for number in range(60)]
    assert scenes[:5] == [training_example(args, NUSCENES, 0, number) for number in range(5)]
    assert {count for scene in scenes for count in scene["budgets"].values()} == {1, 2, 4, 8, 16}
    mixed = [scene for scene in scenes if len(set(scene["budgets"].values())) > 1]
    assert 0.3 < len(mixed) / len(scenes) < 0.95
    plain = ReadArguments("nowhere", reword=0.0, cameras_share=0.0)
    usual = [training_example(plain, NUSCENES, 0, number) for number in range(60)]
    assert all(len(set(scene["budgets"].values())) == 1 for scene in usual)
    words = [SceneCollator(tiny_processor()).in_other_words(scene) for scene in scenes]
    drawn, plain = ([pair for scene in each for pair in scene["pairs"]] for each in (words, usual))
    assert [answer for _, answer in drawn] == [answer for _, answer in plain]
    assert 0.25 < sum(one[0] != other[0] for one, other in zip(drawn, plain, strict=True)) / len(plain) < 0.55


@pytest.mark.parametrize(
    ("changes", "config", "problem"),
    [
        ({"rig": "four"}, {}, "rig four has front; the checkpoint knows CAM_FRONT_LEFT"),
        ({"budgets": [1, 400]}, {}, "400 tokens a camera take .* positions .* has 2048: lower budgets"),
        ({"budgets": []}, {}, "budgets must hold at least one number"),
        ({"reword": 1.5}, {}, "reword must lie between 0 and 1; got 1.5"),
        ({"noise": -1.0}, {}, "noise must be 0 or more; got -1"),
        ({"held_out": 0}, {}, "held_out must be at least 1 scene; got 0"),
        ({"language_model": "frozen"}, {}, "nothing would be trained"),
        ({"camera_attention_layer": 7}, {}, "asks layer 7"),
        ({}, {"max_steps": -1}, "say how many steps with max_steps; got -1"),
        ({}, {"packing": True}, "packing is trl's"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(root, tmp_path, changes, config, problem):
    with pytest.raises(ValueError, match=problem):
        run(root, tmp_path / "run", config=config, **changes)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_sharding_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="read without FSDP and DeepSpeed"):
        run(root, tmp_path / "run")


def test_an_unknown_argument_is_refused(monkeypatch):
    words = ["read", "--checkpoint", "nowhere", "--output_dir", "out", "--use_cpu", "--budgett", "3"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(ValueError, match="budgett"):
        parse((ReadArguments, SFTConfig), TrlParser)
