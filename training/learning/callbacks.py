"""What a run shows and keeps while it runs: a bar, a JSONL of all metrics, and at the end the loss curve."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback


class JsonlCallback(TrainerCallback):
    """Appends every log line, with samples per second and the time left, to a JSONL file.

    A run that goes on from a checkpoint first drops the lines of the steps it is about to do again, and a last line
    that a kill cut short, so that nothing is in it twice.
    """

    def __init__(self, path: Path):
        self.path = path
        self.started = (0.0, 0)

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = (time.monotonic(), state.global_step)
        if state.is_world_process_zero and self.path.exists():
            done = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
            kept = [line for line in done if "train_runtime" not in line]  # the summary, which comes again
            temporary = self.path.with_name(self.path.name + ".unfinished")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(temporary, self.path)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        line = {"step": state.global_step, **logs, **speed(args, state, *self.started)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class ProgressBar(TrainerCallback):
    """A bar with the time left, the loss, the accuracy on answer tokens, the learning rate and samples per second."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.started = (0.0, 0)

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = (time.monotonic(), state.global_step)
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and logs:
            rate = speed(args, state, *self.started).get("samples_per_second")
            shown = {
                "loss": logs.get("loss"),
                "accuracy": logs.get("mean_token_accuracy"),
                "eval_loss": logs.get("eval_loss"),
                "lr": logs.get("learning_rate"),
                "samples/s": rate,
            }
            self.bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items() if value is not None})

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def speed(args, state, began: float, first_step: int) -> dict[str, float]:
    """Samples per second and seconds left since a run began; empty before its first step."""
    seconds, steps = time.monotonic() - began, state.global_step - first_step
    if not steps or not seconds:
        return {}
    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "samples_per_second": round(steps * samples / seconds, 3),
        "eta_seconds": round(seconds / steps * (state.max_steps - state.global_step)),
    }


def read_metrics(jsonl: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut short is left out."""
    lines = jsonl.read_text().splitlines()
    metrics = []
    for number, line in enumerate(lines):
        try:
            metrics.append(json.loads(line))
        except ValueError:
            if number != len(lines) - 1:
                raise ValueError(f"{jsonl}, line {number + 1} is no JSON: {line[:80]!r}") from None
    return metrics


def first_and_last(jsonl: Path) -> dict[str, dict[str, float]]:
    """Loss, accuracy on answer tokens and, where there is one, evaluation loss at a run's first and last log line."""
    names = {"loss": "loss", "mean_token_accuracy": "accuracy", "eval_loss": "eval_loss"}
    lines = read_metrics(jsonl)
    ends: dict[str, dict[str, float]] = {"first": {}, "last": {}}
    for key, name in names.items():
        values = [(line["step"], line[key]) for line in lines if key in line]
        if values:
            (ends["first"]["step"], ends["first"][name]), (ends["last"]["step"], ends["last"][name]) = (
                values[0],
                values[-1],
            )
    return ends


def loss_curve(jsonl: Path, picture: Path) -> None:
    """Draw training and evaluation loss over steps from a metrics file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = read_metrics(jsonl)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in ("loss", "eval_loss"):
        points = {line["step"]: line[name] for line in lines if name in line and math.isfinite(line[name])}
        if points:
            axes.plot(list(points), list(points.values()), label=name.replace("_", " "), marker=".")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per answer token")
    axes.set_yscale("log")
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    temporary = picture.with_name(f"unfinished-{picture.name}")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, picture)
    pyplot.close(figure)
