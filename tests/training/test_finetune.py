"""Fine-tuning runs: what trains, what is saved, what is logged, and how a run ends that cannot go on."""

import json
import shlex
import shutil
from pathlib import Path

import prepared
import pytest
import torch
from prepared import write_prepared, write_smoldriver, write_smolvlm
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, TrlParser

from training import finetune, merge
from training.data.rows import load_rows
from training.finetune import FinetuneArguments
from training.learning import callbacks, trainer
from training.learning.collate import SceneCollator
from training.learning.trainer import last_checkpoint
from training.stages.files import make_note, read_notes, write_note


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("finetune")
    write_prepared(root / "data", splits=("train", "validation"))
    write_smoldriver(root / "smoldriver")
    write_smoldriver(root / "wide", **wide())
    write_smolvlm(root / "smolvlm")
    return root


def wide():
    """Dimensions that NF4 blocks of 64 weights divide."""
    from tiny import tiny_text_config

    return {"text_config": tiny_text_config(hidden_size=64, intermediate_size=128)}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing takes longer than these runs."""
    monkeypatch.setattr(finetune, "loss_curve", lambda *_: None)


def run(root: Path, output_dir: Path, checkpoint="smoldriver", config=None, **changes) -> Path:
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "max_steps": 4}
    settings |= {"save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    args = FinetuneArguments(checkpoint=str(root / checkpoint), data=str(root / "data"), **changes)
    return finetune.main(args, SFTConfig(output_dir=str(output_dir), **{**settings, **(config or {})}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {key for key in old if not torch.equal(old[key], new[key])}


def lines(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def test_healing_trains_tower_and_projector_at_drawn_budgets(root, tmp_path, monkeypatch):
    budgets = []
    original = SceneCollator.draw_budget
    monkeypatch.setattr(
        SceneCollator,
        "draw_budget",
        lambda self, examples: budgets.append(original(self, examples)) or budgets[-1],
    )
    final = run(
        root,
        tmp_path / "heal",
        tower="full",
        projector="full",
        language_model="frozen",
        num_queries=[1, 2, 8],
        config={"per_device_train_batch_size": 1, "max_steps": 24},
    )
    assert set(budgets) == {1, 2, 8}
    names = changed(root / "smoldriver", final)
    assert any(name.startswith("model.vision_tower.") for name in names)
    assert {name.split(".")[3] for name in names if ".qformers." in name} == {
        "CAM_FRONT_LEFT",
        "CAM_FRONT",
        "CAM_FRONT_RIGHT",
        "CAM_BACK_LEFT",
        "CAM_BACK",
        "CAM_BACK_RIGHT",
    }
    assert all(
        f"model.multi_modal_projector.qformers.{camera}.queries" in names for camera in ("CAM_FRONT", "CAM_BACK")
    )
    assert not any(name.startswith(("model.language_model", "lm_head")) for name in names)
    assert not (tmp_path / "heal" / "adapter").exists()


def test_adapters_are_merged_and_the_tower_stays(root, tmp_path, capsys):
    final = run(
        root, tmp_path / "run", pairs_per_sequence=4, eval_split="validation", config={"eval_strategy": "steps"}
    )
    names = changed(root / "smoldriver", final)
    assert not any(name.startswith("model.vision_tower.") for name in names)
    touched = {name.split(".")[-2] for name in names if name.startswith("model.language_model.layers")}
    assert touched == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert "model.multi_modal_projector.qformers.CAM_BACK.queries" in names
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any("lora_A" in name for name in adapter) and any("multi_modal_projector" in name for name in adapter)

    again = merge.main(
        merge.MergeArguments(
            str(root / "smoldriver"), str(tmp_path / "run" / "adapter"), str(tmp_path / "merged"), "float32"
        )
    )
    assert changed(final, again) == set()
    notes = json.loads((final / "finetune.json").read_text())
    assert notes["split_hash"] == "4x4x6" and notes["steps"] == 4
    assert notes["last"]["loss"] < notes["first"]["loss"]
    assert "eval_loss" in notes["last"]
    assert run(root, tmp_path / "run", pairs_per_sequence=4, eval_split="validation") == final
    assert "nothing to do" in capsys.readouterr().out


def test_the_note_tells_the_way_here(root, tmp_path):
    start = shutil.copytree(root / "smoldriver", tmp_path / "start")
    write_note(start, make_note("assemble", FinetuneArguments("parts", "-"), parts=["From a wheel."]))
    final = run(root, tmp_path / "run", start, config={"max_steps": 1})
    merged = merge.main(merge.MergeArguments(str(start), str(tmp_path / "run" / "adapter"), str(tmp_path / "merged")))
    (note,) = read_notes(final)
    assert note["stage"] == "finetune" and note["made_from"] == [str(start)]
    assert note["trained_on"]["data"] == str(root / "data") and note["trained_on"]["generated"] is False
    read, config = TrlParser((FinetuneArguments, SFTConfig)).parse_args_and_config(shlex.split(note["command"])[3:])
    assert read.__dict__ == note["arguments"]
    assert (config.max_steps, config.learning_rate, config.use_cpu, config.bf16) == (1, 1e-2, True, False)
    assert config.max_length is not None, "what the stage itself sets was not asked for"
    stages = [[before["stage"] for before in one["history"]] for one in (note, *read_notes(merged))]
    assert stages == [["assemble"], ["assemble", "finetune"]]


def test_words_are_drawn_by_epoch_and_the_same_after_a_kill(root, tmp_path, monkeypatch):
    asked = [
        ("Are there cars to the back of the ego car?", "Yes."),
        ("What are objects to the left of the ego car?", "A."),
    ]
    monkeypatch.setattr(prepared, "QUESTIONS", asked)
    write_prepared(tmp_path / "data", frames=3, questions=2)
    config = {"num_train_epochs": 3, "max_steps": -1, "per_device_train_batch_size": 2}
    met = []
    original = SceneCollator.in_other_words
    monkeypatch.setattr(
        SceneCollator, "in_other_words", lambda self, example: met.append(original(self, example)) or met[-1]
    )

    def go(name: str, **changes) -> dict[str, torch.Tensor]:
        return weights(run(tmp_path, tmp_path / name, root / "smoldriver", config=config, **changes))

    whole = go("whole", reword=0.9)
    words = {question for example in met for question, _ in example["pairs"]}
    assert len(words - dict(asked).keys()) > 6  # of six questions in three epochs
    with monkeypatch.context() as patch:
        step = trainer.SceneTrainer.compute_loss

        def dies(self, *args, **kwargs):
            if self.state.global_step == 5:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        patch.setattr(trainer.SceneTrainer, "compute_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            go("killed", reword=0.9)
    resumed, plain = go("killed", reword=0.9), go("plain")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], plain[name]) for name in whole)


def test_a_run_that_has_ended_is_repeated_for_nothing_else(root, tmp_path, capsys):
    final = run(root, tmp_path / "run", config={"max_steps": 1})
    assert run(root, tmp_path / "run", config={"max_steps": 1}) == final
    assert "nothing to do" in capsys.readouterr().out
    for changes, message in (
        ({"config": {"max_steps": 2}}, "max_steps was 1, is 2"),
        ({"config": {"max_steps": 1}, "questions": "bus"}, "questions_like was None, is 'bus'"),
        ({"config": {"max_steps": 1}, "checkpoint": "wide"}, "checkpoint was .*smoldriver', is .*wide"),
    ):
        with pytest.raises(ValueError, match=message):
            run(root, tmp_path / "run", **changes)
    file = tmp_path / "run" / "arguments.json"
    older = json.loads(file.read_text())
    del older["checkpoint"], older["max_steps"]  # which older runs did not write down
    file.write_text(json.dumps(older))
    assert run(root, tmp_path / "run", config={"max_steps": 2}) == final
    file.unlink()
    with pytest.raises(ValueError, match="does not tell what it came from"):
        run(root, tmp_path / "run", config={"max_steps": 1})


def test_the_saved_model_is_the_one_in_memory(root, tmp_path, monkeypatch):
    """Loss of the trained model with its adapter, before it is saved, and of the reloaded merged checkpoint."""
    seen = {}
    original = finetune.finish

    def finish(trained, *rest):
        batch = trained.data_collator([trained.train_dataset[0]])
        with torch.no_grad():
            seen["loss"], seen["batch"] = trained.model.eval()(**batch).loss.item(), batch
        original(trained, *rest)

    monkeypatch.setattr(finetune, "finish", finish)
    final = run(root, tmp_path / "run", pairs_per_sequence=4, lora_dropout=0.0)
    with torch.no_grad():
        loss = AutoModelForImageTextToText.from_pretrained(final)(**seen["batch"]).loss.item()
    assert loss == pytest.approx(seen["loss"], abs=1e-5)


def test_qlora_in_float32(root, tmp_path):
    """For processors that have no bf16 arithmetic."""
    final = run(root, tmp_path / "run", "wide", load_in_4bit=True, pairs_per_sequence=4, train_embeddings=True)
    loss = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
    assert loss[-1] < loss[0]
    assert AutoModelForImageTextToText.from_pretrained(final).dtype == torch.float32


def test_qlora_on_nf4_weights(root, tmp_path, monkeypatch):
    types = {}
    original = finetune.finish

    def finish(trained, *rest):
        for name, module in trained.model.named_modules():
            if type(module).__name__ == "Linear4bit":
                types.setdefault("4bit", set()).add(
                    next(part for part in name.split(".") if part != "base_model" and part != "model")
                )
        types["trained"] = {weight.dtype for weight in trained.model.parameters() if weight.requires_grad}
        original(trained, *rest)

    monkeypatch.setattr(finetune, "finish", finish)
    final = run(root, tmp_path / "run", "wide", load_in_4bit=True, pairs_per_sequence=4, config={"bf16": True})
    assert types["4bit"] == {"language_model"} and types["trained"] == {torch.float32}
    loss = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
    assert loss[-1] < loss[0]

    base = AutoModelForImageTextToText.from_pretrained(root / "wide").to(torch.bfloat16)
    model = AutoModelForImageTextToText.from_pretrained(final)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    memory = merge.merged(str(root / "wide"), tmp_path / "run" / "adapter", torch.bfloat16).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, memory[name]), name
    for name, weight in model.model.vision_tower.named_parameters():
        assert torch.equal(weight, base.model.vision_tower.get_parameter(name)), name
    assert not torch.equal(
        model.model.language_model.layers[0].mlp.up_proj.weight, base.model.language_model.layers[0].mlp.up_proj.weight
    )


@pytest.mark.parametrize("pairs", [1, 4])
def test_the_baseline_trains_with_transformers_own_classes(root, tmp_path, pairs):
    final = run(root, tmp_path / "run", "smolvlm", pairs_per_sequence=pairs)
    model = AutoModelForImageTextToText.from_pretrained(final)
    assert type(model).__module__ == "transformers.models.smolvlm.modeling_smolvlm"
    assert AutoProcessor.from_pretrained(final).chat_template
    names = changed(root / "smolvlm", final)
    assert "model.connector.modality_projection.proj.weight" in names
    assert any(name.startswith("model.text_model.layers") for name in names)
    assert not any(name.startswith("model.vision_model") for name in names)


def test_blind_controls_train_alike(root, tmp_path):
    text = run(root, tmp_path / "text", blind="text", config={"max_steps": 1})
    assert not any("projector" in name for name in changed(root / "smoldriver", text))
    run(root, tmp_path / "black", blind="black", feature_cache=str(tmp_path / "features"), config={"max_steps": 1})
    index = json.loads((tmp_path / "features" / "index.json").read_text())
    assert [Path(path).name for path in index["images"]] == ["black.png"]


def test_only_the_questions_that_are_asked_for(root, tmp_path, capsys, monkeypatch):
    asked: list[str] = []
    original = finetune.SceneTrainer

    def trainer(**arguments):
        asked.extend(question for row in arguments["train_dataset"] for question in row["questions"])
        return original(**arguments)

    monkeypatch.setattr(finetune, "SceneTrainer", trainer)
    run(root, tmp_path / "run", questions="^Is there", pairs_per_sequence=4, config={"max_steps": 1})
    assert sorted(asked) == 4 * ["Is there a bus?"] + 4 * ["Is there a car?"]
    assert "4 sequences, 8 questions" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no questions like 'unicorn' to train on"):
        run(root, tmp_path / "none", questions="unicorn")


def test_a_feature_cache_changes_nothing_but_the_cost(root, tmp_path):
    losses = []
    for name, cache in (("live", None), ("cached", str(tmp_path / "features"))):
        run(root, tmp_path / name, pairs_per_sequence=4, feature_cache=cache, lora_dropout=0.0)
        losses.append([line["loss"] for line in lines(tmp_path / name) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_metrics_hold_every_step_once_after_a_restart(root, tmp_path):
    output_dir = tmp_path / "run"
    whole = run(root, tmp_path / "whole", config={"max_steps": 4})
    run(root, output_dir, config={"max_steps": 4})
    shutil.rmtree(output_dir / "final")
    shutil.rmtree(output_dir / "checkpoint-4")
    with (output_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "los')  # cut short by a kill
    final = run(root, output_dir, config={"max_steps": 4})
    steps = [line["step"] for line in lines(output_dir) if "loss" in line]
    assert steps == [1, 2, 3, 4]
    assert sum("train_runtime" in line for line in lines(output_dir)) == 1
    assert changed(whole, final) == set()
    first = lines(output_dir)[0]
    assert {"loss", "mean_token_accuracy", "learning_rate", "epoch"} <= first.keys()


def test_a_loss_that_is_not_a_number_stops_at_its_step(root, tmp_path, monkeypatch):
    calls: list[int] = []
    original = trainer.SFTTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        calls.append(1)
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if len(calls) == 4 else loss

    monkeypatch.setattr(trainer.SFTTrainer, "compute_loss", poisoned)
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan in step 4; the last whole checkpoint is .*checkpoint-2"
    ):
        run(root, tmp_path / "run", config={"logging_steps": 100})  # the check does not wait for a log line
    assert len(calls) == 4
    monkeypatch.setattr(trainer.SFTTrainer, "compute_loss", original)
    run(root, tmp_path / "run", config={"logging_steps": 100})


def test_weights_that_are_not_numbers_are_never_saved(root, tmp_path, monkeypatch):
    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                weight = next(weight for weight in model.parameters() if weight.requires_grad)
                weight.data.view(-1)[0] = float("inf")

    original = finetune.SceneTrainer
    monkeypatch.setattr(
        finetune,
        "SceneTrainer",
        lambda **options: original(**{**options, "callbacks": [*options["callbacks"], Poison()]}),
    )
    with pytest.raises(FloatingPointError, match="is not finite after step 4; the last whole checkpoint is"):
        run(root, tmp_path / "run")
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-2")


def test_a_full_disk_leaves_the_last_checkpoint(root, tmp_path, monkeypatch):
    whole = run(root, tmp_path / "whole")
    original = torch.save
    saves = []

    def save(state, file, *args, **kwargs):
        saves.append(file)
        if "optimizer" in str(file) and sum("optimizer" in str(name) for name in saves) == 2:
            Path(file).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        return original(state, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(
        OSError, match="step 4 could not be written .*No space left.*last whole checkpoint is .*checkpoint-2"
    ):
        run(root, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "checkpoint-2" in names and not any("checkpoint-4" in name or "unfinished" in name for name in names)
    monkeypatch.setattr(torch, "save", original)
    assert changed(whole, run(root, tmp_path / "run")) == set()


def test_a_full_disk_elsewhere_is_told_too(root, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finetune, "save_whole", full)
    with pytest.raises(OSError, match="the disk of .* is full .* goes on from .*checkpoint-4"):
        run(root, tmp_path / "run")


def test_old_checkpoints_go_and_what_a_kill_left_is_ignored(root, tmp_path):
    (tmp_path / "run" / "checkpoint.unfinished" / "checkpoint-9").mkdir(parents=True)
    run(root, tmp_path / "run", config={"save_steps": 1, "save_total_limit": 2})
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint*")) == ["checkpoint-3", "checkpoint-4"]


def test_tensorboard_and_the_loss_curve(root, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "loss_curve", callbacks.loss_curve)
    pytest.importorskip("tensorboard")
    run(root, tmp_path / "run", config={"report_to": "tensorboard", "max_steps": 2})
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_baselines_prompts_name_the_cameras_of_the_data(root, tmp_path):
    """In their order, whatever they are called; views that are no camera's are left out."""
    data = write_prepared(tmp_path / "data", cameras=("PORT", "BOW", "LIDAR_BEV"))
    args = FinetuneArguments(str(root / "smolvlm"), str(data))
    _, view = finetune.load_processors(args, "smolvlm", load_rows(data, "train"))
    assert view.cameras == ["PORT", "BOW"]
    assert "PORT" in view.prompt("Who is there?", ["PORT"])


def test_transformers_own_bar_shows_the_figures(root, tmp_path, capsys):
    run(root, tmp_path / "run", config={"max_steps": 1})
    told = capsys.readouterr()
    assert "'mean_token_accuracy'" in told.out + told.err and "1/1" in told.err


@pytest.fixture(scope="module")
def naming(root):
    """Prepared data whose questions name cameras."""
    with pytest.MonkeyPatch.context() as patch:
        places = ("front", "back", "back left", "front right")
        patch.setattr(
            prepared, "QUESTIONS", [(f"Are there cars to the {place} of the ego car?", "Yes.") for place in places]
        )
        return write_prepared(root / "naming")


@pytest.mark.parametrize("checkpoint", ["smoldriver", "smolvlm"])
def test_the_share_of_attention_on_the_named_camera_grows(root, naming, tmp_path, checkpoint):
    """Of a weight so high that nothing else counts; in packed sequences, with an adapter."""
    args = FinetuneArguments(
        checkpoint=str(root / checkpoint),
        data=str(naming),
        pairs_per_sequence=4,
        camera_attention_loss=50.0,
        camera_attention_layer=1,
        camera_attention_heads=[0, 1],
    )
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
    settings |= {"max_steps": 60, "logging_steps": 1, "learning_rate": 2e-2, "per_device_train_batch_size": 4}
    final = finetune.main(args, SFTConfig(output_dir=str(tmp_path / "run"), **settings))
    shares = [line["camera_attention"] for line in lines(tmp_path / "run") if "camera_attention" in line]
    assert len(shares) == 60 and sum(shares[-5:]) > 1.3 * sum(shares[:5])
    assert AutoModelForImageTextToText.from_pretrained(final).config.get_text_config()._attn_implementation == "sdpa"


def test_it_is_off_unless_asked_for_and_needs_eyes(root, tmp_path):
    plain = run(root, tmp_path / "plain")
    assert all("camera_attention" not in line for line in lines(tmp_path / "plain"))
    idle = run(root, tmp_path / "idle", camera_attention_loss=0.5)  # these questions name no camera
    assert all(torch.equal(weight, weights(idle)[name]) for name, weight in weights(plain).items())
    with pytest.raises(ValueError, match="blind .* has nowhere to look"):
        run(root, tmp_path / "blind", blind="text", camera_attention_loss=0.5)


@pytest.mark.parametrize("language_model", ["full", "lora"])
def test_the_projector_may_learn_at_a_rate_of_its_own(root, tmp_path, language_model):
    """So slowly here that it stays where it was, while the rest moves."""
    final = run(root, tmp_path, projector_learning_rate=1e-12, language_model=language_model, train_embeddings=False)
    before, after = weights(root / "smoldriver"), weights(final)
    moved = {key: (before[key] - after[key]).abs().max() for key in before}
    assert max(moved[key] for key in moved if "multi_modal_projector" in key) < 1e-9
    assert max(moved[key] for key in moved if "language_model" in key) > 1e-3


@pytest.mark.parametrize(("rate", "groups"), [(None, 2), (1e-3, 4)])
def test_without_a_rate_of_its_own_the_optimizer_is_as_in_checkpoints_of_before(root, tmp_path, rate, groups):
    """Weights that decay and weights that do not; a run that was killed by an older version goes on with these."""
    run(root, tmp_path, projector_learning_rate=rate, language_model="full")
    state = torch.load(Path(last_checkpoint(tmp_path)) / "optimizer.pt", weights_only=True)
    assert len(state["param_groups"]) == groups


def test_a_rate_for_what_does_not_train(root, tmp_path):
    with pytest.raises(ValueError, match="projector_learning_rate must be positive.*projector 'frozen'"):
        run(root, tmp_path, projector_learning_rate=1e-3, projector="frozen")
