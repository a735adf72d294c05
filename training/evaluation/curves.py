"""What the report plots of its runs: curves out of metrics.json and of training, each with a title and a text."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from training.evaluation.controls import BLIND, Control
from training.evaluation.figures import words
from training.evaluation.plots import Point, gap_figure, lines_figure
from training.evaluation.results import IntervalFigures, Run

Plot = dict[str, str]  # title, text and image


def make_plots(runs: Sequence[Run], losses: Mapping[str, Path]) -> list[Plot]:
    """All plots that the runs have data for, each with a title and an explanation."""
    plots = [*_gap_plots(runs), *_token_plots(runs), *_confidence_plots(runs), *_corruption_plots(runs)]
    for name, file in losses.items():
        for title, line in loss_lines(name, file).items():
            image = lines_figure({title: line}, "step", "loss", markers=False)
            plots.append(_plot(f"Loss: {title}", "Loss per answer token while training.", image))
    return plots


def _plot(title: str, text: str, image: str) -> Plot:
    return {"title": title, "text": text, "image": image}


def _gap_plots(runs: Sequence[Run]) -> Iterator[Plot]:
    gaps = {run.name: found for run in runs if (found := _gaps(run))}
    if gaps:
        text = "What the images add. A bar is the scene-clustered interval; at 0 a model answers as well blind."
        yield _plot("Sighted minus blind", text, gap_figure(gaps))


def _token_plots(runs: Sequence[Run]) -> Iterator[Plot]:
    curves = {run.name: token_curve(run) for run in runs}
    if any(len(curve) > 1 for curve in curves.values()):
        text = "Accuracy over the number of visual tokens that a scene costs the language model."
        image = lines_figure(curves, "visual tokens per scene", "accuracy", log_x=True, percent=True)
        yield _plot("Accuracy over visual tokens", text, image)


def _confidence_plots(runs: Sequence[Run]) -> Iterator[Plot]:
    for kind in ("yes_no", "multiple_choice"):
        lines = {run.name: found for run in runs if (found := _reliability(run, kind))}
        if lines:
            text = "How often answers of a certain confidence are right. On the dashed line confidence is honest."
            image = lines_figure(lines, "confidence", "share of right answers", percent=True, diagonal=True)
            yield _plot(f"Reliability, {words(kind)}", text, image)
    lines = {f"{run.name}, {control}": curve for run in runs for control, curve in _risk(run).items()}
    if lines:
        text = "Share of wrong answers if only the most confident ones are given."
        image = lines_figure(lines, "coverage", "risk", percent=True, markers=False)
        yield _plot("Risk over coverage, yes/no", text, image)


def _corruption_plots(runs: Sequence[Run]) -> Iterator[Plot]:
    for run in runs:
        lines = corruption_curves(run)
        if lines:
            text = "Accuracy by severity; 0 is the clean image. A flat line is a reason to doubt that the model looks."
            image = lines_figure(lines, "severity", "accuracy", percent=True)
            yield _plot(f"Corruptions: {run.name}", text, image)


def token_curve(run: Run) -> list[Point]:
    """(visual tokens per scene, accuracy) of sighted and sighted@m, in ascending order."""
    results = run.metrics["results"]
    chosen = [scores for control, scores in results.items() if Control.parse(control).kind == "sighted"]
    return sorted({(scores["visual_tokens_per_scene"], scores["accuracy"]) for scores in chosen})


def corruption_curves(run: Run) -> dict[str, list[Point]]:
    """{corruption: [(severity, accuracy)]}, beginning with the clean images at severity 0."""
    results = run.metrics["results"]
    curves: dict[str, list[Point]] = {}
    for name, scores in results.items():
        control = Control.parse(name)
        if control.corruption is not None and control.severity is not None:
            curves.setdefault(words(control.corruption), []).append((control.severity, scores["accuracy"]))
    clean = (0, results["sighted"]["accuracy"])
    return {name: sorted([clean, *curve]) for name, curve in curves.items()}


def loss_lines(name: str, file: Path) -> dict[str, list[Point]]:
    """{"name": training loss, "name, held out": evaluation loss} from a metrics.jsonl, where it has them."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = {}
    for key, title in (("loss", name), ("eval_loss", f"{name}, held out")):
        curve = sorted((line["step"], line[key]) for line in lines if line.get(key) is not None)
        if curve:
            found[title] = curve
    return found


def named_losses(arguments: Sequence[str]) -> dict[str, Path]:
    """NAME=FILE or FILE, which is named by its folder.

    Raises:
        ValueError: no such file.
    """
    named = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        file = Path(path if equals else argument)
        if not file.is_file():
            raise ValueError(f"losses: no such file: {file}")
        named[name if equals else file.resolve().parent.name] = file
    return named


def _gaps(run: Run) -> list[tuple[str, IntervalFigures]]:
    found = run.metrics["intervals"]["sighted_minus"]
    return [(Control(kind).title, found[kind]["accuracy"]) for kind in BLIND if kind in found]


def _reliability(run: Run, kind: str) -> list[Point]:
    scores = run.metrics["calibration"].get("sighted", {}).get(kind)
    return [(entry["confidence"], entry["accuracy"]) for entry in scores["reliability"]] if scores else []


def _risk(run: Run) -> dict[str, list[Point]]:
    curves = {}
    for control in ("sighted", "black"):
        scores = run.metrics["calibration"].get(control, {}).get("yes_no")
        if scores:
            curve = scores["risk_coverage"]
            curves[control] = list(zip(curve["coverage"], curve["risk"], strict=True))
    return curves
