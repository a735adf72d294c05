"""The configuration refuses what cannot work, keeps its parts through save and load, and shares nothing."""

import json

import pytest
from tiny import tiny_config, tiny_language_models, tiny_text_config, tiny_towers, tiny_vision_config
from transformers import AutoConfig, CLIPConfig, CohereConfig, Gemma2Config, ResNetConfig

from smoldriver_hf import CAMERAS, SmolDriverConfig, SmolDriverProjectorConfig


def test_defaults_describe_a_complete_model():
    config = SmolDriverConfig()
    assert config.cameras == list(CAMERAS)
    assert (config.max_queries, config.num_queries) == (64, 64)
    assert config.image_size == config.vision_config.image_size
    assert config.connector == "linear" and config.key_source == "features" and config.queries_per_token == 1


@pytest.mark.parametrize("tower", tiny_towers())
@pytest.mark.parametrize("language_model", tiny_language_models())
def test_sub_configs_survive_save_and_load(tower, language_model, tmp_path):
    config = tiny_config(tiny_towers()[tower], tiny_language_models()[language_model], num_queries=3)
    config.save_pretrained(tmp_path)
    loaded = SmolDriverConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert type(loaded.vision_config) is type(config.vision_config)
    assert type(loaded.text_config) is type(config.text_config)
    assert type(loaded.projector_config) is SmolDriverProjectorConfig
    assert loaded.tie_word_embeddings == config.text_config.tie_word_embeddings
    assert loaded.num_queries == 3 and loaded.max_queries == 8


def test_saved_folder_names_all_auto_classes(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoImageProcessor",
        "AutoProcessor",
    }


def test_dicts_and_objects_give_the_same_configuration():
    config = tiny_config()
    dicts = {name: getattr(config, name).to_dict() for name in ("vision_config", "projector_config", "text_config")}
    same = {name: getattr(config, name) for name in ("max_queries", "image_token_id", "camera_labels")}
    assert SmolDriverConfig(**dicts, **same).to_dict() == config.to_dict()


def test_no_two_configurations_share_a_part():
    vision, text = tiny_towers()["siglip"], tiny_text_config()
    before = vision.to_dict()
    first, second = tiny_config(vision, text), tiny_config(vision, text)
    assert vision.to_dict() == before  # vision_use_head is set in the copy only
    assert first.vision_config is not second.vision_config and first.text_config is not text
    first.cameras.append("LIDAR_BEV")
    first.auto_map["AutoConfig"] = "changed"
    first.projector_config.hidden_size = 4
    assert second.cameras == list(CAMERAS)
    assert second.auto_map["AutoConfig"] != "changed" and second.projector_config.hidden_size == 32
    assert SmolDriverConfig().cameras == list(CAMERAS)


def test_extra_views_are_cameras_too():
    assert tiny_config(cameras=[*CAMERAS, "LIDAR_BEV", "MAP_BEV"]).cameras[-1] == "MAP_BEV"


def test_auto_config_knows_the_architecture(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)) is SmolDriverConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cameras": []}, "cameras must be a non-empty list"),
        ({"cameras": "CAM_FRONT"}, "not one string; got 'CAM_FRONT'"),
        ({"cameras": ["CAM FRONT"]}, "identifiers"),
        ({"cameras": [1]}, "cameras must be"),
        ({"cameras": ["A", "A"]}, r"must not repeat a name; got \['A', 'A'\]"),
        ({"max_queries": 0}, "max_queries must be an integer between 1 and max_queries; got 0"),
        ({"max_queries": True}, "got True"),
        ({"max_queries": 2.5}, "got 2.5"),
        ({"num_queries": 9}, "num_queries must be .* got 9"),
        ({"num_queries": 0}, "num_queries must be .* got 0"),
        ({"connector": "mlp"}, r"connector must be one of .*got 'mlp'"),
        ({"key_source": "pixels"}, "key_source must be one of .*got 'pixels'"),
        ({"connector": "pixel_shuffle"}, "square grid"),
        ({"connector": "pixel_shuffle", "max_queries": 16}, "square grid"),
        ({"connector": "pixel_shuffle", "max_queries": 9, "num_queries": 4}, "all queries"),
        ({"image_size": 0}, "image_size must be .* got 0"),
        ({"image_size": [28, 28, 3]}, "image_size must be"),
        ({"vision_config": {"model_type": "no_such_tower"}}, "vision_config: .*'no_such_tower'"),
        ({"text_config": {"model_type": "no_such_lm"}}, "text_config: .*'no_such_lm'"),
        ({"vision_config": CLIPConfig()}, "clip_vision_model rather than clip.*got 'clip'"),
        ({"vision_config": ResNetConfig()}, "got 'resnet'"),
        ({"vision_config": tiny_vision_config(hidden_size=30)}, "divisible by 4.*got 30"),
        ({"text_config": ResNetConfig()}, "text_config must be a language model's"),
        ({"text_config": Gemma2Config()}, "final_logit_softcapping"),
        ({"text_config": CohereConfig()}, "logit_scale"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize("sizes", [{"hidden_size": 30}, {"hidden_size": 32, "num_attention_heads": 3}])
def test_projector_sizes_must_divide(sizes):
    with pytest.raises(ValueError, match="divisible"):
        SmolDriverProjectorConfig(**sizes)
