"""SmolDriverScene: encode what the cameras see once, then answer many questions about it.

All questions about a scene share one prompt prefix, the cameras and their visual tokens. Its keys and values are
computed once and kept; a question costs its own tokens and its answer, nothing else. Questions of different lengths
are decoded side by side in a fixed number of rows: a row whose answer is complete takes the next question, so memory
depends on `batch_size`, never on how many questions there are.

```python
scene = model.encode_scene({"CAM_FRONT": front, "CAM_BACK": back}, processor, num_queries=16)
scene.ask("Is there a pedestrian in front?")
answers = scene.ask_all(questions, batch_size=16)       # one SceneAnswer per question, in order
scene.score("Is it safe to brake?", ["Yes.", "No."])    # log-likelihoods
scene = scene.update({"CAM_FRONT": next_front})         # the tower sees one image
```
"""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BATCH_SIZE = 32  # rows decoded side by side; a CPU reads the weights once for all of them
NEW_TOKENS = 20  # where nothing says how long an answer may be, as in `generate`
PROMPT_TOKENS = 2048  # of all prompts that are read at once, padding included
CACHE_COLUMNS = 8192  # of all rows; beyond it, very long questions get fewer rows
ATTENTION = "smoldriver_scene"

# Fast tokenizers fail with "Already borrowed" when a thread changes their padding while another one encodes.
_TOKENIZING = threading.Lock()


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


class _Running(threading.local):
    """What this thread's call of the language model reads; None for calls that belong to no scene."""

    rows: "_Rows | None" = None


_RUNNING = _Running()


def scene_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA, which within a scene also attends to the prefix, kept once for all rows.

    The queries of all rows meet the prefix in one matrix product, so it is neither copied nor read once per row.

    Args:
        query: (rows, heads, tokens, head_dim).
        key, value: (rows, key heads, columns, head_dim), in a scene without the prefix.
        attention_mask: in a scene, (rows or 1, 1, tokens, columns), added to the scores of `key`.

    Returns:
        (rows, tokens, heads, head_dim) and None.
    """
    rows = _RUNNING.rows
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    assert attention_mask is not None  # `_Rows` always gives one
    prefix_key, prefix_value = rows.scene.prefix_cache[module.layer_idx]  # (1, key heads, prefix, head_dim)
    prefix, groups, width = prefix_key.shape[2], key.shape[1], query.shape[3]
    if len(query) == 1:  # one row: nothing to share
        key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
        mask = torch.nn.functional.pad(attention_mask, (prefix, 0))
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)

    batch, heads, tokens, _ = query.shape
    query = query * (width**-0.5 if scaling is None else scaling)
    query = query.reshape(batch, groups, -1, width)  # heads that share a key head are neighbours
    shared = query.transpose(0, 1).reshape(groups, -1, width) @ prefix_key[0].transpose(1, 2)
    shared = shared.view(groups, batch, -1, prefix).transpose(0, 1)  # (rows, key heads, heads of one · tokens, prefix)
    own = (query @ key.transpose(2, 3)).unflatten(2, (-1, tokens)) + attention_mask[:, :, None]
    weights = torch.cat([shared, own.flatten(2, 3)], dim=-1).softmax(-1)
    context = weights[..., :prefix].transpose(0, 1).reshape(groups, -1, prefix) @ prefix_value[0]
    context = context.view(groups, batch, -1, width).transpose(0, 1) + weights[..., prefix:] @ value
    return context.reshape(batch, heads, tokens, width).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, scene_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class _Window:
    """Which rows and columns of the row cache the next call of the language model writes and reads."""

    def __init__(self) -> None:
        self.rows = slice(0, 0)
        self.columns: slice | tuple[torch.Tensor, torch.Tensor] = slice(0, 0)
        self.length = 0  # columns that are read


class _RowLayer(CacheLayerMixin):
    """One layer's keys and values behind the prefix, (rows, heads, columns, head_dim), written in place.

    A row's tokens stand without gaps from column 0 on, so rows may have any lengths.
    """

    def __init__(self, prefix: tuple[torch.Tensor, torch.Tensor], rows: int, columns: int, window: _Window):
        super().__init__()
        self.window = window
        # Zeros: shorter rows hide the columns of longer ones by adding to scores, which does not hide a NaN.
        self.keys, self.values = (
            states.new_zeros(rows, states.shape[1], columns, states.shape[3]) for states in prefix
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        window = self.window
        if isinstance(window.columns, slice):  # the same columns in each row: prompts
            self.keys[window.rows, :, window.columns] = key_states
            self.values[window.rows, :, window.columns] = value_states
        else:  # one column per row: answers
            rows, columns = window.columns
            self.keys[rows, :, columns] = key_states[:, :, 0]
            self.values[rows, :, columns] = value_states[:, :, 0]
        return self.keys[window.rows, :, : window.length], self.values[window.rows, :, : window.length]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("a row layer is allocated when it is made")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.length, 0

    def get_seq_length(self) -> int:
        return self.window.length

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class _Rows:
    """Rows of the language model that continue one prefix: fill some with prompts, advance all, copy one."""

    def __init__(self, scene: "SmolDriverScene", rows: int, columns: int):
        self.scene = scene
        self.window = _Window()
        self.cache = Cache(layers=[_RowLayer(layer, rows, columns, self.window) for layer in scene.prefix_cache])

    def _run(self, ids: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Hidden states (rows, tokens, hidden) of `ids` (rows, tokens) in `columns` (rows or 1, tokens)."""
        model = self.scene.model
        dtype = model.get_input_embeddings().weight.dtype  # the tower's may differ
        hidden = (
            torch.arange(self.window.length, device=ids.device) > columns[..., None]
        )  # (rows or 1, tokens, columns)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=ids.device).masked_fill_(hidden, torch.finfo(dtype).min)
        _RUNNING.rows = self
        try:
            return model.model.language_model(
                input_ids=ids,
                attention_mask=mask[:, None],
                position_ids=(columns + self.scene.prefix_length).expand(len(ids), -1),
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
            ).last_hidden_state
        finally:
            _RUNNING.rows = None

    def fill(self, first: int, prompts: Sequence[Sequence[int]], start: int = 0) -> torch.Tensor:
        """Read token ids into the rows from `first` on, from column `start` on.

        Shorter ones are padded on the right: no token sees what follows it, and the columns are written again later.

        Returns:
            hidden states (rows, longest, hidden); those of padding mean nothing.
        """
        device = self.scene.model.device
        longest = max(map(len, prompts))
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
        self.window.rows = slice(first, first + len(prompts))
        self.window.columns = slice(start, start + longest)
        self.window.length = start + longest
        return self._run(ids, torch.arange(start, start + longest, device=device)[None])

    def advance(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """One more token in each of the first rows; `lengths` are the columns in use. Returns (rows, hidden)."""
        device = self.scene.model.device
        columns = torch.tensor(lengths, device=device)
        self.window.rows = slice(0, len(tokens))
        self.window.columns = (torch.arange(len(tokens), device=device), columns)
        self.window.length = max(lengths) + 1
        return self._run(torch.tensor(tokens, device=device)[:, None], columns[:, None])[:, 0]

    def copy(self, source: int, target: slice | int, length: int) -> None:
        """Give `target` the first `length` columns of row `source`."""
        for layer in self.cache.layers:
            for states in (layer.keys, layer.values):
                states[target, :, :length] = states[source, :, :length]


class SmolDriverScene:
    """What the model has seen, ready for questions. Made by `model.encode_scene`, never changed afterwards.

    Threads may ask the same scene at the same time. Decoding is greedy, ends at the end tokens of
    `model.generation_config`, and gives the tokens that `generate` gives for each question alone; other settings of
    the generation config (sampling, beams, penalties) have no part in it.

    Attributes:
        cameras: the cameras in the prompt, in the processor's order.
        num_queries: budget per camera.
        visual_tokens: {camera: (tokens, text_hidden)}.
        prefix_ids: ids of the shared prompt prefix, from its first token to the last visual one.
        prefix_cache: per layer, its keys and values (1, heads, prefix, head_dim).
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        images: Mapping[str, Any],
        num_queries: int | None = None,
        previous: "SmolDriverScene | None" = None,
    ):
        """See `SmolDriverForConditionalGeneration.encode_scene`; `previous` is the scene that `images` update."""
        if not isinstance(images, Mapping):
            raise ValueError(f"images must be a dict {{camera: image}}; got {type(images).__name__}")
        text_config = model.model.language_model.config
        if text_config._attn_implementation not in ("sdpa", ATTENTION):
            raise ValueError(
                "a scene needs attn_implementation 'sdpa' in the language model; "
                f"got {text_config._attn_implementation!r}"
            )
        text_config._attn_implementation = ATTENTION  # which is SDPA for all other calls
        self.model = model
        self.processor = processor
        self.num_queries = processor.num_queries if num_queries is None else num_queries
        seen = self._look(images)
        kept = {} if previous is None else previous.visual_tokens
        self.visual_tokens: dict[str, torch.Tensor] = {
            camera: seen[camera] if camera in seen else kept[camera]
            for camera in processor.cameras
            if camera in seen or camera in kept
        }
        self.cameras = list(self.visual_tokens)
        ids = self._tokenize(processor.prompt("", self.cameras))
        # Up to a special token, so that no question can change how the prefix is split into tokens.
        self.prefix_length: int = 1 + max(i for i, token in enumerate(ids) if token == processor.image_token_id)
        self.prefix_ids: list[int] = ids[: self.prefix_length]
        self.prefix_cache: list[tuple[torch.Tensor, torch.Tensor]] = self._prefill(previous, list(seen))

    @torch.inference_mode()
    def _look(self, images: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Visual tokens (tokens, text_hidden) of each camera, with one call of the tower."""
        inputs = self.processor(images=dict(images), num_queries=self.num_queries, return_tensors="pt")
        camera_ids = inputs["camera_ids"].to(self.model.device)
        tokens = self.model.get_image_features(
            inputs["pixel_values"].to(self.model.device), camera_ids, num_queries=self.num_queries, return_dict=True
        ).pooler_output  # (images, tokens, text_hidden)
        return {self.processor.cameras[index]: row for index, row in zip(camera_ids.tolist(), tokens, strict=True)}

    @torch.inference_mode()
    def _prefill(
        self, previous: "SmolDriverScene | None", changed: list[str]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the prefix; what stands before the first changed image comes from `previous`."""
        model, ids = self.model, torch.tensor(self.prefix_ids, device=self.model.device)
        places = (ids == self.processor.image_token_id).nonzero().flatten()
        cache, kept = DynamicCache(config=model.config.text_config), 0
        if previous is not None:
            unchanged = min(map(self.cameras.index, changed))  # cameras in front of the first changed one
            kept = int(places[unchanged * self.processor.num_image_tokens(self.num_queries)])
            # Where that one is new, its label differs from what stood there before.
            while self.prefix_ids[:kept] != previous.prefix_ids[:kept]:
                kept -= 1
            cache = DynamicCache([(k[:, :, :kept], v[:, :, :kept]) for k, v in previous.prefix_cache])

        embeds = model.get_input_embeddings()(ids)  # (prefix, text_hidden)
        embeds[places] = torch.cat(list(self.visual_tokens.values())).to(embeds.dtype)
        model.model.language_model(
            inputs_embeds=embeds[None, kept:],
            position_ids=torch.arange(kept, self.prefix_length, device=model.device)[None],
            past_key_values=cache,
            use_cache=True,
        )
        if not all(type(layer) is DynamicLayer for layer in cache.layers):
            kinds = sorted({type(layer).__name__ for layer in cache.layers})
            raise ValueError(f"a scene needs a language model with full attention in every layer; got {kinds}")
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _tokenize(self, text: str) -> list[int]:
        """Ids of a rendered prompt, with as many placeholders per camera as the budget asks for."""
        token = self.processor.image_token
        text = text.replace(token, token * self.processor.num_image_tokens(self.num_queries))
        with _TOKENIZING:
            return self.processor.tokenizer(text)["input_ids"]

    def _suffix(self, question: str) -> list[int]:
        """Ids of the prompt of `question` behind the shared prefix."""
        if not isinstance(question, str):
            raise ValueError(f"a question must be a string; got {type(question).__name__}")
        ids = self._tokenize(self.processor.prompt(question, self.cameras))
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

    @torch.inference_mode()
    def _decode(
        self, suffixes: Sequence[Sequence[int]], limit: int, ends: set[int], batch_size: int
    ) -> Iterator[tuple[int, int, bool]]:
        """Answer all prompts in at most `batch_size` rows; yields (prompt, token, whether it is the last one)."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        if not suffixes:
            return
        # Neighbours in length are read together, so little is padded.
        waiting = deque(sorted(range(len(suffixes)), key=lambda index: -len(suffixes[index])))
        columns = len(suffixes[waiting[0]]) + limit
        batch_size = min(batch_size, len(suffixes), max(1, CACHE_COLUMNS // columns))
        rows = _Rows(self, batch_size, columns)
        prompts: list[int] = []  # of each row in use; these come first
        answers: list[list[int]] = []
        lengths: list[int] = []  # columns in use
        while waiting or prompts:
            free = batch_size - len(prompts)
            # A call costs the weights once however few rows it fills: wait until a quarter of the rows is free.
            if waiting and (not prompts or free >= max(1, batch_size // 4)):
                at_once = max(1, PROMPT_TOKENS // len(suffixes[waiting[0]]))
                new = [waiting.popleft() for _ in range(min(free, len(waiting), at_once))]
                changed = range(len(prompts), len(prompts) + len(new))
                hidden = rows.fill(len(prompts), [suffixes[index] for index in new])
                last = torch.tensor([len(suffixes[index]) - 1 for index in new], device=hidden.device)
                hidden = hidden[torch.arange(len(new), device=hidden.device), last]  # (new rows, hidden)
                prompts += new
                answers += [[] for _ in new]
                lengths += [len(suffixes[index]) for index in new]
            else:
                changed = range(len(prompts))
                hidden = rows.advance([answer[-1] for answer in answers], lengths)
                lengths = [length + 1 for length in lengths]

            # Not argmax: on a CPU it reads bf16 one value at a time.
            tokens = self.model.lm_head(hidden).max(-1).indices.tolist()
            for row, token in zip(changed, tokens, strict=True):
                answers[row].append(token)
            for row, token in reversed(list(zip(changed, tokens, strict=True))):
                done = token in ends or len(answers[row]) == limit
                yield prompts[row], token, done
                if done:  # the last row moves into its place
                    if row < len(prompts) - 1:
                        rows.copy(len(prompts) - 1, row, lengths[-1])
                    prompts[row], answers[row], lengths[row] = prompts[-1], answers[-1], lengths[-1]
                    prompts.pop(), answers.pop(), lengths.pop()

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
        for _, token, _ in self._decode([suffix], limit, ends, batch_size=1):
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
        for prompt, token, done in self._decode(suffixes, limit, ends, batch_size):
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
        with _TOKENIZING:
            tokens = [self.processor.tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices]
        start = len(suffix)
        rows = _Rows(self, min(batch_size, len(tokens)), start + max(map(len, tokens)))
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
