"""Tiny random models, a tokenizer made from a few words, and images: what every contract test starts from."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Dinov2Config, LlamaConfig, PreTrainedTokenizerFast

from smoldriver_hf import (
    CAMERAS,
    SmolDriverConfig,
    SmolDriverForConditionalGeneration,
    SmolDriverImageProcessor,
    SmolDriverProcessor,
)
from smoldriver_hf.configuration_smoldriver import SmolDriverProjectorConfig

IMAGE_SIZE = 28
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, one token per byte, with the special tokens of SmolLM2 and the image placeholder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )


def tiny_vision_config(**changes) -> Dinov2Config:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    return Dinov2Config(**{**sizes, "image_size": IMAGE_SIZE, "patch_size": 7, **changes})


def tiny_text_config(**changes) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True}
    return LlamaConfig(**{"vocab_size": 264, "num_key_value_heads": 1, **sizes, **tokens, **changes})


def tiny_config(vision_config=None, text_config=None, projector_config=None, **changes) -> SmolDriverConfig:
    return SmolDriverConfig(
        vision_config=vision_config or tiny_vision_config(),
        projector_config=projector_config
        or SmolDriverProjectorConfig(hidden_size=32, num_attention_heads=2, intermediate_size=64),
        text_config=text_config or tiny_text_config(),
        **{"max_queries": 8, "image_token_id": SPECIAL_TOKENS.index("<image>"), **changes},
    )


def tiny_model(seed: int = 0, **changes) -> SmolDriverForConditionalGeneration:
    torch.manual_seed(seed)
    return SmolDriverForConditionalGeneration(tiny_config(**changes)).eval()


def tiny_processor(config: SmolDriverConfig | None = None, image_size: int = IMAGE_SIZE) -> SmolDriverProcessor:
    config = config or tiny_config()
    return SmolDriverProcessor(
        SmolDriverImageProcessor(size={"height": image_size, "width": image_size}),
        tiny_tokenizer(),
        cameras=config.cameras,
        max_queries=config.max_queries,
        num_queries=config.num_queries,
        queries_per_token=config.queries_per_token,
    )


def picture(seed: int = 0, size: tuple[int, int] = (64, 36)) -> Image.Image:
    """A smooth random picture, so that JPEG and resizing change it little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def scene(seed: int = 0, cameras=CAMERAS) -> dict[str, Image.Image]:
    return {camera: picture(100 * seed + index) for index, camera in enumerate(cameras)}
