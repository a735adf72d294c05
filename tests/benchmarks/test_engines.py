"""Engines are asked the same questions about the same frames."""

import json

import pytest
from exported import save_checkpoint
from prepared import write_prepared

from benchmarks.engines import EnginesArguments, main
from benchmarks.tables import engines


@pytest.mark.slow  # exporting graphs takes about half a minute
def test_graphs_answer_as_the_model_does(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    data = write_prepared(tmp_path / "data", splits=("test",))
    places = {"work_dir": str(tmp_path / "work"), "output": str(tmp_path / "engines.json")}
    args = EnginesArguments(str(checkpoint), str(data), ["onnx", "fp32"], max_frames=4, max_new_tokens=5, **places)
    results = main(args)
    assert json.loads((tmp_path / "engines.json").read_text()) == results
    assert list(results["engines"]) == ["fp32", "onnx"]
    assert results["engines"]["onnx"]["same_answer"] == 1.0
    assert results["questions"] == 16
    assert "| ONNX Runtime, fp32 |" in engines(results)


def test_engines_are_known_and_compared(tmp_path):
    for names in (["fp32", "tpu"], ["onnx"]):
        with pytest.raises(ValueError, match="--engines takes fp32 and some of int8, onnx, onnx-int8"):
            main(EnginesArguments("nowhere", "nowhere", names))
