"""What must be right before the first step: mistakes that would train the wrong thing, or nothing, or fail late.

Every check raises one ValueError that names the field, what was expected and what was given.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import DistributedType
from datasets import Dataset
from torch import nn
from transformers import PreTrainedConfig, TrainingArguments
from trl import SFTConfig

from training.data.rows import Rows
from training.learning.collate import SceneCollator
from training.learning.examples import as_example
from training.learning.parts import BASELINES, check_lora_targets
from training.learning.trainer import last_checkpoint
from training.stages.files import history, is_done, write_json

ARGUMENTS = "arguments.json"  # in a run's folder: what it was called with
SOURCES = ("checkpoint", "student", "teacher")  # arguments that name what a run starts from
WHERE = ("data", "eval_data", "feature_cache")  # where things lie, which may be elsewhere the next time
SAME_SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"),
    *("max_grad_norm", "optim", "seed", "bf16", "fp16"),
)
HOW_LONG = ("max_steps", "num_train_epochs")  # a run that has not ended may become longer


def check_arguments(
    args: Any, config: SFTConfig, model: nn.Module, modules: dict[str, str], cameras: list[str], known: list[str]
) -> None:
    """Whether `FinetuneArguments` and the trainer's settings fit the checkpoint.

    Args:
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
    if args.projector_learning_rate is not None and (args.projector != "full" or args.projector_learning_rate <= 0):
        raise ValueError(
            "projector_learning_rate must be positive, and the projector trained in full; got "
            f"{args.projector_learning_rate} with projector {args.projector!r}"
        )
    if args.projector_learning_rate is not None and is_sharded():
        raise ValueError("projector_learning_rate is not for sharded runs, whose optimiser has one rate: leave it out")
    if (args.image_splitting or args.longest_edge) and not baseline:
        raise ValueError("image_splitting and longest_edge are settings of the SmolVLM baseline")
    if args.load_in_4bit and config.device.type == "cpu" and config.eval_strategy != "no":
        raise ValueError(
            "bitsandbytes repacks 4-bit weights on a CPU when they are evaluated, and they no longer train: leave out "
            "eval_strategy with load_in_4bit there"
        )
    if args.num_queries is not None and not args.num_queries:
        raise ValueError("num_queries must hold at least one budget, or be left out; got an empty list")
    if not 0 <= args.reword <= 1:
        raise ValueError(f"reword must be a share between 0 and 1; got {args.reword}")
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
    check_trl(config)


def check_trl(config: SFTConfig) -> None:
    """Whether the trainer is left to learn what the collator says."""
    for field in ("packing", "padding_free", "assistant_only_loss", "completion_only_loss"):
        if getattr(config, field):
            raise ValueError(f"{field} is trl's; here the collator learns answers only, and pairs_per_sequence packs")
    if config.load_best_model_at_end:
        raise ValueError("load_best_model_at_end is not supported: the last checkpoint becomes the final one")


def checked_budgets(given: list[int] | None, config: PreTrainedConfig) -> list[int]:
    """The budgets to train a SmolDriver at, sorted; default: powers of two up to all queries.

    Raises:
        ValueError: a budget that the checkpoint does not have.
    """
    most = config.max_queries
    if config.connector == "pixel_shuffle":
        if given not in (None, [most]):
            raise ValueError(f"pixel_shuffle has the budget {most} only; got {given}")
        return [most]
    if given is None:
        return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]
    if not given or not all(1 <= budget <= most for budget in given):
        raise ValueError(f"num_queries must lie between 1 and {most}; got {given}")
    return sorted(set(given))


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
    tokens = collator.sequence_length(longest)
    positions = model.config.get_text_config().max_position_embeddings
    if tokens > positions:
        raise ValueError(
            f"a question takes {tokens} tokens with its images and answer, the language model has {positions} "
            "positions; lower num_queries or show fewer cameras"
        )


def is_finished(result: Path, args: Any, config: TrainingArguments, rows: Rows | None, **inputs: Any) -> bool:
    """Whether a run has ended, with these inputs and settings; says so.

    Args:
        result: the folder that is there when it has ended.
        args: the stage's own arguments. `merge` may change: it is about what is done with the result.
        rows: what it trains on; None where that follows from the settings.
        inputs: what else it reads, in JSON.

    Raises:
        ValueError: the folder holds a run or its end with other inputs or settings, with what differs.
    """
    now = settings_of(args, config, rows, inputs)
    file = Path(config.output_dir) / ARGUMENTS
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    ended = result.is_dir()
    open_ended = () if ended else HOW_LONG
    told = None if before is None else {name: value for name, value in before.items() if name not in open_ended}
    asked = {name: now[name] for name in now if told is None or name in told}  # older runs wrote down less
    if is_done(ended or last_checkpoint(config.output_dir) is not None, told, asked, config.output_dir) and ended:
        print(f"{result} is there already: nothing to do")
        return True
    return False


def record_arguments(args: Any, config: TrainingArguments, rows: Rows | None, **inputs: Any) -> None:
    """Keep in the run's folder what it was called with, for `is_finished`: once nothing is wrong any more."""
    if config.process_index == 0:
        write_json(Path(config.output_dir) / ARGUMENTS, settings_of(args, config, rows, inputs))


def settings_of(args: Any, config: TrainingArguments, rows: Rows | None, inputs: dict[str, Any]) -> dict[str, Any]:
    """What tells a run from others: its arguments, the settings that change its result, and what it learns from."""
    now = {name: value for name, value in dataclasses.asdict(args).items() if name not in (*WHERE, "merge")}
    now |= {name: origin(now[name]) for name in SOURCES if name in now}
    if "questions" in now:  # which in this record is how many
        now["questions_like"] = now.pop("questions")
    now |= {name: str(getattr(config, name)) for name in SAME_SETTINGS}
    now |= {name: getattr(config, name) for name in HOW_LONG}
    now["questions_per_step"] = (
        config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    )
    if rows is not None:
        now |= {"split_hash": rows.split_hash, "questions": len(rows)}
    return now | inputs


def origin(source: str) -> list[str] | str:
    """What tells a checkpoint from others, wherever it lies: the commands that made it, or else its name."""
    return [note["command"] for note in history(source)] or source


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
