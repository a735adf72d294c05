"""What a run shows and keeps while it runs: a JSONL of all metrics, the loss curve, and a stop on a loss gone bad."""

import json
import math
import time
from pathlib import Path

from transformers import TrainerCallback


class JsonlCallback(TrainerCallback):
    """Appends every log line, with samples per second and the time left, to a JSONL file."""

    def __init__(self, path: Path):
        self.path = path
        self.started = (0.0, 0)

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = (time.monotonic(), state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        began, first_step = self.started
        seconds, steps = time.monotonic() - began, state.global_step - first_step
        line = {"step": state.global_step, **logs}
        if steps and seconds:
            samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            line["samples_per_second"] = round(steps * samples / seconds, 3)
            line["eta_seconds"] = round(seconds / steps * (state.max_steps - state.global_step))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class GuardCallback(TrainerCallback):
    """Stops on a loss that is not a number; the last checkpoint stays as it is."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(float(value)):
                raise FloatingPointError(
                    f"{name} is {value} at step {state.global_step}; nothing was saved after the last checkpoint in "
                    f"{args.output_dir}. Lower the learning rate or look at the batch; a new run goes on from there"
                )


def loss_curve(jsonl: Path, picture: Path) -> None:
    """Draw training and evaluation loss over steps from a metrics file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in jsonl.read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in ("loss", "eval_loss"):
        points = {line["step"]: line[name] for line in lines if name in line}
        if points:
            axes.plot(list(points), list(points.values()), label=name.replace("_", " "))
    axes.set_xlabel("step")
    axes.set_ylabel("loss per answer token")
    axes.set_yscale("log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
