"""What a checkpoint costs on this machine, measured: the table of costs in its card.

    python -m hub_export cost outputs/run/final --out outputs/cost.json
    python -m hub_export build --checkpoint outputs/run/final --cost outputs/cost.json --out outputs/smoldriver

For each budget it takes the median over `--rounds` of four clocks: look (a JPEG file of 800x450 pixels per camera is
read and encoded), the first token of an answer about them, each further token, and all the way to the first token.
Only one model on one machine is measured, so these are no ratios to other models; `benchmarks.speed` measures those.
"""

import json
import platform
import shlex
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tqdm import tqdm

from hub_export.files import check_model, whole
from hub_export.reference import QUESTION, reference_scene
from smoldriver_hf import load

IMAGE_SIZE = (800, 450)


@dataclass
class CostArguments:
    folder: str = field(metadata={"help": "Exported folder or checkpoint.", "positional": True})
    out: str = field(metadata={"help": "JSON file to write."})
    budgets: list[int] = field(default_factory=list, metadata={"help": "Per camera; default: 1, 4, 16, … and all."})
    rounds: int = field(default=5, metadata={"help": "How often each is measured; the median counts."})
    new_tokens: int = field(default=16, metadata={"help": "Longest answer."})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, or auto: as the weights are."})


def default_budgets(processor: Any) -> list[int]:
    """Powers of four below the most that the model has, and that."""
    if processor.queries_per_token > 1:
        return [processor.max_queries]
    powers = (4**exponent for exponent in range(16))
    return [power for power in powers if power < processor.max_queries] + [processor.max_queries]


def command_of(args: CostArguments) -> str:
    """The command that measures the same."""
    plain = asdict(CostArguments(args.folder, args.out))
    words = [args.folder, "--out", args.out]
    for name, value in asdict(args).items():
        if value != plain[name]:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return f"python -m hub_export cost {shlex.join(words)}"


def device_name(model: torch.nn.Module) -> str:
    """The accelerator, or the processor with the number of threads that were used."""
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{named or platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"


def measure(
    model: Any, processor: Any, paths: dict[str, str], budget: int, new_tokens: int
) -> dict[str, float | None]:
    """Seconds of one round at one budget; further_token is None where the answer has one token only."""
    began = time.perf_counter()
    scene = model.encode_scene(paths, processor, num_queries=budget)
    looked = time.perf_counter()
    scene.ask(QUESTION, max_new_tokens=1)
    first = time.perf_counter()
    (answer,) = scene.ask_all([QUESTION], batch_size=1, max_new_tokens=new_tokens)
    whole = time.perf_counter() - first
    more = len(answer.token_ids) - 1
    return {
        "look": looked - began,
        "first_token": first - looked,
        "further_token": max(0.0, whole - (first - looked)) / more if more > 0 else None,
        "look_and_first_token": first - began,
    }


def main(args: CostArguments) -> Path:
    """Measure and write; returns the file.

    Raises:
        ValueError: there is no model.
    """
    check_model(args.folder)
    model, processor = load(args.folder, precision=None, dtype=args.dtype, trust_remote_code=True)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    budgets = args.budgets or default_budgets(processor)
    rounds: dict[int, list[dict[str, float | None]]] = {budget: [] for budget in budgets}
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for camera, pixels in reference_scene(processor.cameras).items():
            paths[camera] = str(Path(folder) / f"{camera}.jpg")
            Image.fromarray(pixels).resize(IMAGE_SIZE, Image.Resampling.BICUBIC).save(paths[camera])
        for number in tqdm(range(args.rounds + 1), desc="cost", unit="round"):
            for budget in budgets:  # in turn, so that what slows the machine down meets all budgets
                seconds = measure(model, processor, paths, budget, args.new_tokens)
                if number:  # the first round warms up
                    rounds[budget].append(seconds)
    rows = []
    for budget in budgets:
        row: dict[str, Any] = {
            "queries per camera": budget,
            "visual tokens per scene": processor.num_image_tokens(budget) * len(processor.cameras),
        }
        for name in rounds[budget][0]:
            known = [value for seconds in rounds[budget] if (value := seconds[name]) is not None]
            row[f"{name.replace('_', ' ')}, s"] = round(statistics.median(known), 4) if known else "–"
        rows.append(row)
    report = {
        "command": command_of(args),
        "device": f"{device_name(model)}, {str(model.dtype).removeprefix('torch.')}",
        "rounds": args.rounds,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": rows,
    }
    with whole(Path(args.out)) as unfinished:
        unfinished.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(rows, indent=2))
    return Path(args.out)
