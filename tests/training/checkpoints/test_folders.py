"""Checkpoint folders: what a stage has made is not made again, and nothing else is taken for it."""

from dataclasses import dataclass

import pytest
import torch

from training.checkpoints.folders import dtype_named, is_saved, save_whole
from training.stages.files import make_note


@dataclass
class Arguments:
    output_dir: str
    seed: int = 0


class Part:
    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")


def test_a_saved_checkpoint_is_known_wherever_it_lies(tmp_path, capsys):
    args = Arguments(str(tmp_path / "out"))
    assert not is_saved("stage", args)
    save_whole(args.output_dir, Part(), note=make_note("stage", args))
    assert is_saved("stage", args) and "nothing to do" in capsys.readouterr().out
    (tmp_path / "out").rename(tmp_path / "moved")
    assert is_saved("stage", Arguments(str(tmp_path / "moved")))
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        is_saved("stage", Arguments(str(tmp_path / "moved"), seed=1))
    with pytest.raises(ValueError, match="does not tell what it came from"):
        is_saved("other", Arguments(str(tmp_path / "moved")))
    with pytest.raises(ValueError, match="holds files already"):
        save_whole(tmp_path / "moved", Part(), note=make_note("stage", args))


def test_types_of_saved_weights():
    assert dtype_named("bfloat16") is torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be bfloat16 or float32; got 'float16'"):
        dtype_named("float16")
