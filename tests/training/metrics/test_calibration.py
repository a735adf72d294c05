import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from training.metrics.calibration import calibration_scores, choice_probabilities, risk_coverage

logs = st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0), st.integers(0, 1)), min_size=1, max_size=30)


def test_choice_probabilities() -> None:
    probabilities = choice_probabilities([[np.log(3), 0.0], [-1e4, -1e4], [0.0, -np.inf]])
    np.testing.assert_allclose(probabilities, [[0.75, 0.25], [0.5, 0.5], [1, 0]])
    for wrong in ([], [[1.0]], [[np.nan, 0]], [[-np.inf, -np.inf]], [[np.inf, 0]]):
        with pytest.raises(ValueError):
            choice_probabilities(wrong)


def test_certain_and_right() -> None:
    scores = calibration_scores([[1, 0], [0, 1]], [0, 1])
    assert [scores[name] for name in ("accuracy", "confidence", "ece", "brier", "aurc")] == [1, 1, 0, 0, 0]


def test_certain_and_wrong() -> None:
    scores = calibration_scores([[1, 0], [0, 1]], [1, 0])
    assert [scores[name] for name in ("accuracy", "confidence", "ece", "brier", "aurc")] == [0, 1, 1, 2, 1]


def test_by_hand() -> None:
    # Confidences .9 (right), .9 (wrong), .6 (right): ECE = 2/3 |.9 - .5| + 1/3 |.6 - 1|
    scores = calibration_scores([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]], [0, 0, 0])
    assert scores["ece"] == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.4)
    assert scores["brier"] == pytest.approx((2 * 0.1**2 + 2 * 0.9**2 + 2 * 0.4**2) / 3)
    assert [row["answers"] for row in scores["reliability"]] == [1, 2]
    # The two equally sure answers count half an error each, then nothing more is wrong.
    assert scores["risk_coverage"]["risk"] == pytest.approx([0.5, 0.5, 1 / 3])
    assert scores["aurc"] == pytest.approx((0.5 + 0.5 + 1 / 3) / 3)


def test_risk_coverage_ranks_by_confidence() -> None:
    assert risk_coverage([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 0])["risk"] == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert risk_coverage([0.5] * 4, [1, 0, 0, 0])["aurc"] == pytest.approx(0.75)  # no information
    assert risk_coverage([0.6, 0.7, 0.8, 0.9], [1, 1, 0, 0])["aurc"] > 0.75


@given(logs, st.randoms(use_true_random=False))
@settings(deadline=None, derandomize=True)
def test_bounds_order_and_brier(rows: list[tuple[float, float, int]], rng) -> None:
    probabilities = choice_probabilities([row[:2] for row in rows])
    labels = [row[2] for row in rows]
    scores = calibration_scores(probabilities, labels)
    for name, most in (("accuracy", 1), ("ece", 1), ("aurc", 1), ("brier", 2), ("confidence", 1)):
        assert 0 <= scores[name] <= most + 1e-9
    assert scores["risk_coverage"]["risk"][-1] == pytest.approx(1 - scores["accuracy"])
    assert sum(row["answers"] for row in scores["reliability"]) == len(rows)
    # two choices: twice the binary Brier score of the second one
    assert scores["brier"] == pytest.approx(2 * brier_score_loss(labels, probabilities[:, 1], pos_label=1))
    order = list(range(len(rows)))
    rng.shuffle(order)
    again = calibration_scores(probabilities[order], [labels[i] for i in order])
    for name in ("accuracy", "ece", "aurc", "brier"):
        assert again[name] == pytest.approx(scores[name])


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([[0.5, 0.5]], [0, 1], "expected"),
        ([[0.5, 0.6]], [0], "sum to 1"),
        ([[0.5, 0.5]], [2], "indices of the 2 choices"),
        ([[1.5, -0.5]], [0], "in \\[0, 1\\]"),
    ],
)
def test_wrong_input(probabilities, labels, message) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_scores(probabilities, labels)
