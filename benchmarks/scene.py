"""The README's picture: six cameras of a scene of the toy world, two questions and their reference answers.

python -m benchmarks.scene
"""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from training.stages.command_line import run
from training.stages.files import whole
from training.toyworld.make import ToyWorldArguments
from training.toyworld.make import main as make_world

QUESTIONS = (
    "What are objects to the front of the ego car?",
    "What is the status of the traffic light that is to the front of the ego car?",
)
GRID = (("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"), ("CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"))
TILE = (400, 225)  # pixels
GAP = 4
LINE = 24  # of text, in pixels


@dataclass
class SceneArguments:
    scenes: int = field(default=40, metadata={"help": "Scenes to choose from: the first that answers the questions."})
    seed: int = field(default=1, metadata={"help": "Of the world."})
    output: str = field(default="benchmarks/results/scene.jpg", metadata={"help": "File of the picture."})


def answered_frame(drivelm: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """{camera: path} of the first frame that answers the questions, and its answers.

    Raises:
        ValueError: there is none.
    """
    for scene in drivelm.values():
        for frame in scene["key_frames"].values():
            answers = {pair["Q"]: pair["A"] for pairs in frame["QA"].values() for pair in pairs}
            if all(question in answers for question in QUESTIONS):
                return frame["image_paths"], [answers[question] for question in QUESTIONS]
    raise ValueError(f"no frame of this world is asked {' and '.join(QUESTIONS)!r}; take more --scenes")


def draw(images: dict[str, Path], answers: list[str]) -> Image.Image:
    """What is ahead on top, what is behind below, then questions and answers."""
    width, height = (size + GAP for size in TILE)
    sheet = Image.new("RGB", (3 * width - GAP, 2 * height + 2 * LINE * len(QUESTIONS) + 3 * GAP), "white")
    pen, label, text = ImageDraw.Draw(sheet), ImageFont.load_default(size=16), ImageFont.load_default(size=20)
    for row, cameras in enumerate(GRID):
        for column, camera in enumerate(cameras):
            corner = (column * width, row * height)
            with Image.open(images[camera]) as picture:
                sheet.paste(picture.resize(TILE), corner)
            place = (corner[0] + 5, corner[1] + 3)
            left, top, right, bottom = pen.textbbox(place, camera, font=label)
            pen.rectangle((*corner, right + 5, bottom + 4), fill="black")
            pen.text(place, camera, font=label, fill="white")
    for number, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        top = 2 * height + GAP + 2 * LINE * number
        pen.text((8, top), question, font=text, fill="black")
        pen.text((8, top + LINE), answer, font=text, fill="#007050")
    return sheet


def main(args: SceneArguments) -> Path:
    """Make the world in passing and draw one scene of it; returns the picture's path."""
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(
            ToyWorldArguments(args.scenes, str(Path(folder) / "world"), weathers=["day"], seed=args.seed)
        )
        paths, answers = answered_frame(json.loads((world / "drivelm.json").read_text()))
        images = {camera: world / path.removeprefix("../") for camera, path in paths.items()}
        with whole(args.output) as unfinished:
            draw(images, answers).save(unfinished, quality=90)
    return Path(args.output)


if __name__ == "__main__":
    run(main, SceneArguments)
