"""What figures are called: the one table that the report, the model card and the README's tables read.

A figure goes by its place in a control's scores, such as "coco.bleu_4"; `*` stands for a category, a type of question
or a camera. A new metric of wording is a function in `training.metrics` and an entry of `METRICS`: it is computed,
written into metrics.json, and shown in every table. A figure that stands in no table here is an error.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.evaluation.controls import Control
from training.evaluation.results import FigureWords, Words
from training.metrics.language import coco_scores, exact_match, sacrebleu_score, seed_bleu

KINDS = {"yes_no": "yes/no"}  # types of questions whose name with blanks is not how one writes it


@dataclass(frozen=True)
class Figure:
    """A figure that tables show, the higher the better; `{}` stands for the word under `*`."""

    title: str
    interval: str | None = None  # its name among the intervals, where it has one


@dataclass(frozen=True)
class Metric:
    """A score of the wording of answers: (answers, references) → its figures by name, or one number."""

    score: Callable[[Sequence[str], Sequence[str]], Mapping[str, Any] | float]
    titles: Mapping[str, str | None]  # of its figures, "" for one number; None keeps a figure out of short tables


METRICS = {
    "exact_match": Metric(exact_match, {"": "exact match"}),
    "coco": Metric(
        coco_scores,
        {
            "bleu_1": "BLEU-1 (COCO)",
            "bleu_2": None,
            "bleu_3": None,
            "bleu_4": "BLEU-4 (COCO)",
            "rouge_l": "ROUGE-L (COCO)",
            "cider": "CIDEr (COCO)",
        },
    ),
    "sacrebleu": Metric(sacrebleu_score, {"score": "BLEU (sacrebleu)"}),
    "seed_bleu": Metric(seed_bleu, {"bleu": "BLEU (seed's)", "brevity_penalty": None, "precisions": None}),
}

SHARES = {
    "accuracy": Figure("accuracy", "accuracy"),
    "by_category.*.accuracy": Figure("accuracy, {} category", "{}"),
    "by_type.*.accuracy": Figure("accuracy, {} questions", "type:{}"),
    "by_type.yes_no.balanced_accuracy": Figure("balanced accuracy, yes/no", "yes_no_balanced_accuracy"),
}
ELSEWHERE = {  # scores that need more than answers and references
    "bert_score.f1": Figure("BERTScore F1"),
    "drivelm.final": Figure("DriveLM final without judge"),
}
DETAILS = frozenset(
    """
    answers errors visual_tokens_per_scene changed_from_sighted by_category.*.answers by_type.*.answers
    by_type.*.unparsed by_type.yes_no.yes_rate by_type.yes_no.reference_yes_rate by_type.count.exact
    by_type.count.mean_absolute_error by_type.behaviour.macro_f1 by_type.behaviour.steering_macro_f1
    by_type.behaviour.speed_macro_f1 by_type.localisation.f1 bert_score.precision bert_score.recall
    bert_score.num_layers drivelm.accuracy drivelm.match_f1 drivelm.match drivelm.bleu_1 drivelm.bleu_2 drivelm.bleu_3
    drivelm.bleu_4 drivelm.rouge_l drivelm.cider drivelm.language drivelm.judge drivelm.counts.* named_camera.answers
    named_camera.accuracy other_cameras.answers other_cameras.accuracy hallucination.*.answers
    hallucination.*.yes_rate hallucination.*.unparsed
    """.split()
)
"""Figures that stand in tables of their own, or only among all of them at the end of the report."""


def known_figures() -> dict[str, Figure | None]:
    """Every figure there is, in the order of tables; None for those that these do not show."""
    measured = {
        f"{name}.{part}".rstrip("."): Figure(title) if title else None
        for name, metric in METRICS.items()
        for part, title in metric.titles.items()
    }
    return {**SHARES, **measured, **ELSEWHERE, **dict.fromkeys(DETAILS)}


def words(name: str) -> str:
    """A type or category as readers write it."""
    return KINDS.get(name, name.replace("_", " "))


def title_of(name: str) -> str:
    """What readers call a figure, such as "coco.bleu_4".

    Raises:
        ValueError: tables do not show a figure of that name.
    """
    figure = known_figures().get(name)
    if figure is None:
        raise ValueError(f"unknown figure {name!r}; training/evaluation/figures.py gives figures their titles")
    return figure.title


def figures_of(scores: Mapping[str, Any]) -> list[FigureWords]:
    """The figures in a control's scores that tables show, in the tables' order.

    Raises:
        ValueError: the scores hold a number that no table here knows.
    """
    known = known_figures()
    found: dict[str, list[FigureWords]] = {name: [] for name in known}
    for place in _numbers(scores, ()):
        name, word = _known(place, known)
        figure = known[name]
        if figure is not None:
            title = figure.title.format(words(word))
            interval = figure.interval and figure.interval.format(word)
            found[name].append({"title": title, "place": list(place), "interval": interval})
    return [shown for name in found for shown in found[name]]


def value_at(scores: Mapping[str, Any], place: Sequence[str]) -> Any:
    """A figure of a control, or None where it was not measured."""
    value: Any = scores
    for name in place:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def words_of(results: Mapping[str, Mapping[str, Any]]) -> Words:
    """The words of metrics.json, from its results by control.

    Raises:
        ValueError: a figure or control that no table knows.
    """
    for scores in results.values():
        figures_of(scores)
    keys = ("title", "group", "corruption", "severity", "budget")
    controls = {name: {key: getattr(Control.parse(name), key) for key in keys} for name in results}
    return {"figures": figures_of(results["sighted"]), "controls": controls}  # type: ignore[typeddict-item]


def _numbers(scores: Any, place: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(scores, Mapping):
        for name, value in scores.items():
            yield from _numbers(value, (*place, name))
    elif isinstance(scores, int | float) or (isinstance(scores, list) and scores):
        yield place


def _known(place: tuple[str, ...], known: Mapping[str, Any]) -> tuple[str, str]:
    """The name under which a place is known, and the word that stands for its `*`."""
    if ".".join(place) in known:
        return ".".join(place), ""
    for star in range(1, len(place)):
        name = ".".join((*place[:star], "*", *place[star + 1 :]))
        if name in known:
            return name, place[star]
    raise ValueError(
        f"the figure {'.'.join(place)} has no title: name it in training/evaluation/figures.py, in METRICS or DETAILS"
    )
