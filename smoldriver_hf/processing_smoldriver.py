"""SmolDriverProcessor: named camera images and a question → model inputs.

Images, texts and cameras are brought into one layout and checked against each other; what a prompt looks like is in
`chat_smoldriver.py`.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.utils import logging

from .budgets_smoldriver import Budget, budget_for_each, queries_by_camera
from .chat_smoldriver import CameraPrompts, RenderedPrompt, chat_template_for, named_conversation

logger = logging.get_logger(__name__)


class SmolDriverImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # mypy does not read transformers
    num_queries: int | dict[str, int] | list[int | dict[str, int]]
    return_camera_ids: bool


class SmolDriverProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    images_kwargs: SmolDriverImagesKwargs


class SmolDriverProcessor(CameraPrompts, ProcessorMixin):
    """Wraps the image processor and the tokenizer, and knows the cameras and their budget.

    ```python
    inputs = processor(images={"CAM_FRONT": front, "CAM_BACK": "back.jpg"}, text="Is it safe to brake?",
                       num_queries=16, return_tensors="pt")
    answer = model.generate(**inputs)
    ```

    `images` is one sample's `{camera: image}`, or a plain list of all cameras in the order of `cameras`, or a list of
    either for a batch, in which a text may have none. Beside a dict, or without a placeholder, a text is a user's
    question: the camera prompt is put around it and control tokens inside it are treated as text. Beside a list, a
    text with placeholders is a prompt, as everywhere in transformers; labels in it name the cameras, `CAM_BACK:
    <image>`. `num_queries` is one number, `{camera: number}`, or a list with one of either for each sample.

    Output: `input_ids`, `attention_mask` (batch, sequence), `pixel_values` (images in the batch, 3, height, width) and
    `camera_ids` (images in the batch,), indices into `cameras`. Trainers that stop at inputs that they do not know
    (TRL's RLOO, and GRPO with `beta`) get none after `processor.images_kwargs = {"return_camera_ids": False}`: the
    model then reads the cameras in the prompt.

    Args:
        image_processor, tokenizer: the parts.
        cameras: the model's cameras, in `config.cameras` order.
        max_queries, num_queries: queries that exist, and in use by default, per camera.
        queries_per_token: queries that one visual token takes: 1, or `scale_factor`² with `pixel_shuffle`.
        image_token: the placeholder.

    Raises (when called):
        ValueError: images, texts, cameras or budget that do not fit each other or this model, or an image that cannot
            be read; names the sample and the camera.
        StrictDataclassFieldValidationError: transformers' own, for an option of a wrong type, such as a budget of 2.5.
    """

    valid_processor_kwargs = SmolDriverProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        cameras: list[str] | None = None,
        max_queries: int = 64,
        num_queries: int = 64,
        queries_per_token: int = 1,
        image_token: str = "<image>",
    ):
        if not cameras:
            raise ValueError("SmolDriverProcessor needs the names of the model's cameras; got none")
        if image_processor is None or tokenizer is None:
            raise ValueError("SmolDriverProcessor needs an image processor and a tokenizer")
        if image_token not in tokenizer.get_vocab():
            raise ValueError(f"the tokenizer has no image placeholder {image_token!r}: add it as a special token")
        self.cameras = list(cameras)
        self.max_queries = max_queries
        self.num_queries = num_queries
        self.queries_per_token = queries_per_token
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if chat_template is None:
            chat_template = chat_template_for(tokenizer, self.cameras, image_token)
        # An answer follows its prompt. Saved is what a tokenizer was constructed with, and source checkpoints say
        # "right" or nothing.
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def _merge_kwargs(self, *args, **kwargs) -> dict[str, dict]:
        """Tensors are padded unless told otherwise; lists are not, for who pads them has no mask of ours."""
        merged = super()._merge_kwargs(*args, **kwargs)
        text_kwargs = merged["text_kwargs"]
        text_kwargs.setdefault("padding", text_kwargs.get("return_tensors") is not None)
        return merged

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, "pixel_values", "camera_ids"]

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """See `ProcessorMixin.apply_chat_template`. Image parts, `image_url` too, have a `"camera"`; without any, they
        are all cameras in order.

        Raises:
            ValueError: not a list of messages with role and content, or as when the processor is called.
            jinja2.TemplateError: a role, a part or a camera that the template does not know.
        """
        conversation = named_conversation(conversation, self.cameras)
        rendered = super().apply_chat_template(conversation, chat_template, **kwargs)
        if isinstance(rendered, str):
            return RenderedPrompt(rendered)
        if isinstance(rendered, list) and rendered and isinstance(rendered[0], str):
            return [RenderedPrompt(prompt) for prompt in rendered]
        return rendered

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Bring every accepted layout into one: per sample a prompt with placeholders and a `{camera: image}` dict."""
        if videos or audio:  # some engines pass empty lists
            raise ValueError("SmolDriver takes images and text; got videos or audio")
        if text is None:
            texts = None
        else:
            texts = [text] if isinstance(text, str) else list(text) if isinstance(text, list | tuple) else [text]
            for item in texts:
                if not isinstance(item, str):
                    raise ValueError(f"text must be a string or a list of strings; got {type(item).__name__}")
                if not item.isascii():
                    _reject_surrogates(item)
            if not texts:
                raise ValueError("text must hold at least one string; got an empty list")
        if images is None:
            for item in texts or []:
                if self.image_token in item:
                    raise ValueError(f"the text has {item.count(self.image_token)} {self.image_token} but no image")
            return None, texts, None, None

        samples = self._samples(images, texts)
        if not any(len(sample) for sample in samples):
            raise ValueError(f"expected at least one camera image, got none; the cameras are {self.cameras}")
        if texts is None:
            return [self._named(sample, None) for sample in samples], None, None, None
        prompts: list[str] = []
        named: list[dict[str, Any]] = []
        for index, (sample, item) in enumerate(zip(samples, texts, strict=True)):
            where = f"sample {index}: " if len(samples) > 1 else ""
            try:
                if len(sample) == 0:  # about no image, beside others that are
                    if self.image_token in item:
                        raise ValueError(
                            f"the text has {item.count(self.image_token)} {self.image_token} but no image"
                        )
                    named.append({})
                    prompts.append(str(item))
                elif self._is_prompt(item, sample):
                    named.append(self._named(sample, item))
                    prompts.append(str(item))
                else:
                    named.append(self._named(sample, None))
                    prompts.append(str(self.prompt(item, list(named[-1]))))
            except ValueError as error:
                raise ValueError(f"{where}{error}") from error
        return named, prompts, None, None

    def _samples(self, images: Any, texts: list[str] | None) -> list[Any]:
        """One dict or list of images per text."""
        nested = list | tuple | Mapping
        if isinstance(images, list | tuple) and any(isinstance(item, nested) for item in images):
            images = [[] if item is None else item for item in images]
        if isinstance(images, Mapping) or not isinstance(images, list | tuple):
            samples = [images if isinstance(images, Mapping) else [images]]
        elif images and all(isinstance(item, nested) for item in images):
            samples = list(images)
        elif any(isinstance(item, nested) for item in images):
            raise ValueError("images must be one sample (a dict or a flat list) or a list of samples, not a mixture")
        elif texts is not None and len(texts) > 1:  # flat list, several prompts: their placeholders divide it
            counts = [item.count(self.image_token) for item in texts]
            if sum(counts) != len(images):
                raise ValueError(
                    f"a flat list of images beside {len(texts)} texts needs as many {self.image_token} in them as "
                    f"images; got {counts} for {len(images)} images. Pass one dict or list of images per text"
                )
            ends = [sum(counts[: index + 1]) for index in range(len(counts))]
            samples = [list(images[end - count : end]) for end, count in zip(ends, counts, strict=True)]
        else:
            samples = [list(images)]
        if texts is not None and len(samples) != len(texts):
            raise ValueError(f"expected one set of images per text; got {len(samples)} sets for {len(texts)} texts")
        return samples

    def _is_prompt(self, text: str, sample: Any) -> bool:
        """Whether placeholders in `text` are control: the caller's prompt, rather than a user's question."""
        if isinstance(text, RenderedPrompt):
            return True
        if self.image_token not in text:
            return False
        if isinstance(sample, Mapping):
            logger.warning(
                f"A text beside a dict of images is a user's question, so its {self.image_token} is taken as text. If "
                "it is a prompt, pass apply_chat_template's own result, or the images as a list in the prompt's order."
            )
            return False
        return True

    def _named(self, sample: Any, prompt: str | None) -> dict[str, Any]:
        """{camera: image} of one sample, in the order of its prompt, or of `cameras` where there is none yet."""
        if isinstance(sample, Mapping):
            self._check_known(list(sample))
        elif len(sample) > len(self.cameras):
            raise ValueError(f"expected at most {len(self.cameras)} images, one per camera; got {len(sample)}")
        labels = [""] * len(sample) if prompt is None else self.labels_in(prompt)
        if len(labels) != len(sample):
            raise ValueError(
                f"the prompt has {len(labels)} {self.image_token} placeholders for {len(sample)} images; "
                "expected one each"
            )
        if prompt is None and isinstance(sample, Mapping):
            return {camera: sample[camera] for camera in self.cameras if camera in sample}
        if all(labels):
            self._check_known(labels)
        elif any(labels):
            raise ValueError(f"some placeholders name a camera and some do not: {labels}")
        elif len(labels) != len(self.cameras):
            raise ValueError(
                f"{len(labels)} images without cameras' names: name them, {{camera: image}} or 'CAM_BACK: "
                f"{self.image_token}', or give all of {self.cameras} in this order"
            )
        else:
            labels = list(self.cameras)
        if isinstance(sample, Mapping):
            if set(labels) != set(sample):
                raise ValueError(f"the prompt names {labels}, but the images are of {list(sample)}")
            return {camera: sample[camera] for camera in labels}
        return dict(zip(labels, sample, strict=True))

    def _check_known(self, names: list[str]) -> None:
        unknown = [name for name in names if name not in self.cameras]
        if unknown:
            raise ValueError(f"unknown camera {unknown[0]!r}; this model knows {self.cameras}")
        if len(set(names)) != len(names):
            raise ValueError(f"each camera may come once per sample; got {names}")

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """`prepare_inputs_layout` has checked images against text; what is left is that there is something."""
        if images is None and text is None:
            raise ValueError("expected images, text or both; got neither")

    def _process_images(
        self, images: list[dict[str, Any]], num_queries: Any = None, return_camera_ids: bool = True, **kwargs
    ):
        """All samples' images → pixel_values and camera_ids, and the text that replaces each placeholder."""
        budgets = budget_for_each(num_queries, len(images))
        for budget in budgets:
            self.num_image_tokens(budget)  # a wrong budget is told before any image is decoded
        kwargs["return_tensors"] = "np"
        pixel_values, camera_ids, replacements = [], [], []
        for sample, budget in zip(images, budgets, strict=True):
            for camera, image in sample.items():
                try:
                    pixels = self.image_processor([image], **kwargs)["pixel_values"]  # (1, 3, height, width)
                    if len(pixels) != 1:
                        raise ValueError(f"expected one image, got {len(pixels)}")
                except ValueError as error:
                    raise ValueError(f"{camera}: {error}") from error
                pixel_values.append(pixels)
                camera_ids.append(self.cameras.index(camera))
                replacements.append(self.image_token * self.num_image_tokens(budget, camera))
        shapes = {pixels.shape for pixels in pixel_values}
        if len(shapes) > 1:
            raise ValueError(f"without do_resize all images must have one shape; got {sorted(shapes)}")
        # (images, 3, height, width) and (images,)
        processed = {"pixel_values": np.concatenate(pixel_values), "camera_ids": np.asarray(camera_ids)}
        if not return_camera_ids:
            del processed["camera_ids"]
        return processed, replacements

    def num_image_tokens(self, num_queries: Budget | None = None, camera: str | None = None) -> int:
        """Visual tokens of a camera at a budget, or at the default; of the one that has most where none is named.

        Raises:
            ValueError: budget out of range, or not the only one that `pixel_shuffle` has, or of an unknown camera.
        """
        queries = queries_by_camera(num_queries, self.cameras, self.num_queries)
        highest = self.max_queries
        lowest = 1 if self.queries_per_token == 1 else highest
        for count in queries.values():
            if isinstance(count, bool) or not isinstance(count, int) or not lowest <= count <= highest:
                raise ValueError(
                    f"num_queries must be an integer from {lowest} to {highest} for this model; got {count!r}"
                )
        return (max(queries.values()) if camera is None else queries[camera]) // self.queries_per_token

    def replace_image_token(self, image_inputs: dict, image_idx: int, num_queries: Any = None, **kwargs) -> str:
        """The placeholders of one image; of one sample's budget."""
        return self.image_token * self.num_image_tokens(
            num_queries, self.cameras[image_inputs["camera_ids"][image_idx]]
        )

    def _get_num_multimodal_tokens(self, image_sizes=None, num_queries: Any = None, **kwargs) -> MultiModalData:
        """Tokens and patches per image, for serving engines that plan ahead."""
        if image_sizes is None:
            return MultiModalData()
        tokens = self.num_image_tokens(num_queries)
        return MultiModalData(num_image_tokens=[tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes))

    def camera_labels(self) -> dict[str, list[int]]:
        """{camera: token ids right before its image}, for `config.camera_labels`; empty where they tell nothing apart.

        What stands there in a prompt with one image and in one with all, to their common end.
        """
        found: dict[str, list[int]] = {}
        for camera in self.cameras:
            texts = []
            for shown in ([camera], [*(other for other in self.cameras if other != camera), camera]):
                ids = self.prompt_ids("", shown, None)
                end = len(ids) - ids[::-1].index(self.image_token_id) - self.num_image_tokens(None, camera)
                start = max((i + 1 for i in range(end) if ids[i] == self.image_token_id), default=0)
                texts.append(ids[start:end][::-1])
            same = zip(*texts, strict=False)
            found[camera] = [token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], same)][::-1]
        return found if len({tuple(label) for label in found.values()}) == len(found) else {}


def _reject_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # no tokenizer takes it, and each fails in its own way
        raise ValueError(f"text has half of a surrogate pair, {text[error.start]!a}; expected Unicode") from error


__all__ = ["SmolDriverProcessor"]
