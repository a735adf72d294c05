"""Published dimensions of the models that recipes and benchmarks name, so that neither needs a download."""

from typing import Any

from transformers import Dinov2Config, LlamaConfig, PreTrainedConfig, SmolVLMConfig, ViTConfig


def sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    """Dimensions of a transformer under the names that its configuration has for them."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


# With the vocabulary of SmolVLM, which has 128 rows more than SmolLM2's.
SMOLLM2_135M = {**sizes(576, 1536, 30, 9), "num_key_value_heads": 3, "vocab_size": 49280}
SMOLLM2_1_7B = {**sizes(2048, 8192, 24, 32), "num_key_value_heads": 32, "vocab_size": 49280}
SIGLIP_B = sizes(768, 3072, 12, 12)
SIGLIP_SO400M = sizes(1152, 4304, 27, 16)


def _smolvlm(vision: dict[str, int], image_size: int, patch_size: int, text: dict[str, Any], fold: int) -> Any:
    return SmolVLMConfig(
        vision_config={**vision, "image_size": image_size, "patch_size": patch_size},
        text_config={"model_type": "llama", "max_position_embeddings": 8192, **text},
        scale_factor=fold,
    )


PUBLISHED: dict[str, PreTrainedConfig] = {
    "google/vit-base-patch16-224-in21k": ViTConfig(),
    "facebook/dinov2-small": Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14),
    "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaConfig(
        **{**SMOLLM2_135M, "vocab_size": 49152}, max_position_embeddings=8192, tie_word_embeddings=True
    ),
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": _smolvlm(SIGLIP_B, 512, 16, SMOLLM2_135M, fold=4),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": _smolvlm(SIGLIP_SO400M, 384, 14, SMOLLM2_1_7B, fold=3),
}
