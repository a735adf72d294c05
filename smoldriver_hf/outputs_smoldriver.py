"""What the model returns."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast


@dataclass
class SmolDriverVisionOutput(BaseModelOutputWithPooling):
    """What `get_image_features` returns.

    Attributes:
        last_hidden_state: (images, tokens, vision_hidden), the tower's output; None for precomputed features.
        pooler_output: (images, tokens per camera, text_hidden), the visual tokens; where the budget names
            cameras, a list with (tokens, text_hidden) of each image.
        hidden_states, attentions: the tower's, when asked for.
        qformer_attentions: (images, heads, queries, patches), where each query looked; with `output_attentions=True`.
    """

    qformer_attentions: torch.FloatTensor | None = None


@dataclass
class SmolDriverModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `SmolDriverModel`; `image_hidden_states` are the visual tokens (images, tokens, text_hidden), or
    (tokens of all images, text_hidden) where budgets differ."""

    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class SmolDriverCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output with logits; `loss` is the mean next-token loss over the labels that are not -100."""

    image_hidden_states: torch.FloatTensor | None = None


__all__ = ["SmolDriverCausalLMOutputWithPast", "SmolDriverModelOutputWithPast", "SmolDriverVisionOutput"]
