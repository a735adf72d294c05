"""A projector that writes words: what it should write of pictures, its loss, and how well it does.

For a SmolDriver's Q-Formers and for the connector of a SmolVLM or Idefics3.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from smoldriver_hf.projector_smoldriver import LinearConnector, MultiQFormerProjector
from training.data.contents import Contents
from training.learning.slots import WordTable, bags_of, length_of, tokens_of
from training.learning.statements import KINDS, certain_tokens, read_from, statements_about, truth_of

LENGTH_WEIGHT = 0.1
SCALE, BIAS = 8.0, -4.0  # from the cosine of token and words to the logit of a statement, at the start
RARE = 3  # nothing is told of a statement that fewer pictures make true, or false


class ShownFrame(NamedTuple):
    """A frame's pictures and what they show."""

    scene: str
    images: dict[str, str]  # camera → path
    contents: Contents


class Targets:
    """What visual tokens should say, in a language model's own words.

    Args:
        tokenizer: of the language model.
        embeddings: (vocabulary, hidden), its input embeddings; they do not change.
        contents: all frames that there are, for their words and classes.
        count: tokens of a camera.

    Raises:
        ValueError: the tokenizer cannot write a word.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, embeddings: torch.Tensor, contents: Sequence[Contents], count: int
    ):
        embeddings = embeddings.detach().float().cpu()
        self.table = WordTable(tokenizer, contents)
        self.vectors = self.table.vectors(embeddings)  # (words, hidden)
        self.length = float(length_of(embeddings))
        self.statements = statements_about(contents)
        self.count = count

    def of(self, contents: Contents, camera: str) -> dict[str, torch.Tensor]:
        """Of one picture: `targets` (tokens, hidden) and whether they are `certain` (tokens,); per statement whether
        it is `true` and whether that is `clear` (statements,)."""
        weights = self.table.weights(bags_of(contents, camera, self.count))
        true, clear = truth_of(self.statements, contents, camera)
        return {
            "targets": tokens_of(weights, self.vectors, self.length),
            "certain": torch.tensor(certain_tokens(contents, camera, self.count)),
            "true": torch.tensor(true),
            "clear": torch.tensor(clear),
        }

    def directions(self) -> torch.Tensor:
        """(statements, hidden): where the words of each statement point."""
        return tokens_of(self.table.weights([one.bag() for one in self.statements]), self.vectors, 1.0)


class PictureCollator:
    """Frames → a batch of all their pictures.

    Args:
        features: image path → (patches, vision_hidden).
        cameras: names, in the order of the ids that the projector knows.
        targets: what to write.
    """

    def __init__(self, features: Mapping[str, torch.Tensor], cameras: Sequence[str], targets: Targets):
        self.features = features
        self.cameras = list(cameras)
        self.targets = targets

    def __call__(self, frames: Iterable[ShownFrame]) -> dict[str, torch.Tensor]:
        """`features` (images, patches, vision_hidden), `camera_ids` (images,), and `Targets.of` each image."""
        shown = [(frame.contents, camera, path) for frame in frames for camera, path in frame.images.items()]
        wanted = [self.targets.of(contents, camera) for contents, camera, _ in shown]
        return {
            "features": torch.stack([self.features[path] for _, _, path in shown]).float(),
            "camera_ids": torch.tensor([self.cameras.index(camera) for _, camera, _ in shown]),
            **{name: torch.stack([one[name] for one in wanted]) for name in wanted[0]},
        }


class Writer(nn.Module):
    """A projector, and how it is read: what trains, with the loss as its output.

    Args:
        projector: a `MultiQFormerProjector`, or a connector that takes features alone.
        targets: what to write.
        num_queries: of each Q-Former.
        first_token_weight: of the first token, beside 1 of the others.
        noise: on features in training, in parts of their standard deviation.
    """

    def __init__(
        self, projector: nn.Module, targets: Targets, num_queries: int, first_token_weight: float, noise: float
    ):
        super().__init__()
        self.projector = projector
        self.num_queries = num_queries
        self.noise = noise
        weights = torch.ones(targets.count)
        weights[0] = first_token_weight
        told_by = read_from(targets.statements, targets.count)  # (tokens, statements)
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("told_by", told_by, persistent=False)
        self.register_buffer("directions", targets.directions(), persistent=False)
        self.scale = nn.Parameter(torch.full(told_by.shape, SCALE))
        self.bias = nn.Parameter(torch.full(told_by.shape, BIAS))

    def write(self, features: torch.Tensor, camera_ids: torch.Tensor) -> torch.Tensor:
        """Visual tokens, (images, tokens, text_hidden)."""
        if not isinstance(self.projector, MultiQFormerProjector):
            return self.projector(features).float()
        tokens, _ = self.projector(features, camera_ids, self.num_queries, self.projector.grid)
        return tokens.float()

    def forward(
        self,
        features: torch.Tensor,
        camera_ids: torch.Tensor,
        targets: torch.Tensor,
        certain: torch.Tensor,
        true: torch.Tensor,
        clear: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """See `PictureCollator`; beside `loss` also `cosine` (images, tokens) and `logits` (images, tokens,
        statements)."""
        if self.training and self.noise:
            features = features + self.noise * features.std() * torch.randn_like(features)
        tokens = self.write(features, camera_ids)
        cosine = F.cosine_similarity(tokens, targets, dim=-1)  # (images, tokens)
        length = (tokens.norm(dim=-1) / targets.norm(dim=-1) - 1).square()
        like = F.normalize(tokens, dim=-1) @ self.directions.T  # (images, tokens, statements)
        logits = self.scale * like.float() + self.bias
        wrong = F.binary_cross_entropy_with_logits(
            logits, true.to(logits)[:, None].expand_as(logits), reduction="none"
        )
        loss = mean_over(1 - cosine + LENGTH_WEIGHT * length, certain * self.weights)
        loss = loss + mean_over(wrong, clear[:, None] * self.told_by * self.weights[:, None])
        return {"loss": loss, "cosine": cosine, "logits": logits}


def mean_over(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted mean; 0 where nothing counts."""
    return (values * weights).sum() / weights.sum().clamp(min=1e-6)


@torch.no_grad()
def as_long_as_words(projector: nn.Module, tokens: torch.Tensor, length: float) -> None:
    """Scale a projector so that its tokens (…, text_hidden) are on average as long as a word.

    A linear connector on thousands of inputs makes them a hundred times as long, and then no rate teaches it.
    """
    last = projector
    if isinstance(projector, MultiQFormerProjector):
        last = projector.connector
        if isinstance(last, LinearConnector):  # of the others the only layer is linear
            last = last.scale_norm
    ratio = length / tokens.norm(dim=-1).mean()
    for weight in last.parameters():
        weight.mul_(ratio)


@torch.no_grad()
def measured(
    writer: Writer, collate: PictureCollator, frames: Sequence[ShownFrame], budgets: Sequence[int], batch_size: int
) -> dict[str, Any]:
    """How well frames are written: the mean cosine of each token with its target, and per budget (in tokens) the mean
    area under the curve of statements of each kind, read off all tokens of the budget that tell it.

    None where there is nothing to tell: no token is certain, or no statement is both true and false of three pictures.
    """
    writer.eval()
    batches = []
    for start in range(0, len(frames), batch_size):
        batch = {
            name: value.to(writer.weights.device)
            for name, value in collate(frames[start : start + batch_size]).items()
        }
        out = writer(**batch)
        read = out["logits"] * writer.told_by
        sums = [read[:, :budget].sum(1) / writer.told_by[:budget].sum(0) for budget in budgets]  # (images, statements)
        batches.append((out["cosine"], batch["certain"], torch.stack(sums), batch["true"], batch["clear"]))
    columns = list(zip(*batches, strict=True))
    cosine, certain, true, clear = (torch.cat(columns[place]).cpu() for place in (0, 1, 3, 4))
    scores = torch.cat(columns[2], dim=1).cpu()  # (budgets, images, statements)
    kinds = [one.kind for one in collate.targets.statements]
    mean = (cosine * certain).sum(0) / certain.sum(0)
    return {
        "frames": len(frames),
        "cosine": [
            round(value, 4) if count else None for value, count in zip(mean.tolist(), certain.sum(0), strict=True)
        ],
        "area_under_curve": {
            str(budget): areas(score, true, clear, kinds) for budget, score in zip(budgets, scores, strict=True)
        },
    }


def areas(
    scores: torch.Tensor, true: torch.Tensor, clear: torch.Tensor, kinds: Sequence[str]
) -> dict[str, float | None]:
    """{kind: mean over its statements of the chance that a picture of which one is true scores higher than another}.

    Args:
        scores: (pictures, statements)
        true: (pictures, statements)
        clear: (pictures, statements), what counts.
        kinds: (statements,)
    """
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for column, kind in enumerate(kinds):
        counts = clear[:, column]
        score, label = scores[counts, column], true[counts, column]
        if RARE <= label.sum() <= len(label) - RARE:
            found[kind].append(float(roc_auc_score(label.numpy(), score.numpy())))
    return {kind: round(sum(values) / len(values), 4) if values else None for kind, values in found.items()}
