"""One page about one or more evaluations, to be opened in any browser, without network.

    python -m training.report --runs outputs/eval-smoldriver outputs/eval-smolvlm --data outputs/data \\
        --losses outputs/finetuned/metrics.jsonl --output report.html

Tables, figures and a gallery of frames with every model's answers; all of it comes from the files that
`training.evaluate` and `training.finetune` wrote, and the last section holds every number of each metrics.json. The
page is one file: style, script, figures and thumbnails are inside. Without JavaScript only the filters are missing.
"""

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm
from transformers import HfArgumentParser

from training.data.rows import Row, load_rows
from training.evaluation.controls import BLIND, CORRUPTIONS
from training.evaluation.figures import Point, gap_figure, lines_figure
from training.metrics.answers import answer_correct

TEMPLATE = Path(__file__).with_name("templates") / "report.html.jinja"
THUMBNAIL_WIDTH = 320
LANGUAGE = (
    ("BLEU-1 (COCO)", ("coco", "bleu_1")),
    ("BLEU-4 (COCO)", ("coco", "bleu_4")),
    ("ROUGE-L (COCO)", ("coco", "rouge_l")),
    ("CIDEr (COCO)", ("coco", "cider")),
    ("BLEU as the seed reports it", ("seed_bleu", "bleu")),
    ("BERTScore F1", ("bert_score", "f1")),
    ("DriveLM final without judge", ("drivelm", "final")),
)
"""Title and place in a control's results."""


@dataclass
class ReportArguments:
    runs: list[str] = field(metadata={"help": "Folders written by training.evaluate, best known first."})
    output: str = field(metadata={"help": "The HTML file to write."})
    data: str | None = field(default=None, metadata={"help": "Prepared folder of the runs, for the gallery."})
    losses: list[str] = field(
        default_factory=list, metadata={"help": "metrics.jsonl files of training runs, or NAME=FILE."}
    )
    title: str = field(default="Does it look?", metadata={"help": "Heading of the page."})
    gallery_frames: int = field(default=8, metadata={"help": "Frames in the gallery; 0 for none."})
    questions_per_frame: int = field(default=40, metadata={"help": "Questions per frame in the gallery, at most."})


@dataclass(frozen=True)
class Run:
    """One evaluation: its name in the report, its folder and its metrics.json."""

    name: str
    folder: Path
    metrics: dict[str, Any]

    def predictions(self, control: str) -> dict[str, dict[str, Any]]:
        """Predictions of a control by question_id; empty if there are none."""
        file = self.folder / control / "predictions.jsonl"
        if not file.is_file():
            return {}
        rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        return {row["question_id"]: row for row in rows}


def load_runs(folders: Sequence[str]) -> list[Run]:
    """The runs, named by their folders; by more of the path where two folders have one name.

    Raises:
        ValueError: a folder without metrics.json, the same folder twice, or runs on different splits, which no table
            may put side by side.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if len(set(paths)) != len(paths):
        raise ValueError(f"each run may come once; got {list(folders)}")
    runs = []
    for path in paths:
        file = path / "metrics.json"
        if not file.is_file():
            raise ValueError(f"{path} is no finished evaluation (no metrics.json); run training.evaluate")
        same = [other for other in paths if other.name == path.name]
        name = path.name if len(same) == 1 else f"{path.parent.name}/{path.name}"
        runs.append(Run(name, path, json.loads(file.read_text(encoding="utf-8"))))
    splits = {(run.metrics["split"], run.metrics["split_hash"]) for run in runs}
    if len(splits) > 1:
        raise ValueError(f"runs on different data cannot be compared: {sorted(splits)}")
    return runs


def percent(value: float | None) -> str:
    """0.1234 → 12.3 %."""
    return "–" if value is None else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    """0.1234 → +12.3, a difference in points."""
    return "–" if value is None else f"{100 * value:+.1f}"


def decimal(value: float | None) -> str:
    """Three decimals."""
    return "–" if value is None else f"{value:.3f}"


def figure_text(value: Any) -> str:
    """A value of metrics.json as the last section prints it: numbers with six significant digits."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(figure_text(item) for item in value)
    return str(value)


def flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested dicts to (path, text) rows; a list of dicts counts as a dict of numbered entries."""
    if isinstance(value, Mapping):
        return [row for key, item in value.items() for row in flat(item, f"{name} › {key}" if name else str(key))]
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return flat({str(number): item for number, item in enumerate(value)}, name)
    return [(name, figure_text(value))]


def headline_table(runs: Sequence[Run]) -> dict[str, Any]:
    """One column per model: what it reaches, what it costs, what remains of it without eyes."""
    rows = [
        ("accuracy", [_with_interval(run.metrics["intervals"]["sighted"]["accuracy"], percent) for run in runs]),
        ("visual tokens per scene", [f"{run.metrics['visual_tokens_per_scene']:g}" for run in runs]),
    ]
    balanced = [run.metrics["intervals"]["sighted"].get("yes_no_balanced_accuracy") for run in runs]
    if any(balanced):
        rows.append(("yes/no, balanced accuracy", [_with_interval(interval, percent) for interval in balanced]))
    for control in BLIND:
        gaps = [run.metrics["intervals"]["sighted_minus"].get(control, {}) for run in runs]
        for figure, place in (("accuracy", ""), ("perception", ", perception")):
            if any(figure in gap for gap in gaps):
                cells = [_with_interval(gap.get(figure), points) for gap in gaps]
                rows.append((f"sighted − {control.replace('_', ' ')}{place}", cells))
    for title, path in LANGUAGE:
        values = [_at(run, path) for run in runs]
        if any(value is not None for value in values):
            rows.append((title, [decimal(value) for value in values]))
    return {"columns": [run.name for run in runs], "rows": rows}


def kinds_table(runs: Sequence[Run], field_name: str) -> dict[str, Any]:
    """Sighted accuracy by "by_category" or "by_type", and the difference to the best blind control."""
    kinds = list(dict.fromkeys(kind for run in runs for kind in run.metrics["results"]["sighted"][field_name]))
    rows = []
    for run in runs:
        results = run.metrics["results"]
        cells = []
        for kind in kinds:
            accuracy = results["sighted"][field_name].get(kind, {}).get("accuracy")
            blind = [
                results[control][field_name].get(kind, {}).get("accuracy") for control in BLIND if control in results
            ]
            blind = [value for value in blind if value is not None]
            gap = None if accuracy is None or not blind else accuracy - max(blind)
            cells.append(percent(accuracy) + (f" ({points(gap)})" if gap is not None else ""))
        rows.append((run.name, cells))
    return {"columns": [kind.replace("_", " ") for kind in kinds], "rows": rows}


def controls_table(run: Run, controls: Sequence[str]) -> dict[str, Any] | None:
    """A run's controls: accuracy, difference to sighted, how many answers changed."""
    rows = []
    for control in controls:
        scores = run.metrics["results"].get(control)
        if scores is None:
            continue
        gap = run.metrics["intervals"]["sighted_minus"].get(control, {}).get("accuracy")
        named = scores.get("named_camera", {}).get("accuracy")
        cells = [
            percent(scores["accuracy"]),
            _with_interval(gap, points),
            percent(scores.get("changed_from_sighted")),
            str(scores["answers"]),
            percent(named),
        ]
        rows.append((control_title(control), cells))
    columns = ["accuracy", "sighted − control", "answers changed", "answers", "accuracy where it is named"]
    if all(cells[-1] == percent(None) for _, cells in rows):
        columns, rows = columns[:-1], [(name, cells[:-1]) for name, cells in rows]
    return {"columns": columns, "rows": rows} if rows else None


def control_title(control: str) -> str:
    """What a reader calls a control: "fog, severity 3", "without CAM_BACK"."""
    kind, *rest = control.split(":")
    if kind == "corrupt":
        return f"{rest[0].replace('_', ' ')}, severity {rest[1]}"
    return f"without {rest[0]}" if kind == "drop" else kind.replace("_", " ")


def calibration_table(runs: Sequence[Run]) -> dict[str, Any] | None:
    """ECE, Brier score, risk-coverage and abstention of each run and image condition."""
    rows = []
    for run in runs:
        found = run.metrics["calibration"]
        for control, kinds in found.items():
            if control == "abstention":
                continue
            kept = found.get("abstention", {}).get("kept", {}).get(control)
            for kind, scores in kinds.items():
                cells = [str(scores["answers"]), percent(scores["accuracy"]), percent(scores["confidence"])]
                cells += [decimal(scores[name]) for name in ("ece", "brier", "aurc")] + [percent(kept)]
                rows.append((f"{run.name}: {kind.replace('_', ' ')}, {control.replace('_', ' ')}", cells))
    columns = ["answers", "accuracy", "confidence", "ECE", "Brier", "AURC", "kept at 80 % coverage"]
    return {"columns": columns, "rows": rows} if rows else None


def hallucination_table(runs: Sequence[Run]) -> dict[str, Any] | None:
    """How often each run says that an absent object is there."""
    found = {run.name: run.metrics["results"].get("absent_object", {}).get("hallucination") for run in runs}
    found = {name: rates for name, rates in found.items() if rates}
    columns = list(dict.fromkeys(camera for rates in found.values() for camera in rates))
    rows = [(name, [percent(rates.get(c, {}).get("yes_rate")) for c in columns]) for name, rates in found.items()]
    return {"columns": columns, "rows": rows} if rows else None


def make_figures(runs: Sequence[Run], losses: Mapping[str, Path]) -> list[dict[str, str]]:
    """All figures that the runs have data for, each with a title and an explanation."""
    figures = []

    def add(title: str, text: str, image: str) -> None:
        figures.append({"title": title, "text": text, "image": image})

    gaps = {run.name: _gaps(run) for run in runs if _gaps(run)}
    if gaps:
        text = (
            "What the images add. A bar is the scene-clustered bootstrap interval; at 0 a model answers as well blind."
        )
        add("Sighted minus blind", text, gap_figure(gaps))
    curves = {run.name: token_curve(run) for run in runs}
    if any(len(curve) > 1 for curve in curves.values()):
        text = "Accuracy over the number of visual tokens that a scene costs the language model."
        image = lines_figure(curves, "visual tokens per scene", "accuracy", log_x=True, percent=True)
        add("Accuracy over visual tokens", text, image)
    for kind, title in (("yes_no", "Reliability, yes/no"), ("multiple_choice", "Reliability, multiple choice")):
        lines = {run.name: _reliability(run, kind) for run in runs if _reliability(run, kind)}
        if lines:
            text = (
                "How often answers given with a certain confidence are right. On the dashed line confidence is honest."
            )
            image = lines_figure(lines, "confidence", "share of right answers", percent=True, diagonal=True)
            add(title, text, image)
    lines = {f"{run.name}, {control}": curve for run in runs for control, curve in _risk(run).items()}
    if lines:
        text = "Share of wrong answers if only the most confident ones are given."
        image = lines_figure(lines, "coverage", "risk", percent=True, markers=False)
        add("Risk over coverage, yes/no", text, image)
    for run in runs:
        lines = corruption_curves(run)
        if lines:
            text = "Accuracy by severity; 0 is the clean image. A flat line is a reason to doubt that the model looks."
            image = lines_figure(lines, "severity", "accuracy", percent=True)
            add(f"Corruptions: {run.name}", text, image)
    for name, line in {
        name: loss for file, path in losses.items() for name, loss in loss_lines(file, path).items()
    }.items():
        lines = {name: line}
        add(
            f"Loss: {name}",
            "Loss per answer token while training.",
            lines_figure(lines, "step", "loss", markers=False),
        )
    return figures


def token_curve(run: Run) -> list[Point]:
    """(visual tokens per scene, accuracy) of sighted and sighted@m, in ascending order."""
    results = run.metrics["results"]
    chosen = [scores for control, scores in results.items() if control.partition("@")[0] == "sighted"]
    return sorted({(scores["visual_tokens_per_scene"], scores["accuracy"]) for scores in chosen})


def corruption_curves(run: Run) -> dict[str, list[Point]]:
    """{corruption: [(severity, accuracy)]}, beginning with the clean images at severity 0."""
    results = run.metrics["results"]
    curves: dict[str, list[Point]] = {}
    for control, scores in results.items():
        kind, *rest = control.split(":")
        if kind == "corrupt":
            curves.setdefault(rest[0].replace("_", " "), []).append((int(rest[1]), scores["accuracy"]))
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


def gallery(runs: Sequence[Run], data: str, frames: int, questions: int) -> list[dict[str, Any]]:
    """Frames that all runs answered, with pictures, attention, and every model's answers.

    Raises:
        ValueError: the data has another split hash than the runs.
    """
    rows = load_rows(data, runs[0].metrics["split"])
    if rows.split_hash != runs[0].metrics["split_hash"]:
        raise ValueError(f"{data} has split hash {rows.split_hash}, the runs {runs[0].metrics['split_hash']}")
    sighted = {run.name: run.predictions("sighted") for run in runs}
    black = {run.name: run.predictions("black") for run in runs}
    maps = {run.name: _attention(run.folder) for run in runs}
    shown: list[dict[str, Any]] = []
    for frame, asked in tqdm(rows.frames(), desc="gallery", unit="frame"):
        common = [row for row in asked if all(row["question_id"] in sighted[run.name] for run in runs)]
        if not common or len(shown) == frames:
            continue
        step = max(1, -(-len(common) // questions))  # spread over the frame's questions
        shown.append(
            {
                "scene": frame["scene_token"],
                "frame": frame["frame_token"],
                "images": [_picture(frame, camera, maps) for camera in frame["images"]],
                "questions": [_question(row, runs, sighted, black) for row in common[::step][:questions]],
            }
        )
    return shown


def thumbnail(path: str) -> str:
    """A JPEG of at most `THUMBNAIL_WIDTH` pixels as a data address."""
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL_WIDTH, THUMBNAIL_WIDTH))
    return _image_address(small, "JPEG", quality=72)


def overlay(weights: NDArray[np.float32], size: tuple[int, int] = (64, 36)) -> str:
    """Attention weights (rows, columns) as a see-through PNG: the darker the red, the more is looked at."""
    span = float(weights.max() - weights.min())
    scaled = (weights - weights.min()) / span if span else np.zeros_like(weights)
    alpha = np.asarray(Image.fromarray(scaled.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    pixels = np.zeros((size[1], size[0], 4), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = 255, 40, 0
    pixels[..., 3] = (alpha * 190).astype(np.uint8)
    return _image_address(Image.fromarray(pixels), "PNG")


def main(args: ReportArguments) -> Path:
    """Write the page; returns its path.

    Raises:
        ValueError: see `load_runs`, `named_losses` and `gallery`.
    """
    runs = load_runs(args.runs)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    frames = gallery(runs, args.data, args.gallery_frames, args.questions_per_frame) if args.data else []
    camera_controls = ["drop_relevant", "permuted", "swap_left_right"]
    page = template.render(
        title=args.title,
        runs=runs,
        headline=headline_table(runs),
        categories=kinds_table(runs, "by_category"),
        types=kinds_table(runs, "by_type"),
        figures=make_figures(runs, named_losses(args.losses)),
        controls={
            run.name: controls_table(
                run,
                [
                    *BLIND,
                    *(c for c in run.metrics["results"] if c.startswith("drop:")),
                    *camera_controls,
                    "paraphrase",
                ],
            )
            for run in runs
        },
        corruptions={
            run.name: controls_table(
                run, [c for name in CORRUPTIONS for c in run.metrics["results"] if c.startswith(f"corrupt:{name}:")]
            )
            for run in runs
        },
        hallucination=hallucination_table(runs),
        calibration=calibration_table(runs),
        frames=frames,
        kinds=sorted({question["type"] for frame in frames for question in frame["questions"]}),
        categories_shown=sorted({question["category"] for frame in frames for question in frame["questions"]}),
        attentive=[run.name for run in runs if (run.folder / "attention.npz").is_file()],
        everything={run.name: flat(run.metrics) for run in runs},
    )
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(output.name + ".unfinished")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, output)
    print(f"{output}: {len(runs)} runs, {len(frames)} frames, {output.stat().st_size / 1e6:.1f} MB")
    return output


def _at(run: Run, path: Sequence[str]) -> float | None:
    value: Any = run.metrics["results"]["sighted"]
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _with_interval(interval: Mapping[str, Any] | None, text: Any) -> str:
    if interval is None:
        return "–"
    shown = text(interval["estimate"])
    if interval["low"] is None:
        return shown
    ends = [text(interval[end]).removesuffix(" %") for end in ("low", "high")]
    return f"{shown} [{ends[0]}, {ends[1]}]"


def _gaps(run: Run) -> list[tuple[str, Mapping[str, float | None]]]:
    found = run.metrics["intervals"]["sighted_minus"]
    return [(control, found[control]["accuracy"]) for control in BLIND if control in found]


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


def _picture(frame: Row, camera: str, maps: Mapping[str, Mapping[str, NDArray[np.float32]]]) -> dict[str, Any]:
    key = f"{frame['scene_token']}/{frame['frame_token']}/{camera}"
    overlays = {name: overlay(found[key]) for name, found in maps.items() if key in found}
    return {"camera": camera, "image": thumbnail(frame["images"][camera]), "overlays": overlays}


def _question(row: Row, runs: Sequence[Run], sighted: Mapping[str, Any], black: Mapping[str, Any]) -> dict[str, Any]:
    answers = []
    for run in runs:
        identifier = row["question_id"]
        answer = sighted[run.name][identifier]["answer"]
        blind = black[run.name].get(identifier, {}).get("answer")
        right = answer_correct(row["question"], row["answer"], answer)
        answers.append({"run": run.name, "answer": answer, "right": right, "blind": blind})
    kind = sighted[runs[0].name][row["question_id"]]["type"]
    return {
        "question": row["question"],
        "reference": row["answer"],
        "category": row["category"],
        "type": kind,
        "answers": answers,
    }


def _attention(folder: Path) -> dict[str, NDArray[np.float32]]:
    file = folder / "attention.npz"
    if not file.is_file():
        return {}
    with np.load(file) as maps:
        return {name: maps[name] for name in maps.files}


def _image_address(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


if __name__ == "__main__":
    main(HfArgumentParser(ReportArguments).parse_args_into_dataclasses()[0])
