"""A peft adapter folded into the model that it was trained on: one way, so that what is evaluated is what is exported.

Not among the exported files: a published checkpoint has no adapter, and whoever loads it needs no peft.
"""

import os
import warnings
from typing import Any

import torch

# Adding in another order rounds, and nothing else: logits with the adapter beside the weights and inside them.
TOLERANCE = 1e-3


@torch.no_grad()
def merge_adapter(model: Any, adapter: str | os.PathLike, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Base plus adapter, added in float32 and rounded once to what `dtype` can hold, in tensors that stay float32.

    Saved in `dtype`, or computed with in float32, these are the same numbers.

    Args:
        model: a language model, with or without eyes, whole, in float32 (also after QLoRA); it is changed.
        adapter: folder of its adapter; parts that were trained in full beside it replace the model's.
        dtype: in which the result is kept, `torch.bfloat16` or `torch.float32`.

    Raises:
        ImportError: peft is not installed.
        ValueError: a model in another type, no adapter there, a pickled or incomplete one, weights that are not
            numbers, or a sum that computes something else than its parts.
    """
    adapted = load_adapter(model, adapter)
    narrow = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if narrow:
        raise ValueError(f"an adapter is added in float32; the model has weights in {', '.join(map(str, narrow))}")
    image_token = getattr(model.config, "image_token_id", None)  # it would ask for an image
    ids = torch.tensor([[token for token in range(3, 12) if token != image_token]], device=model.device)
    before = adapted(input_ids=ids).logits
    merged = adapted.merge_and_unload(safe_merge=True)
    difference = (merged(input_ids=ids).logits - before).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, before.abs().max().item()):
        raise ValueError(f"{adapter} does not merge: logits change by {difference:.3g}")
    for tensor in merged.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
    return merged


def load_adapter(model: Any, adapter: str | os.PathLike) -> Any:
    """The model with a whole adapter beside its weights, as a `PeftModel` in eval mode.

    Raises:
        ImportError: peft is not installed.
        ValueError: no adapter there, a pickled one, or one that lacks weights.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError("an adapter needs peft: pip install peft") from error
    for name, lacks in (
        ("adapter_config.json", "holds no adapter"),
        ("adapter_model.safetensors", "has no safetensors file; pickled weights run code when loaded: convert them"),
    ):
        if not os.path.isfile(os.path.join(adapter, name)):
            raise ValueError(f"{adapter} {lacks} (no {name})")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")  # peft would go on with random ones
        try:
            return PeftModel.from_pretrained(model, adapter).eval()
        except UserWarning as warning:
            raise ValueError(f"{adapter} is no whole adapter of this model: {warning}") from warning


__all__ = ["load_adapter", "merge_adapter"]
