"""An adapter is merged in one way: what is evaluated is bit for bit what `merge` writes and `build` exports."""

import shutil
import subprocess
import sys

import peft
import pytest
import torch
from exported import export, save_checkpoint
from safetensors.torch import load_file, save_file

from smoldriver_hf import CAMERAS, SmolDriverForConditionalGeneration
from smoldriver_hf.adapters import merge_adapter
from smoldriver_hf.loading_smoldriver import load_strictly
from training import merge
from training.evaluation.answering import load_answerer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "final")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, checkpoint):
    """LoRA on the language model, and the projector trained in full beside it; processor and all."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = SmolDriverForConditionalGeneration.from_pretrained(checkpoint)
    lora = peft.LoraConfig(
        r=4,
        target_modules=r".*language_model.*(q_proj|down_proj)",
        modules_to_save=["model.multi_modal_projector"],
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for parameter in adapted.get_base_model().model.multi_modal_projector.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    for file in checkpoint.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)
    return folder


def test_evaluated_merged_and_exported_weights_are_the_same_bits(checkpoint, adapter, tmp_path):
    exported = load_file(export(tmp_path / "exported", checkpoint, adapter=str(adapter)) / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    merged = merge.main(merge.MergeArguments(str(checkpoint), str(adapter), str(tmp_path / "merged")))
    assert {name: tensor.tolist() for name, tensor in load_file(merged / "model.safetensors").items()} == {
        name: tensor.tolist() for name, tensor in exported.items()
    }
    base = load_file(checkpoint / "model.safetensors")
    changed = {name for name, tensor in exported.items() if not torch.equal(base[name].bfloat16(), tensor)}
    assert any("qformers" in name for name in changed) and any("down_proj" in name for name in changed)
    from_export = SmolDriverForConditionalGeneration.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    for precision in ("fp32", "bf16"):
        evaluated = load_answerer(str(checkpoint), CAMERAS, adapter=str(adapter), precision=precision).model
        if precision == "fp32":
            for name, tensor in evaluated.state_dict().items():
                assert torch.equal(tensor, from_export.state_dict()[name]), name
        ids = torch.arange(4, 20)[None]
        alone = load_answerer(str(tmp_path / "exported"), CAMERAS, precision=precision).model
        assert torch.equal(evaluated(input_ids=ids).logits, alone(input_ids=ids).logits)


def test_what_does_not_merge_is_refused(checkpoint, adapter, tmp_path):
    def base(dtype=torch.float32):
        return load_strictly(checkpoint, dtype=dtype)

    with pytest.raises(ValueError, match="holds no adapter"):
        merge_adapter(base(), checkpoint)
    with pytest.raises(ValueError, match="added in float32; the model has weights in torch.bfloat16"):
        merge_adapter(base(torch.bfloat16), adapter)
    incomplete = shutil.copytree(adapter, tmp_path / "incomplete")
    weights = load_file(incomplete / "adapter_model.safetensors")
    lost = next(name for name in weights if "lora_B" in name)
    save_file(
        {name: tensor for name, tensor in weights.items() if name != lost}, incomplete / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match="no whole adapter of this model: .*lora_B"):
        merge_adapter(base(), incomplete)


def test_without_peft_it_is_said_what_is_missing(tmp_path):
    program = "import sys; sys.modules['peft'] = None\nfrom smoldriver_hf.adapters import load_adapter\n"
    done = subprocess.run(
        [sys.executable, "-c", program + "load_adapter(None, 'adapter')"], capture_output=True, text=True
    )
    assert "ImportError: an adapter needs peft: pip install peft" in done.stderr
