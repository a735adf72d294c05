import pytest
import torch
from exported import save_checkpoint
from tiny import CAMERAS, scene

from smoldriver_hf import SmolDriverForConditionalGeneration, SmolDriverProcessor

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from hub_export.engines import onnx  # noqa: E402  # after what it needs
from hub_export.engines.onnx import OnnxArguments, OnnxSmolDriver  # noqa: E402

pytestmark = pytest.mark.slow  # exporting five graphs takes about half a minute


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "final")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory, checkpoint):
    return onnx.main(OnnxArguments(str(checkpoint), str(tmp_path_factory.mktemp("onnx") / "graphs")))


@pytest.mark.parametrize("question", ["Is it?", "What is in front of the ego car, and how far away is it from there?"])
def test_prefill_and_decoding_match_the_model(checkpoint, graphs, question):
    model = SmolDriverForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = SmolDriverProcessor.from_pretrained(checkpoint)
    inputs = processor(images=scene(7), text=question, return_tensors="pt")  # neither scene nor length was exported
    runner = OnnxSmolDriver(graphs)
    with torch.no_grad():
        visual = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        torch.testing.assert_close(runner.encode(inputs["pixel_values"]), visual, rtol=0, atol=1e-4)
        ids = inputs["input_ids"]
        logits, cache = runner.prefill(runner.encode(inputs["pixel_values"]), ids)
        torch.testing.assert_close(logits, model(**inputs).logits[:, -1], rtol=0, atol=1e-4)
        for token in (70, 80, 90):
            logits, cache = runner.decode(token, ids.shape[1], cache)
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
            whole = model(ids, pixel_values=inputs["pixel_values"], camera_ids=inputs["camera_ids"])
            torch.testing.assert_close(logits, whole.logits[:, -1], rtol=0, atol=1e-4)
    generated = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    assert runner.generate(inputs, 6) == generated.tolist()


def test_a_scene_without_a_camera_is_refused(graphs):
    images = {camera: image for camera, image in scene().items() if camera != CAMERAS[0]}
    with pytest.raises(ValueError, match="one image of each"):
        OnnxSmolDriver(graphs).ask(images, "Is it?")


def test_a_smaller_budget_and_int8(checkpoint, tmp_path):
    args = OnnxArguments(str(checkpoint), str(tmp_path / "small"), num_queries=2, int8=True)
    runner = OnnxSmolDriver(onnx.main(args))
    model = SmolDriverForConditionalGeneration.from_pretrained(checkpoint).eval()
    inputs = runner.processor(images=scene(7), text="Is it?", num_queries=2, return_tensors="pt")
    tokens = runner.encode(inputs["pixel_values"])
    assert tokens.shape == (6, 2, 64)
    logits, _ = runner.prefill(tokens, inputs["input_ids"])
    with torch.no_grad():
        wanted = model(**inputs).logits[:, -1]
    assert 0 < (logits - wanted).abs().max() < 0.1 * wanted.abs().max()
