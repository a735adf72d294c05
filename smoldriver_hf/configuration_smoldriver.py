"""SmolDriverConfig: which cameras there are, which parts see and speak, and how many tokens a camera may cost."""

from copy import deepcopy

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

# nuScenes' six cameras, front row left to right, then back row. The order fixes nothing but the meaning of a plain
# list of images: weights, batches and files name their camera.
CAMERAS = (
    "CAM_FRONT_LEFT",
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_LEFT",
    "CAM_BACK",
    "CAM_BACK_RIGHT",
)
CONNECTORS = ("linear", "pixel_shuffle")
KEY_SOURCES = ("features", "position")
MAX_IMAGE_SIDE = 4096  # pixels; far more than any tower is given, and far less than what would exhaust the memory

# What `from_pretrained(..., trust_remote_code=True)` loads. transformers writes only the entry of the class being
# saved; a repository needs all, so the config carries them from the start.
AUTO_MAP = {
    "AutoConfig": "configuration_smoldriver.SmolDriverConfig",
    "AutoModel": "modeling_smoldriver.SmolDriverModel",
    "AutoModelForImageTextToText": "modeling_smoldriver.SmolDriverForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_smoldriver.SmolDriverForConditionalGeneration",
    "AutoImageProcessor": "image_processing_smoldriver.SmolDriverImageProcessor",
    "AutoProcessor": "processing_smoldriver.SmolDriverProcessor",
}


class SmolDriverProjectorConfig(PreTrainedConfig):
    """Dimensions of one Q-Former and of the connector behind the Q-Formers.

    Args:
        hidden_size: width of the Q-Formers' output. With `connector="pixel_shuffle"` it is the width of the features
            that SmolVLM's connector expects.
        num_attention_heads: heads of the cross-attention; divides `hidden_size`.
        intermediate_size: width of the MLP behind the attention.
        scale_factor: side of the square of queries that `pixel_shuffle` folds into one token.
        embedding_std: scale that `linear` gives visual tokens at initialisation: the text embeddings' own standard
            deviation, so that neither modality drowns the other.
        camera_vectors: each Q-Former has a learned vector that is added to its visual tokens and so says whose eye
            they come from; zero at initialisation. Checkpoints from before there were any have none.
        initializer_range: standard deviation of the learned queries at initialisation.
        layer_norm_eps: epsilon of all norms.
    """

    model_type = "smoldriver_projector"
    base_config_key = "projector_config"

    def __init__(
        self,
        hidden_size: int = 384,
        num_attention_heads: int = 6,
        intermediate_size: int = 1536,
        scale_factor: int = 3,
        embedding_std: float = 1.0,
        camera_vectors: bool = False,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-6,
        **kwargs,
    ):
        sizes = {"hidden_size": hidden_size, "num_attention_heads": num_attention_heads}
        sizes |= {"intermediate_size": intermediate_size, "scale_factor": scale_factor}
        for field, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"projector {field} must be a positive integer; got {value!r}")
        if hidden_size % num_attention_heads or hidden_size % 4:
            raise ValueError(
                "projector hidden_size must be divisible by num_attention_heads and by 4 (2-D sine-cosine positions); "
                f"got hidden_size={hidden_size}, num_attention_heads={num_attention_heads}"
            )
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.scale_factor = scale_factor
        self.embedding_std = embedding_std
        self.camera_vectors = camera_vectors
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        super().__init__(**kwargs)


def _sub_config(config, default_model_type: str, field: str):
    """A config object of our own, of whatever architecture `config` (object, dict or None) names."""
    if config is None:
        return CONFIG_MAPPING[default_model_type]()
    if isinstance(config, PreTrainedConfig):
        return deepcopy(config)  # the caller's stays as it is, and no two models share one
    if not isinstance(config, dict):
        raise ValueError(f"{field} must be a configuration or a dict; got {config!r}")
    model_type = config.get("model_type", default_model_type)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"{field}: transformers knows no architecture {model_type!r}")
    return CONFIG_MAPPING[model_type](**{key: value for key, value in config.items() if key != "model_type"})


class SmolDriverConfig(PreTrainedConfig):
    """Configuration of SmolDriver: a vision tower, one Matryoshka Q-Former per named camera, a causal language model.

    Args:
        vision_config: config (or dict with `model_type`) of any transformers vision encoder with patch tokens.
        projector_config: `SmolDriverProjectorConfig` or dict.
        text_config: config (or dict with `model_type`) of any causal language model.
        cameras: names of the cameras, each with a Q-Former of its own. Any subset of them is a valid input.
        max_queries: queries that exist per camera (a parameter shape).
        num_queries: queries in use when the caller names no budget, 1…`max_queries`.
        connector: `"linear"` (elastic: 1…`max_queries` tokens per camera and call) or `"pixel_shuffle"` (all queries,
            a square grid, folded by `scale_factor`²: 27×27 queries become 81 tokens, as SmolVLM's own connector does).
        key_source: `"features"` (where a query looks depends on the image) or `"position"` (keys made of positions
            only, as in MQT's released code: a fixed spatial pooling, kept for the ablation).
        image_size: side, or (height, width), in pixels of the images the tower is given; default: the tower's own.
        image_token_id: id of the placeholder that visual tokens replace.
        camera_labels: {camera: token ids that stand right before its image in a prompt}, by which images that come
            without `camera_ids` are known; see `SmolDriverProcessor.camera_labels`.

    Raises:
        ValueError: naming the field, what was expected and what was given.
    """

    model_type = "smoldriver"
    sub_configs = {
        "vision_config": AutoConfig,
        "projector_config": SmolDriverProjectorConfig,
        "text_config": AutoConfig,
    }

    def __init__(
        self,
        vision_config=None,
        projector_config=None,
        text_config=None,
        cameras=CAMERAS,
        max_queries: int = 64,
        num_queries: int | None = None,
        connector: str = "linear",
        key_source: str = "features",
        image_size: int | list[int] | None = None,
        image_token_id: int | None = None,
        camera_labels: dict[str, list[int]] | None = None,
        **kwargs,
    ):
        self.vision_config = _sub_config(vision_config, "dinov2", "vision_config")
        self.text_config = _sub_config(text_config, "llama", "text_config")
        if projector_config is None:
            projector_config = SmolDriverProjectorConfig()
        elif isinstance(projector_config, dict):
            projector_config = SmolDriverProjectorConfig(
                **{key: value for key, value in projector_config.items() if key != "model_type"}
            )
        elif isinstance(projector_config, PreTrainedConfig):
            projector_config = deepcopy(projector_config)
        else:
            raise ValueError(f"projector_config must be a configuration or a dict; got {projector_config!r}")
        self.projector_config = projector_config

        self._check_parts()

        # SigLIP's pooling head, which last_hidden_state never uses, holds an nn.MultiheadAttention (vLLM takes none).
        if self.vision_config.model_type.startswith("siglip"):
            self.vision_config.vision_use_head = False

        if isinstance(cameras, str):
            raise ValueError(f"cameras must be a list of names, not one string; got {cameras!r}")
        if not isinstance(cameras, list | tuple):
            raise ValueError(f"cameras must be a list of names; got {cameras!r}")
        self.cameras = list(cameras)
        self.max_queries = max_queries
        self.num_queries = max_queries if num_queries is None else num_queries
        self.connector = connector
        self.key_source = key_source
        self.image_size = self.vision_config.image_size if image_size is None else image_size
        self.image_token_id = image_token_id
        self.camera_labels = camera_labels
        self._check()

        kwargs["auto_map"] = {**AUTO_MAP, **kwargs.get("auto_map", {})}  # older checkpoints lack some
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        super().__init__(**kwargs)

    def to_dict(self) -> dict:
        """Of the head the language model's settings say what is true here, where training may have untied it."""
        settings = super().to_dict()
        settings["text_config"]["tie_word_embeddings"] = self.tie_word_embeddings
        return settings

    def _check_parts(self) -> None:
        """Whether these are a patch encoder and a language model that this architecture can join."""
        vision, text = self.vision_config, self.text_config
        for field in ("hidden_size", "image_size", "patch_size"):
            if not hasattr(vision, field):
                raise ValueError(
                    f"vision_config must be an image encoder's, with {field} (clip_vision_model rather than clip); "
                    f"got {vision.model_type!r}"
                )
        if vision.hidden_size % 4:
            raise ValueError(
                "vision_config.hidden_size must be divisible by 4 (2-D sine-cosine positions); "
                f"got {vision.hidden_size}"
            )
        for field in ("hidden_size", "vocab_size"):
            if not hasattr(text, field):
                raise ValueError(f"text_config must be a language model's, with {field}; got {text.model_type!r}")
        for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(text, field, None) is not None:
                raise ValueError(
                    f"text_config: {text.model_type!r} changes its logits by {field}, which SmolDriver's plain head "
                    f"would silently leave out; expected a language model without it, got {getattr(text, field)}"
                )

    def _check(self) -> None:
        names = self.cameras
        if not names or not all(isinstance(name, str) and name.isidentifier() for name in names):
            raise ValueError(f"cameras must be a non-empty list of names like 'CAM_FRONT' (identifiers); got {names}")
        if len(set(names)) != len(names):
            raise ValueError(f"cameras must not repeat a name; got {names}")
        size = self.image_size if isinstance(self.image_size, list | tuple) else [self.image_size] * 2
        if len(size) != 2 or not all(
            isinstance(side, int) and not isinstance(side, bool) and 0 < side <= MAX_IMAGE_SIDE for side in size
        ):
            raise ValueError(
                f"image_size must be one side or (height, width), 1…{MAX_IMAGE_SIDE} pixels; got {self.image_size!r}"
            )
        for field in ("max_queries", "num_queries"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= self.max_queries:
                raise ValueError(f"{field} must be an integer between 1 and max_queries; got {value!r}")
        token = self.image_token_id
        if token is not None and (isinstance(token, bool) or not isinstance(token, int) or token < 0):
            raise ValueError(f"image_token_id must be None or a token's id, 0 or more; got {token!r}")
        labels = {} if self.camera_labels is None else self.camera_labels
        if not isinstance(labels, dict) or not all(labels.values()):
            raise ValueError(f"camera_labels must be None or token ids by camera; got {labels!r}")
        if unknown := [camera for camera in labels if camera not in names]:
            raise ValueError(f"camera_labels tells of {', '.join(unknown)}, but cameras are {names}")
        if self.connector not in CONNECTORS:
            raise ValueError(f"connector must be one of {CONNECTORS}; got {self.connector!r}")
        if self.key_source not in KEY_SOURCES:
            raise ValueError(f"key_source must be one of {KEY_SOURCES}; got {self.key_source!r}")
        if self.connector == "pixel_shuffle":
            side, fold = round(self.max_queries**0.5), self.projector_config.scale_factor
            if side**2 != self.max_queries or side % fold or self.num_queries != self.max_queries:
                raise ValueError(
                    "connector='pixel_shuffle' uses all queries of a square grid whose side scale_factor divides; got "
                    f"max_queries={self.max_queries}, num_queries={self.num_queries}, scale_factor={fold}"
                )

    @property
    def queries_per_token(self) -> int:
        """Queries that become one visual token: 1, or `scale_factor`² with `pixel_shuffle`."""
        return self.projector_config.scale_factor**2 if self.connector == "pixel_shuffle" else 1
