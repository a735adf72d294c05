"""The first thing a small SmolVLM learns: its connector tells which objects a picture shows, before any language.

    python -m training.align --checkpoint outputs/base --data outputs/prepare_pictures --output_dir outputs/aligned \\
        --feature_cache outputs/features --max_steps 600 --per_device_train_batch_size 64 --learning_rate 1e-3 \\
        --use_cpu

A language model from scratch cannot ask its eyes for anything yet, so that answers teach the connector little for a
long time. Here a linear head reads the mean of a picture's visual tokens: is there one, are there several, of each
class that the toy world's listings name ("One car, two barriers.")? Then the head is thrown away. Tower and language
model stay as they are. `output_dir/final/align.json` tells how well the head knew pictures held out.
"""

import json
import shlex
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForImageTextToText, TrainingArguments, set_seed
from trl import TrlParser

from smoldriver_hf import CAMERAS
from training.assemble import save_whole
from training.baseline import SceneView, build_features, load_processor
from training.callbacks import JsonlCallback, ProgressBar
from training.features import FeatureCache
from training.questions import STATUSES, count_word, plural
from training.rows import Rows, load_rows
from training.toyworld_pictures import LISTING
from training.trainer import WholeCheckpoints, last_checkpoint

HELD_OUT = 10  # one picture in so many is held out


@dataclass
class AlignArguments:
    checkpoint: str = field(metadata={"help": "SmolVLM checkpoint."})
    data: str = field(metadata={"help": "Prepared single pictures with listings."})
    feature_cache: str = field(metadata={"help": "Folder for the tower's features."})
    split: str = field(default="train", metadata={"help": "Split to train on."})


class ConnectorWithHead(nn.Module):
    """The connector, read by a linear head that is not kept."""

    def __init__(self, connector: nn.Module, hidden_size: int):
        super().__init__()
        self.connector = connector
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.head = nn.Linear(hidden_size, 2 * len(STATUSES))

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss and logits (pictures, classes · 2) of features (pictures, patches, width)."""
        tokens = self.connector(features.to(self.head.weight.dtype))  # (pictures, tokens, text_hidden)
        logits = self.head(self.norm(tokens).mean(1))
        return {"loss": nn.functional.binary_cross_entropy_with_logits(logits, labels), "logits": logits}


class AlignTrainer(WholeCheckpoints):
    """transformers' Trainer, with whole checkpoints."""


def shown_classes(listing: str) -> list[float]:
    """[one or more, two or more] of each class in a listing's answer, flat.

    Raises:
        ValueError: a word that is neither a number nor a class.
    """
    number = {count_word(count): count for count in range(4)} | {"many": 4}
    name_of = {word: name for name in STATUSES for word in (name, plural(name))}
    counts = dict.fromkeys(STATUSES, 0)
    text = listing.rstrip(".").lower()
    for part in text.split(", ") if text != "nothing" else []:
        word, _, name = part.partition(" ")
        if word not in number or name not in name_of:
            raise ValueError(f"expected a listing like 'One car, two barriers.', got {listing!r}")
        counts[name_of[name]] = number[word]
    return [float(count >= least) for count in counts.values() for least in (1, 2)]


def listed_pictures(rows: Rows) -> list[tuple[str, list[float]]]:
    """(picture, its classes) of every picture with a listing."""
    pictures = [
        (path, shown_classes(row["answer"]))
        for row in rows
        if row["question"] == LISTING
        for path in row["images"].values()
    ]
    if not pictures:
        raise ValueError(
            f"{rows.path} has no question {LISTING!r}; training.prepare it from a toy world's pictures.json"
        )
    return pictures


def balanced_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Mean over classes of the accuracy on pictures with and without; classes that have only one kind are left out."""
    said, true = logits > 0, labels > 0
    there, absent = true.sum(0), (~true).sum(0)
    scores = ((said & true).sum(0) / there + (~said & ~true).sum(0) / absent) / 2  # (classes · 2)
    return {name: scores[start::2].nanmean().item() for start, name in enumerate(("present", "several"))}


def main(args: AlignArguments, config: TrainingArguments) -> Path:
    """Align; returns the folder of the final checkpoint."""
    output_dir = Path(config.output_dir)
    final = output_dir / "final"
    if (final / "config.json").exists():
        print(f"{final} is there already: nothing to do")
        return final
    set_seed(config.seed)
    config.remove_unused_columns = False
    model = AutoModelForImageTextToText.from_pretrained(args.checkpoint, dtype=torch.float32)
    processor = load_processor(args.checkpoint, list(CAMERAS), False, None)
    rows = load_rows(args.data, args.split)
    pictures = listed_pictures(rows)
    features = build_features(
        model, SceneView(processor, list(CAMERAS)), [path for path, _ in pictures], args.feature_cache
    )
    collate = partial(batch_of, features)
    trainer = AlignTrainer(
        model=ConnectorWithHead(model.model.connector, model.config.text_config.hidden_size),
        args=config,
        data_collator=collate,
        train_dataset=[picture for number, picture in enumerate(pictures) if number % HELD_OUT],  # type: ignore[arg-type]
        callbacks=[JsonlCallback(output_dir / "metrics.jsonl"), ProgressBar()],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))
    held_out = collate(pictures[::HELD_OUT])
    with torch.no_grad():
        known = balanced_accuracy(trainer.model(**held_out)["logits"], held_out["labels"])
    notes: dict[str, Any] = {
        "command": "python -m training.align " + shlex.join(sys.argv[1:]),
        "arguments": asdict(args),
        "seed": config.seed,
        "steps": trainer.state.global_step,
        "split_hash": rows.split_hash,
        "held_out": {"pictures": len(held_out["labels"]), "balanced_accuracy": known},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
    }
    save_whole(final, model.to(torch.bfloat16 if config.bf16 else torch.float32), processor, notes={"align": notes})
    print(json.dumps({"output_dir": str(output_dir), "steps": notes["steps"], **notes["held_out"]}))
    return final


def batch_of(features: FeatureCache, examples: list[tuple[str, list[float]]]) -> dict[str, torch.Tensor]:
    """Features (pictures, patches, width) and labels (pictures, classes · 2)."""
    return {
        "features": torch.stack([features[path] for path, _ in examples]),
        "labels": torch.tensor([shown for _, shown in examples]),
    }


if __name__ == "__main__":
    main(*TrlParser((AlignArguments, TrainingArguments)).parse_args_and_config())
