"""What the benchmark trains and asks, as data.

A variant is the result of one section of the recipe after some layers of changes. A layer names sections, and what
they have in place of the recipe's arguments; a section that the recipe lacks is a new stage behind the one that it
starts `from`, `like` another section in all that it does not say. Stages that no layer touches, themselves or in what
they are made from, are shared by all variants of a seed (`benchmarks.toyworld.plan`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data.rig import read_rig

Layer = Mapping[str, Mapping[str, Any]]
"""Section → arguments in place of the recipe's; None leaves one out"""

BUDGETS = (1, 2, 4, 8, 16)
VAN = str(Path(__file__).with_name("van.yaml"))
VECTORS, QUERIES = {"keep_frozen": r".*\.camera_vector"}, {"keep_frozen": r".*\.queries"}
TRAINED = ("align_qformers", "adapt")
"""Sections that train Q-Formers: an ablation of training is one of both."""


def steps(count: int, cool_down: float = 0.45) -> dict[str, Any]:
    """So many steps, the last share of them with a falling learning rate, as `adapt` has."""
    return {"max_steps": count, "lr_scheduler_kwargs": {"num_decay_steps": round(count * cool_down)}}


QUICK: Layer = {
    "toyworld": {"scenes": 300},
    "read": steps(300, 0.35),
    **dict.fromkeys(("align", "align_qformers"), {"max_steps": 150}),
    **dict.fromkeys(("adapt", "baseline", "blind"), steps(200)),
}
"""What all variants have in half an hour."""

ABLATIONS: dict[str, Layer] = {
    "position-keys": {"assemble": {"key_source": "position"}},
    "shared-qformer": dict.fromkeys(TRAINED, {"shared_qformer": True}),
    "no-camera-vector": dict.fromkeys(TRAINED, VECTORS),
    "untrained-queries": dict.fromkeys(TRAINED, QUERIES),
    "no-attention": dict.fromkeys(("read", "adapt"), {"camera_attention_loss": 0.0}),
    "no-reading": {"assemble": {"from": "toybase"}},
    "no-align": dict.fromkeys(("adapt", "merge"), {"from": "assemble"}),
    "frozen-projector": {"adapt": {"projector": "frozen", "projector_learning_rate": None}},
    "with-transfer": {
        "transfer": {
            "like": "align_qformers",
            "module": "transfer",
            "from": "align_qformers",
            "teacher": "align",
            "train_tower": False,
            "feature_cache": "features",
            "per_device_eval_batch_size": 16,
        },
        **dict.fromkeys(("adapt", "merge"), {"from": "transfer"}),
    },
    "healed": {
        "heal": {
            "like": "adapt",
            "from": "align_qformers",
            "language_model": "frozen",
            "train_embeddings": False,
            "load_in_4bit": False,
            "learning_rate": 2.0e-4,  # the projector's in `adapt`
            "projector_learning_rate": None,
            "merge": True,
            **steps(200),
        },
        **dict.fromkeys(("adapt", "merge"), {"from": "heal"}),
    },
}
RIGS: dict[str, Layer] = {  # each trained on, from its own world
    "seven": {
        "toyworld": {"rig": "seven", "seed": 3},
        "read": {"rig": "seven"},
        "assemble": {"cameras": list(read_rig("seven").names)},
    },
    "van": {"toyworld": {"rig": VAN, "seed": 4}, "read": {"rig": VAN}},
}
UNSEEN = {"scenes": 60, "seed": 2}
WORLDS: dict[str, Layer] = {  # that no model has seen, to be asked about
    "fog": {"toyworld": {**UNSEEN, "weathers": ["fog"]}, "prepare": {"split": "test"}},
    "other-rig": {"toyworld": {**UNSEEN, "rig": VAN}, "prepare": {"split": "test"}},
}
STUDY: dict[str, dict[str, Layer]] = {  # factor → value → what it changes; the recipe's own is a value too
    "tokens a camera, trained and asked": {
        f"tokens-{count}": {"adapt": {"num_queries": [count]}} for count in (4, 8, 16)
    },
    "image size": {
        f"pixels-{size}": {
            "assemble": {"image_size": size},
            **dict.fromkeys(TRAINED, {"feature_cache": f"features/student-{size}"}),
        }
        for size in (168,)
    },
    "width of the Q-Formers": {
        f"width-{width}": {"assemble": {"projector_hidden_size": width}} for width in (128, 384)
    },
    "rank of the adapter": {f"rank-{rank}": {"adapt": {"lora_r": rank, "lora_alpha": 2 * rank}} for rank in (16, 128)},
    "learning rate": {f"rate-{rate}e-4": {"adapt": {"learning_rate": rate * 1.0e-4}} for rate in (5, 20)},
}
SHORT: Layer = {"adapt": steps(300)}
"""Of the study: one factor at a time, in shorter runs."""

LAYERS: dict[str, Layer] = {
    **ABLATIONS,
    **RIGS,
    **WORLDS,
    "short": SHORT,
    **{value: layer for values in STUDY.values() for value, layer in values.items()},
}


@dataclass(frozen=True)
class Variant:
    """What is trained and asked.

    Attributes:
        result: the section whose result is asked.
        layers: keys of `LAYERS`, changes on the way there.
        blind: the variant that was trained without pictures on the same world; None: this is one.
        reference: the variant that it is compared with.
        num_queries: tokens a camera that it is asked with; None: its own.
    """

    result: str = "merge"
    layers: tuple[str, ...] = ()
    blind: str | None = "blind"
    reference: str | None = "smoldriver"
    num_queries: int | None = None


def models(prefix: str, *layers: str) -> dict[str, Variant]:
    """SmolDriver, the baseline and the control that sees nothing, on one world."""
    ours, blind = f"{prefix}smoldriver", f"{prefix}blind"
    return {
        ours: Variant("merge", layers, blind, None),
        f"{prefix}smolvlm-ft": Variant("baseline", layers, blind, ours),
        blind: Variant("blind", layers, None, ours),
    }


def tokens_of(layers: tuple[str, ...]) -> int | None:
    """The budget that a variant of the study is trained and asked with."""
    return next((int(layer.removeprefix("tokens-")) for layer in layers if layer.startswith("tokens-")), None)


def studied(layers: tuple[str, ...], reference: str | None, world: str | None = None) -> Variant:
    """A short run of the study, on a world of `RIGS` or the recipe's own."""
    every = (*filter(None, [world]), "short", *layers)
    return Variant("merge", every, f"{world}-blind" if world else "blind", reference, tokens_of(layers))


GROUPS: dict[str, dict[str, Variant]] = {
    "models": models(""),
    "bases": {  # read and aligned, no step on pictures with language
        "smoldriver-base": Variant("align_qformers"),
        "smolvlm-base": Variant("align", reference="smolvlm-ft"),
    },
    "ablations": {name: Variant("merge", (name,)) for name in ABLATIONS},
    "rigs": {name: variant for rig in RIGS for name, variant in models(f"{rig}-", rig).items()},
    "study": {
        "study": studied((), None),
        **{f"study-{value}": studied((value,), "study") for values in STUDY.values() for value in values},
    },
}
"""What is trained, by what it is for, in this order."""

QUICK_ABLATIONS = ("no-attention", "no-reading")
ELSEWHERE = "seven"
"""World and rig on which the study's choice is tried once more."""


def joint(best: tuple[str, ...]) -> dict[str, Variant]:
    """The best values of all factors at once, on the study's world and on another, beside the recipe's own there."""
    return {
        "study-best": studied(best, "study"),
        "study-elsewhere": studied((), None, ELSEWHERE),
        "study-elsewhere-best": studied(best, "study-elsewhere", ELSEWHERE),
    }


VARIANTS: dict[str, Variant] = {name: variant for group in GROUPS.values() for name, variant in group.items()}
