"""Clocks, the machine's own limits, operation counts and peak memory, for `benchmarks.speed`."""

import contextlib
import functools
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, DynamicCache, SiglipVisionConfig, SiglipVisionModel

from benchmarks.speed.parts import Scale, smoldriver_config, smolvlm_config, text_config
from smoldriver_hf import SmolDriverForConditionalGeneration


class TokenClock:
    """A streamer that notes when each token came: one run gives time to first token and time per token."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.prompt = True

    def put(self, ids: torch.Tensor) -> None:
        if not self.prompt:
            self.times.append(time.perf_counter())
        self.prompt = False

    def end(self) -> None:
        pass


@contextlib.contextmanager
def clocked(owner: Any, name: str) -> Iterator[list[float]]:
    """Time every call of `owner.name` within the block; yields the list of seconds."""
    seconds: list[float] = []
    method = getattr(owner, name)

    @functools.wraps(method)  # generate() asks for its signature
    def timed(*args, **kwargs):
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, name, timed)
    try:
        yield seconds
    finally:
        delattr(owner, name)


def machine_rates(dtype: torch.dtype, side: int = 2048, megabytes: int = 256) -> dict[str, float]:
    """What this machine reaches now: {"flops": matrix products per second × 2, "bandwidth": bytes read per second}.

    Best of five each: a limit is what is possible, not what is usual.
    """
    left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
    block = torch.ones(megabytes * 2**20 // 8, dtype=torch.int64)

    def best(work) -> float:
        return min(timeit.repeat(work, number=1, repeat=5))

    return {"flops": 2 * side**3 / best(lambda: left @ right), "bandwidth": block.nbytes / best(block.sum)}


def count_flops(model: torch.nn.Module, work: Callable[[], Any]) -> int:
    """Operations (two per multiply and add) of `work` with `model`, which may lie on the meta device."""
    model.requires_grad_(False)  # the counter's hooks want gradients of whatever requires them
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def text_flops(scale: Scale, new: int, past: int, with_head: int = 1) -> int:
    """Operations of the text model for `new` tokens behind `past` ones, and of the head for `with_head` of them."""
    config = text_config(scale)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
        states = torch.empty(1, config.num_key_value_heads, past, config.hidden_size // config.num_attention_heads)
        cache = DynamicCache([(states, states)] * config.num_hidden_layers) if past else DynamicCache(config=config)
        embeds = torch.empty(1, new, config.hidden_size)
        positions = torch.arange(past, past + new)[None]
    body = count_flops(model, lambda: model(inputs_embeds=embeds, position_ids=positions, past_key_values=cache))
    return body + with_head * 2 * config.hidden_size * config.vocab_size


def smolvlm_vision_flops(scale: Scale, tiles: int) -> int:
    """Operations of SmolVLM's tower (a SigLIP) and connector for `tiles` images."""
    config = smolvlm_config(scale)
    vision = config.vision_config
    sizes = {**scale.smolvlm_vision, "image_size": vision.image_size, "patch_size": vision.patch_size}
    with torch.device("meta"):
        tower = SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False))
        pixels = torch.empty(1, 3, vision.image_size, vision.image_size)
    patches = (vision.image_size // vision.patch_size) ** 2
    connector = 2 * patches * vision.hidden_size * config.text_config.hidden_size
    return tiles * (count_flops(tower, lambda: tower(pixels)) + connector)


def smoldriver_vision_flops(scale: Scale, tower: str, num_queries: int) -> int:
    """Operations of tower, Q-Formers and connector for one scene of six cameras."""
    config = smoldriver_config(scale, tower)
    with torch.device("meta"):
        model = SmolDriverForConditionalGeneration(config)
        pixels = torch.empty(len(config.cameras), 3, config.image_size, config.image_size)
    return count_flops(model, lambda: model.get_image_features(pixels, num_queries=num_queries))


def peak_memory(code: str) -> float:
    """Peak resident memory, in MiB, of a fresh interpreter that runs `code` (Linux).

    Not getrusage's figure: that one includes what the parent process held.
    """
    report = "\nprint(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code + report], capture_output=True, text=True)
    peak = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("VmHWM")]
    if done.returncode or not peak:
        raise RuntimeError(f"the process that measures memory failed:\n{done.stderr[-2000:]}")
    return int(peak[0]) / 1024
