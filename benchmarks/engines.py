"""Does a model answer as well in int8, and as ONNX graphs? The same questions for every engine, on the toy world.

    python -m benchmarks.engines --checkpoint outputs/benchmark/seed0/merge \
        --data outputs/benchmark/common/prepare

`fp32` and `int8` are the presets of `smoldriver_hf.precision_smoldriver`; `onnx` and `onnx-int8` are what
`python -m hub_export onnx` makes, run by its runner in ONNX Runtime. Reported: accuracy on frames of the test split,
the share of answers that are those of `fp32` word for word, megabytes on disk. Needs the extra `export`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.toyworld.results import intervals
from hub_export.engines import onnx
from smoldriver_hf import load
from training.data.rows import Row, load_rows
from training.evaluation.predictions import choose_frames
from training.learning.features import weights_hash
from training.metrics.answers import answer_correct
from training.stages.command_line import run
from training.stages.files import command_of, write_json

ENGINES = ("fp32", "int8", "onnx", "onnx-int8")
Ask = Callable[[dict[str, str], list[str]], list[str]]
"""Images of one frame and questions → answers"""


@dataclass
class EnginesArguments:
    checkpoint: str = field(metadata={"help": "Merged checkpoint or exported folder."})
    data: str = field(metadata={"help": "Folder written by training.prepare."})
    engines: list[str] = field(
        default_factory=lambda: list(ENGINES), metadata={"help": f"fp32 and some of {', '.join(ENGINES[1:])}."}
    )
    max_frames: int = field(default=30, metadata={"help": "Frames of the test split, chosen by hash."})
    max_new_tokens: int = field(default=40, metadata={"help": "Tokens of the longest answer."})
    work_dir: str = field(default="outputs/engines", metadata={"help": "Where graphs are kept."})
    output: str = field(default="benchmarks/results/engines.json", metadata={"help": "File of the results."})


def preset(args: EnginesArguments, precision: str) -> tuple[Ask, int]:
    """A preset of `load`, and the bytes of its weights on disk, which are the checkpoint's."""
    model, processor = load(args.checkpoint, precision=precision)

    def ask(images: dict[str, str], questions: list[str]) -> list[str]:
        answers = model.encode_scene(images, processor).ask_all(questions, max_new_tokens=args.max_new_tokens)
        return [answer.text for answer in answers]

    return ask, size_of(Path(args.checkpoint), "*.safetensors")


def graphs(args: EnginesArguments, int8: bool, weights: str) -> tuple[Ask, int]:
    """The runner of exported graphs, made unless they are there, and their bytes."""
    folder = Path(args.work_dir) / f"{weights[:12]}-{'int8' if int8 else 'fp32'}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        onnx.main(onnx.OnnxArguments(args.checkpoint, str(folder), int8=int8))
    runner = onnx.OnnxSmolDriver(folder)

    def ask(images: dict[str, str], questions: list[str]) -> list[str]:
        return runner.ask_all(images, questions, args.max_new_tokens)

    return ask, size_of(folder, "*.onnx*") + size_of(folder, "*.safetensors")


def size_of(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))


def answers_of(ask: Ask, frames: Sequence[Any], title: str) -> list[str]:
    """Answers to all questions of all frames, in order."""
    found: list[str] = []
    for frame, questions in tqdm(frames, desc=title, unit="frame"):
        found += ask(frame["images"], [row["question"] for row in questions])
    return found


def figures(rows: Sequence[Row], answers: Sequence[str], reference: Sequence[str]) -> dict[str, Any]:
    """Accuracy on all and on perception questions, with intervals over scenes, and agreement with the reference."""
    scores = {}
    for row, said in zip(rows, answers, strict=True):
        right = float(answer_correct(row["question"], row["answer"], said))
        scores[row["question_id"]] = (row["scene_token"], row["category"], right)
    return {
        **{group: asdict(interval) for group, interval in intervals(scores).items()},
        "same_answer": sum(a == b for a, b in zip(answers, reference, strict=True)) / len(rows),
    }


def main(args: EnginesArguments) -> dict[str, Any]:
    """Ask every engine and write the results; returns them.

    Raises:
        ValueError: an unknown engine, or others without fp32, which they are compared with.
    """
    if not set(args.engines) <= set(ENGINES) or "fp32" not in args.engines:
        raise ValueError(f"--engines takes fp32 and some of {', '.join(ENGINES[1:])}; got {args.engines}")
    rows = load_rows(args.data, "test")
    frames = choose_frames(rows, args.max_frames)
    asked = [row for _, questions in frames for row in questions]
    weights = weights_hash(load(args.checkpoint)[0])
    engines: dict[str, Any] = {}
    reference: list[str] = []
    for engine in sorted(args.engines, key=ENGINES.index):  # fp32 first
        if engine.startswith("onnx"):
            ask, size = graphs(args, engine.endswith("int8"), weights)
        else:
            ask, size = preset(args, engine)
        answers = answers_of(ask, frames, engine)
        reference = reference or answers
        engines[engine] = {"megabytes": size / 1e6, **figures(asked, answers, reference)}
        print(f"{engine}: {json.dumps(engines[engine])}", flush=True)
    results = {
        "command": command_of("engines", args, package="benchmarks"),
        "questions": len(asked),
        "frames": len(frames),
        "split_hash": rows.split_hash,
        "weights_sha256": weights,
        "seed": None,  # answers are greedy: nothing is drawn
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime")},
        "engines": engines,
    }
    write_json(args.output, results, indent=1)
    return results


if __name__ == "__main__":
    run(main, EnginesArguments)
