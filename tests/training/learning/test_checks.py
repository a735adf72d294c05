"""Every mistake in a configuration is told before the first step."""

from pathlib import Path

import pytest
import torch
from prepared import write_prepared, write_smoldriver, write_smolvlm
from tiny import tiny_text_config
from transformers import AutoModelForImageTextToText, LlamaForCausalLM
from trl import SFTConfig

from training import finetune
from training.data.rows import load_rows
from training.finetune import FinetuneArguments
from training.learning.checks import check_sharding, record_arguments
from training.learning.parts import check_lora_targets, freeze, how_of, load_model, lora_config, modules_of


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("checks")
    write_prepared(root / "data", frames=1, questions=2)
    write_prepared(root / "front", frames=1, questions=2, cameras=["CAM_FRONT"])
    write_prepared(root / "lidar", frames=1, questions=2, cameras=["LIDAR_BEV"])
    write_smoldriver(root / "smoldriver")
    write_smoldriver(root / "untied", text_config=tiny_text_config(tie_word_embeddings=False))
    write_smoldriver(root / "short", text_config=tiny_text_config(max_position_embeddings=64))
    write_smolvlm(root / "smolvlm")
    LlamaForCausalLM(tiny_text_config()).save_pretrained(root / "llama")
    return root


@pytest.fixture
def reached(monkeypatch):
    """Raises where the trainer would be made: everything wrong must be told before."""

    def trainer(**kwargs):
        raise AssertionError("the trainer was made")

    monkeypatch.setattr(finetune, "SceneTrainer", trainer)


def run(root: Path, output_dir: Path, checkpoint="smoldriver", data="data", config=None, **changes):
    args = FinetuneArguments(checkpoint=str(root / checkpoint), data=str(root / data), **changes)
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", **(config or {})}
    return finetune.main(args, SFTConfig(output_dir=str(output_dir), **settings))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tower": "half"}, "tower must be one of .*'half'"),
        ({"projector": "yes"}, "projector must be one of"),
        ({"language_model": "frozen", "projector": "frozen"}, "all frozen: nothing would be trained"),
        ({"language_model": "full", "load_in_4bit": True}, "4-bit weights cannot be trained in full"),
        ({"lora_r": 0}, "lora_r must be at least 1"),
        ({"lora_dropout": 1.0}, "lora_dropout in"),
        (
            {"load_in_4bit": True, "eval_split": "train", "config": {"eval_strategy": "epoch"}},
            "leave out eval_strategy",
        ),
        ({"tower": "full", "feature_cache": "features"}, "stands for a frozen tower; tower is 'full'"),
        ({"checkpoint": "smolvlm", "feature_cache": "features", "image_splitting": True}, "one tile per image"),
        ({"checkpoint": "smolvlm", "shared_qformer": True}, "SmolDriver's projector"),
        ({"train_embeddings": True, "language_model": "frozen"}, "goes with language_model: lora"),
        ({"checkpoint": "smolvlm", "num_queries": [8]}, "no other budget"),
        ({"checkpoint": "llama"}, "expected a checkpoint of smoldriver, smolvlm, idefics3; got one of 'llama'"),
        ({"image_splitting": True}, "settings of the SmolVLM baseline"),
        ({"cameras": ["CAM_FRONT", "CAM_TOP"]}, r"\['CAM_TOP'\] are not in the checkpoint, which knows"),
        ({"cameras": ["CAM_FRONT", "CAM_FRONT"]}, "must not repeat"),
        ({"cameras": []}, "a run without images is blind: text"),
        ({"data": "front", "cameras": ["CAM_BACK"]}, r"images of \['CAM_FRONT'\], the model is to look at"),
        ({"data": "lidar"}, r"images of \['LIDAR_BEV'\], the model is to look at"),
        ({"num_queries": [4, 9]}, "num_queries must be an integer from 1 to 8 for this model; got 9"),
        ({"num_queries": []}, "at least one budget"),
        ({"pairs_per_sequence": 0}, "pairs_per_sequence must be at least 1"),
        ({"reword": 1.2}, "reword must be a share between 0 and 1; got 1.2"),
        ({"blind": "yes"}, "blind must be text, black"),
        ({"blind": "text", "feature_cache": "features"}, "leave out feature_cache"),
        ({"blind": "text", "language_model": "frozen"}, "learn nothing: train the language model"),
        ({"lora_pattern": r".*\.banana_proj"}, "language_model is 'lora', but .* matches 0 of its linear layers"),
        ({"lora_pattern": r".*\.(q_proj|v_proj)"}, r"tower is 'frozen', but .* matches 4 .*vision_tower"),
        ({"lora_pattern": r".*\.multi_modal_projector\..*_proj|.*language_model.*q_proj"}, "projector is 'full', but"),
        ({"lora_pattern": r".*language_model.*q_proj|lm_head"}, "matches 'lm_head', which takes no adapter"),
        ({"lora_pattern": "("}, "is no regular expression"),
        ({"config": {"packing": True}}, "packing is trl's"),
        ({"config": {"assistant_only_loss": True}}, "assistant_only_loss is trl's"),
        ({"split": "test"}, "has no frames for split 'test'; it has train"),
        ({"eval_split": "test"}, "has no frames for split 'test'"),
        ({"checkpoint": "short"}, "the language model has 64 positions; lower num_queries"),
    ],
)
def test_mistakes_are_told_before_the_first_step(root, tmp_path, reached, changes, message):
    with pytest.raises(ValueError, match=message):
        run(root, tmp_path / "out", **changes)


def test_what_is_right_gets_as_far_as_the_trainer(root, tmp_path, reached):
    for number, changes in enumerate(({}, {"checkpoint": "smolvlm"}, {"blind": "black"}, {"tower": "lora"})):
        with pytest.raises(AssertionError, match="the trainer was made"):
            run(root, tmp_path / str(number), **changes)


def test_an_answerless_question_is_told_by_its_id(root, tmp_path, reached, monkeypatch):
    from training.data.rows import Rows

    original = Rows.__getitem__
    monkeypatch.setattr(Rows, "__getitem__", lambda self, index: {**original(self, index), "answer": " "})
    with pytest.raises(ValueError, match="question train0_train-frame0_0 has an empty answer"):
        run(root, tmp_path / "out")


def test_a_folder_of_another_run_is_refused(root, tmp_path, reached):
    out = tmp_path / "out"
    args = FinetuneArguments(checkpoint=str(root / "smoldriver"), data=str(root / "data"))
    settings = SFTConfig(output_dir=str(out), use_cpu=True, bf16=False, report_to="none")
    record_arguments(args, settings, load_rows(root / "data", "train"))  # as when its first step begins
    (out / "checkpoint-1").mkdir()
    with pytest.raises(AssertionError):  # the same settings, elsewhere and for longer
        run(root, tmp_path / "out", config={"max_steps": 7})
    for changes in ({"lora_r": 4}, {"config": {"learning_rate": 1.0}}, {"data": "front"}):
        with pytest.raises(ValueError, match="holds a result of other settings"):
            run(root, tmp_path / "out", **changes)


def test_sharding_that_does_not_happen_is_told(monkeypatch):
    from accelerate import DistributedType

    check_sharding(DistributedType.NO)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_sharding(DistributedType.FSDP)
    with pytest.raises(ValueError, match="leaves them out"):
        check_sharding(DistributedType.NO)


@pytest.mark.parametrize("checkpoint", ["smoldriver", "untied", "smolvlm"])
def test_a_frozen_language_model_has_a_frozen_head(root, checkpoint):
    args = FinetuneArguments(str(root / checkpoint), "", tower="full", projector="full", language_model="frozen")
    model_type = "smolvlm" if checkpoint == "smolvlm" else "smoldriver"
    model = load_model(args, model_type, bf16=True)
    modules = modules_of(model_type)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all(name.startswith((modules["tower"], modules["projector"])) for name in trained)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert all(weight.dtype == torch.float32 for weight in model.parameters() if weight.requires_grad)


def test_the_baseline_gets_an_adapter_of_the_same_size(root):
    sizes = []
    for name, model_type in (("smoldriver", "smoldriver"), ("smolvlm", "smolvlm")):
        args = FinetuneArguments(str(root / name), "", lora_r=4, projector="frozen")
        model = AutoModelForImageTextToText.from_pretrained(root / name)
        modules = modules_of(model_type)
        freeze(model, how_of(args), modules)
        check_lora_targets(args, model, modules)
        model.add_adapter(lora_config(args, modules))
        sizes.append(sum(weight.numel() for key, weight in model.named_parameters() if ".lora_" in key))
    assert sizes[0] == sizes[1] > 0
