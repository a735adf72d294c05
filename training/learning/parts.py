"""The parts of a checkpoint (tower, projector, language model): which of them train, and how.

One table says what a part is called in each architecture; the adapters' pattern, the frozen weights and what 4-bit
loading skips all follow from it.
"""

import re
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import BitsAndBytesConfig

from smoldriver_hf import load_strictly

HOW = ("frozen", "lora", "full")
PARTS = ("tower", "projector", "language_model")
_SMOLVLM = {"tower": "model.vision_model", "projector": "model.connector", "language_model": "model.text_model"}
MODULES = {
    "smoldriver": {
        "tower": "model.vision_tower",
        "projector": "model.multi_modal_projector",
        "language_model": "model.language_model",
    },
    "smolvlm": _SMOLVLM,
    "idefics3": _SMOLVLM,
}
BASELINES = ("smolvlm", "idefics3")
HEAD = "lm_head"
# The attention and MLP linears of transformers' vision encoders, every projection of Q-Formers and connectors, and of
# language models what adapters take unless another pattern is given.
TOWER_LINEARS = r"\..*\.(q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj)"
PROJECTOR_LINEARS = r"\..*proj"
LANGUAGE_LINEARS = r".*\.(language_model|text_model)\..*\.(q|k|v|o|gate|up|down)_proj"


def modules_of(model_type: str) -> dict[str, str]:
    """Part → module name, of an architecture.

    Raises:
        ValueError: an architecture that this project does not train.
    """
    if model_type not in MODULES:
        raise ValueError(f"expected a checkpoint of {', '.join(MODULES)}; got one of {model_type!r}")
    return MODULES[model_type]


def how_of(args: Any) -> dict[str, str]:
    """Part → frozen, lora or full, from `FinetuneArguments`."""
    return {"tower": args.tower, "projector": args.projector, "language_model": args.language_model}


def check_how(args: Any) -> None:
    """Whether the parts' modes go together; needs no checkpoint.

    Raises:
        ValueError: naming the field, what was expected and what was given.
    """
    how = how_of(args)
    for part, given in how.items():
        if given not in HOW:
            raise ValueError(f"{part} must be one of {HOW}; got {given!r}")
    if args.load_in_4bit and "full" in (args.language_model, args.tower):
        raise ValueError("4-bit weights cannot be trained in full: use lora or frozen with load_in_4bit")
    if args.train_embeddings and args.language_model != "lora":
        raise ValueError(
            "train_embeddings goes with language_model: lora; trained in full it has them, frozen it has none"
        )
    if set(how.values()) == {"frozen"}:
        raise ValueError("tower, projector and language_model are all frozen: nothing would be trained")
    if args.lora_r < 1 or args.lora_alpha <= 0 or not 0 <= args.lora_dropout < 1:
        raise ValueError(
            "lora_r must be at least 1, lora_alpha positive and lora_dropout in [0, 1); "
            f"got {args.lora_r}, {args.lora_alpha} and {args.lora_dropout}"
        )


def load_model(args: Any, model_type: str, bf16: bool, sharded: bool = False) -> nn.Module:
    """The checkpoint, in 4 bits if asked; only parts that train in full require gradients (adapters come later).

    With `bf16`, weights that do not change are held in bf16, once, instead of being cast at every step; what trains is
    float32. In 4 bits only the language model's linears are: tower, projector and head stay in the other type.

    Args:
        args: `FinetuneArguments`.
        bf16: compute in bf16. A processor without bf16 arithmetic is ten times slower in it than in float32.
        sharded: by FSDP or DeepSpeed, which want one type for all and cast by themselves.
    """
    modules = modules_of(model_type)
    dtype = torch.bfloat16 if bf16 else torch.float32
    quantization = None
    if args.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=[HEAD, modules["tower"], modules["projector"]],
        )
    model = load_strictly(
        args.checkpoint, quantization_config=quantization, dtype=dtype if args.load_in_4bit else torch.float32
    )
    freeze(model, how_of(args), modules)
    if model_type in BASELINES and (args.language_model == "full" or args.train_embeddings):
        # A SmolVLM brings visual tokens to the type of its tower, which must then be that of its text embeddings.
        model.get_submodule(modules["tower"]).float()
    elif bf16 and not sharded and not args.load_in_4bit:
        for part, name in modules.items():
            if how_of(args)[part] != "full":
                model.get_submodule(name).to(torch.bfloat16)
        if args.language_model != "full":
            model.get_submodule(HEAD).to(torch.bfloat16)
    return model


def freeze(model: nn.Module, how: dict[str, str], modules: dict[str, str]) -> None:
    """Let exactly the parts that train in full require gradients; the head goes with the language model."""
    for part, name in modules.items():
        owners = [name, HEAD] if part == "language_model" else [name]
        for owner in owners:
            for parameter in model.get_submodule(owner).parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(how[part] == "full")


def lora_pattern(args: Any, modules: dict[str, str]) -> str:
    """One regular expression over module names for all linears to adapt."""
    patterns = [args.lora_pattern] if args.language_model == "lora" else []
    if args.tower == "lora":
        patterns.append(re.escape(modules["tower"]) + TOWER_LINEARS)
    if args.projector == "lora":
        patterns.append(re.escape(modules["projector"]) + PROJECTOR_LINEARS)
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def lora_config(args: Any, modules: dict[str, str]) -> LoraConfig | None:
    """The adapter, or None where no part takes one. Parts trained in full beside it are saved with it."""
    how = how_of(args)
    if "lora" not in how.values():
        return None
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=lora_pattern(args, modules),
        modules_to_save=[
            *(name for part, name in modules.items() if how[part] == "full"),
            *((f"{modules['language_model']}.embed_tokens", HEAD) if args.train_embeddings else ()),
        ]
        or None,
        task_type="CAUSAL_LM",
    )


def check_lora_targets(args: Any, model: nn.Module, modules: dict[str, str]) -> None:
    """Each part asked for is hit by the adapters' pattern, and nothing else is.

    Raises:
        ValueError: the pattern is no regular expression, matches nothing in a part that is to have adapters, or
            matches linears of another part or of the head.
    """
    how = how_of(args)
    if "lora" not in how.values():
        return
    try:
        pattern = re.compile(lora_pattern(args, modules))
    except re.error as error:
        raise ValueError(f"lora_pattern {args.lora_pattern!r} is no regular expression: {error}") from error
    hits = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and pattern.fullmatch(name)
    ]
    for part, prefix in modules.items():
        found = [name for name in hits if name.startswith(prefix + ".")]
        if bool(found) != (how[part] == "lora"):
            raise ValueError(
                f"{part} is {how[part]!r}, but the adapters' pattern {pattern.pattern!r} matches {len(found)} of its "
                f"linear layers{', e.g. ' + found[0] if found else ''}"
            )
    elsewhere = [name for name in hits if not name.startswith(tuple(f"{prefix}." for prefix in modules.values()))]
    if elsewhere:
        raise ValueError(f"the adapters' pattern {pattern.pattern!r} matches {elsewhere[0]!r}, which takes no adapter")
