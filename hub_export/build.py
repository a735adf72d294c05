"""A checkpoint, and an adapter if there is one → a self-contained folder, ready for the Hub.

    python -m hub_export build --checkpoint outputs/run/final --out outputs/smoldriver

    # with the recipe's record, measured figures, and pictures of the toy world's test split for card and demo
    python -m hub_export build --checkpoint outputs/toyworld/merged --run outputs/toyworld/run.json \\
        --metrics outputs/toyworld/evaluation/metrics.json --examples outputs/toyworld/prepare --out outputs/smoldriver

    # an adapter is merged and saved in bf16
    python -m hub_export build --checkpoint outputs/initial --adapter outputs/run/adapter --out outputs/smoldriver

Weights are under apache-2.0 unless `--license` names another; those trained on anything but generated worlds need it:
their data have licences of their own.

The folder appears complete and checked (`check.py`), or not at all: until then it is called OUT.unfinished.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import smoldriver_hf
from hub_export import card, check, demo
from hub_export.check import OLDEST_TRANSFORMERS, REFERENCE, CheckArguments
from hub_export.files import read_json, whole
from hub_export.lineage import RECIPE, Note, load_run, notes_of
from hub_export.reference import measure_reference, save_reference
from hub_export.refuse import without_machine_paths
from hub_export.results import Metrics, check_fingerprint, load_metrics
from smoldriver_hf import SmolDriverConfig, SmolDriverForConditionalGeneration, SmolDriverProcessor, load
from smoldriver_hf.adapters import merge_adapter

TEMPLATES = Path(__file__).with_name("templates")
LICENSE = Path(__file__).parents[1] / "LICENSE"


@dataclass
class BuildArguments:
    checkpoint: str = field(metadata={"help": "Folder with model and processor, as the training stages save them."})
    out: str = field(metadata={"help": "Folder to write; must not exist. Its name is the model's name in the card."})
    adapter: str | None = field(default=None, metadata={"help": "peft adapter of this checkpoint, to be merged."})
    run: str | None = field(default=None, metadata={"help": "run.json of the recipe that made the checkpoint."})
    metrics: str | None = field(default=None, metadata={"help": "metrics.json of an evaluation, with its controls."})
    dataset: str | None = field(default=None, metadata={"help": "What --metrics is about: a Hub id, or any name."})
    cost: str | None = field(default=None, metadata={"help": "JSON with command, device and rows: a table of costs."})
    examples: str | None = field(default=None, metadata={"help": "Generated world, or prepared data made from one."})
    license: str | None = field(default=None, metadata={"help": "Of the weights, by the Hub's name; see above."})
    transformers: list[str] = field(
        default_factory=lambda: [OLDEST_TRANSFORMERS], metadata={"help": "Further versions to check with; see check."}
    )
    only_installed: bool = field(default=False, metadata={"help": "Check with the installed transformers only."})


def load_source(args: BuildArguments) -> tuple[SmolDriverForConditionalGeneration, torch.dtype]:
    """The checkpoint, or the checkpoint with its adapter merged, in fp32; and the precision to save it in.

    In fp32 whatever the precision, because a model that was cast to bf16 and back has rounded buffers (rotary
    frequencies, position tables) that a model loaded from the saved weights does not have.

    Raises:
        ValueError: no sound checkpoint (see `load`), pickled weights, or an adapter that does not merge.
    """
    checkpoint = Path(args.checkpoint)
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"{checkpoint} holds no checkpoint: there is no config.json")
    for folder in (checkpoint, *([Path(args.adapter)] if args.adapter else [])):
        if not list(folder.glob("*.safetensors")):
            raise ValueError(f"{folder} has no safetensors file; pickled weights run code when loaded: convert them")
    dtype = SmolDriverConfig.from_pretrained(checkpoint).dtype or torch.float32
    model, _ = load(args.checkpoint)
    if args.adapter:
        model, dtype = merge_adapter(model, args.adapter, torch.bfloat16), torch.bfloat16
    return model.eval(), dtype


def write_repository(args: BuildArguments, folder: Path) -> None:
    """Everything that is published, and the reference, into `folder`."""
    source, adapter = Path(args.checkpoint), Path(args.adapter) if args.adapter else None
    notes = notes_of(adapter or source)
    license_name = license_of(notes, args.license)
    run = load_run(Path(args.run), adapter or source) if args.run else None
    cost = read_json(Path(args.cost)) if args.cost else None
    metrics = load_metrics(Path(args.metrics)) if args.metrics else None
    if metrics:
        check_fingerprint(metrics, source, adapter)
    model, dtype = load_source(args)
    processor = SmolDriverProcessor.from_pretrained(args.checkpoint)
    save_reference(measure_reference(model, processor), folder / REFERENCE)
    demo.write_demo(folder, model, processor, Path(args.examples) if args.examples else None)

    save_model(model, processor, dtype, folder)
    for path in Path(smoldriver_hf.__file__).parent.glob("*_smoldriver.py"):
        shutil.copyfile(path, folder / path.name)
    save_record(folder, notes, run, metrics, cost)
    shutil.copyfile(LICENSE, folder / "LICENSE")
    shutil.copyfile(TEMPLATES / "requirements.txt", folder / "requirements.txt")

    card.write_card(folder, Path(args.out).name, license_name, args.dataset)


def save_model(
    model: SmolDriverForConditionalGeneration, processor: SmolDriverProcessor, dtype: torch.dtype, folder: Path
) -> None:
    """Weights in `dtype`, settings and processor, without what this machine left in them."""
    model.to(dtype)
    model.config.dtype = dtype
    for part in (model.config, model.config.text_config, model.config.vision_config, model.config.projector_config):
        part._name_or_path = ""  # where this machine loaded it from
    model.save_pretrained(folder, max_shard_size="4GB")
    processor.save_pretrained(folder)
    if not (folder / "generation_config.json").exists():
        model.generation_config.save_pretrained(folder)
    drop_local_settings(folder / "tokenizer_config.json")


def save_record(
    folder: Path, notes: list[Note], run: dict[str, Any] | None, metrics: Metrics | None, cost: dict[str, Any] | None
) -> None:
    """How the checkpoint came about, and what was measured of it."""
    (folder / RECIPE).mkdir()
    for number, note in enumerate(notes, 1):
        publish_json(note, folder / RECIPE / f"{number}-{note['stage']}.json")
    for content, name in ((run, card.RUN), (metrics, "metrics.json"), (cost, "cost.json")):
        if content is not None:
            publish_json(content, folder / name)


def license_of(notes: list[Note], named: str | None) -> str:
    """The licence of the weights.

    Raises:
        ValueError: none was named, and they were trained on something that is not known to be a generated world.
    """
    foreign = [(note["stage"], learnt) for note in notes if (learnt := note["trained_on"]) and not learnt["generated"]]
    if named is None and foreign:
        stage, learnt = foreign[0]
        raise ValueError(
            f"{stage} trained on {learnt['data']}, which is not known to be a generated world: name the licence of "
            "the weights with --license (of DriveLM and nuScenes: cc-by-nc-sa-4.0)"
        )
    return named or "apache-2.0"


def publish_json(content: Any, target: Path) -> None:
    """Write a note of a run, with this machine's paths cut down to names."""
    target.write_text(json.dumps(without_machine_paths(content), indent=2) + "\n")


def drop_local_settings(path: Path) -> None:
    """Remove what a tokenizer remembers of how it was loaded on this machine."""
    settings = read_json(path)
    for name in ("is_local", "local_files_only", "name_or_path"):
        settings.pop(name, None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def main(args: BuildArguments) -> Path:
    """Build and check; returns the folder.

    Raises:
        ValueError: the folder exists, the source is not sound, something may not be published, or the check fails.
    """
    out = Path(args.out)
    with whole(out) as unfinished:
        unfinished.mkdir()
        write_repository(args, unfinished)
        check.main(CheckArguments(str(unfinished), args.transformers, args.only_installed))
    print(f"{out}: {sum(path.stat().st_size for path in out.rglob('*') if path.is_file()) / 1e6:.1f} MB, checked")
    return out
