"""Camera attention: while a model writes an answer, some of its heads look at the camera that the question names.

A model that is trained on answers alone matches what is asked with what any camera shows, and the loss of balanced
questions then stays at chance; told once where to look, it learns to look there within a hundred steps. What it is
told comes from the question's words (`Rig.named_in`), never from the answer: −log of the attention that falls on the
visual tokens of the named cameras, at the positions that predict the answer, for some heads of one layer.

The layer's queries and keys are taken where transformers' attention interface hands them over, rotated and normalised,
so it works for any language model with that interface, and no map of attention is ever held.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "smoldriver_watched"
TOKEN_CAMERAS, ASKED_CAMERAS = "token_cameras", "asked_cameras"
"""Of a batch, (batch, sequence) each: the bit of the camera whose visual token stands there, and the bits of the
cameras that the question names where its answer is predicted; 0 elsewhere."""


@dataclass
class _Seen:
    """What a watched layer last worked on: queries and keys (batch, heads, sequence, head_dim), mask, scale."""

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    scaling: float


_WATCHED: "WeakKeyDictionary[nn.Module, _Seen | None]" = WeakKeyDictionary()


def watched_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA that remembers what a watched layer's queries and keys were."""
    if module in _WATCHED:
        _WATCHED[module] = _Seen(query, key, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, watched_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class CameraAttention:
    """Watches one layer of a language model and tells how little its heads look where a question points.

    Args:
        model: holds the language model.
        layer: counted from 0; None is the middle one.
        heads: of that layer; None is the first half.

    Raises:
        ValueError: no such layer or heads, or an attention other than transformers' sdpa.
    """

    def __init__(self, model: PreTrainedModel, layer: int | None = None, heads: Sequence[int] | None = None):
        config = model.config.get_text_config()
        if config._attn_implementation not in ("sdpa", ATTENTION):
            raise ValueError(
                f"camera attention is supervised under attn_implementation 'sdpa'; the language model has "
                f"{config._attn_implementation!r}"
            )
        layers, count = config.num_hidden_layers, config.num_attention_heads
        layer = layers // 2 if layer is None else layer
        self.heads = list(range(math.ceil(count / 2))) if heads is None else list(heads)
        if not 0 <= layer < layers or not self.heads or not set(self.heads) <= set(range(count)):
            raise ValueError(
                f"camera attention asks layer {layer}, heads {self.heads}; the language model has {layers} layers of "
                f"{count} heads"
            )
        self.module = _attention_of(model, layer)
        _WATCHED[self.module] = None
        config._attn_implementation = ATTENTION

    def loss(self, token_cameras: torch.Tensor, asked_cameras: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Of the last forward pass: the mean of −log(attention on the named cameras), and the share of it.

        Args:
            token_cameras: (batch, sequence), see `TOKEN_CAMERAS`.
            asked_cameras: (batch, sequence), see `ASKED_CAMERAS`.

        Returns:
            The loss, 0 where no question names a camera that is shown; and the mean attention on the right tokens,
            not a number there.

        Raises:
            RuntimeError: the layer was not called through the attention interface.
        """
        seen = _WATCHED[self.module]
        if seen is None:
            raise RuntimeError(
                f"{type(self.module).__name__} was not called through transformers' attention interface: its camera "
                "attention cannot be supervised"
            )
        _WATCHED[self.module] = None  # a graph is not kept beyond its step
        groups = seen.query.shape[1] // seen.key.shape[1]
        losses = []
        for row in range(len(token_cameras)):
            right = (token_cameras[row][None] & asked_cameras[row][:, None]) != 0  # (asking, seen)
            positions = right.any(1).nonzero()[:, 0]
            if not len(positions):
                continue
            query = seen.query[row, self.heads][:, positions].float()  # (heads, positions, head_dim)
            key = seen.key[row, [head // groups for head in self.heads]].float()  # (heads, sequence, head_dim)
            scores = query @ key.transpose(1, 2) * seen.scaling  # (heads, positions, sequence)
            scores = scores + _hidden(seen.mask, row, positions, scores.shape[-1])
            wanted = scores.masked_fill(~right[positions], -torch.inf)
            losses.append((scores.logsumexp(-1) - wanted.logsumexp(-1)).flatten())
        if not losses:
            return seen.query.sum() * 0.0, math.nan
        every = torch.cat(losses)
        return every.mean(), torch.exp(-every.detach()).mean().item()


def _attention_of(model: PreTrainedModel, layer: int) -> nn.Module:
    """The attention module of a layer: the one inside the language model that says it is that layer's.

    Raises:
        ValueError: there is not exactly one.
    """
    decoder = model.get_decoder()
    found = [
        module
        for module in decoder.modules()
        if vars(module).get("layer_idx") == layer and vars(module).get("is_causal") is True
    ]
    if len(found) != 1:
        raise ValueError(
            f"{type(decoder).__name__} has {len(found)} causal attention modules in layer {layer}; camera attention "
            "needs a language model with one"
        )
    return found[0]


def _hidden(mask: torch.Tensor | None, row: int, positions: torch.Tensor, length: int) -> torch.Tensor:
    """0 where a position sees, −inf where not, (positions, sequence)."""
    if mask is None:  # sdpa's own causal mask
        columns = torch.arange(length, device=positions.device)
        return torch.zeros(len(positions), length, device=positions.device).masked_fill(
            columns[None] > positions[:, None], -torch.inf
        )
    shown = mask[row if len(mask) > 1 else 0, 0][positions, :length]
    if shown.dtype != torch.bool:
        return shown.float()
    return torch.zeros(shown.shape, device=shown.device).masked_fill(~shown, -torch.inf)
