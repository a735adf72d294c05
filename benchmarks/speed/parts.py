"""What `benchmarks.speed` measures: scenes, questions, SmolVLM and SmolDriver with random weights.

Speed does not depend on what weights say, so nothing is downloaded. Both systems get the same text model, tokenizer,
number format and questions; they differ in what is compared: tower, visual tokens, and reuse of the scene.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    Dinov2Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    ViTConfig,
)

from smoldriver_hf import (
    CAMERAS,
    SmolDriverConfig,
    SmolDriverForConditionalGeneration,
    SmolDriverImageProcessor,
    SmolDriverProcessor,
    SmolDriverProjectorConfig,
)
from training.learning.published import SIGLIP_B, SIGLIP_SO400M, SMOLLM2_1_7B, SMOLLM2_135M, sizes

# Twelve names for the growth with the number of cameras; the first six are nuScenes'.
TWELVE_CAMERAS = [*CAMERAS, *(f"{name}_2" for name in CAMERAS)]
IMAGE_SIZE = (1600, 900)  # pixels, as nuScenes' cameras give them
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]
TEMPLATES = (
    "What is the moving status of object {object}?",
    "Is {object} going to cross the path of the ego vehicle?",
    "What actions could the ego vehicle take based on {object}? Why take this action and what's the probability?",
    "Are there moving pedestrians to the {sector} of the ego car?",
    "Is it necessary for the ego vehicle to take {object} into account?",
    "What is the relative positioning of the important objects in the current scene?",
    "In this scenario, what are safe actions to take for the ego vehicle?",
    "Would {object} be in the moving direction of the ego vehicle, and what is its future state?",
    "Please describe the current scene.",
    "Is there any traffic element to the {sector} of the ego car?",
)
SECTORS = ("front", "front left", "front right", "back", "back left", "back right")


@dataclass(frozen=True)
class Scale:
    """Sizes of the parts.

    Attributes:
        tile: side in pixels of SmolVLM's images.
        longest_edge: what SmolVLM scales camera images to before it cuts tiles.
        fold: side of the squares of patches that SmolVLM makes one token of.
    """

    text: dict[str, Any]
    smolvlm_vision: dict[str, Any]
    tile: int
    longest_edge: int
    fold: int
    vit: dict[str, Any]
    dino: dict[str, Any]
    projector: dict[str, Any]


# SmolVLM2-256M-Video-Instruct's own dimensions, the head tied for both systems; ViT-B/16 at 224 pixels; DINOv2-S/14.
FULL = Scale(
    text=SMOLLM2_135M,
    smolvlm_vision=SIGLIP_B,
    tile=512,
    longest_edge=2048,
    fold=4,
    vit=SIGLIP_B,  # ViT-B has the same
    dino={"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    projector={"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
)
# SmolVLM2-2.2B: only ever built without memory, to count its operations.
LARGE = replace(FULL, text=SMOLLM2_1_7B, smolvlm_vision=SIGLIP_SO400M, tile=384, longest_edge=1536, fold=3)
# For tests: everything runs, in seconds.
TINY_TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
QUICK = Scale(
    text={**sizes(64, 128, 2, 2), "num_key_value_heads": 1, "vocab_size": 1024},
    smolvlm_vision={**TINY_TOWER, "intermediate_size": 64},
    tile=64,
    longest_edge=128,
    fold=2,
    vit={**TINY_TOWER, "intermediate_size": 64},
    dino=TINY_TOWER,
    projector={"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
)


def questions(count: int) -> list[str]:
    """`count` different questions in DriveLM's wording, of its lengths."""
    rng = np.random.default_rng(0)
    asked = []
    for index in range(count):
        place = f"<c{index + 1},{CAMERAS[index % 6]},{rng.uniform(0, 1600):.1f},{rng.uniform(0, 900):.1f}>"
        asked.append(TEMPLATES[index % len(TEMPLATES)].format(object=place, sector=SECTORS[index % 6]))
    return asked


def write_images(folder: Path, cameras: list[str]) -> dict[str, str]:
    """One 1600×900 JPEG per camera, smooth with some grain so that it has a photograph's file size."""
    paths = {}
    for index, camera in enumerate(cameras):
        paths[camera] = str(folder / f"{camera}.jpg")
        rng = np.random.default_rng(index)
        coarse = Image.fromarray(rng.integers(0, 256, (18, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(IMAGE_SIZE, Image.Resampling.BICUBIC), dtype=np.int16)
        grain = rng.integers(-12, 13, smooth.shape, dtype=np.int16)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(paths[camera], quality=90)
    return paths


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer learnt from the questions: about as many tokens per question as SmolLM2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*questions(91), *TWELVE_CAMERAS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        padding_side="left",
    )


def text_config(scale: Scale) -> LlamaConfig:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaConfig(**scale.text, **ids, max_position_embeddings=8192, tie_word_embeddings=True)


def smolvlm_config(scale: Scale) -> SmolVLMConfig:
    return SmolVLMConfig(
        vision_config={**scale.smolvlm_vision, "image_size": scale.tile, "patch_size": 14 if scale is LARGE else 16},
        text_config=text_config(scale).to_dict(),
        scale_factor=scale.fold,
        image_token_id=SPECIAL_TOKENS.index("<image>"),
        tie_word_embeddings=True,
    )


def smoldriver_config(
    scale: Scale, tower: str, cameras: list[str] | None = None, image_size: int | None = None, max_queries: int = 64
) -> SmolDriverConfig:
    """SmolDriver with the tower "vit" (ViT-B/16 at 224 pixels) or "dino" (DINOv2-S/14 at 224 pixels)."""
    if tower == "vit":
        vision = ViTConfig(**scale.vit, image_size=32 if scale is QUICK else 224, patch_size=16)
    elif tower == "dino":
        vision = Dinov2Config(**scale.dino, image_size=28 if scale is QUICK else 224, patch_size=14)
    else:
        raise ValueError(f"tower must be 'vit' or 'dino'; got {tower!r}")
    return SmolDriverConfig(
        vision_config=vision,
        text_config=text_config(scale),
        projector_config=SmolDriverProjectorConfig(**scale.projector),
        cameras=cameras or CAMERAS,
        max_queries=max_queries,
        image_size=image_size,
        image_token_id=SPECIAL_TOKENS.index("<image>"),
    )


def _random_model(config: Any, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)  # made in `dtype`: the peak is what runs
    model.generation_config.eos_token_id = None  # every answer has the same length
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def smolvlm(scale: Scale, dtype: torch.dtype) -> SmolVLMForConditionalGeneration:
    return _random_model(smolvlm_config(scale), dtype)


def smolvlm_processor(scale: Scale, tiles: bool) -> Idefics3Processor:
    """SmolVLM's image path on PIL (its own processor class needs torchvision): as shipped, or one tile per image."""
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": scale.longest_edge},
        max_image_size={"longest_edge": scale.tile},
        do_image_splitting=tiles,
    )
    patch = 14 if scale is LARGE else 16
    return Idefics3Processor(image_processor, tokenizer(), image_seq_len=(scale.tile // patch // scale.fold) ** 2)


def smolvlm_inputs(processor: Idefics3Processor, paths: dict[str, str], question: str) -> dict[str, torch.Tensor]:
    """Model inputs of one question about the images at `paths`, in SmolVLM's prompt."""
    images = [Image.open(path) for path in paths.values()]
    prompt = f"<|im_start|>User:{'<image>' * len(images)}{question}<end_of_utterance>\nAssistant:"
    return processor(images=[images], text=[prompt], return_tensors="pt")


def smoldriver(config: SmolDriverConfig, dtype: torch.dtype) -> SmolDriverForConditionalGeneration:
    return _random_model(config, dtype)


def smoldriver_processor(config: SmolDriverConfig) -> SmolDriverProcessor:
    images = SmolDriverImageProcessor(size={"height": config.image_size, "width": config.image_size})
    most, default = config.max_queries, config.num_queries
    return SmolDriverProcessor(images, tokenizer(), cameras=config.cameras, max_queries=most, num_queries=default)
