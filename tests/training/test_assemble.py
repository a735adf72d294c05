"""Assembling: every weight of a part arrives, under the right name, and nothing is made up in silence."""

import dataclasses
import shlex

import pytest
import torch
from tiny import scene, tiny_text_config, tiny_tokenizer, tiny_towers, tiny_vision_config
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    Dinov2Model,
    HfArgumentParser,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    ViTForImageClassification,
)

from smoldriver_hf.loading_smoldriver import load, load_strictly
from training import assemble
from training.assemble import AssembleArguments, load_tower, main, map_smolvlm
from training.stages.files import read_notes


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a tiny tower, a tiny language model with tokenizer, and a tiny SmolVLM."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(1)
    Dinov2Model(tiny_vision_config()).save_pretrained(root / "vision")
    LlamaForCausalLM(tiny_text_config()).save_pretrained(root / "text")
    SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            vision_config={
                "hidden_size": 24,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 36,
                "patch_size": 6,
            },
            text_config=tiny_text_config().to_dict(),
            scale_factor=3,
            image_token_id=3,
            tie_word_embeddings=False,
        )
    ).save_pretrained(root / "smolvlm")
    for name in ("text", "smolvlm"):
        tiny_tokenizer().save_pretrained(root / name)
    return root


def test_parts_arrive_unchanged(parts, tmp_path):
    main(
        AssembleArguments(
            output_dir=str(tmp_path / "out"),
            vision=str(parts / "vision"),
            text=str(parts / "text"),
            max_queries=8,
        )
    )
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    tower = Dinov2Model.from_pretrained(parts / "vision").state_dict()
    text = AutoModelForCausalLM.from_pretrained(parts / "text")
    for key, value in model.model.vision_tower.state_dict().items():
        assert torch.equal(value, tower[key]), key
    for key, value in model.model.language_model.state_dict().items():
        assert torch.equal(value, text.model.state_dict()[key]), key
    assert torch.equal(model.lm_head.weight, text.lm_head.weight)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.padding_side == "left"
    assert processor.max_queries == 8
    scale = model.model.multi_modal_projector.connector.scale_norm.weight
    assert torch.allclose(scale, text.get_input_embeddings().weight.std().expand_as(scale), rtol=1e-4)


@pytest.mark.parametrize(("words", "size"), [(["28", "56"], [28, 56]), (["42"], 42), ([], 28)], ids=str)
def test_pictures_keep_their_shape_where_asked(parts, tmp_path, words, size):
    command = ["--output_dir", str(tmp_path / "out"), "--vision", str(parts / "vision"), "--text", str(parts / "text")]
    options = ["--max_queries", "4", *(["--image_size", *words] if words else [])]
    (arguments,) = HfArgumentParser(AssembleArguments).parse_args_into_dataclasses([*command, *options])
    main(arguments)
    model, processor = load(str(tmp_path / "out"))
    assert model.config.image_size == size
    height, width = size if isinstance(size, list) else (size, size)
    inputs = processor(images=scene(), text="Why?", return_tensors="pt")
    assert inputs["pixel_values"].shape == (6, 3, height, width)
    assert model.model.multi_modal_projector.grid == (height // 7, width // 7)
    assert model(**inputs).logits.isfinite().all()
    # What tells cameras apart where images come without their names.
    del inputs["camera_ids"]
    assert set(model.config.camera_labels) == set(processor.cameras) and model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("unknown", [None, "<|endoftext|>"])
def test_a_pad_token_is_chosen_where_there_is_none(parts, tmp_path, unknown):
    """As in Llama 3, GPT-2 (none at all) and Mistral (one for unknown words); never the one that ends a turn."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.unk_token = None, unknown
    LlamaForCausalLM(tiny_text_config(vocab_size=260, pad_token_id=None)).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    names = {"vision": str(parts / "vision"), "text": str(tmp_path / "text"), "max_queries": 4}
    main(AssembleArguments(output_dir=str(tmp_path / "out"), **names))
    model, processor = load(str(tmp_path / "out"))
    pad = processor.tokenizer.pad_token
    assert pad == (unknown or "<pad>")
    assert {model.config.pad_token_id, model.config.text_config.pad_token_id} == {processor.tokenizer.pad_token_id}
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    batch = processor(images=[scene(0), scene(1)], text=["Why?", "Is it safe?"], return_tensors="pt")
    assert model(**batch).logits.isfinite().all()


def test_the_first_layers_of_a_tower_are_its_own(parts, tmp_path):
    names = {"vision": str(parts / "vision"), "text": str(parts / "text"), "max_queries": 4}
    main(AssembleArguments(output_dir=str(tmp_path / "out"), vision_layers=1, **names))
    kept = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").model.vision_tower
    whole = Dinov2Model.from_pretrained(parts / "vision")
    assert kept.config.num_hidden_layers == 1 and kept.config.stage_names == ["stem", "stage1"]
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in kept.state_dict().items())
    pixels = torch.randn(1, 3, 28, 28)
    after_one = whole(pixels, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(kept(pixels).last_hidden_state, whole.layernorm(after_one))
    with pytest.raises(ValueError, match="vision_layers must lie between 1 and .* num_hidden_layers, 2; got 3"):
        main(AssembleArguments(output_dir=str(tmp_path / "other"), vision_layers=3, **names))


def save_tower(folder, kind, without=()):
    """A tiny tower with its pooler and head where its kind has one; returns its features of one random image."""
    torch.manual_seed(2)
    tower = AutoModel.from_config(tiny_towers()[kind]).eval()
    state = {name: tensor for name, tensor in tower.state_dict().items() if name not in without}
    tower.save_pretrained(folder, state_dict=state)
    pixels = torch.randn(1, 3, tower.config.image_size, tower.config.image_size)
    with torch.no_grad():
        return tower, pixels, tower(pixels).last_hidden_state


@pytest.mark.parametrize("kind", tiny_towers())
def test_every_kind_of_tower_sees_as_before(parts, tmp_path, kind):
    original, pixels, features = save_tower(tmp_path / "vision", kind)
    names = {"vision": str(tmp_path / "vision"), "text": str(parts / "text"), "max_queries": 4}
    main(AssembleArguments(output_dir=str(tmp_path / "out"), **names))
    tower = load_strictly(tmp_path / "out").model.vision_tower
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels).last_hidden_state, features)
    whole = original.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tower.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("siglip", "post_layernorm.weight"),
        ("clip", "pre_layrnorm.weight"),
        ("vit", "layernorm.bias"),
        ("swin", "layernorm.weight"),
    ],
)
def test_a_tower_without_a_weight_that_it_needs_is_refused(parts, tmp_path, kind, lost):
    save_tower(tmp_path / "vision", kind, without=(lost,))
    with pytest.raises(ValueError, match=f"weights are missing: {lost}$"):
        load_tower(str(tmp_path / "vision"), tiny_towers()[kind])


def test_weights_beside_a_tower_are_left_and_its_own_are_not(tmp_path):
    towers = tiny_towers()
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPConfig(text_config={**text, "vocab_size": 99}, vision_config=towers["clip"].to_dict(), projection_dim=8)
    siglip = SiglipConfig(text_config={**text, "vocab_size": 99}, vision_config=towers["siglip"].to_dict())
    owners = {"clip": CLIPModel(clip), "siglip": SiglipModel(siglip), "vit": ViTForImageClassification(towers["vit"])}
    for kind, owner in owners.items():
        owner.save_pretrained(tmp_path / kind)
        tower = load_tower(str(tmp_path / kind), towers[kind])
        whole = (owner.vit if kind == "vit" else owner.vision_model).state_dict()
        assert len(tower.state_dict()) > 20
        assert all(torch.equal(tensor, whole[name]) for name, tensor in tower.state_dict().items())
    save_tower(tmp_path / "deep", "vit")
    shallow = type(towers["vit"])(**{**towers["vit"].to_dict(), "num_hidden_layers": 1})
    assert len(load_tower(str(tmp_path / "deep"), shallow, layers=1).state_dict())
    with pytest.raises(ValueError, match="weights that belong nowhere: .*layer.*1"):
        load_tower(str(tmp_path / "deep"), shallow)


@pytest.mark.parametrize("own_tower", [True, False])
def test_smolvlm_keeps_its_text_head_and_connector(parts, tmp_path, own_tower):
    main(
        AssembleArguments(
            output_dir=str(tmp_path / "out"),
            smolvlm=str(parts / "smolvlm"),
            vision=None if own_tower else str(parts / "vision"),
            connector="pixel_shuffle",
        )
    )
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    source = SmolVLMForConditionalGeneration.from_pretrained(parts / "smolvlm")
    assert model.config.max_queries == 36 and model.config.queries_per_token == 9
    assert model.config.projector_config.hidden_size == 24
    for key, value in source.model.text_model.state_dict().items():
        assert torch.equal(value, model.model.language_model.state_dict()[key]), key
    assert torch.equal(source.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    connector = model.model.multi_modal_projector.connector
    assert torch.equal(source.model.connector.modality_projection.proj.weight, connector.proj.weight)
    if own_tower:
        for key, value in source.model.vision_model.state_dict().items():
            assert torch.equal(value, model.model.vision_tower.state_dict()[key]), key


def test_linear_connector_drops_smolvlms(parts, tmp_path):
    arguments = AssembleArguments(output_dir=str(tmp_path / "out"), smolvlm=str(parts / "smolvlm"), max_queries=4)
    main(arguments)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").config.connector == "linear"


def test_qformers_may_be_narrower_than_the_tower(parts, tmp_path):
    given = {"vision": str(parts / "vision"), "text": str(parts / "text"), "max_queries": 4}
    folder = main(AssembleArguments(output_dir=str(tmp_path / "narrow"), projector_hidden_size=16, **given))
    projector = load_strictly(str(folder)).model.multi_modal_projector
    assert projector.qformers["CAM_BACK"].queries.shape == (4, 16)


def test_unmapped_key_is_an_error():
    with pytest.raises(ValueError, match="no place for 'model.perceiver.weight'"):
        map_smolvlm({"model.perceiver.weight": torch.zeros(1)}, drop=())


def test_missing_weight_is_an_error(parts, tmp_path):
    tower = Dinov2Model.from_pretrained(parts / "vision")
    state = tower.state_dict()
    state.pop("layernorm.weight")
    tower.save_pretrained(tmp_path / "vision", state_dict=state)
    with pytest.raises(ValueError, match="weights are missing: layernorm.weight$"):
        main(
            AssembleArguments(
                output_dir=str(tmp_path / "out"), vision=str(tmp_path / "vision"), text=str(parts / "text")
            )
        )
    assert not (tmp_path / "out").exists()


def test_the_note_tells_parts_that_came_from_wheels(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "fetch_dinov2_small", lambda: parts / "vision")
    main(
        AssembleArguments(
            output_dir=str(tmp_path / "out"), text=str(parts / "text"), offline=True, max_queries=4, image_size=28
        )
    )
    (note,) = read_notes(tmp_path / "out")
    assert note["stage"] == "assemble" and note["parts"] == [assemble.OFFLINE_VISION]
    assert note["made_from"] == [str(parts / "text")] and note["trained_on"] is None
    (read,) = HfArgumentParser(AssembleArguments).parse_args_into_dataclasses(shlex.split(note["command"])[3:])
    assert read.__dict__ == note["arguments"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "name the parts"),
        ({"smolvlm": "x", "text": "y"}, "brings its own language model"),
        ({"vision": "x", "text": "y", "connector": "pixel_shuffle"}, "takes SmolVLM's own connector"),
        ({"smolvlm": "x", "vision_layers": 2}, "shortens another encoder"),
        ({"smolvlm": "x", "vision": "x", "vision_layers": 2}, "shortens another encoder"),
        ({"vision": "x", "text": "y", "dtype": "float16"}, "dtype must be bfloat16 or float32"),
    ],
)
def test_contradictory_arguments(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main(AssembleArguments(output_dir=str(tmp_path / "out"), **changes))


def test_a_finished_checkpoint_is_not_overwritten(parts, tmp_path, capsys):
    arguments = AssembleArguments(
        output_dir=str(tmp_path / "out"), vision=str(parts / "vision"), text=str(parts / "text"), max_queries=4
    )
    main(arguments)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert main(arguments) == tmp_path / "out"
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="result of other settings .*max_queries was 4, is 5"):
        main(dataclasses.replace(arguments, max_queries=5))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="does not tell what it came from"):
        main(dataclasses.replace(arguments, output_dir=str(tmp_path)))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_same_seed_same_weights(parts, tmp_path):
    for name in ("a", "b"):
        main(
            AssembleArguments(
                output_dir=str(tmp_path / name), vision=str(parts / "vision"), text=str(parts / "text"), max_queries=4
            )
        )
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second
