"""Predictions to figures: what `training.evaluate` writes into metrics.json. Pure; all scores are `training.metrics`'.

A prediction is a dict with question_id, scene_token, frame_token, category, tag, question (DriveLM's wording),
reference and answer; where likelihoods were asked for, `choices` and `log_likelihoods`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.evaluation.controls import BLIND, relevant_cameras
from training.metrics.answers import (
    answer_correct,
    parse_choice,
    parse_yes_no,
    question_type,
    score_by_type,
    yes_no_scores,
)
from training.metrics.calibration import calibration_scores, choice_probabilities
from training.metrics.drivelm import CATEGORIES, score_drivelm
from training.metrics.intervals import mean_difference_interval, mean_interval, scene_bootstrap
from training.metrics.language import bert_scores, coco_scores, sacrebleu_score, seed_bleu

Prediction = dict[str, Any]
CURVE_POINTS = 50
COVERAGE_KEPT = 0.8


def control_scores(
    predictions: Sequence[Prediction], sighted: Sequence[Prediction], language: bool, bert_scorer: Any = None
) -> dict[str, Any]:
    """All figures of one control.

    Args:
        predictions: of the control, at least one.
        sighted: of the same questions and maybe more; empty if there are none.
        language: also the language scores; they cost time and mean little for corruptions.
        bert_scorer: see `training.metrics.load_bert_scorer`; None leaves BERTScore out.

    Returns:
        answers, accuracy; by_type and by_category; visual_tokens_per_scene; errors, the number of questions that
        could not be asked; changed_from_sighted, the share of answers that differ; with `language` also what
        `language_scores` returns.
    """
    questions = [row["question"] for row in predictions]
    references = [row["reference"] for row in predictions]
    answers = [row["answer"] for row in predictions]
    by_type = score_by_type(questions, references, answers)
    result: dict[str, Any] = {
        "answers": len(predictions),
        "accuracy": by_type.pop("all")["accuracy"],
        "by_type": by_type,
        "by_category": {
            category: _accuracy([row for row in predictions if row["category"] == category])
            for category in sorted({row["category"] for row in predictions})
        },
        "errors": sum(row["error"] is not None for row in predictions),
        "visual_tokens_per_scene": _visual_tokens(predictions),
    }
    before = {row["question_id"]: row["answer"] for row in sighted}
    shared = [row for row in predictions if row["question_id"] in before]
    if shared and sighted is not predictions:
        result["changed_from_sighted"] = float(
            np.mean([row["answer"] != before[row["question_id"]] for row in shared])
        )
    if language:
        result |= language_scores(predictions, bert_scorer)
    return result


def language_scores(predictions: Sequence[Prediction], bert_scorer: Any = None) -> dict[str, Any]:
    """Scores of wording, each with its package's name and its tokenizer.

    Returns:
        exact_match, coco, sacrebleu, seed_bleu; bert_score with a scorer; drivelm, the challenge's scores, where the
        data has its tags and its numbering.
    """
    references = [row["reference"] for row in predictions]
    answers = [row["answer"] for row in predictions]
    scores: dict[str, Any] = {
        "exact_match": float(np.mean([a == r for a, r in zip(answers, references, strict=True)])),
        "coco": coco_scores(answers, references),
        "sacrebleu": sacrebleu_score(answers, references),
        "seed_bleu": seed_bleu(answers, references),
    }
    if bert_scorer is not None:
        scores["bert_score"] = bert_scores(answers, references, bert_scorer)
    challenge = challenge_references(predictions)
    if challenge is not None:
        try:
            scores["drivelm"] = score_drivelm(challenge, submission(predictions))
        except ValueError as error:  # references that the challenge's own script fails on must not cost the rest
            scores["drivelm"] = {"not_scored": str(error)}
    return scores


def dropped_camera_scores(predictions: Sequence[Prediction], camera: str) -> dict[str, Any]:
    """Accuracy on the questions that name a dropped camera, and on the others: only the first should suffer."""
    named = [row for row in predictions if camera in relevant_cameras(row["question"])]
    others = [row for row in predictions if camera not in relevant_cameras(row["question"])]
    return {"named_camera": _accuracy(named), "other_cameras": _accuracy(others)}


def hallucination_scores(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """How often a model says that an absent object is there, in all and by the camera asked about."""
    by_camera: dict[str, list[Prediction]] = defaultdict(list)
    for row in predictions:
        by_camera[row["camera"]].append(row)
    return {
        "hallucination": {"all": _yes_rate(predictions), **{c: _yes_rate(by_camera[c]) for c in sorted(by_camera)}}
    }


def intervals(
    results: Mapping[str, Sequence[Prediction]], resamples: int, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Scene-clustered bootstrap intervals.

    Args:
        results: predictions by control.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        "sighted": {figure: interval}; "sighted_minus": {control: {figure: interval}}, paired on the questions that
        both answered; for the blind controls accuracy by category, by type and the balanced accuracy of yes/no, for
        the others accuracy alone. Empty without "sighted". An interval is the dict of `training.metrics.Interval`.
    """
    if "sighted" not in results:
        return {}
    options = {"resamples": resamples, "seed": seed}
    sighted = list(results["sighted"])
    absolute = {
        name: asdict(mean_interval(_right(rows), _scenes(rows), **options)) for name, rows in _groups(sighted).items()
    }
    balanced = _balanced_interval(sighted, None, options)
    if balanced:
        absolute["yes_no_balanced_accuracy"] = balanced
    differences: dict[str, dict[str, Any]] = {}
    for control, predictions in results.items():
        if control == "sighted":
            continue
        by_id = {row["question_id"]: row for row in predictions}
        paired = [row for row in sighted if row["question_id"] in by_id]
        if not paired:
            continue
        others = [by_id[row["question_id"]] for row in paired]
        groups = _groups(paired) if control in BLIND else {"accuracy": paired}
        differences[control] = {
            name: asdict(
                mean_difference_interval(
                    _right(rows), _right([by_id[row["question_id"]] for row in rows]), _scenes(rows), **options
                )
            )
            for name, rows in groups.items()
        }
        balanced = _balanced_interval(paired, others, options) if control in BLIND else None
        if balanced:
            differences[control]["yes_no_balanced_accuracy"] = balanced
    return {"sighted": absolute, "sighted_minus": differences}


def calibration(results: Mapping[str, Sequence[Prediction]]) -> dict[str, Any]:
    """ECE, Brier score and risk-coverage of yes/no and multiple choice, by control, from the likelihoods of choices.

    `abstention` asks: at the confidence that keeps 80 % of the sighted answers, which share of the answers to other
    images is kept? A model that knows that it sees nothing keeps few.
    """
    report: dict[str, Any] = {}
    confidences: dict[str, NDArray[np.float64]] = {}
    for control, predictions in results.items():
        kinds: dict[str, Any] = {}
        for kind, labels_of in (("yes_no", _yes_no_label), ("multiple_choice", _option_label)):
            rows = [row for row in predictions if row.get("choices") and _kind(row) == kind]
            if not rows:
                continue
            scored = calibration_scores(_probabilities(rows), [labels_of(row) for row in rows])
            scored["risk_coverage"] = _thinned(scored["risk_coverage"])
            kinds[kind] = {"answers": len(rows), **scored}
        if kinds:
            report[control] = kinds
            rows = [row for row in predictions if row.get("choices")]
            confidences[control] = np.concatenate([_probabilities([row]).max(axis=1) for row in rows])
    if "sighted" in confidences:
        threshold = float(np.quantile(confidences["sighted"], 1 - COVERAGE_KEPT))
        report["abstention"] = {
            "threshold": threshold,
            "kept": {control: float((values >= threshold).mean()) for control, values in confidences.items()},
        }
    return report


def submission(predictions: Sequence[Prediction]) -> list[dict[str, str]]:
    """The DriveLM challenge's submission format."""
    return [{"id": row["question_id"], "question": row["question"], "answer": row["answer"]} for row in predictions]


def challenge_references(predictions: Sequence[Prediction]) -> dict[str, Any] | None:
    """The challenge's test file again, or None where its scores are not defined.

    That is where no question has a tag, or the data was filtered: the challenge numbers all questions of a frame, and
    the first one opens its graph gate.
    """
    if not any(row["tag"] for row in predictions):
        return None
    frames: dict[tuple[str, str], list[Prediction]] = defaultdict(list)
    for row in predictions:
        frames[row["scene_token"], row["frame_token"]].append(row)
    scenes: dict[str, Any] = {}
    for (scene, frame), rows in frames.items():
        if [row["question_id"] for row in rows] != [f"{scene}_{frame}_{number}" for number in range(len(rows))]:
            return None
        if [CATEGORIES.index(row["category"]) for row in rows] != sorted(
            CATEGORIES.index(row["category"]) for row in rows
        ):
            return None
        qa: dict[str, list[dict[str, Any]]] = {category: [] for category in CATEGORIES}
        for row in rows:
            qa[row["category"]].append({"Q": row["question"], "A": row["reference"], "tag": row["tag"]})
        scenes.setdefault(scene, {"key_frames": {}})["key_frames"][frame] = {"QA": qa}
    return scenes


def choices_of(question: str, reference: str) -> list[str]:
    """The answers whose likelihoods say how sure a model is; empty for questions without fixed choices."""
    kind = question_type(question, reference)
    if kind == "yes_no":
        return ["Yes", "No"]
    if kind == "multiple_choice":
        letters = [letter for letter in "ABCDEFGH" if f" {letter}. " in question]
        if len(letters) > 1 and parse_choice(reference, question) in letters:
            return letters
    return []


def _groups(rows: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    groups: dict[str, list[Prediction]] = {"accuracy": list(rows)}
    for row in rows:
        groups.setdefault(row["category"], []).append(row)
    for row in rows:
        groups.setdefault(f"type:{_kind(row)}", []).append(row)
    return groups


def _kind(row: Prediction) -> str:
    return question_type(row["question"], row["reference"])


def _right(rows: Sequence[Prediction]) -> NDArray[np.float64]:
    return np.array([answer_correct(row["question"], row["reference"], row["answer"]) for row in rows], dtype=float)


def _scenes(rows: Sequence[Prediction]) -> list[str]:
    return [row["scene_token"] for row in rows]


def _accuracy(rows: Sequence[Prediction]) -> dict[str, Any]:
    return {"answers": len(rows), "accuracy": float(_right(rows).mean()) if rows else None}


def _visual_tokens(rows: Sequence[Prediction]) -> float:
    frames = {(row["scene_token"], row["frame_token"]): row["visual_tokens"] for row in rows}
    return float(np.mean(list(frames.values())))


def _yes_rate(rows: Sequence[Prediction]) -> dict[str, Any]:
    scores = yes_no_scores([row["answer"] for row in rows], [row["reference"] for row in rows])
    return {"answers": len(rows), "yes_rate": scores["yes_rate"], "unparsed": scores["unparsed"]}


def _balanced_interval(
    rows: Sequence[Prediction], others: Sequence[Prediction] | None, options: dict[str, int]
) -> dict[str, Any] | None:
    """Balanced accuracy of yes/no, or its difference to `others`, which answer the same questions in this order."""
    chosen = [index for index, row in enumerate(rows) if _kind(row) == "yes_no"]
    if not chosen:
        return None
    asked = [rows[index] for index in chosen]
    yes = np.array([parse_yes_no(row["reference"]) == "yes" for row in asked])
    columns = [_right(asked)] + ([] if others is None else [_right([others[index] for index in chosen])])

    def balanced(right: NDArray[np.float64], index: NDArray[np.intp]) -> float:
        recalls = [right[index[yes[index] == truth]].mean() for truth in (True, False) if (yes[index] == truth).any()]
        return float(np.mean(recalls))

    def statistic(index: NDArray[np.intp]) -> float:
        first, *rest = (balanced(column, index) for column in columns)
        return first - rest[0] if rest else first

    return asdict(scene_bootstrap(statistic, _scenes(asked), **options))


def _probabilities(rows: Sequence[Prediction]) -> NDArray[np.float64]:
    """(questions, choices); questions with fewer choices than others get probability 0 for the rest."""
    width = max(len(row["choices"]) for row in rows)
    logs = np.full((len(rows), width), -np.inf)
    for index, row in enumerate(rows):
        logs[index, : len(row["choices"])] = row["log_likelihoods"]
    return choice_probabilities(logs)


def _yes_no_label(row: Prediction) -> int:
    return 0 if parse_yes_no(row["reference"]) == "yes" else 1


def _option_label(row: Prediction) -> int:
    return row["choices"].index(parse_choice(row["reference"], row["question"]))


def _thinned(curve: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """At most `CURVE_POINTS` points of a curve with one point per answer."""
    length = len(curve["coverage"])
    points = sorted(set(np.linspace(0, length - 1, min(length, CURVE_POINTS)).round().astype(int).tolist()))
    return {name: [values[point] for point in points] for name, values in curve.items()}
