"""The model: every weight is trained and used, images reach the text, and transformers' conventions hold."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    lively,
    scene,
    tiny_config,
    tiny_inputs,
    tiny_language_models,
    tiny_model,
    tiny_processor,
    tiny_towers,
)
from torch import nn
from transformers import initialization as init

from smoldriver_hf import CAMERAS, SmolDriverForConditionalGeneration, SmolDriverModel
from smoldriver_hf.configuration_smoldriver import SmolDriverProjectorConfig

TOWERS, LANGUAGE_MODELS = tiny_towers(), tiny_language_models()
PARTS = [*({"vision_config": tower} for tower in TOWERS.values())]
PARTS += [{"text_config": text} for text in LANGUAGE_MODELS.values()]
SQUARE = SmolDriverProjectorConfig(hidden_size=32, num_attention_heads=2, intermediate_size=64, scale_factor=2)
VECTORS = SmolDriverProjectorConfig(hidden_size=32, num_attention_heads=2, intermediate_size=64, camera_vectors=True)
PARTS += [
    {"key_source": "position"},
    {"connector": "pixel_shuffle", "max_queries": 16, "projector_config": SQUARE},
]
NAMES = [*TOWERS, *LANGUAGE_MODELS, "position", "pixel_shuffle"]


def loss_of(model, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    return model(**inputs, labels=labels).loss


@pytest.mark.parametrize("parts", PARTS, ids=NAMES)
def test_every_parameter_is_trained_saved_and_reloaded(parts, tmp_path):
    model = lively(tiny_model(**copy.deepcopy(parts))).train()
    names = {name for name, _ in model.named_parameters()}
    for camera in CAMERAS:
        assert f"model.multi_modal_projector.qformers.{camera}.queries" in names
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert names <= set(model.state_dict())

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    tokens = 4 if model.config.connector == "pixel_shuffle" else 8  # the whole budget, so that every query is used
    loss_of(model, tiny_inputs(model, batch=2, tokens_per_camera=tokens)).backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not idle
    optimizer.step()
    same = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not same

    model.save_pretrained(tmp_path)
    loaded, report = SmolDriverForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for name, buffer in model.named_buffers():
        assert torch.equal(dict(loaded.named_buffers())[name], buffer), name
    inputs = tiny_inputs(model, tokens_per_camera=tokens)
    torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits)


def test_each_query_and_each_camera_gets_a_gradient():
    model = lively(tiny_model())
    inputs = tiny_inputs(model, tokens_per_camera=8)
    loss_of(model, inputs).backward()
    for qformer in model.model.multi_modal_projector.qformers.values():
        assert qformer.queries.grad.abs().sum(-1).min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_are_right_after_meta_device_loading(dtype, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = SmolDriverForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    projector = loaded.model.multi_modal_projector
    for name, buffer in model.model.multi_modal_projector.named_buffers():
        torch.testing.assert_close(projector.get_buffer(name).float(), buffer.to(dtype).float())
    assert {"key_positions", "query_positions"} == {name for name, _ in projector.named_buffers()}
    assert not any("positions" in name and "projector" in name for name in loaded.state_dict())


def test_missing_weights_are_initialised_not_left_as_memory(tmp_path):
    torch.manual_seed(0)
    config = tiny_config()
    config.projector_config.embedding_std = 0.25
    model = SmolDriverForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "multi_modal_projector" not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = SmolDriverForConditionalGeneration.from_pretrained(tmp_path)
    for name, parameter in loaded.model.multi_modal_projector.named_parameters():
        assert parameter.isfinite().all() and parameter.abs().max() < 3, name
        assert name.endswith("bias") or parameter.abs().max() > 0, name
    projector = loaded.model.multi_modal_projector
    assert (projector.connector.scale_norm.weight == 0.25).all()
    assert projector.qformers.CAM_BACK.queries.std().item() == pytest.approx(0.02, rel=0.3)


def test_construction_on_the_meta_device():
    with torch.device("meta"):
        model = SmolDriverForConditionalGeneration(tiny_config())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.state_dict().keys() == tiny_model().state_dict().keys()


def test_permuting_cameras_changes_the_output():
    model = lively(tiny_model())
    inputs = tiny_inputs(model)
    plain = model(**inputs).logits[:, -1]
    moved = {**inputs, "camera_ids": inputs["camera_ids"].roll(1)}
    assert (model(**moved).logits[:, -1] - plain).abs().max() > 1e-3
    # images and labels together in another order: the same Q-Former for each image, its tokens in another place
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    both = model.get_image_features(inputs["pixel_values"][order], inputs["camera_ids"][order], return_dict=True)
    first = model.get_image_features(inputs["pixel_values"], inputs["camera_ids"], return_dict=True)
    torch.testing.assert_close(both.pooler_output, first.pooler_output[order], atol=1e-5, rtol=1e-5)


def test_the_images_matter():
    model = lively(tiny_model())
    inputs = tiny_inputs(model)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    assert (model(**other).logits[:, -1] - model(**inputs).logits[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("cameras", [["CAM_BACK"], ["CAM_BACK", "CAM_FRONT"], CAMERAS[:5]])
def test_any_subset_of_cameras_is_valid(cameras):
    model = lively(tiny_model())
    outputs = model(**tiny_inputs(model, cameras))
    assert outputs.logits.isfinite().all() and outputs.image_hidden_states.shape == (len(cameras), 4, 32)


def test_no_camera_ids_mean_all_cameras_in_order():
    model = lively(tiny_model())
    inputs = tiny_inputs(model, batch=2)
    without = {**inputs, "camera_ids": None}
    torch.testing.assert_close(model(**without).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", range(1, 9))
def test_placeholders_receive_exactly_the_features(budget):
    model = lively(tiny_model())
    inputs = tiny_inputs(model, ["CAM_BACK", "CAM_FRONT"], batch=2, tokens_per_camera=budget)
    seen = {}

    def spy(module, args, kwargs):
        seen["inputs_embeds"] = kwargs["inputs_embeds"]

    model.model.language_model.register_forward_pre_hook(spy, with_kwargs=True)
    model(**inputs)
    features = model.get_image_features(
        inputs["pixel_values"], inputs["camera_ids"], num_queries=budget, return_dict=True
    ).pooler_output
    placeholders = inputs["input_ids"] == model.config.image_token_id
    assert torch.equal(seen["inputs_embeds"][placeholders], features.flatten(0, 1))
    text = model.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(seen["inputs_embeds"][~placeholders], text[~placeholders])


def test_smaller_budgets_are_prefixes_in_the_whole_model():
    model = lively(tiny_model())
    pixels = tiny_inputs(model)["pixel_values"]
    largest = model.get_image_features(pixels, return_dict=True).pooler_output
    for budget in range(1, 9):
        tokens = model.get_image_features(pixels, num_queries=budget, return_dict=True).pooler_output
        torch.testing.assert_close(tokens, largest[:, :budget], atol=1e-5, rtol=1e-5)


def flat(output):
    """All tensors of a tuple, in order; caches left out."""
    if torch.is_tensor(output):
        return [output]
    return [tensor for item in output for tensor in flat(item)] if isinstance(output, tuple) else []


def test_tuples_and_dicts_hold_the_same():
    model = lively(tiny_model())
    model.set_attn_implementation("eager")
    inputs = tiny_inputs(model)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    calls = [
        lambda **kwargs: model(**inputs, **wanted, labels=inputs["input_ids"], **kwargs),
        lambda **kwargs: model.model(**inputs, **wanted, **kwargs),
        lambda **kwargs: model.get_image_features(inputs["pixel_values"], inputs["camera_ids"], **wanted, **kwargs),
    ]
    for call in calls:
        as_dict, as_tuple = call(return_dict=True), call(return_dict=False)
        assert isinstance(as_tuple, tuple) and not isinstance(as_dict, tuple)
        first, second = flat(as_dict.to_tuple()), flat(as_tuple)
        assert len(first) == len(second) > 4
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other)
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)


def test_hidden_states_and_attentions_from_every_part():
    model = lively(tiny_model())
    model.set_attn_implementation("eager")
    inputs = tiny_inputs(model, batch=2)
    length = inputs["input_ids"].shape[1]
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == 3 * [(2, length, 32)]
    assert [tuple(weights.shape) for weights in outputs.attentions] == 2 * [(2, 2, length, length)]
    assert outputs.image_hidden_states.shape == (12, 4, 32)
    assert model(**inputs).hidden_states is None and model(**inputs).attentions is None

    features = model.get_image_features(
        inputs["pixel_values"], output_hidden_states=True, output_attentions=True, num_queries=5, return_dict=True
    )
    assert [tuple(states.shape) for states in features.hidden_states] == 3 * [(12, 17, 32)]
    assert [tuple(weights.shape) for weights in features.attentions] == 2 * [(12, 2, 17, 17)]
    assert features.qformer_attentions.shape == (12, 2, 5, 16)
    torch.testing.assert_close(features.qformer_attentions.sum(-1), torch.ones(12, 2, 5))
    plain = model.get_image_features(inputs["pixel_values"], return_dict=True)
    assert plain.hidden_states is None and plain.attentions is None and plain.qformer_attentions is None


def test_asking_for_attentions_changes_no_output():
    model = lively(tiny_model())
    pixels = tiny_inputs(model)["pixel_values"]
    plain = model.get_image_features(pixels, return_dict=True).pooler_output
    asked = model.get_image_features(pixels, output_attentions=True, return_dict=True).pooler_output
    torch.testing.assert_close(asked, plain, atol=1e-5, rtol=1e-5)


def test_embeddings_in_place_of_ids():
    model = lively(tiny_model())
    inputs = tiny_inputs(model, batch=2)
    expected = model(**inputs).logits
    ids = inputs.pop("input_ids")
    assert torch.equal(model(**inputs, inputs_embeds=model.get_input_embeddings()(ids)).logits, expected)


@pytest.mark.parametrize("parts", PARTS, ids=NAMES)
def test_eager_equals_sdpa(parts):
    model = lively(tiny_model(**copy.deepcopy(parts)))
    inputs = tiny_inputs(model, batch=2)
    logits = []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert model.config.projector_config._attn_implementation == attention
        logits.append(model(**inputs).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_sdpa_is_the_default_everywhere():
    config = tiny_model().config
    for part in (config, config.vision_config, config.projector_config, config.text_config):
        assert part._attn_implementation == "sdpa"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("language_model", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient(reentrant, language_model):
    model = lively(tiny_model(text_config=tiny_language_models()[language_model]))
    inputs = tiny_inputs(model, batch=2, tokens_per_camera=8)
    loss_of(model, inputs).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    loss_of(model, inputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_a_frozen_tower_and_language_model_trains_the_projector(reentrant):
    model = lively(tiny_model()).train()
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    loss_of(model, tiny_inputs(model, tokens_per_camera=8)).backward()
    assert all(parameter.grad.any() for parameter in model.model.multi_modal_projector.parameters())


@pytest.mark.parametrize("parts", PARTS, ids=NAMES)
def test_bfloat16_is_close_to_float32(parts):
    model = tiny_model(**copy.deepcopy(parts))
    inputs = tiny_inputs(model)
    expected = model(**inputs).logits
    model = model.to(torch.bfloat16)
    outputs = model(**inputs)  # pixels stay float32, as processors give them
    assert outputs.logits.dtype == outputs.image_hidden_states.dtype == torch.bfloat16
    assert (outputs.logits.float() - expected).abs().max() < 0.05 * expected.abs().max()
    loss_of(model, inputs).backward()


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_heads_are_tied_exactly_where_the_language_model_says_so(language_model, tmp_path):
    text = tiny_language_models()[language_model]
    model = lively(tiny_model(text_config=text))
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embeddings is head) == text.tie_word_embeddings
    model.save_pretrained(tmp_path)
    loaded = SmolDriverForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.get_input_embeddings().weight is loaded.lm_head.weight) == text.tie_word_embeddings
    assert torch.equal(loaded.lm_head.weight, head)


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_embeddings_can_be_resized(language_model, tmp_path):
    text = tiny_language_models()[language_model]
    model = lively(tiny_model(text_config=text))
    inputs = tiny_inputs(model)
    with torch.no_grad():
        before = model(**inputs).logits
    model.resize_token_embeddings(300, mean_resizing=False)
    assert model.get_input_embeddings().weight.shape == model.lm_head.weight.shape == (300, 32)
    assert model.config.text_config.vocab_size == 300
    assert (model.get_input_embeddings().weight is model.lm_head.weight) == text.tie_word_embeddings
    torch.testing.assert_close(model(**inputs).logits[..., :264], before, atol=1e-5, rtol=1e-5)
    loss_of(model, inputs).backward()
    model.save_pretrained(tmp_path)
    assert SmolDriverForConditionalGeneration.from_pretrained(tmp_path).lm_head.weight.shape == (300, 32)


def test_instances_share_no_state():
    config = tiny_config()
    first, second = SmolDriverForConditionalGeneration(config), SmolDriverForConditionalGeneration(config)
    pointers = {parameter.data_ptr() for parameter in first.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in second.parameters()}
    gpt2 = tiny_model(text_config=tiny_language_models()["gpt2"])
    assert gpt2._tied_weights_keys != first._tied_weights_keys == type(first)._tied_weights_keys


def test_base_model_and_head_are_where_tools_look_for_them(tmp_path):
    model = lively(tiny_model())
    assert model.base_model is model.model and model.base_model_prefix == "model"
    assert model.model.language_model is model.get_decoder()
    assert hasattr(model.model, "vision_tower") and hasattr(model.model, "multi_modal_projector")
    inputs = tiny_inputs(model)
    hidden = model.base_model(**inputs).last_hidden_state  # what TRL calls instead of the outer forward
    torch.testing.assert_close(model.lm_head(hidden), model(**inputs).logits)
    model.save_pretrained(tmp_path)
    base = SmolDriverModel.from_pretrained(tmp_path)
    assert torch.equal(base(**inputs).last_hidden_state, hidden)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5, 7])])
def test_logits_to_keep(keep):
    model = lively(tiny_model())
    inputs = tiny_inputs(model)
    everything = model(**inputs).logits
    positions = slice(-keep, None) if isinstance(keep, int) else keep
    torch.testing.assert_close(
        model(**inputs, logits_to_keep=keep).logits, everything[:, positions], atol=1e-5, rtol=1e-5
    )


def test_the_loss_is_the_mean_over_unmasked_next_tokens():
    model = lively(tiny_model())
    inputs = tiny_inputs(model, batch=2)
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    outputs = model(**inputs, labels=labels)
    expected = nn.functional.cross_entropy(outputs.logits[:, -5:-1].flatten(0, 1), labels[:, -4:].flatten())
    torch.testing.assert_close(outputs.loss, expected)
    doubled = model(**inputs, labels=labels, num_items_in_batch=16).loss  # gradient accumulation: the sum over a count
    torch.testing.assert_close(doubled, expected / 2)


def test_text_alone_needs_no_image():
    model = lively(tiny_model())
    ids = torch.tensor([[1, 40, 41, 42]])
    assert model(input_ids=ids).image_hidden_states is None


def bad(inputs, **changes):
    return {**inputs, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: {"pixel_values": i["pixel_values"][None]}, "pixel_values must be flat.*got shape"),
        (lambda i: {"pixel_values": i["pixel_values"][:0], "camera_ids": i["camera_ids"][:0]}, "for 0 images"),
        (lambda i: {"pixel_values": i["pixel_values"][..., :5, :5]}, "at least 7 pixels.*got 5x5"),
        (lambda i: {"camera_ids": i["camera_ids"][:3]}, r"one index per image, \(6,\); got shape \(3,\)"),
        (lambda i: {"camera_ids": i["camera_ids"] + 1}, "camera_ids must index.*got"),
        (lambda i: {"camera_ids": i["camera_ids"] - 1}, "camera_ids must index.*got"),
        (lambda i: {"camera_ids": i["camera_ids"].float()}, "camera_ids must be integers; got torch.float32"),
        (lambda i: {"camera_ids": None, "pixel_values": i["pixel_values"][:4]}, "all 6 cameras.*got 4 images"),
        (lambda i: {"pixel_values": i["pixel_values"][:5], "camera_ids": i["camera_ids"][:5]}, "got 24 placeholders"),
        (lambda i: {"input_ids": i["input_ids"].clamp(min=4)}, "got 0 placeholders for 6 images"),
        (lambda i: {"vision_features": torch.zeros(6, 16, 32)}, "either pixel_values or vision_features"),
        (lambda i: {"pixel_values": None, "vision_features": torch.zeros(6, 15, 32)}, "16 patches.*got shape"),
        (lambda i: {"pixel_values": None, "vision_features": torch.zeros(6, 16, 30)}, "16 patches, 32.*got shape"),
        (lambda i: {"inputs_embeds": torch.zeros(1, 4, 32)}, "either input_ids or inputs_embeds"),
        (lambda i: {"input_ids": None}, "either input_ids or inputs_embeds"),
    ],
)
def test_bad_inputs_are_told_apart(change, message):
    model = tiny_model()
    inputs = tiny_inputs(model)
    with pytest.raises(ValueError, match=message):
        model(**bad(inputs, **change(inputs)))


def test_too_many_placeholders_per_image_exceed_the_budget():
    model = tiny_model()
    with pytest.raises(ValueError, match="num_queries must be 1…8 .* got 9"):
        model(**tiny_inputs(model, tokens_per_camera=9))
    for budget in (0, 9):
        with pytest.raises(ValueError, match=f"got {budget}"):
            model.get_image_features(torch.zeros(6, 3, 28, 28), num_queries=budget)


def test_an_image_cannot_reach_into_the_next_sample():
    model = tiny_model()
    inputs = tiny_inputs(model, ["CAM_FRONT", "CAM_BACK"], batch=2, tokens_per_camera=2)
    image = model.config.image_token_id
    ids = inputs["input_ids"]
    ids[0, (ids[0] == image).nonzero()[-1]] = 40
    ids[1, -1] = image  # eight placeholders as before, but three in one sample and five in the other
    with pytest.raises(ValueError, match="got 8 placeholders for 4 images, in 5 runs"):
        model(**inputs)


def test_pixel_shuffle_has_one_budget():
    model = tiny_model(connector="pixel_shuffle", max_queries=16, projector_config=SQUARE)
    assert model.get_image_features(torch.zeros(6, 3, 28, 28), return_dict=True).pooler_output.shape == (6, 4, 32)
    with pytest.raises(ValueError, match="must be 16 .* got 8"):
        model(**tiny_inputs(model, tokens_per_camera=2))


def test_a_model_without_a_placeholder_id_says_so():
    model = tiny_model(image_token_id=None)
    inputs = tiny_inputs(tiny_model())
    with pytest.raises(ValueError, match="image_token_id is not set"):
        model(**inputs)


def test_position_tables_are_there_without_initialisation():
    with init.no_init_weights():
        bare = SmolDriverForConditionalGeneration(tiny_config())
    for name, buffer in tiny_model().model.multi_modal_projector.named_buffers():
        assert torch.equal(bare.model.multi_modal_projector.get_buffer(name), buffer)


def test_attentions_as_the_configuration_asks():
    model = lively(tiny_model())
    model.set_attn_implementation("eager")
    inputs = tiny_inputs(model)
    assert model(**inputs).attentions is None
    model.config.output_attentions = True
    model.config.output_hidden_states = True
    outputs = model(**inputs)
    assert len(outputs.attentions) == 2 and len(outputs.hidden_states) == 3
    seen = model.get_image_features(inputs["pixel_values"], inputs["camera_ids"], return_dict=True)
    assert seen.qformer_attentions.shape == (6, 2, 8, 16) and len(seen.attentions) == 2
    assert model(**inputs, output_attentions=False).attentions is None


@pytest.mark.parametrize("part", ["model.vision_tower", "model.multi_modal_projector", "model.language_model"])
def test_any_part_may_wait_on_a_disk(part, tmp_path):
    processor, plain = tiny_processor(), lively(tiny_model(projector_config=VECTORS))
    plain.save_pretrained(tmp_path / "model")
    parts = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
    where = dict.fromkeys(parts, "cpu") | {part: "disk"} | ({"lm_head": "disk"} if part == parts[2] else {})
    model = SmolDriverForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=where, offload_folder=str(tmp_path / "waiting")
    ).eval()
    assert any(weight.is_meta for weight in model.get_submodule(part).parameters())
    inputs = processor(images=scene(), text="Why?", return_tensors="pt")
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), plain.generate(**inputs, **options))
    answers = [
        one.encode_scene(scene(), processor).ask_all(["Why?", "And so?"], max_new_tokens=4) for one in (model, plain)
    ]
    assert answers[0] == answers[1]


def test_a_scene_under_autocast():
    model, processor = lively(tiny_model()), tiny_processor()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answers = model.encode_scene(scene(), processor).ask_all(["Why?", "Is it safe to brake?"], max_new_tokens=4)
    assert all(answer.error is None and answer.token_ids for answer in answers)


def test_a_head_that_training_untied_is_said_to_be_untied(tmp_path):
    model = tiny_model()
    assert model.config.to_dict()["text_config"]["tie_word_embeddings"]
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    model.config.tie_word_embeddings = False  # as peft does it
    model.save_pretrained(tmp_path)
    loaded = SmolDriverForConditionalGeneration.from_pretrained(tmp_path)
    assert not loaded.config.tie_word_embeddings and not loaded.config.text_config.tie_word_embeddings
    assert torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight + 1)


def test_the_head_has_a_plan_for_tensor_parallelism():
    model = tiny_model()
    assert model.supports_tp_plan and "lm_head" in model._tp_plan
    assert any("q_proj" in name for name in model._tp_plan)
