"""Aligning: only the connector changes, it learns the words of pictures, a kill costs nothing, bad data is refused."""

import json
from pathlib import Path

import pytest
import torch
from prepared import write_prepared, write_smolvlm
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, TrainingArguments

from training import align, prepare
from training.align import AlignArguments, Picture, area_under_curve, words_shown, words_to_learn
from training.toyworld import make as toyworld
from training.toyworld.pictures import LISTING

WORDS = ("car", "cars", "pedestrian", "barrier", "bus", "moving", "parked", "near", "far", "red")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("align")
    settings = {"seed": 3, "width": 160, "num_workers": 1}
    toyworld.main(toyworld.ToyWorldArguments(scenes=4, output_dir=str(root / "world"), **settings))
    pictures = str(root / "world" / "pictures.json")
    prepare.main(
        prepare.PrepareArguments(
            drivelm_json=pictures, image_root=str(root / "world"), output_dir=str(root / "pictures"), split="train"
        )
    )
    write_smolvlm(root / "smolvlm")
    model = AutoModelForImageTextToText.from_pretrained(root / "smolvlm")
    tokenizer = AutoTokenizer.from_pretrained(root / "smolvlm")
    tokenizer.add_tokens([f" {word}" for word in WORDS])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(root / "smolvlm")
    tokenizer.save_pretrained(root / "smolvlm")
    return root


def run(root: Path, output_dir: Path, **config) -> Path:
    args = AlignArguments(str(root / "smolvlm"), str(root / "pictures"), str(root / "features"))
    settings = {"use_cpu": True, "report_to": "none", "max_steps": 4, "save_steps": 2, "logging_steps": 1}
    settings |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 0}
    return align.main(args, TrainingArguments(output_dir=str(output_dir), **{**settings, **config}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_only_the_connector_learns_and_it_does(root, tmp_path):
    final = run(root, tmp_path / "run", max_steps=30)
    before, after = weights(root / "smolvlm"), weights(final)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("connector" in name for name in changed)
    losses = [
        line["loss"]
        for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    ]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    notes = json.loads((final / "align.json").read_text())
    assert notes["steps"] == 30 and 0 <= notes["held_out"]["area_under_curve"] <= 1
    assert run(root, tmp_path / "run", max_steps=30) == final  # nothing to do


def test_a_killed_run_ends_with_the_same_weights(root, tmp_path):
    whole = weights(run(root, tmp_path / "whole"))

    class Killed(Exception):
        pass

    class StopsAfterTwo(align.WholeCheckpoints):
        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise Killed
            return super().compute_loss(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "WholeCheckpoints", StopsAfterTwo)
        with pytest.raises(Killed):
            run(root, tmp_path / "killed")
    resumed = weights(run(root, tmp_path / "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_visual_tokens_become_as_long_as_words(root, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(run(root, tmp_path / "run"))
    embeddings = model.get_input_embeddings().weight
    features = torch.randn(8, 16, model.config.vision_config.hidden_size)
    align.as_long_as_words(model.model.connector, features, embeddings)
    lengths = model.model.connector(features).norm(dim=-1)
    assert lengths.mean().item() == pytest.approx(embeddings.norm(dim=-1).mean().item(), rel=1e-4)


def test_words_of_a_picture():
    answers = {
        LISTING: "One car, two traffic cones.",
        "Which state is the car in?": "Parked.",
        "Does the picture show a moving truck?": "No.",
        "What number of buses does the picture show?": "Zero.",
    }
    words = words_shown(answers)
    assert words == {"one", "two", "parked", "car", "cars", "traffic", "cone", "cones"}
    assert words_shown({LISTING: "Nothing."}) == {"nothing"}


def test_words_to_learn_are_single_tokens_neither_rare_nor_usual():
    class Tokenizer:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [7, 8] if text == " trailer" else [len(text)]}

    pictures = [
        Picture("a", "0", frozenset({"day", "car", "trailer"})),
        *[Picture("b", "1", frozenset({"day"}))] * 9,
    ]
    assert words_to_learn(pictures, Tokenizer()) == {"car": 4}
    with pytest.raises(ValueError, match="no word .* is one token"):
        words_to_learn(pictures[1:], Tokenizer())


def test_data_without_listings_is_refused(root, tmp_path):
    write_prepared(tmp_path / "data")
    args = AlignArguments(str(root / "smolvlm"), str(tmp_path / "data"), str(tmp_path / "features"))
    with pytest.raises(ValueError, match="has no question 'Name everything in the picture.'"):
        align.main(args, TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none"))


def test_area_under_curve_by_hand():
    labels = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])  # all pictures show the second word
    assert area_under_curve(torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 0.0]]), labels) == 0.75
