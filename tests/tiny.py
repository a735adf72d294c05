"""Tiny random models, a tokenizer made from a few words, and images: what every contract test starts from."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
)

from smoldriver_hf import (
    CAMERAS,
    SmolDriverConfig,
    SmolDriverForConditionalGeneration,
    SmolDriverImageProcessor,
    SmolDriverProcessor,
)
from smoldriver_hf.configuration_smoldriver import SmolDriverProjectorConfig
from smoldriver_hf.tower_smoldriver import height_and_width

IMAGE_SIZE = 28
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]


def tiny_tokenizer(chat_tokens: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level, one token per byte, with the special tokens of SmolLM2 and the image placeholder.

    Without `chat_tokens` the turn markers are no special tokens, as in a language model never tuned on chats.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>" if chat_tokens else "<|endoftext|>",
        eos_token="<|im_end|>" if chat_tokens else "<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<image>"],
    )


def tiny_vision_config(**changes) -> Dinov2Config:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    return Dinov2Config(**{**sizes, "image_size": IMAGE_SIZE, "patch_size": 7, **changes})


def tiny_text_config(**changes) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True}
    return LlamaConfig(**{"vocab_size": 264, "num_key_value_heads": 1, **sizes, **tokens, **changes})


def tiny_towers() -> dict[str, PreTrainedConfig]:
    """Vision towers of every kind: with and without class and register tokens, flat and hierarchical."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": IMAGE_SIZE}
    mlp = {"intermediate_size": 64}
    return {
        "dinov2": tiny_vision_config(),
        "dinov2_with_registers": Dinov2WithRegistersConfig(**sizes, patch_size=7, mlp_ratio=2),
        "vit": ViTConfig(**sizes, **mlp, patch_size=7),
        "deit": DeiTConfig(**sizes, **mlp, patch_size=7),
        "siglip": SiglipVisionConfig(**sizes, **mlp, patch_size=7),
        "clip": CLIPVisionConfig(**sizes, **mlp, patch_size=7),
        "swin": SwinConfig(
            image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, mlp_ratio=2
        ),
    }


def tiny_language_models() -> dict[str, PreTrainedConfig]:
    """Language models whose embeddings have different names, heads tied and untied."""
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "llama": tiny_text_config(),
        "llama_untied": tiny_text_config(tie_word_embeddings=False),
        "gpt2": GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=2, n_positions=512, **tokens),
        "qwen2": Qwen2Config(vocab_size=264, num_key_value_heads=1, tie_word_embeddings=True, **sizes, **tokens),
    }


def tiny_config(vision_config=None, text_config=None, projector_config=None, **changes) -> SmolDriverConfig:
    """With the labels that `tiny_processor` writes, as `training.assemble` notes them."""
    cameras = changes.get("cameras", CAMERAS)
    names = [name for name in cameras if isinstance(name, str)] if isinstance(cameras, list | tuple) else []
    labels = {name: tiny_tokenizer()(f"{name}: ")["input_ids"] for name in names}
    return SmolDriverConfig(
        vision_config=vision_config or tiny_vision_config(),
        projector_config=projector_config
        or SmolDriverProjectorConfig(hidden_size=32, num_attention_heads=2, intermediate_size=64),
        text_config=text_config or tiny_text_config(),
        **{"max_queries": 8, "image_token_id": SPECIAL_TOKENS.index("<image>"), "camera_labels": labels, **changes},
    )


def tiny_model(seed: int = 0, **changes) -> SmolDriverForConditionalGeneration:
    torch.manual_seed(seed)
    return SmolDriverForConditionalGeneration(tiny_config(**changes)).eval()


def lively(model, seed: int = 1):
    """The model with larger random weights: fresh ones repeat the last token whatever they see."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_inputs(model, cameras=CAMERAS, batch: int = 1, tokens_per_camera: int = 4, seed: int = 0) -> dict:
    """Model inputs made without a processor: random pixels, and per camera a label token before its placeholders."""
    generator = torch.Generator().manual_seed(seed)
    height, width = height_and_width(model.config.image_size)
    row: list[int] = [1]
    for camera in cameras:
        row += [20 + CAMERAS.index(camera), *[model.config.image_token_id] * tokens_per_camera]
    questions = torch.randint(30, 200, (batch, 5), generator=generator)
    ids = torch.cat([torch.tensor(row).expand(batch, -1), questions], dim=1)
    ids_of_cameras = torch.tensor([CAMERAS.index(camera) for camera in cameras])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch * len(cameras), 3, height, width, generator=generator),
        "camera_ids": ids_of_cameras.repeat(batch),
    }


def tiny_image_processor(image_size: int = IMAGE_SIZE) -> SmolDriverImageProcessor:
    return SmolDriverImageProcessor(size={"height": image_size, "width": image_size})


def tiny_processor(config: SmolDriverConfig | None = None, image_size: int = IMAGE_SIZE) -> SmolDriverProcessor:
    config = config or tiny_config()
    return SmolDriverProcessor(
        tiny_image_processor(image_size),
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
