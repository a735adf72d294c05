"""Batches and the Trainer of the knowledge transfer: every batch carries the teacher's view of its images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from training.data.rows import Rows
from training.distillation.teacher import Teacher
from training.learning.collate import Example, SceneCollator
from training.learning.trainer import WholeCheckpoints


class TransferCollator:
    """Frames → the student's images, a budget, and the teacher's pixels or features.

    Args:
        scenes: collator of the student; its budgets and epoch are used.
        teacher: the teacher.
        features: what the teacher's tower puts out, cached, in place of its pixels.
    """

    def __init__(self, scenes: SceneCollator, teacher: Teacher, features: Mapping[str, torch.Tensor] | None = None):
        self.scenes = scenes
        self.teacher = teacher
        self.features = features

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        shown = [self.scenes.shown(example) for example in examples]
        num_queries = self.scenes.draw_budget(examples)
        return {
            **self.scenes.vision(examples, num_queries),
            "num_queries": num_queries,
            "images_per_frame": torch.tensor([len(scene) for scene in shown]),
            "teacher_view": self.teacher_view([path for scene in shown for path in scene.values()]),
        }

    def teacher_view(self, paths: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the teacher is shown of images: what its tower made of them where that is cached, else pixels."""
        if self.features is None:
            return {"pixel_values": self.teacher.pixels(paths)}
        return {"hidden": torch.stack([self.features[path] for path in paths])}


class TransferTrainer(WholeCheckpoints):
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
        student = {name: value for name, value in inputs.items() if name not in ("teacher_view", "images_per_frame")}
        student["target"] = targets(self.teacher.seen(**inputs["teacher_view"]))
        return super().compute_loss(model, student, return_outputs, num_items_in_batch)

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


def frames_of(rows: Rows, cameras: Sequence[str]) -> list[Example]:
    """One example without questions per frame that has an image of the cameras."""
    examples: list[Example] = []
    for frame, _ in rows.frames():
        images = {camera: frame["images"][camera] for camera in cameras if camera in frame["images"]}
        if images:
            examples.append({"images": images, "pairs": []})
    if not examples:
        raise ValueError(f"{rows.path} split {rows.split!r} has no frame with images of {list(cameras)}")
    return examples


def spread(items: list[Example], count: int | None) -> list[Example]:
    """Up to `count` items, evenly over the list."""
    if count is None or count >= len(items):
        return items
    return [items[i * len(items) // count] for i in range(count)]
