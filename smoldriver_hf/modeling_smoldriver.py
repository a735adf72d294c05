"""SmolDriver: camera images → vision tower → one Q-Former per camera → language model → answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .configuration_smoldriver import SmolDriverConfig
from .loading_smoldriver import load  # noqa: F401  # so that save_pretrained puts the strict door beside the weights
from .projector_smoldriver import MultiQFormerProjector, QFormer
from .scene_smoldriver import SmolDriverScene
from .tower_smoldriver import drop_untrained, height_and_width, patch_grid

# Inputs that belong to the prompt: once it is in the cache they must not be encoded again.
IMAGE_INPUTS = ("pixel_values", "vision_features", "camera_ids")


@dataclass
class SmolDriverVisionOutput(BaseModelOutputWithPooling):
    """What `get_image_features` returns.

    Attributes:
        last_hidden_state: (images, tokens, vision_hidden), the tower's output; None for precomputed features.
        pooler_output: (images, tokens per camera, text_hidden), the visual tokens.
        hidden_states, attentions: the tower's, when asked for.
        qformer_attentions: (images, heads, queries, patches), where each query looked; with `output_attentions=True`.
    """

    qformer_attentions: torch.FloatTensor | None = None


@dataclass
class SmolDriverModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `SmolDriverModel`; `image_hidden_states` are the visual tokens (images, tokens, text_hidden)."""

    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class SmolDriverCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output with logits; `loss` is the mean next-token loss over the labels that are not -100."""

    image_hidden_states: torch.FloatTensor | None = None


def given_images(pixel_values: torch.Tensor | None, vision_features: torch.Tensor | None) -> torch.Tensor:
    """The one of the two that was given; its first dimension counts the images."""
    if pixel_values is not None and vision_features is None:
        if pixel_values.ndim != 4:
            raise ValueError(
                "pixel_values must be flat, (images in the batch, 3, height, width), with camera_ids beside it; "
                f"got shape {tuple(pixel_values.shape)}"
            )
        return pixel_values
    if vision_features is not None and pixel_values is None:
        return vision_features
    raise ValueError("pass either pixel_values or vision_features, not both and not neither")


class SmolDriverPreTrainedModel(PreTrainedModel):
    config_class = SmolDriverConfig
    config: SmolDriverConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MultiQFormerProjector"]  # it calls parts of its Q-Formers, past hooks on their forward
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        """Weights of the projector; the tower and the language model initialise their own."""
        projector = self.config.projector_config
        if isinstance(module, QFormer):
            module.init_parameters()
        elif isinstance(module, MultiQFormerProjector):
            module.init_buffers()
        elif isinstance(module, nn.RMSNorm):  # LinearConnector's scale_norm
            init.constant_(module.weight, projector.embedding_std)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class SmolDriverModel(SmolDriverPreTrainedModel):
    """Vision tower, multi-Q-Former projector and language model, without the head."""

    def __init__(self, config: SmolDriverConfig):
        super().__init__(config)
        if config.projector_config._attn_implementation is None:  # it is no PreTrainedModel, which would choose itself
            config.projector_config._attn_implementation = config._attn_implementation
        self.vision_tower = AutoModel.from_config(config.vision_config)
        drop_untrained(self.vision_tower)
        # Some towers refuse another image size unless told to interpolate; DINOv2 and its kin always do.
        self.tower_takes_interpolation = "interpolate_pos_encoding" in signature(self.vision_tower.forward).parameters
        self.multi_modal_projector = MultiQFormerProjector(config, patch_grid(config.vision_config, config.image_size))
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_vision_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """The tower on all images in one call.

        Args:
            pixel_values: (images, 3, height, width), images of any cameras.

        Returns:
            The tower's output; its `pooler_output` is replaced by the patch features (images, patches, vision_hidden)
            without class and register tokens: what `forward(vision_features=…)` takes in place of pixels.

        Raises:
            ValueError: images too small for a patch, or of a size that a hierarchical tower would pad.
        """
        size = tuple(pixel_values.shape[-2:])
        rows, columns = patch_grid(self.config.vision_config, size)
        if self.tower_takes_interpolation and size != height_and_width(self.config.vision_config.image_size):
            kwargs["interpolate_pos_encoding"] = True
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **kwargs)
        features = outputs.last_hidden_state  # (images, special tokens + patches, vision_hidden)
        outputs["pooler_output"] = features[:, features.shape[1] - rows * columns :]
        return outputs

    def _check_images(self, num_images: int, camera_ids: torch.Tensor | None, num_queries: int) -> None:
        """Raise one ValueError where images, camera_ids and budget do not fit this model."""
        config = self.config
        if num_images == 0:
            raise ValueError("expected at least one image, got none")
        if not 1 <= num_queries <= config.max_queries or (
            config.connector == "pixel_shuffle" and num_queries != config.max_queries
        ):
            allowed = f"1…{config.max_queries}" if config.connector == "linear" else str(config.max_queries)
            raise ValueError(f"num_queries must be {allowed} with connector={config.connector!r}; got {num_queries}")
        if camera_ids is None:
            if num_images % len(config.cameras):
                raise ValueError(
                    f"without camera_ids every sample has all {len(config.cameras)} cameras, in the order "
                    f"{config.cameras}; got {num_images} images"
                )
        elif camera_ids.shape != (num_images,):
            raise ValueError(
                f"camera_ids must be one index per image, ({num_images},); got shape {tuple(camera_ids.shape)}"
            )
        elif camera_ids.is_floating_point():
            raise ValueError(f"camera_ids must be integers; got {camera_ids.dtype}")
        elif not torch.compiler.is_compiling() and not (
            0 <= int(camera_ids.min()) and int(camera_ids.max()) < len(config.cameras)
        ):
            raise ValueError(
                f"camera_ids must index {config.cameras}, 0…{len(config.cameras) - 1}; got {camera_ids.tolist()}"
            )

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        camera_ids: torch.Tensor | None = None,
        num_queries: int | None = None,
        vision_features: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs,
    ) -> tuple | SmolDriverVisionOutput:
        """Camera images → visual tokens.

        Args:
            pixel_values: (images, 3, height, width).
            camera_ids: (images,) indices into `config.cameras`; None: whole scenes in `config.cameras` order.
            num_queries: queries per camera; default `config.num_queries`.
            vision_features: (images, patches, vision_hidden), `get_vision_features(…).pooler_output` computed before,
                in place of `pixel_values`.
            output_attentions: also return the tower's attentions and where each query looked.

        Raises:
            ValueError: wrong shapes, camera index or budget; both or neither of pixels and features.
        """
        num_queries = self.config.num_queries if num_queries is None else num_queries
        images = given_images(pixel_values, vision_features)
        self._check_images(images.shape[0], camera_ids, num_queries)
        if pixel_values is not None:
            outputs = self.get_vision_features(pixel_values, output_attentions=output_attentions, **kwargs)
            features = outputs.pooler_output
            grid = patch_grid(self.config.vision_config, tuple(pixel_values.shape[-2:]))
        else:
            features, outputs = images, BaseModelOutputWithPooling()
            grid = self.multi_modal_projector.grid
            expected = (grid[0] * grid[1], self.config.vision_config.hidden_size)
            if features.ndim != 3 or features.shape[1:] != expected:
                raise ValueError(
                    f"vision_features must be (images, {expected[0]} patches, {expected[1]}) for images of "
                    f"{self.config.image_size} pixels; got shape {tuple(features.shape)}"
                )
        tokens, qformer_attentions = self.multi_modal_projector(
            features, camera_ids, num_queries, grid, output_attentions
        )
        return SmolDriverVisionOutput(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=tokens,  # (images, tokens, text_hidden)
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            qformer_attentions=qformer_attentions,
        )

    def get_placeholder_mask(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """(batch, sequence) bool: where visual tokens go. Found by the placeholder's embedding if there are no ids."""
        if self.config.image_token_id is None:
            raise ValueError("config.image_token_id is not set: expected the id of the tokenizer's image placeholder")
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)

    def _queries_in_use(self, placeholders: torch.Tensor, num_images: int) -> int:
        """How many queries the prompt's placeholders leave for each image."""
        if torch.compiler.is_compiling():
            return self.config.num_queries
        counts = placeholders.sum(-1).tolist()
        count = sum(counts)
        if num_images == 0 or count == 0 or count % num_images:
            raise ValueError(
                "the number of image placeholders must be a positive multiple of the number of images; "
                f"got {count} placeholders for {num_images} images"
            )
        tokens_per_image = count // num_images
        if any(row % tokens_per_image for row in counts):  # or an image would reach into the next sample
            raise ValueError(
                f"every sample must have whole images of {tokens_per_image} placeholders each; got {counts} "
                f"placeholders in the samples of the batch for {num_images} images"
            )
        return tokens_per_image * self.config.queries_per_token

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        camera_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        vision_features: torch.FloatTensor | None = None,
        **kwargs,
    ) -> tuple | SmolDriverModelOutputWithPast:
        """Run the model; the budget is read off the number of placeholders in the prompt.

        Args:
            input_ids: (batch, sequence), or `inputs_embeds` (batch, sequence, text_hidden) in its place.
            pixel_values: (images in the batch, 3, height, width), in the order of the placeholders.
            camera_ids: (images in the batch,) indices into `config.cameras`.
            vision_features: see `get_image_features`.

        Raises:
            ValueError: if ids and embeddings are both given or both missing, or placeholders do not fit the images.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds, not both and not neither")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_hidden_states = None
        if pixel_values is not None or vision_features is not None:
            num_images = given_images(pixel_values, vision_features).shape[0]
            placeholders = self.get_placeholder_mask(input_ids, inputs_embeds)  # (batch, sequence)
            image_hidden_states = self.get_image_features(
                pixel_values,
                camera_ids,
                num_queries=self._queries_in_use(placeholders, num_images),
                vision_features=vision_features,
                return_dict=True,
            ).pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(placeholders[..., None], image_hidden_states)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
        )
        return SmolDriverModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_hidden_states,
        )


class SmolDriverForConditionalGeneration(SmolDriverPreTrainedModel, GenerationMixin):
    """SmolDriver with its language modelling head: answers questions about what the cameras see."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: SmolDriverConfig):
        super().__init__(config)
        self.model = SmolDriverModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        # Language models name their embeddings differently (embed_tokens, wte, …); this instance's own name counts.
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_features(self, pixel_values=None, camera_ids=None, **kwargs) -> tuple | SmolDriverVisionOutput:
        """See `SmolDriverModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, camera_ids, **kwargs)

    def encode_scene(
        self, images: Mapping[str, Any], processor: Any, num_queries: int | None = None
    ) -> SmolDriverScene:
        """Encode camera images once, for many questions: `scene.ask(…)`, `scene.ask_all(…)`, `scene.score(…)`.

        Args:
            images: {camera: image}, any of the model's cameras.
            processor: this model's `SmolDriverProcessor`.
            num_queries: queries per camera; default: the processor's.

        Raises:
            ValueError: an image, camera or budget that the processor or the model refuses, or a language model without
                full attention in every layer.
        """
        return SmolDriverScene(self, processor, images, num_queries)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        camera_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        vision_features: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> tuple | SmolDriverCausalLMOutputWithPast:
        """See `SmolDriverModel.forward`.

        Args:
            labels: (batch, sequence) token ids, -100 where nothing is to be learnt.
            logits_to_keep: how many last positions, or which positions, get logits; 0: all.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            camera_ids=camera_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_features=vision_features,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])  # (batch, kept, vocab)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return SmolDriverCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,  # named, or generate() refuses embeddings
        is_first_iteration: bool = False,
        use_cache: bool = True,
        **kwargs,
    ) -> dict[str, Any]:
        if use_cache and not is_first_iteration:
            kwargs = {key: value for key, value in kwargs.items() if key not in IMAGE_INPUTS}
        return super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )

    def _expand_inputs_for_generation(self, expand_size: int = 1, is_encoder_decoder: bool = False, **kwargs):
        """Repeat each row for beams or samples; its images, flat over the batch, are repeated as one group."""
        images = {key: kwargs.pop(key) for key in IMAGE_INPUTS if kwargs.get(key) is not None}
        if images and expand_size > 1:
            inputs_embeds = kwargs.get("inputs_embeds")
            input_ids = kwargs.get("input_ids") if inputs_embeds is None else None  # beside embeddings ids are empty
            placeholders = self.model.get_placeholder_mask(input_ids, inputs_embeds)
            num_images = given_images(images.get("pixel_values"), images.get("vision_features")).shape[0]
            tokens_per_image = self.model._queries_in_use(placeholders, num_images) // self.config.queries_per_token
            rows = torch.arange(num_images, device=placeholders.device).split(
                (placeholders.sum(-1) // tokens_per_image).tolist()
            )
            order = torch.cat([row for row in rows for _ in range(expand_size)])
            images = {key: value[order.to(value.device)] for key, value in images.items()}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, **kwargs)
        return input_ids, {**kwargs, **images}


__all__ = [
    "SmolDriverCausalLMOutputWithPast",
    "SmolDriverForConditionalGeneration",
    "SmolDriverModel",
    "SmolDriverPreTrainedModel",
    "SmolDriverVisionOutput",
]
