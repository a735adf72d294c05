"""Tiny checkpoints, generated worlds and exported folders for the tests of hub_export."""

import json
import string
from pathlib import Path

from tiny import CAMERAS, picture, tiny_model, tiny_processor, tiny_text_config, tiny_vision_config

from hub_export.build import BuildArguments, write_repository
from hub_export.check import STAMP, folder_hashes
from smoldriver_hf import SmolDriverProjectorConfig


def save_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A checkpoint whose answers differ with every image, camera and question, so that equal answers mean something.

    Weights drawn as usual give nearly the same logits for any input, and the same token again and again. Here they are
    large. Widths are multiples of 64, which bitsandbytes can quantise, and heads 32 wide, which vLLM has kernels for.
    """
    text_config = tiny_text_config(
        hidden_size=64, intermediate_size=128, initializer_range=0.3, tie_word_embeddings=False
    )
    projector_config = SmolDriverProjectorConfig(
        hidden_size=32, num_attention_heads=2, intermediate_size=64, initializer_range=1.0
    )
    vision_config = tiny_vision_config(initializer_range=0.3)
    model = tiny_model(seed, text_config=text_config, projector_config=projector_config, vision_config=vision_config)
    for qformer in model.model.multi_modal_projector.qformers.values():
        qformer.v_proj.weight.data *= 8
    processor = tiny_processor(model.config)
    readable = set(processor.tokenizer.convert_tokens_to_ids(list(string.ascii_letters + string.digits)))
    for token in set(range(model.lm_head.weight.shape[0])) - readable:
        model.lm_head.weight.data[token] = 0  # some readable byte is always more likely: no answer is cut or garbled
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_world(folder: Path) -> Path:
    """What `training.toyworld` writes, as far as examples need it: two frames, the second without CAM_BACK."""
    scenes = {}
    for number in range(2):
        cameras = [camera for camera in CAMERAS if number == 0 or camera != "CAM_BACK"]
        paths = {camera: f"../nuscenes/samples/{camera}/toy-s0-{number:05d}__{camera}__1.jpg" for camera in cameras}
        for index, path in enumerate(paths.values()):
            file = folder / path.removeprefix("../")
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(100 * number + index).save(file)
        pairs = [{"Q": "What is <c1,CAM_BACK,1.0,2.0>?", "A": "Car."}, {"Q": "Is there a car?", "A": "Yes."}]
        scenes[f"scene{number}"] = {"key_frames": {"f": {"QA": {"perception": pairs}, "image_paths": paths}}}
    (folder / "drivelm.json").write_text(json.dumps(scenes))
    (folder / "toyworld.json").write_text("{}")
    return folder


def export(folder: Path, checkpoint: Path, **options) -> Path:
    """An exported folder with a stamp, without the minutes of a real check."""
    folder.mkdir(parents=True)
    write_repository(BuildArguments(checkpoint=str(checkpoint), out=str(folder), **options), folder)
    environments = [{"versions": {"transformers": "5.23.0"}, "passed": []}]
    (folder / STAMP).write_text(json.dumps({"files": folder_hashes(folder), "environments": environments}))
    return folder
