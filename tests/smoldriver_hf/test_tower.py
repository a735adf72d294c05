"""Towers of every kind give a grid of features, at any size, and keep nothing that is never trained."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    lively,
    tiny_inputs,
    tiny_model,
    tiny_text_config,
    tiny_towers,
    tiny_vision_config,
)

from smoldriver_hf import SmolDriverForConditionalGeneration

TOWERS = tiny_towers()


@pytest.mark.parametrize("tower", TOWERS)
def test_missing_tower_weights_are_initialised_by_the_tower(tower, tmp_path):
    model = tiny_model(vision_config=tiny_towers()[tower])
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "vision_tower" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = SmolDriverForConditionalGeneration.from_pretrained(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert tensor.isfinite().all() and tensor.abs().max() < 3, name


@pytest.mark.parametrize("tower", TOWERS)
def test_patch_features_come_without_special_tokens(tower):
    model = lively(tiny_model(vision_config=tiny_towers()[tower]))
    projector = model.model.multi_modal_projector
    patches = projector.grid[0] * projector.grid[1]
    pixels = tiny_inputs(model)["pixel_values"]
    output = model.model.get_vision_features(pixels)
    special = {"dinov2": 1, "dinov2_with_registers": 5, "vit": 1, "deit": 2, "siglip": 0, "clip": 1, "swin": 0}[tower]
    assert output.last_hidden_state.shape[1] == patches + special
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, special:])
    features = model.get_image_features(pixels, return_dict=True).pooler_output
    stored = model.get_image_features(vision_features=output.pooler_output, return_dict=True)
    assert torch.equal(stored.pooler_output, features) and stored.last_hidden_state is None


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("size", [[32, 64], [56, 35], 64])
def test_other_image_sizes_are_interpolated(tower, size):
    if tower == "swin" and size == [56, 35]:
        size = [56, 40]
    model = lively(tiny_model(vision_config=tiny_towers()[tower], image_size=size))
    inputs = tiny_inputs(model, ["CAM_BACK", "CAM_FRONT"])
    height, width = [size, size] if isinstance(size, int) else size
    assert inputs["pixel_values"].shape[-2:] == (height, width)
    stride = 8 if tower == "swin" else 7
    assert model.model.multi_modal_projector.grid == (height // stride, width // stride)
    assert model(**inputs).logits.isfinite().all()
    # rows and columns are not mixed up: a change in the lowest row of pixels reaches the last row of patches first
    with torch.no_grad():
        outputs = model.get_image_features(inputs["pixel_values"], inputs["camera_ids"], return_dict=True)
        stored = model.model.get_vision_features(inputs["pixel_values"]).pooler_output
        again = model.get_image_features(vision_features=stored, camera_ids=inputs["camera_ids"], return_dict=True)
    torch.testing.assert_close(outputs.pooler_output, again.pooler_output)


def test_a_call_may_use_another_image_size_than_the_config():
    model = lively(tiny_model())
    pixels = torch.randn(6, 3, 35, 56, generator=torch.Generator().manual_seed(0))
    output = model.get_image_features(pixels, output_attentions=True, return_dict=True)
    assert output.qformer_attentions.shape == (6, 2, 8, 5 * 8)


def test_untrained_parts_of_towers_are_gone():
    names = {name for name, _ in tiny_model(vision_config=tiny_towers()["clip"]).named_parameters()}
    assert not any("post_layernorm" in name for name in names)
    for tower in tiny_towers().values():
        names = {name for name, _ in tiny_model(vision_config=tower).named_parameters()}
        assert not any("vision_tower" in name and ("mask_token" in name or "pooler" in name) for name in names)


def test_siglip_keeps_its_last_norm():
    names = {name for name, _ in tiny_model(vision_config=tiny_towers()["siglip"]).named_parameters()}
    assert any("vision_tower" in name and "post_layernorm" in name for name in names)


def test_a_hierarchical_tower_refuses_sizes_that_it_would_pad():
    model = tiny_model(vision_config=tiny_towers()["swin"])
    with pytest.raises(ValueError, match="multiples of 8 pixels.*got 36x32"):
        model.get_image_features(torch.zeros(6, 3, 36, 32))


def test_non_square_towers_and_single_head_language_models():
    model = tiny_model(
        vision_config=tiny_vision_config(image_size=35),
        text_config=tiny_text_config(hidden_size=48, num_attention_heads=3, num_key_value_heads=3),
        max_queries=3,
    )
    assert model(**tiny_inputs(model, tokens_per_camera=3)).image_hidden_states.shape == (6, 3, 48)


def test_precomputed_features_equal_pixels():
    model = lively(tiny_model())
    inputs = tiny_inputs(model, batch=2)
    stored = {**inputs, "vision_features": model.model.get_vision_features(inputs["pixel_values"]).pooler_output}
    del stored["pixel_values"]
    assert torch.equal(model(**stored).logits, model(**inputs).logits)


def test_a_tower_of_another_dtype_meets_the_projector():
    model = lively(tiny_model())
    inputs = tiny_inputs(model)
    expected = model(**inputs).logits
    model.model.vision_tower.to(torch.bfloat16)
    logits = model(**inputs).logits
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().mean() < 0.2 * expected.abs().mean()
