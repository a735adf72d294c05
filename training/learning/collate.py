"""Frames and their questions → training batches: one question per row, or all of a frame's questions in one sequence.

`SceneCollator` makes a row per question. `PackedSceneCollator` writes a frame's images once and its questions behind
them; a mask lets each question see the images and itself only, and its positions continue where the images end, so
that loss and gradients are those of separate rows while the images are encoded once:

    input_ids      <images> <question 1> <answer 1> <question 2> <answer 2>
    position_ids    0 … p-1  p …                     p …
    learnt                               answer 1                 answer 2      (with the token that ends the turn)

The loss is the mean over all answer tokens of a batch in both. An average over questions would weigh a token by the
length of its neighbours' answers and would not be the same for packed and separate rows.

Prompts come from the processor only, and the ids of a prompt are those that generation sees: prompt and answer are
tokenised apart. That is also the tokenisation of the whole conversation, except where a tokenizer merges the end of a
prompt with the start of an answer.

A list of budgets draws one per batch, from a hash of the seed, the epoch and the batch's questions; in the same way
the questions are drawn that an example wants in other words (`reword`). Drawing from a random generator would not
survive a restart: data loaders prefetch, and skip without collating.
"""

import hashlib
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from smoldriver_hf import user_message
from training.data.rewording import reword
from training.data.rig import Rig
from training.learning.looking import ASKED_CAMERAS, TOKEN_CAMERAS

IGNORED = -100  # the label of what is not learnt
MOST_KNOWN = 50_000  # questions with answers whose token ids a collator keeps

Example = Mapping[str, Any]
"""`{"images": {camera: path or picture}, "pairs": [(question, answer), …]}`, perhaps with `reword`, the share of
questions to ask in other words."""


@dataclass(frozen=True)
class EncodedFrame:
    """Token ids of one example.

    Attributes:
        prefix: everything up to the last visual token, the same for all questions; empty without images.
        pairs: per question the rest of its prompt, and its answer with the token that ends the turn.
        prefix_cameras: per token of the prefix the bit of the camera whose visual token it is, else 0.
        asked_cameras: per question the bits of the cameras that it names.
    """

    prefix: list[int]
    pairs: list[tuple[list[int], list[int]]]
    prefix_cameras: list[int]
    asked_cameras: list[int]


class SceneCollator:
    """Examples of one question each → a batch with one row per question.

    Returns, with right padding: `input_ids`, `attention_mask` and `labels` (batch, sequence), -100 outside answers;
    `pixel_values` (images, 3, height, width), or `vision_features` (images, patches, vision_hidden) with a cache;
    `camera_ids` (images,). A batch without images has none of the last two.

    Args:
        processor: the `SmolDriverProcessor`.
        cameras: which of an example's images to show; default all. Images that an example lacks are left out; an empty
            list makes blind, text-only prompts.
        num_queries: budget per camera, a list from which one is drawn per batch, or the processor's own.
        features: image path → (patches, vision_hidden), a `features.FeatureCache`, in place of pixels.
        seed: of the draws of budgets.
        rig: tells which cameras a question names; with one, a batch also holds what `CameraAttention.loss` takes.

    Raises:
        ValueError: from the constructor for unknown cameras and budgets, from a call for examples that are not usable.
    """

    def __init__(
        self,
        processor: Any,
        cameras: Sequence[str] | None = None,
        num_queries: int | Sequence[int] | None = None,
        features: Mapping[str, torch.Tensor] | None = None,
        seed: int = 0,
        rig: Rig | None = None,
    ):
        self.processor = processor
        self.rig = rig
        if processor.tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token; batches need one")
        unknown = [name for name in cameras or [] if name not in processor.cameras]
        if unknown:
            raise ValueError(f"unknown camera {unknown[0]!r}; this model knows {processor.cameras}")
        self.cameras = None if cameras is None else list(cameras)
        if num_queries is None:
            num_queries = processor.num_queries
        self.budgets = [num_queries] if isinstance(num_queries, int) else list(num_queries)
        if not self.budgets:
            raise ValueError("num_queries must be an integer or a list of at least one; got an empty list")
        for budget in self.budgets:
            processor.num_image_tokens(budget)
        self.features = features
        self.seed = seed
        self.epoch = 0
        self._known: dict[tuple[str, str, tuple[str, ...]], tuple[list[int], list[int]]] = {}
        self._prefixes: dict[tuple[tuple[str, ...], int], list[int]] = {}

    def set_epoch(self, epoch: int) -> None:
        """Vary the draws of budgets and words from epoch to epoch; `DrawByEpoch` calls it."""
        self.epoch = epoch

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        budget = self.draw_budget(examples)
        rows = [self.encode(self.in_other_words(example), budget) for example in examples]
        return {**self._text(rows), **self.vision(examples, budget)}

    def sequence_length(self, example: Example) -> int:
        """Tokens of an example's sequence at the largest budget, found without opening an image."""
        frame = self.encode(example, max(self.budgets))
        return len(frame.prefix) + sum(len(question) + len(answer) for question, answer in frame.pairs)

    def draw_budget(self, examples: Sequence[Example]) -> int:
        """The budget of a batch, which depends on the seed, the epoch and the batch's own questions and images'
        file names."""
        if len(self.budgets) == 1:
            return self.budgets[0]
        return self.budgets[self._drawn_from(examples) % len(self.budgets)]

    def in_other_words(self, example: Example) -> Example:
        """An example with its share of questions reworded, which depends on what `draw_budget` does."""
        share = example.get("reword", 0.0)
        if not share:
            return example
        rng = random.Random(self._drawn_from([example]))
        pairs = [(reword(ask, rng) if rng.random() < share else ask, answer) for ask, answer in example["pairs"]]
        return {**example, "pairs": pairs}

    def _drawn_from(self, examples: Sequence[Example]) -> int:
        """A number from the seed, the epoch, questions and images' file names."""
        digest = hashlib.sha256(f"{self.seed} {self.epoch}".encode())
        for example in examples:
            images = [image for image in example["images"].values() if isinstance(image, str | os.PathLike)]
            names = sorted(os.path.basename(image) for image in images)  # the same wherever the data lies
            digest.update(repr((names, [tuple(pair) for pair in example["pairs"]])).encode())
        return int.from_bytes(digest.digest()[:8], "big")

    def shown(self, example: Example) -> dict[str, Any]:
        """{camera: image} of what the model is to see, in the order of `processor.cameras`."""
        images = example["images"]
        wanted = list(images) if self.cameras is None else self.cameras
        unknown = [name for name in wanted if name not in self.processor.cameras]
        if unknown:
            raise ValueError(
                f"the example has an image of {unknown[0]!r}, but this model knows {self.processor.cameras}; name the "
                "cameras to show in `cameras`"
            )
        chosen = {name: images[name] for name in self.processor.cameras if name in wanted and name in images}
        if not chosen and self.cameras != []:
            raise ValueError(f"the example has images of {list(images)}, none of the wanted {wanted}")
        return chosen

    def encode(self, example: Example, num_queries: int) -> EncodedFrame:
        """Token ids of an example's prompts and answers at a budget."""
        cameras = tuple(self.shown(example))
        if not example["pairs"]:
            raise ValueError("an example needs at least one (question, answer) pair; got none")
        written = [self._written(question, answer, cameras, num_queries) for question, answer in example["pairs"]]
        prefix = self._prefixes[cameras, num_queries]
        tokens = self.processor.num_image_tokens(num_queries)
        owners = iter([self.bit(camera) for camera in cameras for _ in range(tokens)])
        return EncodedFrame(
            list(prefix),
            written,
            [next(owners) if token == self.processor.image_token_id else 0 for token in prefix],
            [self.named_in(question) for question, _ in example["pairs"]],
        )

    def _written(
        self, question: str, answer: str, cameras: tuple[str, ...], num_queries: int
    ) -> tuple[list[int], list[int]]:
        """Token ids of a prompt behind its last visual token, and of its answer; those before are in `_prefixes`.

        What was once written is kept: rendering a chat template is slow, and frames share most of their questions.
        """
        key = (question, answer, cameras)
        if key in self._known and (cameras, num_queries) in self._prefixes:
            return self._known[key]
        if not answer.strip():
            raise ValueError(f"the question {question!r} has an empty answer; there is nothing to learn from it")
        processor = self.processor
        prompt = processor.prompt(question, cameras)
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        whole = processor.apply_chat_template([user_message(question, cameras), reply])
        if not whole.startswith(prompt):
            raise ValueError(f"the chat template writes a prompt differently once it is answered: {prompt!r}")
        ids = processor.ids_of(prompt, num_queries)
        # Ends with the token that ends the turn.
        answer_ids = processor.tokenizer(whole[len(prompt) :].rstrip(), add_special_tokens=False)["input_ids"]

        # No tokenizer merges anything with a placeholder, so ids up to the last one do not depend on the question, and
        # those behind it not on the budget.
        cut = len(ids) - ids[::-1].index(processor.image_token_id) if cameras else 0
        if self._prefixes.setdefault((cameras, num_queries), ids[:cut]) != ids[:cut]:
            raise ValueError("the chat template writes text that depends on the question before the images")
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known[key] = (ids[cut:], answer_ids)
        return self._known[key]

    def bit(self, camera: str) -> int:
        """A camera in a sum of cameras, which fits an integer for up to 62 of them."""
        return 1 << self.processor.cameras.index(camera)

    def named_in(self, question: str) -> int:
        """The sum of the cameras that a question names, of those that the model knows; 0 without a rig."""
        named = self.rig.named_in(question) if self.rig is not None else ()
        return sum(self.bit(camera) for camera in named if camera in self.processor.cameras)

    def _text(self, rows: list[EncodedFrame]) -> dict[str, torch.Tensor]:
        """Padded ids, labels and mask, each (batch, sequence).

        Raises:
            ValueError: rows of more than one question, which this attention mask would let see each other.
        """
        if most := [row for row in rows if len(row.pairs) > 1]:
            raise ValueError(
                f"expected examples of one question, got {len(most[0].pairs)}; PackedSceneCollator takes whole frames"
            )
        return self._padded(rows)

    def _padded(self, rows: list[EncodedFrame]) -> dict[str, torch.Tensor]:
        """Each (batch, sequence)."""
        ids, labels, asked = [], [], []
        for row in rows:
            ids.append(list(row.prefix))
            labels.append([IGNORED] * len(row.prefix))
            asked.append([0] * len(row.prefix))
            for (question, answer), cameras in zip(row.pairs, row.asked_cameras, strict=True):
                ids[-1] += question + answer
                labels[-1] += [IGNORED] * len(question) + answer
                # Where the next token is one of the answer's: that is when it should look.
                asked[-1] += [0] * (len(question) - 1) + [cameras] * len(answer) + [0]
        batch = {
            "input_ids": _pad(ids, self.processor.tokenizer.pad_token_id),
            "attention_mask": _pad([[1] * len(row) for row in ids], 0),
            "labels": _pad(labels, IGNORED),
        }
        if self.rig is None:
            return batch
        shown = torch.zeros_like(batch["input_ids"])
        for number, row in enumerate(rows):
            shown[number, : len(row.prefix)] = torch.tensor(row.prefix_cameras, dtype=torch.long)
        return {**batch, TOKEN_CAMERAS: shown, ASKED_CAMERAS: _pad(asked, 0)}

    def vision(self, examples: Sequence[Example], num_queries: int) -> dict[str, torch.Tensor]:
        """The part of a batch that shows images, or their features; examples need no questions for it."""
        scenes = [scene for scene in map(self.shown, examples) if scene]
        if not scenes:
            return {}
        if self.features is None:
            inputs = self.processor(images=scenes, num_queries=num_queries, return_tensors="pt")
            return {"pixel_values": inputs["pixel_values"], "camera_ids": inputs["camera_ids"]}
        names = [name for scene in scenes for name in scene]
        return {
            "vision_features": torch.stack([self.features[path] for scene in scenes for path in scene.values()]),
            "camera_ids": torch.tensor([self.processor.cameras.index(name) for name in names]),
        }


class PackedSceneCollator(SceneCollator):
    """Examples of one frame each → a batch with one sequence per frame, its questions behind one image prefix.

    As `SceneCollator`, but `attention_mask` is (batch, 1, sequence, sequence), to be taken as it is: bool for sdpa, or
    additive in `mask_dtype` for eager attention (see `packed_mask_dtype`); and there are `position_ids` (batch,
    sequence).

    Args:
        mask_dtype: `torch.bool`, or the floating type of an additive mask.
        Others: see `SceneCollator`.
    """

    def __init__(
        self,
        processor: Any,
        cameras: Sequence[str] | None = None,
        num_queries: int | Sequence[int] | None = None,
        features: Mapping[str, torch.Tensor] | None = None,
        seed: int = 0,
        rig: Rig | None = None,
        mask_dtype: torch.dtype = torch.bool,
    ):
        super().__init__(processor, cameras, num_queries, features, seed, rig)
        self.mask_dtype = mask_dtype

    def _text(self, rows: list[EncodedFrame]) -> dict[str, torch.Tensor]:
        batch = self._padded(rows)
        positions, groups = [], []
        for row in rows:
            positions.append(list(range(len(row.prefix))))
            groups.append([0] * len(row.prefix))
            for number, (question, answer) in enumerate(row.pairs, start=1):
                length = len(question) + len(answer)
                positions[-1] += range(len(row.prefix), len(row.prefix) + length)
                groups[-1] += [number] * length
        batch["position_ids"] = _pad(positions, 0)
        visible = _visible(_pad(groups, -1))
        if self.mask_dtype != torch.bool:
            lowest = torch.finfo(self.mask_dtype).min
            visible = torch.zeros(visible.shape, dtype=self.mask_dtype).masked_fill(~visible, lowest)
        batch["attention_mask"] = visible
        return batch


class DrawByEpoch(TrainerCallback):
    """Tells the collator the epoch, so that a frame meets other budgets and words in the next one, also after a
    restart.

    Args:
        collator: what draws.
        reword: whether examples ask for other words.
    """

    def __init__(self, collator: SceneCollator, reword: bool = False):
        self.collator = collator
        self.draws = reword or len(collator.budgets) > 1

    def on_train_begin(self, args, state, control, **kwargs):
        if args.dataloader_persistent_workers and self.draws:
            raise ValueError(
                "persistent data loader workers never hear of the epoch; they cannot draw budgets or words by it"
            )

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(int(state.epoch or 0))


def packed_mask_dtype(model: PreTrainedModel) -> torch.dtype:
    """What `PackedSceneCollator(mask_dtype=…)` must be for a model's attention.

    Raises:
        ValueError: the attention implementation takes no ready mask.
    """
    implementation = model.config.get_text_config()._attn_implementation
    if implementation == "sdpa":
        return torch.bool
    if implementation == "eager":  # adds the mask to the scores: a bool would hide nothing
        return model.dtype
    raise ValueError(
        f"packed scenes need attn_implementation 'sdpa' or 'eager'; the language model has {implementation!r}"
    )


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """(batch, longest) on the right."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def _visible(groups: torch.Tensor) -> torch.Tensor:
    """Which position sees which, (batch, 1, sequence, sequence) bool.

    Args:
        groups: (batch, sequence), 0 for the prefix, 1, 2, … for the questions, -1 for padding.
    """
    length = groups.shape[1]
    same = groups[:, :, None] == groups[:, None, :]  # (batch, seeing, seen)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = (same | (groups == 0)[:, None, :]) & causal & (groups >= 0)[:, None, :]
    # Padding sees itself: a row that sees nothing is not a number under softmax.
    return (visible | torch.eye(length, dtype=torch.bool))[:, None]
