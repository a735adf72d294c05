"""Whatever the processor is called with: a documented error, or exactly the images and the text that were given."""

import base64
import io
import os
import re
from collections.abc import Mapping
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
from bad_inputs import amounts, bomb, broken_bytes, for_each, junk, mutated
from huggingface_hub.errors import StrictDataclassFieldValidationError
from hypothesis import strategies as st
from PIL import Image
from tiny import SPECIAL_TOKENS, picture, tiny_image_processor, tiny_processor

from smoldriver_hf import CAMERAS
from smoldriver_hf.image_processing_smoldriver import FORMATS as OPENED

PROCESSOR = tiny_processor()
BUDGETS = range(1, PROCESSOR.max_queries + 1)
DOCUMENTED = (ValueError, StrictDataclassFieldValidationError)
MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "RGBX", "PA", "RGBa", "I;16")
FORMATS = (*OPENED, "MPO")
OTHER_FORMATS = ("JPEG2000", "ICO", "TGA", "PCX", "SGI", "EPS", "ICNS")


def encoded(format: str) -> bytes:
    """A small picture, with EXIF rotation where the format has it."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    picture(0, (40, 24)).save(buffer, format, **({"exif": exif} if format in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    return buffer.getvalue()


ENCODED = [encoded(format) for format in FORMATS]
OTHERS = [encoded(format) for format in OTHER_FORMATS]
sizes = st.tuples(st.sampled_from([0, 1, 2, 40]), st.sampled_from([0, 1, 3, 9000]))
pictures = st.builds(lambda mode, size: Image.new(mode, size), st.sampled_from(MODES), sizes)
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 9]), max_size=5).map(tuple)
dtypes = st.sampled_from([np.uint8, np.uint16, np.float16, np.float32, np.int64, bool, complex, object, "U3", "M8[s]"])
values = st.sampled_from([0, 1, 0.5, 255, -1, 65535, float("nan"), float("inf")])


@st.composite
def arrays(draw) -> Any:
    array = np.zeros(draw(shapes), dtype=draw(dtypes))
    if array.dtype.kind in "uifc":
        with np.errstate(invalid="ignore"):
            array[...] = np.array(draw(values)).astype(array.dtype)
    kind = draw(st.sampled_from(["numpy", "torch", "meta", "sparse", "masked"]))
    if kind == "numpy" or array.dtype.kind not in "uifcb" or array.dtype == np.uint16:
        return array
    tensor = torch.from_numpy(array)
    return {"meta": tensor.to("meta"), "sparse": tensor.to_sparse(), "masked": np.ma.array(array, mask=True)}.get(
        kind, tensor
    )


files = st.one_of(
    st.sampled_from(ENCODED).flatmap(broken_bytes), st.sampled_from(ENCODED), st.sampled_from([bomb(), *OTHERS])
)
elsewhere = st.sampled_from(["http://127.0.0.1:1/a.jpg", "https://[::1/", "data:image/png;base64,", io.BytesIO()])
images = st.one_of(pictures, arrays(), files, files, junk, elsewhere)
good_images = st.sampled_from([picture(0), picture(1, (1, 1)), np.zeros((3, 5, 3), np.uint8)])
names = st.sampled_from([*CAMERAS, *CAMERAS, *CAMERAS, "CAM_ROOF", "cam_back", "", None, 1])
either = st.one_of(good_images, good_images, images)
samples = st.one_of(
    st.dictionaries(names, either, max_size=6),
    st.dictionaries(st.sampled_from(CAMERAS), good_images, min_size=1),
    st.lists(either, max_size=7),
    images,
)
pieces = [*SPECIAL_TOKENS, "CAM_BACK: <image>\n", "CAM_ROOF: <image>", "CAM_FRONT: ", "\n", "{{ x }}", "Is?", "\ud800"]
questions = st.one_of(st.lists(st.sampled_from(pieces), max_size=4).map("".join), st.text(max_size=20))
calls = st.fixed_dictionaries(
    {"images": st.one_of(samples, samples, st.lists(samples, max_size=3), st.just([[[[picture()]]]]))},
    optional={
        "text": st.one_of(questions, questions, st.lists(questions, max_size=3), junk),
        "num_queries": st.one_of(st.sampled_from(BUDGETS), junk),
        "return_tensors": st.sampled_from(["np", None, "tf", "bogus", 3]),
        "size": st.one_of(junk, st.builds(dict, height=st.sampled_from([0, -1, 9, 10**9]), width=st.just(9))),
        "do_resize": st.booleans(),
        "truncation": st.booleans(),
        "max_length": st.sampled_from([0, 1, 20, 10_000]),
    },
)


def written(value: Any, folder: Any) -> Any:
    """The call with every bytes object put into a file: its path, a `Path`, or base64, in turn."""
    if isinstance(value, bytes):
        kind = len(value) % 3
        if kind == 2:
            return base64.b64encode(value).decode()
        file = folder / f"{len(list(folder.iterdir()))}.bin"
        file.write_bytes(value)
        return file if kind else str(file)
    if isinstance(value, dict):
        return {key: written(item, folder) for key, item in value.items()}
    return [written(item, folder) for item in value] if isinstance(value, list) else value


def leaves(value: Any) -> int:
    """How many images were given."""
    if isinstance(value, Mapping):
        return sum(map(leaves, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(leaves, value))
    return len(value) if getattr(value, "ndim", 0) == 4 else 1


@amounts
@pytest.mark.filterwarnings("ignore")
def test_calls(amount, tmp_path):
    def check(call: dict[str, Any]) -> bool:
        for old in tmp_path.iterdir():
            old.unlink()
        call = {"return_tensors": "pt", **written(call, tmp_path)}
        try:
            inputs = PROCESSOR(**call)
        except DOCUMENTED as error:
            assert len(str(error)) > 10
            return False
        if call["images"] is None:
            assert isinstance(call["text"], str | list) and "pixel_values" not in inputs
            return True
        count = leaves(call["images"])
        assert len(inputs["camera_ids"]) == len(inputs["pixel_values"]) == count
        assert all(0 <= int(index) < len(CAMERAS) for index in inputs["camera_ids"])
        assert np.isfinite(np.asarray(inputs["pixel_values"])).all()
        if call.get("text") is not None:
            budget = call.get("num_queries") or PROCESSOR.num_queries
            ids = np.concatenate([np.ravel(row) for row in inputs["input_ids"]])
            assert (ids == PROCESSOR.image_token_id).sum() == count * budget
        return True

    for_each(amount, calls, check)


@amounts
@pytest.mark.filterwarnings("ignore")
def test_cut_files_are_refused_or_lose_no_pixel(amount, tmp_path):
    """A file that lacks its end is never shown as a picture with a grey lower half."""
    processor = tiny_image_processor()
    plain = {"do_resize": False, "do_rescale": False, "do_normalize": False, "return_tensors": "np"}
    whole = {}
    for index, data in enumerate(ENCODED):
        (tmp_path / "whole").write_bytes(data)
        whole[index] = processor(tmp_path / "whole", **plain)["pixel_values"]

    def check(case: tuple[int, float]) -> bool:
        index, share = case
        (tmp_path / "cut").write_bytes(ENCODED[index][: int(share * len(ENCODED[index]))])
        try:
            found = processor(tmp_path / "cut", **plain)["pixel_values"]
        except ValueError as error:
            assert str(tmp_path / "cut") in str(error)
            return False
        assert np.array_equal(found, whole[index]), f"{FORMATS[index]} cut at {share} was accepted"
        return True

    ends = st.floats(0.9, 1, exclude_max=True)
    shares = st.one_of(ends, st.floats(0, 1, exclude_max=True))
    for_each(amount, st.tuples(st.integers(0, len(ENCODED) - 1), shares), check)


CONVERSATION = [
    {"role": "system", "content": [{"type": "text", "text": "You look."}]},
    {
        "role": "user",
        "content": [
            {"type": "image", "camera": "CAM_BACK"},
            {"type": "image", "camera": "CAM_FRONT"},
            {"type": "text", "text": "Is it safe?"},
        ],
    },
    {"role": "assistant", "content": "Yes."},
]


@amounts
def test_conversations(amount):
    def check(conversation: Any) -> bool:
        try:
            prompt = PROCESSOR.apply_chat_template(conversation)
        except (ValueError, jinja2.TemplateError) as error:
            assert len(str(error)) > 10
            return False
        prompts = [prompt] if isinstance(prompt, str) else prompt
        conversations = [conversation] if isinstance(prompt, str) else conversation
        for prompt, messages in zip(prompts, conversations, strict=True):
            parts = [part for message in messages for part in message["content"] if isinstance(part, dict)]
            shown = re.findall(r"(\w+): <image>\n", prompt)
            assert len(shown) == prompt.count("<image>") == sum(part["type"] == "image" for part in parts)
            assert set(shown) <= set(CAMERAS)
        return True

    for_each(amount, mutated(CONVERSATION), check)


@amounts
def test_placeholders_are_cameras_times_budget(amount):
    """For any cameras, any budget and any question; half a surrogate pair in one is all that is refused."""
    cases = st.tuples(
        st.lists(st.sampled_from(CAMERAS), min_size=1, unique=True),
        st.sampled_from(BUDGETS),
        questions,
        st.booleans(),
    )

    def check(case: tuple[list[str], int, str, bool]) -> bool:
        cameras, budget, question, by_chat = case
        shown = {camera: picture(index, (9, 5)) for index, camera in enumerate(cameras)}
        text: Any = question
        if by_chat:
            parts = [{"type": "image", "camera": camera} for camera in cameras]
            message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
            text = PROCESSOR.apply_chat_template([message], add_generation_prompt=True)
        try:
            inputs = PROCESSOR(images=shown, text=text, num_queries=budget, return_tensors="pt")
        except ValueError:
            assert "\ud800" in question
            return False
        assert int((inputs["input_ids"] == PROCESSOR.image_token_id).sum()) == len(cameras) * budget
        ordered = cameras if by_chat else sorted(cameras, key=CAMERAS.index)
        assert [CAMERAS[index] for index in inputs["camera_ids"]] == ordered
        return True

    for_each(amount, cases, check)


@pytest.mark.parametrize("data", OTHERS, ids=OTHER_FORMATS)
def test_other_formats_are_refused(data, tmp_path):
    """Some would be decoded black where their end is missing, and one starts an interpreter."""
    (tmp_path / "picture").write_bytes(data)
    for source in (tmp_path / "picture", base64.b64encode(data).decode()):
        with pytest.raises(
            ValueError, match="one of the formats BMP, GIF|is no file, URL or base64 data of a picture"
        ):
            PROCESSOR(images={"CAM_BACK": source}, text="Q")


def test_what_is_no_file_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for source in (tmp_path / "pipe.jpg", str(tmp_path / "pipe.jpg"), tmp_path):
        with pytest.raises(ValueError, match="CAM_BACK: image .*expected a file"):
            PROCESSOR(images={"CAM_BACK": source}, text="Q")


@pytest.mark.parametrize("text", ["half \ud800", ["Q", "\udfff"]])
def test_half_surrogate_pairs(text):
    shown = {"CAM_BACK": picture()}
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        PROCESSOR(images=[shown] * len(text) if isinstance(text, list) else shown, text=text)
