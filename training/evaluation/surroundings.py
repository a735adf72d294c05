"""What stands around the car in each frame of an evaluation, as far as the data know it, and with left for right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.data.asked import answer_from, asked_by
from training.data.contents import Contents, limited, moved
from training.data.rig import Rig
from training.data.rows import FrameRow, Row
from training.evaluation.controls import counterparts
from training.evaluation.results import FrameKey, frame_key
from training.metrics.answers import answer_correct


@dataclass(frozen=True)
class Surroundings:
    """A frame's contents in the cameras that a model is shown."""

    contents: Contents
    swapped: Contents  # under the control "swap_left_right"
    cameras: tuple[str, ...]

    def shows(self, sector: str, rig: Rig) -> bool:
        """Whether the model is shown all cameras of a sector."""
        return set(rig.sectors.get(sector, ())) <= set(self.cameras)


Around = Mapping[FrameKey, Surroundings]


def surroundings(
    frames: Sequence[tuple[FrameRow, Sequence[Row]]],
    contents: Mapping[FrameKey, Contents],
    cameras: Sequence[str],
    rig: Rig,
) -> dict[FrameKey, Surroundings]:
    """By frame; frames whose contents nobody knows, or that disagree with the data's own answers, are left out.

    Contents need not be complete (DriveLM's are its key objects), and an object that they lack would be nowhere.

    Args:
        frames: each with its questions.
        contents: of frames, as far as they are known.
        cameras: what the model is shown.
    """
    found = {}
    for frame, rows in frames:
        key = frame_key(frame)
        if key in contents and _agree(contents[key], rows, rig):
            shown = tuple(camera for camera in cameras if camera in frame["images"])
            seen = limited(contents[key], shown)
            found[key] = Surroundings(seen, moved(seen, counterparts(shown, rig)), shown)
    return found


def _agree(contents: Contents, rows: Sequence[Row], rig: Rig) -> bool:
    """Whether contents give the answers that the data have."""
    for row in rows:
        asked = asked_by(row["question"])
        answer = None if asked is None else answer_from(asked, contents, rig)
        if answer is not None and not answer_correct(row["question"], row["answer"], answer):
            return False
    return True
