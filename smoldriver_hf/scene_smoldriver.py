"""SmolDriverScene: encode what the cameras see once, then answer many questions about it.

All questions about a scene share one prompt prefix, the cameras and their visual tokens. Its keys and values are
computed once and kept; a question costs its own tokens and its answer, nothing else (`rows_smoldriver.py`). Memory
depends on `batch_size`, never on how many questions there are.

```python
scene = model.encode_scene({"CAM_FRONT": front, "CAM_BACK": back}, processor, num_queries=16)
scene.ask("Is there a pedestrian in front?")
answers = scene.ask_all(questions, batch_size=16)       # one SceneAnswer per question, in order
scene.score("Is it safe to brake?", ["Yes.", "No."])    # log-likelihoods
scene = scene.update({"CAM_FRONT": next_front})         # the tower sees one image
```
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from .budgets_smoldriver import Budget, parse_budget
from .chat_smoldriver import TOKENIZING
from .rows_smoldriver import ATTENTION, Prefix, Rows, decode, device_of

BATCH_SIZE = 32  # rows decoded side by side; a CPU reads the weights once for all of them
NEW_TOKENS = 20  # where nothing says how long an answer may be, as in `generate`


@dataclass(frozen=True)
class SceneAnswer:
    """The answer to one question; exactly one of `text` and `error` is not None.

    Attributes:
        question: as it was asked.
        text: the answer without special tokens and surrounding white space.
        token_ids: the generated ids, end token included, as `generate` returns them after the prompt.
        error: why there is no answer; errors of one question leave the others alone.
    """

    question: str
    text: str | None = None
    token_ids: tuple[int, ...] = ()
    error: Exception | None = None


class SmolDriverScene:
    """What the model has seen, ready for questions. Made by `model.encode_scene`, never changed afterwards.

    Threads may ask the same scene at the same time. Decoding is greedy, ends at the end tokens of
    `model.generation_config`, and gives the tokens that `generate` gives for each question alone; other settings of
    the generation config (sampling, beams, penalties) have no part in it.

    Attributes:
        cameras: the cameras in the prompt, in the processor's order.
        num_queries: the budget, one number or one for each camera.
        visual_tokens: {camera: (tokens, text_hidden)}.
        prefix_ids: ids of the shared prompt prefix, from its first token to the last visual one.
        prefix_cache: per layer, its keys and values (1, heads, prefix, head_dim).
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        images: Mapping[str, Any],
        num_queries: Budget | str | None = None,
        previous: "SmolDriverScene | None" = None,
    ):
        """See `SmolDriverForConditionalGeneration.encode_scene`; `previous` is the scene that `images` update."""
        if not isinstance(images, Mapping):
            raise ValueError(f"images must be a dict {{camera: image}}; got {type(images).__name__}")
        attention = model.model.language_model.config._attn_implementation
        if attention not in ("sdpa", ATTENTION):  # the latter while another thread is asking
            raise ValueError(f"a scene needs attn_implementation 'sdpa' in the language model; got {attention!r}")
        self.model = model
        self.processor = processor
        self.device = device_of(model)
        self.num_queries = processor.num_queries if num_queries is None else parse_budget(num_queries)
        seen = self._look(images)
        kept = {} if previous is None else previous.visual_tokens
        self.visual_tokens: dict[str, torch.Tensor] = {
            camera: seen[camera] if camera in seen else kept[camera]
            for camera in processor.cameras
            if camera in seen or camera in kept
        }
        self.cameras = list(self.visual_tokens)
        ids = processor.prompt_ids("", self.cameras, self.num_queries)
        # Up to a special token, so that no question can change how the prefix is split into tokens.
        self.prefix_length: int = 1 + max(i for i, token in enumerate(ids) if token == processor.image_token_id)
        self.prefix_ids: list[int] = ids[: self.prefix_length]
        self.prefix_cache: Prefix = self._prefill(previous, list(seen))

    @torch.inference_mode()
    def _look(self, images: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Visual tokens (tokens, text_hidden) of each camera, with one call of the tower."""
        inputs = self.processor(images=dict(images), num_queries=self.num_queries, return_tensors="pt")
        camera_ids = inputs["camera_ids"].to(self.device)
        cameras = [self.processor.cameras[index] for index in camera_ids.tolist()]
        most = self.processor.num_image_tokens(self.num_queries) * self.processor.queries_per_token
        tokens = self.model.get_image_features(
            inputs["pixel_values"].to(self.device), camera_ids, num_queries=most, return_dict=True
        ).pooler_output  # (images, most tokens, text_hidden), nested: each camera's are the first ones
        return {camera: row[: self._count(camera)] for camera, row in zip(cameras, tokens, strict=True)}

    def _count(self, camera: str) -> int:
        """Visual tokens of a camera."""
        return self.processor.num_image_tokens(self.num_queries, camera)

    @torch.inference_mode()
    def _prefill(self, previous: "SmolDriverScene | None", changed: list[str]) -> Prefix:
        """Keys and values of the prefix; what stands before the first changed image comes from `previous`."""
        model, ids = self.model, torch.tensor(self.prefix_ids, device=self.device)
        places = (ids == self.processor.image_token_id).nonzero().flatten()
        cache, kept = DynamicCache(config=model.config.text_config), 0
        if previous is not None:
            unchanged = min(map(self.cameras.index, changed))  # cameras in front of the first changed one
            kept = int(places[sum(map(self._count, self.cameras[:unchanged]))])
            # Where that one is new, its label differs from what stood there before.
            while self.prefix_ids[:kept] != previous.prefix_ids[:kept]:
                kept -= 1
            cache = DynamicCache([(k[:, :, :kept], v[:, :, :kept]) for k, v in previous.prefix_cache])

        embeds = model.get_input_embeddings()(ids)  # (prefix, text_hidden)
        embeds[places] = torch.cat(list(self.visual_tokens.values())).to(embeds.dtype)
        model.model.language_model(
            inputs_embeds=embeds[None, kept:],
            position_ids=torch.arange(kept, self.prefix_length, device=self.device)[None],
            past_key_values=cache,
            use_cache=True,
        )
        if not all(type(layer) is DynamicLayer for layer in cache.layers):
            kinds = sorted({type(layer).__name__ for layer in cache.layers})
            raise ValueError(f"a scene needs a language model with full attention in every layer; got {kinds}")
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _suffix(self, question: str) -> list[int]:
        """Ids of the prompt of `question` behind the shared prefix."""
        if not isinstance(question, str):
            raise ValueError(f"a question must be a string; got {type(question).__name__}")
        ids = self.processor.prompt_ids(question, self.cameras, self.num_queries)
        if ids[: self.prefix_length] != self.prefix_ids:
            raise ValueError(f"the prompt of {question!r} does not begin with the scene's prefix")
        longest = self.model.config.text_config.max_position_embeddings
        if len(ids) > longest:
            raise ValueError(f"the prompt has {len(ids)} tokens; the language model reads at most {longest}")
        return ids[self.prefix_length :]

    def _limits(self, max_new_tokens: int | None) -> tuple[int, set[int]]:
        """How many tokens an answer may have, and the ids that end it."""
        config = self.model.generation_config
        limit = config.max_new_tokens if max_new_tokens is None else max_new_tokens
        limit = NEW_TOKENS if limit is None else limit
        if limit < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {limit}")
        ends = config.eos_token_id
        return limit, set() if ends is None else {ends} if isinstance(ends, int) else set(ends)

    def ask(self, question: str, max_new_tokens: int | None = None, streamer: Any = None) -> str:
        """The answer to one question.

        Args:
            max_new_tokens: default: the generation config's, else 20.
            streamer: a transformers streamer (`TextStreamer`, `TextIteratorStreamer`): gets the prompt's ids, then
                each token as it is decoded, as from `generate`.

        Raises:
            ValueError: not a string, or longer than the language model reads.
        """
        suffix = self._suffix(question)
        limit, ends = self._limits(max_new_tokens)
        if streamer is not None:
            streamer.put(torch.tensor([[*self.prefix_ids, *suffix]]))
        tokens = []
        for _, token, _ in decode(self.model, self.prefix_cache, [suffix], limit, ends, batch_size=1):
            tokens.append(token)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
        return self._text(tokens)

    def iter_answers(
        self, questions: Sequence[str], batch_size: int = BATCH_SIZE, max_new_tokens: int | None = None
    ) -> Iterator[tuple[int, SceneAnswer]]:
        """(index, answer) of all questions, each as soon as it is complete; those with an error come first."""
        if isinstance(questions, str):
            raise ValueError("questions must be a list of strings; got one string, which is for `ask`")
        limit, ends = self._limits(max_new_tokens)
        asked: list[int] = []
        suffixes: list[list[int]] = []
        for index, question in enumerate(questions):
            try:
                suffixes.append(self._suffix(question))
                asked.append(index)
            except Exception as error:  # whatever is wrong with it, it is wrong with this question only
                yield index, SceneAnswer(question, error=error)
        answers: list[list[int]] = [[] for _ in asked]
        for prompt, token, done in decode(self.model, self.prefix_cache, suffixes, limit, ends, batch_size):
            answers[prompt].append(token)
            if done:
                index, tokens = asked[prompt], answers[prompt]
                yield index, SceneAnswer(questions[index], self._text(tokens), tuple(tokens))

    def ask_all(
        self, questions: Sequence[str], batch_size: int = BATCH_SIZE, max_new_tokens: int | None = None
    ) -> list[SceneAnswer]:
        """One `SceneAnswer` per question, in the order of the questions.

        Args:
            questions: any number of them; one that cannot be asked gets its error, the others their answers.
            batch_size: rows decoded side by side: what memory grows with.
            max_new_tokens: default: the generation config's, else 20.
        """
        answers = dict(self.iter_answers(questions, batch_size, max_new_tokens))
        return [answers[index] for index in range(len(questions))]

    @torch.inference_mode()
    def score(self, question: str, choices: Sequence[str], batch_size: int = BATCH_SIZE) -> list[float]:
        """Log-likelihood of each choice as the beginning of the answer: the sum over its tokens, in nats.

        The question is read once for all choices.

        Raises:
            ValueError: no choices, an empty one, or a question that cannot be asked.
        """
        if isinstance(choices, str) or not choices or not all(isinstance(c, str) and c for c in choices):
            raise ValueError(f"choices must be non-empty strings, at least one; got {choices!r}")
        suffix = self._suffix(question)
        with TOKENIZING:
            tokens = [self.processor.tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices]
        start = len(suffix)
        rows = Rows(self.model, self.prefix_cache, min(batch_size, len(tokens)), start + max(map(len, tokens)))
        first = self._log_probabilities(rows.fill(0, [suffix])[:, -1])[0]  # (vocab,)
        rows.copy(0, slice(1, None), start)
        scores = [float(first[choice[0]]) for choice in tokens]
        order = sorted((index for index, choice in enumerate(tokens) if len(choice) > 1), key=lambda i: len(tokens[i]))
        for begin in range(0, len(order), batch_size):
            group = order[begin : begin + batch_size]
            hidden = rows.fill(0, [tokens[index][:-1] for index in group], start)  # (group, longest, hidden)
            for index, states in zip(group, hidden, strict=True):
                rest = torch.tensor(tokens[index][1:], device=states.device)
                logs = self._log_probabilities(states[: len(rest)])  # (rest, vocab)
                scores[index] += float(logs.gather(1, rest[:, None]).sum())
        return scores

    def _log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(hidden).float().log_softmax(-1)

    def _text(self, tokens: Sequence[int]) -> str:
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def update(self, images: Mapping[str, Any]) -> "SmolDriverScene":
        """A new scene with these images in place of the old ones; this one stays as it is.

        The tower sees only `images`, and the prefix is read again from the first changed camera on. A camera that was
        not there before is added. The next frame of a drive is `update` with all its images, or a new scene: both keep
        nothing.

        Args:
            images: {camera: image}.

        Raises:
            ValueError: no image, an unknown camera, or an image that cannot be read.
        """
        return SmolDriverScene(self.model, self.processor, images, self.num_queries, previous=self)


__all__ = ["SceneAnswer", "SmolDriverScene"]
