"""Rows behind a prefix borrow the language model: its attention and its config are the caller's before and after."""

import threading
from copy import deepcopy

import pytest
import torch
from transformers import GPT2Config

from smoldriver_hf import rows_smoldriver
from smoldriver_hf.rows_smoldriver import ATTENTION, rows_attention_in
from tests.tiny import scene as pictures
from tests.tiny import tiny_config, tiny_model, tiny_processor, tiny_text_config
from training.learning.collate import PackedSceneCollator, packed_mask_dtype


@pytest.fixture
def model():
    return tiny_model(text_config=tiny_text_config(initializer_range=0.3, tie_word_embeddings=False))


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def attentions(model) -> list[str]:
    """What the config of the model and of every part of it says, and of every layer."""
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


def test_a_model_that_answered_a_scene_trains_packed_as_before(model, processor):
    pairs = [("Is it safe?", "Yes."), ("What is ahead?", "A car.")]
    batch = PackedSceneCollator(processor, num_queries=2, mask_dtype=packed_mask_dtype(model))(
        [{"images": pictures(0), "pairs": pairs}]
    )
    before, names, settings = model(**batch).loss, attentions(model), deepcopy(model.config.to_dict())
    model.encode_scene(pictures(0), processor).ask_all(["Is it safe?", "What is ahead?"], max_new_tokens=3)
    assert packed_mask_dtype(model) is torch.bool
    assert attentions(model) == names and set(names) == {"sdpa"} and model.config.to_dict() == settings
    loss = model.train()(**batch).loss
    assert torch.equal(loss, before)
    loss.backward()
    assert model.model.language_model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_an_error_while_asking_leaves_the_config_as_it_was(model, processor, monkeypatch):
    scene = model.encode_scene(pictures(0), processor)

    def fail(*args, **kwargs):
        assert set(attentions(model.model.language_model)) == {ATTENTION}
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model.language_model.layers[-1].mlp, "forward", fail)
    for ask in (scene.ask, lambda question: scene.score(question, ["Yes.", "No."])):
        with pytest.raises(RuntimeError, match="out of memory"):
            ask("Is it safe?")
        assert set(attentions(model)) == {"sdpa"}
    answers = scene.iter_answers(["a", "b"], max_new_tokens=4)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(answers)
    assert set(attentions(model)) == {"sdpa"} and not rows_smoldriver._SWITCHED


def test_an_abandoned_iterator_leaves_the_config_as_it_was(model, processor):
    answers = model.encode_scene(pictures(0), processor).iter_answers(["a", "b", "c"], batch_size=1, max_new_tokens=2)
    next(answers)
    assert set(attentions(model)) == {"sdpa"}


def test_calls_that_overlap_end_with_the_last_one(model):
    config = model.model.language_model.config
    inside, leave = threading.Event(), threading.Event()

    def other():
        with rows_attention_in(config):
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=other)
    with rows_attention_in(config):
        thread.start()
        assert inside.wait(20)
    assert config._attn_implementation == ATTENTION
    leave.set()
    thread.join()
    assert config._attn_implementation == "sdpa"


def test_a_plain_call_meanwhile_is_plain_sdpa(model, processor):
    inputs = processor(images=[pictures(0)] * 2, text=["a", "a long question"], return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits
        with rows_attention_in(model.model.language_model.config):
            assert torch.equal(model(**inputs).logits, before)


def test_a_language_model_that_drops_keyword_arguments_is_refused_not_misunderstood(model, processor, monkeypatch):
    attention = model.model.language_model.layers[1].self_attn
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, prefix_rows=None, **kwargs: forward(*args, **kwargs))
    scene = model.encode_scene(pictures(0), processor)
    with pytest.raises(ValueError, match="hands keyword arguments .* LlamaModel did so in 1 of 2 layers"):
        scene.ask("Is it safe?")


def test_another_family_hands_them_on(processor):
    sizes = {"vocab_size": 264, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512, "initializer_range": 0.3}
    text_config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = tiny_model(3, text_config=text_config)
    processor = tiny_processor(tiny_config(text_config=text_config))
    questions = ["Is it safe?", "Why?", "What is behind the ego car?"]
    answers = model.encode_scene(pictures(1), processor, num_queries=2).ask_all(questions, max_new_tokens=5)
    for question, answer in zip(questions, answers, strict=True):
        inputs = processor(images=pictures(1), text=question, num_queries=2, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer.token_ids == tuple(tokens.tolist())
