"""The multi-Q-Former projector: patch features of each camera → a chosen number of visual tokens.

One Q-Former per named camera. Queries attend to the camera's features and never to each other, so the first m tokens
of a larger budget are exactly the m-token output (the nesting of Matryoshka representations, Kusupati et al. 2022, and
of the Matryoshka Query Transformer, Hu et al. 2024).
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

POSITION_SCALE = 32.0  # the unit square counts as this many patches a side, the usual range of 2-D sine-cosine tables


def sincos_positions(points: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """2-D sine-cosine position vectors of points in the unit square.

    Args:
        points: (points, 2), rows of (y, x) in [0, 1].
        hidden_size: divisible by 4.

    Returns:
        (points, hidden_size): sin and cos of y, then of x, at hidden_size / 4 frequencies.
    """
    steps = torch.arange(hidden_size // 4, device=points.device, dtype=torch.float32)
    frequencies = 10000.0 ** (-steps / (hidden_size // 4))
    angles = POSITION_SCALE * points.float()[..., None] * frequencies  # (points, 2, hidden / 4)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)  # (points, hidden)


def grid_points(height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """(height · width, 2): the cell centres of a grid over the unit square, row by row, as (y, x)."""
    rows = (torch.arange(height, device=device) + 0.5) / height
    columns = (torch.arange(width, device=device) + 0.5) / width
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)


def spread_points(count: int, device: torch.device | None = None) -> torch.Tensor:
    """(count, 2): a sequence of points every prefix of which covers the unit square evenly.

    The additive recurrence with the plastic number (Roberts 2018, "R2"). So each budget m sees the whole image; the
    first rows of a raster grid would see the sky.
    """
    plastic = 1.32471795724474602596
    steps = torch.arange(1, count + 1, device=device, dtype=torch.float32)
    points = torch.stack([0.5 + steps / plastic, 0.5 + steps / plastic**2], dim=-1)
    return points % 1.0


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with its weights: ((images, queries, heads, head_dim), (images, heads, queries, patches))."""
    weights = (query @ key.transpose(-1, -2)) * scaling
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class QFormer(nn.Module):
    """Learned queries that read one camera's patch features by cross-attention.

    Keys are LayerNorm(features) + position, or position alone with `key_source="position"`; values are the features.
    Each query has a place of its own in the image from which its search starts.
    """

    is_causal = False  # without it, sdpa would hide later patches from earlier queries

    def __init__(self, config):
        super().__init__()
        projector = config.projector_config
        vision_hidden_size = config.vision_config.hidden_size
        self.config = projector
        self.key_source = config.key_source
        self.head_dim = projector.hidden_size // projector.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1

        self.queries = nn.Parameter(torch.empty(config.max_queries, projector.hidden_size))
        self.query_norm = nn.LayerNorm(projector.hidden_size, eps=projector.layer_norm_eps)
        if config.key_source == "features":
            self.key_norm = nn.LayerNorm(vision_hidden_size, eps=projector.layer_norm_eps)
        self.q_proj = nn.Linear(projector.hidden_size, projector.hidden_size)
        self.k_proj = nn.Linear(vision_hidden_size, projector.hidden_size, bias=False)  # a key bias cancels in softmax
        self.v_proj = nn.Linear(vision_hidden_size, projector.hidden_size)
        self.o_proj = nn.Linear(projector.hidden_size, projector.hidden_size)
        self.mlp_norm = nn.LayerNorm(projector.hidden_size, eps=projector.layer_norm_eps)
        self.up_proj = nn.Linear(projector.hidden_size, projector.intermediate_size)
        self.act = nn.GELU()
        self.down_proj = nn.Linear(projector.intermediate_size, projector.hidden_size)
        if projector.camera_vectors:
            self.camera_vector = nn.Parameter(torch.empty(config.text_config.hidden_size))

    def init_parameters(self) -> None:
        """Draw the queries; a camera vector starts at zero (called by `_init_weights`)."""
        init.normal_(self.queries, mean=0.0, std=self.config.initializer_range)
        if self.config.camera_vectors:
            init.zeros_(self.camera_vector)

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(images, tokens, hidden) → (images, heads, tokens, head_dim)"""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def project(
        self,
        features: torch.Tensor,
        key_positions: torch.Tensor,
        query_positions: torch.Tensor,
        num_queries: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value heads for `features` (images, patches, vision_hidden) of this camera."""
        keys = key_positions.expand(features.shape[0], -1, -1)
        if self.key_source == "features":
            keys = self.key_norm(features) + keys
        queries = self.query_norm(self.queries[:num_queries]) + query_positions[:num_queries]
        queries = queries.expand(features.shape[0], -1, -1)  # (images, queries, hidden)
        return (
            self._split_heads(self.q_proj(queries)),
            self._split_heads(self.k_proj(keys)),
            self._split_heads(self.v_proj(features)),
        )

    def finish(self, context: torch.Tensor) -> torch.Tensor:
        """What was read, (images, queries, heads, head_dim) → (images, queries, hidden)."""
        hidden_states = self.queries[: context.shape[1]] + self.o_proj(context.flatten(-2))
        return hidden_states + self.down_proj(self.act(self.up_proj(self.mlp_norm(hidden_states))))

    def forward(
        self,
        features: torch.Tensor,
        key_positions: torch.Tensor,
        query_positions: torch.Tensor,
        num_queries: int,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What this camera's queries read, (images, queries, hidden); where, (images, heads, queries, patches), if
        asked; and the camera's vector (text_hidden,), which is to be added behind the connector, or None."""
        query, key, value = self.project(features, key_positions, query_positions, num_queries)
        attend: Callable = eager_attention
        if not output_attentions and self.config._attn_implementation not in (None, "eager"):
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        context, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=0.0)
        vector = self.camera_vector if self.config.camera_vectors else None
        return self.finish(context), weights if output_attentions else None, vector


class LinearConnector(nn.Module):
    """Q-Former output → one visual token per query, at the text embeddings' scale."""

    def __init__(self, config):
        super().__init__()
        projector = config.projector_config
        text_hidden_size = config.text_config.hidden_size
        self.norm = nn.LayerNorm(projector.hidden_size, eps=projector.layer_norm_eps)
        self.proj = nn.Linear(projector.hidden_size, text_hidden_size)
        self.scale_norm = nn.RMSNorm(text_hidden_size, eps=projector.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.scale_norm(self.proj(self.norm(hidden_states)))  # (images, queries, text_hidden)


class PixelShuffleConnector(nn.Module):
    """SmolVLM's connector: squares of scale_factor² neighbouring queries → one token, then a bias-free projection."""

    def __init__(self, config):
        super().__init__()
        projector = config.projector_config
        self.scale_factor = projector.scale_factor
        self.side = round(config.max_queries**0.5)
        self.proj = nn.Linear(projector.hidden_size * self.scale_factor**2, config.text_config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        fold, cells = self.scale_factor, self.side // self.scale_factor
        grid = hidden_states.unflatten(1, (cells, fold, cells, fold))  # (images, cells, fold, cells, fold, hidden)
        folded = grid.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)  # (images, cells², fold² · hidden)
        return self.proj(folded)  # (images, cells², text_hidden)


class MultiQFormerProjector(nn.Module):
    """One Q-Former per named camera, in `qformers.<CAMERA>`, and one connector behind them all."""

    def __init__(self, config, grid: tuple[int, int]):
        super().__init__()
        projector = config.projector_config
        self.config = projector
        self.cameras = list(config.cameras)
        self.grid = grid
        self.max_queries = config.max_queries
        self.square_queries = config.connector == "pixel_shuffle"
        self.qformers = nn.ModuleDict({name: QFormer(config) for name in self.cameras})
        self.connector = PixelShuffleConnector(config) if self.square_queries else LinearConnector(config)
        self.vision_hidden_size = config.vision_config.hidden_size
        # Absent from checkpoints; after construction on the meta device _init_weights fills them.
        dtype = torch.get_default_dtype()
        self.register_buffer("key_positions", self._key_positions().to(dtype), persistent=False)
        self.register_buffer("query_positions", self._query_positions().to(dtype), persistent=False)

    def _key_positions(self, device: torch.device | None = None) -> torch.Tensor:
        """(patches, vision_hidden)"""
        return sincos_positions(grid_points(*self.grid, device), self.vision_hidden_size)

    def _query_positions(self, device: torch.device | None = None) -> torch.Tensor:
        """(max_queries, hidden)"""
        side = round(self.max_queries**0.5)
        points = grid_points(side, side, device) if self.square_queries else spread_points(self.max_queries, device)
        return sincos_positions(points, self.config.hidden_size)

    def init_buffers(self) -> None:
        """Fill the two position tables (called by `_init_weights`)."""
        device = self.query_positions.device
        init.copy_(self.query_positions, self._query_positions(device))
        init.copy_(self.key_positions, self._key_positions(device))

    def positions_of(self, grid: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
        """(patches, vision_hidden) for a grid of patches; from the table unless the images have another size."""
        if grid == self.grid:
            return self.key_positions.to(like.dtype)
        return sincos_positions(grid_points(*grid, like.device), self.vision_hidden_size).to(like.dtype)

    def images_by_camera(self, num_images: int, camera_ids: torch.Tensor | None) -> dict[str, slice | torch.Tensor]:
        """Which images each Q-Former reads, for cameras that have any. Without ids they come as whole scenes in
        `cameras` order; under the compiler, whose shapes cannot depend on ids, each reads all images."""
        if camera_ids is None:
            return {name: slice(index, num_images, len(self.cameras)) for index, name in enumerate(self.cameras)}
        if torch.compiler.is_compiling():
            return dict.fromkeys(self.cameras, slice(None))
        found = {name: (camera_ids == index).nonzero().flatten() for index, name in enumerate(self.cameras)}
        return {name: rows for name, rows in found.items() if len(rows)}

    def forward(
        self,
        features: torch.Tensor,
        camera_ids: torch.Tensor | None,
        num_queries: int,
        grid: tuple[int, int],
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All cameras' features → visual tokens.

        Args:
            features: (images, patches, vision_hidden), images of any cameras in any order.
            camera_ids: (images,) indices into `cameras`, or None for whole scenes in `cameras` order.
            num_queries: queries in use.
            grid: (rows, columns) of the patches.
            output_attentions: also return where each query looked.

        Returns:
            tokens (images, tokens, text_hidden) and attentions (images, heads, queries, patches) or None.
        """
        num_images = features.shape[0]
        features = features.to(self.qformers[self.cameras[0]].queries.dtype)
        positions = (self.positions_of(grid, features), self.query_positions.to(features.dtype))
        rows_of = self.images_by_camera(num_images, camera_ids)
        outputs = [
            self.qformers[name](features[rows], *positions, num_queries, output_attentions)
            for name, rows in rows_of.items()
        ]
        hidden_states, weights, vectors = zip(*outputs, strict=True)  # each grouped by camera
        sizes = [len(states) for states in hidden_states]
        tokens = self.connector(torch.cat(hidden_states))  # (images, tokens, text_hidden), grouped by camera
        if self.config.camera_vectors:
            parts = zip(tokens.split(sizes), vectors, strict=True)
            tokens = torch.cat([part + vector for part, vector in parts])
        order = self._places(num_images, camera_ids, rows_of)
        return tokens[order], torch.cat(weights)[order] if output_attentions else None

    def _places(
        self, num_images: int, camera_ids: torch.Tensor | None, rows_of: dict[str, slice | torch.Tensor]
    ) -> torch.Tensor:
        """(images,): where each image is found in what is grouped by camera."""
        device = self.query_positions.device
        if camera_ids is None:  # from camera-major back to scene-major
            return torch.arange(num_images, device=device).view(len(self.cameras), -1).T.flatten()
        if torch.compiler.is_compiling():
            return camera_ids * num_images + torch.arange(num_images, device=camera_ids.device)
        return torch.cat(list(rows_of.values())).argsort()
