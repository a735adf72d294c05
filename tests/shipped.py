"""A tiny default model: a cache with a tower, a checkpoint that sees with two of its layers, and a blind twin."""

from pathlib import Path

import torch
from tiny import IMAGE_SIZE, lively, tiny_text_config, tiny_tokenizer, tiny_vision_config
from transformers import Dinov2Model, LlamaForCausalLM

from hub_export.embed import EmbedArguments
from smoldriver_hf.dinov2 import DINOV2_PART
from training.assemble import AssembleArguments, assemble
from training.checkpoints.folders import save_whole
from training.finetune import FinetuneArguments
from training.stages.files import make_note

LAYERS = 2


def write_parts(root: Path) -> Path:
    """A cache that has the tower's part already; returns what XDG_CACHE_HOME must say."""
    torch.manual_seed(0)
    tower = Dinov2Model(tiny_vision_config(num_hidden_layers=LAYERS + 1, use_mask_token=False))
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tower.save_pretrained(root / "cache" / "smoldriver" / DINOV2_PART.folder)
    return root / "cache"


def write_checkpoint(root: Path, name: str, seed: int, blind: str | None = None, **changes) -> Path:
    """A SmolDriver of the part's first layers, its language model as if trained, with the note of a training."""
    torch.manual_seed(0)
    text = root / f"{name}-text"
    LlamaForCausalLM(tiny_text_config(**changes)).save_pretrained(text)
    tiny_tokenizer().save_pretrained(text)
    part = root / "cache" / "smoldriver" / DINOV2_PART.folder
    args = AssembleArguments(
        output_dir=str(root / name),
        vision=str(part),
        vision_layers=LAYERS,
        text=str(text),
        image_size=IMAGE_SIZE,
        max_queries=4,
        dtype="float32" if blind else "bfloat16",  # as training.finetune and training.merge save them
    )
    model, processor = assemble(args)
    lively(model.model.language_model, seed)
    note = make_note("finetune", FinetuneArguments(checkpoint="initial", data="data", blind=blind))
    return save_whole(args.output_dir, model, processor, note=note)


def embed_arguments(root: Path, **changes) -> EmbedArguments:
    """Checkpoints to embed, and where to."""
    write_parts(root)
    sighted, blind = write_checkpoint(root, "sighted", 1), write_checkpoint(root, "twin", 2, blind="text")
    return EmbedArguments(**{"checkpoint": str(sighted), "blind": str(blind), "out": str(root / "default"), **changes})
