"""training.toyworld.smolvlm: the small SmolVLM sees as DINOv2 does, and its tokenizer can write anything."""

import json

import pytest
import torch
from tiny import tiny_vision_config
from transformers import AutoModelForImageTextToText, AutoTokenizer, Dinov2Model

from smoldriver_hf import CAMERAS
from training.learning.smolvlm import load_processor
from training.toyworld.smolvlm import SPECIAL_TOKENS, ToyBaseArguments, main, make_tokenizer, smolvlm_tower_weights


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    tower = Dinov2Model(tiny_vision_config()).eval()
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "lambda1" in name:  # scales of one would hide that they are folded in
                parameter.uniform_(0.5, 2.0)
    return tower


@pytest.fixture(scope="module")
def base(tower, tmp_path_factory):
    root = tmp_path_factory.mktemp("toybase")
    tower.save_pretrained(root / "tower")
    item = {"Q": "Are there cars to the back of the ego car?", "A": "Yes."}
    frame = {"QA": {"perception": [item], "prediction": [], "planning": [], "behavior": []}}
    frame["image_paths"] = {camera: f"{camera}.jpg" for camera in CAMERAS}
    (root / "drivelm.json").write_text(json.dumps({"scene": {"key_frames": {"frame": frame}}}))
    args = ToyBaseArguments(
        [str(root / "drivelm.json")],
        str(root / "base"),
        str(root / "tower"),
        image_size=28,
        hidden_size=64,
        num_hidden_layers=1,
    )
    return main(args)


def test_the_tower_is_dinov2_without_its_class_token(tower, base):
    model = AutoModelForImageTextToText.from_pretrained(base).eval()
    own = model.model.vision_model
    weights = smolvlm_tower_weights(tower, 28)
    assert all(torch.equal(own.state_dict()[name], weight.bfloat16().float()) for name, weight in weights.items())
    own.load_state_dict(weights)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        patches = tower.embeddings(pixels)[:, 1:]
        expected = tower.layernorm(tower.encoder(patches).last_hidden_state)
        seen = own(pixels).last_hidden_state
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)


def test_it_can_see_with_the_first_layers_alone(tower, base, tmp_path):
    root = base.parent
    args = ToyBaseArguments(
        [str(root / "drivelm.json")], str(tmp_path / "half"), str(root / "tower"), vision_layers=1, image_size=28
    )
    own = AutoModelForImageTextToText.from_pretrained(main(args)).model.vision_model
    weights = smolvlm_tower_weights(tower, 28)
    assert own.config.num_hidden_layers == 1
    assert all(torch.equal(value, weights[name].bfloat16().float()) for name, value in own.state_dict().items())


def test_gated_layers_are_refused():
    gated = Dinov2Model(tiny_vision_config(use_swiglu_ffn=True))
    with pytest.raises(ValueError, match="gated"):
        smolvlm_tower_weights(gated, 28)


def test_the_tokenizer_writes_anything_and_cameras_in_one_piece(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = "Fünf 自転車 <c1,CAM_BACK,10.5,3.0>?\n  12"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert all(len(tokenizer(camera)["input_ids"]) == 1 for camera in CAMERAS)
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))


def test_the_baseline_can_use_it(base):
    processor = load_processor(str(base), CAMERAS)
    assert processor.image_seq_len == 4  # 4 x 4 patches, squares of 2 x 2
    prompt = processor.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    assert prompt.startswith("<|im_start|>User: Hello<end_of_utterance>")


def test_a_second_one_does_not_overwrite_the_first(base, tmp_path):
    with pytest.raises(ValueError, match="result of other settings .*drivelm_json was"):
        main(ToyBaseArguments([], str(base)))
    with pytest.raises(ValueError, match="multiple of patch size"):
        main(ToyBaseArguments([], str(tmp_path / "x"), str(base.parent / "tower"), image_size=30))


def test_a_cameras_name_is_one_piece_whatever_it_is():
    tokenizer = make_tokenizer(["Who is there? Nobody."], ["rear", "rear_left", "BOW"], vocab_size=600)
    for camera in ("rear", "rear_left", "BOW"):
        assert tokenizer.tokenize(camera) == [camera]
