"""Writes the README's figures from the files that runs wrote.

    python -m benchmarks.tables            # rewrite the generated parts of README.md
    python -m benchmarks.tables --check    # fail if they are not what the files say

A generated part stands between `<!-- NAME -->` and `<!-- end NAME -->`; each comes from one file in
benchmarks/results.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def nine_frames(run: dict[str, Any]) -> str:
    """The over-fitting check."""
    rows = [
        ("questions", f"{run['questions']}"),
        ("exact match, true images", f"{run['exact_match']:.3f}"),
        (
            f"exact match on the {run['questions_answered_differently_between_frames']} whose answers differ between "
            "frames, true images",
            f"{run['exact_match_differing']:.3f}",
        ),
        (
            "the same, after the six images of a frame with another answer were given",
            f"{run['exact_match_differing_swapped_images']:.3f}",
        ),
        ("drop", f"{run['drop_in_points']:.1f} points"),
        ("answers that became the other frame's", f"{run['swapped_answers_equal_to_the_other_frames_reference']:.3f}"),
        ("minutes of training, one CPU thread", f"{run['minutes_fitting']:.0f}"),
    ]
    lines = ["| trained and asked on the same nine frames | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    return "\n".join([*lines, "", f"Command: `{run['command']}`; split {run['split_hash'][:12]}."])


def speed(results: dict[str, Any]) -> str:
    """The speed table, as the benchmark itself words it."""
    from benchmarks.speed_report import table

    return re.sub(r"^# Speed\n+", "", table(results)).strip()


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {"nine-frames": nine_frames, "speed": speed}


def filled(text: str) -> str:
    """README text with every generated part as its file says.

    Raises:
        ValueError: a part without its markers.
    """
    for name, render in PARTS.items():
        file = RESULTS / f"{name}.json"
        if not file.exists():
            continue
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.S)
        if not pattern.search(text):
            raise ValueError(f"README.md has no part <!-- {name} --> … <!-- end {name} -->")
        content = render(json.loads(file.read_text()))
        start, end = pattern.search(text).span()  # type: ignore[union-attr]  # found just above
        text = f"{text[:start]}<!-- {name} -->\n\n{content}\n\n<!-- end {name} -->{text[end:]}"
    return text


def main(check: bool) -> int:
    """Rewrite, or compare; returns the exit status."""
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = filled(before)
    if check:
        return int(before != after)
    temporary = readme.with_suffix(".tmp")
    temporary.write_text(after)
    os.replace(temporary, readme)
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
