"""SmolDriver: camera images → vision tower → one Q-Former per camera → language model → answer."""

from collections.abc import Mapping
from inspect import signature
from itertools import cycle
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .budgets_smoldriver import Budget, queries_by_camera
from .configuration_smoldriver import SmolDriverConfig
from .generation_smoldriver import CameraGenerationMixin
from .loading_smoldriver import load  # noqa: F401  # so that save_pretrained puts the strict door beside the weights
from .outputs_smoldriver import SmolDriverCausalLMOutputWithPast, SmolDriverModelOutputWithPast, SmolDriverVisionOutput
from .placeholders_smoldriver import camera_ids_of_prompt, each_its_own, expect, given_images, tokens_of_images
from .projector_smoldriver import MultiQFormerProjector, QFormer
from .scene_smoldriver import SmolDriverScene
from .tower_smoldriver import drop_untrained, height_and_width, patch_grid


class SmolDriverPreTrainedModel(PreTrainedModel):
    config_class = SmolDriverConfig
    config: SmolDriverConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["QFormer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

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

    def _check_budget(self, num_queries: int) -> None:
        """Raise a ValueError where the model has no such budget."""
        config = self.config
        if not 1 <= num_queries <= config.max_queries or (
            config.connector == "pixel_shuffle" and num_queries != config.max_queries
        ):
            allowed = f"1…{config.max_queries}" if config.connector == "linear" else str(config.max_queries)
            raise ValueError(f"num_queries must be {allowed} with connector={config.connector!r}; got {num_queries}")

    def _check_images(self, num_images: int, camera_ids: torch.Tensor | None) -> None:
        """Raise one ValueError where images and camera_ids do not fit each other or this model."""
        config = self.config
        if num_images == 0:
            raise ValueError("expected at least one image, got none")
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
        num_queries: Budget | None = None,
        vision_features: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | SmolDriverVisionOutput:
        """Camera images → visual tokens.

        Args:
            pixel_values: (images, 3, height, width).
            camera_ids: (images,) indices into `config.cameras`; None: whole scenes in `config.cameras` order.
            num_queries: queries per camera, or {camera: queries}; default `config.num_queries`.
            vision_features: (images, patches, vision_hidden), `get_vision_features(…).pooler_output` computed before,
                in place of `pixel_values`.
            output_attentions: also return the tower's attentions and where each query looked.

        Raises:
            ValueError: wrong shapes, camera index or budget; both or neither of pixels and features.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        images = given_images(pixel_values, vision_features)
        self._check_images(images.shape[0], camera_ids)
        queries = list(queries_by_camera(num_queries, config.cameras, config.num_queries).values())
        for count in queries:
            self._check_budget(count)
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
            features, camera_ids, max(queries), grid, bool(output_attentions)
        )
        if isinstance(num_queries, Mapping):  # nested: each camera's are the first of the most
            ids = range(len(queries)) if camera_ids is None else camera_ids.tolist()
            tokens = [row[: queries[i] // config.queries_per_token] for i, row in zip(cycle(ids), tokens)]
        return SmolDriverVisionOutput(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=tokens,  # (images, tokens, text_hidden), or of each image where budgets have names
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            qformer_attentions=qformer_attentions,
        )

    def _check_no_images(
        self, input_ids: torch.Tensor | None, camera_ids: torch.Tensor | None, past_key_values: Cache | None
    ) -> None:
        """Refuse a prompt that is about images which are not there; what was generated behind it is not looked at."""
        if camera_ids is not None:
            raise ValueError("camera_ids say whose images are whose, but there are none: expected pixel_values too")
        token = self.config.image_token_id
        if token is None or input_ids is None or torch.compiler.is_compiling():
            return
        if (past_key_values is None or past_key_values.get_seq_length() == 0) and (input_ids == token).any():
            raise ValueError(
                f"the prompt has {int((input_ids == token).sum())} image placeholders but no images: expected "
                "pixel_values, vision_features or mm_encoder_outputs"
            )

    def get_placeholder_mask(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """(batch, sequence) bool: where visual tokens go. Found by the placeholder's embedding if there are no ids."""
        if self.config.image_token_id is None:
            raise ValueError("config.image_token_id is not set: expected the id of the tokenizer's image placeholder")
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)

    def _look(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        camera_ids: torch.Tensor | None,
        encoded: Any,
        **images: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put visual tokens in place of a prompt's placeholders, of each image as many as its run is long.

        Returns:
            inputs_embeds (batch, sequence, text_hidden), and the visual tokens (images, tokens, text_hidden), or
            (tokens of all images, text_hidden) where budgets differ.
        """
        config = self.config
        placeholders = self.get_placeholder_mask(input_ids, inputs_embeds)  # (batch, sequence)
        if encoded is None:
            num_images = given_images(**images).shape[0]
            if camera_ids is None:
                camera_ids = camera_ids_of_prompt(input_ids, placeholders, num_images, config)
        elif any(value is not None for value in images.values()):
            raise ValueError("pass either images or mm_encoder_outputs, not both")
        else:
            num_images = len(encoded.pooler_output)
        lengths = tokens_of_images(placeholders, num_images)  # (images,)
        if torch.compiler.is_compiling():  # shapes cannot depend on the prompt: the most there can be
            different, most = None, config.num_queries if torch.compiler.is_exporting() else config.max_queries
        else:
            different = sorted(set(lengths.tolist()))
            for length in different:
                self._check_budget(most := length * config.queries_per_token)
        if encoded is None:
            how = {"num_queries": most, "output_attentions": False, "return_dict": True}
            encoded = self.get_image_features(camera_ids=camera_ids, **images, **how)
        tokens = encoded.pooler_output
        if not torch.is_tensor(tokens):
            tokens = nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)
        expect(
            lengths.max() <= tokens.shape[1],
            lambda: f"the prompt has runs of {lengths.tolist()} placeholders for {tokens.shape[1]} visual tokens each",
        )
        tokens = tokens if different == [tokens.shape[1]] else each_its_own(tokens, lengths)
        tokens = tokens.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(placeholders[..., None], tokens), tokens

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
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | SmolDriverModelOutputWithPast:
        """Run the model; each image's budget is the length of its run of placeholders in the prompt.

        Args:
            input_ids: (batch, sequence), or `inputs_embeds` (batch, sequence, text_hidden) in its place.
            pixel_values: (images in the batch, 3, height, width), in the order of the placeholders.
            camera_ids: (images in the batch,) indices into `config.cameras`. Without them a camera is known by the
                label in front of its image, `config.camera_labels`, or samples have all cameras in order.
            vision_features: see `get_image_features`.
            mm_encoder_outputs: {"image": what `get_image_features` returned}, in place of all of these; budgets in the
                prompt may be smaller than there.

        Raises:
            ValueError: if ids and embeddings are both given or both missing, or placeholders, images and cameras do
                not fit each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds, not both and not neither")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_hidden_states = None
        encoded = mm_encoder_outputs.get("image") if mm_encoder_outputs else None
        if encoded is not None or pixel_values is not None or vision_features is not None:
            images = {"pixel_values": pixel_values, "vision_features": vision_features}
            inputs_embeds, image_hidden_states = self._look(input_ids, inputs_embeds, camera_ids, encoded, **images)
        else:
            self._check_no_images(input_ids, camera_ids, past_key_values)
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(self.config, name):
                kwargs.setdefault(name, True)
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


class SmolDriverForConditionalGeneration(SmolDriverPreTrainedModel, CameraGenerationMixin):
    """SmolDriver with its language modelling head: answers questions about what the cameras see."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

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
        self, images: Mapping[str, Any], processor: Any, num_queries: Budget | str | None = None
    ) -> SmolDriverScene:
        """Encode camera images once, for many questions: `scene.ask(…)`, `scene.ask_all(…)`, `scene.score(…)`.

        Args:
            images: {camera: image}, any of the model's cameras.
            processor: this model's `SmolDriverProcessor`.
            num_queries: queries per camera, or {camera: queries}, or as a command line writes it (`parse_budget`);
                default: the processor's.

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
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        **kwargs: Unpack[TransformersKwargs],
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
            mm_encoder_outputs=mm_encoder_outputs,
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


__all__ = [
    "SmolDriverCausalLMOutputWithPast",
    "SmolDriverForConditionalGeneration",
    "SmolDriverModel",
    "SmolDriverPreTrainedModel",
    "SmolDriverVisionOutput",
]
