"""Scores of driving answers. Pure functions over lists; only the command reads files.

    python -m training.metrics --references test_eval.json --predictions output.json

prints the DriveLM challenge's scores of a prediction file as JSON. `--judge scores.json` (`{id: 0..100}`) adds a
judge's part; without one `final` is the part of the official score that needs no judge.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.metrics.drivelm import score_drivelm
from training.metrics.language import Tokenizer
from training.stages.command_line import run


@dataclass
class MetricsArguments:
    references: str = field(metadata={"help": "DriveLM challenge test file with tags (test_eval.json)."})
    predictions: str = field(metadata={"help": 'Prediction file: [{"id": ..., "question": ..., "answer": ...}, ...].'})
    judge: str | None = field(default=None, metadata={"help": "JSON file {id: score in 0..100} of a judge."})
    tokenizer: Tokenizer | None = field(
        default=None, metadata={"help": "java or python, the same tokens; default: java where it is installed."}
    )


def main(args: MetricsArguments) -> None:
    judge = _read(args.judge) if args.judge else None
    scores = score_drivelm(_read(args.references), _read(args.predictions), judge=judge, tokenizer=args.tokenizer)
    print(json.dumps(scores, indent=2))


def _read(file: str) -> Any:
    """A JSON file, with or without the byte order mark that editors on Windows put first."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON file in UTF-8: {error}") from None


if __name__ == "__main__":
    run(main, MetricsArguments)
