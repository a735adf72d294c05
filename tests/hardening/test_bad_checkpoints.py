"""A damaged checkpoint is refused with the reason, or it loads as exactly what its files hold."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs import amounts, broken_bytes, costly_amounts, for_each, junk, mutated, to_bytes
from hypothesis import strategies as st
from prepared import write_smoldriver
from safetensors.torch import load_file, save_file
from tiny import picture, tiny_config
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from smoldriver_hf import CAMERAS, SmolDriverConfig
from smoldriver_hf.loading_smoldriver import load

QUERIES = "model.multi_modal_projector.qformers.CAM_BACK.queries"
WEIGHTS = (
    QUERIES,
    "model.multi_modal_projector.connector.proj.bias",
    "model.vision_tower.embeddings.cls_token",
    "model.language_model.layers.1.mlp.up_proj.weight",
    "model.language_model.embed_tokens.weight",
)
RENAMED = ["CAM_ROOF" if camera == "CAM_BACK" else camera for camera in CAMERAS]


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """transformers' own reports of thousands of damaged checkpoints."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    """transformers would ask at the keyboard whether to run a checkpoint's code, and wait."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question at the keyboard"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write_smoldriver(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def checkpoint(sound, tmp_path) -> Path:
    return shutil.copytree(sound, tmp_path / "checkpoint")


def change_settings(folder: Path, changes: dict[str, Any], file: str = "config.json") -> None:
    """Set values by dotted names."""
    content = json.loads((folder / file).read_text())
    for name, value in changes.items():
        *outer, last = name.split(".")
        inner = content
        for part in outer:
            inner = inner[part]
        inner[last] = value
    (folder / file).write_text(json.dumps(content))


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder: Path, message: str, **options) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load(str(folder), **options)
    assert str(error.value).startswith(f"{folder} is no sound checkpoint: ")


@pytest.mark.parametrize("name", WEIGHTS)
def test_missing_weights(checkpoint, name):
    change_weights(checkpoint, lambda weights: weights.pop(name))
    refused(checkpoint, f"weights are missing: (lm_head.weight, )?{name}$")


def test_a_camera_whose_weights_are_missing(checkpoint):
    def drop(weights):
        for name in [name for name in weights if "qformers.CAM_BACK." in name]:
            del weights[name]

    change_weights(checkpoint, drop)
    refused(checkpoint, "weights are missing: .*qformers.CAM_BACK.* and 15 more")


@pytest.mark.parametrize(
    "name", ["model.qformers.CAM_ROOF.queries", "model.language_model.layers.2.mlp.up_proj.weight"]
)
def test_weights_that_belong_nowhere(checkpoint, name):
    change_weights(checkpoint, lambda weights: weights.update({name: torch.zeros(3)}))
    refused(checkpoint, f"weights that belong nowhere: {name}$")


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_another_shape(checkpoint, name):
    change_weights(checkpoint, lambda weights: weights.update({name: torch.zeros(5, 3)}))
    refused(checkpoint, rf"{name} has shape \(5, 3\); config.json says \(\d+,")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_no_numbers(checkpoint, name, value, precision):
    change_weights(checkpoint, lambda weights: weights[name].view(-1)[-2:].fill_(value))
    refused(checkpoint, rf"2 of \d+ values of {name} are NaN or infinite", precision=precision)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cameras": RENAMED}, "camera_labels tells of CAM_BACK, but cameras are .*CAM_ROOF"),
        ({"cameras": [*CAMERAS[::-1]]}, "has cameras=.*but the processor has"),
        ({"cameras": [*CAMERAS[:5]]}, "camera_labels tells of CAM_BACK_RIGHT, but cameras are"),
        ({"cameras": RENAMED, "camera_labels": None}, "has cameras=.*CAM_ROOF.*but the processor has .*CAM_BACK"),
        ({"cameras": [*CAMERAS, "CAM_ROOF"]}, "has cameras=.*but the processor has"),
        ({"cameras": "CAM_FRONT"}, "cameras must be a list of names"),
        ({"cameras": 6}, "cameras must be a list of names; got 6"),
        ({"num_queries": 9}, "num_queries must be .* got 9"),
        ({"max_queries": 4, "num_queries": 4}, "has max_queries=4, but the processor has 8"),
        ({"max_queries": 10**12}, "has max_queries=1000000000000, but the processor has 8"),
        ({"max_queries": 8.0}, "max_queries must be an integer"),
        ({"connector": "mlp"}, "connector must be one of .*got 'mlp'"),
        ({"key_source": "pixels"}, "key_source must be one of .*got 'pixels'"),
        ({"key_source": "position"}, "weights that belong nowhere: .*key_norm"),
        ({"image_token_id": 264}, r"image_token_id must be one of the model's tokens, 0…263; got 264"),
        ({"image_token_id": -1}, "image_token_id must be None or a token's id, 0 or more; got -1"),
        ({"image_token_id": None}, "image_token_id must be one of .*got None"),
        ({"image_token_id": 2}, "has image_token_id=2, but the processor has 3"),
        ({"image_size": 10**6}, "image_size must be one side .* got 1000000"),
        ({"tie_word_embeddings": False}, "weights are missing: lm_head.weight$"),
        ({"model_type": "llama"}, "expected model_type 'smoldriver' in config.json; got 'llama'"),
        ({"model_type": "smolldriver"}, "expected model_type 'smoldriver' in config.json; got 'smolldriver'"),
        ({"vision_config.model_type": "vit"}, "weights are missing: .*weights that belong nowhere: "),
        ({"vision_config.num_hidden_layers": 3}, "weights are missing: model.vision_tower.*layer.2."),
        ({"vision_config.image_size": 10**6}, "describes a model of .* weights; the files have .* bytes"),
        ({"vision_config.patch_size": 0}, "no sound checkpoint"),
        ({"text_config.num_hidden_layers": 1}, "weights that belong nowhere: model.language_model.layers.1."),
        ({"text_config.num_hidden_layers": 10**9}, "at most 1024 layers; got num_hidden_layers=1000000000"),
        ({"text_config.num_hidden_layers": 1000}, "describes a model of .* weights; the files have"),
        ({"text_config.hidden_size": "wide"}, "hidden_size"),
        ({"text_config.vocab_size": 200}, r"the tokenizer has token 259; the language model knows 0…199"),
        ({"text_config.vocab_size": 300}, r"embed_tokens.weight has shape \(264, 32\); config.json says \(300, 32\)"),
        ({"projector_config.intermediate_size": 32}, r"has shape \(.*config.json says"),
        ({"projector_config.num_attention_heads": 0}, "num_attention_heads must be a positive integer; got 0"),
        ({"projector_config.layer_norm_eps": float("nan")}, "the logits of a trial question are not"),
        ({"vision_config.layer_norm_eps": None}, "layer_norm"),
        ({"projector_config": 3}, "projector_config must be a configuration or a dict; got 3"),
        ({"vision_config": None, "text_config": []}, "text_config must be a configuration or a dict"),
    ],
    ids=str,
)
def test_settings_that_do_not_describe_the_weights(checkpoint, changes, message):
    change_settings(checkpoint, changes)
    refused(checkpoint, message)


def test_cameras_renamed_in_all_settings(checkpoint):
    change_settings(checkpoint, {"cameras": RENAMED, "camera_labels": None})  # as before there were labels
    change_settings(checkpoint, {"cameras": RENAMED}, "processor_config.json")
    refused(checkpoint, "unknown camera CAM_ROOF; this model knows .*CAM_BACK")
    template = checkpoint / "chat_template.jinja"
    template.write_text(template.read_text().replace('"CAM_BACK"', '"CAM_ROOF"'))
    refused(checkpoint, "weights are missing: .*qformers.CAM_ROOF.*weights that belong nowhere: .*qformers.CAM_BACK")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cameras": RENAMED}, "but the processor has .*CAM_ROOF"),
        ({"num_queries": 9}, "num_queries must be an integer from 1 to 8 for this model; got 9"),
        ({"max_queries": 16}, "has max_queries=8, but the processor has 16"),
        ({"queries_per_token": 0}, "has queries_per_token=1, but the processor has 0"),
        ({"image_token": "<picture>"}, "no image placeholder '<picture>'"),
        ({"image_token": "<|im_end|>"}, "has image_token_id=3, but the processor has 2"),
        ({"processor_class": "CLIPProcessor"}, "no sound checkpoint"),
        ({"processor_class": "OtherProcessor", "auto_map": {"AutoProcessor": "other.OtherProcessor"}}, "custom code"),
        ({"image_processor.size": {"height": 56, "width": 28}}, "has image_size=28, but the processor resizes to"),
        ({"image_processor.do_resize": False}, r"pixels of shape \(1, 3, 3, 5\)"),
        ({"image_processor.image_std": [0, 1, 1]}, "image_mean and image_std must be .* above zero"),
        ({"image_processor.image_mean": [0.5, 0.5]}, "image_mean and image_std must be one number or three"),
    ],
    ids=str,
)
def test_processors_of_another_model(checkpoint, changes, message):
    change_settings(checkpoint, changes, "processor_config.json")
    refused(checkpoint, message)


def test_prompts_of_another_model(checkpoint):
    template = checkpoint / "chat_template.jinja"
    whole = template.read_text()
    unnamed = "the chat template does not name CAM_FRONT_LEFT in front of its image"
    for content, message in (
        (whole.replace("camera ~ ': '", "'view: '"), unnamed),
        ("{% if", "TemplateSyntaxError"),
        ("{{ x.y }}", "UndefinedError"),
    ):
        template.write_text(content)
        refused(checkpoint, message)
    template.write_text(whole)
    load(str(checkpoint))


def test_files_that_cannot_be_read(checkpoint, tmp_path):
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    for content in (b"", b"\0" * 100, whole[:-1], whole[: len(whole) // 2], whole + b"\0", b"\xff" * 8 + whole[8:]):
        file.write_bytes(content)
        refused(checkpoint, "Safetensor|the files have (0|100) bytes")
    file.write_bytes(whole)
    for content in ("", "{", "[]", "3", "[" * 100_000, '{"model_type": "smoldriver"}'):
        (checkpoint / "config.json").write_text(content)
        refused(checkpoint, "config.json is no JSON|expected model_type 'smoldriver'|has cameras=|image_token_id")
    (checkpoint / "config.json").unlink()
    with pytest.raises(OSError, match="config.json"):
        load(str(checkpoint))
    with pytest.raises(ValueError, match="is not a folder"):
        load(str(tmp_path / "nothing"))


def test_pickled_weights_and_adapters(checkpoint, sound):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no model.safetensors; pickled weights run code"):
        load(str(checkpoint))
    shutil.copy(sound / "model.safetensors", checkpoint)
    (checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    refused(checkpoint, "it holds an adapter, adapter_config.json")


def test_plain_from_pretrained_only_tells(checkpoint):
    """What `load` is there for: transformers' own door lets all of this in."""

    def change(weights):
        weights["model.extra"] = torch.zeros(3)
        weights.pop(QUERIES)
        weights[WEIGHTS[1]][0] = float("nan")

    change_weights(checkpoint, change)
    model, report = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    assert report["missing_keys"] == {QUERIES} and report["unexpected_keys"] == {"model.extra"}
    assert model.get_parameter(WEIGHTS[1]).isnan().any()
    change_weights(checkpoint, lambda weights: weights.update({QUERIES: torch.zeros(5, 3)}))
    with pytest.raises(RuntimeError, match="mismatched|size"):
        AutoModelForImageTextToText.from_pretrained(checkpoint)


def test_shards(sound, tmp_path):
    model, processor = load(str(sound))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    processor.save_pretrained(tmp_path)
    assert torch.equal(load(str(tmp_path))[0].state_dict()[QUERIES], model.state_dict()[QUERIES])
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(OSError):
        load(str(tmp_path))
    shard.write_bytes(content[:-9])
    refused(tmp_path, "Safetensor")
    shard.write_bytes(content)
    lost = next(iter(load_file(shard)))
    weights = {name: tensor for name, tensor in load_file(shard).items() if name != lost}
    save_file(weights, shard, metadata={"format": "pt"})
    refused(tmp_path, f"weights are missing: {lost}$")


def sound_settings() -> dict[str, Any]:
    return json.loads(tiny_config().to_json_string(use_diff=False))


FIELDS = ["cameras", "max_queries", "num_queries", "connector", "key_source", "image_size", "image_token_id"]
FIELDS += ["projector_config", "vision_config", "text_config"]


@amounts
def test_fields_of_a_configuration(amount):
    """Our own fields with any value: a ValueError that names a field, or a configuration that has that value."""
    sizes = {"vision_config": tiny_config().vision_config, "text_config": tiny_config().text_config}

    def check(changes: dict[str, Any]) -> bool:
        try:
            config = SmolDriverConfig(**{**sizes, **changes})
        except ValueError as error:
            assert any(field.removesuffix("_config") in str(error) for field in changes)
            return False
        for field in ("cameras", "max_queries", "connector", "key_source"):
            assert getattr(config, field) == changes.get(field, getattr(SmolDriverConfig(**sizes), field))
        return True

    for_each(amount, st.dictionaries(st.sampled_from(FIELDS), junk, min_size=1, max_size=2), check)


def values(tensors) -> list[bytes]:
    """What is in tensors, whatever they are called (files keep a tower's names of old)."""
    return sorted(tensor.detach().float().numpy().tobytes() for tensor in tensors)


def header_and_body(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@costly_amounts
def test_damaged_files(amount, checkpoint):
    """One file of a checkpoint damaged in any way."""
    whole = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    header, body = header_and_body(whole["model.safetensors"])
    numbers = bytearray(body)

    def with_header(content: bytes) -> bytes:
        return len(content).to_bytes(8, "little") + content + bytes(numbers)

    settings = [
        "config.json",
        "config.json",
        "processor_config.json",
        "tokenizer_config.json",
        "generation_config.json",
    ]
    cases = st.one_of(
        st.sampled_from(settings).flatmap(
            lambda name: st.tuples(st.just(name), mutated(json.loads(whole[name])).map(to_bytes))
        ),
        st.tuples(st.just("model.safetensors"), mutated(header).map(to_bytes).map(with_header)),
        st.tuples(st.just("model.safetensors"), broken_bytes(whole["model.safetensors"])),
        st.sampled_from(sorted(whole)).flatmap(
            lambda name: st.tuples(st.just(name), st.one_of(st.none(), broken_bytes(whole[name])))
        ),
    )

    def check(case: tuple[str, bytes | None]) -> bool:
        name, content = case
        if content is None:
            (checkpoint / name).unlink()
        else:
            (checkpoint / name).write_bytes(content)
        try:
            model, processor = load(str(checkpoint))
        except ValueError as error:
            assert str(error).startswith(f"{checkpoint} is no sound checkpoint: ")
            return False
        except OSError as error:
            assert name in str(error) or content is not None
            return False
        else:
            stored = load_file(checkpoint / "model.safetensors").values()
            assert all(tensor.isfinite().all() for tensor in stored)
            assert values(model.parameters()) == values(stored)
            assert processor.cameras == model.config.cameras == list(CAMERAS)
            assert 1 <= processor.num_queries <= processor.max_queries == model.config.max_queries == 8
            if name not in ("tokenizer.json", "chat_template.jinja"):
                scene = model.encode_scene({"CAM_BACK": picture()}, processor)
                assert scene.num_queries == processor.num_queries
            return True
        finally:
            (checkpoint / name).write_bytes(whole[name])

    for_each(amount, cases, check)
