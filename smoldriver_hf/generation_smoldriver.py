"""`generate` with images: when they are encoded, how they are repeated, and what an answer never holds."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationMixin

from .outputs_smoldriver import SmolDriverVisionOutput
from .placeholders_smoldriver import images_of_rows, tokens_of_images

# Inputs that belong to the prompt: once it is in the cache they must not be encoded again.
IMAGE_INPUTS = ("pixel_values", "vision_features", "camera_ids", "mm_encoder_outputs")


def repeated(images: Any, order: torch.Tensor) -> Any:
    """Images, or what the model made of them under `mm_encoder_outputs`, picked by `order`."""
    if torch.is_tensor(images):
        return images[order.to(images.device)]
    if isinstance(images, Mapping) and "image" in images:
        tokens = images["image"].pooler_output
        picked = tokens[order.to(tokens.device)] if torch.is_tensor(tokens) else [tokens[i] for i in order.tolist()]
        return {**images, "image": SmolDriverVisionOutput(pooler_output=picked)}
    return images


class CameraGenerationMixin(GenerationMixin):
    """For a model with `get_placeholder_mask` in its base model and `image_token_id` in its config."""

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,  # named, or generate() refuses embeddings
        is_first_iteration: bool = False,
        use_cache: bool = True,
        **kwargs,
    ) -> dict[str, Any]:
        if use_cache and not is_first_iteration:
            kwargs = {key: value for key, value in kwargs.items() if key not in IMAGE_INPUTS}
        return super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )

    def _prepare_generation_config(self, generation_config=None, **kwargs):
        """See `GenerationMixin`. A placeholder is no part of an answer: it would stand for an image that nobody has.
        And the caller's `max_length` is not overridden by the checkpoint's `max_new_tokens`."""
        given = {} if generation_config is None else generation_config.to_dict()
        given |= {name: value for name, value in kwargs.items() if value is not None}
        ready, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if given.get("max_length") is not None and given.get("max_new_tokens") is None:
            ready.max_new_tokens = None
        if self.config.image_token_id is not None:
            ready.suppress_tokens = sorted({*(ready.suppress_tokens or ()), self.config.image_token_id})
        return ready, model_kwargs

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Images are encoded by the first forward pass: only there the prompt says at which budget."""
        return model_kwargs

    def _expand_inputs_for_generation(self, expand_size: int = 1, is_encoder_decoder: bool = False, **kwargs):
        """Repeat each row for beams or samples; its images, flat over the batch, are repeated as one group."""
        images = {key: kwargs.pop(key) for key in IMAGE_INPUTS if kwargs.get(key) is not None}
        if images and expand_size > 1:
            inputs_embeds = kwargs.get("inputs_embeds")
            input_ids = kwargs.get("input_ids") if inputs_embeds is None else None  # beside embeddings ids are empty
            placeholders = self.model.get_placeholder_mask(input_ids, inputs_embeds)
            if (camera_ids := images.get("camera_ids")) is not None:
                tokens_of_images(placeholders, len(camera_ids))  # or rows would be given what is not there
            counts = images_of_rows(placeholders)
            rows = torch.arange(sum(counts)).split(counts)
            order = torch.cat([row for row in rows for _ in range(expand_size)])
            images = {key: repeated(value, order) for key, value in images.items()}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, **kwargs)
        return input_ids, {**kwargs, **images}


__all__ = ["CameraGenerationMixin"]
