"""An over-fitting check on real frames: does the whole road work, and does the model look?

    python -m training.overfit --drivelm_json ../shared/drivelm/drivelm_9frames.json \\
        --image_root ../shared/drivelm --output_dir outputs/nine-frames

`training.run` runs training/recipes/nine-frames.yaml: the offline parts are fitted to the questions about the given
frames, but for those with coordinates. Then the saved checkpoint is asked through the command line, in processes that
cannot import this package. Two figures: exact match with true images, and, on the questions whose answers differ
between frames, exact match after the six images of a frame with a different reference answer were put in their place.
A model that does not look cannot tell the two apart.

It is a check that the model can learn and looks. It says nothing about unseen scenes.
"""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import smoldriver_hf
from training.data.rows import Row, Rows, load_rows
from training.run import run as run_recipe
from training.stages.command_line import run
from training.stages.files import is_done, make_note, write_json, write_note
from training.stages.recipes import plan, read_recipe

ASK = Path(smoldriver_hf.__file__).with_name("__main__.py")


@dataclass
class OverfitArguments:
    drivelm_json: str = field(metadata={"help": "DriveLM train file with a handful of frames."})
    image_root: str = field(metadata={"help": "Folder that its image paths are relative to."})
    output_dir: str = field(metadata={"help": "Folder for everything."})
    recipe: str = field(default="nine-frames", metadata={"help": "Recipe of the fit, as training.run takes it."})


def fit(args: OverfitArguments) -> tuple[Path, Path, int]:
    """Run the recipe on the given frames; what is finished is kept. Returns its data, its checkpoint and the budget.

    Raises:
        ValueError: a recipe that does not prepare its data.
    """
    recipe, root = read_recipe(args.recipe), Path(args.output_dir)
    data = recipe.data or ""
    if data not in recipe.sections:
        raise ValueError(f"{recipe.file}: data must name the section that prepares the frames; got {recipe.data!r}")
    frames = {"drivelm_json": args.drivelm_json, "image_root": args.image_root}
    recipe = replace(recipe, sections=recipe.sections | {data: recipe.sections[data] | frames})
    run_recipe(recipe, root)
    stages = plan(recipe.sections, root, data)
    last = stages[list(stages)[-1]]
    (budget,) = last.arguments["num_queries"]
    return stages[data].result, last.result, budget


def ask(checkpoint: Path, images: dict[str, str], questions: list[str], budget: int | None = None) -> list[str]:
    """Answers from the command line of a process that cannot import the package (isolated, elsewhere, offline)."""
    command = [sys.executable, "-I", str(ASK.resolve()), "ask", "--checkpoint", str(checkpoint.resolve())]
    command += ["--trust-remote-code", "--json", *(["--budget", str(budget)] if budget is not None else [])]
    command += [word for camera, file in images.items() for word in ("--image", f"{camera}={file}")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*command, "--", *questions],
        cwd=checkpoint,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ChildProcessError(f"the command line failed: {done.stderr[-2000:]}")
    return [json.loads(line)["answer"] for line in done.stdout.splitlines() if line.startswith("{")]


def swaps(rows: Rows) -> dict[int, Row]:
    """For each question that frames answer differently: the images of a frame with another reference answer."""
    by_question = defaultdict(list)
    for index in range(len(rows)):
        by_question[rows[index]["question"]].append(index)
    swapped = {}
    for indices in by_question.values():
        for position, index in enumerate(indices):
            others = indices[position + 1 :] + indices[:position]
            different = [other for other in others if rows[other]["answer"] != rows[index]["answer"]]
            if different:
                swapped[index] = rows[different[0]]
    return swapped


def answers(
    checkpoint: Path, questions: dict[int, str], images: dict[int, dict[str, str]], budget: int
) -> dict[int, str]:
    """One call of the command line per distinct scene."""
    scenes = defaultdict(list)
    for index in questions:
        scenes[json.dumps(images[index], sort_keys=True)].append(index)
    found: dict[int, str] = {}
    for number, (scene, indices) in enumerate(scenes.items(), 1):
        print(f"asking about scene {number} of {len(scenes)}: {len(indices)} questions", flush=True)
        given = ask(checkpoint, json.loads(scene), [questions[index] for index in indices], budget)
        found.update(zip(indices, given, strict=True))
    return found


def compared(
    asked: dict[int, Row], true: dict[int, str], others: dict[int, Row], swapped: dict[int, str]
) -> dict[str, Any]:
    """Both figures, of answers to true and to swapped images."""

    def share(given: dict[int, str], of: Iterable[int], rows: dict[int, Row] = asked) -> float:
        indices = list(of)
        return sum(given[index] == rows[index]["answer"] for index in indices) / len(indices)

    return {
        "what": "over-fitting check: trained and asked on the same frames",
        "questions": len(asked),
        "questions_answered_differently_between_frames": len(others),
        "exact_match": share(true, asked),
        "exact_match_differing": share(true, others),
        "exact_match_differing_swapped_images": share(swapped, others),
        "swapped_answers_equal_to_the_other_frames_reference": share(swapped, others, others),
        "drop_in_points": 100 * (share(true, others) - share(swapped, others)),
    }


def main(args: OverfitArguments) -> dict[str, Any]:
    """Fit, ask, compare; writes and returns `overfit.json`.

    Raises:
        ValueError: a file or folder that is not there, or a result of other arguments.
        ChildProcessError: a stage of the recipe, or the asking, failed.
    """
    if not Path(args.drivelm_json).is_file():
        raise ValueError(f"--drivelm_json {args.drivelm_json} is not a file")
    if not Path(args.image_root).is_dir():
        raise ValueError(f"--image_root {args.image_root} is not a folder")
    file = Path(args.output_dir) / "overfit.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if is_done(file.is_file(), before.get("arguments"), asdict(args), args.output_dir):
        print(f"{file} is there already: nothing to do")
        return before
    began = time.monotonic()
    data, checkpoint, budget = fit(args)
    fitted = time.monotonic()
    rows = load_rows(data, "train")
    asked, others = dict(enumerate(rows)), swaps(rows)
    questions = {index: row["question"] for index, row in asked.items()}
    true = answers(checkpoint, questions, {index: row["images"] for index, row in asked.items()}, budget)
    swapped = answers(
        checkpoint,
        {index: questions[index] for index in others},
        {index: other["images"] for index, other in others.items()},
        budget,
    )
    result = make_note(
        "overfit",
        args,
        made_from=(checkpoint,),
        trained_on=data,
        **compared(asked, true, others, swapped),
        minutes_fitting=(fitted - began) / 60,
        minutes_asking=(time.monotonic() - fitted) / 60,
        split_hash=rows.split_hash,
    )
    details = [
        {
            "question": row["question"],
            "reference": row["answer"],
            "answer": true[index],
            "swapped_answer": swapped.get(index),
            "swapped_reference": others[index]["answer"] if index in others else None,
        }
        for index, row in asked.items()
    ]
    write_json(Path(args.output_dir) / "overfit_answers.json", details)
    write_note(args.output_dir, result)
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    run(main, OverfitArguments)
