"""An exported folder → ONNX graphs for ONNX Runtime, fp32 and optionally int8, and a small runner for them.

    python -m hub_export onnx outputs/smoldriver --out outputs/smoldriver-onnx
    python -m hub_export onnx outputs/smoldriver --out outputs/smoldriver-onnx8 --int8

transformers' own exporter cuts the model into five graphs (vision tower, projector, language model for the prompt,
head, one decoding step) and their runner calls them; what lies between, `OnnxSmolDriver` does. The graphs take whole
scenes, all cameras at one budget; prompt and answer may have any length. With `--int8` the language model's weights
are quantised dynamically; tower and projector stay as they are.

Needs the packages of the extra `export`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, GenerationConfig
from transformers.exporters import OnnxConfig, OnnxExporter
from transformers.exporters.base import ExportedModel

from hub_export.files import check_model, whole
from hub_export.reference import QUESTION, reference_scene
from smoldriver_hf import SmolDriverConfig, SmolDriverProcessor, load

EMBEDDINGS = "embeddings.safetensors"  # prompts mix text with visual tokens, so they are embedded outside the graphs
QUANTIZED = ("language_model", "lm_head", "decode")


@dataclass
class OnnxArguments:
    folder: str = field(metadata={"help": "Exported folder or checkpoint.", "positional": True})
    out: str = field(metadata={"help": "Folder to write; must not exist."})
    num_queries: int | None = field(default=None, metadata={"help": "Budget per camera.", "aliases": ["--budget"]})
    int8: bool = field(default=False, metadata={"help": "Quantise the language model's weights."})


class OnnxSmolDriver:
    """Runs what `main` wrote: encode a scene, prefill a question, decode an answer.

    ```python
    model = OnnxSmolDriver("outputs/smoldriver-onnx")
    model.ask({"CAM_FRONT": "front.jpg", ...}, "Is it safe to brake?")
    ```
    """

    def __init__(self, folder: str | Path):
        self.config = SmolDriverConfig.from_pretrained(folder)
        self.processor = SmolDriverProcessor.from_pretrained(folder)
        self.generation_config = GenerationConfig.from_pretrained(folder)
        self.graphs = ExportedModel.from_pretrained(folder).runners
        self.embeddings = load_file(Path(folder) / EMBEDDINGS)["weight"]  # (vocab, text_hidden)
        projector = self.graphs["multi_modal_projector"].metadata
        self.patches: int = projector.kwargs["features"]["shape"][1]
        self.num_queries: int = projector.in_constants["num_queries"]

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images of all cameras, (cameras, 3, height, width) in the model's order → (cameras, tokens, text_hidden).

        Raises:
            ValueError: not one image per camera.
        """
        if len(pixel_values) != len(self.config.cameras):
            raise ValueError(f"the graphs take one image of each of {self.config.cameras}; got {len(pixel_values)}")
        features = self.graphs["image_encoder"](pixel_values=pixel_values).last_hidden_state[:, -self.patches :]
        height, width = pixel_values.shape[-2:]
        rows = round((self.patches * height / width) ** 0.5)  # the patches have the proportion of the images
        grid = (rows, self.patches // rows)
        tokens, _ = self.graphs["multi_modal_projector"](
            features=features.contiguous(), camera_ids=None, num_queries=self.num_queries, grid=grid
        )
        return tokens

    def prefill(self, visual_tokens: torch.Tensor, input_ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """A prompt (1, sequence) with its visual tokens → logits of the next token (1, vocab), and the cache."""
        embeds = self.embeddings[input_ids]  # (1, sequence, text_hidden)
        embeds[input_ids == self.config.image_token_id] = visual_tokens.flatten(0, 1)
        outputs = self.graphs["language_model"](
            inputs_embeds=embeds,
            attention_mask=None,
            position_ids=torch.arange(input_ids.shape[1])[None],
            past_key_values=DynamicCache(config=self.config.text_config),
        )
        logits = self.graphs["lm_head"](input=outputs.last_hidden_state[:, -1:].contiguous())
        return logits[:, -1], outputs.past_key_values

    def decode(self, token: int, position: int, cache: Any) -> tuple[torch.Tensor, Any]:
        """One more token at `position` → logits of the next one (1, vocab), and the longer cache."""
        outputs = self.graphs["decode"](
            input_ids=torch.tensor([[token]]), position_ids=torch.tensor([[position]]), past_key_values=cache
        )
        return outputs.logits[:, -1], outputs.past_key_values

    def generate(self, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> list[int]:
        """Greedy tokens for what the processor returns for one scene of all cameras."""
        return self._continue(self.encode(inputs["pixel_values"]), inputs["input_ids"], max_new_tokens)

    def _continue(self, visual_tokens: torch.Tensor, input_ids: torch.Tensor, max_new_tokens: int) -> list[int]:
        ends = self.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        logits, cache = self.prefill(visual_tokens, input_ids)
        tokens = [int(logits.argmax())]
        while tokens[-1] not in ends and len(tokens) < max_new_tokens:
            logits, cache = self.decode(tokens[-1], input_ids.shape[1] + len(tokens) - 1, cache)
            tokens.append(int(logits.argmax()))
        return tokens

    def ask(self, images: dict[str, Any], question: str, max_new_tokens: int = 64) -> str:
        """The answer to one question about images of all cameras."""
        return self.ask_all(images, [question], max_new_tokens)[0]

    def ask_all(self, images: dict[str, Any], questions: Sequence[str], max_new_tokens: int = 64) -> list[str]:
        """Answers about one scene, which is encoded once."""
        visual_tokens, answers = None, []
        for question in questions:
            inputs = self.processor(images=images, text=question, num_queries=self.num_queries, return_tensors="pt")
            if visual_tokens is None:
                visual_tokens = self.encode(inputs["pixel_values"])
            tokens = self._continue(visual_tokens, inputs["input_ids"], max_new_tokens)
            answers.append(self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip())
        return answers


def quantize(folder: Path) -> None:
    """Replace the language model's graphs by dynamically quantised ones.

    Weights have seven bits (`reduce_range`): processors without VNNI add pairs of int8 products in 16 bits, where
    those of eight-bit weights overflow.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for name in QUANTIZED:
        path = folder / f"{name}.onnx"
        small = folder / f"{name}.int8.onnx"
        how = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": True}
        quantize_dynamic(path, small, use_external_data_format=True, **how)
        # The graph names its data file, so both get the old names only after the old ones are gone.
        for old in (path, path.with_name(path.name + ".data")):
            old.unlink()
        onnx.save(
            onnx.load(small), path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024
        )
        for new in folder.glob(f"{name}.int8.onnx*"):
            new.unlink()


def write_graphs(args: OnnxArguments, folder: Path) -> str:
    """Export the model in fp32 into `folder` and compare the graphs with it; returns how close they are.

    Raises:
        ValueError: the graphs give other logits.
    """
    model, processor = load(args.folder)
    images = {camera: Image.fromarray(pixels) for camera, pixels in reference_scene(processor.cameras).items()}
    if args.num_queries is not None:
        model.config.num_queries = args.num_queries  # under the exporter the budget cannot be counted
    inputs = processor(images=images, text=QUESTION, num_queries=model.config.num_queries, return_tensors="pt")
    sample = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}

    exported = OnnxExporter().export_for_generation(model, sample, OnnxConfig(dynamic=True), multi_token_decode=True)
    exported.save_pretrained(folder)
    processor.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file({"weight": model.get_input_embeddings().weight.detach().clone()}, folder / EMBEDDINGS)
    if args.int8:
        quantize(folder)

    runner = OnnxSmolDriver(folder)
    with torch.no_grad():
        wanted = model(**inputs).logits[:, -1]
    logits, _ = runner.prefill(runner.encode(inputs["pixel_values"]), inputs["input_ids"])
    difference = (logits - wanted).abs().max().item()
    if not args.int8 and difference > 1e-4 * max(1.0, wanted.abs().max().item()):
        raise ValueError(f"{folder}: logits differ from the model's by {difference:.3g}")
    agree = bool(np.argmax(logits.numpy()) == np.argmax(wanted.numpy()))
    return f"logits differ by at most {difference:.3g}, same next token: {agree}"


def main(args: OnnxArguments) -> Path:
    """Export; returns the folder.

    Raises:
        ValueError: a package of the extra `export` is missing, there is no model, `out` exists, or the graphs give
            other logits.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ValueError(f"graphs need {', '.join(missing)}: pip install {' '.join(missing)}")
    check_model(args.folder)
    out = Path(args.out)
    with whole(out) as unfinished:
        close = write_graphs(args, unfinished)
    print(f"{out}: {sum(path.stat().st_size for path in out.iterdir()) / 1e6:.1f} MB; {close}")
    return out
