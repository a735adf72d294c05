"""Generation: caching, batching, beams and samples change how an answer is computed, never which one."""

import copy

import pytest
import torch
from tiny import lively, picture, scene, tiny_inputs, tiny_language_models, tiny_model, tiny_processor
from transformers import GenerationConfig

from smoldriver_hf import CAMERAS, SmolDriverProjectorConfig

GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}


def rows(*cameras_of_rows, text="What is there?"):
    """One sample per argument, each with images of its own."""
    return [scene(index, cameras) for index, cameras in enumerate(cameras_of_rows)], [
        text + "?" * 3 * index for index in range(len(cameras_of_rows))
    ]


@pytest.mark.parametrize("language_model", tiny_language_models())
def test_cached_equals_uncached(language_model):
    model = lively(tiny_model(text_config=tiny_language_models()[language_model]))
    inputs = tiny_inputs(model, batch=2)
    cached = model.generate(**inputs, **GREEDY)
    assert torch.equal(cached, model.generate(**inputs, **GREEDY, use_cache=False))
    new = cached[:, inputs["input_ids"].shape[1] :]
    assert new.shape == (2, 8) and len(set(new.flatten().tolist())) > 2


def test_greedy_generation_follows_the_logits():
    model = lively(tiny_model())
    inputs = tiny_inputs(model)
    generated = model.generate(**inputs, **GREEDY)
    logits = model(**{**inputs, "input_ids": generated, "attention_mask": torch.ones_like(generated)}).logits
    start = inputs["input_ids"].shape[1]
    assert torch.equal(logits[:, start - 1 : -1].argmax(-1), generated[:, start:])


def test_images_are_encoded_once_per_answer():
    model = lively(tiny_model())
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    model.generate(**tiny_inputs(model), **GREEDY)
    assert len(calls) == 1


def test_the_images_decide_the_answer():
    model = lively(tiny_model())
    inputs = tiny_inputs(model)
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    assert not torch.equal(model.generate(**inputs, **GREEDY), model.generate(**other, **GREEDY))


@pytest.mark.parametrize("language_model", ["llama", "gpt2", "qwen2"])
def test_batched_equals_single_with_different_cameras_per_sample(language_model):
    model = lively(tiny_model(text_config=tiny_language_models()[language_model]))
    processor = tiny_processor(model.config)
    images, questions = rows(CAMERAS, ["CAM_BACK"], ["CAM_BACK_RIGHT", "CAM_FRONT_LEFT"])
    batch = processor(images=images, text=questions, num_queries=4, return_tensors="pt")
    assert (batch["attention_mask"][1:, 0] == 0).all() and (batch["attention_mask"][:, -1] == 1).all()
    together = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    for index, (sample, question) in enumerate(zip(images, questions, strict=True)):
        single = processor(images=sample, text=question, num_queries=4, return_tensors="pt")
        alone = model.generate(**single, **GREEDY)[:, single["input_ids"].shape[1] :]
        assert torch.equal(together[index], alone[0]), index
        logits = model(**single).logits[0, -1]
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # what generate() counts; GPT-2 needs it
        padded = model(**batch, position_ids=positions).logits[index, -1]
        torch.testing.assert_close(padded, logits, atol=2e-3, rtol=1e-3)


def expanded_equals_repeated(model, inputs, **options):
    """num_return_sequences=3 of a batch must see the images that three copies of each row would see."""
    torch.manual_seed(0)
    together = model.generate(**inputs, **options, num_return_sequences=3)
    torch.manual_seed(0)
    apart = model.generate(**inputs, **options, num_return_sequences=3, use_cache=False)
    assert torch.equal(together, apart)
    return together


def test_several_samples_per_row_repeat_its_images():
    model = lively(tiny_model())
    processor = tiny_processor(model.config)
    images, questions = rows(["CAM_FRONT", "CAM_BACK", "CAM_BACK_LEFT"], ["CAM_BACK"], CAMERAS)
    inputs = processor(images=images, text=questions, num_queries=2, return_tensors="pt")
    options = {"max_new_tokens": 6, "do_sample": True, "top_k": 1, "eos_token_id": None}
    together = expanded_equals_repeated(model, inputs, **options)
    assert together.shape[0] == 9
    greedy = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(together, greedy.repeat_interleave(3, 0))  # top_k=1 is greedy, image by image


def test_beams_repeat_images_and_win_over_greedy():
    model = lively(tiny_model())
    processor = tiny_processor(model.config)
    images, questions = rows(["CAM_FRONT"], CAMERAS)
    inputs = processor(images=images, text=questions, num_queries=2, return_tensors="pt")
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "eos_token_id": None}
    together = model.generate(**inputs, **options)
    for index, (sample, question) in enumerate(zip(images, questions, strict=True)):
        single = processor(images=sample, text=question, num_queries=2, return_tensors="pt")
        alone = model.generate(**single, **options)
        assert torch.equal(together[index, -5:], alone[0, -5:]), index


def test_beams_without_camera_ids_and_with_precomputed_features():
    model = lively(tiny_model())
    inputs = tiny_inputs(model, batch=2)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "num_return_sequences": 2}
    expected = model.generate(**inputs, **options)
    features = model.model.get_vision_features(inputs["pixel_values"]).pooler_output
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model.generate(**text, pixel_values=inputs["pixel_values"], **options), expected)
    assert torch.equal(model.generate(**text, vision_features=features, **options), expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_embeddings_in_place_of_ids(beams):
    model = lively(tiny_model())
    inputs = tiny_inputs(model, batch=2)
    options = {**GREEDY, "num_beams": beams}
    expected = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    ids = inputs.pop("input_ids")
    assert torch.equal(model.generate(**inputs, inputs_embeds=model.get_input_embeddings()(ids), **options), expected)


def test_a_second_turn_continues_the_cache_without_images():
    model = lively(tiny_model())
    inputs = tiny_inputs(model)
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[50, 51, 52]])], dim=1)
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(**whole, **GREEDY)
    cache = copy.deepcopy(first.past_key_values)
    continued = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY)
    assert torch.equal(continued, expected)


def test_generate_in_bfloat16_and_with_pixel_shuffle():
    projector = SmolDriverProjectorConfig(hidden_size=32, num_attention_heads=2, scale_factor=2)
    model = lively(tiny_model(connector="pixel_shuffle", max_queries=16, projector_config=projector))
    processor = tiny_processor(model.config)
    inputs = processor(images=scene(), text="Is it safe?", return_tensors="pt")
    assert (inputs["input_ids"] == 3).sum() == 6 * 4
    assert model.to(torch.bfloat16).generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 8


def test_the_documented_one_liner_runs():
    model = tiny_model()
    processor = tiny_processor(model.config)
    inputs = processor(
        images={"CAM_FRONT": picture(1), "CAM_BACK": picture(2)},
        text="Is it safe to brake?",
        num_queries=5,
        return_tensors="pt",
    )
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
    answer = model.generate(**inputs, max_new_tokens=3)
    assert isinstance(processor.decode(answer[0], skip_special_tokens=True), str)


def test_the_callers_longest_length_counts():
    """A checkpoint's own `max_new_tokens` is for callers who say nothing."""
    model = lively(tiny_model())
    inputs = tiny_inputs(model)
    length = inputs["input_ids"].shape[1]
    model.generation_config.max_new_tokens = 6
    model.generation_config.eos_token_id = None
    assert model.generate(**inputs).shape[1] == length + 6
    assert model.generate(**inputs, max_length=length + 2).shape[1] == length + 2
    given = GenerationConfig(max_length=length + 3, pad_token_id=0)
    assert model.generate(**inputs, generation_config=given).shape[1] == length + 3
    assert model.generate(**inputs, max_length=length + 2, max_new_tokens=4).shape[1] == length + 4


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("num_queries", [None, 4, {"CAM_BACK": 5}], ids=["all", "enough", "each"])
def test_encoder_outputs_in_place_of_images(beams, num_queries):
    """What was encoded at a larger budget serves a smaller one."""
    model = lively(tiny_model())
    inputs = tiny_inputs(model, ["CAM_BACK", "CAM_FRONT"], batch=2)
    encoded = model.get_image_features(
        inputs["pixel_values"], inputs["camera_ids"], num_queries=num_queries, return_dict=True
    )
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(
        model(**text, mm_encoder_outputs={"image": encoded}).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4
    )
    wanted = model.generate(**inputs, **GREEDY, num_beams=beams)
    assert torch.equal(
        model.generate(**text, mm_encoder_outputs={"image": encoded}, **GREEDY, num_beams=beams), wanted
    )


def test_encoder_outputs_that_do_not_fit():
    model = tiny_model()
    inputs = tiny_inputs(model)
    encoded = {"image": model.get_image_features(inputs["pixel_values"], num_queries=2, return_dict=True)}
    with pytest.raises(ValueError, match="either images or mm_encoder_outputs"):
        model(**inputs, mm_encoder_outputs=encoded)
    with pytest.raises(ValueError, match=r"runs of \[4, 4, 4, 4, 4, 4\] placeholders for 2 visual tokens each"):
        model(input_ids=inputs["input_ids"], mm_encoder_outputs=encoded)
