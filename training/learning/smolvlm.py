"""The SmolVLM-FT baseline: transformers' own SmolVLM or Idefics3 on the same rows and prompts as SmolDriver.

    processor = load_processor("HuggingFaceTB/SmolVLM2-256M-Video-Instruct", cameras, image_splitting=False)
    collator = BaselineCollator(SceneView(processor, cameras))

`SmolVLMProcessor` needs torchvision for videos; `Idefics3Processor` with the PIL image processor is its image path.
The prompt is SmolDriver's: the chat template names each camera before its image and breaks up control tokens in what a
user writes. It is saved with the processor, so `AutoProcessor` of a fine-tuned checkpoint writes it too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image, ImageOps
from torch import nn
from transformers import AutoConfig, AutoTokenizer, Idefics3Processor, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from smoldriver_hf import CameraPrompts, chat_template_for
from training.learning.collate import EncodedFrame, Example, PackedSceneCollator, SceneCollator
from training.learning.features import FeatureCache, evaluating, vision_fingerprint, write_features


def load_processor(
    checkpoint: str, cameras: Sequence[str], image_splitting: bool = False, longest_edge: int | None = None
) -> Idefics3Processor:
    """Processor of a SmolVLM or Idefics3 checkpoint, with SmolDriver's chat template.

    Args:
        checkpoint: folder or Hub id.
        cameras: names that prompts may use.
        image_splitting: cut each image into tiles of the tower's size, as SmolVLM ships; without it an image is one
            tile, the size of the tower's input.
        longest_edge: pixels to which the longer side is resized before cutting; default: the checkpoint's, or two
            tiles where nothing is cut, so that the shorter side of a 16:9 picture fills its square too.

    Raises:
        ValueError: a tokenizer that was not made for images.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    vision = config.vision_config
    image_processor = load_image_processor(checkpoint, image_splitting, longest_edge)
    # For generation, and said here to be saved; collators pad on the right themselves.
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    tokens_per_tile = (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2
    processor = Idefics3Processor(image_processor, tokenizer, image_seq_len=tokens_per_tile)
    if len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"the tokenizer of {checkpoint} has {len(tokenizer)} tokens with those for images, the language model "
            f"{config.text_config.vocab_size}: it was not made for images"
        )
    if processor.image_token_id != config.image_token_id:
        raise ValueError(
            f"{checkpoint}: the tokenizer's {processor.image_token} is {processor.image_token_id}, "
            f"config.image_token_id is {config.image_token_id}"
        )
    processor.chat_template = chat_template_for(tokenizer, list(cameras), processor.image_token, framed=False)
    return processor


def load_image_processor(
    checkpoint: str, image_splitting: bool = False, longest_edge: int | None = None
) -> Idefics3ImageProcessorPil:
    """What a SmolVLM or Idefics3 checkpoint is shown of a picture; arguments as of `load_processor`."""
    side = AutoConfig.from_pretrained(checkpoint).vision_config.image_size
    if longest_edge is None and not image_splitting:
        longest_edge = 2 * side
    size = {} if longest_edge is None else {"size": {"longest_edge": longest_edge}}
    return Idefics3ImageProcessorPil.from_pretrained(
        checkpoint, do_image_splitting=image_splitting, max_image_size={"longest_edge": side}, **size
    )


def pixels_of(image_processor: Idefics3ImageProcessorPil, scenes: Sequence[Sequence[Any]]) -> dict[str, torch.Tensor]:
    """pixel_values (scenes, tiles, 3, height, width) and pixel_attention_mask (scenes, tiles, height, width)."""
    opened = [[_opened(image) for image in scene] for scene in scenes]
    batch = image_processor(opened, return_tensors="pt")
    return {name: batch[name] for name in ("pixel_values", "pixel_attention_mask")}


def whole_pictures(image_processor: Idefics3ImageProcessorPil, paths: Sequence[str]) -> torch.Tensor:
    """Pictures as one tile each: (images, 3, height, width)."""
    return pixels_of(image_processor, [[path] for path in paths])["pixel_values"][:, 0]


class SceneView(CameraPrompts):
    """An `Idefics3Processor` as `SceneCollator` sees a processor: named cameras, one placeholder per image.

    Attributes:
        idefics3: the processor behind it.
        cameras: names, in the order of the prompt.
        num_queries: visual tokens of one tile; there is no other budget.
    """

    def __init__(self, idefics3: Idefics3Processor, cameras: Sequence[str]):
        self.idefics3 = idefics3
        self.tokenizer = idefics3.tokenizer
        self.cameras = list(cameras)
        self.num_queries = idefics3.image_seq_len
        self.image_token = idefics3.image_token
        self.image_token_id = idefics3.image_token_id

    def num_image_tokens(self, num_queries: int | None = None) -> int:
        """Placeholders that the collator writes per image; `BaselineCollator` expands them.

        Raises:
            ValueError: a budget other than the only one there is.
        """
        if num_queries not in (None, self.num_queries):
            raise ValueError(
                f"a SmolVLM has {self.num_queries} visual tokens per tile and no other budget; num_queries must be "
                f"left out or {self.num_queries}, got {num_queries}"
            )
        return 1

    def apply_chat_template(self, conversation: list[dict], **kwargs) -> str:
        return self.idefics3.apply_chat_template(conversation, **kwargs)

    def image_tokens(self, images: Sequence[Any]) -> list[list[int]]:
        """Per image the token ids that stand in for its placeholder: of one tile, or of all tiles and the whole."""
        splitting = self.idefics3.image_processor.do_image_splitting
        sizes = [_size(image) if splitting else (1, 1) for image in images]  # only tiles depend on it
        patches = [self.idefics3.image_processor.get_number_of_image_patches(*size, {}) for size in sizes]
        grids = {"rows": [[rows for _, rows, _ in patches]], "cols": [[columns for _, _, columns in patches]]}
        texts = [self.idefics3.replace_image_token(grids, index) for index in range(len(images))]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def pixels(self, scenes: Sequence[Sequence[Any]]) -> dict[str, torch.Tensor]:
        """See `pixels_of`."""
        return pixels_of(self.idefics3.image_processor, scenes)


class _SmolVLMInputs:
    """What a SmolVLM batch has in place of a SmolDriver's: expanded placeholders, and tiles per row."""

    processor: SceneView

    def encode(self, example: Example, num_queries: int) -> EncodedFrame:
        frame = super().encode(example, num_queries)  # type: ignore[misc]  # of the collator beside it
        tokens = iter(self.processor.image_tokens(list(self.shown(example).values())))  # type: ignore[attr-defined]
        image_token_id = self.processor.image_token_id
        prefix: list[int] = []
        cameras: list[int] = []
        for token, camera in zip(frame.prefix, frame.prefix_cameras, strict=True):
            written = next(tokens) if token == image_token_id else [token]  # with what frames each tile
            prefix += written
            cameras += [camera if one == image_token_id else 0 for one in written]
        return EncodedFrame(prefix, frame.pairs, cameras, frame.asked_cameras)

    def vision(self, examples: Sequence[Example], num_queries: int) -> dict[str, torch.Tensor]:
        scenes: list[Mapping[str, Any]] = [self.shown(example) for example in examples]  # type: ignore[attr-defined]
        if not any(scenes):
            return {}
        if self.features is not None:  # type: ignore[attr-defined]
            return self._cached(scenes)
        return self.processor.pixels([list(scene.values()) for scene in scenes])

    def _cached(self, scenes: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Features in the place of pixels, (scenes, images, 1, patches, hidden); zeros are padding, as in pixels."""
        features = [
            torch.stack([self.features[path] for path in scene.values()])  # type: ignore[attr-defined]
            for scene in scenes
        ]
        padded = nn.utils.rnn.pad_sequence(features, batch_first=True)  # (scenes, most images, patches, hidden)
        return {"pixel_values": padded[:, :, None].float()}


class BaselineCollator(_SmolVLMInputs, SceneCollator):
    """`SceneCollator` for SmolVLM: a row per question, the same examples, prompts and labels."""


class PackedBaselineCollator(_SmolVLMInputs, PackedSceneCollator):
    """`PackedSceneCollator` for SmolVLM: a frame's questions behind its images."""


def build_features(
    model: PreTrainedModel,
    image_processor: Idefics3ImageProcessorPil,
    image_paths: Sequence[str],
    folder: str | Path,
    batch_size: int = 16,
) -> FeatureCache:
    """What a SmolVLM's frozen tower sees in images, as far as the folder lacks it; see `FeatureCache.build`."""
    tower = model.base_model.vision_model

    def encode(paths: list[str]) -> torch.Tensor:
        pixels = whole_pictures(image_processor, paths)
        return tower(pixels.to(tower.device, tower.dtype)).last_hidden_state

    fingerprint = vision_fingerprint(tower, image_processor)
    with evaluating(tower):
        return write_features(folder, image_paths, encode, fingerprint, batch_size=batch_size)


def see_cached(model: PreTrainedModel) -> None:
    """Let a SmolVLM's tower hand on features that come in the place of pixels, as `_SmolVLMInputs` writes them.

    transformers' SmolVLM takes features only behind its connector, which trains. The tower's weights stay where they
    are, so that checkpoints are whole.
    """

    def forward(pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values[:, 0])  # (images, patches, hidden)

    model.base_model.vision_model.forward = forward


def _opened(image: Any) -> Image.Image:
    """A picture or file as upright RGB, as SmolDriver's image processor reads it."""
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    try:
        with Image.open(image) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except OSError as error:
        raise ValueError(f"image {image}: cannot be read: {error}") from error


def _size(image: Any) -> tuple[int, int]:
    """(height, width) of the upright picture, without decoding a file."""
    if not isinstance(image, Image.Image):
        try:
            with Image.open(image) as file:
                return _size(file)
        except OSError as error:
            raise ValueError(f"image {image}: cannot be read: {error}") from error
    lies = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (image.width, image.height) if lies else (image.height, image.width)
