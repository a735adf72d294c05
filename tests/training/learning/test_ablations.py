"""Ablations: one Q-Former in six copies, and weights that keep what they were drawn as."""

from pathlib import Path

import pytest
import torch
from prepared import write_prepared, write_smoldriver
from safetensors.torch import load_file
from trl import SFTConfig

from smoldriver_hf import CAMERAS
from training import finetune
from training.finetune import FinetuneArguments

PREFIX = "model.multi_modal_projector.qformers."


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("ablations")
    write_prepared(root / "data", cameras=CAMERAS[:4])  # two Q-Formers never get an image of their own
    write_smoldriver(root / "smoldriver")
    return root


def run(root: Path, output_dir: Path, **changes) -> dict[str, torch.Tensor]:
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "max_steps": 3}
    settings |= {"save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    args = FinetuneArguments(checkpoint=str(root / "smoldriver"), data=str(root / "data"), **changes)
    return load_file(finetune.main(args, SFTConfig(output_dir=str(output_dir), **settings)) / "model.safetensors")


@pytest.mark.parametrize("language_model", ["frozen", "lora"])
def test_a_shared_qformer_is_the_same_for_all_cameras(root, tmp_path, language_model):
    weights = run(root, tmp_path / "shared", language_model=language_model, shared_qformer=True)
    before = load_file(root / "smoldriver" / "model.safetensors")
    kinds = {name.removeprefix(PREFIX).partition(".")[2] for name in weights if name.startswith(PREFIX)}
    assert "queries" in kinds and len(kinds) > 10
    for kind in kinds:
        copies = [weights[f"{PREFIX}{camera}.{kind}"] for camera in CAMERAS]
        assert all(torch.equal(copies[0], copy) for copy in copies), kind
    queries = f"{PREFIX}{CAMERAS[0]}.queries"
    assert not torch.equal(weights[queries], before[queries])


def test_without_sharing_cameras_differ(root, tmp_path):
    weights = run(root, tmp_path / "own", language_model="frozen")
    assert not torch.equal(weights[f"{PREFIX}{CAMERAS[0]}.queries"], weights[f"{PREFIX}{CAMERAS[1]}.queries"])


@pytest.mark.parametrize("language_model", ["frozen", "lora"])
def test_frozen_queries_stay_as_they_were_drawn(root, tmp_path, language_model):
    weights = run(root, tmp_path / "frozen", language_model=language_model, keep_frozen=r".*\.queries")
    before = load_file(root / "smoldriver" / "model.safetensors")
    for camera in CAMERAS:
        assert torch.equal(weights[f"{PREFIX}{camera}.queries"], before[f"{PREFIX}{camera}.queries"])
    other = f"{PREFIX}{CAMERAS[0]}.v_proj.weight"
    assert not torch.equal(weights[other], before[other])


def test_a_pattern_that_matches_nothing_is_told(root, tmp_path):
    with pytest.raises(ValueError, match="matches no weight"):
        run(root, tmp_path / "nothing", language_model="frozen", keep_frozen="querys")
