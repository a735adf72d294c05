"""Whole writes, whether a result is done, and notes whose commands a stage's own parser reads."""

import json
import shlex
from dataclasses import dataclass, field

import pytest
from prepared import write_prepared
from transformers import HfArgumentParser
from trl import SFTConfig, TrlParser

from training.finetune import FinetuneArguments
from training.stages.files import command_of, history, is_done, make_note, read_notes, whole, write_json, write_note


@dataclass
class StageArguments:
    checkpoint: str = field()
    data: str = field()
    cameras: list[str] | None = None
    merge: bool = True
    fast: bool = False
    rate: float = 1e-4


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    file = tmp_path / "deep" / "a.json"
    write_json(file, {"a": "ä"})
    assert file.read_text(encoding="utf-8") == '{\n  "a": "ä"\n}\n'
    with pytest.raises(RuntimeError), whole(file) as unfinished:
        assert unfinished.suffix == ".json"
        unfinished.write_text("half")
        raise RuntimeError
    assert json.loads(file.read_text()) == {"a": "ä"} and list(file.parent.iterdir()) == [file]


def test_a_folder_appears_whole_and_replaces_only_an_empty_one(tmp_path):
    target = tmp_path / "result"
    target.mkdir()
    for _ in range(2):
        try:
            with whole(target) as unfinished:
                unfinished.mkdir()
                (unfinished / "weights").write_text("w")
        except ValueError as error:
            assert "holds files already; name another folder" in str(error)
            break
    else:
        raise AssertionError("a folder that holds something was replaced")
    assert [path.name for path in tmp_path.iterdir()] == ["result"] and (target / "weights").exists()


def test_what_is_done_is_skipped_and_a_difference_is_named(tmp_path):
    now = {"seed": 0, "pair": (1, 2)}
    assert not is_done(False, None, now, tmp_path)
    assert is_done(True, {"seed": 0, "pair": [1, 2]}, now, tmp_path)
    with pytest.raises(ValueError, match="seed was 1, is 0"):
        is_done(True, {"seed": 1, "pair": [1, 2]}, now, tmp_path)
    with pytest.raises(ValueError, match="was None, is 0"):  # an argument that is new
        is_done(True, {"pair": [1, 2]}, now, tmp_path)
    with pytest.raises(ValueError, match="does not tell what it came from"):
        is_done(True, None, now, tmp_path)


def test_a_command_is_read_back_by_the_stages_parser():
    arguments = StageArguments("my base", "d", cameras=["CAM_FRONT", "CAM_BACK"], merge=False, fast=True)
    words = shlex.split(command_of("stage", arguments))
    assert words[:3] == ["python", "-m", "training.stage"] and "--rate" not in words
    (read,) = HfArgumentParser(StageArguments).parse_args_into_dataclasses(words[3:])
    assert read == arguments


def test_a_command_holds_what_was_changed_of_transformers_own_arguments(tmp_path):
    config = SFTConfig(
        output_dir=str(tmp_path), learning_rate=3e-4, use_cpu=True, bf16=False, lr_scheduler_type="cosine"
    )
    command = command_of("finetune", FinetuneArguments("c", "d"), config)
    read, again = TrlParser((FinetuneArguments, SFTConfig)).parse_args_and_config(shlex.split(command)[3:])
    assert read == FinetuneArguments("c", "d") and "--weight_decay" not in command
    for name in ("output_dir", "learning_rate", "use_cpu", "bf16", "lr_scheduler_type"):
        assert getattr(again, name) == getattr(config, name), name


def test_a_note_carries_the_notes_of_what_it_was_made_from(tmp_path):
    data = write_prepared(tmp_path / "data", frames=1, questions=1)
    (tmp_path / "base").mkdir()
    write_note(tmp_path / "base", make_note("toyworld.smolvlm", StageArguments("x", "d"), parts=["Of a wheel."]))
    (tmp_path / "base" / "config.json").write_text("{}")  # JSON that is no note
    (tmp_path / "next").mkdir()
    note = make_note("align", StageArguments("x", "d"), made_from=[tmp_path / "base", None], trained_on=data, steps=3)
    write_note(tmp_path / "next", note)
    (found,) = read_notes(tmp_path / "next")
    assert found == note and found["steps"] == 3 and found["made_from"] == [str(tmp_path / "base")]
    assert found["trained_on"] == {
        "data": str(data), "split_hash": "1x1x6", "source": "tests", "generated": False,
    }  # fmt: skip
    assert [one["stage"] for one in history(tmp_path / "next")] == ["smolvlm", "align"]
    assert [one["stage"] for one in found["history"]] == ["smolvlm"] and found["history"][0]["parts"] == [
        "Of a wheel."
    ]


def test_a_generated_world_is_told_by_the_prepared_data_or_their_images(tmp_path):
    for number, (key, file, expected) in enumerate([(None, True, True), (None, False, False), (True, False, True)]):
        data = write_prepared(tmp_path / str(number), frames=1, questions=1)
        info = json.loads((data / "dataset.json").read_text())
        (data / "dataset.json").write_text(json.dumps({**info, **({"generated": key} if key is not None else {})}))
        if file:
            (data / "images" / "toyworld.json").write_text("{}")
        note = make_note("stage", StageArguments("c", "d"), trained_on=data)
        assert note["trained_on"]["generated"] is expected
