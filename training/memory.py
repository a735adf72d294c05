"""How much accelerator memory the training stages of a recipe need, found without weights and without an accelerator.

    python -m training.memory --recipe smolvlm2-2.2b-paper
    python -m training.memory --recipe smolvlm2-256m --limit_gb 24 --question_tokens 120

Every stage that fine-tunes what the recipe assembles takes two whole training steps on fake tensors (shapes and
types, no data), as the recipe has them: batch, questions per sequence, largest budget, adapters, bf16 autocast,
gradient checkpointing, AdamW; blind controls, which need less, are left out. Every tensor is followed from its birth
to its end. 4-bit weights are counted at 4.127 bits (a scale of 8 bits for 64 weights, and one of 32 bits for 256 of
those), with one layer at a time unpacked to bf16.

A stage is said to fit if its peak, with 10 % for fragmentation and 0.8 GB for the CUDA context and libraries, stays
below the limit. Attention is counted as fused (its scores are never stored).
"""

import json
import math
import weakref
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary
from transformers import CONFIG_MAPPING, HfArgumentParser, PreTrainedConfig
from transformers.initialization import no_init_weights
from trl import SFTConfig

from smoldriver_hf import SmolDriverConfig, SmolDriverForConditionalGeneration, read_config
from smoldriver_hf.tower_smoldriver import height_and_width
from training.assemble import OFFLINE_IMAGE_SIZE, AssembleArguments, projector_config_for
from training.finetune import FinetuneArguments
from training.learning.parts import HEAD, freeze, how_of, lora_config, modules_of
from training.learning.published import PUBLISHED
from training.stages import command_line
from training.stages.recipes import PROCESSES, PlannedStage, plan, read_recipe
from training.toyworld.smolvlm import ToyBaseArguments, language_model_config

GB = 1 << 30
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # per weight, with double quantisation
CONTEXT_BYTES = 0.8 * GB
FRAGMENTATION = 1.1
HEAD_CHUNK = 1024  # positions whose logits exist at a time
LABEL_TOKENS = 15  # a camera's name, the frame and a line end around its visual tokens


@dataclass
class MemoryArguments:
    recipe: str = field(metadata={"help": "Recipe: a file, or the name of one in training/recipes."})
    limit_gb: float = field(default=16.0, metadata={"help": "Memory of the accelerator, in GB of 2^30 bytes."})
    question_tokens: int = field(default=80, metadata={"help": "Tokens of a question with its answer and turn marks."})


SCORE_BYTES = 4 + 4 + 1
"""Of an attention score that is supervised: as it is, of the named cameras alone, and which those are."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one stage.

    Attributes:
        parameters: weights as they are held.
        gradients: of what trains.
        optimizer: states of AdamW.
        activations: the rest of the peak: activations, temporary tensors, batch.
        peak: highest sum at any moment of a step; gradients and activations do not peak together.
        sequence_length: tokens of a sequence.
        trainable: number of weights that train.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    sequence_length: int
    trainable: int

    def needed(self) -> float:
        """The peak with fragmentation and the context, in bytes."""
        return self.peak * FRAGMENTATION + CONTEXT_BYTES


def config_of(args: AssembleArguments, base: ToyBaseArguments | None = None) -> SmolDriverConfig:
    """The model that `training.assemble` makes, by dimensions.

    Args:
        args: of `training.assemble`.
        base: what its SmolVLM was made with, if that is one of the toy world.
    """
    smolvlm: Any = _part(args.smolvlm) if args.smolvlm and base is None else None
    vision = args.vision or ("facebook/dinov2-small" if args.offline else None)
    text = args.text or ("HuggingFaceTB/SmolLM2-135M-Instruct" if args.offline else None)
    tower: Any = _part(vision) if vision else smolvlm.vision_config
    if args.vision_layers:
        tower.num_hidden_layers = args.vision_layers
    if base is not None:
        language_model: Any = language_model_config(base, vocab_size=base.vocab_size)
    else:
        language_model = smolvlm.text_config if smolvlm is not None else _part(str(text))
    shuffle = args.connector == "pixel_shuffle"
    queries = args.max_queries
    if shuffle:
        queries = (smolvlm.vision_config.image_size // smolvlm.vision_config.patch_size) ** 2
    return SmolDriverConfig(
        vision_config=tower,
        text_config=language_model,
        projector_config=projector_config_for(
            tower, torch.ones(2), smolvlm if shuffle else None, args.projector_hidden_size
        ),
        max_queries=queries,
        connector=args.connector,
        image_size=args.image_size or (OFFLINE_IMAGE_SIZE if args.offline else None),
        image_token_id=0,
        tie_word_embeddings=(smolvlm or language_model).tie_word_embeddings,
        cameras=args.cameras,
    )


def _part(name: str) -> PreTrainedConfig:
    if name not in PUBLISHED:
        return read_config(name)
    config = PUBLISHED[name]
    return CONFIG_MAPPING[config.model_type](**{k: v for k, v in config.to_dict().items() if k != "model_type"})


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all storages that live within it, and the most there were at once.

    Attributes:
        current, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def follow(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        if storage not in self._known:
            size = storage.nbytes()
            self._known[storage] = size
            self.current += size
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.current -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.follow, result)
        return result


@dataclass(frozen=True)
class Batch:
    """Sizes of a training batch; `prefix` and `length` in tokens, of the cameras and of the whole sequence."""

    size: int
    cameras: int
    queries: int
    prefix: int
    length: int


def batch_of(config: SmolDriverConfig, args: FinetuneArguments, size: int, question_tokens: int) -> Batch:
    cameras = len(args.cameras or config.cameras)
    queries = max(args.num_queries or [config.num_queries])
    prefix = cameras * (queries // config.queries_per_token + LABEL_TOKENS)
    return Batch(size, cameras, queries, prefix, prefix + args.pairs_per_sequence * question_tokens)


def estimate(config: SmolDriverConfig, args: FinetuneArguments, training: SFTConfig, question_tokens: int) -> Estimate:
    """Memory of a training step."""
    batch = batch_of(config, args, training.per_device_train_batch_size, question_tokens)
    low = torch.bfloat16 if training.bf16 else torch.float32
    model, linears = model_without_weights(config, args, low)
    adapter = lora_config(args, modules_of("smoldriver"))
    with torch.device("meta"):
        wrapped = get_peft_model(model, adapter) if adapter is not None else model
    peak = peak_of_two_steps(model, wrapped, batch, args, training)

    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in wrapped.parameters()}
    saved = int(sum(linears) * (low.itemsize - NF4_BYTES)) if args.load_in_4bit else 0
    unpacked = max(linears) if args.load_in_4bit else 0
    parameters = sum(storages.values()) - saved
    peak += unpacked * low.itemsize - saved + camera_attention_bytes(config, args, batch)
    optimizer_bytes = 8 * trainable
    return Estimate(
        parameters=parameters,
        gradients=4 * trainable,
        optimizer=optimizer_bytes,
        activations=peak - parameters - optimizer_bytes,
        peak=peak,
        sequence_length=batch.length,
        trainable=trainable,
    )


def camera_attention_bytes(config: SmolDriverConfig, args: FinetuneArguments, batch: Batch) -> int:
    """What the supervision of camera attention keeps for its backward pass, if every question token were asked for."""
    if not args.camera_attention_loss:
        return 0
    heads = config.text_config.num_attention_heads
    watched = len(args.camera_attention_heads) if args.camera_attention_heads is not None else math.ceil(heads / 2)
    return batch.size * watched * (batch.length - batch.prefix) * batch.length * SCORE_BYTES


def model_without_weights(
    config: SmolDriverConfig, args: FinetuneArguments, low: torch.dtype
) -> tuple[SmolDriverForConditionalGeneration, list[int]]:
    """The model on the meta device, frozen and in the types of a stage, and the sizes of what 4 bits may hold."""
    modules = modules_of("smoldriver")
    with torch.device("meta"), no_init_weights():
        model = SmolDriverForConditionalGeneration(deepcopy(config))
        model.tie_weights()  # which else the initialisation does
        if args.cameras:  # the other Q-Formers are held, but see nothing
            model.config.cameras = model.model.multi_modal_projector.cameras = list(args.cameras)
        freeze(model, how_of(args), modules)
        unchanged = [name for part, name in modules.items() if how_of(args)[part] != "full"]
        for name in [*unchanged, *([HEAD] if args.language_model != "full" else [])]:
            model.get_submodule(name).to(low)
    language_model = model.get_submodule(modules["language_model"])
    return model, [module.weight.numel() for module in language_model.modules() if isinstance(module, nn.Linear)]


def peak_of_two_steps(
    model: SmolDriverForConditionalGeneration,
    wrapped: nn.Module,
    batch: Batch,
    args: FinetuneArguments,
    training: SFTConfig,
) -> int:
    """The most bytes that live at once; gives the model, which is on the meta device, fake weights.

    Args:
        wrapped: the model with its adapters.
    """
    config = model.config
    with FakeTensorMode():
        _make_fake(wrapped)
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        wrapped.train()
        optimizer = torch.optim.AdamW(p for p in wrapped.parameters() if p.requires_grad)
        images = batch.size * batch.cameras
        if args.feature_cache:
            rows, columns = model.model.multi_modal_projector.grid
            seen = {"vision_features": torch.empty(images, rows * columns, config.vision_config.hidden_size)}
        else:
            seen = {"pixel_values": torch.empty(images, 3, *height_and_width(config.image_size))}
        text = torch.zeros(batch.size, batch.length - batch.prefix, dtype=torch.long)
        packed = args.pairs_per_sequence > 1
        mask = torch.ones(batch.size, 1, batch.length, batch.length, dtype=torch.bool) if packed else None
        tracker = PeakMemory()
        for tensor in (*wrapped.parameters(), *wrapped.buffers(), *seen.values(), text, *([mask] if packed else [])):
            tracker.follow(tensor)
        with tracker:
            for _ in range(2):  # the optimiser has its states from the second step on
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training.bf16):
                    loss = _loss(model, seen, text, mask, batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return tracker.peak


def _make_fake(model: nn.Module) -> None:
    """Give a model on the meta device fake tensors on a CPU, whose kernels fuse attention; tied weights stay tied."""
    new: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in new:
                dtype = torch.float32 if parameter.requires_grad else parameter.dtype
                fake = torch.empty(parameter.shape, dtype=dtype)
                new[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            if parameter is not None:
                module._parameters[name] = new[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _loss(model, seen: dict[str, torch.Tensor], text, mask, batch: Batch) -> torch.Tensor:
    """A training step's loss without anything that depends on data (fake tensors hold none)."""
    base = model.model
    tokens = base.get_image_features(num_queries=batch.queries, return_dict=True, **seen).pooler_output
    tokens = tokens.reshape(text.shape[0], -1, tokens.shape[-1])
    words = base.get_input_embeddings()(text)
    labels = words.new_zeros(text.shape[0], batch.prefix - tokens.shape[1], words.shape[-1])
    states = torch.cat([tokens.to(words.dtype), labels, words], dim=1)  # (batch, length, hidden)
    states = base.language_model(inputs_embeds=states, attention_mask=mask, use_cache=False).last_hidden_state
    chunks = states.flatten(0, 1).split(HEAD_CHUNK)
    return sum(checkpoint(_chunk_loss, chunk, model.lm_head, use_reentrant=False) for chunk in chunks)


def _chunk_loss(states: torch.Tensor, head: nn.Module) -> torch.Tensor:
    logits = head(states).float()
    return nn.functional.cross_entropy(logits, states.new_zeros(len(states), dtype=torch.long), reduction="sum")


def assembled_by(stages: dict[str, PlannedStage], stage: PlannedStage) -> SmolDriverConfig | None:
    """What a stage fine-tunes, if the plan assembles it."""
    while stage.module != "assemble" and stage.source is not None:
        stage = stages[stage.source]
    if stage.module != "assemble":
        return None
    first = stage
    while first.source is not None:
        first = stages[first.source]
    base = ToyBaseArguments(**first.arguments) if first.module == "toyworld.smolvlm" else None
    return config_of(AssembleArguments(**stage.arguments), base)


def main(args: MemoryArguments) -> dict[str, Any]:
    """Print and return the estimates of a recipe's stages.

    Raises:
        ValueError: no such recipe, or it does not assemble a model.
    """
    recipe = read_recipe(args.recipe)
    stages = plan(recipe.sections, Path(recipe.output_dir), recipe.data)
    parser = HfArgumentParser((FinetuneArguments, SFTConfig))
    report: dict[str, Any] = {"recipe": str(recipe.file), "limit_gb": args.limit_gb, "stages": {}}
    for name, stage in stages.items():
        if stage.module != "finetune" or stage.arguments.get("blind"):
            continue
        config = assembled_by(stages, stage)
        if config is None:
            continue
        given = {key: value for key, value in stage.arguments.items() if key != PROCESSES}
        finetune, training = parser.parse_dict({**given, "use_cpu": True, "report_to": "none"})
        found = estimate(config, finetune, training, args.question_tokens)
        fits = found.needed() < args.limit_gb * GB
        report["stages"][name] = {**asdict(found), "needed": int(found.needed()), "fits": fits}
        amounts = ("parameters", "gradients", "optimizer", "activations", "peak")
        print(
            f"{name}: batch {training.per_device_train_batch_size} x {found.sequence_length} tokens, "
            + ", ".join(f"{key} {vars(found)[key] / GB:.2f}" for key in amounts)
            + f" GB; needs {found.needed() / GB:.2f} GB: {'fits' if fits else 'does not fit'} {args.limit_gb:g} GB"
        )
    if not report["stages"]:
        raise ValueError(f"{recipe.file} fine-tunes nothing that it assembles: which model it trains is not known")
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    command_line.run(main, MemoryArguments)
