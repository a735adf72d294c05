"""Presets answer like the reference, at the cost of their rounding."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from smoldriver_hf import CAMERAS
from smoldriver_hf.loading_smoldriver import load, load_strictly
from smoldriver_hf.precision_smoldriver import PackedLinear, set_precision
from tests.smoldriver_hf.test_auto_classes import clean_run
from tests.tiny import scene as pictures
from tests.tiny import tiny_model, tiny_processor, tiny_text_config

QUESTIONS = ["Is it safe?", "What is in front?", "And behind?"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


def answer_logits(model, processor):
    inputs = processor(images=pictures(0), text=QUESTIONS[0], num_queries=4, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs, logits_to_keep=1).logits[0, -1].float().log_softmax(-1)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.0), ("bf16", 0.05), ("int8", 0.05)])
def test_presets_agree_with_the_reference(checkpoint, precision, tolerance):
    model, processor = load(checkpoint, precision=precision)
    reference = answer_logits(tiny_model(), tiny_processor())
    torch.testing.assert_close(answer_logits(model, processor), reference, atol=tolerance + 1e-5, rtol=0)
    scene = model.encode_scene(pictures(0), processor, num_queries=4)
    assert list(scene.cameras) == list(CAMERAS)
    answers = scene.ask_all(QUESTIONS, max_new_tokens=4)
    assert all(answer.error is None and answer.token_ids for answer in answers)
    assert sum(scene.score(QUESTIONS[0], ["Yes.", "No."])) < 0
    inputs = processor(images=pictures(0), text=QUESTIONS[1], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1


def test_int8_changes_the_language_model_only():
    model = set_precision(tiny_model(), "int8")
    kinds = {type(module).__name__ for module in model.model.language_model.modules()}
    assert "Linear" in kinds and not any(type(m) is nn.Linear for m in model.model.language_model.modules())
    assert type(model.lm_head) is not nn.Linear
    assert model.get_input_embeddings().weight.dtype is torch.float32
    parts = (model.model.vision_tower, model.model.multi_modal_projector)
    assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (3, 5, 24), (2, 1, 1, 24)])
def test_packed_linear_is_the_linear(bias, shape):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bfloat16")
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias).bfloat16()
    hidden_states = torch.randn(shape, dtype=torch.bfloat16)
    torch.testing.assert_close(PackedLinear(linear)(hidden_states), linear(hidden_states))


STRANGER = """
import sys
from transformers.dynamic_module_utils import get_class_from_dynamic_module
load = get_class_from_dynamic_module("loading_smoldriver.load", sys.argv[1])
model, processor = load(sys.argv[1], trust_remote_code=True)
print(type(model).__module__.split(".")[0], processor.cameras[0], model.lm_head.weight.sum().item())
"""


def test_a_checkpoint_brings_its_strict_door(checkpoint, tmp_path):
    """In a process without the package, from nothing but what save_pretrained wrote."""
    printed = clean_run(STRANGER, checkpoint, cwd=tmp_path).split()
    assert printed[:2] == ["transformers_modules", CAMERAS[0]]
    assert float(printed[2]) == pytest.approx(tiny_model().lm_head.weight.sum().item(), abs=1e-4)


@pytest.mark.parametrize(("dtype", "expected"), [({}, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16)])
def test_without_a_precision_weights_are_as_saved_or_as_asked(checkpoint, dtype, expected):
    model, _ = load(checkpoint, precision=None, **dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_load_strictly_takes_any_architecture_and_from_pretraineds_options(tmp_path):
    LlamaForCausalLM(tiny_text_config()).save_pretrained(tmp_path)
    model = load_strictly(tmp_path, AutoModelForCausalLM, dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16 and model.model.layers[0].mlp.up_proj.weight.requires_grad
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.extra"] = weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing: model.norm.weight; weights that belong nowhere: model.extra"):
        load_strictly(tmp_path, AutoModelForCausalLM)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="it holds an adapter"):
        load_strictly(tmp_path, AutoModelForCausalLM)


def test_what_is_refused(checkpoint):
    with pytest.raises(ValueError, match="precision must be one of"):
        load(checkpoint, precision="fp16")
    with pytest.raises(ValueError, match="int8' is for CPUs"):
        set_precision(tiny_model().to("meta"), "int8")
