"""A language model learns to read visual tokens made of words, before it sees any picture.

    python -m training.read --checkpoint outputs/base --output_dir outputs/read --language_model full \\
        --max_steps 1000 --per_device_train_batch_size 8 --learning_rate 1e-3 --warmup_steps 20 \\
        --lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs '{"num_decay_steps": 350}' --use_cpu

Scenes are the toy world's, drawn as they are needed and without pictures (`toyworld.readings`), so that there are as
many as steps; the prompt is that of `training.finetune`, with a camera's visual tokens made of the words for what it
shows (`learning.slots`). Some heads of one layer are told where to look (`learning.looking`). Then a projector need
only write such tokens (`training.align`).

Frames have budgets drawn from a list, some cameras one of their own; some questions are in other words, and tokens are
noisy, as a projector's will be. `output_dir/final/read.json` tells how many questions about held-out scenes are
answered word for word, at each budget. Started again after a kill, it goes on from the last whole checkpoint.
"""

import json
import random
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import datasets
import peft
import trl
from datasets import Dataset
from transformers import AutoProcessor
from trl import SFTConfig, TrlParser

from smoldriver_hf import read_config
from training.data.rig import Rig, read_rig
from training.finetune import finish
from training.learning.callbacks import JsonlCallback, started_note
from training.learning.checks import check_trl, is_finished, is_sharded, record_arguments
from training.learning.collate import Example, SceneCollator
from training.learning.looking import CameraAttention
from training.learning.parts import (
    BASELINES,
    LANGUAGE_LINEARS,
    check_how,
    check_lora_targets,
    load_model,
    lora_config,
    modules_of,
)
from training.learning.reading import BaselineReadingCollator, ReadingCollator, ReadingTrainer
from training.learning.slots import WordTable
from training.learning.smolvlm import SceneView, load_processor
from training.learning.trainer import clear_about_full_disk, last_checkpoint
from training.stages.command_line import run
from training.stages.recipes import Stage
from training.toyworld.contents import all_words
from training.toyworld.readings import make_reading

HELD_OUT_SEED = 500_000  # more than the seed of training: other scenes
HELD_OUT_BUDGETS = (1, 2, 4, 8, 16)
PERCEPTION = ("existence", "objects", "status", "count", "closest", "traffic light")


@dataclass
class ReadArguments:
    checkpoint: str = field(metadata={"help": "SmolDriver, SmolVLM or Idefics3 checkpoint: folder or Hub id."})
    rig: str = field(default="nuscenes", metadata={"help": "The cameras: a name or a file, see training.data.rig."})
    language_model: str = field(default="full", metadata={"help": "Language model: lora or full."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapters."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the adapters."})
    lora_pattern: str = field(
        default=LANGUAGE_LINEARS,
        metadata={"help": "Regular expression over whole module names: the language model's linears to adapt."},
    )
    train_embeddings: bool = field(
        default=False, metadata={"help": "Train embeddings and head beside the adapter, for words not learnt before."}
    )
    budgets: list[int] = field(
        default_factory=lambda: [1, 2, 4, 4, 8, 16], metadata={"help": "Tokens per camera, one drawn per frame."}
    )
    cameras_share: float = field(default=0.25, metadata={"help": "Share of cameras that draw a budget of their own."})
    reword: float = field(default=0.4, metadata={"help": "Share of questions asked in other words."})
    noise: float = field(default=0.3, metadata={"help": "Noise of the tokens, relative to their length."})
    camera_attention_loss: float = field(
        default=0.5,
        metadata={"help": "Weight of the loss that teaches heads to look at the cameras a question names."},
    )
    camera_attention_layer: int | None = field(default=None, metadata={"help": "Its layer; default: the middle one."})
    camera_attention_heads: list[int] | None = field(
        default=None, metadata={"help": "Its heads of that layer; default: the first half."}
    )
    held_out: int = field(default=64, metadata={"help": "Scenes for the figures at the end."})

    # What `learning.parts` asks for and nobody chooses here: eyes stay as they are.
    tower: ClassVar[str] = "frozen"
    projector: ClassVar[str] = "frozen"
    load_in_4bit: ClassVar[bool] = False
    merge: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.budgets or min(self.budgets) < 1:
            raise ValueError(f"budgets must hold at least one number of tokens, each at least 1; got {self.budgets}")
        for name in ("cameras_share", "reword"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1; got {getattr(self, name)}")
        for name in ("noise", "camera_attention_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more; got {getattr(self, name)}")
        if self.held_out < 1:
            raise ValueError(f"held_out must be at least 1 scene; got {self.held_out}")


def held_out(folder: Path) -> dict[str, Any]:
    """How well held-out scenes are read, from the note."""
    return json.loads((folder / "final" / "read.json").read_text())["held_out"]


STAGE = Stage(
    start="checkpoint",
    inputs=("checkpoint",),
    result=lambda arguments: "final",
    resumes=True,
    distributed=True,
    figures=held_out,
)


def main(args: ReadArguments, config: SFTConfig) -> Path:
    """Learn to read; returns the folder of the final checkpoint.

    Raises:
        ValueError: before the first step, for settings that fit neither each other nor the checkpoint.
        FloatingPointError: the loss or a weight is not finite; the last checkpoint stays.
        OSError: the disk is full; the last checkpoint stays.
    """
    check_how(args)
    check_trl(config)
    if is_sharded():
        raise ValueError("tokens are made of whole embeddings: read without FSDP and DeepSpeed, in plain processes")
    if config.max_steps < 1:
        raise ValueError(f"scenes to read never end: say how many steps with max_steps; got {config.max_steps}")
    output_dir = Path(config.output_dir)
    rig = read_rig(args.rig)
    if is_finished(output_dir / "final", args, config, None):
        return output_dir / "final"
    note = started_note("read", args, config, None, [args.checkpoint], versions=(trl, peft, datasets))

    model_type = read_config(args.checkpoint).model_type
    modules = modules_of(model_type)
    model = load_model(args, model_type, config.bf16)
    check_lora_targets(args, model, modules)
    processor, collator = make_collator(args, model_type, rig, config.seed)
    check_length(args, collator, rig, model.config.get_text_config().max_position_embeddings)

    scenes = config.max_steps * config.gradient_accumulation_steps * config.world_size
    config.max_length = None
    config.remove_unused_columns = False
    config.dataset_kwargs = {"skip_prepare_dataset": True}
    config.train_sampling_strategy = "sequential"  # a run that is given more steps goes on with other scenes
    trainer = ReadingTrainer(
        model=model,
        args=config,
        data_collator=partial(collate_scenes, collator, args, rig, config.seed),
        train_dataset=Dataset.from_dict({"scene": range(scenes * config.per_device_train_batch_size)}),
        processing_class=processor,
        peft_config=lora_config(args, modules),
        callbacks=[JsonlCallback(output_dir / "metrics.jsonl")],
        camera_attention=CameraAttention(model, args.camera_attention_layer, args.camera_attention_heads),
        camera_attention_loss=args.camera_attention_loss,
        table=collator.table,
        image_token_id=collator.processor.image_token_id,
        noise=args.noise,
    )
    with clear_about_full_disk(output_dir):
        record_arguments(args, config, None)
        trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))
        note |= {"held_out": figures_of(trainer, collator, args, rig)}
        finish(trainer, processor, args, note)
    return output_dir / "final"


def make_collator(
    args: ReadArguments, model_type: str, rig: Rig, seed: int
) -> tuple[Any, ReadingCollator | BaselineReadingCollator]:
    """The checkpoint's processor, and the collator of its prompts.

    Raises:
        ValueError: the checkpoint lacks a camera of the rig.
    """
    view: Any
    if model_type in BASELINES:
        processor = load_processor(args.checkpoint, rig.names)
        view = SceneView(processor, rig.names)
    else:
        processor = view = AutoProcessor.from_pretrained(args.checkpoint)
    if unknown := [name for name in rig.names if name not in view.cameras]:
        raise ValueError(f"rig {args.rig} has {unknown[0]}; the checkpoint knows {', '.join(view.cameras)}")
    table = WordTable(view.tokenizer, [all_words(rig)])
    collator = BaselineReadingCollator if model_type in BASELINES else ReadingCollator
    return processor, collator(table, view, rig, seed=seed)


def check_length(args: ReadArguments, collator: SceneCollator, rig: Rig, positions: int) -> None:
    """Whether the language model has positions for all tokens of the largest budget.

    Raises:
        ValueError: it has not.
    """
    longest = int(collator([scene_at(max(args.budgets), rig, 0, 0)])["position_ids"].max()) + 1
    if longest > positions:
        raise ValueError(
            f"{max(args.budgets)} tokens a camera take {longest} positions with a question; the language model has "
            f"{positions}: lower budgets"
        )


def collate_scenes(
    collator: SceneCollator, args: ReadArguments, rig: Rig, seed: int, rows: list[dict[str, int]]
) -> dict[str, Any]:
    """Numbers of scenes → a batch, with budgets, words and noise as `args` says."""
    return collator([training_example(args, rig, seed, row["scene"]) for row in rows])


def training_example(args: ReadArguments, rig: Rig, seed: int, number: int) -> Example:
    """A scene to train on, which depends on seed and number alone."""
    rng = random.Random(f"{seed}/{number}")
    budget = rng.choice(args.budgets)
    own = {name: rng.choice(args.budgets) for name in rig.names if rng.random() < args.cameras_share}
    example = scene_at(budget, rig, seed, number)
    return {**example, "budgets": example["budgets"] | own, "reword": args.reword}


def scene_at(budget: int, rig: Rig, seed: int, number: int) -> Example:
    """A scene as the collator takes it, all cameras at one budget."""
    reading = make_reading(seed, number, rig)
    return {
        "images": dict.fromkeys(rig.names),
        "pairs": [(asked.question, asked.answer) for asked in reading.asked],
        "contents": reading.contents,
        "budgets": dict.fromkeys(rig.names, budget),
        "look_at": [asked.cameras for asked in reading.asked],
        "kinds": [asked.kind for asked in reading.asked],
    }


def figures_of(trainer: ReadingTrainer, collator: SceneCollator, args: ReadArguments, rig: Rig) -> dict[str, Any]:
    """Per cent of the questions about held-out scenes that are answered word for word, by budget and kind.

    `existence` is the mean of its "Yes." and its "No.".
    """
    seed, size = trainer.args.seed + HELD_OUT_SEED, trainer.args.per_device_train_batch_size
    figures: dict[str, Any] = {"scenes": args.held_out}
    scenes = [scene_at(1, rig, seed, number) for number in range(args.held_out)]
    for budget in HELD_OUT_BUDGETS:
        right: dict[str, list[bool]] = defaultdict(list)
        shares = []
        for start in range(0, args.held_out, size):
            examples = [
                {**scene, "budgets": dict.fromkeys(rig.names, budget)} for scene in scenes[start : start + size]
            ]
            answered, share = trainer.answered(collator(examples))
            shares.append(share)
            for example, results in zip(examples, answered, strict=True):
                for kind, (_, answer), good in zip(example["kinds"], example["pairs"], results, strict=True):
                    right[f"{kind}: {answer}" if kind == "existence" else kind].append(good)
                    right["perception"] += [good] * (kind in PERCEPTION)
        per_cent = {kind: 100 * sum(good) / len(good) for kind, good in right.items()}
        sides = [per_cent.pop(kind) for kind in list(per_cent) if kind.startswith("existence")]
        per_cent["existence"] = sum(sides) / len(sides)
        shown = {kind: round(value, 1) for kind, value in sorted(per_cent.items())}
        figures[f"tokens_{budget}"] = shown | {"camera_attention": round(sum(shares) / len(shares), 3)}
    return figures


if __name__ == "__main__":
    run(main, ReadArguments, SFTConfig, parser=TrlParser)
