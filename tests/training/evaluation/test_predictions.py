"""What a predictions file holds is not asked again, whatever a model said."""

import json
from pathlib import Path

import pytest

from training.data.rig import NUSCENES
from training.evaluation.controls import SIGHTED, Control
from training.evaluation.predictions import finished_before, make_prediction, predict
from training.evaluation.results import Run, control_file, control_of

ODD = "Yes\u2028and\x85no.\x1e\n"  # line ends of str.splitlines, and a real one


def make_frame(number: int) -> tuple[dict, list[dict]]:
    frame = {"scene_token": "s", "frame_token": f"f{number}", "images": {}}
    fixed = {"category": "perception", "tag": [0], "objects": [], "answer": "Yes."}
    rows = [
        {**frame, **fixed, "question_id": f"s_f{number}_{index}", "question": f"Is it {index}?"} for index in (0, 1)
    ]
    return frame, rows


def ask_counting(asked: list[str]):
    def ask(frame, questions):
        asked.append(frame["frame_token"])
        return [make_prediction({**row, "asked": row["question"]}, ODD, None, 6) for row in questions]

    return ask


def test_answers_with_odd_characters_are_read_again_as_they_were_said(tmp_path):
    frames, file = [make_frame(0), make_frame(1)], control_file(tmp_path, SIGHTED)
    asked: list[str] = []
    first = predict(SIGHTED, ask_counting(asked), frames, NUSCENES, file)
    again = predict(SIGHTED, ask_counting(asked), frames, NUSCENES, file)
    assert asked == ["f0", "f1"] and again == first and {row["answer"] for row in again} == {ODD}
    run = Run("run", tmp_path, {})
    assert list(run.predictions("sighted").values()) == first and run.predictions("black") == {}


def test_a_broken_line_costs_its_frame_only(tmp_path):
    frames, file = [make_frame(0), make_frame(1)], control_file(tmp_path, SIGHTED)
    first = predict(SIGHTED, ask_counting([]), frames, NUSCENES, file)
    file.write_text(file.read_text()[:-20])
    asked: list[str] = []
    assert predict(SIGHTED, ask_counting(asked), frames, NUSCENES, file) == first and asked == ["f1"]
    assert [path.name for path in file.parent.iterdir()] == ["predictions.jsonl"]
    assert [json.loads(line)["frame_token"] for line in file.read_text().split("\n")[:-1]] == ["f0", "f0", "f1", "f1"]


@pytest.mark.parametrize("name", ["drop:CAM_BACK", "corrupt:lens_dirt:3", "sighted@4", "black"])
def test_finished_controls_are_found_by_their_folders(tmp_path, name):
    control, frames = Control.parse(name), [make_frame(0), make_frame(1)]
    file = control_file(tmp_path, control)
    assert control_of(file) == control and ":" not in file.parent.name
    predict(control, ask_counting([]), frames[:1], NUSCENES, file)
    assert finished_before(tmp_path, [SIGHTED], frames, NUSCENES) == []
    predict(control, ask_counting([]), frames, NUSCENES, file)
    assert finished_before(tmp_path, [SIGHTED], frames, NUSCENES) == [control]
    assert finished_before(Path(tmp_path), [control], frames, NUSCENES) == []
