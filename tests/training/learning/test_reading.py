"""Batches to read: those of fine-tuning, prompt for prompt, with tokens made of words where pictures would be."""

import random

import pytest
import torch
from prepared import write_smoldriver, write_smolvlm
from transformers import AutoProcessor

from training.data.rig import NUSCENES
from training.learning.collate import PackedSceneCollator
from training.learning.looking import ASKED_CAMERAS, TOKEN_CAMERAS
from training.learning.reading import WORD_WEIGHTS, BaselineReadingCollator, ReadingCollator
from training.learning.slots import WordTable, bags_of
from training.learning.smolvlm import PackedBaselineCollator, SceneView, load_processor
from training.toyworld.contents import all_words
from training.toyworld.readings import make_reading

KINDS = {
    "smoldriver": (ReadingCollator, PackedSceneCollator),
    "smolvlm": (BaselineReadingCollator, PackedBaselineCollator),
}


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    root = tmp_path_factory.mktemp("reading")
    write_smoldriver(root / "smoldriver")
    write_smolvlm(root / "smolvlm")
    return {
        "smoldriver": AutoProcessor.from_pretrained(root / "smoldriver"),
        "smolvlm": SceneView(load_processor(str(root / "smolvlm"), NUSCENES.names), NUSCENES.names),
    }


def example(number: int, budgets: dict[str, int], count: int = 4):
    reading = make_reading(0, number)
    asked = random.Random(number).sample(reading.asked, count)
    return {
        "images": dict.fromkeys(NUSCENES.names),
        "pairs": [(one.question, one.answer) for one in asked],
        "contents": reading.contents,
        "budgets": budgets,
        "look_at": [one.cameras for one in asked],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_that_of_fine_tuning(views, kind):
    view = views[kind]
    reads, tunes = KINDS[kind]
    examples = [example(number, dict.fromkeys(NUSCENES.names, 4)) for number in (3, 4)]  # a tile's tokens, too
    for one in examples:
        one["look_at"] = [()] * len(one["pairs"])
    batch = reads(WordTable(view.tokenizer, [all_words(NUSCENES)]), view, NUSCENES)(examples)
    collator = tunes(view, num_queries=4, rig=NUSCENES)
    expected = collator._text([collator.encode(one, 4) for one in examples])
    assert batch.keys() == {*expected, WORD_WEIGHTS}
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_each_camera_has_its_budget_and_says_what_it_shows(views, kind):
    view = views[kind]
    table = WordTable(view.tokenizer, [all_words(NUSCENES)])
    budgets = dict(zip(NUSCENES.names, (1, 2, 4, 8, 16, 3), strict=True))
    one = example(5, budgets)
    batch = KINDS[kind][0](table, view, NUSCENES)([one])
    shown = batch[TOKEN_CAMERAS][0]
    assert [int((shown == 1 << view.cameras.index(name)).sum()) for name in NUSCENES.names] == list(budgets.values())
    assert torch.equal(shown != 0, batch["input_ids"][0] == view.image_token_id)
    order = [name for name in view.cameras if name in budgets]
    bags = [bag for name in order for bag in bags_of(one["contents"], name, budgets[name])]
    assert torch.equal(batch[WORD_WEIGHTS], table.weights(bags))


def test_a_question_that_names_no_camera_looks_where_its_answer_stands(views):
    view = views["smoldriver"]
    one = example(5, dict.fromkeys(NUSCENES.names, 1))
    one["pairs"] = [("Predict the behavior of the ego vehicle.", "It waits."), ("Is it wet?", "No.")]
    one["pairs"].append(("Are there cars to the back of the ego car?", "No."))
    one["look_at"] = [("CAM_FRONT",), (), ("CAM_FRONT",)]  # what the question says counts
    batch = ReadingCollator(WordTable(view.tokenizer, [all_words(NUSCENES)]), view, NUSCENES)([one])
    asked = set(batch[ASKED_CAMERAS][0].tolist())
    assert asked == {0, *(1 << view.cameras.index(name) for name in ("CAM_FRONT", "CAM_BACK"))}
