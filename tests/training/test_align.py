"""Aligning: only the connector changes, it learns what listings say, a kill costs nothing, bad data is refused."""

import json
from pathlib import Path

import pytest
import torch
from prepared import write_prepared, write_smolvlm
from safetensors.torch import load_file
from transformers import TrainingArguments

from training import align, prepare, toyworld
from training.align import AlignArguments, balanced_accuracy, shown_classes
from training.questions import STATUSES


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("align")
    settings = {"seed": 3, "width": 160, "num_workers": 1}
    toyworld.main(toyworld.ToyWorldArguments(scenes=4, output_dir=str(root / "world"), **settings))
    pictures = str(root / "world" / "pictures.json")
    prepare.main(
        prepare.PrepareArguments(
            drivelm_json=pictures, image_root=str(root / "world"), output_dir=str(root / "pictures"), split="train"
        )
    )
    write_smolvlm(root / "smolvlm")
    return root


def run(root: Path, output_dir: Path, **config) -> Path:
    args = AlignArguments(str(root / "smolvlm"), str(root / "pictures"), str(root / "features"))
    settings = {"use_cpu": True, "report_to": "none", "max_steps": 4, "save_steps": 2, "logging_steps": 1}
    settings |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 0}
    return align.main(args, TrainingArguments(output_dir=str(output_dir), **{**settings, **config}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_only_the_connector_learns_and_it_does(root, tmp_path):
    final = run(root, tmp_path / "run", max_steps=30)
    before, after = weights(root / "smolvlm"), weights(final)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("connector" in name for name in changed)
    losses = [
        line["loss"]
        for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    ]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    notes = json.loads((final / "align.json").read_text())
    assert notes["steps"] == 30 and 0 <= notes["held_out"]["balanced_accuracy"]["present"] <= 1
    assert run(root, tmp_path / "run", max_steps=30) == final  # nothing to do


def test_a_killed_run_ends_with_the_same_weights(root, tmp_path):
    whole = weights(run(root, tmp_path / "whole"))

    class Killed(Exception):
        pass

    class StopsAfterTwo(align.AlignTrainer):
        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise Killed
            return super().compute_loss(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "AlignTrainer", StopsAfterTwo)
        with pytest.raises(Killed):
            run(root, tmp_path / "killed")
    resumed = weights(run(root, tmp_path / "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_listings_become_classes():
    names = list(STATUSES)
    shown = shown_classes("One car, two barriers.")
    assert [names[index // 2] for index, value in enumerate(shown) if value] == ["car", "barrier", "barrier"]
    assert sum(shown_classes("Nothing.")) == 0 and sum(shown_classes("Many pedestrians.")) == 2
    with pytest.raises(ValueError, match="expected a listing like"):
        shown_classes("A fine day.")


def test_data_without_listings_is_refused(root, tmp_path):
    write_prepared(tmp_path / "data")
    args = AlignArguments(str(root / "smolvlm"), str(tmp_path / "data"), str(tmp_path / "features"))
    with pytest.raises(ValueError, match="has no question 'Name everything in the picture.'"):
        align.main(args, TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none"))


def test_balanced_accuracy_by_hand():
    labels = torch.zeros(4, 2 * len(STATUSES))
    labels[:2, 0] = 1  # the first class is in two pictures of four; nothing else is anywhere
    logits = torch.full_like(labels, -1.0)
    logits[0, 0] = 1
    assert balanced_accuracy(logits, labels) == {
        "present": pytest.approx(0.75),
        "several": pytest.approx(float("nan"), nan_ok=True),
    }
