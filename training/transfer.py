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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, Trainer, TrainingArguments
from trl import TrlParser

import smoldriver_hf  # noqa: F401  registers the architecture
from training.ablations import ablate
from training.assemble import save_whole
from training.baseline import build_features
from training.callbacks import JsonlCallback, ProgressBar
from training.collate import IGNORED, DrawBudgetsByEpoch, Example, SceneCollator
from training.features import FeatureCache
from training.rows import Rows, load_rows
from training.teacher import Teacher, TeacherPrompts, pooling_weights, resampled

FROZEN_PARTS = ("student.model.language_model.", "student.lm_head.")


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


@dataclass(frozen=True)
class Targets:
    """How features of the teacher become what the student is to put out.

    Attributes:
        side: side of the square of queries (pixel_shuffle), or None.
        grid: of the teacher's features.
        weights: (queries, places) of the averages (linear), or None.
        mean: (cameras, queries, width), training mean of the target.
        variance: mean square of a target's distance from that mean.
        scale: what the student's output is divided by: the teacher's token norm, which is not part of the target,
            because the student's tokens all have the norm that its connector's RMSNorm has learnt.
    """

    side: int | None
    grid: tuple[int, int]
    weights: torch.Tensor | None
    mean: torch.Tensor | None = None
    variance: float = 1.0
    scale: float = 1.0

    def raw(self, features: torch.Tensor) -> torch.Tensor:
        """(images, places, width) → (images, queries, width)."""
        if self.weights is not None:
            return self.weights.to(features.device) @ features.float()
        assert self.side is not None
        return resampled(features.float(), self.grid, self.side)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        target = self.raw(features)
        return target if self.weights is None else target / _rms(target)


def _rms(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)


class TransferModel(nn.Module):
    """The student with the transfer's loss as its output, so that data-parallel wrappers see one forward."""

    def __init__(self, student: PreTrainedModel, targets: Targets, answer_distillation: float):
        super().__init__()
        self.student = student
        self.targets = targets
        self.answer_distillation = answer_distillation
        self.register_state_dict_post_hook(_without_language_model)
        self.register_load_state_dict_post_hook(_language_model_is_not_missing)

    def outputs(self, camera_ids: torch.Tensor, num_queries: int, **vision) -> torch.Tensor:
        """What is compared with the target, (images, queries, width), in the order of the images."""
        with self._query_outputs(camera_ids) as seen:
            tokens = self.student.get_image_features(
                camera_ids=camera_ids, num_queries=num_queries, return_dict=True, **vision
            ).pooler_output
        return self._comparable(tokens, seen)

    @contextmanager
    def _query_outputs(self, camera_ids: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """Catches what the Q-Formers hand to the connector, back in the order of the images."""
        seen: list[torch.Tensor] = []
        order = camera_ids.argsort(stable=True).argsort()  # the projector groups images by camera
        connector = self.student.model.multi_modal_projector.connector
        handle = connector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][order]))
        try:
            yield seen
        finally:
            handle.remove()

    def _comparable(self, tokens: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
        return (tokens if self.targets.weights is not None else seen[-1]).float() / self.targets.scale

    def forward(
        self,
        camera_ids: torch.Tensor,
        target: torch.Tensor,
        num_queries: int,
        text: Mapping[str, torch.Tensor] | None = None,
        teacher_logits: torch.Tensor | None = None,
        **vision,
    ) -> dict[str, torch.Tensor]:
        """`loss`, and its parts `alignment` and, with text, `divergence`."""
        if text is None:
            output = self.outputs(camera_ids, num_queries, **vision)
        else:
            labels = text["labels"]
            with self._query_outputs(camera_ids) as seen:
                student = self.student(
                    input_ids=text["input_ids"], attention_mask=text["attention_mask"], camera_ids=camera_ids, **vision
                )
            output = self._comparable(student.image_hidden_states, seen)
        error = (output - target[:, : output.shape[1]]).square().mean()
        losses = {"alignment": error / self.targets.variance}
        losses["loss"] = losses["alignment"]
        if text is not None:
            logits = student.logits[:, :-1][labels[:, 1:] != IGNORED]  # (answer tokens, vocab)
            losses["divergence"] = divergence(logits, teacher_logits)
            losses["loss"] = losses["loss"] + self.answer_distillation * losses["divergence"]
        return losses


def _without_language_model(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: dict) -> None:
    """Checkpoints hold what can change; the language model is the student's own."""
    for name in [name for name in state if name.startswith(tuple(prefix + part for part in FROZEN_PARTS))]:
        del state[name]


def _language_model_is_not_missing(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if not any(part in name for part in FROZEN_PARTS)]


def divergence(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the student's from the teacher's distribution, mean over (tokens, vocab) rows.

    Vocabularies may be padded to different sizes; tokens that only one of them has are left out.
    """
    size = min(logits.shape[-1], teacher_logits.shape[-1])
    student = logits[..., :size].float().log_softmax(-1)
    teacher = teacher_logits[..., :size].float().log_softmax(-1)
    return nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean")


class TransferCollator:
    """Frames → the student's images, a budget, the teacher's pixels or features, and a question each if answers are
    distilled.

    Args:
        scenes: collator of the student; its budgets and epoch are used.
        teacher: the teacher.
        features: what the teacher's tower puts out, cached, in place of its pixels.
        prompts: the teacher's prompts, to distil answers.
    """

    def __init__(
        self,
        scenes: SceneCollator,
        teacher: Teacher,
        features: Mapping[str, torch.Tensor] | None = None,
        prompts: TeacherPrompts | None = None,
    ):
        self.scenes = scenes
        self.teacher = teacher
        self.features = features
        self.prompts = prompts

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        if self.prompts is not None:  # another question of the frame in every epoch
            epoch = self.scenes.epoch
            examples = [
                {**example, "pairs": [example["pairs"][epoch % len(example["pairs"])]]} for example in examples
            ]
        shown = [self.scenes.shown(example) for example in examples]
        paths = [path for scene in shown for path in scene.values()]
        num_queries = self.scenes.draw_budget(examples)
        batch: dict[str, Any] = {
            **self.scenes.vision(examples, num_queries),
            "num_queries": num_queries,
            "images_per_frame": torch.tensor([len(scene) for scene in shown]),
        }
        if self.features is None:
            batch["teacher_pixels"] = self.teacher.pixels(paths)
        else:
            batch["teacher_hidden"] = torch.stack([self.features[path] for path in paths])
        if self.prompts is not None:
            batch["text"] = self.scenes.text(examples, num_queries)
            labels = batch["text"]["labels"]
            batch["teacher_prompts"] = [
                self.prompts.ids(example["pairs"][0][0], len(scene))
                for example, scene in zip(examples, shown, strict=True)
            ]
            batch["answers"] = [row[row != IGNORED].tolist() for row in labels]
        return batch


class TransferTrainer(Trainer):
    """A Trainer whose batches get the teacher's view, and whose evaluation is held-out R² per budget."""

    def __init__(self, *args, teacher: Teacher, eval_collator: TransferCollator, budgets: list[int], **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self.eval_collator = eval_collator
        self.budgets = budgets
        self.model_accepts_loss_kwargs = False  # the loss is a mean over images, not over labels
        teacher.model.to(self.args.device)

    def _teacher_features(self, inputs: dict[str, Any]) -> torch.Tensor:
        if "teacher_hidden" in inputs:
            return self.teacher.features_of(inputs.pop("teacher_hidden"))
        return self.teacher.features(inputs.pop("teacher_pixels"))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        targets = self.accelerator.unwrap_model(model).targets
        features = self._teacher_features(inputs)
        inputs.pop("images_per_frame")
        if "text" in inputs:
            prompts, answers = inputs.pop("teacher_prompts"), inputs.pop("answers")
            inputs["teacher_logits"] = self.teacher.answer_logits(prompts, answers, features)
        losses = model(target=targets(features), **inputs)
        if not torch.isfinite(losses["loss"].detach()):
            raise FloatingPointError(
                f"the loss is {losses['loss'].item()} in step {self.state.global_step + 1}; checkpoints before "
                f"it stay in {self.args.output_dir}. Lower the learning rate or clip gradients (max_grad_norm)"
            )
        return (losses["loss"], losses) if return_outputs else losses["loss"]

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Held-out R² per budget, `{prefix}_r2_{budget}`, over all frames of the evaluation set."""
        model = self.accelerator.unwrap_model(self.model)
        targets, budgets = model.targets, torch.tensor(self.budgets, device=self.args.device) - 1
        loader = DataLoader(
            self.eval_dataset, batch_size=self.args.per_device_eval_batch_size, collate_fn=self.eval_collator
        )
        training, sums = model.training, []
        model.eval()
        bar = tqdm(self.accelerator.prepare(loader), desc="Held-out R²", disable=not self.is_world_process_zero())
        for batch in bar:
            inputs = self._prepare_inputs(batch)
            target = targets(self._teacher_features(inputs))
            frames = inputs.pop("images_per_frame").tolist()
            camera_ids = inputs["camera_ids"]
            output = model.outputs(**inputs)
            mean = targets.mean.to(target.device)[camera_ids]
            errors = torch.stack([(output - target).square(), (mean - target).square()])  # (2, images, queries, width)
            errors = errors.double().sum(-1).cumsum(-1)[..., budgets]  # (2, images, budgets)
            per_frame = torch.stack([part.sum(1) for part in errors.split(frames, dim=1)])  # (frames, 2, budgets)
            sums.append(self.accelerator.gather_for_metrics(per_frame).sum(0))
        model.train(training)
        model_error, mean_error = torch.stack(sums).sum(0).tolist()
        r2 = {
            f"{metric_key_prefix}_r2_{budget}": 1 - error / total
            for budget, error, total in zip(self.budgets, model_error, mean_error, strict=True)
        }
        self.log(dict(r2))  # which adds the epoch
        return r2


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


def frames_of(rows: Rows, cameras: Sequence[str], with_questions: bool) -> list[Example]:
    """One example per frame that has an image of the cameras (and a question to distil)."""
    examples: list[Example] = []
    for frame, questions in rows.frames():
        images = {camera: frame["images"][camera] for camera in cameras if camera in frame["images"]}
        pairs = [(row["question"], row["answer"]) for row in questions if row["answer"].strip()]
        if images and (pairs or not with_questions):
            examples.append({"images": images, "pairs": pairs if with_questions else []})
    if not examples:
        raise ValueError(f"{rows.path} split {rows.split!r} has no frame with images of {list(cameras)}")
    return examples


def spread(items: list[Example], count: int | None) -> list[Example]:
    """Up to `count` items, evenly over the list."""
    if count is None or count >= len(items):
        return items
    return [items[i * len(items) // count] for i in range(count)]


@torch.no_grad()
def measured_targets(
    teacher: Teacher, student: PreTrainedModel, examples: list[Example], collator: TransferCollator, batch_size: int
) -> Targets:
    """The target's form, and its mean per camera, variance and scale over training frames."""
    config = student.config
    side = None if teacher.gives_tokens else round(config.max_queries**0.5)
    weights = pooling_weights(config.max_queries, teacher.grid) if teacher.gives_tokens else None
    targets = Targets(side, teacher.grid, weights)

    shape = (len(config.cameras), config.max_queries, teacher.width)
    total, square, norm, counts = torch.zeros(shape, dtype=torch.double), 0.0, 0.0, torch.zeros(shape[0])
    for start in tqdm(range(0, len(examples), batch_size), desc="Teacher statistics", leave=False):
        scenes = [collator.scenes.shown(example) for example in examples[start : start + batch_size]]
        paths = [path for scene in scenes for path in scene.values()]
        camera_ids = torch.tensor([config.cameras.index(camera) for scene in scenes for camera in scene])
        if collator.features is None:
            features = teacher.features(teacher.pixels(paths)).cpu()
        else:
            features = teacher.features_of(torch.stack([collator.features[path] for path in paths])).cpu()
        target = targets(features).double()
        total.index_add_(0, camera_ids, target)
        square += target.square().sum().item()
        norm += _rms(targets.raw(features)).double().sum().item()
        counts += torch.bincount(camera_ids, minlength=shape[0])
    number = counts.sum()
    seen = (counts > 0)[:, None, None]
    means = torch.where(seen, total / counts.clamp(min=1)[:, None, None], total.sum(0) / number)
    explained = (means.square().sum((1, 2)) * counts).sum().item()
    variance = (square - explained) / (number.item() * shape[1] * shape[2])
    if not variance > 0:
        raise ValueError(f"the teacher's features do not vary over {len(examples)} frames; there is nothing to learn")
    scale = norm / (number.item() * shape[1]) if teacher.gives_tokens else 1.0
    return Targets(side, teacher.grid, weights, means.float(), variance, scale)


def main(args: TransferArguments, config: TrainingArguments) -> Path:
    """Transfer; returns the folder of the final checkpoint."""
    output_dir = Path(config.output_dir)
    final, metrics_file = output_dir / "final", output_dir / "transfer_metrics.json"
    if (final / "config.json").exists():
        print(f"{final} is finished")
        return final
    config.remove_unused_columns = False
    student = AutoModelForImageTextToText.from_pretrained(args.student, dtype=torch.float32)
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
        weight.mul_(targets.scale / _rms(weight))

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
