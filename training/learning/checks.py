"""What must be right before the first step: mistakes that would train the wrong thing, or nothing, or fail late.

Every check raises one ValueError that names the field, what was expected and what was given.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import DistributedType
from datasets import Dataset
from torch import nn
from trl import SFTConfig

from training.data.rows import Rows
from training.learning.collate import SceneCollator
from training.learning.examples import as_example
from training.learning.parts import BASELINES, check_lora_targets

# What may differ when a run is taken up again: where things lie, and for how long to train.
MAY_CHANGE = ("data", "checkpoint", "feature_cache", "merge")
SAME_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "seed",
    "bf16",
    "fp16",
)


def check_arguments(
    args: Any, config: SFTConfig, model: nn.Module, modules: dict[str, str], cameras: list[str], known: list[str]
) -> None:
    """Whether `FinetuneArguments` and the trainer's settings fit the checkpoint.

    Args:
        model: as `parts.load_model` returns it.
        modules: part → module name of its architecture.
        cameras: what the model will be shown.
        known: the cameras that the checkpoint, or for a baseline the data, has.
    """
    baseline = model.config.model_type in BASELINES
    if args.blind not in (None, "text", "black"):
        raise ValueError(f"blind must be text, black or left out; got {args.blind!r}")
    if args.blind == "text" and args.feature_cache:
        raise ValueError("blind text shows no images: leave out feature_cache")
    if args.blind == "text" and args.language_model == "frozen":
        raise ValueError("blind text shows no images, so tower and projector learn nothing: train the language model")
    if args.feature_cache and args.tower != "frozen":
        raise ValueError(f"a feature cache stands for a frozen tower; tower is {args.tower!r}")
    if args.feature_cache and args.image_splitting:
        raise ValueError("a feature cache holds one tile per image: leave out image_splitting or feature_cache")
    if args.shared_qformer and (baseline or args.projector != "full"):
        raise ValueError("shared_qformer is an ablation of SmolDriver's projector, trained in full")
    if (args.image_splitting or args.longest_edge) and not baseline:
        raise ValueError("image_splitting and longest_edge are settings of the SmolVLM baseline")
    if args.load_in_4bit and config.device.type == "cpu" and config.eval_strategy != "no":
        raise ValueError(
            "bitsandbytes repacks 4-bit weights on a CPU when they are evaluated, and they no longer train: leave out "
            "eval_strategy with load_in_4bit there"
        )
    if args.num_queries is not None and not args.num_queries:
        raise ValueError("num_queries must hold at least one budget, or be left out; got an empty list")
    if args.pairs_per_sequence < 1:
        raise ValueError(f"pairs_per_sequence must be at least 1; got {args.pairs_per_sequence}")
    if args.cameras is not None and not args.cameras:
        raise ValueError("cameras must name at least one camera; a run without images is blind: text")
    unknown = [camera for camera in cameras if camera not in known]
    if unknown:
        raise ValueError(f"cameras {unknown} are not in the checkpoint, which knows {known}")
    if len(set(cameras)) != len(cameras):
        raise ValueError(f"cameras must not repeat a name; got {cameras}")
    check_lora_targets(args, model, modules)
    for field in ("packing", "padding_free", "assistant_only_loss", "completion_only_loss"):
        if getattr(config, field):
            raise ValueError(f"{field} is trl's; here the collator learns answers only, and pairs_per_sequence packs")
    if config.load_best_model_at_end:
        raise ValueError("load_best_model_at_end is not supported: the last checkpoint becomes the final one")


def check_data_cameras(cameras: list[str], there: Sequence[str]) -> None:
    """Whether the data has images of any camera that is to be shown."""
    if not set(cameras) & set(there):
        raise ValueError(f"the data has images of {list(there)}, the model is to look at {cameras}")


def check_examples(examples: Dataset, collator: SceneCollator, model: nn.Module) -> None:
    """Whether the first example can be collated and the longest question fits the language model's positions."""
    collator([as_example(examples[0])])
    characters = [sum(map(len, row["questions"] + row["answers"])) for row in examples.remove_columns("images")]
    longest = as_example(examples[max(range(len(characters)), key=characters.__getitem__)])
    longest["pairs"] = [max(longest["pairs"], key=lambda pair: sum(map(len, pair)))]  # packed ones share positions
    tokens = max(collator.sequence_lengths(longest))
    positions = model.config.get_text_config().max_position_embeddings
    if tokens > positions:
        raise ValueError(
            f"a question takes {tokens} tokens with its images and answer, the language model has {positions} "
            "positions; lower num_queries or show fewer cameras"
        )


def check_same_run(args: dict[str, Any], config: SFTConfig, rows: Rows, there: bool) -> None:
    """Whether what lies in `output_dir` came from the same settings; writes them to `arguments.json` in a new one.

    Args:
        args: `FinetuneArguments` as a dict.
        there: whether the folder holds a checkpoint or a result.
    """
    now = {name: value for name, value in args.items() if name not in MAY_CHANGE}
    now |= {name: str(getattr(config, name)) for name in SAME_SETTINGS}
    now["questions_per_step"] = (
        config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    )
    now |= {"split_hash": rows.split_hash, "questions": len(rows)}
    file = Path(config.output_dir) / "arguments.json"
    if there and file.exists():
        before = json.loads(file.read_text())
        changed = [
            f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now if before.get(name) != now[name]
        ]
        if changed:
            raise ValueError(
                f"{config.output_dir} holds a run with other settings ({'; '.join(changed)}); "
                "name another output_dir, or delete this one"
            )
    elif config.process_index == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name("arguments.json.unfinished")
        temporary.write_text(json.dumps(now, indent=2) + "\n")
        os.replace(temporary, file)


def is_sharded() -> bool:
    """Whether accelerate was asked, by its launcher, to shard the model."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" for name in ("FSDP", "DEEPSPEED"))


def check_sharding(distributed_type: DistributedType) -> None:
    """Whether sharding that was asked for takes place: on a CPU accelerate leaves it out without a word."""
    if is_sharded() and distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"the launcher asks for FSDP or DeepSpeed, but the run is {distributed_type.value}: use_cpu, or a machine "
            "without accelerators, leaves them out. Start it with torchrun, or on GPUs"
        )
