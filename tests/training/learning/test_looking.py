"""Camera attention: its loss is what the whole map of attention gives, for any language model; it teaches to look."""

import math

import pytest
import torch
from prepared import write_smolvlm
from tiny import tiny_inputs, tiny_language_models, tiny_model
from transformers import AutoModelForImageTextToText, Qwen3Config

from smoldriver_hf import CAMERAS
from training.learning.looking import CameraAttention

LANGUAGE_MODELS = tiny_language_models() | {
    "qwen3": Qwen3Config(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )
}  # fmt: skip


def asked(inputs, image_token_id: int, camera: str):
    """The bits of a batch whose last three positions answer a question about one camera."""
    ids = inputs["input_ids"]
    tokens = torch.zeros_like(ids)
    for row in range(len(ids)):
        places = (ids[row] == image_token_id).nonzero()[:, 0].view(len(CAMERAS), -1)  # (cameras, tokens)
        for index in range(len(CAMERAS)):
            tokens[row, places[index]] = 1 << index
    wanted = torch.zeros_like(ids)
    wanted[:, -3:] = 1 << CAMERAS.index(camera)
    return tokens, wanted


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_loss_is_that_of_the_whole_map(name):
    model = tiny_model(text_config=LANGUAGE_MODELS[name])
    inputs = tiny_inputs(model, batch=2)
    tokens, wanted = asked(inputs, model.config.image_token_id, "CAM_BACK")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions[1]  # (batch, heads, seeing, seen)
    model.set_attn_implementation("sdpa")
    right = (tokens[:, None] & wanted[:, :, None]) != 0
    share = (maps[:, :1] * right[:, None]).sum(-1)[:, :, -3:]
    watch = CameraAttention(model)  # the middle layer of two, the first half of two heads
    logits = model(**inputs).logits
    loss, seen = watch.loss(tokens, wanted)
    assert torch.allclose(loss, -share.log().mean(), atol=1e-5)
    assert seen == pytest.approx(share.mean().item(), abs=1e-5)
    assert torch.isfinite(logits).all()


def test_padding_is_not_looked_at():
    model = tiny_model()
    inputs = tiny_inputs(model)
    tokens, wanted = asked(inputs, model.config.image_token_id, "CAM_FRONT")
    watch = CameraAttention(model)
    model(**inputs)
    alone, _ = watch.loss(tokens, wanted)
    padded = {name: inputs[name] for name in ("pixel_values", "camera_ids")}
    pad = (0, 4)
    padded["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], pad)
    padded["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], pad)
    model(**padded)
    beside, _ = watch.loss(torch.nn.functional.pad(tokens, pad), torch.nn.functional.pad(wanted, pad))
    assert torch.allclose(alone, beside, atol=1e-6)


def test_a_question_without_a_camera_has_no_loss():
    model = tiny_model()
    inputs = tiny_inputs(model)
    tokens, wanted = asked(inputs, model.config.image_token_id, "CAM_FRONT")
    watch = CameraAttention(model)
    model(**inputs)
    loss, share = watch.loss(tokens, torch.zeros_like(wanted))
    assert loss.item() == 0 and math.isnan(share)
    model(**inputs)
    loss, share = watch.loss(torch.where(tokens == 1 << CAMERAS.index("CAM_FRONT"), 0, tokens), wanted)
    assert loss.item() == 0 and math.isnan(share)  # its picture is missing


def test_it_teaches_to_look():
    """Of questions that name a camera in their first token, without any answer to learn."""
    model = tiny_model().train()
    model.requires_grad_(True)
    watch = CameraAttention(model, layer=1, heads=[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    shares = []
    for step in range(80):
        camera = CAMERAS[step % 6]
        inputs = tiny_inputs(model, seed=step)
        inputs["input_ids"][:, -5:] = 100 + CAMERAS.index(camera)
        tokens, wanted = asked(inputs, model.config.image_token_id, camera)
        model(**inputs)
        loss, share = watch.loss(tokens, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shares.append(share)
    assert sum(shares[:6]) / 6 < 0.2 and sum(shares[-6:]) / 6 > 0.8


def test_gradients_are_the_same_when_layers_are_computed_again():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        model.requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        watch = CameraAttention(model)
        inputs = tiny_inputs(model)
        tokens, wanted = asked(inputs, model.config.image_token_id, "CAM_BACK")
        logits = model(**inputs).logits
        loss, _ = watch.loss(tokens, wanted)
        (loss + logits.logsumexp(-1).mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys() and any("q_proj" in name for name in plain)
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


def test_smolvlm_is_watched_too(tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(write_smolvlm(tmp_path / "smolvlm"))
    watch = CameraAttention(model)
    ids = torch.randint(5, 200, (1, 12))
    model(input_ids=ids)
    tokens, wanted = torch.zeros_like(ids), torch.zeros_like(ids)
    tokens[:, 2:4], wanted[:, -1] = 1, 1
    loss, share = watch.loss(tokens, wanted)
    assert loss.item() == pytest.approx(-math.log(share), abs=0.5) and loss.requires_grad


def test_what_cannot_be_watched_is_refused():
    with pytest.raises(ValueError, match="asks layer 5, heads .* 2 layers of 2 heads"):
        CameraAttention(tiny_model(), layer=5)
    with pytest.raises(ValueError, match=r"heads \[7\]"):
        CameraAttention(tiny_model(), heads=[7])
    model = tiny_model()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="'sdpa'; the language model has 'eager'"):
        CameraAttention(model)
    model = tiny_model()
    watch = CameraAttention(model)
    with pytest.raises(RuntimeError, match="was not called"):
        watch.loss(torch.ones(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long))
