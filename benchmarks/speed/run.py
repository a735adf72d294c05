"""How fast is SmolDriver, and how far from what the machine can do?

    python -m benchmarks.speed --output outputs/speed.json            # everything, best on a quiet machine
    python -m benchmarks.speed --quick --output outputs/quick.json    # the same on tiny models, in seconds
    python -m benchmarks.speed --output outputs/speed.json --sections growth
    python -m benchmarks.speed --output outputs/speed.json --checkpoint CHECKPOINT    # presets judged on real weights

SmolVLM2-256M as shipped (tiles), SmolVLM without tiles, and SmolDriver with two towers and four budgets, with random
weights, the same text model, tokenizer, questions, number format and threads, measured in turns in one run on one
machine. Only ratios between lines of one file mean anything.

Every measurement is written to the JSON file as it comes: started again with the same settings, a run goes on where it
stopped. At the end it prints its tables; `benchmarks.tables` puts those of benchmarks/results into the README.
"""

import gc
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from benchmarks.speed import parts
from benchmarks.speed.measures import (
    TokenClock,
    clocked,
    machine_rates,
    peak_memory,
    smoldriver_vision_flops,
    smolvlm_vision_flops,
    text_flops,
)
from benchmarks.speed.report import NO_TILES, TILES, report
from smoldriver_hf import CAMERAS, load
from smoldriver_hf.precision_smoldriver import PRECISIONS, set_precision
from smoldriver_hf.scene_smoldriver import BATCH_SIZE
from training.stages.files import write_json

SECTIONS = ("flops", "variants", "precision", "memory", "growth")
BUDGETS = (1, 4, 16, 64)


@dataclass
class SpeedArguments:
    output: str = field(metadata={"help": "File of the results; it remembers the settings."})
    quick: bool = field(default=False, metadata={"help": "Tiny models, few points: says nothing about speed."})
    sections: list[str] = field(default_factory=lambda: list(SECTIONS), metadata={"help": "Which parts to run."})
    threads: int = field(default=2, metadata={"help": "Of torch."})
    rounds: int = field(default=3, metadata={"help": "How often all is measured, in turns. SmolVLM with tiles: once."})
    new_tokens: int = field(default=16, metadata={"help": "Length of every answer."})
    batch_size: int = field(default=BATCH_SIZE, metadata={"help": "Rows that ask_all decodes side by side."})
    checkpoint: str | None = field(default=None, metadata={"help": "Judge presets on this, not on random weights."})


class Speed:
    """One benchmark run: its settings, its images, and a results file that grows."""

    def __init__(self, args: SpeedArguments, folder: Path):
        unknown = set(args.sections) - set(SECTIONS)
        if unknown:
            raise ValueError(f"sections must be among {SECTIONS}; got {sorted(unknown)}")
        self.args = args
        self.scale = parts.QUICK if args.quick else parts.FULL
        self.dtype = torch.bfloat16
        self.counts = (1, 2, 4) if args.quick else (1, 16, 91)
        self.all_paths = parts.write_images(folder, parts.TWELVE_CAMERAS)
        self.paths = {camera: self.all_paths[camera] for camera in CAMERAS}
        self.questions = parts.questions(512)
        self.file = Path(args.output)
        self.results = self._resume()

    def _resume(self) -> dict[str, Any]:
        settings = {
            **{name: getattr(self.args, name) for name in ("quick", "threads", "rounds", "new_tokens", "batch_size")},
            "dtype": str(self.dtype),
            "question_counts": list(self.counts),
            "scale": asdict(self.scale),
        }
        if self.file.exists():
            results = json.loads(self.file.read_text())
            if results["settings"] != settings:
                raise ValueError(
                    f"{self.file} holds a run with other settings, {results['settings']}; choose another --output"
                )
            return results
        machine = {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "amx": torch.cpu._is_amx_tile_supported(),
        }
        empty: dict[str, Any] = {name: {} for name in ("rates", "flops", "variants", "precision", "memory", "growth")}
        return {"settings": settings, "machine": machine, **empty}

    def save(self) -> None:
        write_json(self.file, self.results, indent=1)

    def once(self, *where: str, measure: Callable[[], Any]) -> Any:
        """`measure()`, kept at this place of the results; what is there already is not measured again."""
        place = self.results
        for name in where[:-1]:
            place = place.setdefault(name, {})
        if where[-1] not in place:
            place[where[-1]] = measure()
            self.save()
        return place[where[-1]]

    def sample(self, *where: str, rounds: int, measure: Callable[[], dict[str, float]]) -> bool:
        """Add one round of `measure()` to the samples at this place, unless it has `rounds` already."""
        place = self.results
        for name in where:
            place = place.setdefault(name, {})
        if place and len(next(iter(place.values()))) >= rounds:
            return False
        for name, value in measure().items():
            place.setdefault(name, []).append(value)
        self.save()
        return True

    # One answer and many, of either system

    def measure_smolvlm(self, model: Any, processor: Any) -> dict[str, float]:
        """One question from six JPEGs to its answer with `generate`."""
        start = time.perf_counter()
        inputs = parts.smolvlm_inputs(processor, self.paths, self.questions[0])
        ready = time.perf_counter()
        clock = TokenClock()
        with clocked(model.model, "get_image_features") as vision:
            model.generate(**inputs, max_new_tokens=self.args.new_tokens, do_sample=False, streamer=clock)
        end = time.perf_counter()
        samples = {
            "preprocess": ready - start,
            "vision": sum(vision),
            "prefill": clock.times[0] - ready - sum(vision),
            "first_token": clock.times[0] - start,
            "answer": end - start,
            "step": (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1),
        }
        # Asked one by one; the images are decoded once, which is more than the shipped code does.
        for count in self.counts:
            samples[f"questions_{count}"] = ready - start + count * (end - ready)
        return samples

    def measure_smoldriver(self, model: Any, processor: Any, num_queries: int) -> dict[str, float]:
        """One scene from six JPEGs: its encoding, one answer, many answers, and many without reuse."""
        new_tokens, batch_size = self.args.new_tokens, self.args.batch_size
        start = time.perf_counter()
        with (
            clocked(processor.image_processor, "preprocess") as preprocess,
            clocked(model.model, "get_image_features") as vision,
        ):
            scene = model.encode_scene(self.paths, processor, num_queries=num_queries)
        encoded = time.perf_counter()
        clock = TokenClock()
        scene.ask(self.questions[0], max_new_tokens=new_tokens, streamer=clock)
        samples = {
            "preprocess": sum(preprocess),
            "vision": sum(vision),
            "prefill": encoded - start - sum(preprocess) - sum(vision),
            "encode": encoded - start,
            "first_token": clock.times[0] - start,
            "answer": clock.times[-1] - start,
            "step": (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1),
        }
        for count in self.counts:
            begin = time.perf_counter()
            scene.ask_all(self.questions[:count], batch_size=batch_size, max_new_tokens=new_tokens)
            samples[f"questions_{count}"] = encoded - start + time.perf_counter() - begin
        full_batch = self.questions[:batch_size]
        times = []
        for length in (1, 1 + new_tokens):
            begin = time.perf_counter()
            scene.ask_all(full_batch, batch_size=batch_size, max_new_tokens=length)
            times.append(time.perf_counter() - begin)
        samples["batch_step"] = (times[1] - times[0]) / new_tokens

        begin = time.perf_counter()
        inputs = processor(images=self.paths, text=self.questions[0], num_queries=num_queries, return_tensors="pt")
        ready = time.perf_counter()
        model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        end = time.perf_counter()
        for count in self.counts:
            samples[f"no_reuse_{count}"] = ready - begin + count * (end - ready)
        return samples

    def variants(self) -> None:
        smolvlm = parts.smolvlm(self.scale, self.dtype)
        measures: dict[str, Callable[[], dict[str, float]]] = {}
        for name, tiles in ((NO_TILES, False), (TILES, True)):
            processor = parts.smolvlm_processor(self.scale, tiles)
            measures[name] = partial(self.measure_smolvlm, smolvlm, processor)
        for tower in ("dino", "vit"):
            config = parts.smoldriver_config(self.scale, tower)
            model, ours = parts.smoldriver(config, self.dtype), parts.smoldriver_processor(config)
            for budget in BUDGETS:
                measures[f"SmolDriver {tower} {budget}"] = partial(self.measure_smoldriver, model, ours, budget)
            self.measure_smoldriver(model, ours, 1)  # warm-up: first calls build kernels
        progress = tqdm(total=self.args.rounds * len(measures), desc="variants")
        for done in range(1, self.args.rounds + 1):
            side = 256 if self.args.quick else 2048
            self.sample("rates", rounds=done, measure=partial(machine_rates, self.dtype, side))
            for name, measure in measures.items():
                self.sample("variants", name, rounds=1 if name == TILES else done, measure=measure)
                progress.update()
        progress.close()

    # What does not depend on the machine's mood

    def flops(self) -> None:
        """Operations per scene and per question, of this scale and of SmolVLM2-2.2B's dimensions."""
        for scale_name, scale in (("", self.scale), ("2.2B: ", parts.LARGE)):
            if self.args.quick and scale is parts.LARGE:
                continue
            for name, tiles in ((NO_TILES, False), (TILES, True)):
                self.once("flops", scale_name + name, measure=partial(self._smolvlm_flops, scale, tiles))
            for tower in ("dino", "vit"):
                for budget in BUDGETS:
                    name = f"{scale_name}SmolDriver {tower} {budget}"
                    self.once("flops", name, measure=partial(self._smoldriver_flops, scale, tower, budget))

    def _smolvlm_flops(self, scale: parts.Scale, tiles: bool) -> dict[str, float]:
        inputs = parts.smolvlm_inputs(parts.smolvlm_processor(scale, tiles), self.paths, self.questions[0])
        ids = inputs["input_ids"][0]
        vision = smolvlm_vision_flops(scale, inputs["pixel_values"].shape[1])
        prefill = text_flops(scale, len(ids), 0)
        decode = (self.args.new_tokens - 1) * text_flops(scale, 1, len(ids))
        return {
            "visual_tokens": int((ids == parts.SPECIAL_TOKENS.index("<image>")).sum()),
            "vision": vision,
            "prefill": prefill,
            "per_question": vision + prefill + decode,  # nothing is shared between questions
        }

    def _smoldriver_flops(self, scale: parts.Scale, tower: str, budget: int) -> dict[str, float]:
        processor = parts.smoldriver_processor(parts.smoldriver_config(scale, tower))
        ids = processor.prompt_ids("", CAMERAS, budget)
        count = len(ids) - ids[::-1].index(processor.image_token_id)
        lengths = [len(processor.prompt_ids(question, CAMERAS, budget)) - count for question in self.questions[:91]]
        length = round(sum(lengths) / len(lengths))
        vision = smoldriver_vision_flops(scale, tower, budget)
        prefill = text_flops(scale, count, 0, with_head=0)
        own = text_flops(scale, length, count)
        own += (self.args.new_tokens - 1) * text_flops(scale, 1, count + length)
        config = parts.text_config(scale)
        heads = config.num_key_value_heads / config.num_attention_heads
        state = int(2 * config.num_hidden_layers * heads * config.hidden_size) * self.dtype.itemsize  # of one token
        return {
            "visual_tokens": 6 * budget,
            "vision": vision,
            "prefill": prefill,
            "question": own,
            "per_question": (vision + prefill) / 91 + own,  # at 91 questions a scene
            "step": text_flops(scale, 1, count + length),
            "weight_bytes": self._text_bytes(scale),
            "prefix_bytes": count * state,  # read once for all rows
            "row_bytes": length * state,
        }

    def _text_bytes(self, scale: parts.Scale) -> int:
        """Bytes of weights that one decoding step reads; the tied head is the embedding table."""
        config = parts.text_config(scale)
        hidden, heads = config.hidden_size, config.num_attention_heads
        attention = 2 * hidden * hidden * (1 + config.num_key_value_heads / heads)
        layer = attention + 3 * hidden * config.intermediate_size
        return int(config.num_hidden_layers * layer + config.vocab_size * hidden) * self.dtype.itemsize

    def memory(self) -> None:
        """Peak resident memory of a fresh process per system and number of questions, imports included."""
        setting = (
            "import torch; from pathlib import Path; from benchmarks.speed import parts as p\n"
            f"torch.set_num_threads({self.args.threads}); scale = p.{'QUICK' if self.args.quick else 'FULL'}\n"
            f"paths = {self.paths!r}; asked = p.questions(512)\n"
        )
        ours = (
            "config = p.smoldriver_config(scale, '{tower}'); model = p.smoldriver(config, torch.bfloat16)\n"
            "scene = model.encode_scene(paths, p.smoldriver_processor(config), num_queries={budget})\n"
            f"scene.ask_all(asked[:{{count}}], {self.args.batch_size}, {self.args.new_tokens})"
        )
        theirs = (
            "model = p.smolvlm(scale, torch.bfloat16)\n"
            "inputs = p.smolvlm_inputs(p.smolvlm_processor(scale, {tiles}), paths, asked[0])\n"
            f"model.generate(**inputs, max_new_tokens={self.args.new_tokens}, do_sample=False)"
        )
        runs = {"imports alone": {1: ""}, NO_TILES: {1: theirs.format(tiles=False)}}
        if not self.args.quick:
            runs[TILES] = {1: theirs.format(tiles=True)}
        for tower, budget in (("dino", 16),) if self.args.quick else (("dino", 16), ("vit", 64)):
            counts = self.counts[:1] if self.args.quick else (*self.counts, 512)
            runs[f"SmolDriver {tower} {budget}"] = {
                count: ours.format(tower=tower, budget=budget, count=count) for count in counts
            }
        for name, codes in tqdm(runs.items(), desc="memory"):
            for count, code in codes.items():
                self.once("memory", name, str(count), measure=partial(peak_memory, setting + code))

    def precision(self) -> None:
        """The presets: speed of one answer and of a batch, and distance of their predictions from fp32's."""
        config = parts.smoldriver_config(self.scale, "dino")
        models: dict[str, Any] = {}
        for precision in PRECISIONS:
            models[precision] = set_precision(parts.smoldriver(config, torch.float32), precision)
        models["bf16, not packed"] = parts.smoldriver(config, torch.bfloat16)
        processor = parts.smoldriver_processor(config)
        for done in range(1, self.args.rounds + 1):
            for name, model in models.items():
                self.sample("precision", name, rounds=done, measure=partial(self._preset_speed, model, processor))
        del models, model
        gc.collect()
        judged = "random weights" if self.args.checkpoint is None else self.args.checkpoint
        reference: torch.Tensor | None = None
        for precision in PRECISIONS:
            if self.args.checkpoint is None:
                model = set_precision(parts.smoldriver(config, torch.float32), precision)
            else:
                model, processor = load(self.args.checkpoint, precision=precision)
            logs = self._predictions(model, processor)
            if reference is None:
                reference = logs
            self.once("precision_accuracy", judged, precision, measure=partial(self._distance, reference, logs))

    def _distance(self, reference: torch.Tensor, logs: torch.Tensor) -> dict[str, float]:
        """How far log-probabilities (questions, vocab) are from the reference."""
        return {
            "mean_kl_nats": float((reference.exp() * (reference - logs)).sum(-1).mean()),
            "same_first_token": float((reference.argmax(-1) == logs.argmax(-1)).float().mean()),
        }

    def _preset_speed(self, model: Any, processor: Any) -> dict[str, float]:
        samples = self.measure_smoldriver(model, processor, 16)
        return {name: samples[name] for name in ("encode", "step", "batch_step", f"questions_{self.counts[-1]}")}

    def _predictions(self, model: Any, processor: Any) -> torch.Tensor:
        """(questions, vocab) log-probabilities of the first token of some answers."""
        rows = []
        for question in self.questions[: 2 if self.args.quick else 16]:
            inputs = processor(images=self.paths, text=question, num_queries=16, return_tensors="pt")
            with torch.inference_mode():
                rows.append(model(**inputs, logits_to_keep=1).logits[0, -1].float().log_softmax(-1))
        return torch.stack(rows)

    # How cost grows

    def growth(self) -> None:
        """Seconds against cameras, questions, image side and tokens, with DINOv2-S, in turns as everything else."""
        # One model with all cameras and queries: a subset of either is an ordinary input.
        config = parts.smoldriver_config(self.scale, "dino", parts.TWELVE_CAMERAS, max_queries=256)
        model, processor = parts.smoldriver(config, self.dtype), parts.smoldriver_processor(config)

        def encode(cameras: int = 6, budget: int = 16, side: int | None = None) -> float:
            """From JPEGs to a scene that is ready for questions."""
            size = side or config.image_size
            processor.image_processor.size = {"height": size, "width": size}
            paths = {camera: self.all_paths[camera] for camera in config.cameras[:cameras]}
            start = time.perf_counter()
            model.encode_scene(paths, processor, num_queries=budget)
            return time.perf_counter() - start

        def ask(count: int) -> float:
            start = time.perf_counter()
            scene.ask_all(self.questions[:count], self.args.batch_size, self.args.new_tokens)
            return time.perf_counter() - start

        def seconds(measure: Callable[[int], float], point: int) -> dict[str, float]:
            return {"seconds": measure(point)}

        scene = model.encode_scene(self.paths, processor, num_queries=16)
        quick = self.args.quick
        axes: dict[str, tuple[list[int], Callable[[int], float]]] = {
            "cameras": ([1, 2, 3] if quick else [1, 2, 3, 4, 6, 8, 10, 12], lambda x: encode(cameras=x)),
            "questions": ([1, 2, 4] if quick else [2**power for power in range(10)], ask),
            "image side in pixels": ([28, 42] if quick else [112, 168, 224, 280, 336, 448], lambda x: encode(side=x)),
            "tokens per camera": ([1, 4] if quick else [1, 4, 16, 64, 256], lambda x: encode(budget=x)),
        }
        encode()  # warm-up
        for done in range(1, self.args.rounds + 1):
            for axis, (points, measure) in axes.items():
                for point in tqdm(points, desc=f"growth: {axis}, round {done}"):
                    self.sample("growth", axis, str(point), rounds=done, measure=partial(seconds, measure, point))


def main(args: SpeedArguments) -> dict[str, Any]:
    """Run the sections, write the results, print their tables and return the results."""
    if args.quick:
        args.threads, args.rounds, args.new_tokens, args.batch_size = 1, 1, 2, 2
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        speed = Speed(args, Path(folder))
        for section in SECTIONS:
            if section in args.sections:
                getattr(speed, section)()
                gc.collect()
    print(report(speed.results))
    return speed.results
