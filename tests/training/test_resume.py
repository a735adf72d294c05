"""Killed with SIGKILL at any moment and started again, a run ends with the weights of one that was left alone."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prepared import write_prepared, write_smoldriver
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]

# One process imports everything once and forks a child per attempt. `moments` says when each attempt dies: after so
# many seconds, or in the middle of the n-th file that is written, or right before or after the n-th rename.
DRIVER = """
import json, os, signal, sys, time
import safetensors.torch, torch
from pathlib import Path
from trl import SFTConfig
from training import finetune

root, output_dir, moments = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
finetune.loss_curve = lambda *_: None

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dying(function, number, file_of):
    calls = []
    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            if file_of is not None:
                function(*args, **kwargs)
                file = Path(file_of(args))
                if file.is_file():
                    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            die()
        return function(*args, **kwargs)
    return wrapped

def attempt(moment):
    kind, number = moment
    if kind == "write":
        torch.save = dying(torch.save, number, lambda args: args[1])
    elif kind == "rename":
        os.replace = dying(os.replace, number, None)
    elif kind == "step":
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == number:
                die()
        finetune.JsonlCallback.on_step_end = on_step_end
    args = finetune.FinetuneArguments(
        checkpoint=str(root / "smoldriver"), data=str(root / "data"), num_queries=[1, 2, 8], tower="lora",
        lora_dropout=0.3,
    )
    config = SFTConfig(
        output_dir=output_dir, use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
        num_train_epochs=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        save_steps=2, save_total_limit=1, logging_steps=1, seed=3,
    )
    finetune.main(args, config)

for moment in moments:
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            attempt(moment)
        except BaseException:
            import traceback; traceback.print_exc(); os._exit(1)
        os._exit(0)
    if moment[0] == "seconds":
        time.sleep(moment[1])
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
    status = os.waitpid(child, 0)[1]
    how = os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
    print("ended", json.dumps([moment, how, time.monotonic() - began]), flush=True)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    write_prepared(root / "data", frames=3, questions=4)  # 12 questions: 3 steps an epoch, 9 in all
    write_smoldriver(root / "smoldriver")
    return root


def drive(root: Path, name: str, moments: list[tuple[str, float]]) -> list[list]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER, str(root), str(root / name), json.dumps(moments)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line.removeprefix("ended ")) for line in done.stdout.splitlines() if line.startswith("ended ")]


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[tuple[int, float]]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return load_file(folder / "final" / "model.safetensors"), [(i["step"], i["loss"]) for i in lines if "loss" in i]


@pytest.fixture(scope="module")
def whole(root):
    """Weights, losses and duration of a run that was left alone."""
    ((_, status, seconds),) = drive(root, "whole", [("never", 0)])
    assert status == 0
    weights, losses = outcome(root / "whole")
    assert [step for step, _ in losses] == list(range(1, 10))
    return weights, losses, seconds


def assert_same(folder: Path, whole) -> None:
    weights, losses = outcome(folder)
    assert weights.keys() == whole[0].keys()
    for name, weight in weights.items():
        assert torch.equal(weight, whole[0][name]), name
    assert losses == whole[1]


@pytest.mark.slow
def test_killed_at_the_worst_moments_it_ends_with_the_same_bits(root, whole):
    moments: list[tuple[str, float]] = [
        ("step", 1),  # before the first checkpoint
        ("write", 1),  # in the middle of the first checkpoint's optimiser
        ("step", 3),
        ("rename", 2),  # with a checkpoint written whole but not named yet
        ("write", 2),  # in the middle of its random states
        ("step", 5),
        ("rename", 3),  # with an old checkpoint about to be deleted
        ("step", 7),
        ("step", 9),  # with everything done but the last save
        ("rename", 3),  # with a final checkpoint that has no name yet
        ("never", 0),
    ]
    ended = drive(root, "worst", moments)
    assert [status for _, status, _ in ended] == [9] * (len(moments) - 1) + [0], ended
    assert_same(root / "worst", whole)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(root, whole):
    chance = random.Random(0)
    moments = [("seconds", whole[2] * chance.uniform(0.2, 0.9)) for _ in range(5)]
    ended = drive(root, "random", [*moments, ("never", 0)])
    assert any(status == 9 for _, status, _ in ended) and ended[-1][1] == 0, ended
    assert_same(root / "random", whole)
