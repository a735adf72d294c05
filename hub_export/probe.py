"""What a stranger's computer does with an exported folder. Run by `check` as a file, never imported.

    python -I probe.py FOLDER REFERENCE REPORT

It runs in an empty directory with an empty module cache. No package of the project can be imported and no socket be
opened, whatever is installed, so everything that loads was in FOLDER. One line for each passed check goes to REPORT.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

OWN_PACKAGES = {"smoldriver_hf", "training", "hub_export", "benchmarks"}
TOLERANCE = 1e-5  # of fp32 logits against the source's, relative to the largest where that is above 1


class NoOwnPackages:
    """An import hook under which the project's packages do not exist, even where they are installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in OWN_PACKAGES:
            raise ModuleNotFoundError(f"{name} must not be needed: the exported folder stands alone")
        return None


def no_network(event, args):
    """An audit hook: unlike a patched socket module it cannot be undone and sees all of Python's sockets."""
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto"):
        raise OSError(f"{event}: an exported folder must load without network")


def main(folder: str, reference_file: str, report_file: str) -> None:
    sys.meta_path.insert(0, NoOwnPackages())
    sys.addaudithook(no_network)
    for package in OWN_PACKAGES:
        try:
            __import__(package)
        except ModuleNotFoundError:
            continue
        raise RuntimeError(f"{package} is importable")

    import bitsandbytes  # noqa: F401  # told now rather than after minutes; the NF4 check needs it
    import numpy as np
    import torch
    import transformers
    from PIL import Image
    from safetensors import safe_open
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoProcessor,
        BitsAndBytesConfig,
        pipeline,
    )

    torch.manual_seed(0)
    report = open(report_file, "a", encoding="utf-8")  # noqa: SIM115  # closed with the process

    def passed(check: str, **figures) -> None:
        report.write(json.dumps({"check": check, **figures}) + "\n")
        report.flush()

    with safe_open(reference_file, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
        reference = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    trust = {"trust_remote_code": True}

    def expect(condition: bool, message: str) -> None:
        if not condition:
            raise RuntimeError(message)

    def expect_close(name: str, got, wanted) -> float:
        expect(
            got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)} where the source has {tuple(wanted.shape)}"
        )
        difference = (got.float() - wanted.float()).abs().max().item()
        limit = TOLERANCE * max(1.0, wanted.abs().max().item())
        expect(difference <= limit, f"{name} differ from the source's by {difference:.3g}; allowed are {limit:.3g}")
        return difference

    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        expect("trust_remote_code" in str(error), f"refused for another reason than missing trust: {error}")
    else:
        raise RuntimeError("loaded without trust_remote_code=True")
    passed("refused without trust_remote_code")

    config = AutoConfig.from_pretrained(folder, **trust)
    expected = {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor"}
    expect(set(config.auto_map) == expected, f"auto_map has {sorted(config.auto_map)}; expected {sorted(expected)}")
    AutoImageProcessor.from_pretrained(folder, **trust)
    processor = AutoProcessor.from_pretrained(folder, **trust)
    images = {camera: Image.fromarray(reference[f"image.{camera}"].numpy()) for camera in processor.cameras}
    inputs = processor(images=images, text=settings["question"], return_tensors="pt")
    for name in ("input_ids", "attention_mask", "camera_ids"):
        expect(torch.equal(inputs[name], reference[name]), f"the processor's {name} differ from the source's")
    expect_close("pixel_values", inputs["pixel_values"], reference["pixel_values"])
    passed("AutoConfig, AutoImageProcessor and AutoProcessor")

    def load(auto_class, path=folder, **kwargs):
        model, info = auto_class.from_pretrained(path, output_loading_info=True, **trust, **kwargs)
        for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            found = sorted(str(key) for key in info[problem])
            # The base model rightly has no place for the head.
            found = [key for key in found if not (auto_class is AutoModel and key.startswith("lm_head"))]
            expect(not found, f"{auto_class.__name__}: {problem} {found[:3]} ({len(found)} in all)")
        expect("transformers_modules" in type(model).__module__, f"{type(model)} did not come from the folder")
        return model.eval()

    with torch.no_grad():
        base = load(AutoModel, dtype=torch.float32)
        expect(not hasattr(base, "lm_head"), "AutoModel must load the model without its head")
        difference = expect_close("hidden states", base(**inputs).last_hidden_state[:, -4:], reference["hidden"])
        passed("AutoModel", max_difference=difference)
        del base

        model = load(AutoModelForImageTextToText, dtype=torch.float32)
        difference = expect_close("logits", model(**inputs).logits[:, -4:], reference["logits"])
        passed("AutoModelForImageTextToText, fp32 logits", max_difference=difference)

        tokens = {"max_new_tokens": settings["new_tokens"], "do_sample": False}
        generated = model.generate(**inputs, **tokens)
        expect(torch.equal(generated, reference["generated"]), "generate gives other tokens than the source")
        answer = processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        passed("generate", new_tokens=generated.shape[1] - inputs["input_ids"].shape[1])

        pipe = pipeline("image-text-to-text", model=folder, dtype=torch.float32, device="cpu", **trust)
        parts = [{"type": "image", "camera": camera, "image": image} for camera, image in images.items()]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": settings["question"]}]}
        output = pipe(text=[message], return_full_text=False, generate_kwargs=tokens)
        said = output[0]["generated_text"]
        expect(said == answer, f"pipeline answers {said!r} where generate answers {answer!r}")
        passed("pipeline")
        del pipe

        with tempfile.TemporaryDirectory() as resaved:
            model.save_pretrained(resaved)
            processor.save_pretrained(resaved)
            del model
            again = load(AutoModelForImageTextToText, resaved, dtype=torch.float32)
            inputs_again = AutoProcessor.from_pretrained(resaved, **trust)(
                images=images, text=settings["question"], return_tensors="pt"
            )
            difference = expect_close("re-saved logits", again(**inputs_again).logits[:, -4:], reference["logits"])
            passed("saved again and reloaded", max_difference=difference)
            del again

        half = load(AutoModelForImageTextToText, dtype=torch.bfloat16)
        expect({parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}, "not all weights are bf16")
        logits = half(**inputs).logits
        expect(bool(logits.isfinite().all()), "bf16 logits are not finite")
        half.generate(**inputs, **tokens)
        passed("bf16", top_token_agrees=bool((logits[:, -1].argmax() == reference["logits"][:, -1].argmax()).item()))
        del half

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
        )
        small = AutoModelForImageTextToText.from_pretrained(
            folder, quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu", **trust
        )
        quantized = sum(type(module).__name__ == "Linear4bit" for module in small.modules())
        expect(quantized > 0, "no layer was quantised")
        expect(bool(small(**inputs).logits.isfinite().all()), "NF4 logits are not finite")
        small.generate(**inputs, **tokens)
        passed("NF4", quantized_layers=quantized)

    versions = {
        "python": sys.version.split()[0],
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    passed("complete", **versions)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(*(str(Path(argument)) for argument in sys.argv[1:]))
