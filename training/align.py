"""The first thing a small SmolVLM learns: its connector tells which objects a picture shows, before any language.

    python -m training.align --checkpoint outputs/base --data outputs/prepare_pictures --output_dir outputs/aligned \\
        --feature_cache outputs/features --max_steps 600 --per_device_train_batch_size 64 --learning_rate 1e-3 \\
        --use_cpu

A language model from scratch cannot ask its eyes for anything yet, so that answers teach the connector little for a
long time. Here visual tokens move, in the language model's embedding space, to the words that tell what the picture
shows ("parked", "car", "cars", "bends", as in answers about it): the best of a picture's tokens for a word is as much
like that word's embedding as the picture is likely to show it. Tower and language model stay as they are.
`output_dir/final/align.json` tells how well words tell pictures of held-out scenes apart, on average.

In the end the connector is scaled so that visual tokens are as long as words. A linear connector on thousands of
inputs makes them a hundred times as long, and attention can then write nothing into them that counts, such as which
camera they are of.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from trl import TrlParser

from smoldriver_hf import load_strictly
from training.checkpoints.folders import save_whole
from training.data.rig import EXTRA_VIEWS
from training.data.rows import Rows, load_rows
from training.data.wording import STATUSES, plural
from training.learning.callbacks import JsonlCallback, started_note
from training.learning.checks import is_finished, record_arguments
from training.learning.features import FeatureCache
from training.learning.smolvlm import build_features, load_processor
from training.learning.trainer import WholeCheckpoints, last_checkpoint
from training.stages.command_line import run
from training.stages.recipes import Stage
from training.toyworld.pictures import LISTING, UNTELLING

HELD_OUT = 10  # one scene in so many is held out
RARE, USUAL = 0.01, 0.9  # words that fewer or more of the pictures show teach nothing
SCALED_ON = 256  # pictures to measure the length of visual tokens on


@dataclass
class AlignArguments:
    checkpoint: str = field(metadata={"help": "SmolVLM checkpoint."})
    data: str = field(metadata={"help": "Prepared single pictures with listings."})
    feature_cache: str = field(metadata={"help": "Folder for the tower's features."})
    split: str = field(default="train", metadata={"help": "Split to train on."})


class ConnectorToWords(nn.Module):
    """The connector, and how much each word is seen in its tokens.

    Args:
        connector: features → visual tokens.
        words: (words, text_hidden), their embeddings; they do not change.
        shares: (words,) of pictures that show each.
    """

    def __init__(self, connector: nn.Module, words: torch.Tensor, shares: torch.Tensor):
        super().__init__()
        self.connector = connector
        self.register_buffer("words", nn.functional.normalize(words.detach(), dim=-1))
        self.scale = nn.Parameter(torch.tensor(5.0))
        self.bias = nn.Parameter(shares.logit())

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss and logits (pictures, words) of features (pictures, patches, width)."""
        tokens = self.connector(features.to(self.words.dtype))  # (pictures, tokens, text_hidden)
        likeness = nn.functional.normalize(tokens, dim=-1) @ self.words.T  # (pictures, tokens, words)
        logits = (self.scale * likeness).logsumexp(1) - math.log(tokens.shape[1]) + self.bias
        return {"loss": nn.functional.binary_cross_entropy_with_logits(logits, labels), "logits": logits}


@dataclass(frozen=True)
class Picture:
    """A picture, its scene, and the words for what it shows."""

    path: str
    scene: str
    words: frozenset[str]


def words_shown(answers: Mapping[str, str]) -> frozenset[str]:
    """All words of a picture's answers that tell what is there, and one and many of every class that it shows.

    "Cars" are asked for where there is one. "Yes." and a number tell nothing without their question.
    """
    telling = [answer.lower() for answer in answers.values() if answer not in UNTELLING]
    classes = [
        {*name.split(), *plural(name).split()}
        for name in STATUSES
        if re.search(rf"\b({name}|{plural(name)})\b", answers[LISTING].lower())
    ]
    return frozenset(re.findall("[a-z]+", " ".join(telling))).union(*classes)


def listed_pictures(rows: Rows) -> list[Picture]:
    """Every picture with a listing.

    Raises:
        ValueError: there is none.
    """
    answers: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        for path in row["images"].values():
            answers.setdefault((path, row["scene_token"]), {})[row["question"]] = row["answer"]
    pictures = [
        Picture(path, scene, words_shown(texts)) for (path, scene), texts in answers.items() if LISTING in texts
    ]
    if not pictures:
        raise ValueError(
            f"{rows.path} has no question {LISTING!r}; training.prepare it from a toy world's pictures.json"
        )
    return pictures


def words_to_learn(pictures: Sequence[Picture], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Word → its token, of words that are one token and neither rare nor usual; in alphabetical order.

    Raises:
        ValueError: there is none.
    """
    counts = Counter(word for picture in pictures for word in picture.words)
    tokens = {
        word: tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        for word in sorted(counts)
        if RARE <= counts[word] / len(pictures) <= USUAL
    }
    single = {word: ids[0] for word, ids in tokens.items() if len(ids) == 1}
    if not single:
        raise ValueError(
            f"no word that between {RARE:.0%} and {USUAL:.0%} of the pictures show is one token; these words are: "
            f"{', '.join(tokens) or 'none'}"
        )
    return single


def area_under_curve(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean over words of the chance that a picture with the word scores higher than one without.

    Words that all pictures show, or none, are left out.
    """
    both = labels.any(0) & ~labels.all(0)  # (words)
    return float(roc_auc_score(labels[:, both].numpy(), logits[:, both].numpy(), average="macro"))


@torch.no_grad()
def as_long_as_words(connector: nn.Module, features: torch.Tensor, embeddings: torch.Tensor) -> None:
    """Scale a linear connector so that its tokens are on average as long as the embeddings of words."""
    ratio = embeddings.norm(dim=-1).mean() / connector(features).norm(dim=-1).mean()
    for weight in connector.parameters():
        weight *= ratio


def held_out(folder: Path) -> dict[str, Any]:
    """How well the words of held-out pictures are told apart, from the note."""
    return json.loads((folder / "final" / "align.json").read_text())["held_out"]


STAGE = Stage(
    start="checkpoint",
    inputs=("checkpoint", "data"),
    caches=("feature_cache",),
    result=lambda arguments: "final",
    resumes=True,
    figures=held_out,
)


def main(args: AlignArguments, config: TrainingArguments) -> Path:
    """Align; returns the folder of the final checkpoint."""
    output_dir = Path(config.output_dir)
    final = output_dir / "final"
    rows = load_rows(args.data, args.split)
    if is_finished(final, args, config, rows):
        return final
    note = started_note("align", args, config, rows, [args.checkpoint])
    set_seed(config.seed)
    config.remove_unused_columns = False
    model = load_strictly(args.checkpoint, dtype=torch.float32)
    processor = load_processor(args.checkpoint, [view for view in rows.cameras if view not in EXTRA_VIEWS])
    pictures = listed_pictures(rows)
    held_out_scenes = set(sorted({picture.scene for picture in pictures})[::HELD_OUT])
    train = [picture for picture in pictures if picture.scene not in held_out_scenes]
    held_out = [picture for picture in pictures if picture.scene in held_out_scenes]
    words = words_to_learn(train, processor.tokenizer)
    paths = [picture.path for picture in pictures]
    features = build_features(model, processor.image_processor, paths, args.feature_cache)
    collate = partial(batch_of, features, list(words))
    embeddings = model.get_input_embeddings().weight
    shares = torch.tensor([[word in picture.words for word in words] for picture in train]).float().mean(0)
    trainer = WholeCheckpoints(
        model=ConnectorToWords(model.model.connector, embeddings[list(words.values())], shares),
        args=config,
        data_collator=collate,
        train_dataset=train,  # type: ignore[arg-type]
        callbacks=[JsonlCallback(output_dir / "metrics.jsonl")],
    )
    record_arguments(args, config, rows)
    trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))
    unseen = collate(held_out)
    with torch.no_grad():
        logits = trainer.model(**unseen)["logits"]
    as_long_as_words(model.model.connector, collate(train[:SCALED_ON])["features"].float(), embeddings)
    note |= {
        "steps": trainer.state.global_step,
        "words": list(words),
        "held_out": {"pictures": len(held_out), "area_under_curve": area_under_curve(logits, unseen["labels"])},
    }
    save_whole(final, model.to(torch.bfloat16 if config.bf16 else torch.float32), processor, note=note)
    print(json.dumps({"output_dir": str(output_dir), "steps": note["steps"], **note["held_out"]}))
    return final


def batch_of(features: FeatureCache, words: list[str], pictures: list[Picture]) -> dict[str, torch.Tensor]:
    """Features (pictures, patches, width) and labels (pictures, words)."""
    return {
        "features": torch.stack([features[picture.path] for picture in pictures]),
        "labels": torch.tensor([[float(word in picture.words) for word in words] for picture in pictures]),
    }


if __name__ == "__main__":
    run(main, AlignArguments, TrainingArguments, parser=TrlParser)
