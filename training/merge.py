"""An adapter folded into the checkpoint that it was trained on.

    python -m training.merge --checkpoint outputs/offline/heal/final --adapter outputs/offline/adapt/adapter \\
        --output_dir outputs/offline/merged

The base weights are read unquantised, also after QLoRA: the sum is rounded once, to the type of the result.
"""

from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
from transformers import AutoProcessor

from smoldriver_hf import load_strictly
from smoldriver_hf.adapters import merge_adapter
from training.checkpoints.folders import dtype_named, is_saved, save_whole
from training.stages.command_line import run
from training.stages.files import make_note
from training.stages.recipes import Stage


@dataclass
class MergeArguments:
    checkpoint: str = field(metadata={"help": "What the adapter was trained on: folder or Hub id."})
    adapter: str = field(metadata={"help": "Folder of the adapter."})
    output_dir: str = field(metadata={"help": "Folder for the merged checkpoint; must not hold one yet."})
    dtype: str = field(default="bfloat16", metadata={"help": "bfloat16 or float32, of the saved weights."})


def merged(checkpoint: str, adapter: str | Path, dtype: torch.dtype) -> torch.nn.Module:
    """The checkpoint with the adapter in it, in `dtype`; see `merge_adapter`."""
    return merge_adapter(load_strictly(checkpoint, dtype=torch.float32), adapter, dtype).to(dtype)


STAGE = Stage(start="checkpoint", inputs=("checkpoint", "adapter"))


def main(args: MergeArguments) -> Path:
    """Merge and save; returns the folder.

    Raises:
        ValueError: unknown dtype, no adapter there, weights that are not numbers, or a checkpoint in the way.
    """
    dtype = dtype_named(args.dtype)
    if is_saved("merge", args):
        return Path(args.output_dir)
    if not (Path(args.adapter) / "adapter_config.json").is_file():
        raise ValueError(f"{args.adapter} holds no adapter (no adapter_config.json)")
    model = merged(args.checkpoint, args.adapter, dtype)
    processor = AutoProcessor.from_pretrained(args.adapter)
    note = make_note("merge", args, made_from=(args.adapter, args.checkpoint), versions=(peft,))
    folder = save_whole(args.output_dir, model, processor, note=note)
    print(f"{folder}: {args.checkpoint} with {args.adapter}, in {args.dtype}")
    return folder


if __name__ == "__main__":
    run(main, MergeArguments)
