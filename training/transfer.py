"""Knowledge transfer: the student's tower and Q-Formers learn to stand in for a SmolVLM-type teacher's vision.

    python -m training.transfer --config training/recipes/smolvlm2-256m.yaml
    python -m training.transfer --student outputs/initial --teacher HuggingFaceTB/SmolVLM2-256M-Video-Instruct \\
        --data data/drivelm --output_dir outputs/transfer --num_train_epochs 1 --learning_rate 1e-4

With the `pixel_shuffle` connector the Q-Formers' outputs regress the teacher's patch features, at the same places of
the image. With `linear` the first m visual tokens regress averages of the teacher's visual tokens
(`teacher.pooling_weights`), m drawn per step; `--answer_distillation` adds the divergence from the teacher's answer
distribution. The loss is the squared error over the variance of the target around its mean, so 1 is what a constant
reaches.

`output_dir/transfer_metrics.json` tells held-out R² = 1 - SSE / SST before and after, per budget; SST is the error of
the training mean of the same camera, place and channel. `output_dir/final` is a complete checkpoint. Run again after a
kill: it goes on from the last whole checkpoint.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoProcessor, PreTrainedModel, Trainer, TrainingArguments
from trl import TrlParser

from smoldriver_hf.loading_smoldriver import load_strictly
from training.assemble import save_whole
from training.data.rows import load_rows
from training.distillation.model import TransferModel
from training.distillation.targets import measured_targets, root_mean_square
from training.distillation.teacher import Teacher, TeacherPrompts
from training.distillation.trainer import TransferCollator, TransferTrainer, frames_of, spread
from training.learning.ablations import ablate
from training.learning.callbacks import JsonlCallback, ProgressBar
from training.learning.collate import DrawBudgetsByEpoch, SceneCollator
from training.learning.features import FeatureCache
from training.learning.smolvlm import build_features
from training.stages import Stage


@dataclass
class TransferArguments:
    student: str = field(metadata={"help": "SmolDriver checkpoint, as written by training.assemble."})
    teacher: str = field(metadata={"help": "SmolVLM or Idefics3 checkpoint: folder or Hub id."})
    data: str = field(metadata={"help": "Folder written by training.prepare."})
    split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="validation", metadata={"help": "Split for the held-out R²."})
    eval_data: str | None = field(default=None, metadata={"help": "Folder of that split; default: `data`."})
    train_tower: bool = field(default=True, metadata={"help": "Train the vision tower too, not the projector alone."})
    num_queries: list[int] | None = field(
        default=None, metadata={"help": "Budgets, one drawn per step; default: powers of two up to all (linear)."}
    )
    answer_distillation: float = field(default=0.0, metadata={"help": "Weight of the divergence of answers; 0: none."})
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder for features of the teacher's and of a frozen tower; default: live."},
    )
    shared_qformer: bool = field(default=False, metadata={"help": "Ablation: one Q-Former for all cameras."})
    keep_frozen: str | None = field(
        default=None, metadata={"help": "Ablation: regular expression over names of weights that shall not train."}
    )
    statistics_frames: int = field(default=256, metadata={"help": "Training frames for the target's mean and scale."})
    eval_frames: int | None = field(default=None, metadata={"help": "Held-out frames to use; default: all."})


def check_arguments(args: TransferArguments, student: PreTrainedModel, teacher: Teacher) -> list[int]:
    """The budgets, once everything fits.

    Raises:
        ValueError: naming the field, what was expected and what was given.
    """
    config = student.config
    own = config.text_config.hidden_size if teacher.gives_tokens else config.projector_config.hidden_size
    if own != teacher.width:
        name = "text hidden_size" if teacher.gives_tokens else "projector hidden_size"
        raise ValueError(f"the student's {name} is {own}, the teacher's features have width {teacher.width}")
    if args.answer_distillation < 0:
        raise ValueError(f"answer_distillation must not be negative; got {args.answer_distillation}")
    if not teacher.gives_tokens:
        if args.num_queries not in (None, [config.max_queries]):
            raise ValueError(f"pixel_shuffle has the budget {config.max_queries} only; got {args.num_queries}")
        return [config.max_queries]
    if args.num_queries is None:
        powers = [2**i for i in range(config.max_queries.bit_length()) if 2**i < config.max_queries]
        return [*powers, config.max_queries]
    if not args.num_queries or not all(1 <= budget <= config.max_queries for budget in args.num_queries):
        raise ValueError(f"num_queries must lie between 1 and {config.max_queries}; got {args.num_queries}")
    return sorted(set(args.num_queries))


STAGE = Stage(
    start="student",
    inputs=("student", "teacher", "data", "eval_data"),
    caches=("feature_cache",),
    result=lambda arguments: "final",
    resumes=True,
    distributed=True,
    figures=lambda folder: json.loads((folder / "transfer_metrics.json").read_text()),
)


def main(args: TransferArguments, config: TrainingArguments) -> Path:
    """Transfer; returns the folder of the final checkpoint."""
    output_dir = Path(config.output_dir)
    final, metrics_file = output_dir / "final", output_dir / "transfer_metrics.json"
    if (final / "config.json").exists():
        print(f"{final} is finished")
        return final
    config.remove_unused_columns = False
    student = load_strictly(args.student, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(args.student)
    teacher = Teacher(args.teacher, student.config.connector, torch.bfloat16 if config.bf16 else torch.float32)
    teacher.model.to(config.device)
    budgets = check_arguments(args, student, teacher)
    student.requires_grad_(False)
    student.model.vision_tower.requires_grad_(args.train_tower)
    student.model.multi_modal_projector.requires_grad_(True)
    if not teacher.gives_tokens and not args.answer_distillation:
        student.model.multi_modal_projector.connector.requires_grad_(False)  # the features are compared before it

    distil = args.answer_distillation > 0
    train_rows, eval_rows = load_rows(args.data, args.split), load_rows(args.eval_data or args.data, args.eval_split)
    train = frames_of(train_rows, student.config.cameras, distil)
    held_out = spread(frames_of(eval_rows, student.config.cameras, False), args.eval_frames)

    student_features = teacher_features = None
    if args.feature_cache:
        paths = [path for example in (*train, *held_out) for path in example["images"].values()]
        folder, size = Path(args.feature_cache), config.per_device_eval_batch_size
        with config.main_process_first(desc="feature cache"):
            teacher_features = build_features(
                teacher.model, teacher.image_processor, paths, folder / "teacher", batch_size=size
            )
            if not args.train_tower:
                student.to(config.device)
                with tower_in(torch.bfloat16 if config.bf16 else torch.float32, student):
                    student_features = FeatureCache.build(
                        student, processor, paths, folder / "student", batch_size=size
                    )

    scenes = SceneCollator(processor, num_queries=budgets, features=student_features, seed=config.seed)
    largest = SceneCollator(processor, num_queries=budgets[-1], features=student_features)
    prompts = TeacherPrompts(teacher, processor.tokenizer, processor.image_token) if distil else None
    collator = TransferCollator(scenes, teacher, teacher_features, prompts)
    eval_collator = TransferCollator(largest, teacher, teacher_features)
    sample = spread(train, args.statistics_frames)
    targets = measured_targets(teacher, student, sample, eval_collator, config.per_device_eval_batch_size)
    if teacher.gives_tokens:  # the student's tokens start with the teacher's norm
        weight = student.model.multi_modal_projector.connector.scale_norm.weight.data
        weight.mul_(targets.scale / root_mean_square(weight))

    trainer = TransferTrainer(
        model=TransferModel(student, targets, args.answer_distillation),
        args=config,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=held_out,
        teacher=teacher,
        eval_collator=eval_collator,
        budgets=budgets,
        callbacks=[JsonlCallback(output_dir / "metrics.jsonl"), ProgressBar(), DrawBudgetsByEpoch(scenes)],
    )
    ablate(trainer, args.shared_qformer, args.keep_frozen)
    checkpoint = last_whole_checkpoint(output_dir)
    if checkpoint and metrics_file.exists():
        metrics = json.loads(metrics_file.read_text())
    else:
        metrics = {
            "command": "python -m training.transfer " + " ".join(sys.argv[1:]),
            "arguments": asdict(args),
            "seed": config.seed,
            "split_hash": train_rows.split_hash,
            "held_out_split_hash": eval_rows.split_hash,
            "frames": {"train": len(train), "held_out": len(held_out), "statistics": len(sample)},
            "teacher": teacher.fingerprint(),
            "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
            "r2_against": "training mean of the same camera, place and channel",
            "start": trainer.evaluate(metric_key_prefix="held_out"),
        }
        write_json(metrics, metrics_file, trainer)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    metrics["end"] = trainer.evaluate(metric_key_prefix="held_out")
    metrics["steps"], metrics["train_loss"] = trainer.state.global_step, result.training_loss
    write_json(metrics, metrics_file, trainer)
    if trainer.is_world_process_zero():
        save_whole(final, student.cpu(), processor, notes={"transfer": metrics})
        print(json.dumps({"final": str(final), "start": metrics["start"], "end": metrics["end"]}))
    return final


@contextmanager
def tower_in(dtype: torch.dtype, student: PreTrainedModel) -> Iterator[None]:
    """The student's tower in another type, as `training.finetune` holds a frozen one, and back with the same bits."""
    tower = student.model.vision_tower
    before = {name: weight.clone() for name, weight in tower.state_dict().items()}
    try:
        tower.to(dtype)
        yield
    finally:
        tower.to(torch.float32)
        tower.load_state_dict(before)


def last_whole_checkpoint(output_dir: Path) -> str | None:
    """The newest checkpoint that was written to its end: the Trainer's state is its last file."""
    folders = [file.parent for file in output_dir.glob("checkpoint-*/trainer_state.json")]
    return str(max(folders, key=lambda folder: int(folder.name.split("-")[1]))) if folders else None


def write_json(metrics: dict[str, Any], path: Path, trainer: Trainer) -> None:
    """Whole or not at all, and once for all processes."""
    if trainer.is_world_process_zero():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text(json.dumps(metrics, indent=2) + "\n")
        os.replace(unfinished, path)


if __name__ == "__main__":
    main(*TrlParser((TransferArguments, TrainingArguments)).parse_args_and_config())
