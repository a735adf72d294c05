"""Prove an exported folder before it is published.

    python -m hub_export check outputs/smoldriver
    python -m hub_export check outputs/smoldriver --transformers 5.18.0 --python other-env/bin/python

First everything that may not be published is refused (`refuse.py`). Then `probe.py` runs in a fresh process: an empty
directory, an empty module cache, none of the project's packages importable, no network. There the folder loads by
AutoModel, AutoModelForImageTextToText, AutoProcessor and `pipeline`, gives the logits and tokens of the checkpoint it
was built from, is saved again and reloaded, and loads in bf16 and in NF4. It runs with this interpreter, with each
`--python`, and with each `--transformers` version, which pip puts into an environment of its own.

What passed is written into a stamp with the sha256 of every file; `push` publishes nothing else.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hub_export.files import sha256
from hub_export.refuse import STATE_FOLDER, published_files, refuse

OLDEST_TRANSFORMERS = "5.18.0"
REFERENCE = Path(STATE_FOLDER) / "reference.safetensors"
STAMP = Path(STATE_FOLDER) / "stamp.json"


@dataclass
class CheckArguments:
    folder: str = field(metadata={"help": "Exported folder, written by build.", "positional": True})
    transformers: list[str] = field(
        default_factory=lambda: [OLDEST_TRANSFORMERS], metadata={"help": "Further versions, fetched by pip."}
    )
    only_installed: bool = field(default=False, metadata={"help": "Fetch nothing: leave --transformers out."})
    python: list[str] = field(default_factory=list, metadata={"help": "Further interpreters that have transformers."})


def folder_hashes(folder: Path) -> dict[str, str]:
    """{path in the repository: sha256} of everything that is published."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in published_files(folder)}


def environment_with(transformers: str) -> Path:
    """Interpreter of an environment in which transformers has the given version and all else is as it is here.

    Made once, below the user's cache folder.

    Raises:
        ValueError: pip could not fetch that version.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    home = cache / "smoldriver" / "environments" / f"transformers-{transformers}"
    python = home / "bin" / "python"
    paths = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages" / "check.pth"
    if not paths.exists():
        overlay = home / "overlay"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(overlay)]
        done = subprocess.run([*pip, f"transformers=={transformers}"], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(
                f"pip cannot fetch transformers {transformers}; check without it (--only_installed) or "
                f"name an interpreter that has it with --python:\n{done.stderr.strip()[-500:]}"
            )
        venv.create(home, with_pip=False)
    # Written each time: what lies here may have moved since. Earlier lines win.
    paths.write_text(f"{home / 'overlay'}\n{sysconfig.get_path('purelib')}\n")
    return python


def probe(folder: Path, python: str | Path) -> list[dict[str, Any]]:
    """Run `probe.py` with one interpreter; returns its passed checks.

    Raises:
        ValueError: a check failed; the message holds the end of its error output.
    """
    with tempfile.TemporaryDirectory(prefix="smoldriver-check-") as empty:
        report = Path(empty) / "report.jsonl"
        work = Path(empty) / "work"
        work.mkdir()
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": empty,
            "HF_HOME": str(Path(empty) / "hf"),
            "TMPDIR": empty,
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",  # the reference was computed on the CPU
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        }
        # isolated (-I): neither the working directory nor PYTHONPATH nor user packages are searched
        command = [str(python), "-I", str(Path(__file__).with_name("probe.py"))]
        done = subprocess.run(
            [*command, str(folder.resolve()), str((folder / REFERENCE).resolve()), str(report)],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
        )
        passed = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    if done.returncode or not passed or passed[-1]["check"] != "complete":
        last = passed[-1]["check"] if passed else "nothing"
        raise ValueError(
            f"{folder.name} does not pass its check with {python}; it got as far as: {last}\n{done.stderr[-3000:]}"
        )
    return passed


def read_stamp(folder: Path) -> dict[str, Any]:
    """The stamp of a folder that passed its check and has not changed since.

    Raises:
        ValueError: there is no stamp, or the folder is not what was checked.
    """
    if not (folder / STAMP).is_file():
        raise ValueError(f"{folder} has no stamp: run `python -m hub_export check {folder}` first")
    stamp = json.loads((folder / STAMP).read_text())
    hashes = folder_hashes(folder)
    if hashes != stamp["files"]:
        changed = sorted(name for name in {*hashes, *stamp["files"]} if hashes.get(name) != stamp["files"].get(name))
        raise ValueError(
            f"{folder} has changed since it was checked ({', '.join(changed[:5])}): "
            f"run `python -m hub_export check {folder}` again"
        )
    return stamp


def main(args: CheckArguments) -> dict[str, Any]:
    """Check and stamp; returns the stamp.

    Raises:
        ValueError: something may not be published, or a check failed.
    """
    folder = Path(args.folder)
    if not (folder / "config.json").is_file() or not (folder / REFERENCE).is_file():
        raise ValueError(f"{folder} was not written by build: it lacks config.json or {REFERENCE}")
    (folder / STAMP).unlink(missing_ok=True)
    refuse(folder)
    before = folder_hashes(folder)

    fetched = [] if args.only_installed else [str(environment_with(version)) for version in args.transformers]
    interpreters = [sys.executable, *args.python, *fetched]
    environments = []
    for python in tqdm(interpreters, desc="check", unit="environment"):
        passed = probe(folder, python)
        versions = {name: version for name, version in passed[-1].items() if name != "check"}
        environments.append({"versions": versions, "passed": passed[:-1]})
        checks = ", ".join(check["check"] for check in passed[:-1])
        tqdm.write(f"transformers {versions['transformers']}, torch {versions['torch']}: {checks}")
    if folder_hashes(folder) != before:
        raise ValueError(f"{folder} changed while it was checked")

    stamp: dict[str, Any] = {"files": before, "environments": environments}
    (folder / STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
    return stamp
