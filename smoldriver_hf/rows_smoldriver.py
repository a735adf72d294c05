"""Rows of a language model that continue one shared prefix: attention, cache and decoding.

The prefix's keys and values are computed once and kept once, whatever the number of rows. Prompts of different lengths
are decoded side by side in a fixed number of rows: a row whose answer is complete takes the next prompt, so memory
depends on the number of rows, never on how many prompts there are.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PROMPT_TOKENS = 2048  # of all prompts that are read at once, padding included
CACHE_COLUMNS = 8192  # of all rows; beyond it, very long prompts get fewer rows
ATTENTION = "smoldriver_rows"

Prefix = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Per layer, keys and values (1, key heads, prefix, head_dim)."""


def rows_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    prefix_rows: "Rows | None" = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA; given `prefix_rows`, queries also attend to their prefix, kept once for all rows.

    The queries of all rows meet the prefix in one matrix product, so it is neither copied nor read once per row.

    Args:
        query: (rows, heads, tokens, head_dim).
        key, value: (rows, key heads, columns, head_dim), without the prefix.
        attention_mask: with `prefix_rows`, (rows or 1, 1, tokens, columns), added to the scores of `key`.

    Returns:
        (rows, tokens, heads, head_dim) and None.
    """
    if prefix_rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    assert attention_mask is not None  # `Rows` always gives one
    prefix_key, prefix_value = prefix_rows.prefix_of(module.layer_idx)  # (1, key heads, prefix, head_dim)
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


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, rows_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])

# transformers chooses the attention by the config's name for it alone, at each layer of each call. Per config, by id:
# how many calls need `rows_attention` now, and the name that stood there before.
_SWITCHED: dict[int, tuple[int, str]] = {}
_SWITCHING = threading.Lock()


@contextmanager
def rows_attention_in(config: Any) -> Iterator[None]:
    """For this block, the language model of `config` uses `rows_attention`, which is SDPA for calls without rows.

    Blocks of several threads may overlap: the last one to end, in whatever way, leaves the config as it was.
    """
    with _SWITCHING:
        calls, before = _SWITCHED.get(id(config), (0, config._attn_implementation))
        _SWITCHED[id(config)] = (calls + 1, before)
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        with _SWITCHING:
            calls, before = _SWITCHED.pop(id(config))
            if calls > 1:
                _SWITCHED[id(config)] = (calls - 1, before)
            else:
                config._attn_implementation = before


def device_of(model: Any) -> torch.device:
    """Where a model's inputs go, also while its weights wait on a disk and stand on the meta device."""
    hook = getattr(model, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else model.device


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
        key_states, value_states = key_states.to(self.keys.dtype), value_states.to(self.values.dtype)  # autocast
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


class Rows:
    """Rows of a language model that continue one prefix: fill some with prompts, advance all, copy one.

    Args:
        model: a `SmolDriverForConditionalGeneration`.
        prefix: what all rows continue.
        rows, columns: how many prompts at once, and the most tokens that one has behind the prefix.
    """

    def __init__(self, model: Any, prefix: Prefix, rows: int, columns: int):
        self.model = model
        self.prefix = prefix
        self.prefix_length = prefix[0][0].shape[2]
        self.window = _Window()
        self.cache = Cache(layers=[_RowLayer(layer, rows, columns, self.window) for layer in prefix])
        self.attended: set[int] = set()  # layers of the call under way that saw the prefix

    def prefix_of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The prefix's keys and values in a layer, which has then seen them."""
        self.attended.add(layer)
        return self.prefix[layer]

    def _run(self, ids: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Hidden states (rows, tokens, hidden) of `ids` (rows, tokens) in `columns` (rows or 1, tokens)."""
        language_model = self.model.model.language_model
        dtype = self.model.get_input_embeddings().weight.dtype  # the tower's may differ
        hidden = (
            torch.arange(self.window.length, device=ids.device) > columns[..., None]
        )  # (rows or 1, tokens, columns)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=ids.device).masked_fill_(hidden, torch.finfo(dtype).min)
        self.attended.clear()
        with rows_attention_in(language_model.config):
            states = language_model(
                input_ids=ids,
                attention_mask=mask[:, None],
                position_ids=(columns + self.prefix_length).expand(len(ids), -1),
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
                prefix_rows=self,
            ).last_hidden_state
        if len(self.attended) != len(self.prefix):  # it would answer without having seen the images
            raise ValueError(
                "a scene needs a language model that hands keyword arguments to transformers' attention functions; "
                f"{type(language_model).__name__} did so in {len(self.attended)} of {len(self.prefix)} layers"
            )
        return states

    def fill(self, first: int, prompts: Sequence[Sequence[int]], start: int = 0) -> torch.Tensor:
        """Read token ids into the rows from `first` on, from column `start` on.

        Shorter ones are padded on the right: no token sees what follows it, and the columns are written again later.

        Returns:
            hidden states (rows, longest, hidden); those of padding mean nothing.
        """
        device = device_of(self.model)
        longest = max(map(len, prompts))
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
        self.window.rows = slice(first, first + len(prompts))
        self.window.columns = slice(start, start + longest)
        self.window.length = start + longest
        return self._run(ids, torch.arange(start, start + longest, device=device)[None])

    def advance(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """One more token in each of the first rows; `lengths` are the columns in use. Returns (rows, hidden)."""
        device = device_of(self.model)
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


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """(…, hidden) → (…, vocab), without the image placeholder: as `generate` does it, it is no part of an answer."""
    logits = model.lm_head(hidden)
    logits[..., model.config.image_token_id] = -torch.inf
    return logits


@dataclass
class _Answer:
    """What a row has so far: its prompt's index, the columns in use behind the prefix, and the answer's tokens."""

    prompt: int
    columns: int
    tokens: list[int] = field(default_factory=list)


@torch.inference_mode()
def decode(
    model: Any, prefix: Prefix, suffixes: Sequence[Sequence[int]], limit: int, ends: set[int], batch_size: int
) -> Iterator[tuple[int, int, bool]]:
    """Continue all prompts greedily in at most `batch_size` rows.

    Args:
        model, prefix: see `Rows`.
        suffixes: token ids of each prompt behind the prefix.
        limit: most tokens of an answer.
        ends: ids that end an answer.

    Yields:
        (index of the prompt, token, whether it is its last one), as they come.

    Raises:
        ValueError: no rows.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    if not suffixes:
        return
    # Neighbours in length are read together, so little is padded.
    waiting = deque(sorted(range(len(suffixes)), key=lambda index: -len(suffixes[index])))
    columns = len(suffixes[waiting[0]]) + limit
    batch_size = min(batch_size, len(suffixes), max(1, CACHE_COLUMNS // columns))
    rows = Rows(model, prefix, batch_size, columns)
    running: list[_Answer] = []  # of each row in use; these come first
    while waiting or running:
        free = batch_size - len(running)
        # A call costs the weights once however few rows it fills: wait until a quarter of the rows is free.
        if waiting and (not running or free >= max(1, batch_size // 4)):
            at_once = max(1, PROMPT_TOKENS // len(suffixes[waiting[0]]))
            new = [waiting.popleft() for _ in range(min(free, len(waiting), at_once))]
            first = len(running)
            hidden = rows.fill(first, [suffixes[index] for index in new])
            last = torch.tensor([len(suffixes[index]) - 1 for index in new], device=hidden.device)
            hidden = hidden[torch.arange(len(new), device=hidden.device), last]  # (new rows, hidden)
            running += [_Answer(index, len(suffixes[index])) for index in new]
        else:
            first = 0
            hidden = rows.advance([answer.tokens[-1] for answer in running], [answer.columns for answer in running])
            for answer in running:
                answer.columns += 1

        # Not argmax: on a CPU it reads bf16 one value at a time.
        tokens = logits_of(model, hidden).max(-1).indices.tolist()
        for row, token in reversed(list(enumerate(tokens, first))):
            answer = running[row]
            answer.tokens.append(token)
            done = token in ends or len(answer.tokens) == limit
            yield answer.prompt, token, done
            if done:  # the last row moves into its place
                moved = running.pop()
                if row < len(running):
                    rows.copy(len(running), row, moved.columns)
                    running[row] = moved


__all__ = ["ATTENTION", "Prefix", "Rows", "decode", "rows_attention", "rows_attention_in"]
