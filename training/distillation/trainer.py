"""Batches and the Trainer of the knowledge transfer: every batch carries the teacher's view of its images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer

from training.data.rows import Rows
from training.distillation.teacher import Teacher, TeacherPrompts
from training.learning.collate import IGNORED, Example, SceneCollator


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
            "teacher_view": self.teacher_view(paths),
        }
        if self.prompts is not None:
            batch["text"] = self.scenes.text(examples, num_queries)
            labels = batch["text"]["labels"]
            batch["teacher_prompts"] = [
                self.prompts.ids(example["pairs"][0][0], len(scene))
                for example, scene in zip(examples, shown, strict=True)
            ]
            batch["answers"] = [row[row != IGNORED].tolist() for row in labels]
        return batch

    def teacher_view(self, paths: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the teacher is shown of images: what its tower made of them where that is cached, else pixels."""
        if self.features is None:
            return {"pixel_values": self.teacher.pixels(paths)}
        return {"hidden": torch.stack([self.features[path] for path in paths])}


class TransferTrainer(Trainer):
    """A Trainer whose batches get the teacher's view, and whose evaluation is held-out R² per budget."""

    def __init__(self, *args, teacher: Teacher, eval_collator: TransferCollator, budgets: list[int], **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self.eval_collator = eval_collator
        self.budgets = budgets
        self.model_accepts_loss_kwargs = False  # the loss is a mean over images, not over labels
        teacher.model.to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        targets = self.accelerator.unwrap_model(model).targets
        features = self.teacher.seen(**inputs.pop("teacher_view"))
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
            target = targets(self.teacher.seen(**inputs.pop("teacher_view")))
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
