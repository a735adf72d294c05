"""An adapter folded into the checkpoint that it was trained on.

    python -m training.merge --checkpoint outputs/offline/heal/final --adapter outputs/offline/adapt/adapter \\
        --output_dir outputs/offline/merged

The base weights are read unquantised, also after QLoRA: the sum is rounded once, to the type of the result.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import peft
import torch
import transformers
from transformers import AutoProcessor, HfArgumentParser

from smoldriver_hf.adapters import merge_adapter
from smoldriver_hf.loading_smoldriver import load_strictly
from training.assemble import save_whole
from training.stages import Stage


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
    if args.dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype must be bfloat16 or float32; got {args.dtype!r}")
    if not (Path(args.adapter) / "adapter_config.json").is_file():
        raise ValueError(f"{args.adapter} holds no adapter (no adapter_config.json)")
    if (Path(args.output_dir) / "config.json").exists():
        raise ValueError(f"{args.output_dir} already holds a checkpoint; name another folder or remove it")
    model = merged(args.checkpoint, args.adapter, getattr(torch, args.dtype))
    notes = {
        "command": "python -m training.merge " + " ".join(sys.argv[1:]),
        "arguments": asdict(args),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
    }
    processor = AutoProcessor.from_pretrained(args.adapter)
    folder = save_whole(args.output_dir, model, processor, notes={"merge": notes})
    print(f"{folder}: {args.checkpoint} with {args.adapter}, in {args.dtype}")
    return folder


if __name__ == "__main__":
    main(HfArgumentParser(MergeArguments).parse_args_into_dataclasses()[0])
