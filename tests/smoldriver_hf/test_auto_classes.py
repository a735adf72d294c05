"""A saved folder is complete: any process loads, runs and saves it again, whether or not it can import the package."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from tiny import lively, picture, scene, tiny_language_models, tiny_model, tiny_processor, tiny_towers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)

import smoldriver_hf
from smoldriver_hf import CAMERAS, SmolDriverConfig

ENTRIES = {"AutoConfig", "AutoModel", "AutoImageProcessor", "AutoProcessor"}
ENTRIES |= {"AutoModelForImageTextToText", "AutoModelForMultimodalLM"}

# What the clean process runs: no package on its path, nothing cached, no network.
SCRIPT = """
import importlib.util, json, sys
assert importlib.util.find_spec("smoldriver_hf") is None, "the package can be imported here"
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

source, target, out = sys.argv[1:4]
trust = {"trust_remote_code": True}
report = {}
for folder in (source, target):
    config = AutoConfig.from_pretrained(folder, **trust)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **trust)
    assert not any(info.values()), info
    base = AutoModel.from_pretrained(folder, **trust)
    processor = AutoProcessor.from_pretrained(folder, **trust)
    image_processor = AutoImageProcessor.from_pretrained(folder, **trust)
    assert type(image_processor).__name__ == "SmolDriverImageProcessor"
    images = {camera: Image.open(f"{source}/{camera}.png") for camera in ("CAM_FRONT", "CAM_BACK")}
    inputs = processor(images=images, text="Is it safe?", num_queries=4, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
        hidden = base(**inputs).last_hidden_state
    answer = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    fresh = AutoModelForImageTextToText.from_config(config, **trust)
    assert (fresh.model.multi_modal_projector.connector.scale_norm.weight == 0.25).all()
    for name, buffer in model.model.multi_modal_projector.named_buffers():
        torch.testing.assert_close(fresh.model.multi_modal_projector.get_buffer(name), buffer)
    report[folder] = {"logits": logits, "hidden": hidden, "answer": answer, "weights": model.state_dict()}
    if folder == source:
        model.save_pretrained(target)
        processor.save_pretrained(target)
torch.save([report[source], report[target]], out)
"""


def clean_run(script: str, *arguments, cwd) -> str:
    """Run a script where neither the package nor a cache nor the network can be reached."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    # `PYTHONPATH` may name another transformers (a test of an older version); the repository must not be on it
    root = os.path.dirname(os.path.dirname(smoldriver_hf.__file__))
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment |= {
        "PYTHONPATH": os.pathsep.join(path for path in paths if os.path.realpath(path) != os.path.realpath(root)),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cwd / "hf_home"),
        "HF_MODULES_CACHE": str(cwd / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    (cwd / "clean_run.py").write_text(textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, "-P", "clean_run.py", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(folder, model, processor) of a tiny checkpoint, its code beside the weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, processor = lively(tiny_model()), None
    model.config.projector_config.embedding_std = 0.25
    processor = tiny_processor(model.config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


def test_the_folder_holds_its_code_and_all_entries(checkpoint):
    folder, *_ = checkpoint
    assert set(json.loads((folder / "config.json").read_text())["auto_map"]) == ENTRIES
    for file in ("configuration", "modeling", "projector", "scene", "processing", "image_processing"):
        assert (folder / f"{file}_smoldriver.py").is_file(), file
    for file in ("processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (folder / file).is_file(), file


def test_a_process_without_the_package_loads_answers_and_saves_again(checkpoint, tmp_path):
    folder, model, processor = checkpoint
    images = {"CAM_FRONT": picture(1), "CAM_BACK": picture(2)}
    for camera, image in images.items():
        image.save(folder / f"{camera}.png")
    inputs = processor(images=images, text="Is it safe?", num_queries=4, return_tensors="pt")
    with torch.no_grad():
        expected = {
            "logits": model(**inputs).logits,
            "hidden": model.model(**inputs).last_hidden_state,
            "answer": model.generate(**inputs, max_new_tokens=5, do_sample=False),
        }
    again = tmp_path / "again"
    clean_run(SCRIPT, folder, again, tmp_path / "report.pt", cwd=tmp_path)
    for report in torch.load(tmp_path / "report.pt"):
        for name, tensor in expected.items():
            torch.testing.assert_close(report[name], tensor)
        for name, tensor in model.state_dict().items():
            assert torch.equal(report["weights"][name], tensor), name
    saved = json.loads((again / "config.json").read_text())["auto_map"]
    assert set(saved) == ENTRIES
    assert not any("--" in entry for entry in saved.values()), saved  # its own files, not the first folder's
    assert {path.name for path in folder.glob("*_smoldriver.py")} == {path.name for path in again.glob("*.py")}


def test_auto_classes_load_where_the_package_is_imported(checkpoint):
    folder, model, processor = checkpoint
    assert type(AutoConfig.from_pretrained(folder)) is smoldriver_hf.SmolDriverConfig
    assert (
        type(AutoModelForImageTextToText.from_pretrained(folder)) is smoldriver_hf.SmolDriverForConditionalGeneration
    )
    assert type(AutoModel.from_pretrained(folder)) is smoldriver_hf.SmolDriverModel
    assert type(AutoProcessor.from_pretrained(folder)) is smoldriver_hf.SmolDriverProcessor
    assert type(AutoImageProcessor.from_pretrained(folder)) is smoldriver_hf.SmolDriverImageProcessor
    assert type(AutoModelForImageTextToText.from_config(model.config)) is type(model)


def test_pipeline(checkpoint):
    folder, model, processor = checkpoint
    ask = pipeline("image-text-to-text", model=str(folder))
    content = [{"type": "image", "camera": camera, "image": image} for camera, image in scene().items()]
    messages = [{"role": "user", "content": [*content[::-1], {"type": "text", "text": "Is it safe?"}]}]
    options = {"max_new_tokens": 5, "do_sample": False}
    answer = ask(text=messages, generate_kwargs=options, return_full_text=False)[0]["generated_text"]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["camera_ids"].tolist() == [5, 4, 3, 2, 1, 0]
    expected = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert answer == processor.batch_decode(expected, skip_special_tokens=True)[0]
    other = [{"role": "user", "content": [*content[:1], {"type": "text", "text": "Is it safe?"}]}]
    batch = ask(text=[messages, other], generate_kwargs=options, return_full_text=False, batch_size=1)
    assert [row[0]["generated_text"] for row in batch][0] == answer


def test_the_multimodal_door(checkpoint):
    """What the pipeline "any-to-any" loads; the pipeline itself needs torchvision."""
    folder, model, processor = checkpoint
    loaded = AutoModelForMultimodalLM.from_pretrained(folder)
    assert type(loaded) is type(model)
    inputs = processor(images=scene(), text="Is it safe?", return_tensors="pt")
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=4), model.generate(**inputs, max_new_tokens=4))


def test_checkpoints_of_before_get_the_new_entries():
    old = {name: entry for name, entry in SmolDriverConfig().auto_map.items() if name != "AutoModelForMultimodalLM"}
    assert set(SmolDriverConfig(auto_map=old).auto_map) == ENTRIES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_survive_the_round_trip(dtype, tmp_path):
    model = lively(tiny_model()).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("tower", tiny_towers())
def test_towers_of_every_kind_load_in_another_folder(tower, tmp_path):
    model = lively(tiny_model(vision_config=tiny_towers()[tower]))
    model.save_pretrained(tmp_path)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    pixels = torch.randn(6, 3, *[model.config.image_size] * 2, generator=torch.Generator().manual_seed(0))
    first, second = (
        part.get_image_features(pixels, return_dict=True).pooler_output for part in (model.eval(), loaded.eval())
    )
    assert torch.equal(first, second)


def test_sharded_checkpoints(tmp_path):
    model = lively(tiny_model(text_config=tiny_language_models()["gpt2"]))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_weight_names_name_their_camera(checkpoint):
    from safetensors.torch import load_file

    folder, *_ = checkpoint
    names = load_file(folder / "model.safetensors").keys()
    for camera in CAMERAS:
        assert f"model.multi_modal_projector.qformers.{camera}.queries" in names
    heads = {name.split(".")[1] for name in names if name.startswith("model.")}
    assert heads == {"vision_tower", "multi_modal_projector", "language_model"}
    assert "lm_head.weight" not in names  # tied: stored once
