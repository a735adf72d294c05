"""The figures that tell whether a model looks where a question points; each with its count, interval and blind score.

    perception          right answers of that category
    existence           "Are there moving cars to the back of the ego car?", yes and no weighing alike
    existence_yes       those whose answer is "Yes."
    no_nowhere, no_elsewhere, no_other_state
                        those whose answer is "No.", by why it is (`training.data.asked.why_not`): a model that matches
                        what is asked with what any camera shows is right on the first and wrong on the second
    follow              under "swap_left_right", of the questions whose answer changes with it: answers that were not
                        the swapped scene's and become it
    wrong_scene         perception with another scene's images
    black_relevant      questions that name a camera, which is black

Those that a run did not measure are left out: the "No." and `follow` need contents, the last three their controls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from training.data.asked import WHY_NOT, answer_from, asked_by, why_not
from training.data.rig import Rig
from training.evaluation.controls import BLIND
from training.evaluation.results import HeadlineRow, Prediction, frame_key
from training.evaluation.scoring import accuracy_interval, balanced_interval, share_interval
from training.evaluation.surroundings import Around, Surroundings
from training.metrics.answers import answer_correct, parse_yes_no

TITLES = {
    "perception": "perception",
    "existence": "existence, yes and no weighing alike",
    "existence_yes": "existence, “Yes.”",
    "no_nowhere": "existence, “No.”: nowhere",
    "no_elsewhere": "existence, “No.”: in another camera",
    "no_other_state": "existence, “No.”: there, in another state",
    "follow": "left and right swapped: answers that follow",
    "wrong_scene": "perception, another scene's images",
    "black_relevant": "the camera that the question names is black",
}

Results = Mapping[str, Sequence[Prediction]]  # by control


def headline(results: Results, around: Around, rig: Rig, *, resamples: int, seed: int) -> dict[str, HeadlineRow]:
    """The rows that were measured, in the order of `TITLES`.

    Args:
        results: predictions by control, "sighted" among them.
        around: what stands around the car, of frames where that is known.
        resamples, seed: of the bootstrap.
    """
    sighted = results["sighted"]
    existence = [row for row in sighted if (asked := asked_by(row["question"])) and asked.kind == "existence"]
    yes = [row for row in existence if parse_yes_no(row["reference"]) == "yes"]
    no = [row for row in existence if parse_yes_no(row["reference"]) == "no"]
    by_reason = _by_reason(no, around, rig)
    unknown = len(no) - sum(map(len, by_reason.values()))
    black = results.get("black_relevant", ())
    table = _Table(results, {"resamples": resamples, "seed": seed})
    rows: dict[str, HeadlineRow] = {
        **table.row("perception", _perception(sighted)),
        **table.row("existence", existence, balanced=True),
        **table.row("existence_yes", yes),
    }
    for reason in WHY_NOT:
        rows |= table.row(f"no_{reason}", by_reason.get(reason, ()), left_out=unknown)
    rows |= table.follow(around, rig)
    rows |= table.row("wrong_scene", _perception(results.get("wrong_scene", ())), "wrong_scene")
    return rows | table.row("black_relevant", black, "black_relevant", left_out=len(sighted) - len(black))


@dataclass(frozen=True)
class _Table:
    results: Results
    options: Mapping[str, int]  # of the bootstrap

    def row(
        self,
        name: str,
        rows: Sequence[Prediction],
        control: str = "sighted",
        *,
        left_out: int = 0,
        balanced: bool = False,
    ) -> dict[str, HeadlineRow]:
        """The row of a control's predictions, beside what others say to the same questions; none without any."""
        if not rows:
            return {}
        measure = balanced_interval if balanced else accuracy_interval
        same = {name: found for name in ("sighted", *BLIND) if name != control and (found := self._same(name, rows))}
        scores = {name: measure(found, **self.options) for name, found in same.items()}
        true_images = scores.pop("sighted", None)
        blind = max(scores, key=lambda name: scores[name]["estimate"]) if scores and control not in BLIND else None
        row: HeadlineRow = {
            "title": TITLES[name],
            "answers": len(rows),
            "left_out": left_out,
            "score": measure(rows, **self.options),
            "blind": scores[blind] if blind else None,
            "blind_control": blind,
            "true_images": true_images,
            "swapped_images": None,
        }
        return {name: row}

    def follow(self, around: Around, rig: Rig) -> dict[str, HeadlineRow]:
        """Which answers become those of the swapped scene; none where no question's answer changes."""
        swapped = self.results.get("swap_left_right", ())
        before, after, followed = [], [], []
        unknown = 0
        for row, seen in zip(swapped, self._same("sighted", swapped), strict=True):
            truth = _swapped_truth(row, around.get(frame_key(row)), rig)
            if truth is None:
                unknown += asked_by(row["question"]) is not None
            elif not answer_correct(row["question"], row["reference"], truth):
                became, was = (answer_correct(row["question"], truth, one["answer"]) for one in (row, seen))
                followed.append(became and not was)  # who says the same to all pictures follows none
                before.append(seen)
                after.append(row)
        if not after:
            return {}
        found: HeadlineRow = {
            "title": TITLES["follow"],
            "answers": len(after),
            "left_out": unknown,
            "score": share_interval(np.array(followed, dtype=float), after, **self.options),
            "blind": None,
            "blind_control": None,
            "true_images": accuracy_interval(before, **self.options),
            "swapped_images": accuracy_interval(after, **self.options),
        }
        return {"follow": found}

    def _same(self, control: str, rows: Sequence[Prediction]) -> list[Prediction]:
        """What a control says to the questions of these rows, in their order; nothing if it was not asked them all."""
        by_id = {row["question_id"]: row for row in self.results.get(control, ())}
        found = [by_id[row["question_id"]] for row in rows if row["question_id"] in by_id]
        return found if len(found) == len(rows) else []


def _perception(rows: Sequence[Prediction]) -> list[Prediction]:
    return [row for row in rows if row["category"] == "perception"]


def _by_reason(rows: Sequence[Prediction], around: Around, rig: Rig) -> dict[str, list[Prediction]]:
    """Existence questions whose answer is "No.", by why it is; those of which nobody knows are left out."""
    found: dict[str, list[Prediction]] = {}
    for row in rows:
        asked, there = asked_by(row["question"]), around.get(frame_key(row))
        if asked and there and there.shows(asked.sector, rig):
            reason = why_not(asked, there.contents, rig)
            if reason is not None:
                found.setdefault(reason, []).append(row)
    return found


def _swapped_truth(row: Prediction, around: Surroundings | None, rig: Rig) -> str | None:
    """The answer to a question when left cameras show the right ones' pictures; None where nobody knows."""
    asked = asked_by(row["question"])
    if asked is None or around is None or not around.shows(asked.sector, rig):
        return None
    if answer_from(asked, around.contents, rig) is None:
        return None
    return answer_from(asked, around.swapped, rig)
