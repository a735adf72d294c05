import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.metrics.answers import yes_no_scores
from training.metrics.intervals import mean_difference_interval, mean_interval, scene_bootstrap


def test_mean_interval_agrees_with_a_loop_over_resampled_questions() -> None:
    rng = np.random.default_rng(0)
    scenes = rng.integers(12, size=200).tolist()
    values = rng.random(200)
    fast = mean_interval(values, scenes, resamples=300, seed=3)
    members = [np.flatnonzero(np.array(scenes) == scene) for scene in sorted(set(scenes), key=str)]
    draws = np.random.default_rng(3).integers(len(members), size=(300, len(members)))
    means = [values[np.concatenate([members[scene] for scene in draw])].mean() for draw in draws]
    general = (values.mean(), *np.percentile(means, [2.5, 97.5]))
    assert (fast.estimate, fast.low, fast.high) == pytest.approx(general)
    assert fast.scenes == 12 and fast.resamples == 300


def test_scenes_are_resampled_not_questions() -> None:
    # 50 questions of one scene all right, 50 of the other all wrong: there are two observations, not a hundred.
    interval = mean_interval([1] * 50 + [0] * 50, ["a"] * 50 + ["b"] * 50)
    assert (interval.estimate, interval.low, interval.high) == (0.5, 0, 1)
    spread = mean_interval([1, 0] * 50, list(range(100)))
    assert spread.low is not None and spread.low > 0.35


def test_coverage_of_a_normal_mean() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(400):
        effects = rng.normal(size=40)  # one per scene
        scenes = np.repeat(np.arange(40), 5)
        interval = mean_interval(effects[scenes] + rng.normal(size=200), scenes.tolist(), resamples=300, seed=trial)
        assert interval.low is not None and interval.high is not None
        hits += interval.low <= 0 <= interval.high
    assert 0.88 <= hits / 400 <= 0.98  # 0.93 in the long run with 40 scenes


def test_paired_difference_keeps_the_pairs() -> None:
    rng = np.random.default_rng(1)
    scenes = np.repeat(np.arange(10), 10).tolist()
    blind = np.repeat(rng.random(10), 10)  # hard and easy scenes
    interval = mean_difference_interval(blind + 0.25, blind, scenes)
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((0.25, 0.25, 0.25))
    with pytest.raises(ValueError, match="same questions"):
        mean_difference_interval([1.0], [1.0, 0.0], ["a", "b"])


def test_any_statistic_and_undefined_resamples() -> None:
    references = ["Yes.", "Yes.", "No.", "No.", "Yes.", "No."]
    predictions = ["Yes.", "No.", "No.", "No.", "Yes.", "Yes."]

    yes = np.array([reference == "Yes." for reference in references])
    right = np.array([a == b for a, b in zip(references, predictions, strict=True)])

    def balanced(yes_right, all_yes, no_right, all_no):
        with np.errstate(invalid="ignore"):
            return (yes_right / all_yes + no_right / all_no) / 2

    columns = [yes & right, yes, ~yes & right, ~yes]
    interval = scene_bootstrap(balanced, columns, ["a", "a", "b", "b", "c", "c"], resamples=200)
    assert interval.estimate == pytest.approx(2 / 3)
    assert interval.estimate == pytest.approx(yes_no_scores(predictions, references)["balanced_accuracy"])
    assert interval.low is not None and interval.high is not None
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1


def test_one_scene_has_no_interval() -> None:
    interval = mean_interval([1, 0], ["a", "a"])
    assert (interval.estimate, interval.low, interval.high, interval.scenes) == (0.5, None, None, 1)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4)), min_size=1, max_size=20), st.randoms(use_true_random=False)
)
@settings(deadline=None, derandomize=True, max_examples=50)
def test_bounds_and_order(rows: list[tuple[float, int]], rng) -> None:
    interval = mean_interval([value for value, _ in rows], [scene for _, scene in rows], resamples=50)
    rng.shuffle(rows)
    again = mean_interval([value for value, _ in rows], [scene for _, scene in rows], resamples=50)
    if interval.low is None or interval.high is None:
        assert interval.scenes == 1
    else:
        assert -1e-9 <= interval.low <= interval.high <= 1 + 1e-9
        assert (again.low, again.high) == pytest.approx((interval.low, interval.high))


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="at least one question"):
        mean_interval([], [])
    with pytest.raises(ValueError, match="expected 2 finite values"):
        mean_interval([1.0, np.nan], ["a", "b"])
    with pytest.raises(ValueError, match="between 0 and 1"):
        mean_interval([1.0], ["a"], confidence=95)
