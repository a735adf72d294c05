"""Results as tables: a question each, sighted beside blind, and nothing of a road that is no more."""

import json

from evaluations import write_evaluation

from benchmarks import tables
from benchmarks.toyworld.report import OUTDATED, report
from benchmarks.toyworld.results import collect
from benchmarks.toyworld.variants import ABLATIONS, GROUPS, STUDY, VARIANTS, joint

SEES, HALF, BLIND = [True] * 6, [True, True, False] * 2, [True, False, False] * 2
SAID = {"command": "python -m benchmarks.toyworld ", "arguments": {"jobs": 2}}


def test_everything_is_told(tmp_path):
    variants = VARIANTS | joint(("tokens-8",))
    for name, variant in variants.items():
        ours = name.endswith("smoldriver")
        found = {"sighted": SEES if ours else HALF, "black": BLIND, "wrong_scene": BLIND, "sighted@1": HALF}
        found |= {"permuted": BLIND, "sighted@16": SEES} if ours else {}
        found |= {"text_only": BLIND} if variant.blind is None else {}
        found |= {"sighted": SEES} if name == "study-tokens-8" else {}
        write_evaluation(tmp_path / f"seed0/{name}/evaluation", found)
        if name in GROUPS["models"]:
            for world in ("fog", "other-rig"):
                write_evaluation(tmp_path / f"seed0/{name}/{world}", found)
    write_evaluation(tmp_path / "seed1/smoldriver/evaluation", {"sighted": HALF, "black": BLIND, "sighted@1": HALF})
    write_evaluation(tmp_path / "seed0/smoldriver/corruptions", {"sighted": SEES, "corrupt:fog:3": HALF})
    stage = {"status": "finished", "minutes": 3.0, "command": "python -m training.read --x", "figures": {}}
    (tmp_path / "run.json").write_text(json.dumps({"stages": {"seed0.read": stage, "seed1.read": stage}}))
    text = report({**collect(tmp_path, [0, 1], variants), **SAID})
    assert "| **SmolDriver** | 96 | 83.3 (100.0 66.7) |" in text
    assert "| blind: the same language model, no images | 96 | 33.3 | 33.3 |  |  | – | – |" in text
    assert "| left and right swapped: answers that follow | 6 | 90.0 [80.0, 100.0] | – | 80.0 → 10.0 |" in text
    assert "moved around among them | 33.3 | -66.7 [" in text
    assert "| minus SmolVLM-FT, perception | " in text and "| SmolDriver's tokens per camera | 1 | 16 |" in text
    assert all(title in text for title in ("no reading", "no aligning", "with healing", "no camera vectors"))
    assert (
        "| trained on the unlike cameras | 100.0 [" in text and "| fog, which no training scene has | 100.0 [" in text
    )
    assert "| fog | 66.7 |" in text and "| **8 tokens** | 100.0 [" in text and "| width 128 | 66.7 [" in text
    assert "| elsewhere: all that helped | 8 tokens | 66.7 [" in text
    assert "| read | 2 | 3.0 | 6 |" in text and "split 000000000000" in text
    assert text.count("\n| ") > len(ABLATIONS) + sum(map(len, STUDY.values()))


def test_what_is_not_there_has_no_table(tmp_path):
    write_evaluation(tmp_path / "seed0/blind/evaluation", {"sighted": HALF, "text_only": BLIND})
    text = report({**collect(tmp_path, [0], VARIANTS), **SAID})
    assert text.count("\n|---") == 1 and "*How well do they answer?*" in text
    assert report({**collect(tmp_path / "none", [0], VARIANTS), **SAID}).startswith("Right answers on 0 questions")


def test_results_of_the_older_road_are_refused():
    assert report({"models": {"smoldriver": {}}, "command": "python -m benchmarks.toyworld"}) == OUTDATED
    assert tables.PARTS["toyworld"] is report
