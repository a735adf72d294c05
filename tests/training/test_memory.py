"""Memory estimates: a tiny model counted by hand, what makes a step need more, and the recipes' claim of 16 GB."""

import pytest
from tiny import tiny_config, tiny_model
from trl import SFTConfig

from training.assemble import AssembleArguments
from training.finetune import FinetuneArguments
from training.memory import GB, NF4_BYTES, SCORE_BYTES, MemoryArguments, config_of, estimate, main
from training.toyworld.smolvlm import ToyBaseArguments

# `tiny.tiny_config`, weight by weight.
TOWER = (
    (32 + 17 * 32 + 3 * 7 * 7 * 32 + 32)  # class token, positions, patches
    + 2 * (4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 4 * 32 + 2 * 32)  # attention, MLP, norms, scales
    + 2 * 32  # the last norm
)
QFORMER = 8 * 32 + 3 * 2 * 32 + 3 * (32 * 32 + 32) + 32 * 32 + (32 * 64 + 64) + (64 * 32 + 32)
PROJECTOR = 6 * QFORMER + 2 * 32 + (32 * 32 + 32) + 32
LINEARS = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
LANGUAGE_MODEL = 264 * 32 + LINEARS + 2 * 2 * 32 + 32  # the head is the embeddings
ADAPTERS = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))  # of rank 4


def estimated(question_tokens: int = 20, bf16: bool = False, config=None, training=None, **changes):
    settings = {"checkpoint": "", "data": "", "lora_r": 4, "tower": "frozen", "projector": "frozen", **changes}
    options = {"output_dir": "unused", "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 1}
    options |= {"bf16": bf16, "gradient_checkpointing": False, **(training or {})}
    return estimate(config or tiny_config(), FinetuneArguments(**settings), SFTConfig(**options), question_tokens)


def test_the_hand_count_is_the_model():
    model = tiny_model().model
    counted = {"vision_tower": TOWER, "multi_modal_projector": PROJECTOR, "language_model": LANGUAGE_MODEL}
    assert counted == {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in counted}


@pytest.mark.parametrize("bf16", [False, True])
def test_adapters(bf16):
    found = estimated(bf16=bf16)
    assert found.trainable == ADAPTERS
    frozen = TOWER + PROJECTOR + LANGUAGE_MODEL
    assert found.parameters == frozen * (2 if bf16 else 4) + ADAPTERS * 4
    assert (found.gradients, found.optimizer) == (4 * ADAPTERS, 8 * ADAPTERS)
    assert found.peak == found.parameters + found.optimizer + found.activations
    assert found.activations >= found.gradients


@pytest.mark.parametrize("bf16", [False, True])
def test_full_training_of_a_part(bf16):
    found = estimated(bf16=bf16, projector="full", language_model="frozen")
    assert found.trainable == PROJECTOR
    assert found.parameters == (TOWER + LANGUAGE_MODEL) * (2 if bf16 else 4) + PROJECTOR * 4
    assert (found.gradients, found.optimizer) == (4 * PROJECTOR, 8 * PROJECTOR)
    whole = estimated(bf16=bf16, tower="full", projector="full", language_model="full")
    assert whole.trainable == TOWER + PROJECTOR + LANGUAGE_MODEL
    assert whole.parameters == 4 * whole.trainable


def test_a_part_trained_beside_adapters_is_held_twice():
    """peft keeps what it was beside what it becomes."""
    found = estimated(projector="full")
    assert found.trainable == PROJECTOR + ADAPTERS
    assert found.parameters == 4 * (TOWER + LANGUAGE_MODEL + 2 * PROJECTOR + ADAPTERS)


def test_four_bits():
    plain, packed = estimated(bf16=True), estimated(bf16=True, load_in_4bit=True)
    assert packed.trainable == plain.trainable
    assert plain.parameters - packed.parameters == int(LINEARS * (2 - NF4_BYTES))
    assert 0.515 < NF4_BYTES < 0.516


def test_length_of_a_sequence():
    """Six cameras of eight queries and their labels, then the questions."""
    assert estimated(question_tokens=20).sequence_length == 6 * (8 + 15) + 20
    assert estimated(question_tokens=20, pairs_per_sequence=3).sequence_length == 6 * (8 + 15) + 60
    assert estimated(num_queries=[1, 2]).sequence_length == 6 * (2 + 15) + 20
    assert estimated(cameras=["CAM_BACK"]).sequence_length == 8 + 15 + 20


def test_what_needs_more_and_what_needs_less():
    plain = estimated(question_tokens=200)
    assert estimated(question_tokens=400).peak > plain.peak
    assert estimated(question_tokens=200, training={"per_device_train_batch_size": 2}).peak > plain.peak
    assert estimated(question_tokens=200, training={"gradient_checkpointing": True}).peak < plain.peak
    assert plain.needed() > plain.peak * 1.1


def test_supervised_attention_keeps_its_scores():
    """By default for half of the heads, of which the tiny model has two."""
    plain, half, both, one = (
        estimated(question_tokens=200, **options).peak
        for options in (
            {},
            {"camera_attention_loss": 0.5},
            {"camera_attention_loss": 0.5, "camera_attention_heads": [0, 1]},
            {"camera_attention_loss": 0.5, "camera_attention_heads": [1]},
        )
    )
    assert half == one == plain + 200 * (200 + 6 * (8 + 15)) * SCORE_BYTES
    assert both - plain == 2 * (one - plain)


def test_a_recipe_without_a_model(tmp_path):
    (tmp_path / "recipe.yaml").write_text("heal: {module: finetune, checkpoint: a/b, data: c}\n")
    with pytest.raises(ValueError, match="fine-tunes nothing that it assembles"):
        main(MemoryArguments(str(tmp_path / "recipe.yaml")))


def test_a_recipe_that_makes_its_own_language_model():
    base = ToyBaseArguments([], "", hidden_size=256, num_hidden_layers=3)
    config = config_of(AssembleArguments("", offline=True, image_size=112, vision_layers=6), base)
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (256, 3)
    assert config.text_config.vocab_size == 1024 and config.vision_config.hidden_size == 384
    assert config.vision_config.num_hidden_layers == 6


def test_stages_that_train_what_the_recipe_assembles():
    """Not its own SmolVLM, not the baseline, not the blind control."""
    report = main(MemoryArguments("toyworld"))
    assert set(report["stages"]) == {"adapt"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["smolvlm2-256m", "smolvlm2-2.2b-paper"])
def test_gpu_recipes_fit_sixteen_gigabytes(recipe, capsys):
    report = main(MemoryArguments(recipe))
    assert set(report["stages"]) == {"heal", "adapt"} and report["limit_gb"] == 16
    for stage in report["stages"].values():
        assert stage["fits"] and 1 * GB < stage["needed"] < 16 * GB
        assert stage["peak"] >= stage["parameters"] + stage["optimizer"]
    lines = capsys.readouterr().out.splitlines()
    assert sum("fits 16 GB" in line for line in lines) == 2
