"""What the source checkpoint computes for one fixed scene: what the exported folder must compute too.

Kept as safetensors beside the stamp, outside what is published. The scene is drawn from a seed, so that nothing has
to be downloaded and no image has a licence.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

QUESTION = "What is in front of the ego car, and is it safe to brake?"
NEW_TOKENS = 8


def reference_scene(cameras: list[str]) -> dict[str, np.ndarray]:
    """{camera: (90, 160, 3) uint8}, smooth random pictures that differ from camera to camera."""
    scene = {}
    for index, camera in enumerate(cameras):
        coarse = np.random.default_rng(index).integers(0, 256, (5, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((160, 90), Image.Resampling.BICUBIC)
        scene[camera] = np.asarray(picture).copy()
    return scene


@torch.no_grad()
def measure_reference(model: torch.nn.Module, processor: Any) -> dict[str, torch.Tensor]:
    """Inputs, last hidden state, logits and greedy tokens of the reference scene, in fp32 on the CPU.

    Args:
        model: the source, in fp32 and eval mode.

    Returns:
        `image.<CAMERA>` (90, 160, 3); the processor's four outputs; `hidden` (1, 4, text_hidden) and `logits`
        (1, 4, vocab) of the last four positions; `generated` (1, prompt + up to 8).
    """
    scene = reference_scene(processor.cameras)
    images = {camera: Image.fromarray(pixels) for camera, pixels in scene.items()}
    inputs = processor(images=images, text=QUESTION, return_tensors="pt")
    hidden = model.model(**inputs).last_hidden_state[:, -4:]  # (1, 4, text_hidden)
    logits = model(**inputs).logits[:, -4:]  # (1, 4, vocab)
    generated = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    tensors = {f"image.{camera}": torch.from_numpy(pixels) for camera, pixels in scene.items()}
    tensors |= {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values", "camera_ids")}
    tensors |= {"hidden": hidden, "logits": logits, "generated": generated}
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def save_reference(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write what `measure_reference` returned, with the question it asked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"settings": json.dumps({"question": QUESTION, "new_tokens": NEW_TOKENS})})
