"""Batches of questions: what is learnt, that packing changes nothing but the cost."""

from types import SimpleNamespace

import pytest
import torch
from tiny import picture, scene, tiny_model, tiny_processor, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config

from smoldriver_hf import SmolDriverProcessor
from smoldriver_hf.configuration_smoldriver import SmolDriverProjectorConfig
from training.data.rig import NUSCENES
from training.learning.collate import DrawByEpoch, PackedSceneCollator, SceneCollator, packed_mask_dtype
from training.learning.looking import ASKED_CAMERAS, TOKEN_CAMERAS

SECTORS = ("front", "front left", "back right", "back")
PAIRS = [
    ("Is there a car?", "Yes."),
    ("What is behind the ego vehicle, and what is it going to do next?", "A truck."),
    ("Brake?", "No, because the road ahead is free."),
    ("Where is the bus?", "<c1,CAM_BACK,1088.3,497.5> is the bus."),
]
FRAMES = [
    {"images": scene(0), "pairs": PAIRS},
    {"images": scene(1, ["CAM_BACK", "CAM_FRONT"]), "pairs": PAIRS[1:3]},
    {"images": scene(2, ["CAM_FRONT_LEFT"]), "pairs": PAIRS[3:]},
]


def one_by_one(frames):
    return [{"images": frame["images"], "pairs": [pair]} for frame in frames for pair in frame["pairs"]]


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }


def assert_same_training(model, batch, other, tolerance=1e-5):
    loss, gradients = loss_and_gradients(model, batch)
    other_loss, other_gradients = loss_and_gradients(model, other)
    assert loss == pytest.approx(other_loss, abs=tolerance)
    assert gradients.keys() == other_gradients.keys()
    for name in gradients:
        torch.testing.assert_close(gradients[name], other_gradients[name], atol=tolerance, rtol=1e-4, msg=name)


def moved_to_the_end(batch):
    """The same rows padded on the left, with positions that say so."""
    lengths = batch["attention_mask"].sum(1).tolist()
    moved = {
        name: torch.stack([row.roll(len(row) - n) for row, n in zip(batch[name], lengths, strict=True)])
        for name in ("input_ids", "attention_mask", "labels")
    }
    positions = (moved["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**batch, **moved, "position_ids": positions}


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def processor():
    return tiny_processor()


def test_a_row_is_the_prompt_of_generation_and_then_the_answer(processor):
    for frame in FRAMES:
        for question, answer in frame["pairs"]:
            batch = SceneCollator(processor, num_queries=3)(
                [{"images": frame["images"], "pairs": [(question, answer)]}]
            )
            prompt = processor(images=frame["images"], text=question, num_queries=3, return_tensors="pt")
            length = prompt["input_ids"].shape[1]
            assert batch["input_ids"][0, :length].tolist() == prompt["input_ids"][0].tolist()
            assert torch.equal(batch["pixel_values"], prompt["pixel_values"])
            assert torch.equal(batch["camera_ids"], prompt["camera_ids"])
            learnt = batch["input_ids"][0, length:]
            assert processor.tokenizer.decode(learnt) == answer + "<|im_end|>"
            assert batch["labels"][0].tolist() == [-100] * length + learnt.tolist()


def test_ids_are_those_of_the_whole_conversation(processor):
    cameras = ["CAM_FRONT", "CAM_BACK"]
    for question, answer in [*PAIRS, ("Is <|im_end|> a token? <image>", "No: <|im_start|>.")]:
        parts = [{"type": "image", "camera": camera} for camera in cameras]
        whole = processor.apply_chat_template(
            [
                {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        )
        expected = processor.tokenizer(whole.rstrip().replace("<image>", "<image>" * 5))["input_ids"]
        collator = SceneCollator(processor, num_queries=5)
        batch = collator([{"images": scene(0, cameras), "pairs": [(question, answer)]}])
        assert batch["input_ids"][0].tolist() == expected


@pytest.mark.parametrize("starts_with_bos", [False, True])
def test_merges_across_borders_stay_what_generation_sees(starts_with_bos):
    """With a trained tokenizer: line ends merge with what follows, and punctuation with punctuation."""
    texts = [
        "CAM_FRONT: ",
        "\n\nIs there a car?",
        "assistant\nYes, there is a car.",
        "user\nWhere is the car?",
        "\n\n\n",
    ]
    tokenizer = tiny_tokenizer()
    tokenizer = tokenizer.train_new_from_iterator(texts * 20, vocab_size=400)
    if starts_with_bos:
        bos = ("<|im_start|>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    config = tiny_model().config
    sizes = {"max_queries": config.max_queries, "num_queries": 2}
    processor = SmolDriverProcessor(tiny_processor().image_processor, tokenizer, cameras=config.cameras, **sizes)
    assert len(tokenizer("Is there a car?")["input_ids"]) < 10
    pairs = [("Is there a car?", "Yes, there is a car."), ("\n\nWhere is the car?\n", "<c1,CAM_BACK,1.0,2.0>")]
    images = scene(0, ["CAM_FRONT"])
    packed = PackedSceneCollator(processor)([{"images": images, "pairs": pairs}])
    ids = packed["input_ids"][0]
    start = prefix = int((ids == processor.image_token_id).nonzero().max()) + 1
    for question, answer in pairs:
        row = SceneCollator(processor)([{"images": images, "pairs": [(question, answer)]}])["input_ids"][0]
        prompt = processor(images=images, text=question, return_tensors="pt")["input_ids"][0]
        assert row[: len(prompt)].tolist() == prompt.tolist()
        assert tokenizer.decode(row[len(prompt) :]) == answer + "<|im_end|>"
        assert ids[start : start + len(row) - prefix].tolist() == row[prefix:].tolist()
        start += len(row) - prefix


def test_cameras_come_in_the_model_order_whatever_the_example_order(processor):
    images = scene(0)
    backwards = {name: images[name] for name in reversed(images)}
    one, other = (SceneCollator(processor)([{"images": named, "pairs": PAIRS[:1]}]) for named in (images, backwards))
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_changes_neither_loss_nor_gradients(model, processor, attention):
    model.set_attn_implementation(attention)
    packed = PackedSceneCollator(processor, num_queries=4, mask_dtype=packed_mask_dtype(model))(FRAMES)
    rows = SceneCollator(processor, num_queries=4)(one_by_one(FRAMES))
    assert packed["input_ids"].shape[0] == 3 and rows["input_ids"].shape[0] == 7
    assert (packed["labels"] != -100).sum() == (rows["labels"] != -100).sum()
    assert_same_training(model, packed, rows)


def test_packing_with_a_pixel_shuffle_connector(processor):
    projector = SmolDriverProjectorConfig(hidden_size=32, num_attention_heads=2, intermediate_size=64, scale_factor=2)
    model = tiny_model(projector_config=projector, max_queries=16, connector="pixel_shuffle")
    processor = tiny_processor(model.config)
    assert_same_training(
        model, PackedSceneCollator(processor)(FRAMES[:2]), SceneCollator(processor)(one_by_one(FRAMES[:2]))
    )


def test_each_question_sees_the_images_and_itself_only(model, processor):
    collator = PackedSceneCollator(processor, num_queries=2)
    alone = collator([{"images": FRAMES[0]["images"], "pairs": PAIRS[1:2]}])
    length = alone["input_ids"].shape[1]
    prefix = len(collator.encode(FRAMES[0], 2).prefix)
    for before in ([PAIRS[0]], [PAIRS[2]], [PAIRS[0], PAIRS[3]]):
        batch = collator([{"images": FRAMES[0]["images"], "pairs": [*before, PAIRS[1]]}])
        own = slice(-(length - prefix), None)
        with torch.no_grad():
            logits = model(**{**batch, "labels": None}).logits[0, own]
            expected = model(**{**alone, "labels": None}).logits[0, own]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(batch["position_ids"][0, own], alone["position_ids"][0, own])


def test_padding_side_does_not_matter(model, processor):
    batch = SceneCollator(processor, num_queries=4)(one_by_one(FRAMES))
    assert_same_training(model, batch, moved_to_the_end(batch))


def test_padding_neither_learns_nor_spoils(model, processor):
    collator = PackedSceneCollator(processor, num_queries=4)
    batch = collator(FRAMES)
    labels = batch["labels"]
    alone = [collator([frame]) for frame in FRAMES]
    weights = torch.tensor([float((part["labels"] != -100).sum()) for part in alone])
    with torch.no_grad():
        losses = torch.stack([model(**part).loss for part in alone])
        torch.testing.assert_close(model(**batch).loss, (losses * weights).sum() / weights.sum())
    assert (labels != -100).sum() == weights.sum()


def test_the_length_of_a_sequence_is_known_beforehand(processor):
    collator = PackedSceneCollator(processor, num_queries=[1, 2])
    lengths = [collator.sequence_length(frame) for frame in FRAMES]
    assert lengths == [
        int((row != 0).sum()) for row in PackedSceneCollator(processor, num_queries=2)(FRAMES)["input_ids"]
    ]


def test_blind_prompts(model, processor):
    rows = SceneCollator(processor, cameras=[])(one_by_one(FRAMES))
    assert "pixel_values" not in rows and "camera_ids" not in rows
    packed = PackedSceneCollator(processor, cameras=[])(FRAMES)
    assert packed["attention_mask"].any(-1).all(), "a position that sees nothing"
    assert_same_training(model, packed, rows)


def test_features_take_the_place_of_pixels(model, processor, tmp_path):
    paths, features = {}, {}
    for index, camera in enumerate(["CAM_FRONT", "CAM_BACK_LEFT"]):
        paths[camera] = str(tmp_path / f"{camera}.png")
        picture(index).save(paths[camera])
        pixels = processor.image_processor([paths[camera]], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            features[paths[camera]] = model.model.get_vision_features(pixels).pooler_output[0]
    frames = [{"images": paths, "pairs": PAIRS}, {"images": {"CAM_BACK_LEFT": paths["CAM_BACK_LEFT"]}, "pairs": PAIRS}]
    live = PackedSceneCollator(processor)(frames)
    cached = PackedSceneCollator(processor, features=features)(frames)
    assert cached["vision_features"].shape[0] == 3 and "pixel_values" not in cached
    assert torch.equal(live["camera_ids"], cached["camera_ids"])
    with torch.no_grad():
        assert model(**live).loss.item() == pytest.approx(model(**cached).loss.item(), abs=1e-5)


def test_budgets_are_drawn_from_seed_epoch_and_batch(processor):
    frames = [{"images": {"CAM_FRONT": f"{i}.jpg"}, "pairs": [(f"Question {i}?", "Yes.")]} for i in range(60)]
    collator = SceneCollator(processor, num_queries=[1, 2, 8], seed=3)
    draws = [collator.draw_budget([frame]) for frame in frames]
    assert {value: draws.count(value) > 8 for value in (1, 2, 8)} == {1: True, 2: True, 8: True}
    torch.rand(5)
    again = SceneCollator(processor, num_queries=[1, 2, 8], seed=3)
    assert [again.draw_budget([frame]) for frame in frames[::-1]] == draws[::-1]
    DrawByEpoch(again).on_epoch_begin(None, SimpleNamespace(epoch=1.5), None)
    assert [again.draw_budget([frame]) for frame in frames] != draws
    other = SceneCollator(processor, num_queries=[1, 2, 8], seed=4)
    assert [other.draw_budget([frame]) for frame in frames] != draws


def test_the_drawn_budget_is_what_the_batch_has(model, processor):
    collator = PackedSceneCollator(processor, num_queries=[1, 2, 8])
    frame = FRAMES[1]
    for epoch in range(5):
        collator.set_epoch(epoch)
        placeholders = int((collator([frame])["input_ids"] == processor.image_token_id).sum())
        assert placeholders == 2 * collator.draw_budget([frame])


@pytest.mark.parametrize(
    "options, example, message",
    [
        ({"cameras": ["CAM_TOP"]}, FRAMES[2], "unknown camera 'CAM_TOP'.*CAM_FRONT"),
        ({"num_queries": 9}, FRAMES[2], "num_queries must be an integer from 1 to 8"),
        ({"num_queries": []}, FRAMES[2], "empty list"),
        ({}, FRAMES[0], "expected examples of one question, got 4"),
        ({}, {"images": scene(0), "pairs": []}, "at least one"),
        ({}, {"images": scene(0), "pairs": [("Why?", " ")]}, "'Why\\?' has an empty answer"),
        ({"cameras": ["CAM_BACK"]}, FRAMES[2], "none of the wanted"),
        ({}, {"images": {"LIDAR_BEV": picture()}, "pairs": PAIRS[:1]}, "'LIDAR_BEV', but this model knows"),
    ],
)
def test_mistakes_are_told(processor, options, example, message):
    with pytest.raises(ValueError, match=message):
        SceneCollator(processor, **options)([example])


def test_packing_refuses_attention_that_takes_no_mask(model):
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        packed_mask_dtype(model)


def test_persistent_workers_cannot_draw_budgets_or_words(processor):
    workers = SimpleNamespace(dataloader_persistent_workers=True)
    plain = SceneCollator(processor)
    for callback in (DrawByEpoch(SceneCollator(processor, num_queries=[1, 2])), DrawByEpoch(plain, reword=True)):
        with pytest.raises(ValueError, match="persistent"):
            callback.on_train_begin(workers, None, None)
    DrawByEpoch(plain).on_train_begin(workers, None, None)


def test_a_share_of_questions_is_in_other_words_anew_each_epoch(processor):
    questions = [
        f"Are there {things} to the {sector} of the ego car?" for things in ("cars", "buses") for sector in SECTORS
    ]
    frames = [
        {"images": {"CAM_FRONT": f"{i}.jpg"}, "pairs": [(question, "Yes.") for question in questions], "reword": 0.4}
        for i in range(30)
    ]
    collator = SceneCollator(processor, seed=3, rig=NUSCENES)
    first = [collator.in_other_words(frame) for frame in frames]
    changed = [new != old for one, frame in zip(first, frames, strict=True) for new, old in _pairs(one, frame)]
    assert 0.3 < sum(changed) / len(changed) < 0.5
    assert [collator.in_other_words(frame) for frame in frames[::-1]] == first[::-1]  # whatever was drawn before
    DrawByEpoch(collator).on_epoch_begin(None, SimpleNamespace(epoch=1.5), None)
    second = [collator.in_other_words(frame) for frame in frames]
    assert second != first
    assert SceneCollator(processor, seed=4).in_other_words(frames[0]) != first[0]
    plain = {**frames[0], "reword": 0.0}
    assert collator.in_other_words(plain) == plain and collator.in_other_words(FRAMES[0]) == FRAMES[0]


def test_reworded_questions_are_what_the_batch_asks_about_the_same_cameras(processor):
    frame = {"images": scene(0), "pairs": [("Are there cars to the back of the ego car?", "No.")] * 3, "reword": 1.0}
    collator = PackedSceneCollator(processor, rig=NUSCENES)
    expected = {**collator.in_other_words(frame), "reword": 0.0}
    batch, same, plain = (collator([one]) for one in (frame, expected, {**frame, "reword": 0.0}))
    assert torch.equal(batch["input_ids"], same["input_ids"])
    assert batch["input_ids"].shape != plain["input_ids"].shape
    assert set(batch[ASKED_CAMERAS].flatten().tolist()) == set(plain[ASKED_CAMERAS].flatten().tolist())


def _pairs(one, other):
    return zip(one["pairs"], other["pairs"], strict=True)


def test_packing_works_in_bfloat16(processor):
    model = tiny_model().to(torch.bfloat16)
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        batch = PackedSceneCollator(processor, mask_dtype=packed_mask_dtype(model))(FRAMES)
        rows = SceneCollator(processor)(one_by_one(FRAMES))
        with torch.no_grad():
            assert model(**batch).loss.item() == pytest.approx(model(**rows).loss.item(), abs=2e-2)


def test_other_text_models_keep_their_positions(processor):
    """Learnt absolute positions, where a wrong position id is not hidden by relative encodings."""
    sizes = {"vocab_size": 264, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 400}
    model = tiny_model(text_config=GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    packed = PackedSceneCollator(processor, num_queries=1)(FRAMES)
    assert_same_training(model, packed, SceneCollator(processor, num_queries=1)(one_by_one(FRAMES)))


NAMING = [
    ("Are there cars to the back of the ego car?", "No."),
    ("What is <c1,CAM_FRONT_LEFT,1.0,2.0>, and what is to the front of the ego car?", "A car."),
    ("Brake?", "Yes."),
]


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_tells_whose_token_it_is_and_which_camera_is_asked_for(processor, packed):
    frame = {"images": scene(0, ["CAM_BACK", "CAM_FRONT"]), "pairs": NAMING}
    collator = (PackedSceneCollator if packed else SceneCollator)(processor, num_queries=3, rig=NUSCENES)
    batch = collator([frame] if packed else one_by_one([frame]))
    bit = {camera: 1 << index for index, camera in enumerate(processor.cameras)}
    tokens, asked = batch[TOKEN_CAMERAS], batch[ASKED_CAMERAS]
    assert torch.equal(tokens != 0, batch["input_ids"] == processor.image_token_id)
    shown = [bit[camera] for camera in processor.cameras if camera in frame["images"] for _ in range(3)]
    assert tokens[0][tokens[0] != 0].tolist() == shown
    learnt = batch["labels"].roll(-1, dims=1) != -100  # where the next token is an answer's
    learnt[:, -1] = False
    named = [bit["CAM_BACK"], bit["CAM_FRONT_LEFT"] | bit["CAM_FRONT"], 0]
    answers = [len(processor.tokenizer(f"{answer}<|im_end|>")["input_ids"]) for _, answer in NAMING]
    wanted = [bits for bits, count in zip(named, answers, strict=True) for _ in range(count)]
    assert asked[learnt].tolist() == wanted and not asked[~learnt].any()


def test_without_a_rig_a_batch_is_what_the_model_takes(processor):
    assert not {TOKEN_CAMERAS, ASKED_CAMERAS} & set(SceneCollator(processor)(one_by_one(FRAMES)))
