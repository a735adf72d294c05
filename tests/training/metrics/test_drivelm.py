import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser

from training.metrics.__main__ import MetricsArguments, main
from training.metrics.drivelm import language_score, match_f1, match_points, points, score_drivelm

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "drivelm"
OFFICIAL = {
    "accuracy": 0.0,
    "match_f1": 0.0,
    "bleu_1": 0.198785,
    "bleu_2": 0.080218,
    "bleu_3": 0.030500,
    "bleu_4": 2.24e-6,
    "rouge_l": 0.184217,
    "cider": 0.001723,
    "language": 0.087255,
    "final": 0.017451,
}
CAR, BUS = "<c1,CAM_BACK,100.0,200.0>", "<c2,CAM_FRONT,700.0,400.0>"


def entry(question: str, answer: str, *tag: int) -> dict[str, Any]:
    return {"Q": question, "A": answer, "tag": list(tag)}


def test_file(*frames: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    none: dict[str, list[dict[str, Any]]] = {"perception": [], "prediction": [], "planning": [], "behavior": []}
    return {"scene": {"key_frames": {f"f{i}": {"QA": {**none, **qa}} for i, qa in enumerate(frames)}}}


test_file.__test__ = False  # type: ignore[attr-defined]

FRAME = {
    "perception": [
        entry("What are the important objects?", f"They are {CAR} and {BUS}.", 2),
        entry(f"Is {CAR} moving?", "Yes.", 0),
        entry(f"Is {BUS} moving?", "No.", 0),
    ],
    "prediction": [entry("What to notice first?", f"Notice {BUS}, then {CAR}.", 3)],
    "planning": [entry(f"What about {CAR} and {BUS}?", "Keep going straight at the same speed.", 1, 2)],
    "behavior": [entry("Predict the behavior of the ego vehicle.", "B", 0)],
}


def answers_of(references: dict[str, Any], **changed: str) -> list[dict[str, str]]:
    """Perfect predictions, with `f0_1="..."` replaced."""
    predictions = []
    for name, frame in references["scene"]["key_frames"].items():
        listed = [
            item for category in ("perception", "prediction", "planning", "behavior") for item in frame["QA"][category]
        ]
        for number, item in enumerate(listed):
            answer = changed.get(f"{name}_{number}", item["A"])
            predictions.append({"id": f"scene_{name}_{number}", "question": item["Q"], "answer": answer})
    return predictions


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared DriveLM files")
@pytest.mark.parametrize("tokenizer", ["python", "java"])
def test_official_figures(tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(tokenizer) is None and tokenizer == "java":
        pytest.skip("needs Java")
    main(MetricsArguments(str(SHARED / "test_eval.json"), str(SHARED / "output.json"), tokenizer=tokenizer))  # type: ignore[arg-type]
    scores = json.loads(capsys.readouterr().out)
    assert {name: scores[name] for name in OFFICIAL} == pytest.approx(OFFICIAL, abs=1e-6)
    assert scores["bleu_4"] == pytest.approx(2.24e-6, abs=1e-8)
    assert scores["counts"]["accuracy"] == 9
    assert scores["counts"]["match"] == 4
    assert scores["counts"]["total"] == 66
    assert scores["tokenizer"] == tokenizer


def test_points_are_decimals_two_by_two() -> None:
    assert points("<c1,CAM_BACK,1.5,2.5> at 3.5") == [(1.5, 2.5)]
    assert points("one 2 three") == []


def test_matching_is_greedy_and_exclusive() -> None:
    # The first answer takes the nearest reference although the second would need it.
    assert match_points([(10, 0), (0, 0)], [(0, 0)]) == [(0, 0)]
    assert match_points([(0, 0), (0, 0)], [(0, 0)]) == [(0, 0)]
    assert match_points([(8, 0), (1, 0)], [(0, 0), (17, 0)]) == [(0, 0)]
    assert match_points([(7.9, 8.0)], [(0, 0)]) == [(0, 0)]
    assert match_points([(8, 8)], [(0, 0)]) == []  # 16 is not below 16
    assert match_points([(5, 0)], [(0, 0), (10, 0)]) == [(0, 0)]  # a tie goes to the first


def test_match_f1() -> None:
    assert match_f1(f"{CAR} {BUS}", f"{BUS} {CAR}") == pytest.approx(1, abs=1e-7)
    assert match_f1(f"{CAR}", f"{BUS} {CAR}") == pytest.approx(2 / 3, abs=1e-7)
    assert match_f1("none", CAR) == 0
    assert match_f1(CAR, "none") == 0


def test_perfect_answers() -> None:
    references = test_file(FRAME, FRAME)
    scores = score_drivelm(references, answers_of(references), tokenizer="python")
    assert scores["accuracy"] == 1
    assert scores["match_f1"] == pytest.approx(1, abs=1e-7)
    assert scores["match"] == pytest.approx(50, abs=1e-5)  # the other half is the judge's
    assert scores["bleu_4"] == pytest.approx(1)
    assert scores["judge"] is None
    assert scores["final"] == pytest.approx(0.2 * scores["language"] + 0.1 + 0.2, abs=1e-6)
    assert scores["counts"] == {
        "total": 12,
        "gated_out": 0,
        "accuracy": 6,
        "judge": 2,
        "language": 4,
        "match": 2,
        "unknown_predictions": 0,
    }


def test_language_score_weights() -> None:
    scores = {"bleu_1": 0.4, "bleu_2": 0.3, "bleu_3": 0.2, "bleu_4": 0.1, "rouge_l": 0.5, "cider": 2.0}
    assert language_score(scores) == pytest.approx(0.25 / 3 + 0.5 / 3 + 2 / 30)


def test_judge_terms() -> None:
    references = test_file(FRAME)
    predictions = answers_of(references)
    without = score_drivelm(references, predictions, tokenizer="python")
    judge = {"scene_f0_3": 60, "scene_f0_4": 80}  # the counted answers with tag 3 and tag 1
    scores = score_drivelm(references, predictions, judge=judge, tokenizer="python")
    assert scores["judge"] == 80
    assert scores["match"] == pytest.approx((100 + 60) / 2, abs=1e-5)
    assert scores["final"] == pytest.approx(without["final"] + 0.4 * 0.8 + 0.2 * 0.3)
    with pytest.raises(ValueError, match="no score for 1 counted answers.*scene_f0_4"):
        score_drivelm(references, predictions, judge={"scene_f0_3": 60}, tokenizer="python")


def test_graph_gate() -> None:
    references = test_file(FRAME)
    # The first answer finds only the car: questions about the bus, or about both, do not count.
    predictions = answers_of(references, f0_0=f"I see {CAR}.", f0_2="wrong")
    scores = score_drivelm(references, predictions, tokenizer="python")
    assert scores["accuracy"] == 1
    assert scores["counts"] == {
        "total": 6,
        "gated_out": 2,
        "accuracy": 2,
        "judge": 0,
        "language": 1,
        "match": 1,
        "unknown_predictions": 0,
    }
    # Found within 16 px opens the gate for the *reference* point.
    near = answers_of(references, f0_0="I see <c9,CAM_BACK,104.0,203.0>.")
    assert score_drivelm(references, near, tokenizer="python")["counts"]["gated_out"] == 2
    # The first question of the next frame starts a new graph.
    two = test_file(FRAME, FRAME)
    assert score_drivelm(two, answers_of(two, f1_0="nothing"), tokenizer="python")["counts"]["gated_out"] == 3


def test_accuracy_is_the_exact_string() -> None:
    references = test_file(FRAME)
    predictions = answers_of(references, f0_1="yes.", f0_2="No", f0_5="B")
    assert score_drivelm(references, predictions, tokenizer="python")["accuracy"] == pytest.approx(1 / 3)


def test_scores_without_answers_are_none() -> None:
    scores = score_drivelm({}, [], tokenizer="python")
    assert scores["final"] is None and scores["accuracy"] is None and scores["counts"]["total"] == 0
    references = test_file({"perception": [entry("q", "Yes.", 0)]})
    scores = score_drivelm(references, answers_of(references), tokenizer="python")
    assert (scores["accuracy"], scores["language"], scores["match"], scores["final"]) == (1, None, None, None)


def test_prediction_file_errors() -> None:
    references = test_file(FRAME)
    good = answers_of(references)
    with pytest.raises(ValueError, match="no prediction for question 'scene_f0_3'"):
        score_drivelm(references, good[:3] + good[4:])
    with pytest.raises(ValueError, match="two different answers for id 'scene_f0_0'"):
        score_drivelm(references, [*good, {"id": "scene_f0_0", "answer": "x"}])
    with pytest.raises(ValueError, match="prediction 0 must be an object"):
        score_drivelm(references, [{"id": "a"}])
    with pytest.raises(ValueError, match="must be strings"):
        score_drivelm(references, [{"id": "a", "answer": None}])
    more = [*good, good[0], {"id": "elsewhere", "answer": "x"}]
    assert score_drivelm(references, more, tokenizer="python")["counts"]["unknown_predictions"] == 1


def test_reference_file_errors() -> None:
    with pytest.raises(ValueError, match='frame s_f has no "QA"; it has: qa'):
        score_drivelm({"s": {"key_frames": {"f": {"qa": {}}}}}, [])
    with pytest.raises(ValueError, match='has no "planning"'):
        score_drivelm({"s": {"key_frames": {"f": {"QA": {"perception": [], "prediction": []}}}}}, [])
    untagged = test_file({"perception": [{"Q": "q", "A": "a"}]})
    with pytest.raises(ValueError, match='training files have no tags.* has no "tag"'):
        score_drivelm(untagged, answers_of(untagged))
    odd = test_file({"perception": [entry("a", "b", 0), entry("speed 3.5?", "b", 0)]})
    with pytest.raises(ValueError, match="question of scene_f0_1 holds 1 decimal numbers"):
        score_drivelm(odd, answers_of(odd))


decimals = st.lists(st.floats(0, 1600).map(lambda x: f"{x:.1f}"), max_size=7).map(", ".join)


@given(decimals, decimals)
@settings(deadline=None, derandomize=True)
def test_match_f1_bounds(answer: str, reference: str) -> None:
    assert 0 <= match_f1(answer, reference) <= 1
    if points(reference):
        assert match_f1(reference, reference) == pytest.approx(1, abs=1e-6)


def test_order_of_predictions_does_not_matter() -> None:
    references = test_file(FRAME, FRAME)
    predictions = answers_of(references, f0_0=f"{BUS}", f1_3="", f1_4="Turn left.")
    shuffled = predictions[:]
    random.Random(0).shuffle(shuffled)
    assert score_drivelm(references, predictions, tokenizer="python") == score_drivelm(
        references, shuffled, tokenizer="python"
    )


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    references = test_file(FRAME)
    (tmp_path / "references.json").write_text(json.dumps(references))
    (tmp_path / "predictions.json").write_text(json.dumps(answers_of(references)))
    (tmp_path / "judge.json").write_text(json.dumps({"scene_f0_3": 60, "scene_f0_4": 80}))
    monkeypatch.chdir(tmp_path)
    command = "--references references.json --predictions predictions.json --judge judge.json --tokenizer python"
    main(HfArgumentParser(MetricsArguments).parse_args_into_dataclasses(command.split())[0])
    scores = json.loads(capsys.readouterr().out)  # nothing but JSON on stdout
    assert scores["accuracy"] == 1
    assert scores["judge"] == 80


def test_command_reads_files_from_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    references, predictions = tmp_path / "references.json", tmp_path / "predictions.json"
    references.write_text(json.dumps(test_file({"perception": [entry("Is it?", "Yes.", 0)]})), encoding="utf-8-sig")
    predictions.write_text(json.dumps([{"id": "scene_f0_0", "answer": "Yes."}]), encoding="utf-8-sig")
    main(MetricsArguments(str(references), str(predictions)))
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1
    predictions.write_text("[", encoding="utf-16")
    with pytest.raises(ValueError, match="predictions.json is no JSON file in UTF-8"):
        main(MetricsArguments(str(references), str(predictions)))
