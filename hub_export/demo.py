"""The demo folder inside an export: a Gradio Space with examples from a generated world, and the card's picture."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from hub_export.files import read_json
from hub_export.prepared import FrameKey, Prepared, frame_key, is_prepared, is_world, read_questions
from hub_export.refuse import image_problems

TEMPLATES = Path(__file__).with_name("templates")
EXAMPLES = 3
NEW_TOKENS = 32
# Where nuScenes' cameras stand in the card's picture, three in a row: what is ahead on top, what is behind below.
PLACES = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
COLUMNS = 3
TILE = (400, 225)


def read_world(root: Path, cameras: list[str]) -> list[dict[str, Any]]:
    """A few frames spread over a generated world, each with another question about the whole scene.

    Args:
        root: folder with `toyworld.json`, `drivelm.json` (DriveLM v1.1) and the images that it names; or what
            `training.prepare` made of it, of which the test split is taken.

    Returns:
        dicts with `question`, `reference`, `images` {camera: path} and `split`, None where nothing was split.

    Raises:
        ValueError: the folder is not a generated world, or one of its images may not be published.
    """
    prepared = Prepared(root) if is_prepared(root) else None
    if not (prepared.generated if prepared else is_world(root)):
        raise ValueError(
            f"{prepared.image_root if prepared else root} has no toyworld.json, so nothing says that its images were "
            "generated; make examples with `python -m training.toyworld`"
        )
    frames = [frame for frame in (prepared_frames(prepared) if prepared else world_frames(root)) if frame["pairs"]]
    examples: list[dict[str, Any]] = []
    for number in range(min(EXAMPLES, len(frames))):
        frame = frames[number * len(frames) // min(EXAMPLES, len(frames))]
        images = {camera: frame["images"][camera] for camera in cameras if camera in frame["images"]}
        asked = {example["question"] for example in examples}
        pair = next((pair for pair in frame["pairs"] if pair[0] not in asked), frame["pairs"][0])
        if images:
            examples.append({"question": pair[0], "reference": pair[1], "images": images, "split": frame["split"]})
    if not examples:
        raise ValueError(f"{root}: no frame has images of {cameras} and a question without object tags")
    for path in (path for example in examples for path in example["images"].values()):
        for problem in image_problems(path, path.name):
            raise ValueError(f"{path}: {problem}")
    return examples


def world_frames(root: Path) -> list[dict[str, Any]]:
    """All frames of a generated world: `images` {camera: path}, `pairs` of questions without tags and answers."""
    return [
        {
            "images": {camera: root / path.removeprefix("../") for camera, path in frame["image_paths"].items()},
            "pairs": without_tags((pair["Q"], pair["A"]) for pairs in frame["QA"].values() for pair in pairs),
            "split": None,
        }
        for scene in read_json(root / "drivelm.json").values()
        for frame in scene["key_frames"].values()
    ]


def prepared_frames(data: Prepared, split: str = "test") -> list[dict[str, Any]]:
    """The same of one split of a prepared world."""
    pairs: dict[FrameKey, list[tuple[str, str]]] = {}
    for shard in data.shards(split):
        for row in read_questions(shard, ["question", "answer"]):
            pairs.setdefault(frame_key(row), []).append((row["question"], row["answer"]))
    return [
        {
            "images": {camera: Path(path) for camera, path in images.items()},
            "pairs": without_tags(pairs.get(key, [])),
            "split": split,
        }
        for key, images in data.images(split).items()
    ]


def without_tags(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Questions that a reader understands who sees the pictures only, yes/no questions last: they show least."""
    plain = [(question, answer) for question, answer in pairs if "<" not in question + answer]
    return sorted(plain, key=lambda pair: pair[1].rstrip(".").lower() in ("yes", "no"))


@torch.no_grad()
def write_demo(folder: Path, model: torch.nn.Module, processor: Any, world: Path | None) -> None:
    """Write `demo/`, and with a generated world its examples with the model's answers and the card's picture.

    Args:
        folder: the export.
        model: in fp32 and eval mode; it answers the examples' questions.
        world: see `read_world`.
    """
    demo = folder / "demo"
    demo.mkdir()
    for template, name in (("demo_app.py", "app.py"), ("demo_requirements.txt", "requirements.txt")):
        shutil.copyfile(TEMPLATES / template, demo / name)
    shutil.copyfile(TEMPLATES / "demo_readme.md", demo / "README.md")
    if world is None:
        return
    written = []
    for number, example in enumerate(read_world(world, processor.cameras)):
        target = demo / "examples" / str(number)
        target.mkdir(parents=True)
        for camera, path in example["images"].items():
            shutil.copyfile(path, target / f"{camera}{path.suffix}")
        scene = model.encode_scene({camera: str(path) for camera, path in example["images"].items()}, processor)
        answer = scene.ask(example["question"], max_new_tokens=NEW_TOKENS)
        images = {camera: f"{number}/{camera}{path.suffix}" for camera, path in example["images"].items()}
        written.append({**example, "answer": answer, "images": images})
    (demo / "examples" / "examples.json").write_text(json.dumps(written, indent=2) + "\n")
    draw_picture(demo / "examples", written[0], processor.cameras).save(folder / "picture.png", optimize=True)


def draw_picture(examples: Path, example: dict[str, Any], cameras: Sequence[str]) -> Image.Image:
    """The cameras of one example around the car; below them question, answer and reference."""
    placed = [camera for camera in PLACES if camera in cameras]
    placed += [camera for camera in cameras if camera not in placed]
    width, height = TILE
    below = -(-len(placed) // COLUMNS) * height  # the rows of pictures end here
    sheet = Image.new("RGB", (COLUMNS * width, below + 112), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=20)
    for number, camera in enumerate(placed):
        left, top = number % COLUMNS * width, number // COLUMNS * height
        if camera in example["images"]:
            with Image.open(examples / example["images"][camera]) as picture:
                sheet.paste(picture.convert("RGB").resize(TILE, Image.Resampling.LANCZOS), (left, top))
        draw.text((left + 8, top + 6), camera, font=font, fill="white", stroke_width=2, stroke_fill="black")
    draw.text((8, below + 10), shortened(f"Question: {example['question']}"), font=font, fill="black")
    draw.text((8, below + 42), shortened(f"Model: {example['answer']}"), font=font, fill="black")
    draw.text((8, below + 74), shortened(f"Reference: {example['reference']}"), font=font, fill="dimgray")
    return sheet


def shortened(text: str, length: int = 110) -> str:
    """One line that fits under the picture."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
