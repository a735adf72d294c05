"""The processor: images reach the camera they are named after, and what a user writes stays text."""

import json
import logging

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny import (
    lively,
    picture,
    scene,
    tiny_config,
    tiny_image_processor,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from smoldriver_hf import CAMERAS, SmolDriverProcessor
from smoldriver_hf.chat_smoldriver import RenderedPrompt
from tests.smoldriver_hf.test_chat import (
    IMAGE,
    PROCESSORS,
    TEMPLATES,
    assert_same,
    chat,
    message,
    text_of,
)

# Layouts


def test_a_question_about_named_cameras():
    processor = tiny_processor()
    inputs = processor(
        images={"CAM_BACK": picture(1), "CAM_FRONT": picture(2)},
        text="Is it safe?",
        num_queries=3,
        return_tensors="pt",
    )
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "camera_ids"}
    assert inputs["camera_ids"].tolist() == [1, 4] and inputs["camera_ids"].dtype == torch.int64
    assert inputs["pixel_values"].shape == (2, 3, 28, 28)
    front = processor.image_processor(picture(2), return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"][:1], front)
    assert text_of(processor, inputs) == (
        "<|im_start|>user\nCAM_FRONT: <image>\nCAM_BACK: <image>\nIs it safe?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (inputs["input_ids"] == IMAGE).sum() == 6


def test_dict_order_is_no_matter():
    processor = tiny_processor()
    images = scene()
    turned = dict(reversed(images.items()))
    assert list(turned) != list(images)
    first, second = (processor(images=sample, text="Safe?", return_tensors="pt") for sample in (images, turned))
    assert_same(first, second)
    model = lively(tiny_model())
    assert torch.equal(model(**first).logits, model(**second).logits)


def test_moved_labels_change_what_the_model_sees():
    processor, model = tiny_processor(), lively(tiny_model())
    images = scene()
    moved = dict(zip(images, [*list(images.values())[1:], next(iter(images.values()))], strict=True))
    first, second = (
        model(**processor(images=sample, text="Safe?", return_tensors="pt")).logits[:, -1]
        for sample in (images, moved)
    )
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("cameras", [CAMERAS, ("CAM_BACK",)], ids=len)
def test_a_plain_list_is_all_cameras_in_order(cameras):
    processor = tiny_processor(tiny_config(cameras=list(cameras)))
    images = list(scene(0, cameras).values())
    named = processor(images=scene(0, cameras), text="Safe?", return_tensors="pt")
    for layout in (images, tuple(images), [images]):
        assert_same(processor(images=layout, text="Safe?", return_tensors="pt"), named)
    if len(cameras) == 1:
        assert_same(processor(images=images[0], text="Safe?", return_tensors="pt"), named)


def test_a_batch_may_mix_dicts_and_lists_and_cameras():
    processor = tiny_processor()
    samples = [{"CAM_BACK": picture(1)}, list(scene(2).values()), {"CAM_FRONT": picture(2), "CAM_BACK": picture(3)}]
    inputs = processor(images=samples, text=["One?", "Two, longer?", "Three?"], num_queries=2, return_tensors="pt")
    assert inputs["camera_ids"].tolist() == [4, 0, 1, 2, 3, 4, 5, 1, 4]
    assert (inputs["input_ids"] == IMAGE).sum(-1).tolist() == [2, 12, 4]
    for row, (sample, question) in enumerate(zip(samples, ["One?", "Two, longer?", "Three?"], strict=True)):
        single = processor(images=sample, text=question, num_queries=2, return_tensors="pt")
        assert text_of(processor, inputs, row) == text_of(processor, single)


@pytest.mark.parametrize("style", TEMPLATES)
def test_chat_path_equals_direct_path_token_for_token(style):
    processor = PROCESSORS[style]
    images = {"CAM_FRONT": picture(1), "CAM_BACK_LEFT": picture(2)}
    direct = processor(images=images, text="Is it safe?", num_queries=5, return_tensors="pt")
    messages = [message(*images.items(), "Is it safe?")]
    chatted = chat(processor, messages, processor_kwargs={"num_queries": 5})
    assert_same(chatted, direct)
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    for layout in (images, dict(reversed(images.items())), list(images.values()), [list(images.values())]):
        assert_same(processor(images=layout, text=rendered, num_queries=5, return_tensors="pt"), direct)
    both = processor(images=[images, images], text=[rendered, rendered], num_queries=5, return_tensors="pt")
    assert torch.equal(both["input_ids"], direct["input_ids"].repeat(2, 1))


def test_chat_parts_in_any_order_keep_their_cameras():
    processor = tiny_processor()
    inputs = chat(
        processor, [message("Behind", ("CAM_BACK", picture(1)), "and ahead", ("CAM_FRONT", picture(2)), "?")]
    )
    assert inputs["camera_ids"].tolist() == [4, 1]
    assert "Behind\nCAM_BACK: <image>\nand ahead\nCAM_FRONT: <image>\n?" in text_of(processor, inputs)


def test_chat_parts_without_a_camera_are_all_in_order():
    processor = tiny_processor()
    images = scene().values()
    assert_same(
        chat(processor, [message(*((None, image) for image in images), "Safe?")]),
        chat(processor, [message(*scene().items(), "Safe?")]),
    )


def test_a_batch_of_conversations():
    processor = tiny_processor()
    conversations = [[message(("CAM_BACK", picture(1)), "A?")], [message(*scene().items(), "B?")]]
    inputs = chat(processor, conversations)
    assert inputs["camera_ids"].tolist() == [4, *range(6)] and inputs["input_ids"].shape[0] == 2


def test_several_turns_and_a_system_message():
    processor = tiny_processor()
    messages = [
        {"role": "system", "content": "Be brief."},
        message(("CAM_FRONT", picture()), "A car?"),
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Where?"},
    ]
    assert text_of(processor, chat(processor, messages)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCAM_FRONT: <image>\nA car?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_flat_list_beside_several_prompts_is_divided_by_their_placeholders():
    processor = tiny_processor()
    prompts = ["CAM_BACK: <image> a", "CAM_FRONT: <image> CAM_FRONT_LEFT: <image> b"]
    inputs = processor(images=[picture(1), picture(2), picture(3)], text=prompts, return_tensors="pt")
    assert inputs["camera_ids"].tolist() == [4, 1, 0]


def test_images_alone_and_text_alone():
    processor = tiny_processor()
    inputs = processor(images=scene(), return_tensors="pt")
    assert set(inputs) == {"pixel_values", "camera_ids"}
    inputs = processor(text=["one", "three"], return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1] * 5]  # padded on the left


# Budgets and serving


def test_serving_engines_learn_the_number_of_tokens():
    processor = tiny_processor()
    data = processor._get_num_multimodal_tokens(image_sizes=[(900, 1600)] * 3)
    assert data.num_image_tokens == [8, 8, 8] and data.num_image_patches == [1, 1, 1]
    assert processor._get_num_multimodal_tokens([(900, 1600)], num_queries=3).num_image_tokens == [3]
    assert processor._get_num_multimodal_tokens().num_image_tokens is None
    inputs = processor(images=scene(), text="Q?", return_tensors="pt")
    assert processor.replace_image_token(inputs, 0) == "<image>" * 8
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 6 * data.num_image_tokens[0]
    assert len(inputs["pixel_values"]) == len(inputs["camera_ids"])  # one row per image


def test_engines_may_pass_empty_lists_of_other_media():
    processor = tiny_processor()
    plain = processor(images=scene(), text="Q?", return_tensors="pt")
    assert_same(processor(images=scene(), text="Q?", videos=[], audio=[], return_tensors="pt"), plain)


def test_the_default_budget_is_the_processors():
    processor = tiny_processor(tiny_config(num_queries=5))
    inputs = processor(images=scene(), text="Q?", return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE).sum() == 30


def test_everything_survives_save_and_load(tmp_path):
    config = tiny_config(num_queries=3, cameras=["CAM_BACK", "LIDAR_BEV"])
    processor = tiny_processor(config)
    processor.save_pretrained(tmp_path)
    loaded = SmolDriverProcessor.from_pretrained(tmp_path)
    images = {"LIDAR_BEV": picture(1), "CAM_BACK": picture(2)}
    samples, texts = [images, {"LIDAR_BEV": picture(3)}], ["Is it safe to brake?", "No?"]
    assert_same(
        loaded(images=samples, text=texts, return_tensors="pt"),
        processor(images=samples, text=texts, return_tensors="pt"),
    )
    assert loaded.tokenizer.padding_side == "left"
    assert (loaded.cameras, loaded.num_queries, loaded.max_queries) == (["CAM_BACK", "LIDAR_BEV"], 3, 8)


@pytest.mark.parametrize("said", [None, "right"], ids=["unsaid", "right"])
def test_padding_is_on_the_left_whatever_the_tokenizer_says(tmp_path, said):
    tokenizer = tiny_tokenizer()
    if said is not None:
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = said
    made = SmolDriverProcessor(tiny_image_processor(), tokenizer, cameras=CAMERAS, max_queries=8, num_queries=8)
    made.save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    assert json.loads(settings.read_text())["padding_side"] == "left"
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"
    # As processors of this project were saved before.
    old = json.loads(settings.read_text())
    del old["padding_side"]
    settings.write_text(json.dumps(old | ({} if said is None else {"padding_side": said})))
    loaded = SmolDriverProcessor.from_pretrained(tmp_path)
    ids = loaded(images=[scene(0), scene(1)], text=["Why?", "Is it safe to brake?"], return_tensors="pt")["input_ids"]
    assert ids[0, 0] == loaded.tokenizer.pad_token_id and (ids[:, -1] != loaded.tokenizer.pad_token_id).all()


def test_unequal_prompts_in_a_batch_are_answered_as_alone(tmp_path):
    model = lively(tiny_model())
    tiny_processor(model.config).save_pretrained(tmp_path)
    processor = SmolDriverProcessor.from_pretrained(tmp_path)
    texts = ["Why?", "Are there moving cars to the back of the ego car?"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    batch = processor(images=[scene(0), scene(1)], text=texts, return_tensors="pt")
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, images, text in zip(together, (scene(0), scene(1)), texts, strict=True):
        one = processor(images=images, text=text, return_tensors="pt")
        assert row.tolist() == model.generate(**one, **options)[0, one["input_ids"].shape[1] :].tolist()


def test_lists_are_not_padded_unless_asked():
    """Who takes lists pads them (TRL's GRPO), and would attend to pads of ours."""
    processor, samples, texts = tiny_processor(), [scene(0), scene(1)], ["Why?", "Is it safe to brake?"]
    tensors = processor(images=samples, text=texts, return_tensors="pt")
    lists = processor(images=samples, text=texts)
    for ids, row, mask in zip(lists["input_ids"], tensors["input_ids"], tensors["attention_mask"], strict=True):
        assert ids == row[mask.bool()].tolist()
    padded = processor(images=samples, text=texts, padding=True)
    assert padded["input_ids"] == tensors["input_ids"].tolist()


def test_processors_share_no_state():
    cameras = list(CAMERAS)
    first = SmolDriverProcessor(tiny_image_processor(), tiny_tokenizer(), cameras=cameras)
    cameras.append("LIDAR_BEV")
    assert first.cameras == list(CAMERAS)


def test_a_plain_prompt_beside_a_dict_is_a_question_and_is_warned_about(caplog):
    processor = tiny_processor()
    images = {"CAM_FRONT": picture()}
    rendered = processor.apply_chat_template([message(*images.items(), "Q?")], add_generation_prompt=True)
    assert isinstance(rendered, RenderedPrompt)
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        inputs = processor(images=images, text=str(rendered) + "", return_tensors="pt")
    transformers_logging.disable_propagation()
    assert "taken as text" in caplog.text
    assert (inputs["input_ids"] == IMAGE).sum() == 8


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"images": {"CAM_TOP": picture()}, "text": "Q"},
            r"unknown camera 'CAM_TOP'; this model knows \['CAM_FRONT_LEFT",
        ),
        ({"images": {}, "text": "Q"}, "at least one camera image, got none"),
        ({"images": [], "text": "Q"}, "at least one camera image, got none"),
        ({"images": [[]], "text": "Q"}, "at least one camera image, got none"),
        ({"images": [{}], "text": ["Q"]}, "at least one camera image, got none"),
        ({"images": [{}, []], "text": ["Q", "R"]}, "at least one camera image, got none"),
        ({"images": [scene(), {}], "text": ["Q", "<image>"]}, "sample 1: the text has 1 <image> but no image"),
        ({"images": [picture()] * 5, "text": "Q"}, "5 images without cameras' names"),
        ({"images": picture(), "text": "Q"}, "1 images without cameras' names"),
        ({"images": [[picture()], scene()], "text": ["Q", "R"]}, "sample 0: 1 images without cameras' names"),
        ({"images": [picture()], "text": "USER: <image>\nQ ASSISTANT:"}, "1 images without cameras' names"),
        ({"images": [picture()] * 6, "text": "front left: <image>" * 6}, "unknown camera 'front left'"),
        ({"images": [picture()], "text": "What about CAM_BACK? <image>"}, "is CAM_BACK the camera of the image"),
        ({"images": scene(), "text": "Q", "num_queries": {"CAM_TOP": 2}}, "unknown camera 'CAM_TOP'"),
        ({"images": scene(), "text": "Q", "num_queries": {"CAM_BACK": 9}}, "integer from 1 to 8 .* got 9"),
        ({"images": scene(), "text": "Q", "num_queries": [2, 4]}, "one budget for each sample; got 2 for 1"),
        ({"images": [picture()] * 7, "text": "Q"}, "at most 6 images, one per camera; got 7"),
        ({"images": scene(), "text": ["Q", "R"]}, "one set of images per text; got 1 sets for 2 texts"),
        ({"images": [scene()] * 2, "text": "Q"}, "one set of images per text; got 2 sets for 1 texts"),
        ({"images": [scene(), picture()], "text": "Q"}, "not a mixture"),
        ({"images": [picture(), [picture()]], "text": "Q"}, "not a mixture"),
        ({"images": [picture()] * 3, "text": ["Q", "R"]}, r"as many <image> .* got \[0, 0\] for 3 images"),
        ({"images": [picture()] * 3, "text": ["<image>", "<image>"]}, r"got \[1, 1\] for 3 images"),
        ({"images": [picture()] * 2, "text": "<image> Q"}, "1 <image> placeholders for 2 images; expected one each"),
        ({"images": [picture()], "text": "<image><image> Q"}, "2 <image> placeholders for 1 images"),
        ({"images": [picture()] * 2, "text": "CAM_BACK: <image>\nCAM_BACK: <image>"}, "once per sample; got"),
        ({"images": [picture()] * 2, "text": "CAM_BACK: <image>\nUser: <image>"}, "some do not.*''"),
        ({"images": [picture()], "text": "CAM_BAKC: <image>"}, "unknown camera 'CAM_BAKC'"),
        (
            {"images": {"CAM_BACK": picture()}, "text": RenderedPrompt("CAM_FRONT: <image>")},
            "names .*CAM_FRONT.* are of",
        ),
        ({"images": None, "text": "<image> Q"}, "the text has 1 <image> but no image"),
        ({"images": None, "text": None}, "expected images, text or both; got neither"),
        ({"images": scene(), "text": []}, "at least one string; got an empty list"),
        ({"images": scene(), "text": 3}, "text must be a string or a list of strings; got int"),
        ({"images": scene(), "text": [None]}, "got NoneType"),
        ({"images": scene(), "text": [["Q"]]}, "got list"),
        ({"images": scene(), "text": "Q", "num_queries": 0}, "integer from 1 to 8 for this model; got 0"),
        ({"images": scene(), "text": "Q", "num_queries": 9}, "integer from 1 to 8 for this model; got 9"),
        ({"images": scene(), "text": "Q", "num_queries": -1}, "got -1"),
        ({"images": {"CAM_BACK": None}, "text": "Q"}, "CAM_BACK: image of type NoneType"),
        ({"images": {"CAM_BACK": 3}, "text": "Q"}, "CAM_BACK: image of type int"),
        ({"images": {"CAM_BACK": "no_such.jpg"}, "text": "Q"}, "CAM_BACK: .*no_such.jpg"),
        ({"images": {"CAM_BACK": [picture(), picture()]}, "text": "Q"}, "CAM_BACK: expected one image, got 2"),
        ({"images": {"CAM_BACK": torch.zeros(2, 3, 8, 8)}, "text": "Q"}, "CAM_BACK: expected one image, got 2"),
        ({"images": {"CAM_BACK": []}, "text": "Q"}, "CAM_BACK: expected at least one image"),
        ({"images": [3] * 6, "text": "Q"}, "CAM_FRONT_LEFT: image of type int"),
        ({"images": scene(), "text": "Q", "videos": [1]}, "images and text; got videos or audio"),
        ({"images": scene(), "text": "Q", "audio": [1]}, "images and text; got videos or audio"),
        ({"images": {1: picture()}, "text": "Q"}, "unknown camera 1"),
        (
            {
                "images": {"CAM_BACK": picture(0, (8, 8)), "CAM_FRONT": picture(0, (9, 8))},
                "text": "Q",
                "do_resize": False,
            },
            "one shape; got",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor()(**call, return_tensors="pt")


@pytest.mark.parametrize("budget", [2.0, "4", True])
def test_budgets_are_integers(budget):
    with pytest.raises(StrictDataclassFieldValidationError, match="num_queries"):  # transformers' own check of kwargs
        tiny_processor()(images=scene(), text="Q", num_queries=budget)


def test_pixel_shuffle_has_one_budget():
    processor = SmolDriverProcessor(
        tiny_image_processor(), tiny_tokenizer(), cameras=["A"], max_queries=36, num_queries=36, queries_per_token=9
    )
    assert processor.num_image_tokens() == 4
    with pytest.raises(ValueError, match="integer from 36 to 36 for this model; got 9"):
        processor(images={"A": picture()}, text="Q", num_queries=9)


def test_truncation_never_cuts_images():
    with pytest.raises(ValueError):
        tiny_processor()(images=scene(), text="Q", truncation=True, max_length=20, return_tensors="pt")


@pytest.mark.parametrize(
    ("changes", "message_"),
    [
        ({"cameras": None}, "names of the model's cameras; got none"),
        ({"cameras": []}, "names of the model's cameras; got none"),
        ({"image_token": "<picture>"}, "no image placeholder '<picture>'"),
        ({"tokenizer": None}, "an image processor and a tokenizer"),
        ({"image_processor": None}, "an image processor and a tokenizer"),
    ],
)
def test_processors_need_their_parts(changes, message_):
    parts = {"image_processor": tiny_image_processor(), "tokenizer": tiny_tokenizer(), "cameras": ["A"]}
    with pytest.raises(ValueError, match=message_):
        SmolDriverProcessor(**{**parts, **changes})
