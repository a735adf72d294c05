"""The training benchmark runs, compares equal work, and writes what it says."""

import json

import pytest

from benchmarks.packing import PackingArguments, main


def test_four_ways_of_the_same_step(tmp_path):
    output = tmp_path / "result.json"
    main(PackingArguments(str(output), quick=True, questions=3, num_queries=2, rows_per_batch=2))
    result = json.loads(output.read_text())
    ways = result["ways"]
    assert len(ways) == 4
    live = ways["one per sequence, live"]
    for way in ways.values():
        assert way["loss"] == pytest.approx(live["loss"], abs=1e-3), "the same answer tokens"
    assert ways["packed, live"]["tokens"] < live["tokens"]
    speeds = [ways[name]["questions_per_second"] for name in ("packed, cached", "one per sequence, live")]
    assert result["ratios"]["packed and cached over neither"]["whole"] == pytest.approx(
        speeds[0] / speeds[1], abs=0.01
    )
