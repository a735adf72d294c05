import io
import json
import os
import pickle
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin
from tiny import picture

from hub_export.refuse import refuse, without_machine_paths

SHARED = Path(__file__).resolve().parents[2].parent / "shared"


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jpeg(size=(64, 36), **settings) -> bytes:
    buffer = io.BytesIO()
    picture(0, size).save(buffer, "JPEG", **settings)
    return buffer.getvalue()


def png_with(text: str) -> bytes:
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_text("Copyright", text)
    picture().save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def exif_with(text: str) -> bytes:
    exif = Image.Exif()
    exif[0x8298] = text  # copyright
    return jpeg(exif=exif)


def test_lets_an_ordinary_repository_pass(tmp_path):
    put(tmp_path, "config.json", json.dumps({"model_type": "smoldriver", "url": "https://example.org/home/x/y"}))
    put(tmp_path, "modeling_x.py", "import torch\nfrom .other_x import y\nfrom transformers import AutoModel\n")
    put(tmp_path, "other_x.py", "import os.path\nfrom dataclasses import dataclass\n")
    put(tmp_path, "demo/app.py", "import gradio as gr\n")
    put(tmp_path, "demo/examples/0/CAM_FRONT.jpg", jpeg())
    put(tmp_path, "tokenizer.json", json.dumps({"model": {"vocab": {"/Users/user": 1, "/usr/bin": 2}}}))
    put(tmp_path, "README.md", "Half of it and/or the rest; see [LICENSE](LICENSE), 3/4 of </p>.")
    put(tmp_path, ".hub_export/secret.json", "hf_" + "a" * 34)  # not published
    refuse(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "x.pkl", "scheduler.pth", "a.pt.gz", "rng.npz"])
def test_refuses_pickles_by_name(tmp_path, name):
    put(tmp_path, name, b"\0\0")
    with pytest.raises(ValueError, match="pickle"):
        refuse(tmp_path)


@pytest.mark.parametrize("content", [pickle.dumps({"a": 1}), pickle.dumps([1], protocol=2), b"PK\x03\x04rest"])
def test_refuses_pickles_and_archives_under_other_names(tmp_path, content):
    put(tmp_path, "weights.dat", content)
    with pytest.raises(ValueError, match="pickle"):
        refuse(tmp_path)


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.json", '{"_name_or_path": "/Users/anna/.cache/part"}'),
        ("metrics.json", '{"command": "evaluate --model /Users/anna/run"}'),
        ("notes.json", '{"where": "/somewhere/unusual"}'),
        ("README.md", "made in /tmp/run"),
        ("code_x.py", 'DATA = "C:\\\\Users\\\\anna"\n'),
    ],
)
def test_refuses_paths_of_this_machine(tmp_path, name, text):
    put(tmp_path, name, text)
    with pytest.raises(ValueError, match="path of the machine"):
        refuse(tmp_path)


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3" * 11,
        "AKIA" + "ABCD1234" * 2,
        "ghp_" + "a1" * 18,
        "sk-" + "x" * 24,
        "-----BEGIN RSA " + "PRIVATE KEY-----",
    ],
)
@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "config.json"])
def test_refuses_what_looks_like_a_secret_without_repeating_it(tmp_path, name, secret):
    put(tmp_path, name, json.dumps({"x": f"token {secret}"}))
    with pytest.raises(ValueError, match="looks like") as caught:
        refuse(tmp_path)
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    "name, content",
    [
        ("demo/examples/n015-2018-07-24-11-22-45+0800__CAM_FRONT__1532402927612460.jpg", jpeg()),
        ("samples/CAM_FRONT/front.jpg", jpeg()),
        ("nuscenes_front.jpg", jpeg()),
        ("front.jpg", exif_with("nuScenes, Motional")),
        ("front.jpg", jpeg(comment=b"CC BY-NC-SA 4.0")),
        ("front.png", png_with("for non-commercial use")),
        ("front.jpg", jpeg(size=(1600, 900))),
        ("front.jpg", b"no image"),
    ],
)
def test_refuses_images_that_may_be_licensed(tmp_path, name, content):
    put(tmp_path, name, content)
    with pytest.raises(ValueError, match="image|licence"):
        refuse(tmp_path)


@pytest.mark.skipif(not (SHARED / "drivelm").is_dir(), reason="real images are not here")
def test_refuses_a_real_nuscenes_image_under_an_innocent_name(tmp_path):
    real = next((SHARED / "drivelm" / "nuscenes" / "samples").rglob("*.jpg"))
    put(tmp_path, "picture.jpg", real.read_bytes())
    with pytest.raises(ValueError, match="nuScenes"):
        refuse(tmp_path)


@pytest.mark.parametrize(
    "code",
    [
        "import training.data.rows\n",
        "from smoldriver_hf import CAMERAS\n",
        "import einops\n",
        "def f():\n    import requests\n",
        "from . import configuration_x\n",
        "from .missing_x import y\n",
        "from ..other import y\n",
        "import gradio\n",
        "def broken(:\n",
    ],
)
def test_refuses_foreign_imports(tmp_path, code):
    put(tmp_path, "modeling_x.py", code)
    put(tmp_path, "configuration_x.py", "")
    with pytest.raises(ValueError, match="import|Python"):
        refuse(tmp_path)


def test_refuses_links(tmp_path):
    os.symlink(__file__, tmp_path / "code_x.py")
    with pytest.raises(ValueError, match="a link"):
        refuse(tmp_path)


def test_lists_every_problem_at_once(tmp_path):
    put(tmp_path, "a.pt", b"")
    put(tmp_path, "b.json", '"/Users/anna/run"')
    with pytest.raises(ValueError, match="(?s)a.pt.*b.json"):
        refuse(tmp_path)


def test_notes_keep_their_meaning_without_this_machines_paths():
    note = {
        "model": "/Users/anna/runs/final",
        "command": "python -m x --data /data/prepared --config=recipes/a.yaml --out=/tmp/x/y/ --lr 1e-4",
        "list": ["https://huggingface.co/a/b", "either/or", 3, None],
    }
    assert without_machine_paths(note) == {
        "model": "final",
        "command": "python -m x --data prepared --config=recipes/a.yaml --out=y --lr 1e-4",
        "list": ["https://huggingface.co/a/b", "either/or", 3, None],
    }
