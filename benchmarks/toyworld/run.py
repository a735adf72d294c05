"""The embedded benchmark: SmolVLM-FT and SmolDriver on the toy world, beside a model that never sees.

    python -m benchmarks.toyworld                        # everything, two stages side by side; resumes
    python -m benchmarks.toyworld --quick                # half an hour: shorter stages, one seed, two ablations
    python -m benchmarks.toyworld --only models study    # groups of `variants.GROUPS`, or single variants

All have the numbers of training/recipes/toyworld.yaml: equal rows, steps and adapter size.

    models      SmolDriver, SmolVLM-FT and the same language model trained without pictures, for every seed
    bases       both as they are once read and aligned, before a step on pictures with language
    ablations   SmolDriver without one part, or with one stage more (`variants.ABLATIONS`); the first seed, and where
                the interval of the difference holds zero further ones (`--ablation_seeds`)
    rigs        the three models on worlds with other cameras; those of the first world are also asked about one
    study       SmolDriver in shorter runs, one number of the recipe changed at a time; then all that helped at once,
                on the same world and on another one with another rig

`plan` makes one recipe of it, in which every stage that two variants share runs once; `training.run` works through
it: its record is `OUTPUT_DIR/run.json`, what stages say is in `OUTPUT_DIR/logs`. A run that is killed goes on. The
results are written anew after every evaluation.
"""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from benchmarks.toyworld.asking import Extent, evaluations
from benchmarks.toyworld.plan import Planned, Sections, changed, planned, together
from benchmarks.toyworld.report import report
from benchmarks.toyworld.results import best_values, collect, undecided
from benchmarks.toyworld.variants import (
    GROUPS,
    QUICK,
    QUICK_ABLATIONS,
    VARIANTS,
    Variant,
    joint,
)
from training import run as runner
from training.checkpoints.offline_parts import fetch_dinov2_small, fetch_minilm
from training.stages.files import command_of, write_json
from training.stages.recipes import read_recipe

ENV = {  # as stages go on side by side; the rest keeps what was once allocated, as in the recipes
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
TEST_FRAMES = 60  # of the test split, chosen by hash: 1,200 questions to each of the models
OTHER_FRAMES = 40  # among these, of other variants
QUICK_FRAMES = 40
BRIEF_FRAMES = 20


@dataclass
class ToyworldArguments:
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of all stages; default: outputs/benchmark, quick: …-quick."}
    )
    output: str | None = field(
        default=None,
        metadata={"help": "File of the results; default: benchmarks/results/toyworld.json, quick: in output_dir."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the models."})
    ablation_seeds: int = field(
        default=1, metadata={"help": "For how many of the seeds ablations are trained that one seed does not decide."}
    )
    recipe: str = field(default="toyworld", metadata={"help": "Recipe whose numbers all have: name or file."})
    quick: bool = field(default=False, metadata={"help": "Shorter stages, one seed, two ablations, fewer questions."})
    brief: bool = field(default=False, metadata={"help": "Still fewer questions, about the recipe's world alone."})
    only: list[str] | None = field(default=None, metadata={"help": "Groups and variants; default: all."})
    jobs: int = field(default=2, metadata={"help": "Stages side by side, one thread each."})

    def __post_init__(self) -> None:
        known = (*GROUPS, *VARIANTS)
        if unknown := [name for name in self.only or [] if name not in known]:
            raise ValueError(f"only takes some of {', '.join(known)}; got {', '.join(unknown)}")
        if not self.seeds or self.ablation_seeds < 1:
            raise ValueError(f"at least one seed is needed; got {self.seeds} and ablation_seeds {self.ablation_seeds}")

    @property
    def root(self) -> Path:
        return Path(self.output_dir or f"outputs/benchmark{'-quick' * self.quick}").absolute()

    def extent(self, name: str, seed: int) -> Extent:
        """How much a variant of a seed is asked."""
        if self.brief or self.quick:
            return Extent(BRIEF_FRAMES if self.brief else QUICK_FRAMES)
        if name not in GROUPS["models"]:
            return Extent(OTHER_FRAMES)
        return Extent(TEST_FRAMES, worlds=True, spoilt=seed == self.seeds[0])

    @property
    def results(self) -> Path:
        if self.output is None and self.quick:
            return self.root / "results.json"
        return Path(self.output or "benchmarks/results/toyworld.json")


def chosen(args: ToyworldArguments) -> dict[str, Variant]:
    """The variants to run, in the order of `GROUPS`."""
    names = args.only or ([*GROUPS["models"], *QUICK_ABLATIONS] if args.quick else list(GROUPS))
    wanted = {one for name in names for one in GROUPS.get(name, [name])}
    return {name: variant for name, variant in VARIANTS.items() if name in wanted}


def recipe_of(
    variants: Mapping[str, Variant], seeds: Mapping[str, Sequence[int]], args: ToyworldArguments
) -> Sections:
    """The sections of the one recipe: what trains each variant and asks it.

    Args:
        seeds: of each variant.
    """
    whole = read_recipe(args.recipe)
    if args.quick:
        whole = replace(whole, sections=changed(whole.sections, QUICK))
    roads: list[Planned] = []
    for name, variant in variants.items():
        for seed in seeds[name]:
            road = planned(variant, seed, whole, args.root)
            roads += [road, *evaluations(name, variant, seed, road, whole, args.root, args.extent(name, seed))]
    return together(roads)


def work_through(
    variants: Mapping[str, Variant], sections: Sections, args: ToyworldArguments, **said: Any
) -> dict[str, Any]:
    """Run what is not there yet, write the results after each evaluation, and return them.

    Args:
        variants: all that the results shall tell of.
        said: what they say beside.
    """
    settings = {
        "command": command_of("toyworld", args, package="benchmarks"),
        "arguments": asdict(args),
        "recipe": read_recipe(args.recipe).sections,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")},
        **said,
    }

    def write() -> dict[str, Any]:
        content = {**settings, **collect(args.root, args.seeds, variants)}
        write_json(args.results, content, indent=1)
        return content

    def after(name: str) -> None:
        if sections[name]["module"] == "evaluate":
            write()

    file = args.root / "recipe.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = {"output_dir": str(args.root), "env": ENV, **sections}
    file.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    runner.run(read_recipe(str(file)), args.root, jobs=args.jobs, after=after)
    return write()


def main(args: ToyworldArguments) -> dict[str, Any]:
    """Run what is not there yet and write the results; returns them.

    Raises:
        ValueError: settings that no recipe can follow, or an output_dir that holds stages with others.
        ChildProcessError: stages failed; what does not need them is finished first.
    """
    fetch_dinov2_small()
    fetch_minilm()
    variants = chosen(args)
    first = args.seeds[:1]
    seeds = {name: first if args.quick or name not in GROUPS["models"] else args.seeds for name in variants}
    sections = recipe_of(variants, seeds, args)
    found = work_through(variants, sections, args)

    best = best_values(found)
    more = joint(best) if best else {}
    for name in undecided(found):
        if name in GROUPS["ablations"] and not args.quick and args.ablation_seeds > 1:
            more[name] = VARIANTS[name]
            seeds[name] = args.seeds[: args.ablation_seeds]
    if more:
        sections |= recipe_of(more, {**dict.fromkeys(more, first), **seeds}, args)
        found = work_through(variants | more, sections, args, study_best=best)
    print("\n" + report(found))
    return found
