"""From variants to one recipe: every stage once, shared by all variants that need it as it is.

A section is called after where it lies: `seed0.read`, `seed0.shared-qformer.adapt`, `common.seven.toyworld`. That is
the seed, unless nothing has been trained yet, and the layers (`variants.LAYERS`) that touch the section or what it is
made from. So two variants that differ only further down name the same section, and it runs once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from benchmarks.toyworld.variants import LAYERS, Layer, Variant
from training.stages.recipes import PlannedStage, Recipe, kinds_of, module_of, needed, plan

Sections = dict[str, dict[str, Any]]
COMMON = "common"


@dataclass(frozen=True)
class Planned:
    """The sections that a variant needs, under the names of the one recipe.

    Attributes:
        sections: in order.
        result: the section whose result is asked.
        data: the one that prepared what it is asked about.
    """

    sections: Sections
    result: str
    data: str


def planned(variant: Variant, seed: int, whole: Recipe, root: Path) -> Planned:
    """A variant's road.

    Args:
        whole: the recipe whose numbers all variants have.
        root: the folder of all.

    Raises:
        ValueError: the recipe's data are not made by the recipe, or it lacks a section that a layer changes.
    """
    if whole.data not in whole.sections:
        raise ValueError(f"{whole.file}: data must name the section that prepares a toy world; got {whole.data!r}")
    sections = whole.sections
    for layer in variant.layers:
        sections = changed(sections, LAYERS[layer])
    stages = plan(sections, root, whole.data)
    learnt = after_learning(whole, root)
    names = {}
    for name in needed(stages, variant.result, whole.data):
        road = needed(stages, name)
        touched = [layer for layer in variant.layers if not LAYERS[layer].keys().isdisjoint(road)]
        seeded = name in learnt or name not in whole.sections
        names[name] = ".".join([f"seed{seed}" if seeded else COMMON, *touched, name])
    found: Sections = {}
    for name, full in names.items():
        section = named(sections[name], stages[name], names, whole.data) | {"output_dir": str(folder_of(root, full))}
        if full.startswith("seed") and takes_seed(sections[name]["module"]):
            section["seed"] = seed
        found[full] = section
    return Planned(found, names[variant.result], names[whole.data])


def folder_of(root: Path, name: str) -> Path:
    """Where a section's folder lies."""
    return root.joinpath(*name.split("."))


def changed(sections: Mapping[str, Mapping[str, Any]], layer: Layer) -> Sections:
    """Sections with a layer's changes; new ones stand behind the one that they start from.

    Raises:
        ValueError: a section that is neither there nor new.
    """
    found = {name: {**section, **layer.get(name, {})} for name, section in sections.items()}
    for name in layer.keys() - found.keys():
        if "like" not in layer[name]:
            raise ValueError(
                f"the recipe has no section {name}, which a variant changes; it has {', '.join(sections)}"
            )
        new = {**sections[layer[name]["like"]], **layer[name]}
        new.pop("like")
        order = list(found)
        order.insert(order.index(new["from"]) + 1, name)
        found = {one: new if one == name else found[one] for one in order}
    return {name: {key: value for key, value in one.items() if value is not None} for name, one in found.items()}


def after_learning(whole: Recipe, root: Path) -> set[str]:
    """The sections of a recipe that train, and all that are made from one: what a seed changes."""
    stages = plan(whole.sections, root, whole.data)
    trains = {name for name, stage in stages.items() if learns(stage.module)}
    return {name for name in stages if not trains.isdisjoint(needed(stages, name))}


def learns(module: str) -> bool:
    return any(issubclass(kind, TrainingArguments) for kind in kinds_of(module_of(module)))


def takes_seed(module: str) -> bool:
    return any(one.name == "seed" for kind in kinds_of(module_of(module)) for one in fields(kind))


def named(
    section: Mapping[str, Any], stage: PlannedStage, names: Mapping[str, str], data: str | None
) -> dict[str, Any]:
    """A section that names what it reads by its name in the one recipe.

    Args:
        stage: the section as planned.
        names: the sections' names there.
        data: what it reads if it does not say.
    """

    def renamed(value: str) -> str:
        source, slash, file = value.partition("/")
        return f"{names[source]}{slash}{file}" if source in names else value

    found = dict(section)
    for key in stage.reads:
        said = "from" if key == stage.stage.start and "from" in section else key
        value = section.get(said, data)
        found[said] = [renamed(one) for one in value] if isinstance(value, list) else renamed(str(value))
    return found


def together(roads: Sequence[Planned]) -> Sections:
    """All sections, each once.

    Raises:
        ValueError: two of one name that are not the same: layers that touch one section in turn do not commute.
    """
    found: Sections = {}
    for road in roads:
        for name, section in road.sections.items():
            if found.setdefault(name, section) != section:
                raise ValueError(f"two variants want different sections {name}")
    return found
