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
from benchmarks.toyworld.report import report as toyworld_report
from benchmarks.tree import tree
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
    "toyworld": toyworld_report,
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
