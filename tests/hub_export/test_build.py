import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from exported import export, save_checkpoint, save_world
from safetensors.torch import load_file, save_file
from tiny import CAMERAS, scene

from hub_export import build, check
from hub_export.build import BuildArguments, load_source
from hub_export.check import CheckArguments, environment_with, read_stamp
from smoldriver_hf import SmolDriverForConditionalGeneration, SmolDriverProcessor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "final")


@pytest.fixture(scope="module")
def built(tmp_path_factory, checkpoint):
    """Through the command line, with everything that a repository can have, and a real check."""
    root = tmp_path_factory.mktemp("built")
    (checkpoint / "finetune.json").write_text(
        json.dumps({"command": f"python -m training.finetune --checkpoint {root}/initial", "steps": 12, "seed": 3})
    )
    world = save_world(root / "world")
    command = [sys.executable, "-m", "hub_export", "build", "--checkpoint", checkpoint, "--out", root / "smoldriver"]
    options = ["--license", "cc-by-nc-sa-4.0", "--only_installed"]
    subprocess.run([*command, "--examples", world, *options], check=True, cwd=ROOT)
    return root / "smoldriver"


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_build_is_a_whole_repository_and_nothing_else(built):
    examples = [f"demo/examples/0/{camera}.jpg" for camera in CAMERAS]
    examples += [f"demo/examples/1/{camera}.jpg" for camera in CAMERAS if camera != "CAM_BACK"]
    code = {path.name for path in (ROOT / "smoldriver_hf").glob("*_smoldriver.py")}
    assert files_of(built) == {
        *code,
        *examples,
        *("README.md", "LICENSE", "requirements.txt", "config.json", "generation_config.json", "model.safetensors"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        "recipe/1-finetune.json",
        *("picture.png", "demo/app.py", "demo/README.md", "demo/requirements.txt", "demo/examples/examples.json"),
        *(".hub_export/reference.safetensors", ".hub_export/stamp.json"),
    }
    assert not built.with_name("smoldriver.unfinished").exists()


def test_the_stamp_tells_what_passed_and_covers_every_published_file(built):
    stamp = read_stamp(built)
    assert set(stamp["files"]) == {name for name in files_of(built) if not name.startswith(".hub_export")}
    (environment,) = stamp["environments"]
    passed = [check["check"] for check in environment["passed"]]
    assert passed == [
        "refused without trust_remote_code",
        "AutoConfig, AutoImageProcessor and AutoProcessor",
        "AutoModel",
        "AutoModelForImageTextToText, fp32 logits",
        "generate",
        "pipeline",
        "saved again and reloaded",
        "bf16",
        "NF4",
    ]


def test_a_changed_file_voids_the_stamp(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "copy")
    read_stamp(copy)
    (copy / "README.md").write_text("better")
    (copy / "extra.txt").write_text("more")
    with pytest.raises(ValueError, match="README.md, extra.txt"):
        read_stamp(copy)
    with pytest.raises(ValueError, match="no stamp"):
        read_stamp(tmp_path)


def test_the_check_sees_weights_that_are_not_the_sources(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    weights["model.multi_modal_projector.connector.proj.bias"] += 1e-2
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="hidden states differ from the source's"):
        check.main(CheckArguments(str(copy), only_installed=True))
    assert not (copy / check.STAMP).exists()


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["AutoModel", "AutoImageProcessor"])
def test_the_check_sees_a_missing_auto_class(built, tmp_path, missing):
    copy = shutil.copytree(built, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    del config["auto_map"][missing]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="auto_map"):
        check.main(CheckArguments(str(copy), only_installed=True))


@pytest.mark.slow
def test_the_check_sees_a_missing_tensor_and_code_that_needs_the_network(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["model.multi_modal_projector.connector.proj.bias"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing_keys"):
        check.main(CheckArguments(str(copy), only_installed=True))
    shutil.copyfile(built / "model.safetensors", copy / "model.safetensors")
    code = copy / "modeling_smoldriver.py"
    code.write_text("import socket\nsocket.create_connection(('127.0.0.1', 9))\n" + code.read_text())
    with pytest.raises(ValueError, match="must load without network"):
        check.main(CheckArguments(str(copy), only_installed=True))


@pytest.mark.slow
def test_the_oldest_transformers_loads_it_too(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "copy")
    other = environment_with(check.OLDEST_TRANSFORMERS)  # fetched by pip
    stamp = check.main(CheckArguments(str(copy), only_installed=True, python=[str(other)]))
    versions = [environment["versions"]["transformers"] for environment in stamp["environments"]]
    assert versions[1] == check.OLDEST_TRANSFORMERS != versions[0]


def test_the_published_configuration_names_all_auto_classes_and_no_place_of_this_machine(built):
    config = json.loads((built / "config.json").read_text())
    assert set(config["auto_map"]) == {
        *("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
        *("AutoProcessor", "AutoImageProcessor"),
    }
    note = json.loads((built / "recipe" / "1-finetune.json").read_text())
    assert note["command"] == "python -m training.finetune --checkpoint initial"


def test_the_cards_snippet_runs_as_it_stands(built, tmp_path):
    text = (built / "README.md").read_text()
    snippet = text.split("```python\n")[1].split("```")[0]
    for camera, image in scene().items():
        image.save(tmp_path / f"{camera}.jpg")
    os.symlink(built, tmp_path / "smoldriver")  # the name in the card
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", snippet], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    processor = SmolDriverProcessor.from_pretrained(built)
    model = SmolDriverForConditionalGeneration.from_pretrained(built)
    images = {camera: str(tmp_path / f"{camera}.jpg") for camera in CAMERAS}
    inputs = processor(images=images, text="What is in front of the ego car?", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
    assert done.stdout == processor.decode(output, skip_special_tokens=True) + "\n"


def test_the_card_is_made_of_what_is_there(built):
    text = (built / "README.md").read_text()
    assert "picture.png" in text and "published without an evaluation" in text and "No cost was measured" in text
    assert "- steps: 12" in text and "(recipe/1-finetune.json)" in text
    total = sum(tensor.numel() for tensor in load_file(built / "model.safetensors").values())
    assert f"{total / 1e6:.1f} M" in text


def test_examples_carry_the_models_own_answers(built):
    examples = json.loads((built / "demo" / "examples" / "examples.json").read_text())
    model = SmolDriverForConditionalGeneration.from_pretrained(built).eval()
    processor = SmolDriverProcessor.from_pretrained(built)
    for example in examples:
        images = {camera: str(built / "demo" / "examples" / path) for camera, path in example["images"].items()}
        answer = model.encode_scene(images, processor).ask(example["question"], max_new_tokens=32)
        assert (example["question"], example["answer"]) == ("Is there a car?", answer)
        assert (example["reference"], example["split"]) == ("Yes.", None)


def test_an_adapter_is_merged_into_bf16(checkpoint, tmp_path):
    model = SmolDriverForConditionalGeneration.from_pretrained(checkpoint)
    lora = peft.LoraConfig(r=4, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(4, 20)[None]
    merged = adapted.merge_and_unload()
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    wanted = merged(input_ids=ids).logits

    folder = export(tmp_path / "out", checkpoint, adapter=str(tmp_path / "adapter"))
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = SmolDriverForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(loaded(input_ids=ids).logits, wanted)
    reference = load_file(folder / ".hub_export" / "reference.safetensors")
    inputs = {name: reference[name] for name in ("input_ids", "attention_mask", "pixel_values", "camera_ids")}
    torch.testing.assert_close(loaded(**inputs).logits[:, -4:], reference["logits"], rtol=0, atol=1e-5)
    base = SmolDriverForConditionalGeneration.from_pretrained(checkpoint)
    assert not torch.allclose(base(input_ids=ids).logits, wanted, atol=1e-2)


def test_sources_that_are_not_sound_are_refused(checkpoint, tmp_path):
    def source(**options):
        return load_source(BuildArguments(out="x", **{"checkpoint": str(checkpoint), **options}))

    with pytest.raises(ValueError, match="no config.json"):
        source(checkpoint=str(tmp_path))
    pickled = shutil.copytree(checkpoint, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no safetensors"):
        source(checkpoint=str(pickled))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="no safetensors"):
        source(adapter=str(tmp_path / "adapter"))
    incomplete = shutil.copytree(checkpoint, tmp_path / "incomplete")
    weights = load_file(incomplete / "model.safetensors")
    del weights["model.vision_tower.layernorm.weight"]
    save_file(weights, incomplete / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights are missing: model.vision_tower.layernorm.weight"):
        source(checkpoint=str(incomplete))


def test_a_build_never_overwrites_and_leaves_no_folder_when_it_fails(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists"):
        build.main(BuildArguments(str(checkpoint), str(tmp_path / "out")))
    world = save_world(tmp_path / "world")
    (world / "toyworld.json").unlink()
    with pytest.raises(ValueError, match="toyworld.json"):
        build.main(BuildArguments(str(checkpoint), str(tmp_path / "new"), examples=str(world), license="mit"))
    assert not (tmp_path / "new").exists()


def test_requirements_are_those_of_the_package():
    wanted = (ROOT / "setup.cfg").read_text().split("install_requires =")[1].split("\n\n")[0].split()
    assert (ROOT / "hub_export" / "templates" / "requirements.txt").read_text().split() == wanted
    assert set(wanted) < set((ROOT / "hub_export" / "templates" / "demo_requirements.txt").read_text().split())
