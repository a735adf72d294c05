"""Runs of placeholders: each is one image's, whatever stands around it, and what does not fit is refused."""

import pytest
import torch
from tiny import lively, scene, tiny_config, tiny_inputs, tiny_model, tiny_processor
from transformers import GenerationConfig

from smoldriver_hf import CAMERAS
from smoldriver_hf.placeholders_smoldriver import cameras_of_labels, each_its_own, images_of_rows, tokens_of_images
from tests.smoldriver_hf.test_chat import PROCESSORS, TEMPLATES

IMAGE = 3
PLACES = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 1]]).bool()


def test_runs_end_at_text_and_at_the_end_of_a_row():
    assert tokens_of_images(PLACES, 4).tolist() == [2, 1, 3, 1]
    assert images_of_rows(PLACES) == [2, 0, 2]
    for wrong in (0, 3, 5):
        with pytest.raises(ValueError, match=f"got 7 placeholders for {wrong} images, in 4 runs"):
            tokens_of_images(PLACES, wrong)


def test_each_image_is_cut_to_its_own_length():
    tokens = torch.arange(24.0).view(3, 4, 2)
    cut = each_its_own(tokens, torch.tensor([1, 4, 2]))
    assert cut.tolist() == torch.cat([tokens[0, :1], tokens[1], tokens[2, :2]]).tolist()


def test_the_longest_label_that_fits_counts():
    ids = torch.tensor([[7, 8, IMAGE, IMAGE, 9, 8, IMAGE, 8, IMAGE]])
    labels = {"short": [8], "long": [7, 8]}
    assert cameras_of_labels(ids, ids == IMAGE, labels) == ["long", "short", "short"]
    assert cameras_of_labels(ids, ids == IMAGE, {"long": [7, 8]}) is None


@pytest.mark.parametrize("style", TEMPLATES)
@pytest.mark.parametrize(
    "cameras", [CAMERAS[::-1], ("CAM_BACK", "CAM_FRONT", "CAM_FRONT_LEFT"), ("CAM_BACK",)], ids=len
)
def test_without_camera_ids_the_labels_tell(style, cameras):
    """Trainers and engines lose inputs that they do not know; no camera is then guessed."""
    processor = PROCESSORS[style]
    vocabulary = len(processor.tokenizer)
    changes = {"vocab_size": vocabulary}
    text_config = tiny_config().text_config
    text_config.update(changes)
    labels = processor.camera_labels()
    model = lively(tiny_model(text_config=text_config, camera_labels=labels, image_token_id=processor.image_token_id))
    parts = [{"type": "image", "camera": camera} for camera in cameras]
    texts = [
        processor.apply_chat_template([{"role": "user", "content": [*parts, {"type": "text", "text": question}]}])
        for question in ("Why?", "And CAM_FRONT: what is there?")
    ]
    images = [list(scene(seed, cameras).values()) for seed in (0, 1)]
    inputs = processor(images=images, text=texts, return_tensors="pt")
    assert inputs["camera_ids"].tolist() == [CAMERAS.index(camera) for camera in cameras] * 2
    wanted = model(**inputs).logits
    processor.images_kwargs = {"return_camera_ids": False}
    try:
        without = processor(images=images, text=texts, return_tensors="pt")
    finally:
        del processor.images_kwargs
    assert "camera_ids" not in without
    torch.testing.assert_close(model(**without).logits, wanted)
    generated = model.generate(**without, max_new_tokens=3, num_beams=2)
    assert torch.equal(generated, model.generate(**inputs, max_new_tokens=3, num_beams=2))


def test_without_camera_ids_and_labels_samples_have_all_cameras():
    model = tiny_model(camera_labels=None)
    inputs = tiny_inputs(model, CAMERAS[:3], batch=2)  # six images, but of three cameras twice
    with pytest.raises(ValueError, match=r"every sample has all 6 cameras.* got 6 images, \[3, 3\] in the samples"):
        model(**{**inputs, "camera_ids": None})
    whole = tiny_inputs(model, batch=2)
    whole["input_ids"] = torch.cat([whole["input_ids"], torch.full((1, whole["input_ids"].shape[1]), 40)])
    del whole["attention_mask"]
    wanted = model(**whole).logits  # the third row is text
    torch.testing.assert_close(model(**{**whole, "camera_ids": None}).logits, wanted)


@pytest.mark.parametrize("how", ["ids", "embeddings"])
def test_images_without_a_run_and_runs_without_an_image(how):
    model = lively(tiny_model())
    inputs = tiny_inputs(model)
    cut = {name: inputs[name][:3] for name in ("pixel_values", "camera_ids")}
    calls = [{**inputs, **cut}]
    if how == "embeddings":
        calls[0]["inputs_embeds"] = model.get_input_embeddings()(calls[0].pop("input_ids"))
    else:
        calls += [{name: inputs[name] for name in ("input_ids", "attention_mask")}]
        calls += [{name: inputs[name] for name in ("input_ids", "camera_ids")}]
        calls += [{**inputs, "input_ids": inputs["input_ids"].where(inputs["input_ids"] != 21, IMAGE)}]  # two are one
    for call in calls:
        with pytest.raises(ValueError, match="placeholders|camera_ids"):
            model(**call)
        with pytest.raises(ValueError, match="placeholders|camera_ids"):
            model.generate(**call, max_new_tokens=2)
        with pytest.raises(ValueError, match="placeholders|camera_ids"):
            model.generate(**call, max_new_tokens=2, num_beams=2)


@pytest.mark.parametrize("cached", [True, False])
def test_an_answer_never_holds_a_placeholder(cached):
    """Where each step reads the whole text again, it would be one image more."""
    model, processor = lively(tiny_model(text_config=tiny_config().text_config)), tiny_processor()
    inputs = processor(images=scene(), text="Why?", return_tensors="pt")
    before = model.generate(**inputs, max_new_tokens=4, use_cache=cached)
    bias = torch.zeros(model.lm_head.weight.shape[0])
    bias[IMAGE] = 1e4  # nothing is likelier than a placeholder
    model.lm_head.bias = torch.nn.Parameter(bias)
    assert model(**inputs).logits[0, -1].argmax() == IMAGE
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, use_cache=cached), before)
    given = GenerationConfig(max_new_tokens=4, eos_token_id=2, pad_token_id=0, suppress_tokens=[5])
    assert IMAGE not in model.generate(**inputs, generation_config=given)[0, inputs["input_ids"].shape[1] :]
    answer = model.encode_scene(scene(), processor).ask_all(["Why?"], max_new_tokens=4)[0]
    assert list(answer.token_ids) == before[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("budget", [2, {"CAM_FRONT": 6, "CAM_BACK": 2}, 8], ids=["small", "each", "all"])
def test_compiled_whole_it_computes_the_same(budget):
    """In one graph, which knows neither budgets nor whose images there are."""
    torch._dynamo.reset()
    model, processor = lively(tiny_model(num_queries=4)), tiny_processor()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cameras = ("CAM_BACK", "CAM_FRONT", "CAM_FRONT_LEFT")
    inputs = processor(images=scene(0, cameras), text="What is ahead?", num_queries=budget, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)
        fewer = {name: inputs[name][:2] for name in ("pixel_values", "camera_ids")}
        with pytest.raises(RuntimeError, match="runs of placeholders"):
            compiled(**{**inputs, **fewer})


def test_exported_it_takes_other_cameras():
    model, processor = lively(tiny_model(num_queries=4)), tiny_processor(tiny_config(num_queries=4))
    first, second = (
        processor(images=scene(seed, cameras), text="Why?", return_tensors="pt")
        for seed, cameras in enumerate([("CAM_FRONT", "CAM_BACK"), ("CAM_FRONT_LEFT", "CAM_BACK")])
    )
    ids = first["input_ids"]
    other = {**second, "input_ids": ids, "attention_mask": first["attention_mask"]}  # the same length, other cameras
    with torch.no_grad():
        graph = torch.export.export(model, (), {**first, "use_cache": False}, strict=False).module()
        for inputs in (first, other):
            found = graph(**inputs, use_cache=False).logits
            torch.testing.assert_close(found, model(**inputs).logits, atol=1e-4, rtol=1e-4)
