"""Whoever loads a checkpoint, to train, to judge, to label or to publish it, refuses one that lacks a weight."""

import re
from pathlib import Path

import pytest
from prepared import write_smoldriver, write_smolvlm
from safetensors.torch import load_file, save_file

from hub_export import cost, label
from hub_export.build import BuildArguments, load_source
from hub_export.engines import onnx
from smoldriver_hf import CAMERAS, load, load_strictly, loading_smoldriver, read_config
from training import merge
from training.distillation.teacher import Teacher
from training.evaluation.answering import load_answerer
from training.finetune import FinetuneArguments
from training.learning.parts import load_model

ROOT = Path(__file__).resolve().parents[2]
LOST = {
    "smoldriver": "model.multi_modal_projector.qformers.CAM_BACK.queries",
    "smolvlm": "model.connector.modality_projection.proj.weight",
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> dict[str, str]:
    """{architecture: folder of a checkpoint that lacks one weight}"""
    root = tmp_path_factory.mktemp("damaged")
    for kind, write in (("smoldriver", write_smoldriver), ("smolvlm", write_smolvlm)):
        write(root / kind)
        weights = load_file(root / kind / "model.safetensors")
        del weights[LOST[kind]]
        save_file(weights, root / kind / "model.safetensors", metadata={"format": "pt"})
    return {kind: str(root / kind) for kind in LOST}


def fine_tuning(folder: str, model_type: str):
    return load_model(FinetuneArguments(checkpoint=folder, data="x"), model_type, bf16=False)


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: fine_tuning(folder, "smoldriver"),
        lambda folder: merge.merged(folder, "x", None),
        lambda folder: load_answerer(folder, CAMERAS),
        lambda folder: load_source(BuildArguments(folder, "x")),
        lambda folder: label.Labeller(label.LabelArguments(folder, "x", "x")),
        lambda folder: cost.main(cost.CostArguments(folder, "x")),
        lambda folder: onnx.main(onnx.OnnxArguments(folder, "x")),
    ],
    ids=["finetune", "merge", "evaluate", "build", "label", "cost", "onnx"],
)
def test_a_smoldriver(damaged, load):
    with pytest.raises(ValueError, match=f"weights are missing: {re.escape(LOST['smoldriver'])}$"):
        load(damaged["smoldriver"])


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: fine_tuning(folder, "smolvlm"),
        lambda folder: load_answerer(folder, CAMERAS),
        lambda folder: Teacher(folder, "linear"),
    ],
    ids=["finetune", "evaluate", "transfer's teacher"],
)
def test_a_smolvlm(damaged, load):
    with pytest.raises(ValueError, match=f"weights are missing: {re.escape(LOST['smolvlm'])}$"):
        load(damaged["smolvlm"])


def test_no_other_door_is_used():
    """`from_pretrained` of a model stands in the strict door alone, and where a report is looked at beside it."""
    door = re.compile(r"\b(AutoModel\w*|SmolDriver(ForConditionalGeneration|Model))\.from_pretrained\(")
    elsewhere = {"hub_export/probe.py"}  # a stranger's computer: it has the folder and nothing else
    elsewhere |= {"training/checkpoints/offline_parts.py"}  # reads a GGUF file, and its report
    for package in ("smoldriver_hf", "training", "hub_export", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if name not in elsewhere and path.parent.name != "templates":
                code = "".join(line for line in path.read_text().splitlines(keepends=True) if "`" not in line)
                assert not door.search(code), name


def test_what_the_hub_does_not_give_is_named(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect")

    monkeypatch.setattr(loading_smoldriver.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(OSError, match="^someone/model is no folder here, and the Hub does not give it: We couldn't"):
        read_config("someone/model")


@pytest.mark.parametrize("door", [read_config, load_strictly, load])
def test_a_slip_in_a_path_is_not_looked_for_on_the_hub(door, tmp_path):
    with pytest.raises(ValueError, match="model is not a folder; expected a checkpoint's folder or a Hub id"):
        door(str(tmp_path / "model"))
