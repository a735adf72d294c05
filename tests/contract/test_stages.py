"""A checkpoint that the stages made is exported: every stage is told, with a command that its own parser takes."""

import json
import shlex
from importlib import import_module

import pytest
from exported import export
from prepared import write_prepared
from tiny import tiny_text_config, tiny_tokenizer, tiny_vision_config
from transformers import Dinov2Model, HfArgumentParser, LlamaForCausalLM, ViTImageProcessor
from trl import SFTConfig

from training import assemble, finetune, merge

PARSED_BY = {
    "assemble": [assemble.AssembleArguments],
    "finetune": [finetune.FinetuneArguments, SFTConfig],
    "merge": [merge.MergeArguments],
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    root = tmp_path_factory.mktemp("stages")
    Dinov2Model(tiny_vision_config()).save_pretrained(root / "vision")
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(root / "vision")
    LlamaForCausalLM(tiny_text_config()).save_pretrained(root / "text")
    tiny_tokenizer().save_pretrained(root / "text")
    data = write_prepared(root / "data", splits=("train", "validation"))
    made = assemble.main(
        assemble.AssembleArguments(
            output_dir=str(root / "initial"), vision=str(root / "vision"), text=str(root / "text"), max_queries=8
        )
    )
    config = SFTConfig(
        output_dir=str(root / "adapt"), max_steps=1, use_cpu=True, bf16=False, report_to="none", learning_rate=1e-3
    )
    finetune.main(finetune.FinetuneArguments(checkpoint=str(made), data=str(data), language_model="lora"), config)
    return merge.main(merge.MergeArguments(str(made), str(root / "adapt" / "adapter"), str(root / "merged")))


def test_card_and_notes_name_every_stage_with_commands_that_exist(merged, tmp_path):
    folder = export(tmp_path / "smoldriver", merged, license="mit")
    card = (folder / "README.md").read_text()
    notes = [json.loads(path.read_text()) for path in sorted((folder / "recipe").iterdir())]
    assert [note["stage"] for note in notes] == ["assemble", "finetune", "merge"]
    assert notes[1]["trained_on"]["generated"] is False
    for note in notes:
        assert note["command"] in card
        python, option, module, *words = shlex.split(note["command"])
        assert (python, option, module) == ("python", "-m", f"training.{note['stage']}") and import_module(module)
        args = HfArgumentParser(PARSED_BY[note["stage"]]).parse_args_into_dataclasses(words)[0]
        published = {key: value for key, value in vars(args).items() if value != note["arguments"][key]}
        assert not published, f"the command does not say these arguments: {published}"
    assert "Stage finetune trained on `data`, which is not a generated world" in card
