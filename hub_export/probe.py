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
TRUST = {"trust_remote_code": True}
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


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def expect_close(name: str, got, wanted) -> float:
    """Compare tensors with the source's; returns the largest difference."""
    expect(got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)} where the source has {tuple(wanted.shape)}")
    difference = (got.float() - wanted.float()).abs().max().item()
    limit = TOLERANCE * max(1.0, wanted.abs().max().item())
    expect(difference <= limit, f"{name} differ from the source's by {difference:.3g}; allowed are {limit:.3g}")
    return difference


class Probe:
    """The checks, each a method; they import inside, as nothing may be imported before `main` has shut the doors."""

    def __init__(self, folder: str, reference_file: str, report_file: str):
        from safetensors import safe_open

        self.folder = folder
        self.report = open(report_file, "a", encoding="utf-8")  # noqa: SIM115  # closed with the process
        with safe_open(reference_file, "pt") as file:
            self.settings = json.loads(file.metadata()["settings"])
            self.reference = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        self.tokens = {"max_new_tokens": self.settings["new_tokens"], "do_sample": False}

    def passed(self, check: str, **figures) -> None:
        self.report.write(json.dumps({"check": check, **figures}) + "\n")
        self.report.flush()

    def load(self, auto_class, path=None, **kwargs):
        """A model of the folder's own code, with every weight in its place."""
        model, info = auto_class.from_pretrained(path or self.folder, output_loading_info=True, **TRUST, **kwargs)
        for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            found = sorted(str(key) for key in info[problem])
            # The base model rightly has no place for the head.
            found = [key for key in found if not (auto_class.__name__ == "AutoModel" and key.startswith("lm_head"))]
            expect(not found, f"{auto_class.__name__}: {problem} {found[:3]} ({len(found)} in all)")
        expect("transformers_modules" in type(model).__module__, f"{type(model)} did not come from the folder")
        return model.eval()

    def trust_is_asked_for(self) -> None:
        from transformers import AutoConfig

        try:
            AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except ValueError as error:
            expect("trust_remote_code" in str(error), f"refused for another reason than missing trust: {error}")
        else:
            raise RuntimeError("loaded without trust_remote_code=True")
        self.passed("refused without trust_remote_code")

    def processor_is_the_sources(self) -> None:
        import torch
        from PIL import Image
        from transformers import AutoConfig, AutoImageProcessor, AutoProcessor

        config = AutoConfig.from_pretrained(self.folder, **TRUST)
        expected = {f"Auto{name}" for name in ("Config", "Model", "Processor", "ImageProcessor")}
        expected |= {"AutoModelForImageTextToText", "AutoModelForMultimodalLM"}
        expect(
            set(config.auto_map) == expected, f"auto_map has {sorted(config.auto_map)}; expected {sorted(expected)}"
        )
        AutoImageProcessor.from_pretrained(self.folder, **TRUST)
        self.processor = AutoProcessor.from_pretrained(self.folder, **TRUST)
        self.images = {
            camera: Image.fromarray(self.reference[f"image.{camera}"].numpy()) for camera in self.processor.cameras
        }
        self.inputs = self.processor(images=self.images, text=self.settings["question"], return_tensors="pt")
        for name in ("input_ids", "attention_mask", "camera_ids"):
            expect(
                torch.equal(self.inputs[name], self.reference[name]),
                f"the processor's {name} differ from the source's",
            )
        expect_close("pixel_values", self.inputs["pixel_values"], self.reference["pixel_values"])
        self.passed("AutoConfig, AutoImageProcessor and AutoProcessor")

    def hidden_states_are_the_sources(self) -> None:
        import torch
        from transformers import AutoModel

        base = self.load(AutoModel, dtype=torch.float32)
        expect(not hasattr(base, "lm_head"), "AutoModel must load the model without its head")
        hidden = base(**self.inputs).last_hidden_state[:, -4:]
        self.passed("AutoModel", max_difference=expect_close("hidden states", hidden, self.reference["hidden"]))

    def answers_are_the_sources(self) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        self.model = self.load(AutoModelForImageTextToText, dtype=torch.float32)
        difference = expect_close("logits", self.model(**self.inputs).logits[:, -4:], self.reference["logits"])
        self.passed("AutoModelForImageTextToText, fp32 logits", max_difference=difference)
        generated = self.model.generate(**self.inputs, **self.tokens)
        expect(torch.equal(generated, self.reference["generated"]), "generate gives other tokens than the source")
        new = generated[0, self.inputs["input_ids"].shape[1] :]
        self.answer = self.processor.decode(new, skip_special_tokens=True)
        self.passed("generate", new_tokens=len(new))

    def pipeline_answers_alike(self) -> None:
        import torch
        from transformers import pipeline

        pipe = pipeline("image-text-to-text", model=self.folder, dtype=torch.float32, device="cpu", **TRUST)
        parts = [{"type": "image", "camera": camera, "image": image} for camera, image in self.images.items()]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": self.settings["question"]}]}
        output = pipe(text=[message], return_full_text=False, generate_kwargs=self.tokens)
        said = output[0]["generated_text"]
        expect(said == self.answer, f"pipeline answers {said!r} where generate answers {self.answer!r}")
        self.passed("pipeline")

    def saves_and_loads_again(self) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        with tempfile.TemporaryDirectory() as resaved:
            self.model.save_pretrained(resaved)
            self.processor.save_pretrained(resaved)
            del self.model
            again = self.load(AutoModelForImageTextToText, resaved, dtype=torch.float32)
            processor = AutoProcessor.from_pretrained(resaved, **TRUST)
            inputs = processor(images=self.images, text=self.settings["question"], return_tensors="pt")
            difference = expect_close("re-saved logits", again(**inputs).logits[:, -4:], self.reference["logits"])
        self.passed("saved again and reloaded", max_difference=difference)

    def works_in_half_precision(self) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        half = self.load(AutoModelForImageTextToText, dtype=torch.bfloat16)
        expect({parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}, "not all weights are bf16")
        logits = half(**self.inputs).logits
        expect(bool(logits.isfinite().all()), "bf16 logits are not finite")
        half.generate(**self.inputs, **self.tokens)
        agrees = (logits[:, -1].argmax() == self.reference["logits"][:, -1].argmax()).item()
        self.passed("bf16", top_token_agrees=bool(agrees))

    def works_in_four_bits(self) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
        )
        small = AutoModelForImageTextToText.from_pretrained(
            self.folder, quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu", **TRUST
        )
        quantized = sum(type(module).__name__ == "Linear4bit" for module in small.modules())
        expect(quantized > 0, "no layer was quantised")
        expect(bool(small(**self.inputs).logits.isfinite().all()), "NF4 logits are not finite")
        small.generate(**self.inputs, **self.tokens)
        self.passed("NF4", quantized_layers=quantized)


def shut_the_doors() -> None:
    """From here on the project's packages do not exist and no socket opens."""
    sys.meta_path.insert(0, NoOwnPackages())
    sys.addaudithook(no_network)
    for package in OWN_PACKAGES:
        try:
            __import__(package)
        except ModuleNotFoundError:
            continue
        raise RuntimeError(f"{package} is importable")


def main(folder: str, reference_file: str, report_file: str) -> None:
    shut_the_doors()
    import bitsandbytes  # noqa: F401  # told now rather than after minutes; the NF4 check needs it
    import numpy as np
    import torch
    import transformers

    torch.manual_seed(0)
    probe = Probe(folder, reference_file, report_file)
    with torch.no_grad():
        probe.trust_is_asked_for()
        probe.processor_is_the_sources()
        probe.hidden_states_are_the_sources()
        probe.answers_are_the_sources()
        probe.pipeline_answers_alike()
        probe.saves_and_loads_again()
        probe.works_in_half_precision()
        probe.works_in_four_bits()
    versions = {module.__name__: module.__version__ for module in (transformers, torch, np)}
    probe.passed("complete", python=sys.version.split()[0], **versions)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(*(str(Path(argument)) for argument in sys.argv[1:]))
