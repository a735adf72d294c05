import json
import math
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    DebertaV2Config,
    DebertaV2Model,
    RobertaConfig,
    RobertaModel,
)

from training.metrics.language import (
    available_tokenizer,
    bert_scores,
    coco_scores,
    load_bert_scorer,
    sacrebleu_score,
    seed_bleu,
)

COCO = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")
ANSWERS = [
    "There are many cars to the front of the ego car.",
    "One truck is moving, and two are parked.",
    "The ego vehicle is going straight.",
    "Keep going at the same speed.",
]
answer = st.sampled_from([*ANSWERS, "", "Yes.", "No.", "a car", "...", "<c1,CAM_BACK,1088.3,497.5>"])
pairs = st.lists(st.tuples(answer, st.sampled_from(ANSWERS)), min_size=1, max_size=6)


def test_perfect_answers_score_the_maximum() -> None:
    scores = coco_scores(ANSWERS, ANSWERS, "python")
    assert [scores[name] for name in COCO] == pytest.approx([1, 1, 1, 1, 1, 10])
    assert scores["tokenizer"] == "python"
    assert sacrebleu_score(ANSWERS, ANSWERS)["score"] == pytest.approx(100)
    assert seed_bleu(ANSWERS, ANSWERS)["bleu"] == pytest.approx(1)


@given(pairs, st.randoms(use_true_random=False))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_bounds_and_order(rows: list[tuple[str, str]], rng) -> None:
    shuffled = rows[:]
    rng.shuffle(shuffled)
    for score in (coco_scores, sacrebleu_score, seed_bleu):
        arguments = ("python",) if score is coco_scores else ()
        first = score([a for a, _ in rows], [r for _, r in rows], *arguments)
        second = score([a for a, _ in shuffled], [r for _, r in shuffled], *arguments)
        for name, value in first.items():
            if isinstance(value, float):
                assert 0 <= value <= {"cider": 10, "score": 100}.get(name, 1) + 1e-6
                assert second[name] == pytest.approx(value, abs=1e-9)


def test_coco_bleu_by_hand() -> None:
    # 4 of 5 words occur, 2 of 4 pairs; reference as long as the answer
    scores = coco_scores(["one red car is moving", "yes"], ["one blue car is moving", "yes"], "python")
    assert scores["bleu_1"] == pytest.approx(5 / 6)
    assert scores["bleu_2"] == pytest.approx(math.sqrt(5 / 6 * 2 / 4))
    # ROUGE-L: the longest common subsequence has 4 of 5 words, precision = recall
    assert scores["rouge_l"] == pytest.approx((0.8 + 1) / 2)


def test_empty_answers_and_empty_references() -> None:
    scores = coco_scores(["", "..."], ["a car", "a bus"], "python")
    assert [scores[name] for name in COCO] == pytest.approx([0] * 6, abs=1e-6)
    assert coco_scores(["a"], ["..."], "python")["cider"] == 0
    assert seed_bleu([""], ["a car"])["bleu"] == 0
    assert sacrebleu_score([""], ["a car"])["score"] == 0


def test_seed_bleu_by_hand() -> None:
    # the example of Google NMT's compute_bleu in `evaluate`: precisions 1, brevity penalty exp(1 - 7/6)
    result = seed_bleu(["the cat sat on the mat"], ["the cat sat on the mat ."])
    assert result["precisions"] == [1, 1, 1, 1]
    assert result["bleu"] == pytest.approx(math.exp(1 - 7 / 6))
    # without smoothing one order without a match makes the score 0 (sacrebleu's default smooths)
    assert seed_bleu(["a b c x"], ["a b c d"])["bleu"] == 0
    assert sacrebleu_score(["a b c x"], ["a b c d"])["score"] > 0
    # 13a splits punctuation: 8 of 9 tokens are found, 6 of 8 pairs, 4 of 7 triples, 2 of 6 quadruples
    result = seed_bleu(["a b c d e x, f."], ["a b c d e y, f."])
    assert result["precisions"] == pytest.approx([8 / 9, 6 / 8, 4 / 7, 2 / 6])
    assert result["bleu"] == pytest.approx((8 / 9 * 6 / 8 * 4 / 7 * 2 / 6) ** 0.25)


def test_signature_names_the_tokenizer() -> None:
    assert "tok:13a" in sacrebleu_score(["a"], ["a"])["signature"]


@pytest.mark.parametrize("score", [coco_scores, sacrebleu_score, seed_bleu])
@pytest.mark.parametrize("lists", [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_unequal_or_empty_lists_are_errors(score, lists) -> None:
    with pytest.raises(ValueError, match="as many predictions as references"):
        score(*lists)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "car", "bus", "is", "red", "."]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).eval().save_pretrained(folder)
    return folder


def test_bert_score_of_a_local_folder(bert_folder: Path) -> None:
    scorer = load_bert_scorer(str(bert_folder), device="cpu")
    same = bert_scores(["a car .", "a red bus"], ["a car .", "a red bus"], scorer)
    assert (same["precision"], same["recall"], same["f1"]) == pytest.approx((1, 1, 1), abs=1e-5)
    assert (same["model"], same["num_layers"]) == (str(bert_folder), 2)
    # an empty answer counts 0 and does not crash, and does not disturb its neighbour
    half = bert_scores(["", "a red bus"], ["a car .", "a red bus"], scorer)
    assert half["f1"] == pytest.approx(0.5, abs=1e-5)
    assert bert_scores([" "], ["a car"], scorer)["f1"] == 0
    with pytest.raises(ValueError, match="as many predictions"):
        bert_scores([], [], scorer)


def encoder(folder: Path, bert_folder: Path, kind: str) -> str:
    """Encoders whose tokenizer and weights do not agree about how long a text may be."""
    shutil.copytree(bert_folder, folder)
    words = len((bert_folder / "vocab.txt").read_text().split())
    small = {"vocab_size": words, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "no limit said":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.model_max_length = int(1e30)
        tokenizer.save_pretrained(folder)
    elif kind == "too long a limit":
        BertModel(BertConfig(hidden_size=16, max_position_embeddings=20, **small)).save_pretrained(folder)
    elif kind == "positions after the pad token":
        config = RobertaConfig(hidden_size=16, max_position_embeddings=20, pad_token_id=1, **small)
        RobertaModel(config).save_pretrained(folder)
    elif kind == "no table of positions":
        config = DebertaV2Config(hidden_size=16, relative_attention=True, position_biased_input=False, **small)
        DebertaV2Model(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "kind", ["no limit said", "too long a limit", "positions after the pad token", "no table of positions"]
)
def test_bert_score_cuts_texts_to_what_the_encoder_reads(bert_folder: Path, tmp_path: Path, kind: str) -> None:
    scorer = load_bert_scorer(encoder(tmp_path / "encoder", bert_folder, kind), device="cpu")
    long = "a red car . " * 1000
    assert bert_scores([long, "a car"], [long, "a car"], scorer)["f1"] == pytest.approx(1, abs=1e-4)


def test_what_is_no_encoder_is_refused_when_it_is_loaded(bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gone is no encoder for BERTScore"):
        load_bert_scorer(str(tmp_path / "gone"), device="cpu")
    folder = Path(encoder(tmp_path / "no pad", bert_folder, "no limit said"))
    for name in ("tokenizer_config.json", "tokenizer.json"):
        file = folder / name
        file.write_text(file.read_text().replace("[PAD]", "[GONE]"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["pad_token"] = None
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="no pad is no encoder for BERTScore"):
        load_bert_scorer(str(folder), device="cpu")


@pytest.mark.parametrize("java", [None, "exit 1", "echo", "exec sleep 0"])
def test_java_that_does_not_run_is_no_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, java: str | None) -> None:
    """None, one that is only a stub (as on a Mac), one that says nothing."""
    if java is not None:
        (tmp_path / "java").write_text(f"#!/bin/sh\n{java}\n")
        (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if java else str(tmp_path))
    available_tokenizer.cache_clear()
    try:
        assert available_tokenizer() == "python"
        assert coco_scores(["a car"], ["a car"])["tokenizer"] == "python"
    finally:
        available_tokenizer.cache_clear()
    if java is None:
        with pytest.raises(ValueError, match="tokenizer java needs Java"):
            coco_scores(["a car"], ["a car"], "java")
