"""Tiny checkpoints, generated worlds and exported folders for the tests of hub_export."""

import json
from pathlib import Path

from tiny import CAMERAS, picture, tiny_model, tiny_processor, tiny_text_config

from hub_export.build import BuildArguments, write_repository
from hub_export.check import STAMP, folder_hashes


def save_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A checkpoint whose widths bitsandbytes can quantise (multiples of 64)."""
    model = tiny_model(seed, text_config=tiny_text_config(hidden_size=64, intermediate_size=128))
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
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
