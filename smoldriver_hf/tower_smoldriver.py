"""Any transformers vision encoder as a tower: the grid of its features, and what of it is never used."""

import torch
from torch import nn


def height_and_width(image_size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """(height, width) in pixels of an image size given as one side or as both."""
    return (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])


def tower_stride(vision_config) -> int:
    """Pixels between neighbouring output features: the patch size, doubled at each later stage of a hierarchy."""
    stages = len(vision_config.depths) if hasattr(vision_config, "depths") else 1
    return vision_config.patch_size * 2 ** (stages - 1)


def patch_grid(vision_config, image_size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of the tower's features for images of `image_size` pixels, side or (height, width).

    Raises:
        ValueError: no patch fits, or a hierarchical tower would pad its feature map at some stage.
    """
    height, width = height_and_width(image_size)
    stride = tower_stride(vision_config)
    hierarchical = hasattr(vision_config, "depths")
    if min(height, width) < stride or (hierarchical and (height % stride or width % stride)):
        wanted = "multiples of" if hierarchical else "at least"
        raise ValueError(f"height and width must be {wanted} {stride} pixels for this tower; got {height}x{width}")
    return height // stride, width // stride


def drop_untrained(tower: nn.Module) -> None:
    """Take away what `last_hidden_state` never reads: it would be saved without ever being trained.

    That is the pooler, CLIP's norm behind its pooled class token, and the mask token of masked pretraining, which
    stays as a constant because some towers' initialisation expects it.
    """
    if isinstance(getattr(tower, "pooler", None), nn.Module):
        tower.pooler = None
    if tower.config.model_type == "clip_vision_model":
        tower.post_layernorm = nn.Identity()
    for module in tower.modules():
        mask_token = module._parameters.pop("mask_token", None)
        if mask_token is not None:
            module.register_buffer("mask_token", torch.zeros_like(mask_token), persistent=False)


__all__ = ["drop_untrained", "height_and_width", "patch_grid", "tower_stride"]
