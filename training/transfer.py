"""Knowledge transfer: the student's tower and Q-Formers learn to stand in for a SmolVLM-type teacher's vision.

    python -m training.transfer --config SETTINGS.yaml
    python -m training.transfer --student outputs/initial --teacher HuggingFaceTB/SmolVLM2-256M-Video-Instruct \\
        --data data/drivelm --output_dir outputs/transfer --num_train_epochs 1 --learning_rate 1e-4

With the `pixel_shuffle` connector the Q-Formers' outputs regress the teacher's patch features, at the same places of
the image. With `linear` the first m visual tokens regress averages of the teacher's visual tokens
(`teacher.pooling_weights`), m drawn per step. The loss is the squared error over the variance of the target around its
mean, so 1 is what a constant reaches.

`output_dir/transfer_metrics.json` tells held-out R² = 1 - SSE / SST before and after, per budget; SST is the error of
the training mean of the same camera, place and channel. `output_dir/final` is a complete checkpoint. Run again after a
kill: it goes on from the last whole checkpoint.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoProcessor, PreTrainedModel, TrainingArguments
from trl import TrlParser

from smoldriver_hf import load_strictly
from training.checkpoints.folders import save_whole
from training.data.rows import load_rows
from training.distillation.model import TransferModel
from training.distillation.targets import measured_targets, root_mean_square
from training.distillation.teacher import Teacher
from training.distillation.trainer import TransferCollator, TransferTrainer, frames_of, spread
from training.learning.ablations import ablate
from training.learning.callbacks import JsonlCallback, started_note
from training.learning.checks import checked_budgets, is_finished, record_arguments
from training.learning.collate import DrawByEpoch, Example, SceneCollator
from training.learning.features import FeatureCache, held_in
from training.learning.smolvlm import build_features
from training.learning.trainer import clear_about_full_disk, last_checkpoint
from training.stages.command_line import run
from training.stages.files import write_json
from training.stages.recipes import Stage


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
        default=None, metadata={"help": "Budgets; default: powers of two up to all."}
    )
    feature_cache: str | None = field(default=None, metadata={"help": "Folder for features of frozen towers."})
    shared_qformer: bool = field(default=False, metadata={"help": "Ablation: one Q-Former for all cameras."})
    keep_frozen: str | None = field(default=None, metadata={"help": "Ablation: pattern of weights not to train."})
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
    return checked_budgets(args.num_queries, config)


class Parts(NamedTuple):
    """Who learns, from whom, at which budgets."""

    student: PreTrainedModel
    processor: Any
    teacher: Teacher
    budgets: list[int]


class Caches(NamedTuple):
    """Features of the teacher's tower and of the student's, where they are not computed live."""

    teacher: FeatureCache | None
    student: FeatureCache | None


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
    """Transfer; returns the folder of the final checkpoint.

    Raises:
        ValueError: before the first step, for settings that fit neither each other nor checkpoints and data.
        FloatingPointError: the loss or a weight is not finite; the last checkpoint stays.
        OSError: the disk is full; the last checkpoint stays.
    """
    output_dir = Path(config.output_dir)
    final, metrics_file = output_dir / "final", output_dir / "transfer_metrics.json"
    rows, eval_rows = load_rows(args.data, args.split), load_rows(args.eval_data or args.data, args.eval_split)
    held_out_hash = {"held_out_split_hash": eval_rows.split_hash}
    if is_finished(final, args, config, rows, **held_out_hash):
        return final
    note = started_note("transfer", args, config, rows, [args.student, args.teacher], **held_out_hash)

    parts = load_parts(args, config)
    train = frames_of(rows, parts.student.config.cameras)
    held_out = spread(frames_of(eval_rows, parts.student.config.cameras), args.eval_frames)
    sample = spread(train, args.statistics_frames)
    caches = make_caches(args, config, parts, [*train, *held_out])
    trainer = make_trainer(args, config, parts, caches, train, held_out, sample)

    checkpoint = last_checkpoint(output_dir)
    record_arguments(args, config, rows, **held_out_hash)
    if checkpoint and metrics_file.exists():
        start = json.loads(metrics_file.read_text(encoding="utf-8"))["start"]
    else:
        start = trainer.evaluate(metric_key_prefix="held_out")
    note |= {
        "frames": {"train": len(train), "held_out": len(held_out), "statistics": len(sample)},
        "teacher": parts.teacher.fingerprint(),
        "r2_against": "training mean of the same camera, place and channel",
        "start": start,
    }
    with clear_about_full_disk(output_dir):
        if trainer.is_world_process_zero():
            write_json(metrics_file, {name: value for name, value in note.items() if name != "history"})
        result = trainer.train(resume_from_checkpoint=checkpoint)
        end = trainer.evaluate(metric_key_prefix="held_out")
        note |= {"end": end, "steps": trainer.state.global_step, "train_loss": result.training_loss}
        if trainer.is_world_process_zero():
            write_json(metrics_file, {name: value for name, value in note.items() if name != "history"})
            save_whole(final, parts.student.cpu(), parts.processor, note=note)
            print(json.dumps({"final": str(final), "start": start, "end": end}))
    return final


def load_parts(args: TransferArguments, config: TrainingArguments) -> Parts:
    """Student, with what shall train, and teacher, on the device."""
    student = load_strictly(args.student, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(args.student)
    teacher = Teacher(args.teacher, student.config.connector, torch.bfloat16 if config.bf16 else torch.float32)
    teacher.model.to(config.device)
    budgets = check_arguments(args, student, teacher)
    student.requires_grad_(False)
    student.model.vision_tower.requires_grad_(args.train_tower)
    student.model.multi_modal_projector.requires_grad_(True)
    if not teacher.gives_tokens:
        student.model.multi_modal_projector.connector.requires_grad_(False)  # the features are compared before it
    return Parts(student, processor, teacher, budgets)


def make_caches(args: TransferArguments, config: TrainingArguments, parts: Parts, examples: list[Example]) -> Caches:
    """Features of all images, if the run keeps any: of the teacher's tower, and of the student's if it is frozen."""
    if not args.feature_cache:
        return Caches(None, None)
    student, processor, teacher, _ = parts
    paths = [path for example in examples for path in example["images"].values()]
    folder, size = Path(args.feature_cache), config.per_device_eval_batch_size
    with config.main_process_first(desc="feature cache"):
        teachers = build_features(teacher.model, teacher.image_processor, paths, folder / "teacher", batch_size=size)
        if args.train_tower:
            return Caches(teachers, None)
        student.to(config.device)
        with held_in(torch.bfloat16 if config.bf16 else torch.float32, student.model.vision_tower):
            students = FeatureCache.build(student, processor, paths, folder / "student", batch_size=size)
    return Caches(teachers, students)


def make_trainer(
    args: TransferArguments,
    config: TrainingArguments,
    parts: Parts,
    caches: Caches,
    train: list[Example],
    held_out: list[Example],
    sample: list[Example],
) -> TransferTrainer:
    """The trainer, with targets measured on `sample`."""
    student, processor, teacher, budgets = parts
    scenes = SceneCollator(processor, num_queries=budgets, features=caches.student, seed=config.seed)
    largest = SceneCollator(processor, num_queries=budgets[-1], features=caches.student)
    eval_collator = TransferCollator(largest, teacher, caches.teacher)
    targets = measured_targets(teacher, student, sample, eval_collator, config.per_device_eval_batch_size)
    if teacher.gives_tokens:  # the student's tokens start as long as the teacher's
        weight = student.model.multi_modal_projector.connector.scale_norm.weight.data
        weight.mul_(targets.scale / root_mean_square(weight))
    config.remove_unused_columns = False
    trainer = TransferTrainer(
        model=TransferModel(student, targets),
        args=config,
        data_collator=TransferCollator(scenes, teacher, caches.teacher),
        train_dataset=train,
        eval_dataset=held_out,
        teacher=teacher,
        eval_collator=eval_collator,
        budgets=budgets,
        callbacks=[JsonlCallback(Path(config.output_dir) / "metrics.jsonl"), DrawByEpoch(scenes)],
    )
    ablate(trainer, args.shared_qformer, args.keep_frozen)
    return trainer


if __name__ == "__main__":
    run(main, TransferArguments, TrainingArguments, parser=TrlParser)
