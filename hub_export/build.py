"""A checkpoint, and an adapter if there is one → a self-contained folder, ready for the Hub.

    python -m hub_export build --checkpoint outputs/run/final --out outputs/smoldriver

    # with measured figures and pictures of the toy world (its drivelm.json and images) for card and demo
    python -m hub_export build --checkpoint outputs/run/final --metrics outputs/run/metrics.json \\
        --examples outputs/toyworld --out outputs/smoldriver

    # an adapter is merged and saved in bf16
    python -m hub_export build --checkpoint outputs/initial --adapter outputs/run/adapter --out outputs/smoldriver

The folder appears complete and checked (`check.py`), or not at all: until then it is called OUT.unfinished.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

import smoldriver_hf
from hub_export import card, check, demo
from hub_export.check import OLDEST_TRANSFORMERS, REFERENCE, CheckArguments
from hub_export.reference import measure_reference, save_reference
from hub_export.refuse import without_machine_paths
from smoldriver_hf import SmolDriverConfig, SmolDriverForConditionalGeneration, SmolDriverProcessor

TEMPLATES = Path(__file__).with_name("templates")
LICENSE = Path(__file__).parents[1] / "LICENSE"
# What the stages leave beside weights; published, so that every figure in the card stands in a file.
NOTES = ("assemble.json", "transfer.json", "finetune.json", "run.json")
# Merging may round, and nothing else: fp32 logits with the adapter beside the weights and inside them.
MERGE_TOLERANCE = 1e-3


@dataclass
class BuildArguments:
    checkpoint: str = field(metadata={"help": "Folder with model and processor, as the training stages save them."})
    out: str = field(metadata={"help": "Folder to write; must not exist. Its name is the model's name in the card."})
    adapter: str | None = field(default=None, metadata={"help": "peft adapter of this checkpoint, to be merged."})
    metrics: str | None = field(default=None, metadata={"help": "metrics.json of an evaluation, with its controls."})
    cost: str | None = field(default=None, metadata={"help": "JSON with command, device and rows: a table of costs."})
    examples: str | None = field(default=None, metadata={"help": "Generated world: drivelm.json and its images."})
    license: str = field(default="apache-2.0", metadata={"help": "Of the weights, as the Hub abbreviates it."})
    transformers: list[str] = field(
        default_factory=lambda: [OLDEST_TRANSFORMERS],
        metadata={"help": "Versions to check with beside the installed one; see check."},
    )
    only_installed: bool = field(default=False, metadata={"help": "Check with the installed transformers only."})


def load_source(args: BuildArguments) -> tuple[SmolDriverForConditionalGeneration, torch.dtype]:
    """The checkpoint, or the checkpoint with its adapter merged, in fp32; and the precision to save it in.

    In fp32 whatever the precision, because a model that was cast to bf16 and back has rounded buffers (rotary
    frequencies, position tables) that a model loaded from the saved weights does not have.

    Raises:
        ValueError: pickled weights, weights that are missing or left over, or an adapter that does not merge.
    """
    checkpoint = Path(args.checkpoint)
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"{checkpoint} holds no checkpoint: there is no config.json")
    for folder in (checkpoint, *([Path(args.adapter)] if args.adapter else [])):
        if not list(folder.glob("*.safetensors")):
            raise ValueError(f"{folder} has no safetensors file; pickled weights run code when loaded: convert them")
    dtype = SmolDriverConfig.from_pretrained(checkpoint).dtype or torch.float32
    model, info = SmolDriverForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise ValueError(f"{checkpoint}: {problem} {sorted(map(str, info[problem]))[:3]}")
    if args.adapter:
        model, dtype = merge(model, args.adapter), torch.bfloat16
    return model.eval(), dtype


@torch.no_grad()
def merge(model: SmolDriverForConditionalGeneration, adapter: str) -> SmolDriverForConditionalGeneration:
    """`model` (fp32) with a peft adapter folded into its weights, which are rounded to what bf16 can hold."""
    from peft import PeftModel

    processor_free_input = {"input_ids": torch.arange(3, 11)[None]}
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    before = adapted(**processor_free_input).logits
    model = adapted.merge_and_unload()
    difference = (model(**processor_free_input).logits - before).abs().max().item()
    if difference > MERGE_TOLERANCE * max(1.0, before.abs().max().item()):
        raise ValueError(f"{adapter} does not merge: logits change by {difference:.3g}")
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
    return model


def write_repository(args: BuildArguments, folder: Path) -> None:
    """Everything that is published, and the reference, into `folder`."""
    model, dtype = load_source(args)
    processor = SmolDriverProcessor.from_pretrained(args.checkpoint)
    save_reference(measure_reference(model, processor), folder / REFERENCE)
    demo.write_demo(folder, model, processor, Path(args.examples) if args.examples else None)

    model.to(dtype)
    model.config.dtype = dtype
    for part in (model.config, model.config.text_config, model.config.vision_config, model.config.projector_config):
        part._name_or_path = ""  # where this machine loaded it from
    model.save_pretrained(folder, max_shard_size="4GB")
    processor.save_pretrained(folder)
    if not (folder / "generation_config.json").exists():
        model.generation_config.save_pretrained(folder)
    for path in Path(smoldriver_hf.__file__).parent.glob("*_smoldriver.py"):
        shutil.copyfile(path, folder / path.name)
    drop_local_settings(folder / "tokenizer_config.json")

    for name in NOTES:
        if (Path(args.checkpoint) / name).is_file():
            publish_json(Path(args.checkpoint) / name, folder / name)
    for source, name in ((args.metrics, "metrics.json"), (args.cost, "cost.json")):
        if source:
            publish_json(Path(source), folder / name)
    shutil.copyfile(LICENSE, folder / "LICENSE")
    shutil.copyfile(TEMPLATES / "requirements.txt", folder / "requirements.txt")

    card.write_card(folder, Path(args.out).name, args.license)


def publish_json(source: Path, target: Path) -> None:
    """Copy a note of a run, with this machine's paths cut down to names."""
    target.write_text(json.dumps(without_machine_paths(json.loads(source.read_text())), indent=2) + "\n")


def drop_local_settings(path: Path) -> None:
    """Remove what a tokenizer remembers of how it was loaded on this machine."""
    settings = json.loads(path.read_text())
    for name in ("is_local", "local_files_only", "name_or_path"):
        settings.pop(name, None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def main(args: BuildArguments) -> Path:
    """Build and check; returns the folder.

    Raises:
        ValueError: the folder exists, the source is not sound, something may not be published, or the check fails.
    """
    out = Path(args.out)
    if out.exists():
        raise ValueError(f"{out} exists; name another folder or remove it")
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write_repository(args, unfinished)
    check.main(CheckArguments(str(unfinished), transformers=args.transformers, only_installed=args.only_installed))
    os.replace(unfinished, out)
    print(f"{out}: {sum(path.stat().st_size for path in out.rglob('*') if path.is_file()) / 1e6:.1f} MB, checked")
    return out
