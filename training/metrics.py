"""Scores of driving answers. Pure functions over lists; only the command reads files.

    python -m training.metrics --references test_eval.json --predictions output.json

prints the DriveLM challenge's scores of a prediction file as JSON. `--judge scores.json` (`{id: 0..100}`) adds a
judge's part; without one `final` is the part of the official score that needs no judge. Everything else is imported
from here: language scores, scores by question type, calibration, intervals.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from training.metrics_answers import (
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
from training.metrics_calibration import calibration_scores, choice_probabilities, risk_coverage
from training.metrics_drivelm import language_score, match_f1, match_points, points, score_drivelm
from training.metrics_intervals import Interval, mean_difference_interval, mean_interval, scene_bootstrap
from training.metrics_language import (
    Tokenizer,
    available_tokenizer,
    bert_scores,
    coco_scores,
    coco_tokens,
    load_bert_scorer,
    sacrebleu_score,
    seed_bleu,
)

__all__ = [
    "QUESTION_TYPES",
    "Interval",
    "Tokenizer",
    "answer_correct",
    "available_tokenizer",
    "behaviour_scores",
    "bert_scores",
    "calibration_scores",
    "choice_probabilities",
    "coco_scores",
    "coco_tokens",
    "count_scores",
    "language_score",
    "load_bert_scorer",
    "localisation_scores",
    "match_f1",
    "match_points",
    "mean_difference_interval",
    "mean_interval",
    "multiple_choice_scores",
    "parse_behaviour",
    "parse_choice",
    "parse_counts",
    "parse_status",
    "parse_yes_no",
    "points",
    "question_type",
    "risk_coverage",
    "sacrebleu_score",
    "scene_bootstrap",
    "score_by_type",
    "score_drivelm",
    "seed_bleu",
    "status_scores",
    "yes_no_scores",
]


@dataclass
class MetricsArguments:
    references: str = field(metadata={"help": "DriveLM challenge test file with tags (test_eval.json)."})
    predictions: str = field(metadata={"help": 'Prediction file: [{"id": ..., "question": ..., "answer": ...}, ...].'})
    judge: str | None = field(default=None, metadata={"help": "JSON file {id: score in 0..100} of a judge."})
    tokenizer: Tokenizer | None = field(
        default=None, metadata={"help": "java or python, the same tokens; default: java where it is installed."}
    )


def main(args: MetricsArguments) -> None:
    judge = json.loads(Path(args.judge).read_text(encoding="utf-8")) if args.judge else None
    scores = score_drivelm(
        json.loads(Path(args.references).read_text(encoding="utf-8")),
        json.loads(Path(args.predictions).read_text(encoding="utf-8")),
        judge=judge,
        tokenizer=args.tokenizer,
    )
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main(HfArgumentParser(MetricsArguments).parse_args_into_dataclasses()[0])
