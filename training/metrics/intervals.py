"""Confidence intervals by scene-clustered bootstrap.

Questions of one scene share their images, their traffic and the annotator's habits: they are no independent
observations. So scenes are resampled, with all their questions, not questions (Cameron, Gelbach and Miller,
"Bootstrap-Based Improvements for Inference with Clustered Errors", 2008). A paired difference resamples the same
scenes for both models.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A percentile interval; `low` and `high` are None where there is nothing to resample (fewer than two scenes)."""

    estimate: float
    low: float | None
    high: float | None
    scenes: int
    confidence: float = CONFIDENCE
    resamples: int = RESAMPLES


def scene_bootstrap(
    statistic: Callable[[NDArray[np.intp]], float],
    scenes: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Interval of any statistic of questions.

    Args:
        statistic: gets the indices of the questions of a resample (repeated with their scene) and returns the figure;
            NaN where a resample does not define it (no "no" among the references, say), such resamples are left out.
        scenes: (questions,), the scene of each question.
        resamples: how many.
        confidence: e.g. 0.95.
        seed: of the resampling. The order of the questions does not matter to which scenes are drawn.

    Raises:
        ValueError: no questions, or `confidence` outside (0, 1).
    """
    members, names = _members(scenes, confidence)
    everything = np.arange(len(scenes))
    estimate = float(statistic(everything))
    if len(names) < 2:
        return Interval(estimate, None, None, len(names), confidence, resamples)
    draws = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    values = np.array([statistic(np.concatenate([members[name] for name in draw])) for draw in draws], dtype=float)
    return _percentiles(estimate, values, len(names), confidence)


def mean_interval(
    values: ArrayLike,
    scenes: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """`scene_bootstrap` of a mean over questions, e.g. of 0/1 for wrong and right.

    Args:
        values: (questions,), finite.
        scenes: (questions,).

    Raises:
        ValueError: shapes disagree, no questions, or a value is not finite.
    """
    column = np.asarray(values, dtype=np.float64)
    if column.shape != (len(scenes),) or not np.isfinite(column).all():
        raise ValueError(f"expected {len(scenes)} finite values, one per scene entry, got shape {column.shape}")
    members, names = _members(scenes, confidence)
    estimate = float(column.mean())
    if len(names) < 2:
        return Interval(estimate, None, None, len(names), confidence, resamples)
    sums = np.array([column[index].sum() for index in members])  # (scenes,)
    sizes = np.array([len(index) for index in members])
    draws = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    return _percentiles(estimate, sums[draws].sum(axis=1) / sizes[draws].sum(axis=1), len(names), confidence)


def mean_difference_interval(
    values: ArrayLike,
    baseline: ArrayLike,
    scenes: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Interval of mean(values) - mean(baseline) on the same questions, e.g. sighted minus blind.

    Args:
        values: (questions,), scores of one model.
        baseline: (questions,), scores of the other on the same questions in the same order.
        scenes: (questions,).

    Raises:
        ValueError: shapes disagree, no questions, or a value is not finite.
    """
    first, second = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a paired difference needs the same questions, got {first.shape} and {second.shape} values")
    return mean_interval(first - second, scenes, resamples=resamples, confidence=confidence, seed=seed)


def _members(scenes: Sequence[Hashable], confidence: float) -> tuple[list[NDArray[np.intp]], list[Hashable]]:
    """The question indices of each scene and the scenes, sorted, so that the order of the questions is irrelevant."""
    if not len(scenes):
        raise ValueError("a bootstrap needs at least one question")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    index: dict[Hashable, list[int]] = {}
    for position, scene in enumerate(scenes):
        index.setdefault(scene, []).append(position)
    names = sorted(index, key=str)
    return [np.array(index[name], dtype=np.intp) for name in names], names


def _percentiles(estimate: float, values: NDArray[np.float64], scenes: int, confidence: float) -> Interval:
    defined = values[np.isfinite(values)]
    if not defined.size:
        return Interval(estimate, None, None, scenes, confidence, len(values))
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(defined, [tail, 100 - tail])
    return Interval(estimate, float(low), float(high), scenes, confidence, len(values))
