"""A scene answers as `generate` does, whatever the budget, the cameras, the questions and the batch."""

import threading

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, TextIteratorStreamer

from smoldriver_hf import CAMERAS, rows_smoldriver
from smoldriver_hf.scene_smoldriver import SceneAnswer
from tests.tiny import scene as pictures
from tests.tiny import tiny_config, tiny_model, tiny_processor, tiny_text_config

QUESTIONS = [
    "Is it safe?",
    "What is the moving status of object <c1,CAM_FRONT,714.3,503.6> and why does it matter to the ego vehicle?",
    "\n\n  leading white space",
    "",
    "What <image> does <|im_end|> mean?",
    "Wie weit ist der Fußgänger \U0001f6b6 entfernt?",
    "Go?",
]


def lively(**changes):
    """Weights large enough that what is generated depends on every token before it."""
    return tiny_text_config(**{"initializer_range": 0.3, "tie_word_embeddings": False, **changes})


@pytest.fixture(scope="module")
def model():
    return tiny_model(text_config=lively())


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def generated(model, processor, images, question, num_queries=None, max_new_tokens=6):
    """What plain `generate` appends to the prompt of one question."""
    budget = {} if num_queries is None else {"num_queries": num_queries}
    inputs = processor(images=images, text=question, return_tensors="pt", **budget)
    sequence = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tuple(sequence[0, inputs["input_ids"].shape[1] :].tolist())


@pytest.mark.parametrize("num_queries", [1, 3, 8])
@pytest.mark.parametrize("cameras", [CAMERAS, ("CAM_BACK",), ("CAM_BACK_RIGHT", "CAM_FRONT")], ids=len)
def test_tokens_equal_generate(model, processor, num_queries, cameras):
    images = pictures(1, cameras)
    scene = model.encode_scene(images, processor, num_queries=num_queries)
    expected = [generated(model, processor, images, question, num_queries) for question in QUESTIONS]
    assert len(set(expected)) == len(QUESTIONS)
    for batch_size in (1, 3, 16):
        answers = scene.ask_all(QUESTIONS, batch_size=batch_size, max_new_tokens=6)
        assert [answer.token_ids for answer in answers] == expected
        assert [answer.question for answer in answers] == QUESTIONS
    assert scene.ask(QUESTIONS[1], max_new_tokens=6) == answers[1].text


def test_prompt_ids_are_the_processors(model, processor):
    images = pictures(1)
    scene = model.encode_scene(images, processor, num_queries=2)
    for question in QUESTIONS:
        whole = processor(images=images, text=question, num_queries=2)["input_ids"][0]
        assert scene.prefix_ids + scene._suffix(question) == list(whole)


@pytest.mark.parametrize(
    "text_config",
    [
        Qwen2Config(**lively().to_diff_dict() | {"model_type": "qwen2"}),
        lively(num_key_value_heads=2, num_attention_heads=2),
        lively(num_attention_heads=4, num_hidden_layers=1, tie_word_embeddings=True),
    ],
    ids=["qwen2", "one head a key head", "tied"],
)
def test_other_language_models(text_config):
    config = tiny_config(text_config=text_config)
    model, processor = tiny_model(3, text_config=text_config), tiny_processor(config)
    scene = model.encode_scene(pictures(2), processor, num_queries=4)
    answers = scene.ask_all(QUESTIONS, batch_size=4, max_new_tokens=5)
    expected = [generated(model, processor, pictures(2), question, 4, 5) for question in QUESTIONS]
    assert [answer.token_ids for answer in answers] == expected
    assert len(set(expected)) > 1


def test_rows_end_at_the_end_token_and_take_the_next_question(model, processor, monkeypatch):
    """With many end tokens answers have many lengths; each still equals `generate`'s, in two rows or ten."""
    questions = [f"{'Why? ' * (index % 4)}{index}" for index in range(17)]
    images = pictures(4)
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(2, 264, 6)))
    expected = [generated(model, processor, images, question, max_new_tokens=12) for question in questions]
    assert len({len(tokens) for tokens in expected}) > 2
    scene = model.encode_scene(images, processor)
    for batch_size in (1, 2, 5, 10):
        answers = scene.ask_all(questions, batch_size=batch_size, max_new_tokens=12)
        assert [answer.token_ids for answer in answers] == expected


def test_memory_is_bounded_in_the_length_of_questions_too(model, processor, monkeypatch):
    """Long questions get fewer rows, and are read a few at a time; the answers stay the same."""
    questions = ["Why? " * (30 - index) for index in range(8)]
    scene = model.encode_scene(pictures(0), processor, num_queries=1)
    expected = scene.ask_all(questions, max_new_tokens=4)
    shapes = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    monkeypatch.setattr(rows_smoldriver, "PROMPT_TOKENS", 400)
    monkeypatch.setattr(rows_smoldriver, "CACHE_COLUMNS", 600)
    assert scene.ask_all(questions, max_new_tokens=4) == expected
    hook.remove()
    assert max(rows * tokens for rows, tokens in shapes) <= 400 and max(rows for rows, _ in shapes) <= 3
    monkeypatch.setattr(rows_smoldriver, "CACHE_COLUMNS", 1)
    assert scene.ask_all(questions, max_new_tokens=4) == expected


def test_other_calls_of_the_model_are_left_alone(processor):
    """Before and after a scene, forward gives the same logits to the last bit."""
    model = tiny_model(text_config=lively())
    inputs = processor(images=[pictures(0)] * 2, text=QUESTIONS[:2], return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits
        model.encode_scene(pictures(0), processor).ask("?", max_new_tokens=2)
        assert torch.equal(model(**inputs).logits, before)


def test_work_of_the_language_model(model, processor):
    """The tower and the prefix run once; a full batch is one call a token."""
    calls, towers = [], []
    language_model = model.model.language_model
    hooks = [
        language_model.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((kwargs.get("input_ids"), kwargs.get("inputs_embeds"))),
            with_kwargs=True,
        ),
        model.model.vision_tower.register_forward_pre_hook(lambda module, args: towers.append(len(args[0]))),
    ]
    try:
        scene = model.encode_scene(pictures(0), processor)
        scene.ask_all([str(index) for index in range(40)], batch_size=8, max_new_tokens=3)
    finally:
        for hook in hooks:
            hook.remove()
    assert towers == [6]
    prefix, *rest = calls
    assert prefix[1].shape[:2] == (1, scene.prefix_length)
    assert [tuple(ids.shape[:1]) for ids, _ in rest] == [(8,)] * 15
    assert sum(ids.shape[1] == 1 for ids, _ in rest) == 10


def test_length_comes_from_the_generation_config(model, processor, monkeypatch):
    scene = model.encode_scene(pictures(0), processor)
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    assert len(scene.ask_all(["a"])[0].token_ids) == 20
    monkeypatch.setattr(model.generation_config, "max_new_tokens", 3)
    assert len(scene.ask_all(["a"])[0].token_ids) == 3
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        scene.ask("a", max_new_tokens=0)


def test_streaming(model, processor):
    scene = model.encode_scene(pictures(0), processor)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=20)
    answer = scene.ask("What is in front?", max_new_tokens=9, streamer=streamer)
    assert "".join(streamer).strip() == answer

    class Recorder:
        def __init__(self):
            self.got = []

        def put(self, ids):
            self.got += ids.flatten().tolist()

        def end(self):
            self.got.append("end")

    ours, theirs = Recorder(), Recorder()
    scene.ask("What is in front?", max_new_tokens=4, streamer=ours)
    inputs = processor(images=pictures(0), text="What is in front?", return_tensors="pt")
    model.generate(**inputs, max_new_tokens=4, do_sample=False, streamer=theirs)
    assert ours.got == theirs.got


def test_answers_come_as_they_are_complete(model, processor):
    scene = model.encode_scene(pictures(0), processor)
    answers = scene.iter_answers(["a", "b", "c"], batch_size=1, max_new_tokens=2)
    index, answer = next(answers)
    assert isinstance(answer, SceneAnswer) and answer.question == "abc"[index]
    assert sorted([index, *(index for index, _ in answers)]) == [0, 1, 2]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_scores_equal_the_whole_prompt(model, processor, batch_size):
    images, question = pictures(5), "Is it safe to brake?"
    choices = ["Yes.", "No", "Y", "Turn left, then stop at the traffic light.", "No"]
    scores = model.encode_scene(images, processor, num_queries=2).score(question, choices, batch_size=batch_size)
    for choice, score in zip(choices, scores, strict=True):
        inputs = processor(images=images, text=question, num_queries=2, return_tensors="pt")
        answer = torch.tensor([processor.tokenizer(choice)["input_ids"]])
        prompt = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logs = model(**inputs).logits[:, prompt - 1 : -1].log_softmax(-1)
        assert score == pytest.approx(float(logs.gather(-1, answer[..., None]).sum()), abs=1e-4)
    assert scores[1] == pytest.approx(scores[4], abs=1e-5)


def test_wrong_choices_are_told(model, processor):
    scene = model.encode_scene(pictures(0), processor)
    for choices in ([], "Yes", ["Yes", ""]):
        with pytest.raises(ValueError, match="choices must be non-empty strings"):
            scene.score("?", choices)


@pytest.mark.parametrize("camera", CAMERAS)
def test_update_equals_encoding_everything(model, processor, camera):
    old, new = pictures(0), {**pictures(0), camera: pictures(7)[camera]}
    before = model.encode_scene(old, processor, num_queries=3)
    answers = before.ask_all(QUESTIONS, max_new_tokens=5)
    seen = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    updated = before.update({camera: new[camera]})
    hook.remove()
    assert seen == [1]
    whole = model.encode_scene(new, processor, num_queries=3)
    assert updated.prefix_ids == whole.prefix_ids
    for ours, theirs in zip(updated.prefix_cache, whole.prefix_cache, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert updated.ask_all(QUESTIONS, max_new_tokens=5) == whole.ask_all(QUESTIONS, max_new_tokens=5)
    assert before.ask_all(QUESTIONS, max_new_tokens=5) == answers
    assert (updated.prefix_cache[-1][0] - before.prefix_cache[-1][0]).abs().max() > 1e-3


def test_a_drive_reuses_nothing_stale(model, processor):
    """Frame after frame, cameras change, come and stay; each scene equals one encoded from nothing."""
    frames = [
        {camera: pictures(0)[camera] for camera in ("CAM_FRONT", "CAM_BACK")},
        pictures(1, ("CAM_BACK",)),
        pictures(2, ("CAM_FRONT_LEFT",)),  # in front of all others
        pictures(3, ("CAM_BACK_RIGHT",)),  # behind all others
        pictures(4, ("CAM_FRONT_RIGHT", "CAM_BACK")),
        pictures(5),
    ]
    scene, images = model.encode_scene(frames[0], processor, num_queries=2), dict(frames[0])
    for frame in frames[1:]:
        scene, images = scene.update(frame), {**images, **frame}
        fresh = model.encode_scene(images, processor, num_queries=2)
        assert scene.cameras == fresh.cameras and scene.prefix_ids == fresh.prefix_ids
        for ours, theirs in zip(scene.prefix_cache, fresh.prefix_cache, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_errors_stay_with_their_question(model, processor, monkeypatch):
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", 300)
    scene = model.encode_scene(pictures(0), processor, num_queries=1)
    questions = ["first", None, "lone \ud800 surrogate", "much too long " * 40, "last"]
    answers = scene.ask_all(questions, max_new_tokens=4)
    assert [answer.error is None for answer in answers] == [True, False, False, False, True]
    assert [answer.text is None for answer in answers] == [False, True, True, True, False]
    assert "must be a string; got NoneType" in str(answers[1].error)
    assert "at most 300" in str(answers[3].error)
    assert [answers[0], answers[4]] == scene.ask_all(["first", "last"], max_new_tokens=4)
    with pytest.raises(ValueError, match="at most 300"):
        scene.ask(questions[3])
    with pytest.raises(ValueError, match="which is for `ask`"):
        scene.ask_all("one question")
    with pytest.raises(ValueError, match="batch_size"):
        scene.ask_all(["a"], batch_size=0)
    assert scene.ask_all([]) == []


def test_threads_read_one_scene(model, processor):
    """Eight at a time, half of them asking one by one, get what one alone gets."""
    scene = model.encode_scene(pictures(0), processor)
    expected = scene.ask_all(QUESTIONS, max_new_tokens=8)
    assert len({answer.token_ids for answer in expected}) == len(QUESTIONS)
    got: list = [None] * 8
    together = threading.Barrier(len(got))

    def work(index):
        together.wait()
        if index % 2:
            got[index] = scene.ask_all(QUESTIONS, batch_size=1 + index, max_new_tokens=8)
        else:  # each in an order of its own
            order = [(index + number) % len(QUESTIONS) for number in range(len(QUESTIONS))]
            got[index] = {number: scene.ask(QUESTIONS[number], max_new_tokens=8) for number in order}

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(got))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = dict(enumerate(answer.text for answer in expected))
    assert got == [expected if index % 2 else texts for index in range(len(got))]


def test_what_a_scene_refuses(processor):
    model = tiny_model()
    with pytest.raises(ValueError, match="unknown camera 'CAM_ROOF'"):
        model.encode_scene({"CAM_ROOF": pictures(0)["CAM_FRONT"]}, processor)
    with pytest.raises(ValueError, match="must be a dict"):
        model.encode_scene(list(pictures(0).values()), processor)
    with pytest.raises(ValueError, match="num_queries"):
        model.encode_scene(pictures(0), processor, num_queries=9)
    sizes = tiny_text_config().to_diff_dict() | {"model_type": "mistral", "sliding_window": 8}
    sliding = tiny_model(text_config=MistralConfig(**sizes))
    with pytest.raises(ValueError, match="full attention in every layer"):
        sliding.encode_scene(pictures(0), processor)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="needs attn_implementation 'sdpa'"):
        model.encode_scene(pictures(0), processor)


def test_defaults_are_the_processors(model):
    processor = tiny_processor(tiny_config(num_queries=2))
    scene = model.encode_scene(pictures(0), processor)
    assert scene.num_queries == 2
    assert {camera: tuple(tokens.shape) for camera, tokens in scene.visual_tokens.items()} == {
        camera: (2, LlamaConfig(hidden_size=32).hidden_size) for camera in CAMERAS
    }
