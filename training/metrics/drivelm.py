"""The DriveLM challenge's scores: accuracy, match, language, the graph gate and the final score.

The rules are those of the challenge's evaluation (Sima et al., "DriveLM: Driving with Graph Visual Question
Answering", 2023; the public challenge code), written anew:

- A question's `tag` says where its answer counts: 0 accuracy (the same string), 1 judge, 2 language, 3 match and
  judge.
- Points are the decimal numbers of a text in their order, two by two; an odd one at the end of an answer is ignored.
  Each answered point takes the nearest reference point still free, if it is nearer than 16 px (L1).
- The graph gate: the reference points that the answer to a frame's first question found are the frame's graph. Later
  questions count only if every point of their *question* is in it, so denominators depend on the answers.
- language = mean(BLEU-1..4)/3 + ROUGE_L/3 + CIDEr/30, match = (100 F1 + judge)/2,
  final = 0.4 judge/100 + 0.2 language + 0.2 match/100 + 0.2 accuracy.

Where this differs from the challenge's script, on input that makes the script fail: see `score_drivelm`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.data.drivelm import CATEGORIES
from training.metrics.language import Tokenizer, coco_scores

PARTS = ("accuracy", "judge", "language", "match")
"""What the tags 0 to 3 stand for."""

MATCH_DISTANCE = 16.0
"""Pixels (|dx| + |dy|) in a 1600x900 image below which two points are the same object."""

_EPSILON = 1e-8
_DECIMAL = re.compile(r"\d+\.\d+")

Point = tuple[float, float]
Counted = tuple[str, str, str]  # id, answer, reference


@dataclass(frozen=True)
class ReferenceQuestion:
    """One question of the references; `first` in its frame, `id` is `{scene}_{frame}_{number}`."""

    id: str
    first: bool
    question: str
    answer: str
    tag: frozenset[int]


def points(text: str) -> list[Point]:
    """The decimal numbers of a text, two by two in their order; an odd last one is left out."""
    numbers = [float(number) for number in _DECIMAL.findall(text)]
    return list(zip(numbers[::2], numbers[1::2], strict=False))


def match_points(answer: Sequence[Point], reference: Sequence[Point]) -> list[Point]:
    """The reference points that the answered points find: greedy, in the answer's order, each at most once."""
    free = list(reference)
    found = []
    for x, y in answer:
        distances = [abs(x - free_x) + abs(y - free_y) for free_x, free_y in free]
        if distances and min(distances) < MATCH_DISTANCE:
            found.append(free.pop(distances.index(min(distances))))
    return found


def match_f1(answer: str, reference: str) -> float:
    """F1 in [0, 1] of the points in an answer against those in its reference; 0 where one of them has none."""
    answered, expected = points(answer), points(reference)
    hits = len(match_points(answered, expected))
    precision = hits / (len(answered) + _EPSILON)
    recall = hits / (len(expected) + _EPSILON)
    return 2 * precision * recall / (precision + recall + _EPSILON)


def language_score(scores: Mapping[str, float]) -> float:
    """The challenge's language score of `coco_scores`; CIDEr can carry it above 1."""
    bleu = sum(scores[f"bleu_{order}"] for order in range(1, 5))
    return bleu / 12 + scores["rouge_l"] / 3 + scores["cider"] / 30


def index_predictions(predictions: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Answer by id of a prediction file (`[{"id": ..., "answer": ...}, ...]`).

    Raises:
        ValueError: an entry lacks its id or answer, an answer is not text, or one id has two different answers (the
            challenge's script silently takes the last).
    """
    answers: dict[str, str] = {}
    for position, entry in enumerate(predictions):
        if not isinstance(entry, Mapping) or not {"id", "answer"} <= entry.keys():
            raise ValueError(f'prediction {position} must be an object with "id" and "answer", got {entry!r:.200}')
        identifier, answer = entry["id"], entry["answer"]
        if not isinstance(identifier, str) or not isinstance(answer, str):
            raise ValueError(f"prediction {position}: id and answer must be strings, got {identifier!r}: {answer!r}")
        if answers.setdefault(identifier, answer) != answer:
            raise ValueError(f"two different answers for id {identifier!r}: {answers[identifier]!r} and {answer!r}")
    return answers


def reference_questions(references: Mapping[str, Any]) -> Iterator[ReferenceQuestion]:
    """The questions of a challenge test file in the challenge's numbering.

    Args:
        references: `{scene: {"key_frames": {frame: {"QA": {category: [{"Q", "A", "tag"}, ...]}}}}}`; all four
            categories, possibly empty.

    Raises:
        ValueError: a frame or a question lacks a field that the scores need.
    """
    for scene, scene_data in references.items():
        for frame, frame_data in _field(scene_data, "key_frames", f"scene {scene}").items():
            qa = _field(frame_data, "QA", f"frame {scene}_{frame}")
            entries = [entry for name in CATEGORIES for entry in _field(qa, name, f"QA of frame {scene}_{frame}")]
            for number, entry in enumerate(entries):
                identifier = f"{scene}_{frame}_{number}"
                question, answer = (_field(entry, key, f"question {identifier}") for key in ("Q", "A"))
                tag = _field(entry, "tag", f"question {identifier} (training files have no tags)")
                yield ReferenceQuestion(identifier, number == 0, question, answer, frozenset(tag))


def counted_answers(references: Mapping[str, Any], answers: Mapping[str, str]) -> tuple[dict[str, list[Counted]], int]:
    """The answers that pass the graph gate, by the `PARTS` that they count for, and how many do not pass.

    Raises:
        ValueError: a question has no answer in `answers` (also one that the gate would close, as in the challenge),
            or a text whose points must be complete has an odd number of decimals.
    """
    counted: dict[str, list[Counted]] = {part: [] for part in PARTS}
    gated_out = 0
    graph: set[Point] = set()
    for item in reference_questions(references):
        if item.id not in answers:
            raise ValueError(
                f"no prediction for question {item.id!r} ({item.question[:80]!r}); ids are scene_frame_number, "
                f"counted over {', '.join(CATEGORIES)}. {len(answers)} predictions given."
            )
        answer = answers[item.id]
        if item.first:
            graph = set(match_points(points(answer), _complete_points(item.answer, "first answer", item.id)))
        elif not graph.issuperset(_complete_points(item.question, "question", item.id)):
            gated_out += 1
            continue
        if PARTS.index("match") in item.tag:
            _complete_points(item.answer, "reference answer with the match tag", item.id)
        for tag, part in enumerate(PARTS):
            if tag in item.tag:
                counted[part].append((item.id, answer, item.answer))
    return counted, gated_out


def score_drivelm(
    references: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    judge: Mapping[str, float] | None = None,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """All scores of the challenge for one prediction file.

    The challenge's script fails where a score counts no answer at all (it divides by zero) and where a prediction is
    missing; it takes the last of duplicate ids and ignores unknown ones. Here a score without answers is None, and so
    is `final`; a missing prediction and contradicting duplicates are errors; unknown ids are ignored and counted.

    Args:
        references: a challenge test file, see `reference_questions`.
        predictions: `[{"id": "{scene}_{frame}_{number}", "answer": ...}, ...]`, other keys are ignored.
        judge: score in [0, 100] by id for (at least) every counted answer with tag 1 or 3, from whatever judge. None
            leaves the judge's terms out: they count 0, which makes `final` the part of the official score that needs
            no judge (at most 0.5, or a little more by CIDEr).
        tokenizer: of the language scores, None takes Java where it is installed.

    Returns:
        - accuracy: in [0, 1];
        - match_f1: mean F1 in [0, 1]; match: the official match in [0, 100], half F1, half judge;
        - bleu_1 ... bleu_4, rouge_l, cider, language: see `coco_scores`, `language_score`;
        - judge: mean in [0, 100], None without a judge;
        - final: the official final score;
        - tokenizer: "java" or "python";
        - counts: total, gated_out, accuracy, judge, language, match (answers counted), unknown_predictions.

    Raises:
        ValueError: see `index_predictions`, `reference_questions` and `counted_answers`; the judge lacks an id.
    """
    answers = index_predictions(predictions)
    counted, gated_out = counted_answers(references, answers)
    scores: dict[str, Any] = {
        "accuracy": _mean([float(answer == reference) for _, answer, reference in counted["accuracy"]]),
        "match_f1": _mean([match_f1(answer, reference) for _, answer, reference in counted["match"]]),
        **_language(counted["language"], tokenizer),
        "judge": _judged(judge, counted["judge"]),
        "match": None,
    }
    if scores["match_f1"] is not None:
        scores["match"] = (100 * scores["match_f1"] + (_judged(judge, counted["match"]) or 0.0)) / 2
    scores["final"] = _final(scores) if judge is None or counted["judge"] else None
    total = sum(1 for _ in reference_questions(references))
    parts = {part: len(found) for part, found in counted.items()}
    counts = {"total": total, "gated_out": gated_out, **parts, "unknown_predictions": len(answers) - total}
    return {**scores, "counts": counts}


def _language(counted: Sequence[Counted], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """`coco_scores` and `language_score` of the answers that count for them; None where there are none."""
    if not counted:
        return dict.fromkeys(("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider", "tokenizer", "language"))
    scores = coco_scores([answer for _, answer, _ in counted], [reference for _, _, reference in counted], tokenizer)
    return {**scores, "language": language_score(scores)}


def _final(scores: Mapping[str, Any]) -> float | None:
    """The official final score; None without accuracy, language or match, 0 for a judge that is not there."""
    if None in (scores["accuracy"], scores["language"], scores["match"]):
        return None
    judge = 0.4 * (scores["judge"] or 0.0) / 100
    return judge + 0.2 * scores["language"] + 0.2 * scores["match"] / 100 + 0.2 * scores["accuracy"]


def _field(container: Any, name: str, where: str) -> Any:
    if not isinstance(container, Mapping) or name not in container:
        keys = ", ".join(map(str, container)) if isinstance(container, Mapping) else type(container).__name__
        raise ValueError(f'{where} has no "{name}"; it has: {keys}')
    return container[name]


def _complete_points(text: str, what: str, identifier: str) -> list[Point]:
    """`points`, where the challenge insists on pairs."""
    numbers = len(_DECIMAL.findall(text))
    if numbers % 2:
        raise ValueError(
            f"the {what} of {identifier} holds {numbers} decimal numbers; the challenge pairs them to points and "
            f"fails on an odd one: {text[:200]!r}"
        )
    return points(text)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _judged(judge: Mapping[str, float] | None, counted: Sequence[Counted]) -> float | None:
    if judge is None or not counted:
        return None
    missing = [identifier for identifier, _, _ in counted if identifier not in judge]
    if missing:
        raise ValueError(f"the judge has no score for {len(missing)} counted answers, the first is {missing[0]!r}")
    return _mean([float(judge[identifier]) for identifier, _, _ in counted])
