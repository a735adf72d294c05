"""What a run keeps for people: a JSONL of everything it logs, at the end the loss curve, and its note.

transformers shows the bar and the figures, and keeps them in `trainer.state.log_history`, which a checkpoint carries.
The file is that history where other programs read it, also while the run goes on.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from training.data.rows import Rows
from training.stages.files import make_note, whole, write_text


class JsonlCallback(TrainerCallback):
    """Appends every log entry to a JSONL file.

    A run that goes on from a checkpoint first writes the history in it, so that no step is in the file twice.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in state.log_history))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


def started_note(
    module: str, args: Any, config: TrainingArguments, rows: Rows | None, made_from: Sequence[str], **more: Any
) -> dict[str, Any]:
    """A run's note as far as it is known before the first step; stages change some settings of `config` after it.

    Args:
        args: the stage's own arguments.
        rows: what it trains on, of `args.data`; None of a stage that reads no data.
        more: other arguments of `make_note`, or figures.
    """
    data = {} if rows is None else {"trained_on": args.data, "split_hash": rows.split_hash}
    return make_note(module, args, config, made_from=made_from, seed=config.seed, **data, **more)


def read_metrics(jsonl: Path) -> list[dict[str, Any]]:
    """The entries of a metrics file."""
    return [json.loads(line) for line in jsonl.read_text(encoding="utf-8").splitlines()]


def first_and_last(jsonl: Path) -> dict[str, dict[str, float]]:
    """Loss, accuracy on answer tokens and, where there is one, evaluation loss at a run's first and last log entry."""
    names = {"loss": "loss", "mean_token_accuracy": "accuracy", "eval_loss": "eval_loss"}
    entries = read_metrics(jsonl)
    ends: dict[str, dict[str, float]] = {"first": {}, "last": {}}
    for key, name in names.items():
        logged = [entry for entry in entries if key in entry]
        if logged:
            for end, entry in zip(ends.values(), (logged[0], logged[-1]), strict=True):
                end |= {"step": entry["step"], name: entry[key]}
    return ends


def loss_curve(jsonl: Path, picture: Path) -> None:
    """Draw training and evaluation loss over steps from a metrics file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    entries = read_metrics(jsonl)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in ("loss", "eval_loss"):
        points = {entry["step"]: entry[name] for entry in entries if name in entry and math.isfinite(entry[name])}
        if points:
            axes.plot(list(points), list(points.values()), label=name.replace("_", " "), marker=".")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per answer token")
    axes.set_yscale("log")
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    with whole(picture) as unfinished:
        figure.savefig(unfinished, dpi=120)
    pyplot.close(figure)
