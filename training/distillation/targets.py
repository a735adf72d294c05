"""What the knowledge transfer regresses: the teacher's features in form, mean and scale of the student's outputs."""

from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from training.distillation.teacher import Teacher, pooling_weights, resampled
from training.distillation.trainer import TransferCollator
from training.learning.collate import Example


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
        return target if self.weights is None else target / root_mean_square(target)


def root_mean_square(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)


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
        features = teacher.seen(**collator.teacher_view(paths)).cpu()
        target = targets(features).double()
        total.index_add_(0, camera_ids, target)
        square += target.square().sum().item()
        norm += root_mean_square(targets.raw(features)).double().sum().item()
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
