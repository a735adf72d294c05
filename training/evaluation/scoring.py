"""Predictions to figures: what `training.evaluate` writes into metrics.json. Pure; scores are `training.metrics`'."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data.drivelm import CATEGORIES, denormalise_coordinates
from training.data.rig import Rig
from training.evaluation.controls import Control
from training.evaluation.figures import METRICS
from training.evaluation.results import IntervalFigures, Intervals, Prediction
from training.metrics.answers import (
    answer_correct,
    parse_choice,
    parse_yes_no,
    question_type,
    score_by_type,
    yes_no_scores,
)
from training.metrics.calibration import calibration_scores, choice_probabilities
from training.metrics.drivelm import score_drivelm
from training.metrics.intervals import Interval, mean_interval, scene_bootstrap
from training.metrics.language import bert_scores, load_bert_scorer

CURVE_POINTS = 50
COVERAGE_KEPT = 0.8


def all_scores(
    results: Mapping[str, Sequence[Prediction]],
    rig: Rig,
    coordinates: str,
    *,
    resamples: int,
    seed: int,
    bert_model: str | None = None,
) -> dict[str, Any]:
    """The figures of metrics.json that follow from predictions: results, intervals, calibration, visual tokens.

    Args:
        results: predictions by control, "sighted" among them.
        coordinates: how the data writes coordinates, see `in_pixels`.
        resamples, seed: of the bootstrap.
        bert_model: encoder for BERTScore, folder or Hub id; None leaves it out.
    """
    bert_scorer = load_bert_scorer(bert_model) if bert_model else None
    pixels = {control: in_pixels(predictions, coordinates) for control, predictions in results.items()}
    scored: dict[str, Any] = {}
    for name, predictions in pixels.items():
        control = Control.parse(name)
        language = control.group in ("sighted", "budgets", "blind")
        scorer = bert_scorer if control.budget is None else None  # minutes on a CPU, which a curve need not cost
        scored[name] = control_scores(predictions, pixels["sighted"], language, scorer)
        if control.camera is not None:
            scored[name] |= dropped_camera_scores(predictions, control.camera, rig)
        if control.kind == "absent_object":
            scored[name] |= hallucination_scores(predictions)
    return {
        "results": scored,
        "intervals": intervals(pixels, resamples, seed),
        "calibration": calibration(pixels),
        "visual_tokens_per_scene": scored["sighted"]["visual_tokens_per_scene"],
    }


def with_references(results: Mapping[str, Sequence[Prediction]]) -> dict[str, list[Prediction]]:
    """The predictions that can be scored, by control; without the controls that have none."""
    known = {control: [row for row in rows if row["reference"]] for control, rows in results.items()}
    return {control: rows for control, rows in known.items() if rows}


def without_scores(results: Mapping[str, Sequence[Prediction]]) -> dict[str, Any]:
    """What `all_scores` returns where no reference is known: no accuracy, no interval, but counts and tokens."""
    told: dict[str, dict[str, Any]] = {
        name: {
            "answers": len(rows),
            "accuracy": None,
            "by_type": {},
            "by_category": {},
            "errors": sum(row["error"] is not None for row in rows),
            "visual_tokens_per_scene": _visual_tokens(rows),
        }
        for name, rows in results.items()
    }
    return {
        "results": told,
        "intervals": {"sighted": {}, "sighted_minus": {}},
        "calibration": {},
        "visual_tokens_per_scene": told["sighted"]["visual_tokens_per_scene"],
        "headline": {},
    }


def in_pixels(predictions: Sequence[Prediction], coordinates: str) -> Sequence[Prediction]:
    """The predictions with coordinates in pixels, which the challenge's scores and their 16 pixels are made for.

    The data writes coordinates as "pixels", "normalised" (shares of the image) or "none".

    Raises:
        ValueError: another way of writing coordinates.
    """
    if coordinates not in ("pixels", "normalised", "none"):
        raise ValueError(f"coordinates must be pixels, normalised or none; the data says {coordinates!r}")
    if coordinates != "normalised":
        return predictions
    undo = denormalise_coordinates
    return [
        {**row, "question": undo(row["question"]), "reference": undo(row["reference"]), "answer": undo(row["answer"])}
        for row in predictions
    ]


def control_scores(
    predictions: Sequence[Prediction], sighted: Sequence[Prediction], language: bool, bert_scorer: Any = None
) -> dict[str, Any]:
    """All figures of one control.

    Args:
        predictions: of the control, at least one.
        sighted: of the same questions and maybe more; empty if there are none.
        language: also the language scores; they cost time and mean little for corruptions.

    Returns:
        answers, accuracy; by_type and by_category; visual_tokens_per_scene; errors, the number of questions that
        could not be asked; changed_from_sighted, the share of answers that differ; those of `language_scores`.
    """
    by_type = score_by_type(*([row[key] for row in predictions] for key in ("question", "reference", "answer")))
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
        changed = [row["answer"] != before[row["question_id"]] for row in shared]
        result["changed_from_sighted"] = float(np.mean(changed))
    if language:
        result |= language_scores(predictions, bert_scorer)
    return result


def language_scores(predictions: Sequence[Prediction], bert_scorer: Any = None) -> dict[str, Any]:
    """Scores of wording, each with its package's name and its tokenizer.

    Returns:
        those of `METRICS`; bert_score with a scorer; drivelm, the challenge's scores, where the data has its tags and
        its numbering.
    """
    references = [row["reference"] for row in predictions]
    answers = [row["answer"] for row in predictions]
    scores: dict[str, Any] = {name: metric.score(answers, references) for name, metric in METRICS.items()}
    if bert_scorer is not None:
        scores["bert_score"] = bert_scores(answers, references, bert_scorer)
    challenge = challenge_references(predictions)
    if challenge is not None:
        try:
            scores["drivelm"] = score_drivelm(challenge, submission(predictions))
        except ValueError as error:  # references that the challenge's own script fails on must not cost the rest
            scores["drivelm"] = {"not_scored": str(error)}
    return scores


def dropped_camera_scores(predictions: Sequence[Prediction], camera: str, rig: Rig) -> dict[str, Any]:
    """Accuracy on the questions that name a dropped camera, and on the others: only the first should suffer."""
    named = [row for row in predictions if camera in rig.named_in(row["question"])]
    others = [row for row in predictions if camera not in rig.named_in(row["question"])]
    return {"named_camera": _accuracy(named), "other_cameras": _accuracy(others)}


def hallucination_scores(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """How often a model says that an absent object is there, in all and by the camera asked about."""
    rates = {"all": _yes_rate(predictions)}
    for camera in sorted({row["camera"] for row in predictions}):
        rates[camera] = _yes_rate([row for row in predictions if row["camera"] == camera])
    return {"hallucination": rates}


def intervals(results: Mapping[str, Sequence[Prediction]], resamples: int, seed: int) -> Intervals | dict[str, Any]:
    """Scene-clustered bootstrap intervals of the predictions by control.

    Returns:
        "sighted": {figure: interval}; "sighted_minus": {control: {figure: interval}}, paired on the questions that
        both answered; for the blind controls accuracy by category, by type and the balanced accuracy of yes/no, for
        the others accuracy alone. Empty without "sighted".
    """
    if "sighted" not in results:
        return {}
    options = {"resamples": resamples, "seed": seed}
    sighted = results["sighted"]
    differences: dict[str, dict[str, IntervalFigures]] = {}
    for name, predictions in results.items():
        by_id = {row["question_id"]: row for row in predictions}
        paired = [row for row in sighted if row["question_id"] in by_id]
        if name != "sighted" and paired:
            others = [by_id[row["question_id"]] for row in paired]
            every = Control.parse(name).group == "blind"
            differences[name] = _interval_figures(paired, others, every, options)
    return {"sighted": _interval_figures(sighted, None, True, options), "sighted_minus": differences}


def calibration(results: Mapping[str, Sequence[Prediction]]) -> dict[str, Any]:
    """ECE, Brier score and risk-coverage of yes/no and multiple choice, by control, from the likelihoods of choices.

    `abstention` asks: at the confidence that keeps 80 % of the sighted answers, which share of the answers to other
    images is kept? A model that knows that it sees nothing keeps few.
    """
    report: dict[str, Any] = {}
    confidences: dict[str, NDArray[np.float64]] = {}
    for control, predictions in results.items():
        kinds: dict[str, Any] = {}
        for kind in ("yes_no", "multiple_choice"):
            rows = [row for row in predictions if row.get("choices") and _kind(row) == kind]
            if not rows:
                continue
            scored = calibration_scores(_probabilities(rows), [_label(row, kind) for row in rows])
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
        order = [CATEGORIES.index(row["category"]) for row in rows]
        if order != sorted(order):
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


def _interval_figures(
    rows: Sequence[Prediction], others: Sequence[Prediction] | None, every: bool, options: dict[str, int]
) -> dict[str, IntervalFigures]:
    """Intervals of the share of right answers, or of its difference to `others`, which answer the same questions in
    this order; of all questions or, with `every`, also by category and type, and balanced over yes and no."""
    groups = _groups(rows) if every else {"accuracy": list(range(len(rows)))}

    def figures(interval: Callable[..., IntervalFigures], index: Sequence[int]) -> IntervalFigures:
        chosen = [[answers[i] for i in index] for answers in (rows, others) if answers is not None]
        return interval(*chosen, **options)

    found = {name: figures(accuracy_interval, index) for name, index in groups.items()}
    if groups.get("type:yes_no"):
        found["yes_no_balanced_accuracy"] = figures(balanced_interval, groups["type:yes_no"])
    return found


def accuracy_interval(
    rows: Sequence[Prediction], others: Sequence[Prediction] | None = None, /, **options: int
) -> IntervalFigures:
    """The share of right answers; minus that of `others`, to the same questions in this order, where there are any."""
    return share_interval(right_of(rows) - (0 if others is None else right_of(others)), rows, **options)


def share_interval(values: NDArray[Any], rows: Sequence[Prediction], **options: int) -> IntervalFigures:
    """The mean of values (answers,), one for each of `rows`."""
    return _as_figures(mean_interval(values, [row["scene_token"] for row in rows], **options))


def balanced_interval(
    rows: Sequence[Prediction], others: Sequence[Prediction] | None = None, /, **options: int
) -> IntervalFigures:
    """`accuracy_interval` of yes/no questions, with yes and no weighing alike."""
    yes = np.array([parse_yes_no(row["reference"]) == "yes" for row in rows])
    right = [right_of(answers) for answers in (rows, others) if answers is not None]  # one or two, (questions,)
    columns = [yes, ~yes, *(column * truth for column in right for truth in (yes, ~yes))]
    return _as_figures(scene_bootstrap(_balanced, columns, [row["scene_token"] for row in rows], **options))


def _balanced(all_yes: NDArray[Any], all_no: NDArray[Any], *right: NDArray[Any]) -> NDArray[np.float64]:
    """Mean of the recalls of yes and no, or of the one that occurs; minus that of a second model where there is one.

    All are sums over questions, (resamples,): how many are yes and no, and of these each model's right answers.
    """
    with np.errstate(invalid="ignore"):
        means = [
            np.nanmean([right_yes / all_yes, right_no / all_no], axis=0)
            for right_yes, right_no in zip(right[::2], right[1::2], strict=True)
        ]
    return means[0] - means[1] if len(means) == 2 else means[0]


def _as_figures(interval: Interval) -> IntervalFigures:
    return IntervalFigures(**asdict(interval))  # type: ignore[typeddict-item]  # the same fields


def _groups(rows: Sequence[Prediction]) -> dict[str, list[int]]:
    """Numbers of rows: all, by category, by type."""
    groups: dict[str, list[int]] = {"accuracy": list(range(len(rows)))}
    for name_of in (lambda row: row["category"], lambda row: f"type:{_kind(row)}"):
        for number, row in enumerate(rows):
            groups.setdefault(name_of(row), []).append(number)
    return groups


def _kind(row: Prediction) -> str:
    return question_type(row["question"], row["reference"])


def right_of(rows: Sequence[Prediction]) -> NDArray[np.float64]:
    """(answers,), 1 for a right one and 0 for a wrong one."""
    return np.array([answer_correct(row["question"], row["reference"], row["answer"]) for row in rows], dtype=float)


def _accuracy(rows: Sequence[Prediction]) -> dict[str, Any]:
    return {"answers": len(rows), "accuracy": float(right_of(rows).mean()) if rows else None}


def _visual_tokens(rows: Sequence[Prediction]) -> float:
    frames = {(row["scene_token"], row["frame_token"]): row["visual_tokens"] for row in rows}
    return float(np.mean(list(frames.values())))


def _yes_rate(rows: Sequence[Prediction]) -> dict[str, Any]:
    scores = yes_no_scores([row["answer"] for row in rows], [row["reference"] for row in rows])
    return {"answers": len(rows), "yes_rate": scores["yes_rate"], "unparsed": scores["unparsed"]}


def _probabilities(rows: Sequence[Prediction]) -> NDArray[np.float64]:
    """(questions, choices); questions with fewer choices than others get probability 0 for the rest."""
    width = max(len(row["choices"]) for row in rows)
    logs = np.full((len(rows), width), -np.inf)
    for index, row in enumerate(rows):
        logs[index, : len(row["choices"])] = row["log_likelihoods"]
    return choice_probabilities(logs)


def _label(row: Prediction, kind: str) -> int:
    """Which of its choices is right."""
    right = parse_yes_no(row["reference"]) if kind == "yes_no" else parse_choice(row["reference"], row["question"])
    return row["choices"].index(str(right).capitalize())


def _thinned(curve: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """At most `CURVE_POINTS` points of a curve with one point per answer."""
    length = len(curve["coverage"])
    points = sorted(set(np.linspace(0, length - 1, min(length, CURVE_POINTS)).round().astype(int).tolist()))
    return {name: [values[point] for point in points] for name, values in curve.items()}
