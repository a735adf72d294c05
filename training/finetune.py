"""Healing, QLoRA and the SmolVLM baseline: one SFTTrainer script, one recipe a run.

    python -m training.finetune --config training/recipes/offline.yaml
    python -m training.finetune --config training/recipes/offline.yaml --max_steps 10    # any field can be given
    torchrun --nproc_per_node 2 -m training.finetune --config training/recipes/offline.yaml

Run again after a kill: it goes on from the last whole checkpoint in `output_dir`. At the end `output_dir/final` is a
complete checkpoint (model with adapters merged, processor), `output_dir/adapter` holds the adapter alone.
"""

import json
import re
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import datasets
import peft
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer, TrlParser

import smoldriver_hf  # noqa: F401  registers the architecture
from training.assemble import save_whole
from training.callbacks import GuardCallback, JsonlCallback, loss_curve
from training.collate import DrawBudgetsByEpoch, PackedSceneCollator, SceneCollator, packed_mask_dtype
from training.features import FeatureCache
from training.rows import Rows, load_rows

HOW = ("frozen", "lora", "full")


@dataclass
class FinetuneArguments:
    checkpoint: str = field(metadata={"help": "SmolDriver, SmolVLM or Idefics3 checkpoint: folder or Hub id."})
    data: str = field(metadata={"help": "Folder written by training.prepare."})
    split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split for the evaluation loss."})
    cameras: list[str] | None = field(default=None, metadata={"help": "Cameras to show; default: the checkpoint's."})
    tower: str = field(default="frozen", metadata={"help": "Vision tower: frozen, lora or full."})
    projector: str = field(default="full", metadata={"help": "Q-Formers and connector: frozen, lora or full."})
    language_model: str = field(default="lora", metadata={"help": "Language model: frozen, lora or full."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapters."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapters."})
    lora_pattern: str = field(
        default=r".*\.(language_model|text_model)\..*\.(q|k|v|o|gate|up|down)_proj",
        metadata={"help": "Regular expression over whole module names: the language model's linears to adapt."},
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: NF4 with double quantisation."})
    num_queries: list[int] | None = field(
        default=None, metadata={"help": "Budgets, one drawn per step; default: the checkpoint's."}
    )
    pairs_per_sequence: int = field(default=1, metadata={"help": "Questions of a frame that share one image prefix."})
    feature_cache: str | None = field(default=None, metadata={"help": "Folder for the frozen tower's features."})


def check_arguments(args: FinetuneArguments, model: torch.nn.Module, processor, rows: Rows) -> None:
    """Fail before the first step on what would otherwise train the wrong thing, or nothing.

    Raises:
        ValueError: naming the field, what was expected and what was given.
    """
    for name in ("tower", "projector", "language_model"):
        if getattr(args, name) not in HOW:
            raise ValueError(f"{name} must be one of {HOW}; got {getattr(args, name)!r}")
    if args.load_in_4bit and "full" in (args.language_model, args.tower):
        raise ValueError("4-bit weights cannot be trained in full: use lora or frozen with load_in_4bit")
    if args.feature_cache and args.tower != "frozen":
        raise ValueError(f"a feature cache stands for a frozen tower; tower is {args.tower!r}")
    if all(getattr(args, name) == "frozen" for name in ("tower", "projector", "language_model")):
        raise ValueError("tower, projector and language_model are all frozen: nothing would be trained")
    known = list(model.config.cameras)
    unknown = [camera for camera in args.cameras or [] if camera not in known]
    if unknown:
        raise ValueError(f"cameras {unknown} are not in the checkpoint, which knows {known}")
    shown = set(args.cameras or known) & set(rows.cameras)
    if not shown:
        raise ValueError(f"the data has images of {list(rows.cameras)}, the model looks at {args.cameras or known}")
    for budget in args.num_queries or []:
        processor.num_image_tokens(budget)
    if "lora" in (args.language_model, args.tower, args.projector):
        check_lora_targets(args, model)


def lora_targets(args: FinetuneArguments) -> str:
    """One regular expression for all adapted linears: the language model's, and tower's or projector's if asked."""
    patterns = [args.lora_pattern] if args.language_model == "lora" else []
    if args.tower == "lora":
        patterns.append(r".*\.vision_tower\..*\.(q_proj|k_proj|v_proj|o_proj|fc1|fc2)")
    if args.projector == "lora":
        patterns.append(r".*\.multi_modal_projector\..*_proj")
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def check_lora_targets(args: FinetuneArguments, model: torch.nn.Module) -> None:
    """Each part asked for is hit by the pattern, and no other part is."""
    hits = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    hits = [name for name in hits if re.fullmatch(lora_targets(args), name)]
    parts = {"tower": ".vision_", "projector": ".multi_modal_projector.", "language_model": ""}
    for part, needle in parts.items():
        if part == "language_model":
            found = [name for name in hits if ".vision_" not in name and ".multi_modal_projector." not in name]
        else:
            found = [name for name in hits if needle in name]
        if bool(found) != (getattr(args, part) == "lora"):
            raise ValueError(
                f"{part} is {getattr(args, part)!r}, but the adapters' pattern {lora_targets(args)!r} matches "
                f"{len(found)} of its linear layers{', e.g. ' + found[0] if found else ''}"
            )


def load_model(args: FinetuneArguments, bf16: bool) -> torch.nn.Module:
    """The checkpoint, in 4 bits if asked; only parts that train in full require gradients (adapters come later).

    In bf16 training the weights that stay as they are are held in bf16, once, instead of being cast at every step; what
    trains is kept in float32.
    """
    quantization = None
    if args.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
        )
    model = AutoModelForImageTextToText.from_pretrained(
        args.checkpoint,
        quantization_config=quantization,
        dtype=torch.bfloat16 if args.load_in_4bit else torch.float32,
    )
    parts = {
        "tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language_model": model.model.language_model,
    }
    for name, part in parts.items():
        full = getattr(args, name) == "full"
        for parameter in part.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(full)
        if bf16 and not full and not args.load_in_4bit:
            part.to(torch.bfloat16)
    return model


def lora_config(args: FinetuneArguments) -> LoraConfig | None:
    """The adapter, or None where no part takes one. Parts trained in full beside it are saved with it."""
    if "lora" not in (args.language_model, args.tower, args.projector):
        return None
    full = {"projector": "multi_modal_projector", "tower": "vision_tower"}
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=lora_targets(args),
        modules_to_save=[module for name, module in full.items() if getattr(args, name) == "full"] or None,
        task_type="CAUSAL_LM",
    )


def training_examples(rows: Rows, cameras: list[str], pairs_per_sequence: int) -> Dataset:
    """One example per sequence: a frame's images by camera and up to `pairs_per_sequence` of its questions."""
    examples = []
    for frame, questions in rows.frames():
        images = {camera: frame["images"][camera] for camera in cameras if camera in frame["images"]}
        for start in range(0, len(questions), pairs_per_sequence):
            chunk = questions[start : start + pairs_per_sequence]
            examples.append(
                {
                    "cameras": list(images),
                    "images": list(images.values()),
                    "questions": [row["question"] for row in chunk],
                    "answers": [row["answer"] for row in chunk],
                }
            )
    if not examples:
        raise ValueError(f"{rows.path} split {rows.split!r} has no questions to train on")
    return Dataset.from_list(examples)


def main(args: FinetuneArguments, config: SFTConfig) -> Path:
    """Train; returns the folder of the final checkpoint."""
    config.max_length = None  # truncation would cut image tokens
    config.remove_unused_columns = False
    config.ddp_find_unused_parameters = False
    output_dir = Path(config.output_dir)
    if (output_dir / "final" / "config.json").exists():
        print(f"{output_dir / 'final'} is there already: nothing to do")
        return output_dir / "final"

    rows = load_rows(args.data, args.split)
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    model = load_model(args, config.bf16)
    check_arguments(args, model, processor, rows)
    cameras = args.cameras or list(model.config.cameras)
    train = training_examples(rows, cameras, args.pairs_per_sequence)
    held_out = None
    if args.eval_split:
        held_out = training_examples(load_rows(args.data, args.eval_split), cameras, args.pairs_per_sequence)

    features = None
    if args.feature_cache:
        paths = sorted(
            {path for part in (train, held_out) if part is not None for row in part for path in row["images"]}
        )
        features = FeatureCache.build(model, processor, paths, Path(args.feature_cache))
    collator = make_collator(args, model, processor, features, config.seed)

    trainer = SFTTrainer(
        model=model,
        args=config,
        data_collator=partial(collate_rows, collator),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
        peft_config=lora_config(args),
        callbacks=[JsonlCallback(output_dir / "metrics.jsonl"), GuardCallback(), DrawBudgetsByEpoch(collator)],
    )
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    print(f"{len(train)} sequences, {len(rows)} questions, {trainable / 1e6:.2f} M trainable parameters")
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None)
    return finish(trainer, processor, args, config, rows)


def make_collator(args: FinetuneArguments, model, processor, features, seed: int) -> SceneCollator:
    """Packed where several questions share a sequence, else a row per question."""
    common = {"num_queries": args.num_queries, "features": features, "seed": seed}
    if args.pairs_per_sequence == 1:
        return SceneCollator(processor, **common)
    return PackedSceneCollator(processor, mask_dtype=packed_mask_dtype(model), **common)


def collate_rows(collator: SceneCollator, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows of the training set → a batch."""
    examples = [
        {
            "images": dict(zip(row["cameras"], row["images"], strict=True)),
            "pairs": list(zip(row["questions"], row["answers"], strict=True)),
        }
        for row in rows
    ]
    return collator(examples)


def finish(trainer: SFTTrainer, processor, args: FinetuneArguments, config: SFTConfig, rows: Rows) -> Path:
    """Save adapter, merged checkpoint, loss curve and how they came about."""
    output_dir = Path(config.output_dir)
    final = output_dir / "final"
    if not trainer.is_world_process_zero():
        return final
    loss_curve(output_dir / "metrics.jsonl", output_dir / "loss.png")
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(output_dir / "adapter")
        model = merged(model, args)
    model.to(torch.bfloat16 if config.bf16 or args.load_in_4bit else torch.float32)
    notes = {
        "command": "python -m training.finetune " + " ".join(sys.argv[1:]),
        "arguments": asdict(args),
        "seed": config.seed,
        "steps": trainer.state.global_step,
        "split_hash": rows.split_hash,
        "final_loss": trainer.state.log_history[-1].get("train_loss"),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl, peft, datasets)},
    }
    save_whole(final, model, processor, notes={"finetune": notes})
    print(json.dumps({"final": str(final), "steps": notes["steps"], "train_loss": notes["final_loss"]}))
    return final


def merged(model: peft.PeftModel, args: FinetuneArguments) -> torch.nn.Module:
    """The adapter folded into its weights; 4-bit weights are read again in bf16, so merging loses nothing more."""
    if not args.load_in_4bit:
        return model.merge_and_unload()
    base = AutoModelForImageTextToText.from_pretrained(args.checkpoint, dtype=torch.bfloat16)
    fresh = peft.get_peft_model(base, model.peft_config["default"])
    peft.set_peft_model_state_dict(fresh, peft.get_peft_model_state_dict(model))
    return fresh.merge_and_unload()


if __name__ == "__main__":
    main(*TrlParser((FinetuneArguments, SFTConfig)).parse_args_and_config())
