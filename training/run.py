"""All stages of a recipe in order, each as its own command; finished ones are skipped.

    python -m training.run --recipe toyworld
    python -m training.run --recipe training/recipes/smolvlm2-256m.yaml --data data/drivelm
    python -m training.run --recipe smolvlm2-256m --launcher "torchrun --nproc_per_node 8"
    python -m training.run --recipe smolvlm2-2.2b-paper \\
        --launcher "accelerate launch --config_file training/recipes/accelerate/fsdp2.yaml"

A recipe is one YAML file: `output_dir`, `data`, optionally `env` (environment variables), and a section per stage with
that stage's arguments. Stages run in this order, those without a section are left out:

    toyworld  prepare  pictures  prepare_pictures  prepare_documents
    toybase  align  pretrain
    assemble  transfer  heal  adapt  merge  baseline  blind

`pretrain`, `heal`, `adapt`, `baseline` and `blind` are `training.finetune`. Where a section does not say otherwise a
stage writes `output_dir/STAGE`, reads `data`, and starts from the checkpoint of the stage before. The first line makes
a world, and pictures of another one. The second pre-trains a small SmolVLM on those pictures: its connector learns the
words for what a picture shows, then it answers questions about a picture, alone or one of six. That SmolVLM is what
`assemble` takes apart, the teacher of `transfer` and the start of the baseline.
`blind` starts from what `assemble` made. Without the second line, `transfer` and the baseline name their SmolVLM.
`data` and `eval_data` may name a stage of the recipe, e.g. `data: prepare_documents` to heal on what the SmolVLM was
pre-trained on.
`processes` makes a stage run in so many processes of this machine, each with the section's batch size.

`output_dir/run.json` records for each stage its command, arguments, versions, sha256 of everything it read and wrote,
minutes and figures. A stage is skipped if its record says finished and arguments, inputs and output are still as they
were; where they are not, the run stops and says what changed. A stage that was killed goes on where it stopped.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from transformers import HfArgumentParser

from training.data.rows import read_dataset_info
from training.learning.callbacks import first_and_last

ROOT = Path(__file__).resolve().parents[1]
RECIPES = Path(__file__).with_name("recipes")
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")


@dataclass(frozen=True)
class Stage:
    """One step of a recipe.

    Attributes:
        module: `training.MODULE`, whose command line takes the section's arguments.
        result: what the next stage starts from, relative to the stage's folder.
        resumes: goes on by itself after a kill; otherwise its half-written folder is deleted first.
        inputs: arguments that name what it reads.
        distributed: may run in several processes.
    """

    module: str
    result: str = "."
    resumes: bool = False
    inputs: tuple[str, ...] = ()
    distributed: bool = False


FINETUNE = Stage("finetune", "final", True, ("checkpoint", "data"), True)
STAGES = {
    "toyworld": Stage("toyworld"),
    "prepare": Stage("prepare", inputs=("drivelm_json",)),
    "pictures": Stage("toyworld"),
    "prepare_pictures": Stage("prepare", inputs=("drivelm_json",)),
    "prepare_documents": Stage("prepare", inputs=("drivelm_json",)),
    "toybase": Stage("toyworld.smolvlm", inputs=("drivelm_json", "vision")),
    "align": Stage("align", "final", True, ("checkpoint", "data")),
    "pretrain": FINETUNE,
    "assemble": Stage("assemble", inputs=("smolvlm", "vision", "text")),
    "transfer": Stage("transfer", "final", True, ("student", "teacher", "data", "eval_data"), True),
    "heal": FINETUNE,
    "adapt": FINETUNE,
    "merge": Stage("merge", inputs=("checkpoint", "adapter")),
    "baseline": FINETUNE,
    "blind": FINETUNE,
}
WORLDS = {  # what prepares what
    "prepare": ("toyworld", "drivelm.json"),
    "prepare_pictures": ("pictures", "pictures.json"),
    "prepare_documents": ("pictures", "documents.json"),
}
LEARNT_FROM = {"align": "prepare_pictures", "pretrain": "prepare_documents"}
PROCESSES = "processes"  # an argument of `run_stage`, not of the stage
BESIDE = ("baseline", "blind")  # they do not go on from the stage before


@dataclass
class RunArguments:
    recipe: str = field(metadata={"help": "Recipe: a file, or the name of one in training/recipes."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for all stages; default: the recipe's."})
    data: str | None = field(default=None, metadata={"help": "Prepared data; default: the recipe's."})
    launcher: str | None = field(
        default=None, metadata={"help": "Command in front of the training stages, e.g. torchrun --nproc_per_node 2."}
    )


def read_recipe(name: str) -> tuple[Path, dict[str, Any]]:
    """A recipe by file or name.

    Raises:
        ValueError: no such recipe, or a section that is no stage or no mapping.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(
            f"no recipe {name!r}; training/recipes has {sorted(file.stem for file in RECIPES.glob('*.yaml'))}"
        )
    recipe = yaml.safe_load(path.read_text())
    if not isinstance(recipe, dict) or not set(recipe) & set(STAGES):
        raise ValueError(f"{path} is no recipe for training.run: it has no section of {', '.join(STAGES)}")
    unknown = sorted(set(recipe) - set(STAGES) - {"output_dir", "data", "env"})
    if unknown:
        raise ValueError(f"{path}: {unknown} are neither stages ({', '.join(STAGES)}) nor output_dir, data or env")
    for stage in set(recipe) & set(STAGES):
        if not isinstance(recipe[stage] or {}, dict):
            raise ValueError(f"{path}: section {stage} must hold arguments, one a line; got {recipe[stage]!r}")
    return path, recipe


def plan(recipe: dict[str, Any], root: Path, data: str | None) -> dict[str, dict[str, Any]]:
    """Stage → its arguments in full, in the order of the stages.

    Raises:
        ValueError: a stage has nothing to start from.
    """
    stages: dict[str, dict[str, Any]] = {}
    checkpoint: str | None = None  # of the stage before
    smolvlm: str | None = None  # pre-trained by this recipe
    assembled: str | None = None
    for name in (name for name in STAGES if name in recipe):
        folder = root / name
        given = dict(recipe[name] or {})
        defaults: dict[str, Any] = {"output_dir": str(folder)}
        if name in WORLDS and WORLDS[name][0] in stages:
            world = stages[WORLDS[name][0]]["output_dir"]
            defaults |= {"drivelm_json": str(Path(world) / WORLDS[name][1]), "image_root": world}
        if name == "prepare":
            data = given.get("output_dir", str(folder))
        if name == "toybase":
            made = [Path(stages[world]["output_dir"]) / file for world, file in WORLDS.values() if world in stages]
            defaults["drivelm_json"] = [str(file) for file in made] or None
        if "data" in STAGES[name].inputs:
            defaults["data"] = data
        if LEARNT_FROM.get(name) in stages:
            defaults["data"] = stages[LEARNT_FROM[name]]["output_dir"]
        if name == "assemble" and smolvlm:
            defaults["smolvlm"] = smolvlm
        if name == "transfer":
            defaults |= {"student": checkpoint, "teacher": smolvlm}
        if name in (*LEARNT_FROM, "heal", "adapt", "merge"):
            defaults["checkpoint"] = checkpoint
        if name in BESIDE:
            defaults["checkpoint"] = assembled if name == "blind" else smolvlm
        if name == "adapt":
            defaults["merge"] = "merge" not in recipe
        if name == "merge":
            if "adapt" not in stages:
                raise ValueError("section merge folds in the adapter of section adapt, which the recipe does not have")
            defaults["checkpoint"] = stages["adapt"]["checkpoint"]
            defaults["adapter"] = str(Path(stages["adapt"]["output_dir"]) / "adapter")
        for key in ("data", "eval_data"):
            if given.get(key) in stages:
                given[key] = stages[given[key]]["output_dir"]
        stages[name] = defaults | given
        missing = [key for key in (*STAGES[name].inputs, "output_dir") if stages[name].get(key, "") is None]
        if missing:
            raise ValueError(f"section {name} needs {', '.join(missing)}: no section before it makes one")
        result = str(Path(stages[name]["output_dir"]) / result_of(name, stages[name]))
        if name not in BESIDE:
            checkpoint = result
        if name in LEARNT_FROM:
            smolvlm = checkpoint
        if name == "assemble":
            assembled = checkpoint
    return stages


def result_of(name: str, arguments: dict[str, Any]) -> str:
    """Which folder of a stage holds what it was run for."""
    return "adapter" if name == "adapt" and not arguments["merge"] else STAGES[name].result


def flags(arguments: dict[str, Any]) -> list[str]:
    """Arguments as words of a command line; None leaves one out."""
    words = []
    for key, value in arguments.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict | bool) else value]
        words += [f"--{key}", *map(str, values)]
    return words


def inputs_of(name: str, arguments: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a stage reads, by argument; a list of files is numbered."""
    found: dict[str, dict[str, Any]] = {}
    for key in STAGES[name].inputs:
        value = arguments.get(key)
        if isinstance(value, list):
            found |= {f"{key} {number}": fingerprint(path) for number, path in enumerate(value)}
        elif value:
            found[key] = fingerprint(value)
    return found


def fingerprint(path: str) -> dict[str, Any]:
    """What a path holds: sha256 of each file and of them all; of prepared data also the split's hash.

    A Hub id is what it is called. Of prepared data and toy worlds only tables and settings are read, not images.
    """
    target = Path(path)
    if not target.exists():
        return {"path": path}
    if target.is_file():
        return {"path": path, "sha256": _sha256(target)}
    suffixes = (".parquet", ".json") if (target / "frames").is_dir() or (target / "drivelm.json").is_file() else ("",)
    files = sorted(file for file in target.rglob("*") if file.is_file() and file.name.endswith(suffixes))
    hashes = {str(file.relative_to(target)): _sha256(file) for file in files}
    whole = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    found: dict[str, Any] = {"path": path, "sha256": whole, "files": hashes}
    if (target / "dataset.json").is_file():
        found["split_hash"] = read_dataset_info(target)["split_hash"]
    return found


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def changes(record: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is no longer as a record has it, in words."""
    found = []
    before, after = record["arguments"], now["arguments"]
    for key in sorted(set(before) | set(after)):
        if before.get(key) != after.get(key):
            found.append(f"{key} was {before.get(key)!r}, is {after.get(key)!r}")
    for key, value in now["inputs"].items():
        old = record["inputs"].get(key, {})
        if old.get("sha256") != value.get("sha256"):
            files = {name for name in {**old.get("files", {}), **value.get("files", {})}}
            differing = sorted(n for n in files if old.get("files", {}).get(n) != value.get("files", {}).get(n))
            found.append(
                f"{key} {value['path']} has other contents{' in ' + ', '.join(differing[:3]) if differing else ''}"
            )
    return found


def figures_of(name: str, folder: Path) -> dict[str, Any]:
    """What a stage reached, from the files that it wrote."""
    if (folder / "transfer_metrics.json").is_file():
        return json.loads((folder / "transfer_metrics.json").read_text())
    if name == "align":
        return json.loads((folder / "final" / "align.json").read_text())["held_out"]
    if STAGES[name] is FINETUNE:
        return first_and_last(folder / "metrics.jsonl")
    return {}


class Record:
    """`run.json`: what has been done, kept whole at every moment."""

    def __init__(self, file: Path, recipe: Path):
        self.file = file
        self.content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"stages": {}}
        self.content["recipe"] = {"path": str(recipe), "sha256": _sha256(recipe)}

    def __setitem__(self, stage: str, entry: dict[str, Any]) -> None:
        self.content["stages"][stage] = entry
        temporary = self.file.with_name(self.file.name + ".unfinished")
        temporary.write_text(json.dumps(self.content, indent=2) + "\n")
        os.replace(temporary, self.file)

    def get(self, stage: str) -> dict[str, Any] | None:
        return self.content["stages"].get(stage)


def is_finished(name: str, record: Record, now: dict[str, Any], result: Path) -> bool:
    """Whether a stage need not run.

    Raises:
        ValueError: it has run on something else than what is there now, or its result was changed since.
    """
    entry, folder = record.get(name), Path(now["arguments"]["output_dir"])
    if entry is None or not folder.exists():
        return False
    changed = changes(entry, now)
    if not changed and entry["status"] == "finished" and result.exists():
        if fingerprint(str(result)).get("sha256") != entry["output"]["sha256"]:
            changed = [f"its result {result} was changed after it was written"]
    if changed:
        raise ValueError(
            f"stage {name} was run before, but since then {'; '.join(changed)}. Delete {folder} to run it again "
            "(and the folders of the stages after it), or take another output_dir"
        )
    return entry["status"] == "finished" and result.exists()


def run_stage(name: str, now: dict[str, Any], record: Record, launcher: str | None, env: dict[str, str]) -> None:
    """Run a stage's command and record what came of it.

    Raises:
        RuntimeError: the command failed.
    """
    stage, arguments = STAGES[name], dict(now["arguments"])
    folder = Path(arguments["output_dir"])
    before = record.get(name)
    if before is not None and not stage.resumes:
        shutil.rmtree(folder, ignore_errors=True)  # half of it; `is_finished` has refused what was whole and changed
    start = [sys.executable]
    processes = arguments.pop(PROCESSES, 1) if stage.distributed else 1
    if launcher and stage.distributed:
        start = shlex.split(launcher)
    elif processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        env = env | {"OMP_NUM_THREADS": str(max(1, int(env.get("OMP_NUM_THREADS", 1)) // processes))}
    words = ["-m", f"training.{stage.module}", *flags(arguments)]
    entry = {
        **now,
        "status": "running",
        "command": shlex.join(["python", *start[1:], *words] if start[0] == sys.executable else [*start, *words]),
    }
    entry["minutes"] = before["minutes"] if before is not None and folder.exists() else 0.0
    record[name] = entry
    print(f"== {name}: {entry['command']}", flush=True)
    began = time.monotonic()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    boards = {"TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard")}
    code = subprocess.run([*start, *words], env={**os.environ, **boards, **env, "PYTHONPATH": path}).returncode
    entry["minutes"] = round(entry["minutes"] + (time.monotonic() - began) / 60, 3)
    if code:
        record[name] = entry
        raise RuntimeError(
            f"stage {name} failed (exit status {code}); its output is above, its command in {record.file}"
        )
    record[name] = {
        **entry,
        "status": "finished",
        "output": fingerprint(str(folder / result_of(name, arguments))),
        "figures": figures_of(name, folder),
        "versions": {package: version(package) for package in PACKAGES},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main(args: RunArguments) -> Path:
    """Run what is not finished; returns `run.json`.

    Raises:
        ValueError: a recipe or a stage that cannot be run as asked, naming what to change.
        RuntimeError: a stage failed.
    """
    file, recipe = read_recipe(args.recipe)
    root = Path(args.output_dir or recipe.get("output_dir") or f"outputs/{file.stem}")
    stages = plan(recipe, root, args.data or recipe.get("data"))
    env = {key: str(value) for key, value in (recipe.get("env") or {}).items()}
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / ".lock", timeout=0):
            record = Record(root / "run.json", file)
            for name, arguments in stages.items():
                now = {"arguments": arguments, "inputs": inputs_of(name, arguments)}
                result = Path(arguments["output_dir"]) / result_of(name, arguments)
                if is_finished(name, record, now, result):
                    print(f"== {name}: finished before, {result}")
                else:
                    run_stage(name, now, record, args.launcher, env)
    except Timeout:
        raise ValueError(f"another run is at work in {root}") from None
    print(f"== done: {record.file}")
    return record.file


if __name__ == "__main__":
    main(HfArgumentParser(RunArguments).parse_args_into_dataclasses()[0])
