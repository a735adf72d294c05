"""Recipes: what a section becomes, what it may name, and that every recipe is understood by its commands."""

from pathlib import Path

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments

from training.stages.files import flags
from training.stages.recipes import PROCESSES, RECIPES, Stage, kinds_of, module_of, needed, plan, read_recipe

NAMES = sorted(file.stem for file in RECIPES.glob("*.yaml"))
PREPARE = {"module": "prepare", "from": "world", "drivelm_json": "world/drivelm.json"}
TUNE = {"module": "finetune", "data": "rows"}
SECTIONS = {
    "world": {"module": "toyworld", "scenes": 3},
    "rows": PREPARE,
    "start": {"module": "assemble", "offline": True},
    "first": TUNE | {"from": "start"},
    "second": TUNE | {"from": "first", "merge": False},
    "whole": {"module": "merge", "from": "first", "adapter": "second"},
}


def test_each_stage_starts_from_the_one_it_names(tmp_path):
    stages = plan(SECTIONS, tmp_path, None)
    assert list(stages) == list(SECTIONS)
    given = {name: stage.arguments for name, stage in stages.items()}
    assert given["rows"]["drivelm_json"] == str(tmp_path / "world/drivelm.json")
    assert given["rows"]["image_root"] == str(tmp_path / "world")
    assert given["first"]["data"] == given["second"]["data"] == str(tmp_path / "rows")
    assert given["first"]["checkpoint"] == str(tmp_path / "start")
    assert given["second"]["checkpoint"] == given["whole"]["checkpoint"] == str(tmp_path / "first/final")
    assert given["whole"]["adapter"] == str(tmp_path / "second/adapter")
    assert {name: given[name]["output_dir"] for name in stages} == {name: str(tmp_path / name) for name in stages}
    assert stages["second"].source == "first" and stages["start"].source is None
    assert stages["whole"].reads == {"checkpoint": ["first"], "adapter": ["second"]}


def test_what_a_section_says_counts(tmp_path):
    said = {"checkpoint": "elsewhere/model", "data": "elsewhere/data", "output_dir": "elsewhere/out"}
    sections = {"first": {"module": "finetune", **said}, "second": {"module": "finetune", "from": "first"}}
    stages = plan(sections, tmp_path, "here/data")
    assert stages["first"].arguments == said
    assert stages["second"].arguments["checkpoint"] == str(Path("elsewhere/out/final"))
    assert stages["second"].arguments["data"] == "here/data"


def test_the_data_of_all_may_be_a_stage(tmp_path):
    stages = plan({**SECTIONS, "first": {"module": "finetune", "from": "start"}}, tmp_path, "rows")
    assert stages["first"].arguments["data"] == str(tmp_path / "rows") and stages["first"].reads["data"] == ["rows"]


def test_lists_of_files_and_caches(tmp_path):
    files = ["world/drivelm.json", "elsewhere.json"]
    base = {"module": "toyworld.smolvlm", "drivelm_json": files}
    cached = TUNE | {"from": "base", "feature_cache": "features/teacher"}
    stages = plan({"world": SECTIONS["world"], "base": base, "cached": cached}, tmp_path, None)
    assert stages["base"].arguments["drivelm_json"] == [str(tmp_path / "world/drivelm.json"), "elsewhere.json"]
    assert stages["cached"].arguments["feature_cache"] == str(tmp_path / "features/teacher")
    own = plan({"cached": cached | {"feature_cache": "/own", "from": "base"}}, tmp_path, "rows", made=stages)
    assert own["cached"].arguments["feature_cache"] == "/own"


def test_stages_made_elsewhere(tmp_path):
    before = plan({name: SECTIONS[name] for name in ("world", "rows", "start", "first")}, tmp_path / "common", None)
    after = plan({"second": SECTIONS["second"], "whole": SECTIONS["whole"]}, tmp_path / "run", None, made=before)
    assert list(after) == ["second", "whole"]
    assert after["second"].arguments["checkpoint"] == str(tmp_path / "common/first/final")
    assert after["whole"].arguments["adapter"] == str(tmp_path / "run/second/adapter")


def test_what_a_stage_needs(tmp_path):
    stages = plan({**SECTIONS, "aside": TUNE | {"from": "start"}}, tmp_path, None)
    assert needed(stages, "first") == ["world", "rows", "start", "first"]
    assert needed(stages, "aside", "rows") == ["world", "rows", "start", "aside"]
    assert needed(stages, "whole") == list(SECTIONS)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"first": {"module": "finetune"}}, "section first: it needs checkpoint, data;"),
        (
            {"start": SECTIONS["start"], "first": {"module": "finetune", "from": "start"}},
            "section first: it needs data",
        ),
        ({"whole": {"module": "merge", "checkpoint": "a/b"}}, "section whole: it needs adapter"),
        ({"first": TUNE | {"from": "start"}}, "section first: it starts from 'start', which is no section before it"),
        ({"first": TUNE | {"from": "later"}, "later": SECTIONS["start"]}, "starts from 'later', which is no section"),
        (
            {"start": SECTIONS["start"], "x": TUNE | {"from": "start", "checkpoint": "a/b"}},
            "cannot say from: checkpoint",
        ),
        ({"a": SECTIONS["start"], "world": SECTIONS["world"] | {"from": "a"}}, "its command starts from nothing"),
        ({"first": TUNE | {"checkpoint": "a/b"}, "rows": PREPARE}, "its data names section rows, which does not come"),
        ({"first": TUNE | {"checkpoint": "a/b", "lerning_rate": 1}}, "training.finetune has no argument lerning_rate"),
        ({"world": SECTIONS["world"] | {"processes": 2}}, "has no argument processes"),
        ({"first": {"module": "fine_tune"}}, "section first: there is no command training.fine_tune"),
        ({"first": {"module": "no.such"}}, "there is no command training.no.such"),
        ({"first": {"module": "stages"}}, "there is no command training.stages"),
        ({"first": {"module": "report"}}, "training.report is no stage of a recipe: it declares no STAGE"),
    ],
)
def test_sections_that_cannot_run(tmp_path, sections, message):
    with pytest.raises(ValueError, match=message):
        plan(sections, tmp_path, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"env": {"A": 3}}, "is no recipe: it has no section of a stage"),
        ({}, "is no recipe"),
        ([1], "is no recipe"),
        ({"toyworld": 3}, "section toyworld must hold arguments, one a line; got 3"),
        ({"toyworld": ["scenes"]}, "section toyworld must hold arguments"),
        ({"heal": {"max_steps": 3}}, "section heal must say which command it runs, e.g. module: finetune"),
    ],
)
def test_what_is_no_recipe(tmp_path, content, message):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        read_recipe(str(tmp_path / "recipe.yaml"))


def test_unknown_recipes_name_the_known_ones(tmp_path):
    for name in ("no-such-recipe", str(tmp_path / "none.yaml")):
        with pytest.raises(ValueError, match="no recipe .*training/recipes has .*'toyworld'"):
            read_recipe(name)


def test_what_is_common_is_merged_into_sections(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "env: {A: 3}\ncommon:\n  steps: &steps {seed: 0, scenes: 3}\n"
        "world:\n  <<: *steps\n  module: toyworld\n  scenes: 4\n"
    )
    recipe = read_recipe(str(tmp_path / "recipe.yaml"))
    assert recipe.sections == {"world": {"module": "toyworld", "seed": 0, "scenes": 4}}
    assert (recipe.output_dir, recipe.data, recipe.env) == ("outputs/recipe", None, {"A": "3"})


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_understood_by_its_commands(name, tmp_path):
    """Each command's parser takes exactly the words that the runner would give it."""
    recipe = read_recipe(name)
    sections = dict(recipe.sections)
    if name == "nine-frames":  # whose file training.overfit names
        sections["prepare"] = {**sections["prepare"], "drivelm_json": "file.json", "image_root": "images"}
    if name == "demo":  # whose model benchmarks.demo names
        sections["learn"] = {**sections["learn"], "checkpoint": "model"}
    for stage in plan(sections, tmp_path, recipe.data).values():
        words = flags({key: value for key, value in stage.arguments.items() if key != PROCESSES})
        kinds = kinds_of(module_of(stage.module))
        if any(issubclass(kind, TrainingArguments) for kind in kinds):
            words += ["--use_cpu", "true"]  # a recipe for an accelerator is read here without one
        HfArgumentParser(kinds).parse_args_into_dataclasses(words)  # refuses a word that it does not know


def test_a_command_declares_itself():
    assert module_of("toyworld").STAGE == Stage()
    tune = module_of("finetune").STAGE
    assert tune.result({}) == "final" and tune.result({"merge": False}) == "adapter"
