"""What can be known before the first answer is found out before it: hours of answers must not end in an error."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from training.data.images import is_readable
from training.data.rows import Rows, load_rows
from training.evaluation.controls import Control, control_questions, counterparts
from training.evaluation.predictions import Frame

BYTES_AN_ANSWER = 2000
"""Of a line of predictions, beside the answer's own text: question, reference and names."""


def possible_controls(
    controls: Sequence[Control], asked: Sequence[str], rows: Rows, frames: Sequence[Frame], cameras: Sequence[str]
) -> list[Control]:
    """The controls that these data can answer. Those of a group that they cannot are told on stderr.

    Args:
        controls: all that are to be answered.
        asked: the names on the command line: a control that is named there, and not only its group, must be possible.

    Raises:
        ValueError: a control that was asked for by name cannot be answered.
    """
    left_out = {control: why for control in controls if (why := _hindrance(control, rows, frames, cameras))}
    for control, why in left_out.items():
        if str(control) in asked or control.budget is not None:
            raise ValueError(f"the control {control} cannot be answered: {why}")
        print(f"left out {control}: {why}", file=sys.stderr)
    return [control for control in controls if control not in left_out]


def _hindrance(control: Control, rows: Rows, frames: Sequence[Frame], cameras: Sequence[str]) -> str | None:
    """Why a control cannot be answered, or would say nothing; None if it can."""
    if control == Control("sighted"):
        return None
    if not any(row["answer"] for _, questions in frames for row in questions):
        return f"no question of split {rows.split!r} has an answer to compare with"
    if not any(control_questions(control, questions, rows.rig) for _, questions in frames):
        return "no question of these frames fits"
    match control.kind:
        case "template_majority":
            return _lack_of_training_answers(rows.path)
        case "wrong_scene" if len({frame["scene_token"] for frame, _ in rows.frames()}) < 2:
            return f"split {rows.split!r} has one scene only"
        case "permuted" if len(cameras) < 2:
            return f"{cameras[0]} is the only camera"
        case "swap_left_right" if all(camera == other for camera, other in counterparts(cameras, rows.rig).items()):
            return f"none of {', '.join(cameras)} has its counterpart on the other side"
    return None


def _lack_of_training_answers(data: Path) -> str | None:
    try:
        train = load_rows(data, "train")
    except ValueError as error:
        return str(error)
    return None if any(row["answer"] for row in train) else f"{data} has no answers in split 'train'"


def check_pictures(frames: Sequence[Frame], cameras: Sequence[str]) -> None:
    """Decode every picture that will be shown, small.

    Raises:
        ValueError: some are missing or broken; the first one is named.
    """
    paths = list(dict.fromkeys(frame["images"][c] for frame, _ in frames for c in cameras if c in frame["images"]))
    broken = [path for path in tqdm(paths, desc="pictures", disable=len(paths) < 1000) if not is_readable(Path(path))]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(paths)} pictures are missing or cannot be read, the first is {broken[0]}; "
            "training.prepare --verify_images leaves them out"
        )


def check_room(output_dir: Path, controls: int, frames: Sequence[Frame], max_new_tokens: int) -> None:
    """Make the folder, and see whether the answers will find room in it.

    Raises:
        ValueError: too little room is left on the disk.
        OSError: nothing can be written there.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    probe = output_dir / ".room"
    probe.touch()
    probe.unlink()
    answers = controls * sum(len(questions) for _, questions in frames)
    needed, free = answers * (BYTES_AN_ANSWER + 6 * max_new_tokens), shutil.disk_usage(output_dir).free
    if free < needed:
        raise ValueError(
            f"{answers} answers need about {needed / 1e6:.0f} MB; {output_dir} has {free / 1e6:.0f} MB left"
        )
