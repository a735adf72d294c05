"""Small DriveLM files for tests: `write_world` puts one and its images into a folder."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

CAMERAS = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
TAG = "<c1,CAM_BACK,1088.3,497.5>"
BOX = "(traffic light, green, 674.86, 0.14, 723.33, 109.18)"


def qa(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"Q": question, "A": answer, "C": None, "con_up": None, "con_down": None, "layer": None, **more}


def make_frame(name: str, cameras: tuple[str, ...] = CAMERAS) -> dict[str, Any]:
    return {
        "key_object_infos": {TAG: {"Category": "SECRET-BOX", "2d_bbox": [966.6, 403.3, 1224.1, 591.7]}},
        "QA": {
            "perception": [
                qa("Are there cars to the back of the ego car?", "Yes."),
                qa(f"What is the visual description of {TAG}?", 'Brown SUV – größer, "quoted" \\ and 日本.'),
            ],
            "prediction": [qa("What is in the front view?", f"[{BOX}]")],
            "planning": [qa("What is the target action of the ego vehicle?", "Go straight.")],
            "behavior": [qa("Predict the behavior of the ego vehicle.", "The ego vehicle is driving slowly.")],
        },
        "image_paths": {camera: f"../nuscenes/samples/{camera}/{name}.jpg" for camera in cameras},
    }


def make_world(scenes: int, frames: int = 2) -> dict[str, Any]:
    return {
        f"scene-{scene}": {
            "scene_description": "SECRET-FUTURE",
            "key_frames": {f"frame-{scene}-{frame}": make_frame(f"{scene}-{frame}") for frame in range(frames)},
        }
        for scene in range(scenes)
    }


def write_json(folder: Path, world: dict[str, Any]) -> Path:
    file = folder / "drivelm.json"
    file.write_text(json.dumps(world, indent=1, ensure_ascii=False), encoding="utf-8")
    return file


def write_world(folder: Path, world: dict[str, Any]) -> Path:
    """Write drivelm.json and a tiny image for every image path; return the JSON file."""
    for scene in world.values():
        for frame in scene["key_frames"].values():
            for path in frame.get("image_paths", {}).values():
                file = folder / path.removeprefix("../")
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 9), (90, 120, 90)).save(file)
    return write_json(folder, world)
