"""The teacher of the knowledge transfer: a frozen SmolVLM or Idefics3, what it sees, and what the student shall make
of it.

The teacher looks at whole images, resized to its square, without tiles, as the SmolVLM-FT baseline does: so a place in
its grid and a place in the student's are the same place in the picture, and one cache of features serves both.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from smoldriver_hf import load_strictly
from smoldriver_hf.projector_smoldriver import grid_points, spread_points
from training.learning.features import image_settings, settings_of, weights_hash
from training.learning.smolvlm import load_image_processor, whole_pictures

MODEL_TYPES = ("idefics3", "smolvlm")


class Teacher:
    """A frozen vision-language model of SmolVLM's kind, asked for features or visual tokens.

    Args:
        folder: checkpoint, folder or Hub id.
        connector: the student's. With "pixel_shuffle" features are those of the tower's patches, (images, patches,
            vision_hidden), with "linear" they are its connector's tokens, (images, tokens, text_hidden).
        dtype: of its weights.

    Raises:
        ValueError: the checkpoint is of another architecture.
    """

    def __init__(self, folder: str, connector: str, dtype: torch.dtype = torch.float32):
        self.folder = folder
        self.model = load_strictly(folder, dtype=dtype).eval().requires_grad_(False)
        config = self.model.config
        if config.model_type not in MODEL_TYPES:
            raise ValueError(f"a teacher's architecture is one of {MODEL_TYPES}; {folder} is {config.model_type!r}")
        size, patch = config.vision_config.image_size, config.vision_config.patch_size
        self.patches = (size // patch, size // patch)
        self.gives_tokens = connector == "linear"
        side = size // patch // config.scale_factor if self.gives_tokens else size // patch
        self.grid = (side, side)
        self.width = config.text_config.hidden_size if self.gives_tokens else config.vision_config.hidden_size
        self.image_processor = load_image_processor(folder)

    def pixels(self, paths: Sequence[str]) -> torch.Tensor:
        """Image files → (images, 3, height, width)."""
        return whole_pictures(self.image_processor, paths)

    @torch.no_grad()
    def seen(self, pixel_values: torch.Tensor | None = None, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """What the teacher makes of images, (images, places, width).

        Args:
            pixel_values: (images, 3, height, width).
            hidden: in their place what its tower puts out, (images, patches, vision_hidden).

        Raises:
            ValueError: neither is given.
        """
        if hidden is None:
            if pixel_values is None:
                raise ValueError("a teacher is shown pixel_values or hidden; got neither")
            pixels = pixel_values.to(self.model.device, self.model.dtype)
            hidden = self.model.model.vision_model(pixel_values=pixels).last_hidden_state
        hidden = hidden.to(self.model.device, self.model.dtype)
        hidden = hidden[:, hidden.shape[1] - self.patches[0] * self.patches[1] :]  # a class token comes first
        return self.model.model.connector(hidden) if self.gives_tokens else hidden

    def fingerprint(self) -> dict[str, Any]:
        """What the features depend on."""
        inner = self.model.model
        return {
            "teacher_weights": weights_hash(nn.ModuleList([inner.vision_model, inner.connector])),
            "teacher": settings_of(self.model.config.vision_config),
            "features": "connector tokens" if self.gives_tokens else "patches",
            "image_processor": image_settings(self.image_processor),
        }


def resampled(features: torch.Tensor, grid: tuple[int, int], side: int) -> torch.Tensor:
    """A grid of features at other places: (images, rows · columns, width) → (images, side², width)."""
    if grid == (side, side):
        return features
    picture = features.transpose(1, 2).unflatten(-1, grid).float()  # (images, width, rows, columns)
    picture = nn.functional.interpolate(picture, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return picture.flatten(2).transpose(1, 2)


def pooling_weights(count: int, grid: tuple[int, int]) -> torch.Tensor:
    """Which of the teacher's tokens each query of a nested student shall sum up, (count, rows · columns), rows sum to
    1.

    A query's output does not change when more queries join in, so its target must not depend on the budget either.
    Query i is used together with queries 1…i at least, which share the image among them: its target is the mean of the
    teacher's tokens in its share at that moment, the soft Voronoi cell of its place among the first i places (softmax
    of squared distances over the variance 1/12i of a square cell). So the first token sums up the whole image, and
    later ones ever smaller parts; every budget covers the image; and all targets are averages of tokens that the
    language model knows how to read. A learnt read-out that reconstructs the teacher's grid would also fit the
    nesting, but tokens in the basis that suits it best (signed spatial components) are none that the language model
    knows, and the read-out is not there when it reads.
    """
    points = spread_points(count).double()
    cells = grid_points(*grid).double()
    distances = (cells[:, None] - points[None]).square().sum(-1)  # (cells, count)
    rows = [(-6.0 * (i + 1) * distances[:, : i + 1]).softmax(dim=1)[:, i] for i in range(count)]
    weights = torch.stack(rows)
    return (weights / weights.sum(1, keepdim=True)).float()
