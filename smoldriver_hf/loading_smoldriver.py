"""The strict door: a checkpoint is loaded whole, or refused with the reason.

```python
model, processor = load("path/or/repo", precision="bf16")  # for answering; see precision_smoldriver.py
scene = model.encode_scene(images, processor)
model = load_strictly("path/or/repo", dtype=torch.float32)  # for anything else, and any architecture
```

`AutoModel.from_pretrained` only warns where weights are missing or left over, and never looks at their values, so a
damaged checkpoint answers as fluently as a sound one. `load_strictly` refuses weights that do not fit the settings;
`load` also settings, processors and values that describe no SmolDriver that can answer.

In an export without this package: `get_class_from_dynamic_module("loading_smoldriver.load", "path/or/repo")`.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .precision_smoldriver import PRECISIONS, set_precision

# Which of `from_pretrained`'s options say where files come from, and whose code may run: config and processor take
# these, the model takes all.
SOURCE_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
CODE_OPTIONS = ("code_revision", "trust_remote_code")
MAX_LAYERS = 1024  # of any part; a damaged config.json can ask for so many that building them never ends
MAX_WEIGHTS_PER_BYTE = 2  # 4-bit weights; a config.json that describes more than the files can hold is damaged
MAX_BUFFERS = 1 << 28  # elements of tables that are computed, not stored


def load(path: str, precision: str | None = "fp32", **kwargs: Any) -> tuple[Any, Any]:
    """A checkpoint's model, ready to answer at `precision`, and its processor; or an error if it is not whole.

    Args:
        path: folder or Hub repository; weights in safetensors files.
        precision: one of `PRECISIONS`, or None: of the type that `dtype` says, by default as the weights are saved.
        kwargs: for `from_pretrained`, such as `revision` or `trust_remote_code` (default: False).

    Raises:
        ValueError: unknown precision, or no sound checkpoint: a file that cannot be read; settings that describe no
            SmolDriver; weights that are missing, left over, of another shape than config.json says, or not finite;
            cameras, queries or placeholder in which config and processor differ.
        OSError: no such folder or repository, or it lacks a file.
    """
    if precision is not None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}; got {precision!r}")
        kwargs["dtype"] = torch.bfloat16 if precision == "bf16" else torch.float32
    source = {name: kwargs[name] for name in SOURCE_OPTIONS if name in kwargs}
    kwargs.setdefault("trust_remote_code", False)  # without an answer transformers asks at the keyboard, and waits
    code = {name: kwargs[name] for name in CODE_OPTIONS if name in kwargs}
    try:
        _refuse_adapter(path)
        with _named(path):
            _check_settings(path, source)
        config = AutoConfig.from_pretrained(path, **source, **code)
        processor = AutoProcessor.from_pretrained(path, **source, **code)
        trial = _check_processor(processor, config)
        if config.camera_labels is None:  # a checkpoint from before there were any
            config.camera_labels = processor.camera_labels()
        _check_size(path, config, source, code)
        model = load_strictly(path, config=config, use_safetensors=True, **kwargs)  # a pickle would run code
        _check_finite(model, trial)
    except OSError:
        raise
    except Exception as error:  # settings of wrong types and broken files make libraries fail in many ways
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no sound checkpoint: {reason.removeprefix(f'{path}: ')}") from error
    model.eval().requires_grad_(False)
    return model if precision is None else set_precision(model, precision), processor


def load_strictly(
    path: str | os.PathLike,
    auto_class: Any = AutoModelForImageTextToText,
    *,
    trim: Callable[[Any], object] | None = None,
    beside: Callable[[str], bool] | None = None,
    **kwargs: Any,
) -> Any:
    """`from_pretrained` of any architecture, which refuses weights that are missing, left over or of another shape.

    Args:
        path: folder or Hub repository.
        auto_class: an Auto class, or a model's own.
        trim: takes away what is not used of the model; its weights may be missing.
        beside: whether a left-over weight, by its name, belongs to something that is not wanted; default: none does.
        kwargs: for `from_pretrained`: `dtype`, `quantization_config`, `device_map`, …

    Raises:
        ValueError: the files do not hold exactly the weights that config.json describes, or an adapter.
        OSError: no such folder or repository, or it lacks a file.
    """
    _refuse_adapter(path)
    with _named(path):  # mismatches are told below, with all names and shapes
        model, report = auto_class.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    missing, foreign = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if trim is not None:
        trim(model)
        missing = [name for name in missing if name in model.state_dict()]
    if beside is not None:
        foreign = [name for name in foreign if not beside(name)]
    problems = []
    if missing:
        problems.append(f"weights are missing: {_some(missing)}")
    if foreign:
        problems.append(f"weights that belong nowhere: {_some(foreign)}")
    for name, given, expected in sorted(report["mismatched_keys"])[:3]:
        problems.append(f"{name} has shape {tuple(given)}; {CONFIG_NAME} says {tuple(expected)}")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return model


def read_config(path: str | os.PathLike, **kwargs: Any) -> Any:
    """`AutoConfig.from_pretrained`, whose errors name the checkpoint.

    Raises:
        ValueError: a path on this machine that is no folder; the Hub is not asked for it.
        OSError: no such repository, or no config.json in it.
    """
    with _named(path):
        return AutoConfig.from_pretrained(path, **kwargs)


@contextmanager
def _named(path: str | os.PathLike) -> Iterator[None]:
    """Refuse a slip in a path, for which the Hub would be asked, and name what could not be had from there."""
    if not os.path.isdir(path) and (
        os.path.isabs(path) or os.path.isdir(os.path.dirname(path)) or os.path.exists(path)
    ):
        raise ValueError(f"{path} is not a folder; expected a checkpoint's folder or a Hub id")
    try:
        yield
    except OSError as error:
        if str(path) in str(error):
            raise
        raise OSError(f"{path} is no folder here, and the Hub does not give it: {error}") from error


def _refuse_adapter(path: str | os.PathLike) -> None:
    """Its base would be loaded in place of the weights."""
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        raise ValueError(f"{path}: it holds an adapter, adapter_config.json; expected a whole model: merge it first")


def _check_settings(path: str, source: dict[str, Any]) -> None:
    """Whether config.json is a SmolDriver's, of sane depth; looked at before any object is made from it."""
    file = cached_file(path, CONFIG_NAME, **source)
    if file is None:
        raise OSError(f"{path} is no folder or repository with a {CONFIG_NAME}")
    with open(file, encoding="utf-8") as stream:
        try:
            settings = json.load(stream)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{CONFIG_NAME} is no JSON: {error}") from error
    if not isinstance(settings, dict) or settings.get("model_type") != "smoldriver":
        given = settings.get("model_type") if isinstance(settings, dict) else settings
        raise ValueError(f"expected model_type 'smoldriver' in {CONFIG_NAME}; got {given!r}")
    pending: list[tuple[str, Any]] = [("", settings)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += value.items()
        elif isinstance(value, list):
            pending += [(name, item) for item in value]
        elif isinstance(value, int | float) and value > MAX_LAYERS and ("layer" in name or "depth" in name):
            raise ValueError(f"{CONFIG_NAME}: expected at most {MAX_LAYERS} layers; got {name}={value!r}")


def _check_processor(processor: Any, config: Any) -> Any:
    """Whether the processor writes prompts and images for this model; returns the inputs of a trial question."""
    vocabulary, token = config.text_config.vocab_size, config.image_token_id
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
        raise ValueError(f"image_token_id must be one of the model's tokens, 0…{vocabulary - 1}; got {token!r}")
    for name in ("cameras", "max_queries", "queries_per_token", "image_token_id"):
        ours, theirs = getattr(config, name), getattr(processor, name, None)
        if ours != theirs:
            raise ValueError(f"{CONFIG_NAME} has {name}={ours!r}, but the processor has {theirs!r}")
    height, width = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
    size = processor.image_processor.size
    if (size["height"], size["width"]) != (height, width):
        raise ValueError(
            f"{CONFIG_NAME} has image_size={config.image_size}, but the processor resizes to {dict(size)}"
        )
    highest = max(processor.tokenizer.get_vocab().values())
    if highest >= vocabulary:
        raise ValueError(f"the tokenizer has token {highest}; the language model knows 0…{vocabulary - 1}")
    labels = processor.labels_in(processor.prompt("?", config.cameras))
    unnamed = [camera for camera in config.cameras if camera not in labels]
    if unnamed:
        raise ValueError(f"the chat template does not name {unnamed[0]} in front of its image")
    picture = Image.new("RGB", (5, 3))
    inputs = processor(images={config.cameras[0]: picture}, text="?", return_tensors="pt")
    pixels, found = inputs["pixel_values"], int((inputs["input_ids"] == token).sum())
    if pixels.shape != (1, 3, height, width) or not pixels.isfinite().all():
        raise ValueError(f"the processor makes pixels of shape {tuple(pixels.shape)}, or not finite, of a picture")
    if found != processor.num_image_tokens():
        raise ValueError(f"the processor makes {found} placeholders for {processor.num_image_tokens()} visual tokens")
    return inputs


def _check_size(path: str, config: Any, source: dict[str, Any], code: dict[str, Any]) -> None:
    """Whether what config.json describes can be in the files, before any memory is taken for it."""
    names = [SAFE_WEIGHTS_NAME]
    if _find(path, SAFE_WEIGHTS_NAME, source) is None:
        index = _find(path, SAFE_WEIGHTS_INDEX_NAME, source)
        if index is None:
            raise OSError(f"{path} has no {SAFE_WEIGHTS_NAME}; pickled weights run code when loaded: convert them")
        with open(index, encoding="utf-8") as stream:
            names = sorted(set(json.load(stream)["weight_map"].values()))
    stored = sum(os.path.getsize(cached_file(path, name, **source)) for name in names)
    options = {"trust_remote_code": code["trust_remote_code"]}
    if type(config) not in AutoModelForImageTextToText._model_mapping:  # its code comes from where its weights do
        options["code_revision"] = code.get("code_revision", source.get("revision"))
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(deepcopy(config), **options)
    weights = sum(parameter.numel() for parameter in skeleton.parameters())
    buffers = sum(buffer.numel() for buffer in skeleton.buffers())
    if weights > MAX_WEIGHTS_PER_BYTE * stored:
        raise ValueError(f"{CONFIG_NAME} describes a model of {weights} weights; the files have {stored} bytes")
    if buffers > MAX_BUFFERS:
        raise ValueError(f"{CONFIG_NAME} describes tables of {buffers} numbers; expected at most {MAX_BUFFERS}")


def _find(path: str, name: str, source: dict[str, Any]) -> str | None:
    return cached_file(path, name, **source, _raise_exceptions_for_missing_entries=False)


@torch.no_grad()
def _check_finite(model: Any, trial: Any) -> None:
    """Whether all weights are numbers, and what becomes of them in a trial question is too."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and tensor.numel():
            if not all(bound.isfinite() for bound in tensor.aminmax()):
                wrong = int((~tensor.isfinite()).sum())
                raise ValueError(f"{wrong} of {tensor.numel()} values of {name} are NaN or infinite")
    if model.device.type != "meta":
        inputs = {name: tensor.to(model.device) for name, tensor in trial.items()}
        if not model(**inputs, logits_to_keep=1).logits.isfinite().all():
            raise ValueError("all weights are finite, but the logits of a trial question are not")


def _some(names: list[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


__all__ = ["load", "load_strictly"]
