"""Writes the README's figures from the files that runs wrote.

    python -m benchmarks.tables            # rewrite the generated parts of README.md
    python -m benchmarks.tables --check    # fail if they are not what the files say

A generated part stands between `<!-- NAME -->` and `<!-- end NAME -->`; each comes from one file in
benchmarks/results. The tree of files comes from the files.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.markdown import number, percent, table
from benchmarks.speed.report import report as speed_report
from benchmarks.toyworld.results import LANGUAGE
from benchmarks.tree import tree
from training.evaluation.controls import Control
from training.evaluation.figures import title_of
from training.stages.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TREE = re.compile(r"```text tree\n.*?```", re.S)


def nine_frames(run: dict[str, Any]) -> str:
    """The over-fitting check."""
    differing = run["questions_answered_differently_between_frames"]
    true, swapped = run["exact_match_differing"], run["exact_match_differing_swapped_images"]
    rows = [
        ("questions", f"{run['questions']}"),
        ("exact match, true images", f"{run['exact_match']:.3f}"),
        (f"exact match on the {differing} whose answers differ between frames, true images", f"{true:.3f}"),
        ("the same, after the six images of a frame with another answer were given", f"{swapped:.3f}"),
        ("drop", f"{run['drop_in_points']:.1f} points"),
        ("answers that became the other frame's", f"{run['swapped_answers_equal_to_the_other_frames_reference']:.3f}"),
        ("minutes of training, one CPU thread", f"{run['minutes_fitting']:.0f}"),
    ]
    lines = table(["trained and asked on the same nine frames", ""], rows)
    return "\n".join([*lines, "", f"Command: `{run['command']}`; split {run['split_hash'][:12]}."])


def packing(run: dict[str, Any]) -> str:
    """What one sequence per frame and the feature cache save."""
    slowest = run["ways"]["one per sequence, live"]["questions_per_second"]
    rows = []
    for way, found in run["ways"].items():
        speed = found["questions_per_second"]
        rows.append([way, str(found["tokens"]), number(speed), number(speed / slowest)])
    questions = run["settings"]["questions"]
    lines = table([f"a training step on {questions} questions of a frame", "tokens", "questions/s", "×"], rows)
    note = (
        f"{run['parameters_million']:.0f} million weights, six images at {run['image_size']} px, CPU seconds of one "
        "thread: only ratios mean much. Command: "
        "`python -m benchmarks.packing --output benchmarks/results/packing.json`."
    )
    return "\n".join([*lines, "", note])


TITLES = {
    "smolvlm": "SmolVLM, as pre-trained",
    "smolvlm-ft": "SmolVLM-FT",
    "smoldriver": "**SmolDriver**",
    "blind": "blind: the same language model, no images",
}
BLIND_COLUMNS = {
    "template_majority": "best answer per template %",
    "text_only": "no images %",
    "black": "black images %",
    "wrong_scene": "other scene's images %",
}
ABLATIONS = {
    "smoldriver": "SmolDriver",
    "position-keys": "keys of positions only",
    "shared-qformer": "one Q-Former for all cameras",
    "untrained-queries": "queries never trained",
    "no-transfer": "no knowledge transfer",
}
WORDING = ("seed_bleu", "bert_score_f1")
CONTROLS = ("drop_relevant", "black_relevant", "permuted", "swap_left_right", "paraphrase", "absent_object")


def spread(model: dict[str, Any], group: str) -> str:
    """A figure in percent, with the seeds' own where there are several."""
    text = percent(model[group]["estimate"])
    seeds = model["per_seed"][group]
    return text if len(seeds) < 2 else f"{text} ({' '.join(percent(value) for value in seeds)})"


def gap(interval: dict[str, Any] | None) -> str:
    """A difference in points, with its interval; nothing where there is none."""
    if interval is None:
        return ""
    low, high = interval["low"], interval["high"]
    return f"{100 * interval['estimate']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def toyworld(run: dict[str, Any]) -> str:
    """The embedded benchmark: three models beside their blind versions, budgets, ablations, unseen weather."""
    models = run["models"]
    sighted = [model for name, model in models.items() if name in TITLES and name != "blind"]
    asked = [control for control in BLIND_COLUMNS if any(control in model["controls"] for model in sighted)]
    ours = models.get("smoldriver")
    parts = [_models(run, asked)]
    if ours:
        parts += [_budgets(run, ours), _ablations(run, models), _controls(ours), _corruptions(ours)]
    seeds = max(model["seeds"] for model in models.values())
    note = (
        f"Right answers on {ours['questions'] if ours else 0} questions about scenes that no model has seen; "
        f"{seeds} seed{'s' if seeds > 1 else ''}, each one's own figure in brackets; two models are compared on the "
        "seeds that both have (ablations and changed images or questions: the first); square brackets: 95 % intervals "
        "over scenes. Blind columns: perception. "
    )
    if "text_only" not in asked:
        note += "Text only, the fourth blind control, was asked of the blind model alone in this run. "
    note += (
        "BERTScore with MiniLM, not comparable with other encoders'. "
        f"Command: `{run['command'].strip()}`; split {run['split_hash'][:12]}."
    )
    return "\n\n".join("\n".join(lines) for lines in [*parts, [note]] if lines)


def _models(run: dict[str, Any], asked: list[str]) -> list[str]:
    header = ["", "visual tokens", "perception %", "all %", "sighted − blind, perception", "sighted − blind, all"]
    header += [BLIND_COLUMNS[control] for control in asked]
    rows = []
    for name, model in ((name, run["models"][name]) for name in TITLES if name in run["models"]):
        minus_blind = run["sighted_minus_trained_blind"].get(name, {})
        rows.append(
            [
                TITLES[name],
                f"{model['visual_tokens_per_scene']:.0f}",
                spread(model, "perception"),
                spread(model, "accuracy"),
                gap(minus_blind.get("perception")),
                gap(minus_blind.get("accuracy")),
                *(percent(model["controls"].get(control, {}).get("perception")) for control in asked),
                *("–" if model[score] is None else f"{model[score]:.3f}" for score in WORDING),
                percent(model.get("unseen", {}).get("sighted", {}).get("perception")),
            ]
        )
    return table([*header, *(title_of(LANGUAGE[score]) for score in WORDING), "unseen fog %"], rows)


def _budgets(run: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Accuracy over visual tokens."""
    budgets = sorted(budget for name in ours["controls"] if (budget := Control.parse(name).budget))
    minus = run["smoldriver_at_budget_minus_smolvlm_ft"]
    rows = [
        [title, *(percent(ours["controls"][f"sighted@{budget}"][group]) for budget in budgets)]
        for group, title in (("perception", "perception %"), ("accuracy", "all %"))
    ]
    if minus:
        rows.append(["minus SmolVLM-FT, perception", *(gap(minus[str(budget)]["perception"]) for budget in budgets)])
    return table(["SmolDriver's tokens per camera", *map(str, budgets)], rows)


def _ablations(run: dict[str, Any], models: dict[str, Any]) -> list[str]:
    rows = []
    for name, title in ABLATIONS.items():
        if model := models.get(name):
            at_one = percent(model["controls"].get("sighted@1", {}).get("perception"))
            minus = gap(run["smoldriver_minus"].get(name, {}).get("perception"))
            rows.append([title, spread(model, "perception"), at_one, spread(model, "accuracy"), minus])
    header = ["ablation", "perception %", "at 1 token a camera %", "all %", "SmolDriver − it, perception"]
    return table(header, rows) if len(rows) > 1 else []


def _controls(ours: dict[str, Any]) -> list[str]:
    """What becomes of the answers when the images or the questions are not what they were."""
    rows = []
    for name in CONTROLS:
        if name not in ours["controls"]:
            continue
        found = ours["controls"][name]
        cells = [Control.parse(name).title]
        for group in ("perception", "accuracy"):
            cells += [percent(found[group]), gap(found["minus_sighted"].get(group)) or "–"]
        rows.append(cells)
    header = ["SmolDriver is given", "perception %", "minus true images, same questions", "all %", "minus true images"]
    return table(header, rows) if rows else []


def _corruptions(ours: dict[str, Any]) -> list[str]:
    """Perception over severities."""
    found = ours.get("corruptions")
    if not found:
        return []
    spoilt: dict[str, dict[int, str]] = {}  # {corruption: {severity: perception}}
    for control, scores in ((Control.parse(name), scores) for name, scores in found.items()):
        if control.corruption and control.severity:
            spoilt.setdefault(control.corruption, {})[control.severity] = percent(scores["perception"])
    severities = sorted({severity for cells in spoilt.values() for severity in cells})
    rows = [[name.replace("_", " "), *(cells[severity] for severity in severities)] for name, cells in spoilt.items()]
    title = f"corrupted images, perception % ({percent(found['sighted']['perception'])} without)"
    return table([title, *(f"severity {severity}" for severity in severities)], rows)


ENGINES = {
    "fp32": "PyTorch, fp32",
    "int8": "PyTorch, preset int8",
    "onnx": "ONNX Runtime, fp32",
    "onnx-int8": "ONNX Runtime, language model in int8",
}


def engines(run: dict[str, Any]) -> str:
    """Accuracy of every engine beside that of fp32."""
    rows = []
    for name, found in run["engines"].items():
        right = [
            f"{percent(interval['estimate'])} [{percent(interval['low'])}, {percent(interval['high'])}]"
            for interval in (found["perception"], found["accuracy"])
        ]
        rows.append([ENGINES[name], *right, percent(found["same_answer"]), f"{found['megabytes']:.0f}"])
    lines = table(["engine", "perception %", "all %", "answers as in fp32 %", "MB"], rows)
    note = f"{run['questions']} questions about {run['frames']} frames. Command: `{run['command']}`; "
    return "\n".join([*lines, "", f"{note}split {run['split_hash'][:12]}."])


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "packing": packing,
    "nine-frames": nine_frames,
    "toyworld": toyworld,
    "engines": engines,
    "speed": speed_report,
}


def filled(text: str) -> str:
    """README text with every generated part as its file says.

    Raises:
        ValueError: a part without its markers.
    """
    for name, render in PARTS.items():
        file = RESULTS / f"{name}.json"
        if not file.exists():
            continue
        found = re.search(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end {name} -->)", text, re.S)
        if not found:
            raise ValueError(f"README.md has no part <!-- {name} --> … <!-- end {name} -->")
        content = render(json.loads(file.read_text()))
        text = f"{text[: found.start()]}\n{content}\n\n{text[found.end() :]}"
    return TREE.sub(lambda _: f"```text tree\n{tree()}\n```", text)


def main(check: bool) -> int:
    """Rewrite, or compare; returns the exit status."""
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = filled(before)
    if check:
        return int(before != after)
    write_text(readme, after)
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
