"""Coordinates are scored in pixels, however the data writes them; a new metric needs its function and its title."""

import json
from types import SimpleNamespace

import prepared
import pytest

from smoldriver_hf import CAMERAS
from training import evaluate
from training.data.drivelm import normalise_coordinates
from training.data.rig import NUSCENES
from training.evaluation import figures
from training.evaluation.answering import Answer
from training.evaluation.figures import METRICS, Metric, figures_of, title_of, words_of
from training.evaluation.scoring import all_scores, in_pixels

WHERE = "Where is the nearest car?"
CAR, ELSEWHERE = "It is <c1,CAM_BACK,1088.3,497.5>.", "It is <c1,CAM_BACK,200.0,450.0>."
TAGGED = "Is <c1,CAM_BACK,1088.3,497.5> a car?"


@pytest.fixture(autouse=True)
def python_tokenizer(monkeypatch):
    """Without starting a Java program for each score."""
    monkeypatch.setattr("training.metrics.language.available_tokenizer", lambda: "python")


def make_predictions(answer: str, reference: str = CAR, write=str) -> list[dict]:
    """The three questions of a frame, in the challenge's numbering; `write` puts coordinates as the data have them."""
    fixed = {"scene_token": "s", "frame_token": "f", "category": "perception", "error": None, "visual_tokens": 6}
    asked = [(WHERE, reference, answer, [3]), (WHERE, reference, answer, [2]), (TAGGED, "Yes.", "Yes.", [0])]
    return [
        {
            **fixed,
            "question_id": f"s_f_{number}",
            "tag": tag,
            "question": write(question),
            "asked": write(question),
            "type": "localisation" if number < 2 else "yes_no",
            "reference": write(truth),
            "answer": write(said),
        }
        for number, (question, truth, said, tag) in enumerate(asked)
    ]


def scores_of(predictions: list[dict], coordinates: str) -> dict:
    found = all_scores({"sighted": predictions}, NUSCENES, coordinates, resamples=10, seed=0)
    return found["results"]["sighted"]


@pytest.mark.parametrize(("coordinates", "write"), [("pixels", str), ("normalised", normalise_coordinates)])
def test_points_are_matched_within_16_pixels(coordinates, write):
    right = scores_of(make_predictions(CAR, write=write), coordinates)
    wrong = scores_of(make_predictions(ELSEWHERE, write=write), coordinates)
    near = scores_of(make_predictions("It is <c1,CAM_BACK,1098.0,499.0>.", write=write), coordinates)
    far = scores_of(make_predictions("It is <c1,CAM_BACK,1098.0,507.0>.", write=write), coordinates)
    assert [found["by_type"]["localisation"]["f1"] for found in (right, wrong, near, far)] == [
        pytest.approx(1, abs=1e-6),
        0,
        pytest.approx(1, abs=1e-6),
        0,
    ]
    assert right["drivelm"]["match_f1"] == pytest.approx(1, abs=1e-6) and wrong["drivelm"]["match_f1"] == 0
    # The graph gate: who did not find the car is not asked about it.
    assert right["drivelm"]["counts"]["gated_out"] == 0 and wrong["drivelm"]["counts"]["gated_out"] == 1


def test_only_shares_are_turned_into_pixels():
    rows = make_predictions(CAR)
    assert in_pixels(rows, "pixels") == in_pixels(rows, "none") == rows
    shares = make_predictions(CAR, write=normalise_coordinates)
    assert "<c1,CAM_BACK,0.680,0.553>" in shares[0]["answer"]
    assert "<c1,CAM_BACK,1088.0,497.7>" in in_pixels(shares, "normalised")[0]["answer"]
    assert shares[0]["answer"] != CAR  # nothing is changed in place
    other = in_pixels(make_predictions("It is <c1,left,0.250,0.500>."), "normalised")[0]  # a camera of any rig
    assert other["answer"] == "It is <c1,left,400.0,450.0>."
    with pytest.raises(ValueError, match="pixels, normalised or none; the data says 'shares'"):
        in_pixels(rows, "shares")


class Oracle:
    """An answerer that always says the same, whatever it is shown."""

    cameras = CAMERAS
    model = SimpleNamespace(config=None)

    def __init__(self, says: str):
        self.says = says

    def look(self, images, num_queries=None):
        return self

    visual_tokens = 6

    def answers(self, questions, max_new_tokens, batch_size):
        return [Answer(self.says) for _ in questions]


@pytest.mark.parametrize(("says", "expected"), [(CAR, 1), (ELSEWHERE, 0)])
@pytest.mark.parametrize("coordinates", ["pixels", "normalised"])
def test_an_evaluation_scores_what_the_data_say(tmp_path, monkeypatch, coordinates, says, expected):
    """The pictures are of another size than the coordinates are for: that changes nothing."""
    write = normalise_coordinates if coordinates == "normalised" else str
    monkeypatch.setattr(prepared, "QUESTIONS", [(WHERE, write(CAR))])
    data = prepared.write_prepared(tmp_path / "data", frames=2, questions=1, splits=("test",))
    info = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**info, "options": {"coordinates": coordinates}}))
    monkeypatch.setattr(evaluate, "load_answerer", lambda *_, **__: Oracle(write(says)))
    options = {"controls": ["sighted"], "resamples": 5}
    metrics = evaluate.main(evaluate.EvaluateArguments(str(data), str(tmp_path / "out"), str(data), **options))
    assert metrics["coordinates"] == coordinates
    found = metrics["results"]["sighted"]["by_type"]["localisation"]
    assert found["f1"] == pytest.approx(expected, abs=1e-6)
    for answer in json.loads((tmp_path / "out" / "output.json").read_text()):  # the challenge takes pixels
        assert answer["answer"] == (says if coordinates == "pixels" else says.replace("1088.3,497.5", "1088.0,497.7"))


def test_a_new_metric_is_a_function_and_a_title(monkeypatch):
    """Nothing else knows the metrics: this one is computed, and every reader of the table finds its title."""

    def length_ratio(answers, references):
        return sum(map(len, answers)) / sum(map(len, references))

    monkeypatch.setitem(METRICS, "length_ratio", Metric(length_ratio, {"": "length ratio"}))
    scores = scores_of(make_predictions(CAR), "pixels")
    assert scores["length_ratio"] == 1
    shown = {figure["title"]: figure["place"] for figure in words_of({"sighted": scores})["figures"]}
    assert shown["length ratio"] == ["length_ratio"] and title_of("length_ratio") == "length ratio"


def test_an_unknown_figure_is_an_error(monkeypatch):
    scores = scores_of(make_predictions(CAR), "pixels")
    titles = [figure["title"] for figure in figures_of(scores)]
    assert titles[:2] == ["accuracy", "accuracy, perception category"] and "accuracy, yes/no questions" in titles
    with pytest.raises(ValueError, match="the figure coco.new has no title"):
        figures_of({**scores, "coco": {**scores["coco"], "new": 0.5}})
    with pytest.raises(ValueError, match="unknown control 'blurred'"):
        words_of({"sighted": scores, "blurred": scores})
    with pytest.raises(ValueError, match="unknown figure 'coco.bleu_9'"):
        title_of("coco.bleu_9")
    monkeypatch.setitem(METRICS, "seed_bleu", Metric(METRICS["seed_bleu"].score, {"bleu": "x"}))
    with pytest.raises(ValueError, match="seed_bleu.brevity_penalty has no title"):
        figures_of(scores)


def test_the_tables_of_figures_hold_each_once():
    names = [*figures.SHARES, *figures.ELSEWHERE, *figures.DETAILS]
    measured = [f"{name}.{part}".rstrip(".") for name, metric in METRICS.items() for part in metric.titles]
    assert len({*names, *measured}) == len(names) + len(measured)
    titles = [figure.title for figure in figures.known_figures().values() if figure]
    assert len(set(titles)) == len(titles)
