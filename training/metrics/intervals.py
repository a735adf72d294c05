"""Confidence intervals by scene-clustered bootstrap.

Questions of one scene share their images, their traffic and the annotator's habits: they are no independent
observations. So scenes are resampled, with all their questions, not questions (Cameron, Gelbach and Miller,
"Bootstrap-Based Improvements for Inference with Clustered Errors", 2008). A paired difference resamples the same
scenes for both models. All that a figure needs of a scene are sums over its questions, which `scipy.stats.bootstrap`
resamples together.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import DegenerateDataWarning, bootstrap

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
    statistic: Callable[..., NDArray[np.float64]],
    columns: Sequence[ArrayLike],
    scenes: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Interval of a figure that sums over questions decide, such as a mean: right answers by questions.

    Args:
        statistic: gets one array (resamples,) per column, its sum over the questions of each resample, and returns
            the figures (resamples,); NaN where a resample does not define it (no "no" among the references, say),
            such resamples are left out.
        columns: each (questions,), finite.
        scenes: (questions,), the scene of each question; the order does not matter to which scenes are drawn.

    Raises:
        ValueError: no questions, shapes disagree, a value is not finite, or `confidence` outside (0, 1).
    """
    if not len(scenes):
        raise ValueError("a bootstrap needs at least one question")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    values = [np.asarray(column, dtype=np.float64) for column in columns]
    for column in values:
        if column.shape != (len(scenes),) or not np.isfinite(column).all():
            raise ValueError(f"expected {len(scenes)} finite values, one per scene entry, got shape {column.shape}")
    names = {scene: number for number, scene in enumerate(sorted(set(scenes), key=str))}
    places = [names[scene] for scene in scenes]
    sums = [np.bincount(places, weights=column, minlength=len(names)) for column in values]  # each (scenes,)

    def figure(*drawn: NDArray[Any], axis: int) -> NDArray[np.float64]:
        return statistic(*(column.sum(axis=axis) for column in drawn))

    unknown = Interval(float(figure(*sums, axis=-1)), None, None, len(names), confidence, resamples)
    if len(names) < 2:
        return unknown
    with warnings.catch_warnings(action="ignore", category=DegenerateDataWarning):  # of figures that are NaN
        options = {"paired": True, "vectorized": True, "method": "percentile", "rng": np.random.default_rng(seed)}
        found = bootstrap(sums, figure, n_resamples=resamples, confidence_level=confidence, **options)
    defined = found.bootstrap_distribution[np.isfinite(found.bootstrap_distribution)]
    if not defined.size:
        return unknown
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return replace(unknown, low=float(low), high=float(high))


def mean_interval(values: ArrayLike, scenes: Sequence[Hashable], **options: Any) -> Interval:
    """`scene_bootstrap`, with its options and errors, of a mean over questions, e.g. of 0/1 for wrong and right."""
    return scene_bootstrap(np.divide, [values, np.ones(len(scenes))], scenes, **options)


def mean_difference_interval(
    values: ArrayLike, baseline: ArrayLike, scenes: Sequence[Hashable], **options: Any
) -> Interval:
    """`mean_interval` of one model's values minus another's, of the same questions in the same order.

    Raises:
        ValueError: shapes disagree, or what `scene_bootstrap` raises.
    """
    first, second = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a paired difference needs the same questions, got {first.shape} and {second.shape} values")
    return mean_interval(first - second, scenes, **options)
