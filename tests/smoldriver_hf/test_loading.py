"""Presets answer like the reference, at the cost of their rounding."""

from pathlib import Path

import pytest
import torch
from torch import nn

import smoldriver_hf
from smoldriver_hf import CAMERAS
from smoldriver_hf.loading_smoldriver import load
from smoldriver_hf.precision_smoldriver import PackedLinear, set_precision
from tests.smoldriver_hf.test_auto_classes import clean_run
from tests.tiny import scene as pictures
from tests.tiny import tiny_model, tiny_processor

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
sys.path.insert(0, ".")
from loading_smoldriver import load
model, processor = load(sys.argv[1], trust_remote_code=True)
print(type(model).__module__.split(".")[0], processor.cameras[0], model.lm_head.weight.sum().item())
"""


def test_the_file_works_on_its_own(checkpoint, tmp_path):
    """In a process without the package, beside an export."""
    source = Path(smoldriver_hf.__file__).with_name("loading_smoldriver.py")
    (tmp_path / source.name).write_bytes(source.read_bytes())
    printed = clean_run(STRANGER, checkpoint, cwd=tmp_path).split()
    assert printed[:2] == ["transformers_modules", CAMERAS[0]]
    assert float(printed[2]) == pytest.approx(tiny_model().lm_head.weight.sum().item(), abs=1e-4)


def test_what_is_refused(checkpoint):
    with pytest.raises(ValueError, match="precision must be one of"):
        load(checkpoint, precision="fp16")
    with pytest.raises(ValueError, match="int8' is for CPUs"):
        set_precision(tiny_model().to("meta"), "int8")
