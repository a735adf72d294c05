import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.priors import answer_priors, majority_answers, template_of


def rows(*pairs: tuple[str, str], category: str = "perception") -> list[dict[str, str]]:
    return [{"category": category, "question": question, "answer": answer} for question, answer in pairs]


SECTOR_QUESTION = "Are there {} to the {} of the ego car?"


@pytest.mark.parametrize(
    ("question", "template"),
    [
        (SECTOR_QUESTION.format("cars", "back left"), SECTOR_QUESTION.format("<class>", "<sector>")),
        (SECTOR_QUESTION.format("construction vehicles", "front"), SECTOR_QUESTION.format("<class>", "<sector>")),
        (SECTOR_QUESTION.format("moving cars", "back"), SECTOR_QUESTION.format("moving <class>", "<sector>")),
        ("Is <c1,CAM_BACK,1088.3,497.5> a sign or a road barrier?", "Is <object> a sign or a road <class>?"),
        ("Is <c1,CAM_BACK,0.680,0.553> moving?", "Is <object> moving?"),
        ("Are there buses 20 m or 3.5 m away?", "Are there <class> <number> m or <number> m away?"),
        ("x1? Pick from the following options: A. Go. B. Back.", "x1? Pick from the following options: <options>"),
        ("Is the carriage at the backdoor?", "Is the carriage at the backdoor?"),
    ],
)
def test_template(question, template):
    assert template_of(question) == template
    assert template_of(template) == template


def test_priors():
    there = [("Are there cars?", "Yes."), ("Are there trucks?", "Yes."), ("Are there buses?", "No.")]
    questions = rows(*there, ("What is it?", "Yesterday")) + rows(("Go?", "No."), category="planning")
    priors = answer_priors(questions, examples=1)
    assert set(priors) == {"overall", "perception", "planning"}
    overall = priors["overall"]
    assert (overall["questions"], overall["distinct_answers"], overall["templates"]) == (5, 3, 3)
    assert (overall["yes"], overall["no"]) == (2 / 5, 2 / 5)
    assert overall["best_constant"] == {"answer": "No.", "accuracy": 2 / 5}  # a tie: alphabetically first
    assert (overall["best_per_template"], overall["best_per_template_others"]) == (4 / 5, 0)  # 2 - 1 others tie with 1
    assert (overall["best_per_wording"], overall["best_per_wording_others"]) == (1, 0)
    assert overall["top_templates"] == [
        {"template": "Are there <class>?", "questions": 3, "answer": "Yes.", "accuracy": 2 / 3}
    ]
    assert answer_priors(rows(*[("Go?", "No.")] * 3, ("Go?", "Yes.")))["overall"]["best_per_template_others"] == 3 / 4


def test_majority_answers():
    answers, constant = majority_answers(
        rows(("Are there cars?", "No."), ("Are there buses?", "No."), ("Go?", "Yes."))
    )
    assert (answers, constant) == ({"Are there <class>?": "No.", "Go?": "Yes."}, "No.")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), min_size=1), st.randoms())
def test_order_does_not_matter_and_bounds_hold(pairs, random):
    shuffled = random.sample(pairs, len(pairs))
    assert answer_priors(rows(*pairs)) == answer_priors(rows(*shuffled))
    overall = answer_priors(rows(*pairs))["overall"]
    assert overall["best_per_template_others"] <= overall["best_per_template"] <= 1
    assert overall["best_constant"]["accuracy"] <= overall["best_per_template"] <= overall["best_per_wording"]
    answers, _ = majority_answers(rows(*pairs))
    assert sum(answers[q] == a for q, a in pairs) / len(pairs) == pytest.approx(overall["best_per_template"])


def test_nothing_to_count():
    for function in (answer_priors, majority_answers):
        with pytest.raises(ValueError, match="at least one question"):
            function([])
