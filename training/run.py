"""All stages of a recipe in order, each as its own command; finished ones are skipped.

    python -m training.run --recipe toyworld
    python -m training.run --recipe training/recipes/smolvlm2-256m.yaml --data data/drivelm
    python -m training.run --recipe toyworld --jobs 2
    python -m training.run --recipe smolvlm2-256m --launcher "torchrun --nproc_per_node 8"
    python -m training.run --recipe smolvlm2-2.2b-paper \\
        --launcher "accelerate launch --config_file training/recipes/accelerate/fsdp2.yaml"

What a recipe says is told in `training.stages.recipes`. A stage writes `output_dir/STAGE` where its section does not
say otherwise. `processes` makes a stage run in so many processes of this machine, each with the section's batch size;
with `--jobs` so many stages run side by side, as soon as what they read is there.

`output_dir/run.json` records for each stage its command, arguments, versions, sha256 of everything it read and wrote,
minutes and figures. A stage is skipped if its record says finished and arguments, inputs and output are still as they
were; where they are not, it is refused by what changed. A stage that was killed goes on where it stopped. A stage that
fails holds up those that read its result; the others are run first.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock, Timeout

from training.data.rows import read_dataset_info
from training.stages import command_line
from training.stages.files import differences, flags, sha256, write_json
from training.stages.jobs import side_by_side
from training.stages.recipes import PROCESSES, PlannedStage, Recipe, plan, read_recipe

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")


@dataclass
class RunArguments:
    recipe: str = field(metadata={"help": "Recipe: a file, or the name of one in training/recipes."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for all stages; default: the recipe's."})
    data: str | None = field(default=None, metadata={"help": "Prepared data; default: the recipe's."})
    launcher: str | None = field(default=None, metadata={"help": "Command in front of stages, e.g. torchrun."})
    jobs: int = field(default=1, metadata={"help": "Stages side by side; what they say goes to OUTPUT_DIR/logs."})

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1; got {self.jobs}")


def inputs_of(stage: PlannedStage) -> dict[str, dict[str, Any]]:
    """What a stage reads, by argument; a list of files is numbered."""
    found: dict[str, dict[str, Any]] = {}
    for key in stage.stage.inputs:
        value = stage.arguments.get(key)
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
        return {"path": path, "sha256": sha256(target)}
    suffixes = (".parquet", ".json") if (target / "frames").is_dir() or (target / "drivelm.json").is_file() else ("",)
    files = sorted(file for file in target.rglob("*") if file.is_file() and file.name.endswith(suffixes))
    hashes = {str(file.relative_to(target)): sha256(file) for file in files}
    whole = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    found: dict[str, Any] = {"path": path, "sha256": whole, "files": hashes}
    if (target / "dataset.json").is_file():
        found["split_hash"] = read_dataset_info(target)["split_hash"]
    return found


def changes(record: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is no longer as a record has it, in words."""
    found = sorted(differences(record["arguments"], now["arguments"]))
    for key, value in now["inputs"].items():
        old = record["inputs"].get(key, {})
        if old.get("sha256") != value.get("sha256"):
            files, others = old.get("files", {}), value.get("files", {})
            differing = sorted(name for name in {**files, **others} if files.get(name) != others.get(name))
            where = f" in {', '.join(differing[:3])}" if differing else ""
            found.append(f"{key} {value['path']} has other contents{where}")
    return found


class Record:
    """`run.json`: what has been done, kept whole at every moment."""

    def __init__(self, file: Path, recipe: Path):
        self.file = file
        self.content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"stages": {}}
        self.content["recipe"] = {"path": str(recipe), "sha256": sha256(recipe)}
        self.lock = Lock()

    def __setitem__(self, stage: str, entry: dict[str, Any]) -> None:
        with self.lock:
            self.content["stages"][stage] = entry
            write_json(self.file, self.content)

    def get(self, stage: str) -> dict[str, Any] | None:
        return self.content["stages"].get(stage)


def is_finished(name: str, stage: PlannedStage, record: Record, now: dict[str, Any]) -> bool:
    """Whether a stage need not run.

    Raises:
        ValueError: it has run on something else than what is there now, or its result was changed since.
    """
    entry, result = record.get(name), stage.result
    if entry is None or not stage.folder.exists():
        return False
    changed = changes(entry, now)
    if not changed and entry["status"] == "finished" and result.exists():
        if fingerprint(str(result)).get("sha256") != entry["output"]["sha256"]:
            changed = [f"its result {result} was changed after it was written"]
    if changed:
        raise ValueError(
            f"stage {name} was run before, but since then {'; '.join(changed)}. Delete {stage.folder} to run it again "
            "(and the folders of the stages after it), or take another output_dir"
        )
    return entry["status"] == "finished" and result.exists()


def run_stage(
    name: str,
    stage: PlannedStage,
    now: dict[str, Any],
    record: Record,
    launcher: str | None,
    env: dict[str, str],
    log: Path | None,
) -> None:
    """Run a stage's command and record what came of it.

    Args:
        log: file for what it says; None: it says it here.

    Raises:
        ChildProcessError: the command failed.
    """
    folder, arguments = stage.folder, dict(stage.arguments)
    before = record.get(name)
    if before is not None and not stage.stage.resumes:
        shutil.rmtree(folder, ignore_errors=True)  # half of it; `is_finished` has refused what was whole and changed
    start = [sys.executable]
    processes = arguments.pop(PROCESSES, 1)
    if launcher and stage.stage.distributed:
        start = shlex.split(launcher)
    elif processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        env = env | {"OMP_NUM_THREADS": str(max(1, int(env.get("OMP_NUM_THREADS", 1)) // processes))}
    words = [*start, "-m", f"training.{stage.module}", *flags(arguments)]
    command = shlex.join(["python", *words[1:]] if words[0] == sys.executable else words)
    minutes = before["minutes"] if before is not None and folder.exists() else 0.0
    record[name] = entry = {**now, "status": "running", "command": command, "minutes": minutes}
    print(f"== {name}: {log or command}", flush=True)
    began = time.monotonic()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    boards = {"TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard")}
    code = call(words, {**os.environ, **boards, **env, "PYTHONPATH": path}, log)
    entry["minutes"] = round(entry["minutes"] + (time.monotonic() - began) / 60, 3)
    if code:
        record[name] = entry
        said = f"{log} ends: {log.read_text().splitlines()[-1]}" if log else "its output is above"
        raise ChildProcessError(f"stage {name} failed (exit status {code}); its command is in {record.file}; {said}")
    record[name] = {
        **entry,
        "status": "finished",
        "output": fingerprint(str(stage.result)),
        "figures": stage.stage.figures(folder),
        "versions": {package: version(package) for package in PACKAGES},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def call(words: list[str], env: dict[str, str], log: Path | None) -> int:
    """Run a command, heard here or, with all that it says, in a log; returns its exit status."""
    if log is None:
        return subprocess.run(words, env=env).returncode
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        out.write(f"$ {shlex.join(words)}\n")
        out.flush()
        return subprocess.run(words, env=env, stdout=out, stderr=out).returncode


def run(
    recipe: Recipe,
    root: Path,
    data: str | None = None,
    launcher: str | None = None,
    jobs: int = 1,
    after: Callable[[str], None] = lambda name: None,
) -> Path:
    """Run what is not finished in `root`; returns `run.json`.

    Args:
        jobs: stages side by side.
        after: is called with the name of each stage that was run.

    Raises:
        ValueError: a stage that cannot be run as asked, naming what to change.
        ChildProcessError: a stage failed.
    """
    stages = plan(recipe.sections, root, data or recipe.data)
    needs = {name: {other for others in stage.reads.values() for other in others} for name, stage in stages.items()}
    was_run: set[str] = set()
    root.mkdir(parents=True, exist_ok=True)

    def bring_about(name: str) -> None:
        stage = stages[name]
        now = {"arguments": stage.arguments, "inputs": inputs_of(stage)}
        if is_finished(name, stage, record, now):
            print(f"== {name}: finished before, {stage.result}", flush=True)
        else:
            log = root / "logs" / f"{name}.txt" if jobs > 1 else None
            run_stage(name, stage, now, record, launcher, recipe.env, log)
            was_run.add(name)

    def told(name: str) -> None:
        if name in was_run:
            after(name)

    try:
        with FileLock(root / ".lock", timeout=0):
            record = Record(root / "run.json", recipe.file)
            side_by_side(needs, bring_about, jobs, told)
    except Timeout:
        raise ValueError(f"another run is at work in {root}") from None
    print(f"== done: {record.file}")
    return record.file


def main(args: RunArguments) -> Path:
    """Run a recipe; returns `run.json`."""
    recipe = read_recipe(args.recipe)
    return run(recipe, Path(args.output_dir or recipe.output_dir), args.data, args.launcher, args.jobs)


if __name__ == "__main__":
    command_line.run(main, RunArguments)
