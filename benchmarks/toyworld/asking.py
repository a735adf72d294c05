"""What a variant of the benchmark is asked: evaluations, as sections of the one recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.toyworld.plan import Planned, folder_of, planned
from benchmarks.toyworld.variants import BUDGETS, GROUPS, WORLDS, Variant
from training.checkpoints.offline_parts import fetch_minilm
from training.stages.recipes import Recipe

LOOKING = ("swap_left_right", "black_relevant")
"""Controls that tell, beside the blind ones, whether a model looks where a question points."""
SPOILT = ("drop_relevant", "permuted", "absent_object")
CORRUPTION_FRAMES = 15


@dataclass(frozen=True)
class Extent:
    """How much is asked.

    Attributes:
        frames: of the test split, chosen by hash.
        worlds: the models are asked about `WORLDS` too.
        spoilt: SmolDriver is asked with changed and spoilt images too.
    """

    frames: int
    worlds: bool = False
    spoilt: bool = False


def evaluations(
    name: str, variant: Variant, seed: int, road: Planned, whole: Recipe, root: Path, extent: Extent
) -> list[Planned]:
    """A variant's evaluations, with the worlds that are made for them; `road` is how it came about."""

    def asked(title: str, world: Planned, frames: int, controls: Sequence[str], **options: Any) -> Planned:
        full = f"seed{seed}.{name}.{title}"
        section: dict[str, Any] = {
            "module": "evaluate",
            "from": road.result,
            "data": world.data,
            "controls": list(controls),
        }
        section |= {"batch_size": 32, "max_new_tokens": 40, "max_frames": frames, "attention_frames": 0, **options}
        section |= {"output_dir": str(folder_of(root, full))}
        return Planned(world.sections | {full: section}, full, world.data)

    spoilt = extent.spoilt and name == "smoldriver"
    controls = controls_for(name, variant) + (SPOILT if spoilt else ())
    found = [asked("evaluation", road, extent.frames, controls, **options_for(name, variant))]
    if extent.worlds and name in GROUPS["models"]:
        own = "text_only" if variant.blind is None else "sighted"
        for title in WORLDS:
            world = planned(Variant(str(whole.data), (title,)), seed, whole, root)
            found.append(asked(title, world, extent.frames, [own]))
    if spoilt:
        found.append(asked("corruptions", road, CORRUPTION_FRAMES, ["corruptions"]))
    return found


def controls_for(name: str, variant: Variant) -> tuple[str, ...]:
    """The controls of a variant on its own world."""
    if variant.blind is None:
        return ("text_only",)
    if name in GROUPS["models"]:
        return ("blind", *LOOKING, "paraphrase")
    return ("sighted",) if name.startswith("study") else ("wrong_scene", *LOOKING)


def options_for(name: str, variant: Variant) -> dict[str, Any]:
    """Other arguments of `training.evaluate` that a variant has."""
    options: dict[str, Any] = {}
    if name in GROUPS["models"]:
        options["bert_model"] = str(fetch_minilm())
    if name == "smoldriver":
        options |= {"budgets": list(BUDGETS), "attention_frames": 8}
    if name in GROUPS["ablations"]:
        options["budgets"] = [1]
    if variant.num_queries:
        options["num_queries"] = variant.num_queries
    return options
