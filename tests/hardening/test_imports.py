"""No pickle is ever unpacked, and importing anything asks nothing of the network."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("smoldriver_hf", "training", "hub_export", "benchmarks")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# Each of these runs code that stands in the data it reads.
UNPICKLING_MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
}
UNSAFE_CALLS = {
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "pd.read_pickle",
    "pandas.read_pickle",
    "torch.jit.load",
}


def unsafe_loads(source: str) -> list[str]:
    """What in a module would unpack pickles or run code from data, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        found += [f"{node.lineno}: import of {name}" for name in names if name.split(".")[0] in UNPICKLING_MODULES]
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if call == "torch.load" and options.get("weights_only") != "True":
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        if call.endswith((".load", ".from_pretrained")) and options.get("weights_only", "True") != "True":
            found.append(f"{node.lineno}: {call} with weights_only={options['weights_only']}")
        if options.get("allow_pickle", "False") != "False":
            found.append(f"{node.lineno}: {call} with allow_pickle")
        if call in UNSAFE_CALLS or call in ("eval", "exec"):
            found.append(f"{node.lineno}: {call}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpacks_pickles(path):
    assert unsafe_loads(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load('a')",
        "torch.load('a', weights_only=False)",
        "model.from_pretrained('a', weights_only=False)",
        "np.load('a', allow_pickle=True)",
        "yaml.load(text)",
        "eval(text)",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert unsafe_loads(source)
    assert not unsafe_loads("torch.load('a', weights_only=True); np.load('a'); yaml.safe_load('a'); json.load(file)")


OFFLINE = """
import importlib, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError(f"the network is asked: {args[:2]}")

for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, refuse)
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refuse)
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] != "vllm":  # which alone imports its plugin
            raise
print("imported", len(sys.argv) - 1)
"""


def test_imports_ask_nothing_of_the_network(tmp_path):
    modules = []
    for package in ("smoldriver_hf", "training", "hub_export"):
        files = sorted(file for file in (ROOT / package).rglob("*.py") if file.parent.name != "templates")
        modules += [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *modules],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"imported {len(modules)}" in done.stdout
