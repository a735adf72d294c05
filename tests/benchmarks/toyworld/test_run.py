"""The embedded benchmark: its models have equal means, its recipes are the toy world's, its figures follow from
predictions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import tables
from benchmarks.toyworld.results import collect
from benchmarks.toyworld.run import (
    ONE_THREAD,
    VARIANTS,
    common_stages,
    pretrained_smolvlm,
    run_name,
    unseen_stages,
    variant_stages,
    written,
)
from training.run import ROOT
from training.stages.recipes import RECIPES, Recipe, plan, read_recipe

RECIPE = RECIPES / "toyworld.yaml"

EQUAL = ("language_model", "lora_r", "lora_alpha", "lora_dropout", "train_embeddings", "load_in_4bit", "tower")
EQUAL += ("questions", "max_steps", "per_device_train_batch_size", "pairs_per_sequence", "learning_rate")
EQUAL += ("lr_scheduler_type", "projector")


@pytest.mark.parametrize("name", ["toyworld", "demo"])
def test_all_models_have_equal_means(name):
    recipe = yaml.safe_load((RECIPE.parent / f"{name}.yaml").read_text())
    for stage, like in (("baseline", "adapt"), ("blind", "adapt")):
        assert {key: recipe[stage].get(key) for key in EQUAL} == {key: recipe[like].get(key) for key in EQUAL}
    assert recipe["heal"]["questions"] == recipe["pretrain"]["questions"]  # its language model is frozen
    assert "fog" not in recipe["toyworld"]["weathers"] + recipe["pictures"]["weathers"]
    assert recipe["toyworld"]["seed"] != recipe["pictures"]["seed"]


SECTIONS = {
    "smolvlm-ft": ["baseline"],
    "blind": ["assemble", "blind"],
    "no-transfer": ["assemble", "heal", "adapt", "merge"],
}  # of the others: all that make SmolDriver


def recipe_of(variant: str, seed: int, root: Path, whole: Recipe) -> dict[str, Any]:
    return written(root / run_name(variant, seed), variant_stages(variant, seed, root, whole), ONE_THREAD)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_differs_in_nothing_but_its_changes(variant, tmp_path):
    whole = read_recipe(str(RECIPE))
    recipe = recipe_of(variant, 7, tmp_path, whole)
    _, changes = VARIANTS[variant]
    sections = {name: section for name, section in recipe.items() if name not in ("output_dir", "env")}
    assert list(sections) == SECTIONS.get(variant, ["assemble", "transfer", "heal", "adapt", "merge"])
    everything = plan(whole.sections, Path(whole.output_dir), whole.data)
    ours = {"seed", "feature_cache", "output_dir", *everything["assemble"].stage.inputs}  # where things lie
    for name, section in sections.items():
        before = {"module": everything[name].module, **everything[name].arguments}
        ours |= set(everything[name].stage.inputs)
        changed = {key for key in section if section[key] != before.get(key)} - ours
        assert changed == set(changes.get(name, {})) - {"from"}
        assert section.get("seed", 7) == 7
        if changed & {"shared_qformer", "keep_frozen"}:  # where the projector is frozen they would change nothing
            assert section.get("projector", "full") == "full"
    again = plan(sections, Path(recipe["output_dir"]), None)
    assert {name: stage.arguments for name, stage in again.items()} == {
        name: {key: value for key, value in section.items() if key != "module"} for name, section in sections.items()
    }


def test_what_all_models_share(tmp_path):
    whole = read_recipe(str(RECIPE))
    made = list(whole.sections)[: list(whole.sections).index("assemble")]
    assert list(common_stages(tmp_path, whole)) == made
    assert pretrained_smolvlm(tmp_path, whole) == tmp_path / "common" / "pretrain" / "final"
    unseen = unseen_stages(tmp_path, whole)
    assert unseen["toyworld"].arguments["weathers"] == ["fog"] and unseen["prepare"].arguments["split"] == "test"
    assert unseen["prepare"].arguments["image_root"] == str(tmp_path / "unseen" / "toyworld")
    with pytest.raises(ValueError, match="data must name the section that prepares a toy world; got 'elsewhere'"):
        unseen_stages(tmp_path, replace(whole, data="elsewhere"))


def test_runs_share_the_worlds_and_caches_and_name_their_inputs_by_path(tmp_path):
    whole = read_recipe(str(RECIPE))
    recipe = recipe_of("no-transfer", 1, tmp_path, whole)
    assert recipe["heal"]["checkpoint"] == str(tmp_path / "seed1" / "no-transfer" / "assemble")
    assert recipe["assemble"]["smolvlm"] == str(tmp_path / "common" / "pretrain" / "final")
    assert recipe["heal"]["data"] == str(tmp_path / "common" / "prepare_documents")
    assert recipe["adapt"]["data"] == str(tmp_path / "common" / "prepare")
    assert recipe["adapt"]["feature_cache"] == str(tmp_path / "features" / "student")
    assert recipe["merge"]["adapter"] == str(tmp_path / "seed1" / "no-transfer" / "adapt" / "adapter")


def write_evaluation(folder: Path, right: dict[str, list[bool]], controls: list[str]) -> None:
    """An evaluation in which each control answers three questions in each of two scenes right or wrong."""
    results = {}
    for control, answers in right.items():
        lines = []
        for number, good in enumerate(answers):
            row = {"question_id": str(number), "scene_token": f"scene{number // 3}", "category": "perception"}
            row |= {"question": "Are there cars?", "reference": "Yes.", "answer": "Yes." if good else "No."}
            lines.append(json.dumps(row) + "\n")
        (folder / control).mkdir(parents=True)
        (folder / control / "predictions.jsonl").write_text("".join(lines))
        accuracy = {"perception": {"answers": len(answers), "accuracy": sum(answers) / len(answers)}}
        results[control] = {
            "visual_tokens_per_scene": 96.0,
            "by_category": accuracy,
            "by_type": {},
            "exact_match": 0.5,
        }
    metrics = {"results": results, "split_hash": "0" * 64, "arguments": {"controls": controls}}
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_figures_follow_from_predictions(tmp_path):
    sees, half, blind = [True] * 6, [True, True, False] * 2, [True, False, False] * 2
    for seed, answers in ((0, sees), (1, half)):
        found = {"sighted": answers, "sighted@1": half, "black": blind}
        found |= {"permuted": blind} if seed == 0 else {}  # controls that the first seed alone is asked
        write_evaluation(tmp_path / f"seed{seed}" / "smoldriver" / "evaluation", found, ["blind"])
        write_evaluation(
            tmp_path / f"seed{seed}" / "blind" / "evaluation", {"sighted": half, "text_only": blind}, ["text_only"]
        )
    write_evaluation(tmp_path / "seed0" / "smolvlm-ft" / "evaluation", {"sighted": half}, ["blind"])
    report = collect(tmp_path, [0, 1, 2], ["smoldriver", "smolvlm-ft", "blind", "no-transfer"])
    ours = report["models"]["smoldriver"]
    assert ours["seeds"] == 2 and ours["per_seed"]["perception"] == [1.0, pytest.approx(2 / 3)]
    assert ours["perception"]["estimate"] == pytest.approx(5 / 6)
    assert report["models"]["blind"]["perception"]["estimate"] == pytest.approx(1 / 3)  # its answers without images
    gap = report["sighted_minus_trained_blind"]["smoldriver"]["perception"]
    assert gap["estimate"] == pytest.approx(1 / 2) and gap["scenes"] == 2
    assert report["smoldriver_minus"]["smolvlm-ft"]["perception"]["estimate"] == pytest.approx(1 / 3)  # of seed 0
    assert report["smoldriver_at_budget_minus_smolvlm_ft"]["1"]["perception"]["estimate"] == pytest.approx(0)
    assert "no-transfer" not in report["models"]
    moved = ours["controls"]["permuted"]
    assert moved["seeds"] == 1 and moved["perception"] == pytest.approx(1 / 3)
    assert moved["minus_sighted"]["perception"]["estimate"] == pytest.approx(-2 / 3)  # of the same run
    assert ours["controls"]["black"]["seeds"] == 2
    write_evaluation(tmp_path / "smolvlm" / "evaluation", {"sighted": blind}, ["blind"])  # one run for all seeds
    write_evaluation(tmp_path / "seed2" / "no-transfer" / "evaluation", {"sighted": half}, ["blind"])
    both = collect(tmp_path, [0, 1, 2], ["smoldriver", "smolvlm", "blind", "no-transfer"])
    assert both["smoldriver_minus"]["smolvlm"]["perception"]["estimate"] == pytest.approx(1 / 2)
    assert "no-transfer" in both["models"] and "no-transfer" not in both["smoldriver_minus"]  # no seed in common
    text = tables.toyworld({**report, "command": "python -m benchmarks.toyworld"})
    assert "sighted − blind, all | black images % | BLEU" in text  # the blind controls that were asked
    assert "Text only, the fourth blind control, was asked of the blind model alone in this run." in text
    ours["controls"] |= {"text_only": moved, "template_majority": moved}
    everything = tables.toyworld({**report, "command": "python -m benchmarks.toyworld"})
    assert "| best answer per template % | no images % | black images % | BLEU" in everything
    assert "Text only" not in everything
    assert "moved around among them | 33.3 | -66.7 [" in text
    assert "| **SmolDriver** | 96 | 83.3 (100.0 66.7) |" in text and "+50.0 [" in text


def test_the_recipes_are_files_of_this_project():
    assert RECIPE.is_relative_to(ROOT) and RECIPE.is_file()
