"""Other wordings: many, with the same cameras, and none of those that an evaluation asks."""

import random
import re

import pytest

from training.data.rewording import WORDINGS, reword
from training.data.rig import NUSCENES, read_rig
from training.data.wording import STATUSES, SceneObject, perception_questions, plural_in_state
from training.evaluation.paraphrases import PARAPHRASES, paraphrase
from training.toyworld.questions import write_questions
from training.toyworld.readings import imagined_truth
from training.toyworld.scene import sample_frame


def world_questions(rig=NUSCENES, frames: int = 12) -> list[str]:
    """Questions of all kinds that the toy world and the wording ask."""
    found = dict[str, None]()
    for number in range(frames):
        frame = sample_frame(3, number, 0, 1, rig=rig)
        truth = imagined_truth(frame, frame.random("test"))
        found |= dict.fromkeys(item.question for item in write_questions(frame, truth, 60))
        objects = [
            SceneObject(name, rig.names[0], (5.0, 5.0), 4.0, (*states, None)[0]) for name, states in STATUSES.items()
        ]
        found |= dict.fromkeys(item["Q"] for item in perception_questions(objects, frame.random("more"), rig=rig))
    return list(found)


QUESTIONS = world_questions()


def test_every_question_of_the_project_has_other_wordings():
    rng = random.Random(0)
    known = {question: {reword(question, rng) for _ in range(12)} - {question} for question in QUESTIONS}
    assert not [question for question, others in known.items() if not others]
    assert reword("Who is there?", rng) == "Who is there?"


@pytest.mark.parametrize("name", ["nuscenes", "four", "seven"])
def test_a_wording_names_the_same_cameras_classes_and_tags(name):
    rig, rng = read_rig(name), random.Random(1)
    for question in QUESTIONS if name == "nuscenes" else world_questions(rig, 4):
        for _ in range(40):
            other = reword(question, rng)
            assert rig.named_in(other) == rig.named_in(question), (question, other)
            assert sorted(re.findall(r"<c[^>]*>", other)) == sorted(re.findall(r"<c[^>]*>", question)), other
            assert not re.search(r"[\[\]{}|\\]", other) and other[-1] in "?.!" + question[-1], other
            if kept := re.match(
                "(?:Are there|How many) (.+?)(?: are there)? to the|.* what are (safe|dangerous)", question
            ):
                assert (kept[1] or kept[2]) in other, (question, other)


def test_every_place_can_stand_first_and_is_found():
    rng = random.Random(2)
    for sector, cameras in NUSCENES.sectors.items():
        question = f"Are there {plural_in_state('bicycle', 'with rider')} to the {sector} of the ego car?"
        wordings = {reword(question, rng) for _ in range(400)}
        assert len(wordings) > 60
        assert {NUSCENES.named_in(wording) for wording in wordings} == {cameras}
        assert any(wording.startswith(f"To the {sector} of") for wording in wordings)
        assert any("ego vehicle" in wording for wording in wordings)


def test_no_wording_is_one_that_the_evaluation_asks():
    """Every wording of every kind, drawn until nothing new comes, against the paraphrase of the same question."""
    rng = random.Random(3)
    met = set()
    for question in QUESTIONS:
        kept = paraphrase(question)
        if kept is not None:
            met |= {number for number, (pattern, _) in enumerate(PARAPHRASES) if re.fullmatch(pattern, question)}
            drawn = {reword(question, rng) for _ in range(120)}
            assert kept not in drawn, kept
            assert not any(re.fullmatch(_as_pattern(kind), other) for other in drawn for _, kind in PARAPHRASES)
    assert len(met) == len(PARAPHRASES)


def _as_pattern(replacement: str) -> str:
    """What a paraphrase's replacement can become."""
    return re.sub(r"\\\\\d", "(.+)", re.escape(replacement))


def test_the_same_draws_give_the_same_words():
    drawn = [[reword(question, random.Random(5)) for question in QUESTIONS] for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_options_stay_as_they_are():
    options = " Please select the correct answer from the following options: A. Stop. B. Go. C. Wait. D. Turn."
    other = reword("Predict the behavior of the ego vehicle." + options, random.Random(0))
    assert other.endswith("A. Stop. B. Go. C. Wait. D. Turn.") and "Please" not in other


def test_patterns_are_met_by_questions():
    unmet = [pattern for pattern, _ in WORDINGS if not any(re.match(pattern, question) for question in QUESTIONS)]
    assert not unmet
