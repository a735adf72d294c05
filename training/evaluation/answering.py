"""Ask any checkpoint about any images: SmolDriver, SmolVLM or Idefics3, with or without an adapter.

    answerer = load_answerer("outputs/final", cameras)
    sight = answerer.look({"CAM_FRONT": "front.jpg"})
    answers = sight.answers(["Are there cars to the front of the ego car?"], max_new_tokens=32, batch_size=16)
    likelihoods = sight.scores("Is it safe?", ["Yes", "No"])

Images are encoded once for all questions about them: SmolDriver keeps its scene (`encode_scene`), the others keep
their visual tokens. Decoding is greedy. A look without images is a text-only prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoProcessor, BitsAndBytesConfig, GenerationConfig, PreTrainedConfig

from smoldriver_hf import load_strictly, parse_budget, read_config
from smoldriver_hf.adapters import load_adapter, merge_adapter
from smoldriver_hf.budgets_smoldriver import Budget
from smoldriver_hf.fingerprint import fingerprint as folder_fingerprint
from smoldriver_hf.precision_smoldriver import PRECISIONS, set_precision
from smoldriver_hf.tower_smoldriver import patch_grid
from training.evaluation.controls import Images
from training.learning.parts import HEAD, modules_of
from training.learning.smolvlm import SceneView, load_processor


@dataclass(frozen=True)
class Answer:
    """`text` is empty and `error` says why where a question could not be asked."""

    text: str
    error: str | None = None


class Sight(Protocol):
    """What a model has seen, ready for questions; `visual_tokens` is how many tokens it costs the language model."""

    visual_tokens: int

    def answers(self, questions: Sequence[str], max_new_tokens: int, batch_size: int) -> list[Answer]: ...

    def scores(self, question: str, choices: Sequence[str]) -> list[float]: ...


class SceneSight:
    """SmolDriver: the scene's cache answers all questions."""

    def __init__(self, model: Any, processor: Any, images: Images, num_queries: Budget | None):
        self.scene = model.encode_scene(images, processor, num_queries)
        self.visual_tokens = sum(len(tokens) for tokens in self.scene.visual_tokens.values())

    def answers(self, questions: Sequence[str], max_new_tokens: int, batch_size: int) -> list[Answer]:
        given = self.scene.ask_all(questions, batch_size, max_new_tokens)
        return [Answer(answer.text or "", None if answer.error is None else str(answer.error)) for answer in given]

    def scores(self, question: str, choices: Sequence[str]) -> list[float]:
        return self.scene.score(question, choices)


@dataclass
class PromptSight:
    """Any model: a prompt per question, with the visual tokens put into its embeddings."""

    model: Any  # takes `inputs_embeds`
    processor: Any  # has `tokenizer`, `image_token_id` and `prompt(question, cameras)`
    cameras: list[str]  # in the order of the prompt
    placeholders: Sequence[Sequence[int]]  # per camera, the token ids that stand in for its image in the prompt
    features: torch.Tensor | None  # (visual tokens, text_hidden) for all of them together, None without images

    def __post_init__(self) -> None:
        self.visual_tokens = 0 if self.features is None else len(self.features)

    def answers(self, questions: Sequence[str], max_new_tokens: int, batch_size: int) -> list[Answer]:
        prompts = [self._prompt_ids(question) for question in questions]
        longest = self.model.config.text_config.max_position_embeddings
        answers = {
            index: Answer("", f"the prompt has {len(ids)} tokens; the language model reads at most {longest}")
            for index, ids in enumerate(prompts)
            if len(ids) > longest
        }
        order = [index for index in range(len(prompts)) if index not in answers]
        order.sort(key=lambda index: len(prompts[index]))  # little padding
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            texts = self._generate([prompts[index] for index in batch], max_new_tokens)
            answers |= {index: Answer(text) for index, text in zip(batch, texts, strict=True)}
        return [answers[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def scores(self, question: str, choices: Sequence[str]) -> list[float]:
        """Log-likelihood of each choice as the beginning of the answer: the sum over its tokens, in nats."""
        tokenizer = self.processor.tokenizer
        endings = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices]
        prompt = self._prompt_ids(question)
        inputs = self._inputs([prompt + ending for ending in endings])
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        kept = max(map(len, endings)) + 1  # one position before the first token of the longest choice
        logits = self.model(**inputs, position_ids=positions, logits_to_keep=kept).logits  # (choices, kept, vocab)
        logs = logits.float().log_softmax(-1)
        return [
            float(row[-1 - len(ending) : -1].gather(1, torch.tensor(ending, device=row.device)[:, None]).sum())
            for row, ending in zip(logs, endings, strict=True)
        ]

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        tokenizer = self.processor.tokenizer
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        # Not the checkpoint's own settings: every model decodes greedily, and nothing else.
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(ends | {tokenizer.eos_token_id}),
            pad_token_id=tokenizer.pad_token_id,
        )
        ids = self.model.generate(**self._inputs(prompts), generation_config=greedy)  # (batch, new tokens)
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _prompt_ids(self, question: str) -> list[int]:
        # What stands for an image may differ from image to image (tiles), so the processor does not expand them.
        ids = self.processor.tokenizer(str(self.processor.prompt(question, self.cameras)))["input_ids"]
        tokens = iter(self.placeholders)
        return [token for i in ids for token in (next(tokens) if i == self.processor.image_token_id else [i])]

    def _inputs(self, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Left-padded embeddings (batch, longest, text_hidden) with the visual tokens in place, and their mask."""
        longest = max(map(len, prompts))
        pad = self.processor.tokenizer.pad_token_id
        device = self.model.get_input_embeddings().weight.device
        ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device)
        embeds = self.model.get_input_embeddings()(ids)
        if self.features is not None:
            places = ids == self.processor.image_token_id  # (batch, longest)
            embeds[places] = self.features.to(embeds.dtype).repeat(len(prompts), 1)
        return {"inputs_embeds": embeds, "attention_mask": mask}


class SmolDriverAnswerer:
    """A SmolDriver checkpoint; `num_queries` is the budget unless `look` is given another."""

    def __init__(self, model: Any, processor: Any, num_queries: Budget | None = None):
        self.model, self.processor, self.num_queries = model, processor, num_queries
        self.cameras = tuple(processor.cameras)

    def look(self, images: Images, num_queries: int | None = None) -> Sight:
        if not images:
            return PromptSight(self.model, self.processor, [], [], None)
        return SceneSight(self.model, self.processor, images, num_queries or self.num_queries)

    @torch.inference_mode()
    def attention(self, images: Images) -> dict[str, NDArray[np.float32]]:
        """Where each camera's Q-Former looks: {camera: (rows, columns)}, means over heads and queries."""
        budget = self.num_queries or self.processor.num_queries
        inputs = self.processor(images=dict(images), num_queries=budget, return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.model.device)
        ids = inputs["camera_ids"].to(self.model.device)
        options = {"num_queries": budget, "output_attentions": True, "return_dict": True}
        outputs = self.model.get_image_features(pixels, ids, **options)
        grid = patch_grid(self.model.config.vision_config, tuple(pixels.shape[-2:]))
        cameras = [self.cameras[index] for index in ids.tolist()]
        maps = {}
        for camera, weights in zip(cameras, outputs.qformer_attentions.float(), strict=True):  # (heads, most, patches)
            queries = self.processor.num_image_tokens(budget, camera) * self.processor.queries_per_token
            maps[camera] = weights[:, :queries].mean(dim=(0, 1)).reshape(grid).cpu().numpy()
        return maps


class BaselineAnswerer:
    """A SmolVLM or Idefics3 checkpoint, prompted as `training.learning.smolvlm` trains it."""

    def __init__(self, model: Any, view: SceneView):
        self.model, self.view = model, view
        self.cameras = tuple(view.cameras)

    @torch.inference_mode()
    def look(self, images: Images, num_queries: int | None = None) -> Sight:
        if num_queries is not None:
            self.view.num_image_tokens(num_queries)  # there is one budget: anything else is an error
        shown = {camera: images[camera] for camera in self.cameras if camera in images}
        if not shown:
            return PromptSight(self.model, self.view, [], [], None)
        files = list(shown.values())
        pixels = {name: tensor.to(self.model.device) for name, tensor in self.view.pixels([files]).items()}
        outputs = self.model.get_image_features(**pixels, return_dict=True)
        features = torch.cat(list(outputs.pooler_output)).flatten(0, -2)  # (visual tokens, text_hidden)
        return PromptSight(self.model, self.view, list(shown), self.view.image_tokens(files), features)


Answerer = SmolDriverAnswerer | BaselineAnswerer


def load_answerer(
    checkpoint: str,
    cameras: Sequence[str],
    *,
    adapter: str | None = None,
    load_in_4bit: bool = False,
    precision: str = "fp32",
    num_queries: Budget | str | None = None,
    image_splitting: bool = False,
) -> Answerer:
    """A checkpoint ready to be asked, on the accelerator where there is one.

    Args:
        checkpoint: folder or Hub id.
        cameras: the cameras to show to a SmolVLM or Idefics3, in the order of the prompt; a SmolDriver has its own.
        adapter: folder of a LoRA adapter; merged as for an export, unless the weights stay in 4 bits.
        load_in_4bit: the language model in NF4.
        precision: "fp32", "bf16", or "int8" (SmolDriver on a CPU).
        num_queries: a SmolDriver's budget, or one as a command line writes it; default: the checkpoint's.
        image_splitting: show a SmolVLM tiles beside each whole image, as it ships.

    Raises:
        ValueError: an architecture that is none of the three, or options that do not fit it or each other.
    """
    num_queries = parse_budget(num_queries)
    config = read_config(checkpoint)
    ours = config.model_type == "smoldriver"
    _check_options(config.model_type, precision, load_in_4bit, image_splitting, num_queries)
    model = _load_model(checkpoint, modules_of(config.model_type), adapter, load_in_4bit, precision)
    model.eval().requires_grad_(False)
    if not load_in_4bit:
        if torch.cuda.is_available():
            model.to("cuda")
        if ours:
            set_precision(model, precision)
    if ours:
        processor = AutoProcessor.from_pretrained(checkpoint)
        processor.num_image_tokens(num_queries)
        return SmolDriverAnswerer(model, processor, num_queries)
    processor = load_processor(checkpoint, cameras, image_splitting)
    return BaselineAnswerer(model, SceneView(processor, cameras))


def _check_options(
    model_type: str, precision: str, load_in_4bit: bool, image_splitting: bool, num_queries: Budget | None
) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}; got {precision!r}")
    ours = model_type == "smoldriver"
    if precision == "int8" and (load_in_4bit or not ours):
        raise ValueError("precision int8 is for a SmolDriver without 4-bit weights")
    if image_splitting and ours:
        raise ValueError("image_splitting is for SmolVLM and Idefics3; a SmolDriver encodes each image once")
    if num_queries is not None and not ours:
        raise ValueError(f"num_queries is a SmolDriver's budget; {model_type} has none")


def _load_model(
    checkpoint: str, modules: Mapping[str, str], adapter: str | None, load_in_4bit: bool, precision: str
) -> Any:
    """The model with its adapter, in float32 or bfloat16, or with the language model in NF4."""
    quantization = None
    if load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=[HEAD, modules["tower"], modules["projector"]],
        )
    bf16 = load_in_4bit or precision == "bf16"
    merges = adapter is not None and not load_in_4bit  # in float32, as it is before an export
    dtype = torch.bfloat16 if bf16 and not merges else torch.float32
    model = load_strictly(checkpoint, quantization_config=quantization, dtype=dtype)
    if merges:
        model = merge_adapter(model, adapter)
        for parameter in model.parameters() if bf16 else ():  # not its tables, which are computed in float32
            parameter.data = parameter.data.to(torch.bfloat16)
    elif adapter is not None:
        model = load_adapter(model, adapter).get_base_model()  # which runs with the adapter's layers in place
    return model


def fingerprint(path: str, config: PreTrainedConfig | None = None) -> str:
    """What exactly was evaluated: sha256 over a folder's weights and settings, or the commit of a Hub repository."""
    if not Path(path).is_dir():
        return f"commit:{None if config is None else config._commit_hash}"
    return folder_fingerprint(Path(path))
