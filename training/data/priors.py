"""What a model that never looks can know: how far constant answers and answers per question template get.

A template is a question without what differs between scenes: object tags, class words, sector words, numbers and the
options of a multiple choice. `answer_priors` belongs beside every data set, and the majority answers per template are
the weakest control of an evaluation: a model that does not beat them has learned the questionnaire, not the road.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from training.data.drivelm import NORMALISED_TAG, PIXEL_TAG
from training.data.rig import SECTOR_WORDS
from training.data.wording import STATUSES, plural


def _any_of(words: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))  # "front left" before "front"


_CLEAR_SECTORS = [words for words in SECTOR_WORDS if words not in ("left", "right")]  # "turns left" is no sector
_CLASS_WORDS = [word for name in STATUSES for word in (plural(name), name)]
_TAG = re.compile(f"{PIXEL_TAG.pattern}|{NORMALISED_TAG.pattern}")
_REPLACEMENTS = (
    (re.compile(r"(?<=following options:).*", re.DOTALL), " <options>"),
    (_TAG, "<object>"),
    (re.compile(rf"(?<!ego )\b(?:{_any_of(_CLASS_WORDS)})\b"), "<class>"),
    (re.compile(rf"\b(?:{_any_of(_CLEAR_SECTORS)})\b|(?<=to the )(?:left|right)(?= of )"), "<sector>"),
    (re.compile(r"(?<![A-Za-z0-9])\d+(?:\.\d+)?"), "<number>"),
)


def template_of(question: str) -> str:
    """The question with what differs between scenes replaced by placeholders.

    >>> template_of("Are there moving cars to the back left of the ego car?")
    'Are there moving <class> to the <sector> of the ego car?'
    """
    for pattern, placeholder in _REPLACEMENTS:
        question = pattern.sub(placeholder, question)
    return question


def answer_priors(questions: Iterable[Mapping[str, Any]], examples: int = 10) -> dict[str, dict[str, Any]]:
    """Measure what the answers give away without a look at the images.

    Args:
        questions: rows with `category`, `question` and `answer`, for example `Rows`.
        examples: how many of the most frequent templates to list.

    Returns:
        A dict for "overall" and for each category that occurs, each with

        - questions, distinct_answers, templates: counts;
        - yes, no: share of answers that begin with that word;
        - best_constant: the most frequent answer and its accuracy (exact match);
        - best_per_template: accuracy of the most frequent answer of each template on the same questions: an upper
          bound for any model that sees the template only, inflated by templates that occur once;
        - best_per_template_others: the same where each question's majority is taken over the *other* questions of its
          template (ties count as wrong): a lower bound, without that inflation;
        - best_per_wording, best_per_wording_others: both again with the question's own words as its template, only
          object tags replaced, so that class and sector may give the answer away as well;
        - top_templates: the most frequent templates with their count, best answer and its accuracy.

    Raises:
        ValueError: there are no questions.
    """
    groups: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for row in questions:
        triple = (template_of(row["question"]), _TAG.sub("<object>", row["question"]), row["answer"])
        groups["overall"].append(triple)
        groups[row["category"]].append(triple)
    if not groups:
        raise ValueError("answer_priors needs at least one question, got none")
    return {name: _priors(triples, examples) for name, triples in groups.items()}


def majority_answers(questions: Iterable[Mapping[str, Any]]) -> tuple[dict[str, str], str]:
    """The most frequent answer of each template, and the most frequent one of all for templates not seen.

    Ties go to the alphabetically first answer, so the result does not depend on the order of the rows.

    Args:
        questions: rows with `question` and `answer`; use the train split to answer another one.

    Returns:
        (template -> answer, answer for any other template).

    Raises:
        ValueError: there are no questions.
    """
    by_template, constant = _count((template_of(row["question"]), row["answer"]) for row in questions)
    if not constant:
        raise ValueError("majority_answers needs at least one question, got none")
    answers = {template: _most_frequent(counts)[0] for template, counts in by_template.items()}
    return answers, _most_frequent(constant)[0]


def _count(pairs: Iterable[tuple[str, str]]) -> tuple[dict[str, Counter[str]], Counter[str]]:
    by_template: dict[str, Counter[str]] = defaultdict(Counter)
    constant: Counter[str] = Counter()
    for template, answer in pairs:
        by_template[template][answer] += 1
        constant[answer] += 1
    return by_template, constant


def _most_frequent(answers: Counter[str]) -> tuple[str, int]:
    return min(answers.items(), key=lambda item: (-item[1], item[0]))


def _right_from_others(answers: Counter[str]) -> int:
    """How many answers are the strict majority among the others of their template: only the top one can be."""
    (_, first), *rest = answers.most_common(2)
    second = rest[0][1] if rest else 0
    return first if first - 1 > second else 0


def _priors(triples: Sequence[tuple[str, str, str]], examples: int) -> dict[str, Any]:
    by_template, answers = _count((template, answer) for template, _, answer in triples)
    by_wording, _ = _count((wording, answer) for _, wording, answer in triples)
    constant, hits = _most_frequent(answers)
    total = len(triples)
    first_words = Counter(re.split(r"\W", answer.lower(), maxsplit=1)[0] for *_, answer in triples)
    largest = sorted(by_template, key=lambda template: (-by_template[template].total(), template))[:examples]
    return {
        "questions": total,
        "distinct_answers": len(answers),
        "templates": len(by_template),
        "yes": first_words["yes"] / total,
        "no": first_words["no"] / total,
        "best_constant": {"answer": constant, "accuracy": hits / total},
        "best_per_template": sum(_most_frequent(counts)[1] for counts in by_template.values()) / total,
        "best_per_template_others": sum(map(_right_from_others, by_template.values())) / total,
        "best_per_wording": sum(_most_frequent(counts)[1] for counts in by_wording.values()) / total,
        "best_per_wording_others": sum(map(_right_from_others, by_wording.values())) / total,
        "top_templates": [
            {
                "template": template,
                "questions": by_template[template].total(),
                "answer": _most_frequent(by_template[template])[0],
                "accuracy": _most_frequent(by_template[template])[1] / by_template[template].total(),
            }
            for template in largest
        ],
    }
