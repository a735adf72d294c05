"""Figures follow from predictions, and two variants are compared on the seeds that both have."""

import json

import pytest
from evaluations import write_evaluation

from benchmarks.toyworld.results import best_values, collect, numbers, undecided
from benchmarks.toyworld.variants import GROUPS, STUDY, VARIANTS

SEES, HALF, BLIND = [True] * 6, [True, True, False] * 2, [True, False, False] * 2


@pytest.fixture
def report(tmp_path):
    for seed, answers in ((0, SEES), (1, HALF)):
        found = {"sighted": answers, "sighted@1": HALF, "black": BLIND}
        found |= {"permuted": BLIND} if seed == 0 else {}  # what the first seed alone is asked
        write_evaluation(tmp_path / f"seed{seed}/smoldriver/evaluation", found)
        write_evaluation(tmp_path / f"seed{seed}/blind/evaluation", {"sighted": HALF, "text_only": BLIND})
    write_evaluation(tmp_path / "seed0/smolvlm-ft/evaluation", {"sighted": HALF})
    write_evaluation(tmp_path / "seed2/no-align/evaluation", {"sighted": HALF})
    write_evaluation(tmp_path / "seed0/healed/evaluation", {"sighted": SEES})
    write_evaluation(tmp_path / "seed0/smoldriver/fog", {"sighted": HALF})
    write_evaluation(tmp_path / "seed0/blind/fog", {"sighted": SEES, "text_only": BLIND})
    write_evaluation(tmp_path / "seed0/smoldriver/corruptions", {"sighted": SEES, "corrupt:fog:3": HALF})
    finished = {"status": "finished", "minutes": 2.0, "command": "python -m training.read --x", "figures": {"a": 1}}
    asked = {**finished, "command": "python -m training.evaluate --x"}
    stages = {"seed0.read": finished, "seed1.read": {**finished, "status": "running"}, "seed0.blind.evaluation": asked}
    (tmp_path / "run.json").write_text(json.dumps({"stages": stages}))
    return collect(tmp_path, [0, 1, 2], VARIANTS)


def test_means_over_seeds(report):
    ours = report["models"]["smoldriver"]
    assert ours["seeds"] == 2 and ours["per_seed"]["perception"] == [1.0, pytest.approx(2 / 3)]
    assert ours["perception"]["estimate"] == pytest.approx(5 / 6)
    assert report["models"]["blind"]["perception"]["estimate"] == pytest.approx(1 / 3)  # its answers without images
    existence = ours["headline"]["existence"]
    assert existence["score"]["estimate"] == pytest.approx(5 / 6) and existence["per_seed"][0] == 1
    assert existence["score"]["low"] == pytest.approx(5 / 6 - 0.1) and existence["blind"]["estimate"] == 0.3
    assert ours["headline"]["follow"]["blind"] is None and report["models"]["blind"]["headline"] == {}
    moved = ours["controls"]["permuted"]
    assert moved["seeds"] == 1 and moved["perception"] == pytest.approx(1 / 3)
    assert moved["minus_sighted"]["perception"]["estimate"] == pytest.approx(-2 / 3)  # of the same run
    assert ours["controls"]["black"]["seeds"] == 2
    assert ours["corruptions"]["corrupt:fog:3"]["perception"] == pytest.approx(2 / 3)


def test_variants_are_compared_on_the_seeds_that_both_have(report):
    minus = report["minus_blind"]["smoldriver"]["perception"]
    assert minus["estimate"] == pytest.approx(1 / 2) and minus["scenes"] == 2
    assert report["reference_minus"]["smolvlm-ft"]["perception"]["estimate"] == pytest.approx(1 / 3)  # of seed 0
    assert "no-align" in report["models"] and "no-align" not in report["reference_minus"]  # no seed in common
    assert "no-reading" not in report["models"] and "smoldriver" not in report["reference_minus"]
    assert report["at_budget_minus_smolvlm_ft"]["1"]["perception"]["estimate"] == pytest.approx(0)
    fog = report["worlds"]["fog"]
    assert fog["blind"]["perception"]["estimate"] == pytest.approx(1 / 3) and "smolvlm-ft" not in fog
    assert fog["smoldriver_minus_blind"]["perception"]["estimate"] == pytest.approx(1 / 3)
    assert undecided(report) == ["healed"]  # equal; the baseline's interval is above zero


def test_minutes_are_those_of_finished_stages(report):
    assert report["stages"] == {"seed0.read": {"minutes": 2.0, "a": 1}, "seed0.blind.evaluation": {"minutes": 2.0}}
    assert numbers({"a": 1, "b": "c", "d": {"e": 2.0, "f": []}, "g": {}, "arguments": {"seed": 0}}) == {
        "a": 1,
        "d": {"e": 2.0},
    }


def test_the_best_value_of_each_factor_beats_the_recipe_own():
    right = dict.fromkeys(GROUPS["study"], 0.5) | {"study-tokens-8": 0.7, "study-tokens-4": 0.6, "study-rank-16": 0.4}
    models = {name: {"perception": {"estimate": value}} for name, value in right.items()}
    assert best_values({"models": models}) == ("tokens-8",)
    del models[f"study-{next(iter(STUDY['image size']))}"]
    assert best_values({"models": models}) == ()  # not all of the study is there
