"""The multi-Q-Former projector: what queries read, which camera's weights they use, and how budgets nest."""

import pytest
import torch
from tiny import lively, tiny_config, tiny_model, tiny_towers
from torch import nn
from transformers import SmolVLMConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

from smoldriver_hf import CAMERAS, SmolDriverModel
from smoldriver_hf.configuration_smoldriver import SmolDriverProjectorConfig
from smoldriver_hf.projector_smoldriver import (
    PixelShuffleConnector,
    QFormer,
    grid_points,
    sincos_positions,
    spread_points,
)


def projector_of(**changes):
    model = lively(tiny_model(**changes))
    return model.model.multi_modal_projector


def features_of(images: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(images, 16, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_features_decide_where_a_query_looks(attention):
    for key_source, same in (("features", False), ("position", True)):
        projector = projector_of(key_source=key_source)
        projector.config._attn_implementation = attention
        first = projector(features_of(6, 0), None, 8, (4, 4), output_attentions=True)
        second = projector(features_of(6, 1), None, 8, (4, 4), output_attentions=True)
        assert torch.allclose(first[1], second[1]) == same
        assert not torch.allclose(first[0], second[0])  # values are the features with both


def test_attention_is_not_causal():
    projector = projector_of()
    projector.config._attn_implementation = "sdpa"
    features = features_of(6)
    changed = features.clone()
    changed[:, -1] += 3.0  # the last patch, hidden from the first query if attention were causal
    before, after = (projector(states, None, 8, (4, 4))[0] for states in (features, changed))
    assert (before[:, 0] - after[:, 0]).abs().max() > 1e-4


def test_eager_equals_sdpa():
    projector = projector_of()
    outputs = []
    for attention in ("eager", "sdpa"):
        projector.config._attn_implementation = attention
        outputs.append(projector(features_of(6), None, 8, (4, 4))[0])
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key_source", ["features", "position"])
def test_every_budget_is_a_prefix_of_every_larger_one(key_source):
    projector = projector_of(key_source=key_source)
    features, ids = features_of(6), torch.tensor([5, 0, 0, 3, 1, 2])
    largest = projector(features, ids, 8, (4, 4))[0]
    for budget in range(1, 9):
        tokens = projector(features, ids, budget, (4, 4))[0]
        assert tokens.shape == (6, budget, 32)
        torch.testing.assert_close(tokens, largest[:, :budget], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 3, 0, 5, 3, 0], [2]])
def test_all_cameras_at_once_equal_each_qformer_alone(ids):
    projector = projector_of()
    features = features_of(len(ids))
    tokens, attentions = projector(features, torch.tensor(ids), 5, (4, 4), output_attentions=True)
    assert attentions.shape == (len(ids), 2, 5, 16)
    for image, camera in enumerate(ids):
        qformer = projector.qformers[CAMERAS[camera]]
        query, key, value = qformer.project(
            features[image : image + 1], projector.key_positions, projector.query_positions, 5
        )
        weights = (query @ key.transpose(-1, -2) * qformer.scaling).softmax(-1)
        alone = projector.connector(qformer.finish((weights @ value).transpose(1, 2)))
        torch.testing.assert_close(tokens[image], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(attentions[image], weights[0], atol=1e-5, rtol=1e-5)


def test_no_ids_mean_whole_scenes_in_order():
    projector = projector_of()
    features = features_of(18)
    with_ids = projector(features, torch.arange(6).repeat(3), 4, (4, 4), output_attentions=True)
    without = projector(features, None, 4, (4, 4), output_attentions=True)
    for first, second in zip(with_ids, without, strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)


def test_an_images_camera_decides_its_tokens():
    projector = projector_of()
    features = features_of(1).expand(6, -1, -1)
    tokens = projector(features, torch.arange(6), 4, (4, 4))[0]
    for first in range(6):
        for second in range(first):
            assert (tokens[first] - tokens[second]).abs().max() > 1e-3


def test_a_camera_vector_says_whose_eye_it_is():
    """Zero at first, so that nothing changes; then it is added to the tokens of its camera, in any order of images."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    features, plain = features_of(6), projector_of()
    named = tiny_model(projector_config=SmolDriverProjectorConfig(**sizes, camera_vectors=True))
    named = named.model.multi_modal_projector
    assert all((qformer.camera_vector == 0).all() for qformer in named.qformers.values())
    assert len(named.load_state_dict(plain.state_dict(), strict=False).missing_keys) == len(CAMERAS)
    before = plain(features, None, 4, (4, 4))[0]
    assert torch.equal(named(features, None, 4, (4, 4))[0], before)
    vectors = torch.randn(len(CAMERAS), before.shape[-1])
    for vector, qformer in zip(vectors, named.qformers.values(), strict=True):
        qformer.camera_vector.data.copy_(vector)
    assert torch.allclose(named(features, None, 4, (4, 4))[0], before + vectors[:, None])
    ids = torch.tensor([3, 0, 5])
    alone = plain(features[:3], ids, 2, (4, 4))[0]
    assert torch.allclose(named(features[:3], ids, 2, (4, 4))[0], alone + vectors[ids][:, None])


def test_visual_tokens_have_the_scale_of_text():
    config = tiny_config(projector_config=SmolDriverProjectorConfig(hidden_size=32, num_attention_heads=2))
    config.projector_config.embedding_std = 0.05
    torch.manual_seed(0)
    tokens = SmolDriverModel(config).multi_modal_projector(features_of(6), None, 8, (4, 4))[0]
    assert tokens.square().mean(-1).sqrt().mean().item() == pytest.approx(0.05, rel=0.02)


def test_no_multihead_attention_module_anywhere():
    for tower in tiny_towers().values():
        model = tiny_model(vision_config=tower)
        assert not any(isinstance(module, nn.MultiheadAttention) for module in model.modules())


def test_queries_are_parameters_of_full_size_in_every_camera():
    for camera, qformer in projector_of(num_queries=2).qformers.items():
        assert camera in CAMERAS and isinstance(qformer, QFormer)
        assert isinstance(qformer.queries, nn.Parameter) and qformer.queries.shape == (8, 32)


def test_spread_points_cover_the_image_with_every_prefix():
    points = spread_points(64)
    assert points.min() >= 0 and points.max() < 1
    for count in (4, 8, 16, 64):
        quadrants = (points[:count] > 0.5).long() @ torch.tensor([1, 2])
        assert set(quadrants.tolist()) == {0, 1, 2, 3}


def test_positions_tell_all_patches_apart():
    table = sincos_positions(grid_points(37, 37), 64)
    assert table.shape == (37 * 37, 64)
    distances = torch.cdist(table, table) + 10 * torch.eye(37 * 37)
    assert distances.min() > 0.05


def test_another_grid_gets_positions_of_its_own():
    projector = projector_of()
    like = torch.zeros(1)
    torch.testing.assert_close(projector.positions_of((4, 4), like), projector.key_positions)
    assert projector.positions_of((3, 5), like).shape == (15, 32)


@pytest.mark.parametrize("scale", [2, 3])
def test_pixel_shuffle_equals_smolvlms_connector(scale):
    projector = SmolDriverProjectorConfig(hidden_size=32, num_attention_heads=2, scale_factor=scale)
    config = tiny_config(connector="pixel_shuffle", max_queries=36, projector_config=projector)
    smolvlm = SmolVLMConfig(
        vision_config={"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32},
        text_config={"hidden_size": 32, "model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2},
        scale_factor=scale,
    )
    theirs, ours = SmolVLMConnector(smolvlm), PixelShuffleConnector(config)
    ours.proj.load_state_dict(theirs.modality_projection.proj.state_dict())
    states = torch.randn(3, 36, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(states), theirs(states))


def test_pixel_shuffle_folds_squares_of_neighbouring_queries():
    model = tiny_model(
        connector="pixel_shuffle",
        max_queries=36,
        projector_config=SmolDriverProjectorConfig(hidden_size=32, num_attention_heads=2, scale_factor=3),
    )
    tokens = model.get_image_features(torch.randn(6, 3, 28, 28), return_dict=True).pooler_output
    assert tokens.shape == (6, 4, 32)
    torch.testing.assert_close(
        model.model.multi_modal_projector.query_positions, sincos_positions(grid_points(6, 6), 32)
    )
