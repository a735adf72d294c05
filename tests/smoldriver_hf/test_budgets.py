"""Budgets: one number or one for each camera, in every place where one is said, and never more than one meaning."""

import json

import pytest
import torch
from tiny import lively, scene, tiny_config, tiny_model, tiny_processor

from smoldriver_hf import CAMERAS, parse_budget
from smoldriver_hf.__main__ import main
from smoldriver_hf.budgets_smoldriver import argument, budget_for_each, queries_by_camera
from tests.smoldriver_hf.test_chat import IMAGE, PROCESSORS, TEMPLATES

BUDGET = {"CAM_FRONT": 6, "CAM_BACK": 2}  # the others have the default
QUESTION = "Is it safe?"


def counts_of(processor, ids) -> list[int]:
    """Placeholders of each run."""
    runs = [0]
    for token in ids:
        runs[-1] += token == processor.image_token_id
        if token != processor.image_token_id and runs[-1]:
            runs.append(0)
    return runs[:-1]


@pytest.mark.parametrize(
    ("written", "budget"),
    [
        ("16", 16),
        (" 4 ", 4),
        (4, 4),
        (None, None),
        ("CAM_FRONT=6,CAM_BACK=2", BUDGET),
        ("A = 1", {"A": 1}),
        (BUDGET,) * 2,
    ],
)
def test_budgets_as_people_write_them(written, budget):
    assert parse_budget(written) == budget
    assert argument(written) == (budget if isinstance(budget, int) else written)


@pytest.mark.parametrize(
    "written", ["", "x", "-1", "1.5", "CAM_FRONT", "CAM_FRONT=", "=3", "A=1,A=2", "A=1,,B=2", "A=x"]
)
def test_what_is_no_budget(written):
    with pytest.raises(ValueError, match="a budget is a number or CAMERA=NUMBER"):
        parse_budget(written)


def test_who_is_not_named_has_the_default():
    assert queries_by_camera({"B": 2}, ["A", "B"], 8) == {"A": 8, "B": 2}
    assert queries_by_camera(None, ["A", "B"], 8) == {"A": 8, "B": 8}
    assert budget_for_each([1, {"A": 2}], 2) == [1, {"A": 2}] and budget_for_each(None, 2) == [None, None]


@pytest.mark.parametrize("style", TEMPLATES)
def test_each_camera_has_its_own_number_of_placeholders(style):
    processor = PROCESSORS[style]
    inputs = processor(images=scene(), text=QUESTION, num_queries=BUDGET)
    wanted = [BUDGET.get(camera, processor.num_queries) for camera in CAMERAS]
    assert counts_of(processor, inputs["input_ids"][0]) == wanted
    assert processor.prompt_ids(QUESTION, CAMERAS, BUDGET) == inputs["input_ids"][0]
    assert [processor.num_image_tokens(BUDGET, camera) for camera in CAMERAS] == wanted
    assert processor.num_image_tokens(BUDGET) == 6


def test_a_batch_has_a_budget_for_each_sample():
    processor = tiny_processor()
    images = [scene(0), {"CAM_BACK": scene(1)["CAM_BACK"]}, scene(2)]
    inputs = processor(images=images, text=["A?", "And B?", "C?"], num_queries=[3, BUDGET, {"CAM_FRONT": 1}])
    assert [counts_of(processor, ids) for ids in inputs["input_ids"]] == [[3] * 6, [2], [8, 1, 8, 8, 8, 8]]


def test_the_model_gives_each_image_the_first_of_its_cameras_tokens():
    """In one batch, samples and cameras of different budgets are answered as each alone."""
    model, processor = lively(tiny_model()), tiny_processor()
    samples, budgets = [scene(0), {"CAM_BACK": scene(1)["CAM_BACK"], "CAM_FRONT": scene(1)["CAM_FRONT"]}], [BUDGET, 3]
    batch = processor(images=samples, text=[QUESTION, "Why?"], num_queries=budgets, return_tensors="pt")
    together = model(**batch)
    wanted = [model.get_image_features(batch["pixel_values"], batch["camera_ids"], return_dict=True).pooler_output]
    counts = [8, 6, 8, 8, 2, 8, 3, 3]
    wanted = torch.cat([tokens[:count] for tokens, count in zip(wanted[0], counts, strict=True)])
    torch.testing.assert_close(together.image_hidden_states, wanted, atol=1e-5, rtol=1e-5)
    for row, (images, text, budget) in enumerate(zip(samples, [QUESTION, "Why?"], budgets, strict=True)):
        alone = processor(images=images, text=text, num_queries=budget, return_tensors="pt")
        length = alone["input_ids"].shape[1]
        logits = model(**alone).logits[0, -1]
        torch.testing.assert_close(together.logits[row, -1], logits, atol=1e-4, rtol=1e-4)
        assert batch["input_ids"][row, -length:].tolist() == alone["input_ids"][0].tolist()


def test_visual_tokens_by_camera():
    model = lively(tiny_model())
    pixels = torch.randn(3, 3, 28, 28)
    ids = torch.tensor([4, 1, 0])
    tokens = model.get_image_features(pixels, ids, num_queries=BUDGET, return_dict=True).pooler_output
    most = model.get_image_features(pixels, ids, return_dict=True).pooler_output
    assert [len(row) for row in tokens] == [2, 6, 8]
    for row, whole in zip(tokens, most, strict=True):
        torch.testing.assert_close(row, whole[: len(row)], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="unknown camera 'CAM_TOP'"):
        model.get_image_features(pixels, ids, num_queries={"CAM_TOP": 1})
    with pytest.raises(ValueError, match="num_queries must be 1…8 .* got 0"):
        model.get_image_features(pixels, ids, num_queries={"CAM_BACK": 0})


@pytest.mark.parametrize("written", [BUDGET, "CAM_FRONT=6,CAM_BACK=2"], ids=["dict", "text"])
def test_a_scene_answers_at_a_budget_of_each_camera(written):
    model, processor = lively(tiny_model()), tiny_processor()
    found = model.encode_scene(scene(), processor, num_queries=written)
    assert {camera: len(tokens) for camera, tokens in found.visual_tokens.items()} == dict.fromkeys(
        CAMERAS, 8
    ) | BUDGET
    inputs = processor(images=scene(), text=QUESTION, num_queries=BUDGET, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    assert found.ask_all([QUESTION], max_new_tokens=6)[0].token_ids == tuple(generated.tolist())
    changed = found.update({"CAM_BACK": scene(5)["CAM_BACK"]})
    whole = model.encode_scene({**scene(), "CAM_BACK": scene(5)["CAM_BACK"]}, processor, num_queries=BUDGET)
    for (key, value), (whole_key, whole_value) in zip(changed.prefix_cache, whole.prefix_cache, strict=True):
        torch.testing.assert_close(key, whole_key, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(value, whole_value, atol=1e-4, rtol=1e-4)


def test_the_command_line_takes_a_budget_of_each_camera(tmp_path, capsys):
    model = lively(tiny_model())
    model.save_pretrained(tmp_path)
    tiny_processor(model.config).save_pretrained(tmp_path)
    files = []
    for camera, image in scene().items():
        image.save(tmp_path / f"{camera.lower()}.png")
        files += ["--image", f"{camera.lower()}={tmp_path / camera.lower()}.png"]
    asked = [
        "ask",
        "--checkpoint",
        str(tmp_path),
        *files,
        "--max-new-tokens",
        "4",
        "--json",
        QUESTION,
        "--num_queries",
    ]
    assert main([*asked, "CAM_FRONT=6,CAM_BACK=2"]) == 0
    processor = tiny_processor(model.config)
    wanted = model.encode_scene(scene(), processor, num_queries=BUDGET).ask(QUESTION, max_new_tokens=4)
    assert json.loads(capsys.readouterr().out)["answer"] == wanted
    assert main([*asked, "CAM_FRONT=six"]) == 2
    assert "a budget is a number or CAMERA=NUMBER" in capsys.readouterr().err
    assert main([*asked, "CAM_ROOF=2"]) == 2
    assert "unknown camera 'CAM_ROOF'" in capsys.readouterr().err


def test_pixel_shuffle_has_one_budget_for_all():
    square = tiny_config().projector_config
    model = tiny_model(connector="pixel_shuffle", max_queries=36, projector_config=square)
    processor = tiny_processor(model.config)
    with pytest.raises(ValueError, match="integer from 36 to 36 .* got 4"):
        processor(images=scene(), text=QUESTION, num_queries={"CAM_BACK": 4})
    assert IMAGE in processor(images=scene(), text=QUESTION, num_queries={"CAM_BACK": 36})["input_ids"][0]
