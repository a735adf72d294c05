import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.metrics.answers import (
    QUESTION_TYPES,
    answer_correct,
    behaviour_scores,
    count_scores,
    localisation_scores,
    multiple_choice_scores,
    parse_behaviour,
    parse_choice,
    parse_counts,
    parse_status,
    parse_yes_no,
    question_type,
    score_by_type,
    status_scores,
    yes_no_scores,
)

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "drivelm"
TAG = "<c1,CAM_FRONT,714.3,503.6>"
OPTIONS = " Please select the correct answer from the following options: A. Going ahead. B. Stopped. C. Turn left."
STRAIGHT_SLOW = "The ego vehicle is going straight. The ego vehicle is driving slowly."
LEFT_FAST = "The ego vehicle is slightly steering to the left. The ego vehicle is driving very fast."

QUESTIONS = [  # question, reference, type
    ("Are there barriers to the front left of the ego car?", "Yes.", "yes_no"),
    (
        "Is there any traffic element in the front view?",
        "Yes, there are traffic elements in the front view.",
        "yes_no",
    ),
    (f"Would {TAG} be in the moving direction of the ego vehicle?", "No.", "yes_no"),
    (f"Are {TAG} and {TAG} traffic signs?", "Only one of the boxes is a traffic sign.", "other"),
    ("What actions taken by the ego vehicle can lead to a collision?", "No such action will lead to one.", "other"),
    (f"What does {TAG} mean?", "No entry.", "other"),
    (f"What is the moving status of object {TAG}?" + OPTIONS, "B", "multiple_choice"),
    (f"What is the moving status of object {TAG}?", "Going ahead.", "status"),
    ("What is the status of the cars that are to the back of the ego car?", "Two cars are moving.", "status"),
    ("What are objects to the front of the ego car?", "There are many cars in front of the ego car.", "count"),
    ("How many buses are there to the back of the ego car?", "Two.", "count"),
    ("Predict the behavior of the ego vehicle.", STRAIGHT_SLOW, "behaviour"),
    ("Predict the behavior of the ego vehicle." + OPTIONS, "C", "multiple_choice"),
    (
        "What are the important objects in the current scene?",
        f"There is a brown SUV. Its ID is {TAG}.",
        "localisation",
    ),
    (f"What actions can lead to a collision with {TAG}?", f"Going straight leads to {TAG}.", "other"),
    ("What is the target action of the ego vehicle?", "Go straight.", "other"),
]


@pytest.mark.parametrize(("question", "reference", "kind"), QUESTIONS)
def test_question_type(question: str, reference: str, kind: str) -> None:
    assert question_type(question, reference) == kind


def test_perfect_answers_score_the_maximum() -> None:
    questions, references = [q for q, _, _ in QUESTIONS], [r for _, r, _ in QUESTIONS]
    scores = score_by_type(questions, references, references)
    assert set(scores) == {"all", *QUESTION_TYPES}
    assert sum(scores[kind]["answers"] for kind in QUESTION_TYPES) == scores["all"]["answers"] == len(QUESTIONS)
    assert all(part["accuracy"] == 1 for part in scores.values())
    assert scores["yes_no"]["balanced_accuracy"] == scores["behaviour"]["macro_f1"] == scores["count"]["exact"] == 1
    assert scores["count"]["mean_absolute_error"] == 0
    assert scores["localisation"]["f1"] == pytest.approx(1, abs=1e-6)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared DriveLM files")
def test_every_drivelm_answer_is_read() -> None:
    rows = [
        (entry["Q"], entry["A"])
        for name in ("drivelm_9frames.json", "test_eval.json")
        for scene in json.loads((SHARED / name).read_text()).values()
        for frame in scene["key_frames"].values()
        for qa in frame["QA"].values()
        for entry in qa
    ]
    # The scorers raise where a reference cannot be read under its type.
    scores = score_by_type([q for q, _ in rows], [a for _, a in rows], [a for _, a in rows])
    assert all(part["accuracy"] == 1 and part.get("unparsed", 0) == 0 for part in scores.values())
    assert set(scores) == {"all", *QUESTION_TYPES}
    assert scores["yes_no"]["answers"] > 200


def test_yes_no() -> None:
    assert [parse_yes_no(text) for text in ("Yes.", " no, none", "None", "Nothing", "", "'Yes'")] == [
        "yes",
        "no",
        None,
        None,
        None,
        "yes",
    ]
    references = ["Yes.", "Yes.", "Yes.", "No."]
    scores = yes_no_scores(["Yes."] * 4, references)
    assert scores == {
        "balanced_accuracy": 0.5,
        "accuracy": 0.75,
        "yes_rate": 1.0,
        "reference_yes_rate": 0.75,
        "unparsed": 0.0,
    }
    scores = yes_no_scores(["Yes.", "", "a car", "No."], references)
    assert scores["balanced_accuracy"] == pytest.approx((1 / 3 + 1) / 2)
    assert scores["unparsed"] == 0.5
    with pytest.raises(ValueError, match="must begin with yes or no, got 'Red.'"):
        yes_no_scores(["Yes."], ["Red."])


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        (
            "There are many barriers, one pedestrian, and two traffic cones.",
            {"barrier": 4, "pedestrian": 1, "traffic cone": 2},
        ),
        ("There are 12 cars and a white construction vehicle.", {"car": 4, "construction vehicle": 1}),
        ("One of the cars is parked and two moving cars follow.", {"car": 3}),
        ("There are no buses.", {"bus": 0}),
        ("Three.", {"": 3}),
        ("five", {"": 4}),
        (f"{TAG} is here", {}),
        ("", {}),
    ],
)
def test_parse_counts(text: str, counts: dict[str, int]) -> None:
    assert parse_counts(text) == counts


def test_count_scores() -> None:
    references = ["There are two cars and one bus.", "Many.", "Zero."]
    scores = count_scores(["There is one bus, and there are two cars.", "7", "none"], references)
    assert scores == {"exact": 1.0, "mean_absolute_error": 0.0, "unparsed": 0.0}
    # car 2 against 1, bus 1 against 0, truck 0 against 3: mean 5/3. "" errs by 4. No number for zero errs by 1.
    scores = count_scores(["There is one car and three trucks.", "", "cars"], references)
    assert scores["exact"] == 0
    assert scores["mean_absolute_error"] == pytest.approx((5 / 3 + 4 + 1) / 3)
    assert scores["unparsed"] == pytest.approx(2 / 3)
    assert count_scores(["Two cars."], ["Two."])["exact"] == 1  # a bare number against the total
    with pytest.raises(ValueError, match="must hold a number"):
        count_scores(["Two."], ["Cars."])


def test_status() -> None:
    assert parse_status("Many cars are moving, and one is parked.") == {"moving", "parked"}
    assert parse_status("It is not moving.") == {"not moving"}
    assert parse_status("Two bicycles are without riders, and one is with a rider.") == {"without rider", "with rider"}
    assert parse_status("The red car is parked.") == {"parked"}  # a colour is a state of a light only
    assert parse_status("One traffic light is red.") == {"red"}
    assert parse_status("Turn left.") == {"turn left"}
    assert parse_status("No idea.") == frozenset()
    scores = status_scores(["Moving.", "Parked.", ""], ["One car is moving.", "One car is moving.", "Stopped."])
    assert scores == {"accuracy": pytest.approx(1 / 3), "unparsed": pytest.approx(1 / 3)}


def test_behaviour() -> None:
    assert parse_behaviour(STRAIGHT_SLOW) == ("straight", "slow")
    assert parse_behaviour(LEFT_FAST) == ("slightly left", "very fast")
    assert parse_behaviour("The ego vehicle is steering to the right, and it is driving with normal speed.") == (
        "right",
        "normal",
    )
    assert parse_behaviour("The ego vehicle is going straight. The ego vehicle is not moving.") == (
        "straight",
        "not moving",
    )
    assert parse_behaviour("A car.") == (None, None)
    # Always the majority: F1 of the frequent class 6/7 and of the rare one 0.
    references = [STRAIGHT_SLOW] * 3 + [LEFT_FAST]
    scores = behaviour_scores([STRAIGHT_SLOW] * 4, references)
    assert scores["macro_f1"] == scores["steering_macro_f1"] == pytest.approx(3 / 7)
    assert scores["accuracy"] == 0.75
    with pytest.raises(ValueError, match="must name steering and speed"):
        behaviour_scores(["x"], ["Going straight."])


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("B.", "B"), ("(b)", "B"), ("B. Stopped.", "B"), ("The answer is B", "B"), ("stopped", "B")]
    + [("A car", None), ("", None), ("Parked.", None)],
)
def test_parse_choice(text: str, letter: str | None) -> None:
    assert parse_choice(text, "Status?" + OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: C", "C"),
        ("My answer would be **C**, because it turns.", "C"),
        ("the answer is (c).", "C"),
        ("Answer:\nC", "C"),
        ("Correct option: C. Turn left.", "C"),
        ("I would go with option C", "C"),
        ("`C`", "C"),
        ("C Turn left.", "C"),
        ("The ANSWER IS A.", "A"),
        ("Option A is right.", "A"),
        ("Option A is wrong. The answer is B.", "B"),  # what is called the answer outweighs what is mentioned
        ("The answer is A or B.", None),
        ("A, B and C are all possible.", None),
        ("Option A. Option B.", None),
        ("The answer is a truck.", None),
        ("Answer: A truck stands ahead.", None),
        ("Answer: I cannot see it.", None),
        ("T junction ahead, so it slows down.", None),
        ("The answer is Z.", None),  # not offered
        ("C class cars are ahead.", None),
        ("I choose a truck.", None),
    ],
)
def test_a_choice_is_read_however_it_is_said(text: str, letter: str | None) -> None:
    assert parse_choice(text, "Status?" + OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Answer: No.", "no"),
        ("**Answer:** yes", "yes"),
        ("Based on the images, the answer is yes.", "yes"),
        ("The answer would be: 'No'.", "no"),
        ("My answer is not known.", None),
        ("The answer is yes. No, the answer is no.", None),
        ("I cannot answer. There are no cars.", None),
        ("Nothing of this is an answer.", None),
    ],
)
def test_yes_and_no_are_read_where_they_are_called_the_answer(text: str, said: str | None) -> None:
    assert parse_yes_no(text) == said


@pytest.mark.parametrize(
    ("question", "reference"),
    [
        ("What are objects to the front of the ego car?", "Things of all kinds."),
        ("Predict the behavior of the ego vehicle.", "It waits for a pedestrian."),
        ("Status?" + OPTIONS, "It is parked."),
        ("How many cars are there?", "I cannot see."),
    ],
)
def test_references_that_no_rule_reads_are_compared_as_strings(question: str, reference: str) -> None:
    """A single one of them must not cost the scores of all."""
    assert question_type(question, reference) == "other" and question_type(question, "") != "other"
    scores = score_by_type([question] * 2, [reference] * 2, [reference, "C"])
    assert scores["all"]["accuracy"] == scores["other"]["accuracy"] == 0.5


def test_a_named_answer_counts_as_right() -> None:
    assert answer_correct("Status?" + OPTIONS, "B", "The correct answer is **B**")
    assert not answer_correct("Status?" + OPTIONS, "B", "Answer: C")
    assert answer_correct("Are there cars to the front of the ego car?", "Yes.", "Answer: Yes.")


def test_multiple_choice_and_localisation() -> None:
    scores = multiple_choice_scores(["B", "Turn left.", "?"], ["B", "C", "A"], ["Status?" + OPTIONS] * 3)
    assert scores == {"accuracy": pytest.approx(2 / 3), "unparsed": pytest.approx(1 / 3)}
    assert localisation_scores([TAG, "nothing"], [TAG, TAG])["f1"] == pytest.approx(0.5, abs=1e-6)


def test_answer_correct_ignores_wording_not_meaning() -> None:
    assert answer_correct("Are there cars?", "Yes.", "yes, there are")
    assert not answer_correct("Are there cars?", "Yes.", "No.")
    assert answer_correct("What is the target action?", "Go straight.", " go  straight")
    assert not answer_correct("What is the target action?", "Go straight.", "")
    assert not answer_correct("How many cars are there?", "Zero.", "cars")


texts = st.one_of(st.text(max_size=30), st.sampled_from([reference for _, reference, _ in QUESTIONS]))


@given(st.lists(texts, min_size=len(QUESTIONS), max_size=len(QUESTIONS)), st.permutations(range(len(QUESTIONS))))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_bounds_and_order(predictions: list[str], order: list[int]) -> None:
    questions, references = [q for q, _, _ in QUESTIONS], [r for _, r, _ in QUESTIONS]
    scores = score_by_type(questions, references, predictions)
    again = score_by_type(*([column[i] for i in order] for column in (questions, references, predictions)))
    for kind, part in scores.items():
        assert again[kind] == pytest.approx(part)
        for name, value in part.items():
            assert value >= 0
            assert name in ("answers", "mean_absolute_error") or value <= 1


def test_unequal_lists_are_errors() -> None:
    with pytest.raises(ValueError, match="got 1 predictions and 2 references"):
        yes_no_scores(["Yes."], ["Yes.", "No."])
    with pytest.raises(ValueError, match="at least one"):
        score_by_type([], [], [])
