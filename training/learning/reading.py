"""Reading: batches and trainer of a language model whose visual tokens are made of its own words.

A batch is that of `training.finetune`, prompt for prompt, but where a picture's tokens would stand there are bags of
words (`slots`), and the trainer puts tokens made of the model's current embeddings in their place. Any number of
tokens fits a camera, whatever the checkpoint's eyes give.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from training.data.rig import Rig
from training.learning.collate import IGNORED, EncodedFrame, Example, PackedSceneCollator
from training.learning.looking import ASKED_CAMERAS, TOKEN_CAMERAS, CameraAttention
from training.learning.slots import WordTable, bags_of, length_of, tokens_of
from training.learning.smolvlm import PackedBaselineCollator
from training.learning.trainer import SceneTrainer

WORD_WEIGHTS = "word_weights"
"""Of a batch, (visual tokens, words): what each says, in the order in which they stand in it."""


class _WordsForPictures:
    """What a batch to read has in place of pictures.

    An example has, beside `pairs`: `images` (camera → None), `contents`, `budgets` (camera → tokens) and `look_at`,
    per question the cameras to look at where it names none.

    Args:
        table: the words.
        view: the processor, or a baseline's `SceneView`.
        rig: tells which cameras a question names.
    """

    def __init__(self, table: WordTable, view: Any, rig: Rig, **common: Any):
        super().__init__(view, rig=rig, **common)  # type: ignore[call-arg]  # of the collator beside it
        self.table = table

    def encode(self, example: Example, num_queries: int) -> EncodedFrame:
        frame = super().encode(example, num_queries)  # type: ignore[misc]  # of the collator beside it
        budgets = {self.bit(camera): count for camera, count in example["budgets"].items()}  # type: ignore[attr-defined]
        prefix: list[int] = []
        cameras: list[int] = []
        pairs = zip(frame.prefix, frame.prefix_cameras, strict=True)
        for camera, run in groupby(pairs, key=lambda pair: pair[1]):
            tokens = [token for token, _ in run]
            if camera:
                tokens = tokens[:1] * budgets[camera]
            prefix += tokens
            cameras += [camera] * len(tokens)
        asked = [
            named or sum(map(self.bit, others))  # type: ignore[attr-defined]
            for named, others in zip(frame.asked_cameras, example["look_at"], strict=True)
        ]
        return EncodedFrame(prefix, frame.pairs, cameras, asked)

    def vision(self, examples: Sequence[Example], num_queries: int) -> dict[str, torch.Tensor]:
        bags = [
            bag
            for example in examples
            for camera in self.shown(example)  # type: ignore[attr-defined]
            for bag in bags_of(example["contents"], camera, example["budgets"][camera])
        ]
        return {WORD_WEIGHTS: self.table.weights(bags)}


class ReadingCollator(_WordsForPictures, PackedSceneCollator):
    """Frames to read as a SmolDriver's prompts."""


class BaselineReadingCollator(_WordsForPictures, PackedBaselineCollator):
    """Frames to read as a SmolVLM's prompts."""


class ReadingTrainer(SceneTrainer):
    """A trainer of answers about tokens made of words.

    Args:
        table: the words.
        image_token_id: stands where a visual token goes.
        noise: of the tokens in training, relative to their length per component.
    """

    camera_attention: CameraAttention

    def __init__(self, *args, table: WordTable, image_token_id: int, noise: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.table = table
        self.image_token_id = image_token_id
        self.noise = noise

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, self.with_tokens(inputs), return_outputs, num_items_in_batch)

    def with_tokens(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch with embeddings in place of ids and words."""
        others = {name: value for name, value in inputs.items() if name not in ("input_ids", WORD_WEIGHTS)}
        embeddings = self.accelerator.unwrap_model(self.model).get_input_embeddings()
        embedded = embeddings(inputs["input_ids"])  # (batch, sequence, hidden)
        length = length_of(embeddings.weight.detach())
        tokens = tokens_of(inputs[WORD_WEIGHTS], self.table.vectors(embeddings.weight), length)
        if self.model.training and self.noise:
            tokens = tokens + torch.randn_like(tokens) * (self.noise * length / math.sqrt(tokens.shape[-1]))
        places = (inputs["input_ids"] == self.image_token_id)[..., None]
        return {"inputs_embeds": embedded.masked_scatter(places, tokens.to(embedded.dtype)), **others}

    @torch.no_grad()
    def answered(self, batch: dict[str, Any]) -> tuple[list[list[bool]], float]:
        """Which questions of each frame greedy decoding answers word for word, and the attention on named cameras.

        An answer is right if each of its tokens is the likeliest after the right ones before it.
        """
        self.model.eval()
        inputs = self.with_tokens(self._prepare_inputs(batch))
        token_cameras, asked_cameras = inputs.pop(TOKEN_CAMERAS), inputs.pop(ASKED_CAMERAS)
        outputs = self.model(**inputs, fused_lm_head=True)
        share = self.camera_attention.loss(token_cameras, asked_cameras)[1]
        learnt = (inputs["labels"][:, 1:] != IGNORED).tolist()
        right = outputs.is_top1.bool().tolist()
        return [_per_answer(*row) for row in zip(learnt, right, strict=True)], share


def _per_answer(learnt: Sequence[bool], right: Sequence[bool]) -> list[bool]:
    """Whether all tokens of an answer are right, of each answer in a row: its runs of learnt tokens."""
    runs = groupby(zip(learnt, right, strict=True), key=lambda pair: pair[0])
    return [all(good for _, good in run) for answer, run in runs if answer]
