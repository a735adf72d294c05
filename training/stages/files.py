"""What every stage does with files: write them whole, know whether a result is there already, leave a note beside it.

A note is `STAGE.json` in the folder of a result. It tells the command, what the result was made from and trained on,
and carries the notes of what it was made from, so that a published checkpoint's way is in one file. `hub_export` reads
notes by their form alone; `tests/contract` holds the two halves together.
"""

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict

# Of transformers' training arguments: what a machine without an accelerator cannot leave to its default.
ALWAYS_SAID = {"output_dir", "use_cpu", "bf16", "fp16"}
# A JSON object beside a result that has these is a note.
NOTE_KEYS = ("stage", "command", "arguments")


class TrainedOn(TypedDict):
    """The prepared data that a stage learnt from."""

    data: str
    split_hash: str
    source: str
    generated: bool  # a generated world, whose pictures may be published


class Note(TypedDict):
    """What a stage writes down; figures of its own stand beside these keys."""

    stage: str
    command: str
    arguments: dict[str, Any]
    made_from: list[str]
    trained_on: TrainedOn | None
    parts: list[str]  # sentences that a card must say about pretrained parts
    versions: dict[str, str]
    history: NotRequired[list[dict[str, Any]]]  # notes of what it was made from, oldest first, without theirs


@contextmanager
def whole(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write a file or folder to, which takes the target's name when the block ends, or is gone if it fails.

    A folder replaces only an empty one or none; a file replaces a file. The temporary name keeps the ending, which
    tells many libraries the format, and holds the process, so that two of them never write into each other's.

    Raises:
        ValueError: the target is a folder that holds something.
    """
    final = Path(target)
    final.parent.mkdir(parents=True, exist_ok=True)
    unfinished = final.with_name(f".{final.stem}.{os.getpid()}.unfinished{final.suffix}")
    remove(unfinished)
    try:
        yield unfinished
        if unfinished.is_dir() and final.is_dir():
            if any(final.iterdir()):
                raise ValueError(f"{final} holds files already; name another folder or remove it")
            final.rmdir()
        os.replace(unfinished, final)
    finally:
        remove(unfinished)


def write_json(target: str | os.PathLike[str], content: Any, indent: int | None = 2) -> None:
    """JSON as UTF-8 with a last line end, whole or not at all."""
    with whole(target) as unfinished:
        unfinished.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Text as UTF-8, whole or not at all."""
    with whole(target) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Delete a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_done(there: bool, before: Mapping[str, Any] | None, now: Mapping[str, Any], where: str | Path) -> bool:
    """Whether a result is there and came from the same inputs and settings.

    Args:
        there: whether the folder holds a result, or a run that could go on.
        before: what its record says it came from; None where it has no record.
        now: the inputs and settings of this call, as JSON would read them back.
        where: the folder, for the error.

    Raises:
        ValueError: a result of other inputs or settings, with what differs; or one without a record.
    """
    if not there:
        return False
    if before is None:
        raise ValueError(
            f"{where} holds a result that does not tell what it came from; name another folder or remove it"
        )
    if changed := differences(before, json.loads(json.dumps(now))):
        raise ValueError(
            f"{where} holds a result of other settings ({'; '.join(changed)}); name another folder or remove it"
        )
    return True


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two sets of settings differ in, in words."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names]


def command_of(module: str, *arguments: Any, package: str = "training") -> str:
    """The shell command of a stage with these arguments: what differs from the defaults, as its parser reads it.

    Args:
        module: the stage's module without its package, such as "finetune" or "toyworld.smolvlm".
        arguments: dataclass instances.
    """
    words = [word for part in arguments for word in flags(changed_fields(part))]
    return f"python -m {package}.{module} {shlex.join(words)}".rstrip()


def changed_fields(arguments: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from those of one made with its required fields alone."""
    fields = [field for field in dataclasses.fields(arguments) if field.init]
    required = {
        field.name: getattr(arguments, field.name)
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    for name in ALWAYS_SAID & {field.name for field in fields}:
        required[name] = getattr(arguments, name)
    plain = type(arguments)(**required)
    values = {field.name: getattr(arguments, field.name) for field in fields}
    return {name: value for name, value in values.items() if name in required or value != getattr(plain, name)}


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments as words of a command line; None leaves one out, an empty list too."""
    words: list[str] = []
    for key, value in arguments.items():
        if value is None or value == []:
            continue
        values = value if isinstance(value, list | tuple) else [value]
        words.append(f"--{key}")
        words += [
            json.dumps(one) if isinstance(one, dict | bool) else str(getattr(one, "value", one)) for one in values
        ]
    return words


def make_note(
    module: str,
    *arguments: Any,
    made_from: Iterable[str | Path | None] = (),
    trained_on: str | Path | None = None,
    parts: Sequence[str] = (),
    versions: Iterable[Any] = (),
    **figures: Any,
) -> dict[str, Any]:
    """The note of a stage.

    Args:
        module: the stage's module without its package; the note is called after its last name.
        arguments: the stage's dataclasses; the first one's fields are kept whole, of the others what was changed.
        made_from: the folders (or Hub ids) that the result was made from, the one it goes on from first.
        trained_on: prepared data that it learnt from.
        parts: sentences that a card must say about pretrained parts.
        versions: modules whose version counts, beside torch and transformers.
        figures: anything else of the stage.
    """
    import torch  # here and not above: the toy world's processes write files and need neither
    import transformers

    own, *others = arguments
    sources = [str(source) for source in made_from if source]
    note: Note = {
        "stage": module.rsplit(".", 1)[-1],
        "command": command_of(module, *arguments),
        "arguments": json.loads(json.dumps(dataclasses.asdict(own))),
        "made_from": sources,
        "trained_on": learnt_from(trained_on) if trained_on else None,
        "parts": list(parts),
        "versions": {one.__name__: one.__version__ for one in (torch, transformers, *versions)},
        "history": [note for source in sources[:1] for note in history(source)],
    }
    return {**note, **figures}


def write_note(folder: str | Path, note: Mapping[str, Any]) -> None:
    """Leave a note beside a result as `STAGE.json`."""
    write_json(Path(folder) / f"{note['stage']}.json", note)


def read_notes(folder: str | Path) -> list[dict[str, Any]]:
    """The notes in a folder: every JSON object that has a note's keys, whatever the stage is called."""
    found = []
    for file in sorted(Path(folder).glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and all(key in content for key in NOTE_KEYS):
            found.append(content)
    return found


def history(source: str | Path) -> list[dict[str, Any]]:
    """The notes of a result and of what it was made from, oldest first, each without its own history."""
    return [
        {key: value for key, value in one.items() if key != "history"}
        for note in read_notes(source)
        for one in (*note.get("history", []), note)
    ]


def learnt_from(data: str | Path) -> TrainedOn:
    """What prepared data say of themselves.

    Older folders do not tell whether a program generated them: then a `toyworld.json` lies beside their images.
    """
    info = json.loads((Path(data) / "dataset.json").read_text(encoding="utf-8"))
    images = Path(data) / info["image_root"]
    source = info["source"]
    return {
        "data": str(data),
        "split_hash": info["split_hash"],
        "source": source["file"] if isinstance(source, dict) else source,
        "generated": info["generated"] if "generated" in info else (images / "toyworld.json").is_file(),
    }
