"""The embedded benchmark: SmolVLM, SmolVLM fine-tuned and SmolDriver on the toy world, each beside its blind version.

    python -m benchmarks.toyworld                   # everything: three hours on two cores
    python -m benchmarks.toyworld --quick           # one seed, no ablations

One small SmolVLM is pre-trained on questions about single pictures of another world, once; all models start from it.
Then, with the numbers of training/recipes/toyworld.yaml (equal rows, steps and adapter size), the models for every
seed and the ablations for the first ones:

    smoldriver         transfer, healing, QLoRA on driving questions
    smolvlm-ft         the baseline: the pre-trained SmolVLM, with the rows, steps and adapter of the QLoRA stage
    blind              the same language model without images, with the rows, steps and adapter of the QLoRA stage
    position-keys      ablation: attention keys made of positions only
    shared-qformer     ablation: one Q-Former for all cameras
    untrained-queries  ablation: queries stay as they were drawn
    no-transfer        ablation: no knowledge transfer

Each is evaluated on unseen scenes, and on a weather that no training scene has. A run is a folder of `--output_dir`
with its recipe, `run.json` and evaluations; finished ones are not run again, a killed one goes on. Two runs go on side
by side, each on one thread. `--output` is written anew after every run.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from benchmarks.toyworld.results import collect
from training.checkpoints.offline_parts import fetch_dinov2_small, fetch_minilm
from training.run import ROOT
from training.stages.files import command_of, write_json
from training.stages.recipes import PlannedStage, Recipe, kinds_of, module_of, needed, plan, read_recipe

Changes = Mapping[str, Mapping[str, Any]]
"""Section of the recipe → arguments that a variant has in place of the recipe's"""

UNSEEN = {"weathers": ["fog"], "scenes": 60, "seed": 2}  # the recipe's worlds have no fog
QUICK: dict[str, tuple[str, Changes]] = {
    "smoldriver": ("merge", {}),
    "smolvlm-ft": ("baseline", {}),
    "blind": ("blind", {}),
}
ABLATIONS: dict[str, tuple[str, Changes]] = {  # `adapt` leaves the projector as `transfer` and `heal` made it
    "position-keys": ("merge", {"assemble": {"key_source": "position"}}),
    "shared-qformer": ("merge", dict.fromkeys(("transfer", "heal"), {"shared_qformer": True})),
    "untrained-queries": ("merge", dict.fromkeys(("transfer", "heal"), {"keep_frozen": r".*\.queries"})),
    "no-transfer": ("merge", {"heal": {"from": "assemble"}}),
}
VARIANTS = QUICK | ABLATIONS
"""Name → the section whose result is asked, and what is changed on the way there."""
ONE_THREAD = {  # as runs go on side by side; the rest keeps what was once allocated, as in the recipes
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
MODELS = ("smolvlm", *QUICK)
BUDGETS = (1, 2, 4, 8, 16)
TEST_FRAMES = 50  # of the test split, chosen by hash
QUICK_FRAMES = 30
BRIEF_FRAMES = 20
CORRUPTION_FRAMES = 15


@dataclass
class ToyworldArguments:
    output_dir: str = field(default="outputs/benchmark", metadata={"help": "Folder of all runs."})
    output: str = field(default="benchmarks/results/toyworld.json", metadata={"help": "File of the results."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of training."})
    ablation_seeds: int = field(default=1, metadata={"help": "For how many of the seeds ablations are trained too."})
    recipe: str = field(default="toyworld", metadata={"help": "Recipe whose numbers all runs have: name or file."})
    quick: bool = field(default=False, metadata={"help": "One seed, fewer test frames, ablations only if named."})
    brief: bool = field(default=False, metadata={"help": "Quick, with still fewer frames and no unseen weather."})
    only: list[str] | None = field(default=None, metadata={"help": "Models and ablations to run; default: all."})
    workers: int = field(default=2, metadata={"help": "Runs side by side, one thread each."})


def run_name(variant: str, seed: int) -> str:
    return f"seed{seed}/{variant}"


def common_stages(root: Path, whole: Recipe) -> dict[str, PlannedStage]:
    """What all models share: the worlds and the SmolVLM that is pre-trained on them."""
    stages = plan(whole.sections, root, whole.data)
    of_each = [needed(stages, result) for result, _ in QUICK.values()]
    shared = [name for name in whole.sections if all(name in names for names in of_each)]
    return planned({name: whole.sections[name] for name in shared}, root / "common", root, whole)


def pretrained_smolvlm(root: Path, whole: Recipe) -> Path:
    """What the baseline is fine-tuned from."""
    baseline = plan(whole.sections, root, whole.data)[QUICK["smolvlm-ft"][0]]
    if baseline.source is None:
        raise ValueError(f"{whole.file}: section {QUICK['smolvlm-ft'][0]} must start from a SmolVLM of the recipe")
    return common_stages(root, whole)[baseline.source].result


def planned(
    sections: dict[str, dict[str, Any]],
    folder: Path,
    root: Path,
    whole: Recipe,
    made: Mapping[str, PlannedStage] = MappingProxyType({}),
) -> dict[str, PlannedStage]:
    """Stages in a run's folder; their caches have the place of the recipe, but shared by all runs."""
    placed = {}
    for name, section in sections.items():
        caches = [key for key in module_of(section["module"]).STAGE.caches if key in section]
        placed[name] = section | {key: str(root / section[key]) for key in caches}
    return plan(placed, folder, whole.data, made)


def variant_stages(variant: str, seed: int, root: Path, whole: Recipe) -> dict[str, PlannedStage]:
    """The stages of a variant that are not shared, with this run's folders, seed and changes."""
    result, changes = VARIANTS[variant]
    changed = {name: section | dict(changes.get(name, {})) for name, section in whole.sections.items()}
    common = common_stages(root, whole)
    names = [name for name in needed(plan(changed, root, whole.data), result) if name not in common]
    sections = {name: changed[name] for name in names}
    for section in sections.values():
        if any(one.name == "seed" for kind in kinds_of(module_of(section["module"])) for one in fields(kind)):
            section["seed"] = seed
    return planned(sections, root / run_name(variant, seed), root, whole, common)


def written(folder: Path, stages: dict[str, PlannedStage], env: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe in which every stage names its inputs by their paths."""
    sections = {name: {"module": stage.module, **stage.arguments} for name, stage in stages.items()}
    return {"output_dir": str(folder), "env": dict(env), **sections}


def python(*words: str, log: Path, env: dict[str, str]) -> None:
    """Run a module of this checkout; what it says goes to a file.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("a") as out:
        out.write(f"$ python {shlex.join(words)}\n")
        out.flush()
        code = subprocess.run(
            [sys.executable, *words], env={**os.environ, **env, "PYTHONPATH": paths}, stdout=out, stderr=out
        ).returncode
    if code:
        raise RuntimeError(f"python {shlex.join(words)} failed; {log} ends:\n{log.read_text()[-2000:]}")


def run_recipe(recipe: dict[str, Any]) -> None:
    """Run what a recipe has left to do, in its own folder."""
    folder = Path(recipe["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    text = yaml.safe_dump(recipe, sort_keys=False)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    python("-m", "training.run", "--recipe", str(file), log=folder / "log.txt", env={})


def evaluate(checkpoint: Path, data: Path, folder: Path, *options: str) -> None:
    """Evaluate a checkpoint unless that has been done with these options."""
    asked, file = json.dumps([str(checkpoint), str(data), *options]), folder / "asked.json"
    if file.exists() and file.read_text() == asked:
        return
    words = ["--checkpoint", str(checkpoint), "--data", str(data), "--output_dir", str(folder), *options]
    python("-m", "training.evaluate", *words, log=folder.parent / "log.txt", env=ONE_THREAD)
    file.write_text(asked)


def make_common(root: Path, whole: Recipe, brief: bool) -> None:
    """The data, the pre-trained SmolVLM, and unless in brief the same data in an unseen weather."""
    run_recipe(written(root / "common", common_stages(root, whole), whole.env))
    if not brief:
        run_recipe(written(root / "unseen", unseen_stages(root, whole), {}))


def unseen_stages(root: Path, whole: Recipe) -> dict[str, PlannedStage]:
    """The world that the driving questions are about in another weather, all of it to be asked about."""
    data = driving_questions(whole)
    world = whole.sections[data]["from"]
    sections = {world: whole.sections[world] | UNSEEN, data: whole.sections[data] | {"split": "test"}}
    return planned(sections, root / "unseen", root, whole)


def driving_questions(whole: Recipe) -> str:
    """The section that prepares what all models are adapted to and asked about.

    Raises:
        ValueError: the recipe's data are not made by the recipe.
    """
    if whole.data not in whole.sections:
        raise ValueError(f"{whole.file}: data must name the section that prepares a toy world; got {whole.data!r}")
    return whole.data


def run_variant(variant: str, seed: int, root: Path, whole: Recipe, args: ToyworldArguments) -> None:
    """Train a variant and ask it everything."""
    stages, folder = variant_stages(variant, seed, root, whole), root / run_name(variant, seed)
    run_recipe(written(folder, stages, ONE_THREAD))
    evaluate_variant(variant, seed, stages[VARIANTS[variant][0]].result, root, folder, driving_questions(whole), args)


def evaluate_variant(
    variant: str, seed: int, checkpoint: Path, root: Path, folder: Path, questions: str, args: ToyworldArguments
) -> None:
    """The sighted model beside blind controls and at all budgets; its first seed under more controls.

    Ablations are asked sighted and with black images only.

    Args:
        questions: the section that prepared them.
    """
    options = ["--batch_size", "32", "--attention_frames", "8", "--max_new_tokens", "40"]
    frames = BRIEF_FRAMES if args.brief else QUICK_FRAMES if args.quick else TEST_FRAMES
    options += ["--max_frames", str(frames)]
    data, unseen = root / "common" / questions, root / "unseen" / questions
    if variant not in MODELS:
        evaluate(checkpoint, data, folder / "evaluation", *options, "--controls", "black", "--budgets", "1")
        return
    options += ["--bert_model", str(fetch_minilm())]
    if variant == "blind":
        evaluate(checkpoint, data, folder / "evaluation", *options, "--controls", "text_only")
        return
    thorough = seed == 0 and variant == "smoldriver" and not args.quick
    controls = ["blind", *(["cameras", "questions"] if thorough else [])]
    budgets = ["--budgets", *map(str, BUDGETS)] if variant == "smoldriver" else []
    evaluate(checkpoint, data, folder / "evaluation", *options, "--controls", *controls, *budgets)
    if not args.brief:
        evaluate(checkpoint, unseen, folder / "unseen", *options, "--controls", "black")
    if thorough:
        options[options.index(str(TEST_FRAMES))] = str(CORRUPTION_FRAMES)
        evaluate(checkpoint, data, folder / "corruptions", *options, "--controls", "corruptions")


def main(args: ToyworldArguments) -> dict[str, Any]:
    """Run what is not there yet and write the results; returns them.

    Raises:
        RuntimeError: runs that failed; the others are finished first.
    """
    root, whole = Path(args.output_dir).absolute(), read_recipe(args.recipe)
    seeds = args.seeds[:1] if args.quick else args.seeds
    known = ("smolvlm", *VARIANTS)
    variants = tuple(args.only or (MODELS if args.quick else known))
    if not set(variants) <= set(known):
        raise ValueError(f"--only takes some of {', '.join(known)}; got {args.only}")
    began = time.monotonic()
    fetch_dinov2_small()
    fetch_minilm()
    print(f"worlds, pictures and a SmolVLM pre-trained on them (progress: {root / 'common' / 'log.txt'})", flush=True)
    make_common(root, whole, args.brief)
    print(f"done, {(time.monotonic() - began) / 60:.1f} min; now the models, two at a time", flush=True)
    jobs: dict[str, Callable[[], None]] = {
        run_name(variant, seed): partial(run_variant, variant, seed, root, whole, args)
        for chosen, of in ((QUICK, seeds), (ABLATIONS, seeds[: args.ablation_seeds]))
        for seed in of
        for variant in variants
        if variant in chosen
    }
    if "smolvlm" in variants:
        asked = (pretrained_smolvlm(root, whole), root, root / "smolvlm", driving_questions(whole))
        jobs["smolvlm"] = partial(evaluate_variant, "smolvlm", -1, *asked, args)
    settings = {
        "command": command_of("toyworld", args, package="benchmarks"),
        "arguments": asdict(args),
        "recipe": whole.sections,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")},
    }
    failed: dict[str, str] = {}
    done = 0

    def work(name: str) -> None:
        nonlocal done
        try:
            jobs[name]()
        except RuntimeError as error:
            failed[name] = str(error)
        done += 1
        state = "FAILED" if name in failed else "finished"
        print(f"{done}/{len(jobs)} {name} {state}, {(time.monotonic() - began) / 60:.1f} min", flush=True)

    with ThreadPoolExecutor(args.workers) as pool:
        for _ in pool.map(work, jobs):
            write_json(args.output, {**settings, **collect(root, seeds, variants)}, indent=1)
    if failed:
        raise RuntimeError("\n".join(f"{name}: {error}" for name, error in failed.items()))
    return json.loads(Path(args.output).read_text())
