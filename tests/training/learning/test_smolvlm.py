"""The SmolVLM baseline sees the same questions and learns the same answers as SmolDriver."""

import pytest
import torch
from prepared import write_smoldriver, write_smolvlm
from tiny import picture, scene, tiny_image_processor
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from smoldriver_hf import CAMERAS, SmolDriverProcessor
from training.learning.collate import PackedSceneCollator, SceneCollator
from training.learning.smolvlm import (
    BaselineCollator,
    PackedBaselineCollator,
    SceneView,
    build_features,
    load_processor,
    see_cached,
)

PAIRS = [("Is there a car?", "Yes."), ("What is behind us, and what will it do?", "A truck."), ("Brake?", "No.")]
FRAME = {"images": scene(0), "pairs": PAIRS}
SMALL = {"images": scene(1, ["CAM_BACK", "CAM_FRONT"]), "pairs": PAIRS[:2]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_smolvlm(tmp_path_factory.mktemp("smolvlm"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModelForImageTextToText.from_pretrained(checkpoint)


def view(checkpoint, **options):
    return SceneView(load_processor(str(checkpoint), CAMERAS, **options), CAMERAS)


def one_by_one(frames):
    return [{"images": frame["images"], "pairs": [pair]} for frame in frames for pair in frame["pairs"]]


@pytest.mark.parametrize("splitting", [False, True])
def test_ids_and_pixels_are_those_of_the_processor(checkpoint, splitting):
    own = view(checkpoint, image_splitting=splitting)
    for example in one_by_one([FRAME, SMALL]):
        batch = BaselineCollator(own)([example])
        images = {camera: example["images"][camera] for camera in CAMERAS if camera in example["images"]}
        prompt = own.prompt(example["pairs"][0][0], list(images))
        expected = own.idefics3(images=[list(images.values())], text=[prompt], return_tensors="pt")
        length = expected["input_ids"].shape[1]
        assert batch["input_ids"][0, :length].tolist() == expected["input_ids"][0].tolist()
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert torch.equal(batch["pixel_attention_mask"], expected["pixel_attention_mask"])
        learnt = batch["input_ids"][0, length:]
        assert batch["labels"][0].tolist() == [-100] * length + learnt.tolist()
        assert own.tokenizer.decode(learnt) == example["pairs"][0][1] + "<end_of_utterance>"


def test_splitting_makes_tiles_and_not_splitting_one(checkpoint):
    for splitting, tiles in ((False, 1), (True, 5)):
        batch = BaselineCollator(view(checkpoint, image_splitting=splitting))([{**SMALL, "pairs": PAIRS[:1]}])
        assert batch["pixel_values"].shape[:2] == (1, 2 * tiles)


def test_a_saved_baseline_pads_on_the_left(checkpoint, tmp_path):
    load_processor(str(checkpoint), CAMERAS).tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"


def test_size_of_turned_pictures(checkpoint):
    turned = picture(3, size=(90, 30))
    turned.getexif()[0x0112] = 6
    own = view(checkpoint, image_splitting=True)
    ids = own.image_tokens([turned])[0]
    assert ids.count(own.image_token_id) == own.pixels([[turned]])["pixel_values"].shape[1] * own.num_queries


def test_prompts_name_cameras_and_user_text_is_not_control(checkpoint):
    own = view(checkpoint)
    question = "<image> <fake_token_around_image> <row_1_col_1> <end_of_utterance>?"
    prompt = own.prompt(question, ["CAM_FRONT", "CAM_BACK"])
    assert prompt.startswith("<|im_start|>User: CAM_FRONT: <image>\nCAM_BACK: <image>\n")
    assert prompt.count("<image>") == 2 and prompt.count("<end_of_utterance>") == 1
    assert "<fake_token_around_image>" not in prompt and "<row_1_col_1>" not in prompt


def test_the_prompt_is_smoldrivers_but_for_the_turn_marks(checkpoint, tmp_path):
    processor = AutoProcessor.from_pretrained(write_smoldriver(tmp_path))
    marks = str.maketrans({"\n": " "})
    ours = processor.prompt("Brake?", list(CAMERAS)).replace("<|im_start|>user", "").translate(marks)
    theirs = view(checkpoint).prompt("Brake?", list(CAMERAS)).replace("<|im_start|>User:", "").translate(marks)
    assert ours.split("Brake?")[0].split() == theirs.split("Brake?")[0].split()
    learnt = [
        batch["labels"][batch["labels"] != -100]
        for batch in (
            SceneCollator(processor)([{**SMALL, "pairs": PAIRS[:1]}]),
            BaselineCollator(view(checkpoint))([{**SMALL, "pairs": PAIRS[:1]}]),
        )
    ]
    assert learnt[0][:-1].tolist() == learnt[1][:-1].tolist()  # the same answer; what ends the turn differs


def test_a_smoldriver_made_of_it_reads_the_same_tokens(checkpoint):
    own = view(checkpoint)
    ours = SmolDriverProcessor(tiny_image_processor(), own.tokenizer, cameras=list(CAMERAS), max_queries=8)
    read = []
    for collator in (PackedSceneCollator(ours, num_queries=own.num_queries), PackedBaselineCollator(own)):
        frame = collator.encode(FRAME, own.num_queries)
        read.append([(frame.prefix + question, answer) for question, answer in frame.pairs])
    assert read[0] == read[1]


def test_packed_rows_and_rows_have_the_same_loss(checkpoint, model):
    own = view(checkpoint)
    packed = PackedBaselineCollator(own)([FRAME, SMALL])
    rows = BaselineCollator(own)(one_by_one([FRAME, SMALL]))
    assert packed["input_ids"].shape[0] == 2 and rows["input_ids"].shape[0] == 5
    with torch.no_grad():
        assert model(**packed).loss.item() == pytest.approx(model(**rows).loss.item(), abs=1e-5)


def test_it_looks_at_the_images_it_is_given(checkpoint, model):
    own = view(checkpoint)
    with torch.no_grad():
        losses = [
            model(**BaselineCollator(own)([{"images": scene(seed), "pairs": PAIRS[:1]}])).loss.item()
            for seed in (0, 5)
        ]
    assert losses[0] != losses[1]


def test_blind_prompts(checkpoint, model):
    batch = BaselineCollator(view(checkpoint), cameras=[])(one_by_one([SMALL]))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert torch.isfinite(model(**batch).loss)


def test_it_has_one_budget(checkpoint):
    with pytest.raises(ValueError, match="4 visual tokens per tile and no other budget"):
        BaselineCollator(view(checkpoint), num_queries=[16])


def test_a_saved_processor_keeps_prompt_and_splitting(checkpoint, tmp_path):
    own = load_processor(str(checkpoint), CAMERAS, image_splitting=False)
    own.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(own)
    assert again.chat_template == own.chat_template and again.image_seq_len == own.image_seq_len
    assert again.image_processor.do_image_splitting is False
    images = list(scene(0, ["CAM_FRONT"]).values())
    prompt = SceneView(own, CAMERAS).prompt("Brake?", ["CAM_FRONT"])
    for name, value in own(images=[images], text=[prompt], return_tensors="pt").items():
        assert torch.equal(value, again(images=[images], text=[prompt], return_tensors="pt")[name]), name


def test_an_unreadable_image_is_told(checkpoint, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no picture")
    for splitting in (False, True):
        with pytest.raises(ValueError, match="x.png: cannot be read"):
            BaselineCollator(view(checkpoint, image_splitting=splitting))(
                [{"images": {"CAM_FRONT": str(tmp_path / "x.png")}, "pairs": PAIRS[:1]}]
            )


@pytest.mark.parametrize("packed", [False, True])
def test_a_frozen_towers_features_stand_for_pixels(checkpoint, tmp_path, packed):
    frames = []
    for number, frame in enumerate((FRAME, SMALL)):
        paths = {camera: str(tmp_path / f"{number}{camera}.png") for camera in frame["images"]}
        for camera, path in paths.items():
            frame["images"][camera].save(path)
        frames.append({**frame, "images": paths})
    model, own = AutoModelForImageTextToText.from_pretrained(checkpoint), view(checkpoint)
    names = [path for frame in frames for path in frame["images"].values()]
    cache = build_features(model, own.idefics3.image_processor, names, tmp_path / "cache")
    examples = frames if packed else one_by_one(frames)
    collator = PackedBaselineCollator if packed else BaselineCollator
    live = collator(own)(examples)
    cached = collator(own, features=cache)(examples)
    with torch.no_grad():
        expected = model(**live).loss.item()
        see_cached(model)
        assert model(**cached).loss.item() == pytest.approx(expected, abs=1e-3)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path / "saved")  # with the tower that cached features stood for
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").state_dict()
    assert before.keys() == again.keys()
