"""An evaluation's folder without a model: what tests of the report and of other readers start from."""

import json
from pathlib import Path

import numpy as np
import pytest

from smoldriver_hf import CAMERAS
from training.data.rig import NUSCENES
from training.data.rows import load_rows
from training.evaluation.figures import words_of
from training.evaluation.headline import headline
from training.evaluation.predictions import make_prediction
from training.evaluation.results import control_file, without_nan
from training.evaluation.scoring import all_scores

EVIL = '<script>alert("x")</script> & <b>'


def write_run(folder: Path, data: Path, wrong: set[int], attention: bool = False) -> Path:
    """Predictions without a model: right but for the questions `wrong`, and what black images give."""
    rows = load_rows(data, "test")
    results: dict[str, list[dict]] = {}
    for control in ("sighted", "black", "text_only", "sighted@2", "corrupt:fog:1", "corrupt:fog:5", "drop:CAM_BACK"):
        predictions = []
        for index, row in enumerate(rows):
            right = control != "black" and index not in wrong
            asked = {**row, "asked": row["question"]}
            prediction = make_prediction(asked, row["answer"] if right else EVIL, None, 12 if "@" in control else 48)
            if row["answer"][:3] in ("Yes", "No.") and control in ("sighted", "black"):
                prediction |= {"choices": ["Yes", "No"], "log_likelihoods": [-0.1, -2.0 - index]}
            predictions.append(prediction)
        results[control] = predictions
        file = control_file(folder, control)
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(prediction) + "\n" for prediction in predictions))
    with pytest.MonkeyPatch.context() as patch:  # without starting a Java program for each score
        patch.setattr("training.metrics.language.available_tokenizer", lambda: "python")
        scores = all_scores(results, NUSCENES, "pixels", resamples=20, seed=0)
    report = {
        "command": "python -m training.evaluate",
        "arguments": {},
        "versions": {},
        "seed": 0,
        "split": "test",
        "split_hash": rows.split_hash,
        "checkpoint": {"path": f"{folder.name}-{EVIL}", "fingerprint": "sha256:abc"},
        "counts": {"scenes": 2, "frames": 4, "questions": len(rows)},
        **words_of(scores["results"]),
        **scores,
        "headline": headline(results, {}, NUSCENES, resamples=20, seed=0),
    }
    (folder / "metrics.json").write_text(json.dumps(without_nan(report)))
    if attention:
        frame = next(rows.frames())[0]
        key = f"{frame['scene_token']}/{frame['frame_token']}"
        maps = {f"{key}/{camera}": np.eye(3, dtype=np.float32) for camera in CAMERAS}
        np.savez(folder / "attention.npz", **maps)
    return folder
