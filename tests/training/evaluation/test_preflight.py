"""What is known before the first answer is told before it."""

import shutil
from collections import namedtuple
from pathlib import Path

import prepared
import pyarrow.parquet as pq
import pytest

from smoldriver_hf import CAMERAS
from training.data.rows import QUESTION_SCHEMA, load_rows
from training.evaluation.controls import Control, expand_controls
from training.evaluation.predictions import choose_frames
from training.evaluation.preflight import check_pictures, check_room, possible_controls

QUESTIONS = [
    ("Are there cars to the back of the ego car?", "Yes."),
    ("What are objects to the front of the ego car?", "There is one bus to the front of the ego car."),
]


def write(folder: Path, **options) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "QUESTIONS", QUESTIONS)
        return prepared.write_prepared(folder, questions=2, **options)


def hide(data: Path, split: str, keep: int = 0) -> None:
    """Take away all answers of a split but the first few."""
    (file,) = (data / "questions").glob(f"{split}-*.parquet")
    rows = pq.read_table(file).to_pylist()
    rows = [row | {"answer": row["answer"] if number < keep else ""} for number, row in enumerate(rows)]
    pq.write_table(pq.read_table(file).from_pylist(rows, schema=QUESTION_SCHEMA), file)


def possible(data: Path, names: list[str], cameras=CAMERAS) -> list[str]:
    rows = load_rows(data, "test")
    controls = expand_controls(names, cameras)
    return [str(control) for control in possible_controls(controls, names, rows, choose_frames(rows, None), cameras)]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write(tmp_path / "whole", frames=4, splits=("train", "test"))


def test_what_can_be_answered_is_left_as_it_is(whole, capsys):
    assert possible(whole, ["blind"]) == ["sighted", "template_majority", "text_only", "black", "wrong_scene"]
    assert "wrong_scene" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "cameras", "control", "why"),
    [
        ({"frames": 4, "splits": ("test",)}, CAMERAS, "template_majority", "has no frames for split 'train'"),
        ({"frames": 2, "splits": ("train", "test")}, CAMERAS, "wrong_scene", "split 'test' has one scene only"),
        ({"frames": 4, "splits": ("test",)}, ["CAM_FRONT"], "permuted", "CAM_FRONT is the only camera"),
        ({"frames": 4, "splits": ("test",)}, ["CAM_FRONT", "CAM_BACK_LEFT"], "swap_left_right", "on the other side"),
    ],
)
def test_a_control_of_a_group_is_left_out_and_told_and_a_named_one_refused(
    tmp_path, capsys, options, cameras, control, why
):
    data = write(tmp_path / "data", **options)
    left = possible(data, ["blind", "cameras"], cameras)
    assert control not in left and "black" in left
    assert f"left out {control}: " in (told := capsys.readouterr().err) and why in told
    with pytest.raises(ValueError, match=f"the control {control} cannot be answered: .*{why}"):
        possible(data, ["sighted", control], cameras)


def test_no_control_without_answers_to_compare_with(whole, capsys):
    hide(whole, "test", keep=1)
    assert "black" in possible(whole, ["blind"])
    hide(whole, "test")
    assert possible(whole, ["blind", "questions"]) == ["sighted"]
    assert "left out black: no question of split 'test' has an answer" in capsys.readouterr().err
    rows = load_rows(whole, "test")
    with pytest.raises(ValueError, match="the control sighted@2 cannot be answered"):
        possible_controls([Control("sighted", budget=2)], [], rows, choose_frames(rows, None), CAMERAS)


def test_a_train_split_without_answers_teaches_no_majority(whole, capsys):
    hide(whole, "train")
    assert "template_majority" not in possible(whole, ["blind"])
    assert "has no answers in split 'train'" in capsys.readouterr().err


def test_pictures_are_looked_at_first(whole):
    rows = load_rows(whole, "test")
    frames = choose_frames(rows, None)
    check_pictures(frames, CAMERAS)
    file = Path(frames[2][0]["images"]["CAM_BACK"])
    content = file.read_bytes()
    for damage in (content[:60], b"", None):
        file.unlink() if damage is None else file.write_bytes(damage)
        with pytest.raises(ValueError, match=f"1 of 24 pictures are missing or cannot be read.*{file.name}"):
            check_pictures(frames, CAMERAS)
    check_pictures(frames, ["CAM_FRONT"])  # the others are not shown
    check_pictures(frames[:2], CAMERAS)


def test_room_is_looked_for_first(whole, tmp_path, monkeypatch):
    frames = choose_frames(load_rows(whole, "test"), None)
    check_room(tmp_path / "new" / "run", 5, frames, 64)
    assert list((tmp_path / "new" / "run").iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(50_000))
    check_room(tmp_path / "new" / "run", 1, frames, 64)
    with pytest.raises(ValueError, match="40 answers need about .* MB; .*run has 0 MB left"):
        check_room(tmp_path / "new" / "run", 5, frames, 64)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        check_room(tmp_path / "file", 1, frames, 64)
