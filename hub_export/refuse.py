"""What must never reach a public repository: pickles, this machine's paths, secrets, licensed images, foreign imports.

`refuse(folder)` is called by `build` on the finished folder and by `check` before anything in it is loaded.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

# Kept out of what is published: the reference that `check` compares with, and its stamp.
STATE_FOLDER = ".hub_export"

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".msgpack", ".h5"}
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
# A BPE vocabulary may hold any string, "/home/" too; secrets are looked for in it nevertheless.
VOCABULARIES = {"tokenizer.json", "vocab.json", "merges.txt"}

ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/<])/(?:home|root|tmp|Users|mnt|media|data|var|opt|srv|scratch|workspace|work|content|kaggle|private)"
    r"/[\w.@-]+|\b[A-Za-z]:\\+\w+"
)
WHOLE_PATH = re.compile(r"(?:/[\w.@+ -]+){2,}/?")
SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{20,}"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}|\bAIza[\w-]{30,}|\bxox[abprs]-[\w-]{10,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
# n015-2018-07-24-11-22-45+0800__CAM_FRONT__1532402927612460.jpg, with or without the camera's folder in front.
NUSCENES_NAME = re.compile(r"n\d{3}-20\d\d-\d\d-\d\d|(?:^|/)(?:samples|sweeps)/(?:CAM|LIDAR|RADAR)_|nuscenes", re.I)
NON_COMMERCIAL = re.compile(rb"nuscenes|motional|nutonomy|CC[ -]BY-NC|non-?commercial", re.I)
NUSCENES_SIZE = (1600, 900)

MODEL_IMPORTS = {"torch", "transformers", "numpy", "PIL"}
DEMO_IMPORTS = MODEL_IMPORTS | {"gradio"}


def published_files(folder: Path) -> list[Path]:
    """Every file of an export that is published, sorted; `check`'s own state and caches are not."""
    hidden = {STATE_FOLDER, ".cache", "__pycache__", ".git"}
    files = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return sorted(path for path in files if not hidden & set(path.relative_to(folder).parts))


def refuse(folder: Path) -> None:
    """Look at every file that would be published.

    Raises:
        ValueError: listing each file that may not be, with the reason.
    """
    problems = []
    for path in published_files(folder):
        name = path.relative_to(folder).as_posix()
        problems += [f"{name}: {reason}" for reason in file_problems(folder, path)]
    if problems:
        raise ValueError(f"{folder.name} may not be published:\n  " + "\n  ".join(problems))


def file_problems(folder: Path, path: Path) -> Iterator[str]:
    """Reasons why one file may not be published."""
    suffix = path.suffix.lower()
    if path.is_symlink():
        yield "a link; its target would not be published"
        return
    if suffix in PICKLES or any(part in PICKLES for part in path.suffixes[:-1]):
        yield "may hold a pickle, which runs code when loaded; weights are published as safetensors"
        return
    if suffix in IMAGES:
        yield from image_problems(path, path.relative_to(folder).as_posix())
        return
    if suffix in {".safetensors", ".onnx", ".data"}:
        return
    content = path.read_bytes()
    if content[:2] == b"\x80\x04" or content[:2] == b"\x80\x02" or content[:4] == b"PK\x03\x04":
        yield "a pickle or an archive under another name"
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        yield "neither text, nor an image, nor safetensors"
        return
    yield from text_problems(path, text)
    if suffix == ".py":
        yield from import_problems(folder, path, text)


def text_problems(path: Path, text: str) -> Iterator[str]:
    """Secrets and this machine's paths."""
    for kind, pattern in SECRETS.items():
        if pattern.search(text):  # the string itself stays out of the message: logs are public too
            yield f"holds what looks like {kind}"
    if path.name in VOCABULARIES:
        return
    if match := ABSOLUTE_PATH.search(text):
        yield f"holds a path of the machine it was made on: {match.group()!r}"
    elif path.suffix == ".json":
        whole = next((value for value in strings_of(json.loads(text)) if WHOLE_PATH.fullmatch(value)), None)
        if whole is not None:
            yield f"holds a path of the machine it was made on: {whole!r}"


def strings_of(value: Any) -> Iterator[str]:
    """All strings in parsed JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_of(item)


def image_problems(path: Path, name: str) -> Iterator[str]:
    """Whether an image comes from nuScenes, whose licence forbids commercial use, by its name, metadata or shape.

    Args:
        name: how the image is, or was, called, with its folders.
    """
    if NUSCENES_NAME.search(name):
        yield "is named like a nuScenes image, whose licence is non-commercial; use generated images"
        return
    try:
        with Image.open(path) as picture:
            metadata = b" ".join(
                value if isinstance(value, bytes) else str(value).encode() for value in picture.info.values()
            )
            metadata += str(dict(picture.getexif())).encode()
            if NON_COMMERCIAL.search(metadata):
                yield "carries a non-commercial licence or nuScenes' name in its metadata; use generated images"
            elif picture.format == "JPEG" and picture.size == NUSCENES_SIZE:
                yield "is a 1600x900 JPEG, the form of nuScenes images (non-commercial); use smaller generated ones"
    except UnidentifiedImageError:
        yield "is not the image that its name says"


def import_problems(folder: Path, path: Path, source: str) -> Iterator[str]:
    """Imports that would fail, or surprise, where only the declared requirements are installed."""
    allowed = DEMO_IMPORTS if path.parent.name == "demo" else MODEL_IMPORTS
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        yield f"is not valid Python: {error}"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or not node.module or not (path.parent / f"{node.module}.py").is_file():
                wanted = "." * node.level + (node.module or "")
                yield f"line {node.lineno}: imports {wanted}, which is not a file beside it"
            continue
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            continue
        for module in modules:
            top = module.split(".")[0]
            if top not in allowed and top not in sys.stdlib_module_names:
                yield f"line {node.lineno}: imports {top}; allowed are {', '.join(sorted(allowed))} and siblings"


def without_machine_paths(value: Any) -> Any:
    """Parsed JSON with each absolute path reduced to its last component, so that notes of a run can be published."""
    if isinstance(value, str):
        if WHOLE_PATH.fullmatch(value):
            return value.rstrip("/").rsplit("/", 1)[-1]
        words = value.split(" ")
        return " ".join(re.sub(r"(?<![\w.:/])(?:/[\w.@+-]+)+/([\w.@+-]+)/?", r"\1", word) for word in words)
    if isinstance(value, dict):
        return {key: without_machine_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_machine_paths(item) for item in value]
    return value
