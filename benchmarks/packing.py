"""What scene packing and the feature cache save: the same training steps done four ways, in turns, in one run.

    python -m benchmarks.packing --output benchmarks/results/packing.json
    python -m benchmarks.packing --output outputs/quick.json --quick    # tiny: shows that it works, says nothing
    about speed

A step learns one frame's questions: six cameras, a frozen tower, gradients for projector and language model, AdamW. It
is done with a row per question (in batches of `rows_per_batch`, gradients summed) or with all questions behind one
image prefix, and with the tower run in every step or its features read from disk. The sizes are SmolLM2-135M's and
DINOv2-S's at 224 pixels, layers and vocabulary divided by `divisor`, with random weights.

Seconds are CPU seconds of one thread, so that other work on the machine does not count. Reading images or features is
part of a step, as in training without worker processes; "model" leaves it out. Only ratios within one file mean much.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from benchmarks.speed import parts
from smoldriver_hf import CAMERAS
from training.learning.collate import IGNORED, PackedSceneCollator, SceneCollator
from training.learning.features import FeatureCache
from training.stages.command_line import run
from training.stages.files import write_json

ANSWERS = (
    "Yes.",
    "Going ahead.",
    "The action is to keep going at the same speed. The reason is that there is no safety issue.",
    "No, there are none.",
    "The ego vehicle is slightly steering to the left. The ego vehicle is driving slowly.",
)


@dataclass
class PackingArguments:
    output: str = field(metadata={"help": "File of the results."})
    quick: bool = field(default=False, metadata={"help": "Tiny models and one round."})
    questions: int = field(default=16, metadata={"help": "Of the frame."})
    num_queries: int = field(default=16, metadata={"help": "Visual tokens per camera."})
    rows_per_batch: int = field(default=4, metadata={"help": "Where each question has a row of its own."})
    divisor: int = field(default=6, metadata={"help": "Of the layers and of the vocabulary."})
    rounds: int = field(default=3, metadata={"help": "How often each way is measured; medians are reported."})


def scale_of(args: PackingArguments) -> parts.Scale:
    """SmolVLM2-256M's text dimensions and DINOv2-S's, thinned out."""
    if args.quick:
        return parts.QUICK
    text, dino = dict(parts.FULL.text), dict(parts.FULL.dino)
    for sizes, name in ((text, "num_hidden_layers"), (text, "vocab_size"), (dino, "num_hidden_layers")):
        sizes[name] //= args.divisor
    return replace(parts.FULL, text=text, dino=dino)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[dict[str, torch.Tensor]]) -> float:
    """One optimiser step on the mean over all answer tokens of all batches; returns that loss."""
    tokens = sum((batch["labels"] != IGNORED).sum() for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(**batch, use_cache=False, num_items_in_batch=tokens).loss
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total


Way = tuple[str, str]  # how questions are put into sequences, and whether features are cached
WAYS: list[Way] = [(packed, cached) for packed in ("one per sequence", "packed") for cached in ("live", "cached")]


def measured(
    model: torch.nn.Module, processor: Any, optimizer: torch.optim.Optimizer, args: PackingArguments
) -> tuple[dict[Way, list[tuple[float, float]]], dict[Way, float], dict[Way, int]]:
    """Seconds of every round, with and without reading the images; the loss, and the tokens, of every way."""
    with tempfile.TemporaryDirectory() as folder:
        images = parts.write_images(Path(folder), list(CAMERAS))
        cache = FeatureCache.build(model, processor, images.values(), Path(folder) / "features")
        pairs = [(question, ANSWERS[i % len(ANSWERS)]) for i, question in enumerate(parts.questions(args.questions))]
        frame = [{"images": images, "pairs": pairs}]
        rows = [{"images": images, "pairs": [pair]} for pair in pairs]
        batches_of_rows = [rows[i : i + args.rows_per_batch] for i in range(0, len(rows), args.rows_per_batch)]
        examples = {"one per sequence": batches_of_rows, "packed": [frame]}
        collators = {"one per sequence": SceneCollator, "packed": PackedSceneCollator}
        features = {"live": None, "cached": cache}
        ways = {}
        for put, kept in WAYS:
            collator = collators[put](processor, num_queries=args.num_queries, features=features[kept])
            ways[put, kept] = (collator, examples[put])
        seconds: dict[Way, list[tuple[float, float]]] = {way: [] for way in WAYS}
        losses: dict[Way, float] = {}
        lengths: dict[Way, int] = {}
        for _ in tqdm(range(1 if args.quick else args.rounds), desc="Rounds"):
            for way, (collator, batched) in ways.items():
                start = time.process_time()
                batches = [collator(batch) for batch in batched]
                read = time.process_time() - start
                losses[way] = step(model, optimizer, batches)
                lengths[way] = sum(batch["input_ids"].numel() for batch in batches)
                seconds[way].append((time.process_time() - start, time.process_time() - start - read))
    return seconds, losses, lengths


def main(args: PackingArguments) -> dict[str, Any]:
    """Measure and write the file; returns what it holds."""
    torch.set_num_threads(1)
    config = parts.smoldriver_config(scale_of(args), "dino")
    processor = parts.smoldriver_processor(config)
    model = parts.smoldriver(config, torch.float32).train()
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False).eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)  # every step starts from the same weights

    seconds, losses, lengths = measured(model, processor, optimizer, args)
    result = {
        "settings": {name: value for name, value in asdict(args).items() if name != "output"},
        "layers": {"text": config.text_config.num_hidden_layers, "tower": config.vision_config.num_hidden_layers},
        "parameters_million": round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1),
        "image_size": config.image_size,
        "machine": {"cpu": platform.processor() or platform.machine(), "load": os.getloadavg()[0]},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "ways": {},
        "ratios": {},
    }
    medians = {}
    for way, rounds in seconds.items():
        whole, model_only = (statistics.median(values) for values in zip(*rounds, strict=True))
        medians[way] = (whole, model_only)
        result["ways"][", ".join(way)] = {
            "questions_per_second": args.questions / whole,
            "questions_per_second_model": args.questions / model_only,
            "seconds": [round(value, 3) for value, _ in rounds],
            "tokens": lengths[way],
            "loss": losses[way],
        }
    rows_live, rows_cached, packed_live, packed_cached = WAYS
    for name, slow, fast in (
        ("packed over one per sequence, live", rows_live, packed_live),
        ("packed over one per sequence, cached", rows_cached, packed_cached),
        ("cached over live, packed", packed_live, packed_cached),
        ("cached over live, one per sequence", rows_live, rows_cached),
        ("packed and cached over neither", rows_live, packed_cached),
    ):
        whole, model_only = (before / after for before, after in zip(medians[slow], medians[fast], strict=True))
        result["ratios"][name] = {"whole": round(whole, 2), "model": round(model_only, 2)}

    write_json(args.output, result)
    print(json.dumps(result["ratios"], indent=2))
    return result


if __name__ == "__main__":
    run(main, PackingArguments)
