"""The speed benchmark measures what it says: same work for all, honest counts, a run that goes on where it stopped."""

import json

import pytest
import torch

from benchmarks.speed import measures as speed_measures
from benchmarks.speed import parts as speed_parts
from benchmarks.speed import report as speed_report
from benchmarks.speed import run as speed
from smoldriver_hf import CAMERAS


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A quick run of everything that needs no other process, and the folder it wrote to."""
    folder = tmp_path_factory.mktemp("speed")
    threads = torch.get_num_threads()
    arguments = speed.SpeedArguments(output=str(folder / "quick.json"), quick=True)
    arguments.sections = ["flops", "variants", "precision", "growth"]
    speed.main(arguments)
    torch.set_num_threads(threads)
    return json.loads((folder / "quick.json").read_text()), folder


def test_a_quick_run_measures_everything(results):
    measured, _ = results
    ours = {f"SmolDriver {tower} {budget}" for tower in ("dino", "vit") for budget in speed.BUDGETS}
    assert set(measured["variants"]) == {*ours, speed.TILES, speed.NO_TILES} == set(measured["flops"])
    for name, samples in measured["variants"].items():
        assert all(len(values) == 1 and values[0] != 0 for values in samples.values()), name
        assert {"preprocess", "vision", "prefill", "first_token", "answer", "questions_4"} <= set(samples)
    assert set(measured["precision"]) == {"fp32", "bf16", "int8", "bf16, not packed"}
    exact = measured["precision_accuracy"]["random weights"]
    assert exact["fp32"]["mean_kl_nats"] == 0 < exact["int8"]["mean_kl_nats"] < 0.01
    assert set(measured["growth"]) == {"cameras", "questions", "image side in pixels", "tokens per camera"}
    report = speed_report.report(measured)
    assert "nothing about speed" in report and "against itself without reuse" in report
    assert "| tokens per camera | 1…4 |" in report and "Peak MiB" not in report  # which was not measured


def test_a_run_goes_on_where_it_stopped(results, monkeypatch):
    measured, folder = results
    file = folder / "again.json"
    known = {**measured, "growth": {}}
    file.write_text(json.dumps(known))

    def fail(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(speed.Speed, "measure_smolvlm", fail)
    monkeypatch.setattr(speed.Speed, "_smolvlm_flops", fail)
    threads = torch.get_num_threads()
    arguments = speed.SpeedArguments(output=str(file), quick=True, sections=["flops", "growth"])
    again = speed.main(arguments)
    torch.set_num_threads(threads)
    assert set(again["growth"]) == set(measured["growth"]) and again["flops"] == measured["flops"]
    with pytest.raises(ValueError, match="other settings"):
        speed.main(speed.SpeedArguments(output=str(file), rounds=7, sections=[]))
    with pytest.raises(ValueError, match="sections must be among"):
        speed.main(speed.SpeedArguments(output=str(file), quick=True, sections=["gpu"]))


def test_full_scale_is_what_it_names(tmp_path):
    """Parameters and visual tokens of the real models, counted without memory."""
    with torch.device("meta"):
        smolvlm = speed_parts.smolvlm(speed_parts.FULL, torch.bfloat16)
        dino = speed_parts.smoldriver(speed_parts.smoldriver_config(speed_parts.FULL, "dino"), torch.bfloat16)
    head = 576 * 49280  # SmolVLM2-256M has 256,484,928 parameters with a head of its own; here it is tied
    assert sum(weight.numel() for weight in smolvlm.parameters()) + head == 256_484_928
    assert sum(weight.numel() for weight in dino.model.language_model.parameters()) == pytest.approx(134.5e6, rel=0.01)
    assert sum(weight.numel() for weight in dino.model.vision_tower.parameters()) == pytest.approx(22e6, rel=0.02)
    paths = speed_parts.write_images(tmp_path, list(CAMERAS))
    placeholder = speed_parts.SPECIAL_TOKENS.index("<image>")
    for tiles, tokens in ((False, 384), (True, 4992)):
        inputs = speed_parts.smolvlm_inputs(
            speed_parts.smolvlm_processor(speed_parts.FULL, tiles), paths, "Is it safe?"
        )
        assert int((inputs["input_ids"] == placeholder).sum()) == tokens


def test_questions_differ_and_are_as_long_as_drivelms():
    asked = speed_parts.questions(512)
    assert len(set(asked[:91])) > 50 and asked[:91] == speed_parts.questions(91)
    lengths = [len(ids) for ids in speed_parts.tokenizer()(asked[:91])["input_ids"]]
    assert 15 < sum(lengths) / len(lengths) < 40


def test_flops_are_two_per_weight_and_token():
    scale = speed_parts.FULL
    weights = 30 * (2 * 576 * 576 * (1 + 3 / 9) + 3 * 576 * 1536)
    head = 2 * 576 * 49280
    one = speed_measures.text_flops(scale, 1, 100)
    attention = 30 * 2 * 2 * 9 * 64 * 101
    assert one == pytest.approx(2 * weights + head + attention, rel=1e-3)
    assert speed_measures.text_flops(scale, 50, 0) > 49 * 2 * weights
    assert speed_measures.smolvlm_vision_flops(scale, 2) == 2 * speed_measures.smolvlm_vision_flops(scale, 1)
    few, many = (speed_measures.smoldriver_vision_flops(scale, "dino", budget) for budget in (1, 64))
    assert few < many < 1.5 * few


def test_limits_and_ratios():
    """A machine of 1 GFLOP/s and 1 GB/s, and seconds that are twice what it allows."""
    cost = {"vision": 3e9, "prefill": 1e9, "step": 1e9, "weight_bytes": 5e8, "prefix_bytes": 5e8, "row_bytes": 5e8}
    ours = {"vision": [6.0], "prefill": [2.0], "step": [5.0], "batch_step": [8.0 + 2.0], "preprocess": [0.5]}
    ours |= {"first_token": [10.0], "questions_91": [20.0], "no_reuse_91": [160.0]}
    theirs = {"first_token": [100.0], "questions_91": [2000.0], "preprocess": [5.0]}
    names = ("SmolDriver dino 16", "SmolDriver vit 16", "SmolDriver vit 64")
    measured = {
        "rates": {"flops": [1e9, 1e9], "bandwidth": [1e9, 1e9]},
        "settings": {"batch_size": 2, "question_counts": [1, 91]},
        "flops": dict.fromkeys(names, cost),
        "variants": {**dict.fromkeys(names, ours), speed.NO_TILES: theirs},
    }
    fractions = speed_report.limits(measured)["SmolDriver dino 16"]
    assert fractions == pytest.approx({"encode": 2.0, "step": 2.0, "batch_step": 2.5})
    found = speed_report.ratios(measured)
    assert found["first token, against SmolVLM without tiles"] == pytest.approx(10)
    assert found["questions per second, against SmolVLM without tiles"] == pytest.approx(100)
    assert found["questions per second, against itself without reuse"] == pytest.approx(8)
    factors = [value for name, value in found.items() if name.startswith("of that first token")]
    assert torch.tensor(factors).prod().item() == pytest.approx(10)


def test_exponent():
    assert speed_report.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


def test_clocks():
    class Thing:
        def work(self):
            return 7

    thing = Thing()
    with speed_measures.clocked(thing, "work") as seconds:
        assert thing.work() == 7
    assert len(seconds) == 1 and seconds[0] > 0 and thing.__dict__ == {}
    clock = speed_measures.TokenClock()
    for ids in ([1, 2, 3], [4], [5]):
        clock.put(torch.tensor(ids))
    assert len(clock.times) == 2  # the prompt is no token of the answer


@pytest.mark.slow
def test_peak_memory_is_of_the_process():
    held = torch.ones(400 * 2**20, dtype=torch.uint8)
    empty = speed_measures.peak_memory("")
    full = speed_measures.peak_memory(
        "block = bytearray(100 * 2**20)\nfor i in range(0, len(block), 4096): block[i] = 1"
    )
    assert empty < 100 and 90 < full - empty < 120 and held.sum()
    with pytest.raises(RuntimeError, match="no_such_module"):
        speed_measures.peak_memory("import no_such_module")
