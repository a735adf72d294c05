"""The forms in which a model answers fastest.

`fp32`: the weights as they are; the reference.
`bf16`: everything in bfloat16; on a CPU, weights are packed once for its matrix units instead of at every call.
    Fastest for many questions at once.
`int8`: on a CPU; language model with int8 weights, one scale per output, and activations quantized at each call; tower
    and projector as in `bf16`. Fastest for one question at a time.
"""

import warnings
from typing import Any

import torch
from torch import nn

PRECISIONS = ("fp32", "bf16", "int8")


class PackedLinear(nn.Module):
    """A bfloat16 `nn.Linear` for inference on a CPU, its weight in oneDNN's own layout.

    A plain `nn.Linear` brings its weight into that layout at every call, which with few rows takes longer than the
    product. It is what `torch.compile` with frozen weights does, without compiling. Cannot be trained or saved.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().to(torch.bfloat16)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(hidden_states, self.packed, self.bias, "none", [], "")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _pack(module: nn.Module) -> None:
    """Replace every `nn.Linear` below `module` by a `PackedLinear`."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child))
        else:
            _pack(child)


def set_precision(model: Any, precision: str) -> Any:
    """Bring a model into the form that answers fastest at `precision`; changes and returns it, for inference only.

    Raises:
        ValueError: unknown precision, or int8 for a model that is not on a CPU.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}; got {precision!r}")
    on_cpu = model.device.type == "cpu"
    if precision == "int8" and not on_cpu:
        raise ValueError(f"precision='int8' is for CPUs; the model is on {model.device}")
    model.eval().requires_grad_(False)
    if precision == "fp32":
        return model.float()
    packs = on_cpu and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if precision == "bf16":
        model.bfloat16()
        if packs:
            _pack(model)
        return model
    model.float()
    # Tied to the embeddings, which stay as they are: the head needs a module of its own.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces torchao, which is slower here
        parts = nn.ModuleList([model.model.language_model, model.lm_head])
        how = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        quantized = torch.ao.quantization.quantize_dynamic(parts, how, inplace=True)
    model.model.language_model, model.lm_head = quantized
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.bfloat16()
        if packs:
            _pack(part)
    return model


__all__ = ["PRECISIONS", "PackedLinear", "set_precision"]
