"""Knowledge transfer from a tiny random teacher: targets, loss, held-out R², caching and resuming."""

import json
import shlex
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import picture, tiny_config, tiny_processor, tiny_text_config, tiny_tokenizer
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    TrainingArguments,
)
from trl import TrlParser

import training.transfer as stage
from smoldriver_hf import CAMERAS, SmolDriverForConditionalGeneration, SmolDriverProjectorConfig
from smoldriver_hf.projector_smoldriver import grid_points, spread_points
from training.data.rows import QUESTION_SCHEMA
from training.distillation.model import TransferModel
from training.distillation.targets import Targets
from training.distillation.teacher import Teacher, pooling_weights, resampled
from training.learning.collate import SceneCollator
from training.stages.files import read_notes
from training.transfer import TransferArguments, main

TEACHER_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """A SmolVLM with 6×6 patches, 3×3 visual tokens and the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    settings = {"vision_config": TEACHER_VISION, "text_config": tiny_text_config().to_dict(), "scale_factor": 2}
    model = SmolVLMForConditionalGeneration(SmolVLMConfig(**settings, image_token_id=3, tie_word_embeddings=False))
    model.save_pretrained(folder)
    Idefics3ImageProcessorPil().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared folder: four training and two validation frames, one of them without all cameras."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "images").mkdir()
    for split, numbers in {"train": range(4), "validation": range(4, 6)}.items():
        frames, questions = [], []
        for number in numbers:
            keys = {"scene_token": f"s{number}", "frame_token": f"f{number}"}
            cameras = CAMERAS if number % 2 == 0 else CAMERAS[:4]
            frames.append({**keys, **dict.fromkeys(CAMERAS)})
            for index, camera in enumerate(cameras):
                frames[-1][camera] = f"{number}-{camera}.png"
                picture(10 * number + index).save(folder / "images" / frames[-1][camera])
            for i, answer in enumerate(["Yes.", "A red truck.", ""]):
                row = {**keys, "question_id": f"{number}_{i}", "category": "perception", "tag": [0], "objects": []}
                questions.append({**row, "question": f"What is {i}?", "answer": answer})
        for name, rows, schema in (("frames", frames, None), ("questions", questions, QUESTION_SCHEMA)):
            (folder / name).mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / name / f"{split}-0.parquet")
    (folder / "dataset.json").write_text(json.dumps({"image_root": "images", "split_hash": "abc", "source": "tests"}))
    return str(folder)


def save_student(folder, connector):
    """With 8 nested queries, or a 4×4 square of them."""
    projector = SmolDriverProjectorConfig(
        hidden_size=32, num_attention_heads=2, intermediate_size=64, scale_factor=2, embedding_std=0.1
    )
    queries = 8 if connector == "linear" else 16
    config = tiny_config(projector_config=projector, max_queries=queries, connector=connector)
    torch.manual_seed(2)
    SmolDriverForConditionalGeneration(config).save_pretrained(folder)
    tiny_processor(config).save_pretrained(folder)
    return str(folder)


def run(student, teacher, data, output_dir, **changes):
    options = {name: changes.pop(name) for name in list(changes) if name in TransferArguments.__dataclass_fields__}
    training = {"max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "save_strategy": "no"}
    config = TrainingArguments(
        output_dir=str(output_dir), report_to="none", use_cpu=True, disable_tqdm=True, **{**training, **changes}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        final = main(TransferArguments(student=student, teacher=teacher, data=data, **options), config)
    return final, json.loads((output_dir / "transfer_metrics.json").read_text())


def weights_of(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def test_the_teachers_features_are_its_own(teacher_folder):
    """As its own forward computes them, apart from how a picture is resized."""
    pixels = torch.randn(2, 3, 24, 24)
    tokens = Teacher(teacher_folder, "linear")
    patches = Teacher(teacher_folder, "pixel_shuffle")
    expected = tokens.model.model.get_image_features(pixels[None])
    torch.testing.assert_close(tokens.seen(pixels), torch.stack(expected.pooler_output).view(2, 9, 32))
    torch.testing.assert_close(patches.seen(pixels), expected.last_hidden_state)
    assert (tokens.grid, patches.grid) == ((3, 3), (6, 6))
    assert tokens.fingerprint() != patches.fingerprint()
    hidden = tokens.model.model.vision_model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(tokens.seen(hidden=hidden), tokens.seen(pixels))
    with pytest.raises(ValueError, match="got neither"):
        tokens.seen()


def test_idefics3_is_a_teacher_and_others_are_not(tmp_path):
    settings = {"vision_config": TEACHER_VISION, "text_config": tiny_text_config().to_dict(), "scale_factor": 2}
    Idefics3ForConditionalGeneration(Idefics3Config(**settings, image_token_id=3)).save_pretrained(tmp_path / "a")
    Idefics3ImageProcessorPil().save_pretrained(tmp_path / "a")
    assert Teacher(str(tmp_path / "a"), "linear").grid == (3, 3)
    with pytest.raises(ValueError, match="one of .*smolvlm.*'smoldriver'"):
        Teacher(save_student(tmp_path / "b", "linear"), "linear")


def test_resampling_keeps_places():
    places = grid_points(6, 6)  # features that say where they are
    coarse = resampled(places[None], (6, 6), 3)[0]
    torch.testing.assert_close(coarse, grid_points(3, 3), atol=0.05, rtol=0)  # the border sees less of its kernel
    assert torch.equal(resampled(places[None], (6, 6), 6)[0], places)


def test_nested_targets_go_from_the_whole_to_the_parts():
    weights = pooling_weights(64, (16, 16))
    torch.testing.assert_close(weights.sum(1), torch.ones(64))
    torch.testing.assert_close(weights[0], torch.full((256,), 1 / 256))
    assert torch.equal(pooling_weights(8, (16, 16)), weights[:8]), "a target must not depend on the budget"
    places, points = grid_points(16, 16), spread_points(64)
    spread = ((weights @ places.square()) - (weights @ places).square()).sum(1)
    assert spread[0] > 3 * spread[8] > 3 * spread[63], "later tokens sum up smaller parts"
    assert ((weights[16:] @ places) - points[16:]).norm(dim=1).max() < 0.15, "around their own place"
    for budget in (4, 16, 64):  # together they cover the image
        share = weights[:budget] / weights[:budget].max(1, keepdim=True).values
        assert share.amax(0).min() > 0.1


def test_the_loss_compares_images_with_their_own_targets(tmp_path, teacher_folder):
    """In any order of cameras, for both connectors: with its own outputs as the target, the error is zero."""
    for connector, side in (("linear", None), ("pixel_shuffle", 4)):
        student = AutoModelForImageTextToText.from_pretrained(save_student(tmp_path / connector, connector)).eval()
        queries = student.config.max_queries
        weights = None if side else torch.ones(queries, 9)
        model = TransferModel(student, Targets(side, (3, 3), weights, scale=0.5))
        inputs = {"pixel_values": torch.randn(4, 3, 28, 28), "camera_ids": torch.tensor([5, 0, 3, 0])}
        target = torch.cat(
            [
                model.outputs(pixel_values=pixels[None], camera_ids=camera[None], num_queries=queries)
                for pixels, camera in zip(*inputs.values(), strict=True)
            ]
        ).detach()
        assert target.shape == (4, queries, 32)
        assert model(**inputs, target=target, num_queries=queries)["loss"] < 1e-8
        if connector == "linear":
            assert model(**inputs, target=target, num_queries=3)["loss"] < 1e-8
        else:
            tokens = student.get_image_features(**inputs).pooler_output
            expected = student.model.multi_modal_projector.connector(target * 0.5)
            torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-4)
        assert model(**inputs, target=target.flip(0), num_queries=queries)["loss"] > 1e-3


@pytest.mark.parametrize("connector", ["linear", "pixel_shuffle"])
def test_transfer_learns_and_tells(tmp_path, teacher_folder, data, connector):
    student = save_student(tmp_path / "student", connector)
    options = {"eval_split": "train", "max_steps": 40, "per_device_train_batch_size": 4, "learning_rate": 5e-3}
    final, metrics = run(student, teacher_folder, data, tmp_path / "out", **options)
    budgets = ["1", "2", "4", "8"] if connector == "linear" else ["16"]
    assert list(metrics["start"]) == list(metrics["end"]) == [f"held_out_r2_{budget}" for budget in budgets]
    for name, start in metrics["start"].items():
        assert start < 0.1 and metrics["end"][name] > start + 0.1, (name, start, metrics["end"][name])
    assert metrics["split_hash"] == "abc" and metrics["seed"] == 42 and metrics["steps"] == 40
    assert metrics["command"].startswith("python -m training.transfer") and metrics["versions"]["torch"]

    before, after = weights_of(student), weights_of(final)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert any(".vision_tower." in key for key in changed) and any(".qformers." in key for key in changed)
    assert not any("language_model" in key or "lm_head" in key for key in changed)
    assert any(".connector." in key for key in changed) == (connector == "linear")


@pytest.mark.parametrize("connector", ["linear", "pixel_shuffle"])
def test_r2_is_zero_for_the_training_mean_and_counts_every_token(
    tmp_path, teacher_folder, data, monkeypatch, connector
):
    student = save_student(tmp_path / "student", connector)
    options = {"eval_split": "train", "max_steps": 1, "learning_rate": 0}
    wrong = 0.0

    def mean(model, camera_ids, num_queries, **vision):
        """The mean, but for the first token."""
        weight = model.student.model.multi_modal_projector.qformers.CAM_FRONT.queries
        output = model.targets.mean[camera_ids][:, :num_queries] + 0 * weight.sum()
        return torch.cat([output[:, :1] + wrong, output[:, 1:]], dim=1)

    monkeypatch.setattr(TransferModel, "outputs", mean)
    _, metrics = run(student, teacher_folder, data, tmp_path / "mean", **options)
    assert list(metrics["start"].values()) == pytest.approx([0] * len(metrics["start"]), abs=1e-6)
    wrong = 1.0
    _, metrics = run(student, teacher_folder, data, tmp_path / "wrong", **options)
    by_budget = list(metrics["start"].values())
    assert by_budget == sorted(by_budget) and by_budget[-1] < -0.01, "one wrong token weighs less among more"


@pytest.mark.parametrize("train_tower", [True, False])
def test_cached_features_train_alike(tmp_path, teacher_folder, data, train_tower):
    student = save_student(tmp_path / "student", "linear")
    options = {"train_tower": train_tower, "num_queries": [2, 8]}
    live, told = run(student, teacher_folder, data, tmp_path / "live", **options)
    cache = str(tmp_path / "cache")
    cached, told_again = run(student, teacher_folder, data, tmp_path / "cached", feature_cache=cache, **options)
    for name in told["end"]:
        assert told["end"][name] == pytest.approx(told_again["end"][name], abs=2e-3)
    assert told["train_loss"] == pytest.approx(told_again["train_loss"], abs=2e-3)
    assert (tmp_path / "cache" / "student").exists() == (not train_tower)
    tower = "model.vision_tower.embeddings.patch_embeddings.projection.weight"
    assert torch.equal(weights_of(student)[tower], weights_of(cached)[tower]) == (not train_tower)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path, teacher_folder, data, monkeypatch):
    student = save_student(tmp_path / "student", "linear")
    options = {"num_train_epochs": 3, "max_steps": -1, "per_device_train_batch_size": 1, "save_steps": 5}
    options |= {"save_strategy": "steps", "num_queries": [1, 4, 8]}
    epochs = []
    set_epoch = SceneCollator.set_epoch

    def noted(collator, epoch):
        if len(collator.budgets) == 3:
            epochs.append(epoch)
        set_epoch(collator, epoch)

    monkeypatch.setattr(SceneCollator, "set_epoch", noted)
    whole, told = run(student, teacher_folder, data, tmp_path / "whole", **options)

    def kill(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(stage.JsonlCallback, "on_step_begin", kill)
        run(student, teacher_folder, data, tmp_path / "killed", **options)
    resumed, told_again = run(student, teacher_folder, data, tmp_path / "killed", **options)
    assert epochs[:3] == [0, 1, 2] and epochs[-2:] == [1, 2], "a frame meets other budgets later"
    assert told["start"] == told_again["start"] and told["end"] == told_again["end"]
    one, other = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_checkpoints_are_whole_and_a_bad_loss_names_the_last(tmp_path, teacher_folder, data, monkeypatch):
    student = save_student(tmp_path / "student", "linear")
    options = {"save_strategy": "steps", "save_steps": 1}
    original, steps = TransferModel.forward, []

    def poisoned(self, *args, **kwargs):
        steps.append(1)
        losses = original(self, *args, **kwargs)
        return {"loss": losses["loss"] * float("nan")} if len(steps) == 3 else losses

    with monkeypatch.context() as patched:
        patched.setattr(TransferModel, "forward", poisoned)
        with pytest.raises(FloatingPointError, match="nan in step 3; the last whole checkpoint is .*checkpoint-2"):
            run(student, teacher_folder, data, tmp_path / "out", **options)
    assert sorted(path.name for path in (tmp_path / "out").glob("check*")) == ["checkpoint-1", "checkpoint-2"]
    with monkeypatch.context() as patched:
        patched.setattr(stage, "save_whole", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="the disk of .* is full .* goes on from .*checkpoint-3"):
            run(student, teacher_folder, data, tmp_path / "out", **options)


def test_a_transfer_that_has_ended_is_not_repeated(tmp_path, teacher_folder, data, capsys):
    student = save_student(tmp_path / "student", "linear")
    final, metrics = run(student, teacher_folder, data, tmp_path / "out", max_steps=1)
    assert run(student, teacher_folder, data, tmp_path / "out", max_steps=1)[0] == final
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="train_tower was True, is False"):
        run(student, teacher_folder, data, tmp_path / "out", max_steps=1, train_tower=False)
    (note,) = read_notes(final)
    assert note == {**metrics, "history": []} and note["made_from"] == [student, teacher_folder]
    read, config = TrlParser((TransferArguments, TrainingArguments)).parse_args_and_config(
        shlex.split(note["command"])[3:]
    )
    assert read.__dict__ == note["arguments"] and config.max_steps == 1 and config.remove_unused_columns


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_queries": [1, 9]}, "num_queries must lie between 1 and 8"),
        ({"eval_split": "test"}, "no frames for split 'test'"),
    ],
)
def test_mistakes_fail_before_the_first_step(tmp_path, teacher_folder, data, changes, message):
    student = save_student(tmp_path / "student", "linear")
    with pytest.raises(ValueError, match=message):
        run(student, teacher_folder, data, tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "transfer_metrics.json").exists()


def test_widths_must_fit(tmp_path, teacher_folder, data):
    config = tiny_config(text_config=tiny_text_config(hidden_size=64))
    SmolDriverForConditionalGeneration(config).save_pretrained(tmp_path / "student")
    tiny_processor(config).save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="text hidden_size is 64, the teacher's features have width 32"):
        run(str(tmp_path / "student"), teacher_folder, data, tmp_path / "out")
