"""Does a model know when it is right? ECE, Brier score and risk-coverage from the likelihoods of answer choices.

Sources: Guo et al., "On Calibration of Modern Neural Networks", 2017 (ECE); Brier, 1950; Geifman and El-Yaniv,
"Selective Classification for Deep Neural Networks", 2017 (risk-coverage, AURC).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

BINS = 10  # of equal width over the confidence, of the ECE and the reliability diagram


def choice_probabilities(log_likelihoods: ArrayLike) -> NDArray[np.float64]:
    """Softmax over the choices of each question.

    Args:
        log_likelihoods: (questions, choices), the model's log-likelihood of each choice as the answer, e.g. of "Yes."
            and "No."; -inf for a choice that a question does not have.

    Returns:
        (questions, choices), rows sum to 1.

    Raises:
        ValueError: not a matrix with at least one question and two choices, NaN, +inf, or a row without any choice.
    """
    logs = np.asarray(log_likelihoods, dtype=np.float64)
    if logs.ndim != 2 or logs.shape[0] < 1 or logs.shape[1] < 2:
        raise ValueError(f"log_likelihoods must be (questions >= 1, choices >= 2), got shape {logs.shape}")
    if not np.isfinite(logs.max(axis=1)).all():
        raise ValueError("log_likelihoods must not be NaN or +inf, and each row needs a finite entry")
    return softmax(logs, axis=1)


def calibration_scores(probabilities: ArrayLike, labels: Sequence[int]) -> dict[str, Any]:
    """Calibration and selective accuracy of a model that answers with its most likely choice.

    Args:
        probabilities: (questions, choices), rows sum to 1, see `choice_probabilities`.
        labels: (questions,), index of the right choice.

    Returns:
        - accuracy, confidence: means; confidence is the probability of the answer given;
        - ece: mean |accuracy - confidence| of the bins, weighted by their answers, in [0, 1];
        - brier: mean squared distance of the probabilities to the truth, summed over choices, in [0, 2];
        - aurc and risk_coverage: see `risk_coverage`;
        - reliability: for each bin that is not empty `{"low", "high", "answers", "confidence", "accuracy"}`.

    Raises:
        ValueError: shapes disagree, rows do not sum to 1, or a label is no choice.
    """
    matrix = np.asarray(probabilities, dtype=np.float64)
    truth = np.asarray(labels)
    if matrix.ndim != 2 or not len(matrix) or truth.shape != (len(matrix),):
        raise ValueError(f"expected (questions, choices) and (questions,), got {matrix.shape} and {truth.shape}")
    if not (np.isfinite(matrix).all() and (matrix >= 0).all() and np.allclose(matrix.sum(axis=1), 1, atol=1e-6)):
        raise ValueError("probabilities must be in [0, 1] and every row must sum to 1")
    if not np.issubdtype(truth.dtype, np.integer) or truth.min() < 0 or truth.max() >= matrix.shape[1]:
        raise ValueError(f"labels must be indices of the {matrix.shape[1]} choices, got {sorted(set(truth.tolist()))}")
    confidence = matrix.max(axis=1)  # (questions,)
    # A tie between choices is half right: which index comes first must not matter.
    best = np.isclose(matrix, confidence[:, None], rtol=0, atol=1e-12)  # (questions, choices)
    right = best[np.arange(len(truth)), truth] / best.sum(axis=1)
    one_hot = np.eye(matrix.shape[1])[truth]
    ece, reliability = _reliability(confidence, right)
    curve = risk_coverage(confidence, right)
    return {
        "accuracy": float(right.mean()),
        "confidence": float(confidence.mean()),
        "ece": ece,
        "brier": float(((matrix - one_hot) ** 2).sum(axis=1).mean()),
        "aurc": curve["aurc"],
        "risk_coverage": {"coverage": curve["coverage"], "risk": curve["risk"]},
        "reliability": reliability,
    }


def risk_coverage(confidence: ArrayLike, right: ArrayLike) -> dict[str, Any]:
    """Error rate of the answers that remain when a model abstains on its least confident ones.

    Equally confident answers are taken in expectation over their order, so the curve does not depend on the order of
    the questions.

    Args:
        confidence, right: (questions,), 1 for a right answer, 0 for a wrong one.

    Returns:
        - coverage: 1/n, 2/n, ..., 1; risk: error rate of that share of most confident answers;
        - aurc: mean risk; lower is better, 0 without errors, the error rate if confidence says nothing.

    Raises:
        ValueError: shapes disagree or there is no question.
    """
    sure, correct = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if sure.ndim != 1 or sure.shape != correct.shape or not len(sure):
        raise ValueError(f"expected two arrays of (questions >= 1,), got {sure.shape} and {correct.shape}")
    _, group, size = np.unique(-sure, return_inverse=True, return_counts=True)  # group 0 is the most confident
    errors = np.bincount(group, weights=1 - correct) / size  # mean error of each group of equals
    answered = np.arange(1, len(sure) + 1)
    risk = np.cumsum(np.repeat(errors, size)) / answered
    return {"coverage": (answered / len(sure)).tolist(), "risk": risk.tolist(), "aurc": float(risk.mean())}


def _reliability(confidence: NDArray[np.float64], right: NDArray[np.float64]) -> tuple[float, list[dict[str, float]]]:
    index = np.minimum((confidence * BINS).astype(int), BINS - 1)  # the last bin includes 1
    rows = []
    ece = 0.0
    for number in np.unique(index).tolist():
        inside = index == number
        sure, correct = float(confidence[inside].mean()), float(right[inside].mean())
        ece += inside.mean() * abs(sure - correct)
        ends = {"low": number / BINS, "high": (number + 1) / BINS}
        rows.append({**ends, "answers": int(inside.sum()), "confidence": sure, "accuracy": correct})
    return float(ece), rows
