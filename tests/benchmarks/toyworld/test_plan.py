"""Variants become one recipe: a variant differs in nothing but its layers, and what two share is there once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.toyworld.plan import Planned, changed, planned, together
from benchmarks.toyworld.variants import (
    ABLATIONS,
    GROUPS,
    LAYERS,
    QUICK,
    RIGS,
    STUDY,
    VARIANTS,
    WORLDS,
    Variant,
    joint,
)
from training.data.rig import NUSCENES, read_rig
from training.run import ROOT
from training.stages.recipes import RECIPES, Recipe, plan, read_recipe

RECIPE = RECIPES / "toyworld.yaml"
EQUAL = ("language_model", "lora_r", "lora_alpha", "lora_dropout", "train_embeddings", "load_in_4bit", "tower")
EQUAL += ("questions", "max_steps", "per_device_train_batch_size", "pairs_per_sequence", "reword", "learning_rate")
EQUAL += ("lr_scheduler_type", "lr_scheduler_kwargs")
LOOKING = ("projector", "projector_learning_rate", "camera_attention_loss")  # of those that see


@pytest.fixture(scope="module")
def whole() -> Recipe:
    return read_recipe(str(RECIPE))


def test_all_models_have_equal_means():
    recipe = yaml.safe_load(RECIPE.read_text())
    for changes in ({}, *RIGS.values(), QUICK):
        sections = changed({name: one for name, one in recipe.items() if "module" in one}, changes)
        for stage, names in (("baseline", EQUAL + LOOKING), ("blind", EQUAL)):
            assert {key: sections[stage].get(key) for key in names} == {
                key: sections["adapt"].get(key) for key in names
            }
        assert sections["align"]["max_steps"] == sections["align_qformers"]["max_steps"]
        assert sections["align"]["learning_rate"] < sections["align_qformers"]["learning_rate"]  # or it explodes
    assert "fog" not in recipe["toyworld"]["weathers"]
    seeds = [layer["toyworld"]["seed"] for layer in (*RIGS.values(), WORLDS["fog"])]
    assert recipe["toyworld"]["seed"] not in seeds and len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_differs_in_nothing_but_its_layers(name, whole, tmp_path):
    variant = VARIANTS[name]
    road = planned(variant, 7, whole, tmp_path)
    assert plan(road.sections, tmp_path, None)  # its commands understand it
    sections = whole.sections
    for layer in variant.layers:
        sections = changed(sections, LAYERS[layer])
    before = plan(sections, tmp_path, whole.data)
    for full, section in road.sections.items():
        place, *layers, stage = full.split(".")
        assert set(layers) <= set(variant.layers)
        assert Path(section["output_dir"]) == tmp_path.joinpath(place, *layers, stage)
        told = {"module": before[stage].module, **before[stage].arguments}
        differing = {key for key in section if section[key] != told.get(key)}
        where = {"output_dir", "from", *before[stage].stage.inputs, *before[stage].stage.caches}
        assert differing <= {"seed", *where}
        assert (place == "common") == (stage in ("toyworld", "prepare", "toybase"))
        assert place == "common" or stage == "merge" or section["seed"] == 7
    shared = [full for full in road.sections if full.count(".") == 1]
    untouched = [stage for stage in before if not any(stage in LAYERS[layer] for layer in variant.layers)]
    assert {full.split(".")[-1] for full in shared} <= set(untouched)
    assert road.result.endswith(f".{variant.result}") and road.data.endswith(".prepare")


def sections_of(names: list[str], seed: int, whole: Recipe, root: Path) -> dict[str, Any]:
    return together([planned(VARIANTS[name], seed, whole, root) for name in names])


def test_what_variants_share_is_there_once(whole, tmp_path):
    both = sections_of(["smoldriver", "no-camera-vector"], 1, whole, tmp_path)
    own = ["align_qformers", "adapt", "merge"]
    assert [name for name in both if "no-camera" in name] == [f"seed1.no-camera-vector.{stage}" for stage in own]
    assert both["seed1.no-camera-vector.align_qformers"]["from"] == "seed1.assemble"
    assert both["seed1.no-camera-vector.merge"]["adapter"] == "seed1.no-camera-vector.adapt"
    assert both["seed1.adapt"]["data"] == both["seed1.no-camera-vector.adapt"]["data"] == "common.prepare"
    assert both["common.toybase"]["drivelm_json"] == ["common.toyworld/drivelm.json"]
    planned_ones = plan(both, tmp_path, None)  # caches are shared, too
    caches = {one.arguments["feature_cache"] for one in planned_ones.values() if "feature_cache" in one.arguments}
    assert caches == {str(tmp_path / "features/student")}
    two = {**both, **sections_of(["smoldriver"], 2, whole, tmp_path)}
    assert [name for name in two if name.endswith(".read")] == ["seed1.read", "seed2.read"]
    assert sum(name.endswith(".toyworld") for name in two) == 1


def test_layers_meet_where_both_touch(whole, tmp_path):
    best = joint(("tokens-8", "width-128"))
    road = planned(best["study-elsewhere-best"], 0, whole, tmp_path)
    assert "seed0.seven.read" in road.sections  # of which the study's values know nothing
    assert road.sections["seed0.seven.width-128.assemble"]["projector_hidden_size"] == 128
    assert road.sections["seed0.seven.short.tokens-8.width-128.adapt"]["num_queries"] == [8]
    assert best["study-elsewhere-best"].num_queries == 8 and best["study-elsewhere"].num_queries is None


def test_new_stages_stand_behind_what_they_start_from(whole, tmp_path):
    road = planned(VARIANTS["with-transfer"], 0, whole, tmp_path).sections
    assert road["seed0.with-transfer.transfer"]["teacher"] == "seed0.align"
    assert road["seed0.with-transfer.adapt"]["from"] == "seed0.with-transfer.transfer"
    heal = planned(VARIANTS["healed"], 0, whole, tmp_path).sections["seed0.healed.heal"]
    assert heal["language_model"] == "frozen" and "projector_learning_rate" not in heal and "like" not in heal
    with pytest.raises(ValueError, match="no section adopt, which a variant changes; it has toyworld, prepare"):
        changed(whole.sections, {"adopt": {"max_steps": 1}})
    with pytest.raises(ValueError, match="data must name the section that prepares a toy world; got 'elsewhere'"):
        planned(Variant(), 0, replace(whole, data="elsewhere"), tmp_path)


def test_sections_that_differ_are_no_one_section():
    one, other = (Planned({"seed0.adapt": {"max_steps": steps}}, "", "") for steps in (1, 2))
    with pytest.raises(ValueError, match=r"two variants want different sections seed0.adapt"):
        together([one, other])


def test_every_layer_is_used_and_every_factor_has_values():
    used = {layer for variant in VARIANTS.values() for layer in variant.layers}
    assert used | set(WORLDS) == set(LAYERS)
    assert all(STUDY.values()) and set(ABLATIONS) == set(GROUPS["ablations"])
    known = {None, *VARIANTS}
    assert all({variant.blind, variant.reference} <= known for variant in VARIANTS.values())


def test_the_van_has_nuscenes_names_and_unlike_cameras():
    van = read_rig(WORLDS["other-rig"]["toyworld"]["rig"])
    assert van.names == NUSCENES.names and list(van.sectors) == list(NUSCENES.sectors)  # the same questions
    assert all(van[name].field_of_view != NUSCENES[name].field_of_view for name in van.names)
    assert len({van[name].field_of_view for name in van.names}) == len(van.names)
    assert RECIPE.is_relative_to(ROOT)
