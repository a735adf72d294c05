"""A vLLM plugin (entry point `vllm.general_plugins`): which camera took an image is a part of what the image is.

vLLM knows an image by its content, keeps what its processor made of it, and calls the processor for the images that
it does not know yet, without the prompt around them. SmolDriver has one Q-Former per camera, so a picture that comes
again from another camera, or images of which some are known, would be given to the wrong ones without an error. This
plugin reads each image's camera from the label in front of its placeholder (`CAM_BACK: <image>`, as the chat template
writes), adds it to the image's hash, and names it to the processor.

Copied by `serve` into a folder on vLLM's path: it imports vLLM and nothing of this project. Written for vLLM 0.32.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

MODEL_TYPE = "smoldriver"
LABEL = r"(\w+): (?:<fake_token_around_image><global-img>)?$"  # what the chat template writes before a placeholder
OPTION = "smoldriver_cameras"  # travels with the processor's options inside vLLM, and never leaves it


def cameras_of(prompt: Sequence[int], tokenizer: Any, processor: Any) -> list[str]:
    """The camera of each image placeholder in tokenized `prompt`, by its label, or by order where none has one.

    Raises:
        ValueError: only some placeholders have a label, a camera comes twice, or there are more images than cameras.
    """
    labels, start = [], 0
    for position, token in enumerate(prompt):
        if token == processor.image_token_id:
            found = re.search(LABEL, tokenizer.decode(list(prompt[start:position])))
            labels.append(found.group(1) if found and found.group(1) in processor.cameras else None)
            start = position + 1
    if all(label is None for label in labels):
        if len(labels) > len(processor.cameras):
            raise ValueError(f"expected at most one image for each of {processor.cameras}; got {len(labels)}")
        return list(processor.cameras[: len(labels)])
    if None in labels or len(set(labels)) != len(labels):
        raise ValueError(f"each image needs a camera of its own; the prompt names {labels}")
    return [str(label) for label in labels]


def without_option(options: Mapping[str, object]) -> dict[str, object]:
    """Processor options as the caller gave them."""
    return {name: value for name, value in options.items() if name != OPTION}


class SmolDriverMultiModalProcessor(MultiModalProcessor):
    """vLLM's processor for transformers models, which for SmolDriver tells cameras apart."""

    def _cameras(self, inputs: Any) -> list[str]:
        """The camera of each image of a request; empty for other models and for prompts without images."""
        if self.info.get_hf_config().model_type != MODEL_TYPE or not inputs.mm_data_items.get_all_counts().get(
            "image"
        ):
            return []
        return cameras_of(inputs.prompt, self.info.get_tokenizer(), self.info.get_hf_processor())

    def _get_mm_hashes(self, inputs: Any) -> Any:
        hashes = super()._get_mm_hashes(
            replace(inputs, hf_processor_mm_kwargs=without_option(inputs.hf_processor_mm_kwargs))
        )
        if cameras := self._cameras(inputs):
            named = zip(hashes["image"], cameras, strict=True)
            hashes = {**hashes, "image": [f"{image}-{camera}" for image, camera in named]}
        return hashes

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Mapping[str, object]:
        options = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)
        if cameras := self._cameras(inputs):
            cached = zip(cameras, mm_is_cached["image"], strict=True)
            options = {**options, OPTION: [camera for camera, known in cached if not known]}
        return options

    def _apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        """The way without a cache: all images of the request at once."""
        if cameras := self._cameras(inputs):
            inputs = replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, OPTION: cameras})
        return super()._apply_hf_processor(inputs, timing_ctx)

    def _get_hf_mm_inputs(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        cameras: Any = hf_kwargs.get(OPTION)
        hf_inputs = super()._get_hf_mm_inputs(mm_items, without_option(hf_kwargs))
        if cameras and hf_inputs.hf_data.get("images"):
            token = self.info.get_hf_processor().image_token
            hf_inputs.hf_data["text"] = "\n".join(f"{camera}: {token}" for camera in cameras)
        return hf_inputs

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Any:
        return super()._get_prompt_updates(mm_items, without_option(hf_processor_mm_kwargs), out_mm_kwargs)


def register() -> None:
    """Called by vLLM in each of its processes."""
    MULTIMODAL_REGISTRY.register_processor(
        SmolDriverMultiModalProcessor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
    )(TransformersMultiModalForCausalLM)
