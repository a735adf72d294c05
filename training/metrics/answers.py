"""Scores by kind of question: yes/no, counts, status, behaviour, multiple choice, localisation.

Answers are read by rule, so that "Yes.", "yes, there are" and "Yes" are one answer; an answer that cannot be read is
wrong and counted as `unparsed`. The wordings are those of DriveLM-nuScenes v1.1 and of `training.data.wording`.

All scores take predictions and references of one length and raise a ValueError for other lengths and for none.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import f1_score, recall_score

from training.data.wording import STATUSES, plural
from training.metrics.drivelm import match_f1, points
from training.metrics.language import check_pairs

QUESTION_TYPES = ("multiple_choice", "yes_no", "behaviour", "status", "count", "localisation", "other")

MANY = 4
"""What "many" counts as. DriveLM counts one, two, three, many: numbers above are cut down to it."""

_TAG = re.compile(r"<[^<>]*>")  # an object tag: its number is no count
_OPTIONS = re.compile(r"\b([A-Z])\.\s+(.*?)(?=\s+[A-Z]\.\s|$)", re.DOTALL)
_OPTIONS_START = "following options:"
_AUXILIARY = re.compile(
    r"\W*(?:is|are|was|were|do|does|did|can|could|will|would|should|has|have|may|might|must)\b", re.IGNORECASE
)

_AROUND = "*_`\"'()[]{}"  # marks around a letter: bold, code, quotes, brackets
_LED = r"\s*(?:(?:is|was|would be|should be)\b)?\W*"  # between "answer" and what is answered
_YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
_ANSWERS_YES_NO = re.compile(rf"\banswer{_LED}(yes|no)\b", re.IGNORECASE)
_LETTER_IN_FRONT = re.compile(r"\A\W*([A-Za-z])\b")
_LETTER_ANSWERED = re.compile(rf"\b(?i:answer{_LED}(?:(?:option|choice)\W+)?)([A-Za-z])\b")
_LETTER_NAMED = re.compile(
    rf"\b(?i:(?:option|choice){_LED}|(?:choose|chose|select|pick|go with)\W+(?:(?:option|choice)\W+)?)([A-Za-z])\b"
)
_END_OF_LETTER = re.compile(rf"\W*\Z|[{re.escape(_AROUND)}]*\s*[.):,;\n]|\s+(?:is|because|since|as)\b")
_OR_ANOTHER = re.compile(r"\W*(?:or|and|nor)\W+(?:(?:option|choice)\W+)?[A-Z]\b|\s*[,/&]\s*[A-Z]\b(?!\w)")

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: number for number, word in enumerate(_NUMBER_WORDS)} | {"no": 0, "none": 0, "a": 1, "an": 1}
_NUMBERS |= dict.fromkeys(("many", "several", "multiple", "numerous"), MANY)
_NUMBER = rf"\d+|{'|'.join(sorted(_NUMBERS, key=len, reverse=True))}"
_GENERAL_NAMES = ("obstacle", "object", "vehicle", "traffic element", "traffic sign")
_NAMES = {form: name for name in (*STATUSES, *_GENERAL_NAMES) for form in (name, plural(name))}
_COUNTED_NAME = re.compile(
    rf"\b({_NUMBER})\s+(?:of\s+the\s+)?(?:[\w-]+\s+){{0,2}}?({'|'.join(sorted(_NAMES, key=len, reverse=True))})\b",
    re.IGNORECASE,
)
_BARE_NUMBER = re.compile(rf"\b({_NUMBER})\b", re.IGNORECASE)

_STATUS_WORDS = {  # first match at a place wins, so the longer form comes first
    r"(?:not|n't) moving": "not moving",
    r"moving": "moving",
    r"parked": "parked",
    r"stopped": "stopped",
    r"stationary": "stationary",
    r"standing": "standing",
    r"without (?:a )?riders?": "without rider",
    r"with (?:a )?riders?": "with rider",
    r"(?:going|go|goes) (?:ahead|straight)": "going ahead",
    r"turn(?:s|ing)? left": "turn left",
    r"turn(?:s|ing)? right": "turn right",
    r"back(?:s|ing)? up": "back up",
    r"reverse parking": "reverse parking",
    r"driv(?:e|es|ing) backwards?": "drive backward",
    r"(?:(?<=is )|(?<=are )|^)red": "red",
    r"(?:(?<=is )|(?<=are )|^)green": "green",
    r"(?:(?<=is )|(?<=are )|^)yellow": "yellow",
}
_STATUS = re.compile("|".join(rf"(?P<s{i}>\b(?:{word})\b)" for i, word in enumerate(_STATUS_WORDS)))
_STATUS_NAMES = list(_STATUS_WORDS.values())

_STEERING = re.compile(
    r"(?P<straight>going straight)|(?P<slightly>slightly )?(?:steer|turn)(?:ing|s)?(?P<slightly_too> slightly)?"
    r" (?:to the )?(?P<side>left|right)"
)
_SPEEDS = (  # the first that occurs
    ("not moving", re.compile(r"\bnot moving|\bstationary|\bstopped")),
    ("very fast", re.compile(r"\bvery fast")),
    ("fast", re.compile(r"\bfast")),
    ("normal", re.compile(r"\bnormal speed")),
    ("slow", re.compile(r"\bslow(?:ly)?\b")),
)


def question_type(question: str, answer: str) -> str:
    """What kind of answer a question asks for, judged from the question and its reference answer.

    Args:
        question: may hold object tags.
        answer: the reference answer, not a prediction: two models must be scored on the same questions.

    Returns:
        One of `QUESTION_TYPES`. "localisation" is an answer with points that the question does not hold; "other" too
        what is asked for a choice, behaviour or number and answered by something else, which has no score of its own.
    """
    kind = _asked_for(question, answer)
    readable = {
        "multiple_choice": lambda: parse_choice(answer, question) is not None,
        "behaviour": lambda: None not in parse_behaviour(answer),
        "count": lambda: bool(parse_counts(answer)),
    }
    return kind if not answer or kind not in readable or readable[kind]() else "other"


def _asked_for(question: str, answer: str) -> str:
    lower = question.lower()
    if _OPTIONS_START in lower or re.fullmatch(r"\s*[A-Z]\.?\s*", answer):
        return "multiple_choice"
    verdict = parse_yes_no(answer)
    if re.fullmatch(r"\W*(?:yes|no)\W*", answer, re.IGNORECASE) or (verdict and _AUXILIARY.match(question)):
        return "yes_no"
    if re.search(r"behaviou?r of the ego", lower):
        return "behaviour"
    if re.search(r"\bstatus of\b", lower):
        return "status"
    if re.search(r"\bhow many\b|\bwhat are (?:the )?objects (?:to|in|behind)\b|\bnumber of\b", lower):
        return "count"
    if set(points(answer)) - set(points(question)):
        return "localisation"
    return "other"


def parse_yes_no(text: str) -> str | None:
    """`"yes"` or `"no"` if the text begins with it or names it as its answer ("The answer is no."), else None."""
    match = _YES_NO.match(text)
    found = [match] if match else list(_ANSWERS_YES_NO.finditer(text))
    said = {one[1].lower() for one in found}
    return said.pop() if len(said) == 1 else None


def parse_choice(text: str, question: str = "") -> str | None:
    """The letter that a multiple-choice answer chooses.

    Reads a letter in front ("B", "(b)", "**B**: Stopped.", "B Stopped."), one that the text names ("Answer: B", "The
    correct option is (B)", "I choose B") and, with the question, the wording of exactly one of its options. Where two
    letters are named alike, none is chosen; neither is one that the question does not offer.
    """
    _, found, listed = question.partition(_OPTIONS_START)
    options = {letter: _plain(option) for letter, option in _OPTIONS.findall(listed if found else "")}
    text = text.strip()
    for letters in (_LETTER_IN_FRONT, _LETTER_ANSWERED, _LETTER_NAMED):
        said = {match[1].upper() for match in letters.finditer(text) if _is_choice(match, options)}
        if said:
            return said.pop() if len(said) == 1 else None
    same = [letter for letter, option in options.items() if option == _plain(text)]
    return same[0] if len(same) == 1 else None


def _is_choice(match: re.Match[str], options: Mapping[str, str]) -> bool:
    """Whether a letter stands for an option, and not for the article, the pronoun or one of several."""
    letter, rest = match[1], match.string[match.end() :]
    if options and letter.upper() not in options or _OR_ANOTHER.match(rest):
        return False
    if _END_OF_LETTER.match(rest):
        return True
    if letter not in options and letter.islower():
        return False
    wording, said = options.get(letter, ""), _plain(rest.lstrip(_AROUND + " "))
    if wording and said.startswith(wording):
        return True
    if letter in ("A", "I"):
        return False
    return match.re is not _LETTER_IN_FRONT or wording.startswith(said)  # part of the option, or nothing like it


def parse_counts(text: str) -> dict[str, int]:
    """Number by class word (singular), or `{"": number}` for a bare number; empty if there is none.

    "many" and all numbers above count `MANY`. "There are no cars" is `{"car": 0}`.
    """
    text = _TAG.sub(" ", text)
    counts: dict[str, int] = {}
    for number, name in _COUNTED_NAME.findall(text):
        name = _NAMES[name.lower()]
        counts[name] = min(MANY, counts.get(name, 0) + _value(number))
    if counts:
        return counts
    bare = _BARE_NUMBER.search(text)
    return {"": min(MANY, _value(bare[1]))} if bare else {}


def parse_status(text: str) -> frozenset[str]:
    """The states that an answer names, e.g. {"moving", "parked"}; empty if none is known."""
    found = _STATUS.finditer(_plain(_TAG.sub(" ", text)))
    return frozenset(_STATUS_NAMES[int(str(match.lastgroup)[1:])] for match in found)


def parse_behaviour(text: str) -> tuple[str | None, str | None]:
    """(steering, speed) of an answer to "Predict the behavior of the ego vehicle.", None for what it does not say.

    Steering: "straight", "left", "right", "slightly left", "slightly right". Speed: "not moving", "slow", "normal",
    "fast", "very fast".
    """
    text = text.lower()
    match = _STEERING.search(text)
    steering = None
    if match:
        slightly = "slightly " if match["slightly"] or match["slightly_too"] else ""
        steering = "straight" if match["straight"] else slightly + match["side"]
    return steering, next((speed for speed, pattern in _SPEEDS if pattern.search(text)), None)


def answer_correct(question: str, reference: str, prediction: str) -> bool:
    """Whether an answer says what the reference says, by the rules of the question's type.

    Counts must all agree, states must be the same set, behaviour must agree in steering and speed. Everything else
    must be the same string but for case, spaces and the full stop.
    """
    kind = question_type(question, reference)
    if kind == "multiple_choice":
        return _same(parse_choice(reference, question), parse_choice(prediction, question))
    if kind == "yes_no":
        return _same(parse_yes_no(reference), parse_yes_no(prediction))
    if kind == "behaviour" and None not in parse_behaviour(reference):
        return parse_behaviour(reference) == parse_behaviour(prediction)
    if kind == "status" and parse_status(reference):
        return parse_status(reference) == parse_status(prediction)
    if kind == "count" and parse_counts(reference):
        return bool(parse_counts(prediction)) and _count_error(parse_counts(reference), parse_counts(prediction)) == 0
    return _plain(reference) == _plain(prediction)


def yes_no_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Yes/no questions.

    Returns:
        - balanced_accuracy: mean of the recalls of yes and no (of the one that occurs); 0.5 for a constant answer;
        - accuracy; yes_rate, reference_yes_rate: share of "yes"; unparsed: share of answers that say neither.

    Raises:
        ValueError: a reference says neither yes nor no.
    """
    check_pairs(predictions, references)
    truth = [parse_yes_no(reference) or "neither" for reference in references]
    if "neither" in truth:
        raise ValueError(f"a yes/no reference must begin with yes or no, got {references[truth.index('neither')]!r}")
    said = [parse_yes_no(prediction) or "neither" for prediction in predictions]
    recall = recall_score(truth, said, labels=sorted(set(truth)), average="macro", zero_division=0)
    return {
        "balanced_accuracy": float(recall),
        "accuracy": float(np.mean([a == b for a, b in zip(truth, said, strict=True)])),
        "yes_rate": float(np.mean([answer == "yes" for answer in said])),
        "reference_yes_rate": float(np.mean([answer == "yes" for answer in truth])),
        "unparsed": float(np.mean([answer == "neither" for answer in said])),
    }


def count_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Counting questions, "How many ..." as well as "What are objects to ...".

    Numbers are compared class by class over the classes that either side names; a bare number is compared with the
    other side's total. An answer without any number errs by the reference's numbers, at least by 1.

    Returns:
        - exact: share of answers in which every number is right;
        - mean_absolute_error: per class, then over answers; "many" is `MANY`;
        - unparsed: share of answers without a number.

    Raises:
        ValueError: a reference holds no number.
    """
    check_pairs(predictions, references)
    truth = [parse_counts(reference) for reference in references]
    if {} in truth:
        raise ValueError(f"a counting reference must hold a number, got {references[truth.index({})]!r}")
    said = [parse_counts(prediction) for prediction in predictions]
    errors = np.array([_count_error(a, b) for a, b in zip(truth, said, strict=True)])
    return {
        "exact": float(np.mean(errors == 0)),
        "mean_absolute_error": float(errors.mean()),
        "unparsed": float(np.mean([not counts for counts in said])),
    }


def status_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Status questions.

    Returns:
        - accuracy: share of answers that name exactly the reference's states ("Two cars are moving, and one is
          parked." names {moving, parked}); references without a known state are compared as strings;
        - unparsed: share of answers without a known state.
    """
    check_pairs(predictions, references)
    question = "What is the status of"
    right = [answer_correct(question, r, p) for p, r in zip(predictions, references, strict=True)]
    return {
        "accuracy": float(np.mean(right)),
        "unparsed": float(np.mean([not parse_status(prediction) for prediction in predictions])),
    }


def behaviour_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ "Predict the behavior of the ego vehicle."

    Returns:
        macro_f1 over the (steering, speed) pairs, steering_macro_f1, speed_macro_f1, each over the classes that occur
        in the references, all weighted alike; accuracy of the pair; unparsed: share of answers that lack a part.

    Raises:
        ValueError: a reference lacks steering or speed.
    """
    check_pairs(predictions, references)
    truth = [parse_behaviour(reference) for reference in references]
    for pair, reference in zip(truth, references, strict=True):
        if None in pair:
            raise ValueError(f"a behaviour reference must name steering and speed, got {reference!r}")
    said = [parse_behaviour(prediction) for prediction in predictions]
    return {
        "macro_f1": _macro_f1(truth, said),
        "steering_macro_f1": _macro_f1([steering for steering, _ in truth], [steering for steering, _ in said]),
        "speed_macro_f1": _macro_f1([speed for _, speed in truth], [speed for _, speed in said]),
        "accuracy": float(np.mean([a == b for a, b in zip(truth, said, strict=True)])),
        "unparsed": float(np.mean([None in pair for pair in said])),
    }


def multiple_choice_scores(
    predictions: Sequence[str], references: Sequence[str], questions: Sequence[str]
) -> dict[str, float]:
    """Multiple choice.

    Returns:
        accuracy of the letter (an option's own wording is accepted for it), unparsed.
    """
    check_pairs(predictions, references)
    said = [parse_choice(prediction, question) for prediction, question in zip(predictions, questions, strict=True)]
    truth = [parse_choice(reference, question) for reference, question in zip(references, questions, strict=True)]
    return {
        "accuracy": float(np.mean([_same(a, b) for a, b in zip(truth, said, strict=True)])),
        "unparsed": float(np.mean([letter is None for letter in said])),
    }


def localisation_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 of the points in the answers (see `training.metrics.drivelm.match_f1`) over *all* pairs.

    Unlike the challenge's match score, whose graph gate drops questions depending on the model's own answers, the
    denominator is the same for every model.
    """
    check_pairs(predictions, references)
    return {"f1": float(np.mean([match_f1(p, r) for p, r in zip(predictions, references, strict=True)]))}


def score_by_type(
    questions: Sequence[str], references: Sequence[str], predictions: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Every answer under its question type.

    Returns:
        For "all" and for each type that occurs: `answers` (how many), `accuracy` (`answer_correct`) and the scores of
        that type. "other" and "localisation" answers are long: their exact accuracy says little.
    """
    check_pairs(predictions, references)
    rows = list(zip(questions, references, predictions, strict=True))
    right = np.array([answer_correct(*row) for row in rows])
    kinds = np.array([question_type(question, reference) for question, reference, _ in rows])
    scores: dict[str, dict[str, Any]] = {"all": {"answers": len(rows), "accuracy": float(right.mean())}}
    specific: Mapping[str, Callable[..., dict[str, float]]] = {
        "yes_no": yes_no_scores,
        "count": count_scores,
        "status": status_scores,
        "behaviour": behaviour_scores,
        "localisation": localisation_scores,
    }
    for kind in QUESTION_TYPES:
        chosen = np.flatnonzero(kinds == kind)
        if not chosen.size:
            continue
        scores[kind] = {"answers": len(chosen), "accuracy": float(right[chosen].mean())}
        answered, expected = [predictions[i] for i in chosen], [references[i] for i in chosen]
        if kind == "multiple_choice":
            scores[kind] |= multiple_choice_scores(answered, expected, [questions[i] for i in chosen])
        elif kind in specific:
            scores[kind] |= specific[kind](answered, expected)
    return scores


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip().lower()


def _same(reference: str | None, prediction: str | None) -> bool:
    return reference is not None and reference == prediction


def _value(number: str) -> int:
    return int(number) if number.isdigit() else _NUMBERS[number.lower()]


def _count_error(truth: Mapping[str, int], said: Mapping[str, int]) -> float:
    """Mean absolute error over the classes of either side; see `count_scores`."""
    if not said:
        return max(1.0, float(np.mean(list(truth.values()))))
    if "" in truth or "" in said:
        return float(abs(min(MANY, sum(truth.values())) - min(MANY, sum(said.values()))))
    names = sorted(truth.keys() | said.keys())
    return float(np.mean([abs(truth.get(name, 0) - said.get(name, 0)) for name in names]))


def _macro_f1(truth: Sequence[Any], said: Sequence[Any]) -> float:
    true, given = list(map(str, truth)), list(map(str, said))
    return float(f1_score(true, given, labels=sorted(set(true)), average="macro", zero_division=0))
