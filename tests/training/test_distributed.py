"""More than one process: the same batches give the same loss curve, and sharded configurations are what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from prepared import write_prepared, write_smoldriver, write_smolvlm
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
RENDEZVOUS = ("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0")  # a free port
CONFIGS = ROOT / "training" / "recipes" / "accelerate"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("distributed")
    write_prepared(root / "data", frames=4, questions=4)
    write_prepared(root / "front", frames=2, questions=4, cameras=["CAM_FRONT"])
    write_smoldriver(root / "smoldriver")
    write_smolvlm(root / "smolvlm")
    return root


def finetune(root: Path, name: str, processes: int, *extra: str, start=None, env=None, module="finetune", **changes):
    """Run the command in so many processes at the same global batch; returns its loss curve and final weights."""
    if start is None:
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), *RENDEZVOUS]
        start = torchrun if processes > 1 else []
    flags = {
        "checkpoint": root / "smoldriver",
        **({"data": root / "data"} if module == "finetune" else {}),
        "output_dir": root / name,
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
        "gradient_checkpointing": "false",
        "max_steps": 5,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lora_dropout": 0.0,
        "per_device_train_batch_size": 4 // processes,
        **changes,
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **(env or {})}
    command = [sys.executable, "-W", "ignore", *start, "-m", f"training.{module}", *words, *extra]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    if done.returncode:
        raise RuntimeError(done.stderr[-6000:])
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    curve = [(line["step"], line["loss"], line["mean_token_accuracy"]) for line in lines if "loss" in line]
    return curve, load_file(root / name / "final" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "data, checkpoint, extra",
    [
        ("data", "smoldriver", ["--tower", "full"]),
        ("data", "smoldriver", ["--language_model", "frozen", "--tower", "full"]),
        ("front", "smoldriver", []),  # five of six Q-Formers get no gradient
        ("data", "smolvlm", []),
    ],
    ids=["qlora", "healing", "one camera", "baseline"],
)
def test_two_processes_train_like_one(root, data, checkpoint, extra):
    name = f"{data}-{checkpoint}-{len(extra)}"
    changes = {"data": root / data, "checkpoint": root / checkpoint}
    one, weights = finetune(root, name + "-one", 1, *extra, **changes)
    two, others = finetune(root, name + "-two", 2, *extra, **changes)
    assert [step for step, *_ in one] == [step for step, *_ in two] == [1, 2, 3, 4, 5]
    for (_, loss, accuracy), (_, other, other_accuracy) in zip(one, two, strict=True):
        assert loss == pytest.approx(other, abs=1e-4) and accuracy == pytest.approx(other_accuracy, abs=1e-6)
    assert one[0][1] - one[-1][1] > 0.02  # a curve, not a line
    for key, weight in weights.items():
        torch.testing.assert_close(weight, others[key], atol=2e-3, rtol=0, msg=key)
    checkpoint_files = {path.name for path in (root / f"{name}-two" / "checkpoint-4").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json", "optimizer.pt"} <= checkpoint_files
    assert not (root / f"{name}-two" / "checkpoint.unfinished").exists()


@pytest.mark.slow
def test_two_processes_read_like_one(root):
    """Without noise, which each process draws for its own rows, and without the attention's loss, a mean of each's."""
    changes = {"module": "read", "noise": 0.0, "camera_attention_loss": 0.0, "held_out": 1, "max_steps": 3}
    one, _ = finetune(root, "read-one", 1, "--budgets", "1", "2", **changes)
    two, _ = finetune(root, "read-two", 2, "--budgets", "1", "2", **changes)
    assert one[0][1] - one[-1][1] > 0.02
    for (_, loss, accuracy), (_, other, other_accuracy) in zip(one, two, strict=True):  # embeddings' gradients count
        assert loss == pytest.approx(other, abs=1e-3) and accuracy == pytest.approx(other_accuracy, abs=1e-3)


@pytest.mark.slow
def test_sharding_on_a_cpu_is_refused_in_words(root):
    with pytest.raises(RuntimeError, match="the launcher asks for FSDP or DeepSpeed, but the run is"):
        finetune(root, "sharded", 1, env={"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})


def launch_environment(config: Path) -> dict[str, str]:
    """What `accelerate launch` tells the processes it starts, for a configuration file."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    assert load_config_from_file(str(config)).num_processes == 8
    args = launch_command_parser().parse_args(["--config_file", str(config), "script.py"])
    args, *_ = _validate_launch_command(args)
    return prepare_multi_gpu_env(args)


def test_the_fsdp_configuration_is_read_as_fsdp2(monkeypatch):
    from accelerate.utils import FullyShardedDataParallelPlugin

    environment = launch_environment(CONFIGS / "fsdp2.yaml")
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    for key, value in environment.items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"


@pytest.mark.parametrize("stage", [2, 3])
def test_the_deepspeed_configurations_are_what_their_names_say(stage):
    config = yaml.safe_load((CONFIGS / f"zero{stage}.yaml").read_text())
    assert config["distributed_type"] == "DEEPSPEED" and config["mixed_precision"] == "bf16"
    assert config["deepspeed_config"]["zero_stage"] == stage
    assert config["deepspeed_config"].get("zero3_save_16bit_model", False) == (stage == 3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_and_saves_what_one_process_does(root, stage):
    """One process: accelerate starts no gloo group for DeepSpeed on a CPU. Engine, gathering and saving are real."""
    pytest.importorskip("deepspeed")
    start = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"zero{stage}.yaml")]
    start += ["--num_processes", "1", "--mixed_precision", "no"]
    one, weights = finetune(root, f"plain{stage}", 1)
    two, others = finetune(root, f"zero{stage}", 1, start=start, env={"DS_ACCELERATOR": "cpu"}, use_cpu="false")
    assert [loss for _, loss, _ in one] == pytest.approx([loss for _, loss, _ in two], abs=1e-4)
    for key, weight in weights.items():
        torch.testing.assert_close(weight, others[key], atol=2e-3, rtol=0, msg=key)


SHARDED = """
import os, sys
import torch, torch.distributed as dist
sys.path[:0] = sys.argv[1:3]
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from tiny import tiny_inputs, tiny_model

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
model = tiny_model().train()
for layer in model.model.language_model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model.model.multi_modal_projector, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
batch = tiny_inputs(model, batch=2)
batch["labels"] = batch["input_ids"]
rows = slice(dist.get_rank(), None, dist.get_world_size())
own = {k: v[rows] for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")}
images = torch.arange(12).view(2, 6)[rows].flatten()
own |= {k: batch[k][images] for k in ("pixel_values", "camera_ids")}
for _ in range(3):
    loss = model(**own).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    if dist.get_rank() == 0:
        print("loss", mean.item() / dist.get_world_size())
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_fsdp2_shards_the_model_and_trains_it_the_same(tmp_path):
    """Raw FSDP2 on a CPU mesh: what accelerate would call, which it leaves out on a CPU."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    curves = []
    for processes in (1, 2):
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        done = subprocess.run(
            [*command, *RENDEZVOUS, str(script), str(ROOT), str(ROOT / "tests")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        curves.append([float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("loss")])
    assert len(curves[0]) == 3 and curves[0][-1] < curves[0][0]
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
