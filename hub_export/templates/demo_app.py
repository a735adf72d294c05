"""SmolDriver in a browser: six camera slots, a question, a budget, the answer as it is written, and where it looked.

Runs from an exported folder alone (`python demo/app.py`), or as a Space that names the model's repository in
SMOLDRIVER_MODEL and a commit in SMOLDRIVER_REVISION.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import gradio as gr
import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer

HERE = Path(__file__).resolve().parent
MODEL = os.environ.get("SMOLDRIVER_MODEL", str(HERE.parent))
REVISION = os.environ.get("SMOLDRIVER_REVISION")
NEW_TOKENS = 64
# Three cameras in a row as they stand around the car; two on a phone.
CSS = """
.cameras { display: grid !important; grid-template-columns: repeat(3, minmax(0, 1fr)); }
@media (max-width: 640px) {
  .cameras { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .cameras.slots > * { height: 150px !important; }
  .cameras.looked > * { height: 105px !important; }
  .cameras [data-testid="block-label"] { font-size: 10px; padding: 2px 4px; }
  .cameras [data-testid="block-label"] > span { display: none; }
}
"""

processor = AutoProcessor.from_pretrained(MODEL, revision=REVISION, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(MODEL, revision=REVISION, trust_remote_code=True).eval()
CAMERAS = processor.cameras
LOWEST = processor.max_queries if processor.queries_per_token > 1 else 1


@torch.inference_mode()
def attention_overlays(images: dict[str, Image.Image], num_queries: int) -> dict[str, Image.Image]:
    """Each image under a heat map of where its Q-Former looked more than evenly (mean of heads and queries)."""
    inputs = processor(images=images, num_queries=num_queries, return_tensors="pt")
    pixel_values = inputs["pixel_values"]  # (images, 3, height, width)
    outputs = model.get_image_features(
        camera_ids=inputs["camera_ids"],
        num_queries=num_queries,
        vision_features=model.model.get_vision_features(pixel_values).pooler_output,
        output_attentions=True,
        return_dict=True,
    )
    maps = outputs.qformer_attentions.float().mean((1, 2))  # (images, patches)
    rows, columns = model.model.multi_modal_projector.grid
    overlays = {}
    for index, weights in zip(inputs["camera_ids"].tolist(), maps, strict=True):
        camera = CAMERAS[index]
        picture = images[camera].convert("RGB")
        above = (weights - weights.mean()).clamp(min=0).view(rows, columns)
        heat = above / above.max().clamp(min=1e-6)
        heat = Image.fromarray((heat.numpy() * 255).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
        strength = np.asarray(heat, dtype=np.float32)[..., None] / 255  # (height, width, 1)
        glow = np.array([255.0, 96.0, 0.0], dtype=np.float32)
        mixed = np.asarray(picture, dtype=np.float32) * (1 - 0.65 * strength) * 0.85 + glow * 0.65 * strength
        overlays[camera] = Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
    return overlays


def answer(question: str, num_queries: float, *pictures: Image.Image | None) -> Iterator[tuple]:
    """Yield the answer as far as it is written and, once, each camera's overlay."""
    images = {camera: picture for camera, picture in zip(CAMERAS, pictures, strict=True) if picture is not None}
    if not images:
        raise gr.Error("Give at least one camera image.")
    if not question.strip():
        raise gr.Error("Ask a question.")
    budget = int(num_queries)
    overlays = attention_overlays(images, budget)
    yield "", *(overlays.get(camera) for camera in CAMERAS)
    unchanged = [gr.skip()] * len(CAMERAS)

    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=120)
    failures: list[Exception] = []

    def write() -> None:
        try:
            scene = model.encode_scene(images, processor, num_queries=budget)
            scene.ask(question, max_new_tokens=NEW_TOKENS, streamer=streamer)
        except Exception as error:
            failures.append(error)
            streamer.end()

    writer = Thread(target=write)
    writer.start()
    text = ""
    for piece in streamer:
        text += piece
        yield text, *unchanged
    writer.join()
    if failures:
        raise gr.Error(str(failures[0]))
    yield text.strip(), *unchanged


def examples() -> list[list]:
    """Question, budget and one image per camera of each example."""
    listed = HERE / "examples" / "examples.json"
    if not listed.is_file():
        return []
    rows = []
    for example in json.loads(listed.read_text()):
        paths = [example["images"].get(camera) for camera in CAMERAS]
        images = [str(listed.parent / path) if path else None for path in paths]
        rows.append([example["question"], processor.num_queries, *images])
    return rows


def camera_grid(kind: str, **options) -> dict[str, gr.Image]:
    """One picture per camera: what is ahead on top, what is behind below."""
    ahead = [camera for camera in CAMERAS if "BACK" not in camera]
    pictures = {}
    with gr.Row(elem_classes=["cameras", kind]):
        for camera in [*ahead, *(camera for camera in CAMERAS if camera not in ahead)]:
            pictures[camera] = gr.Image(label=camera, min_width=100, **options)
    return pictures


def build() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="SmolDriver") as page:
        gr.Markdown(
            "# SmolDriver\nSix cameras around a car, one question, one answer. Any camera may be missing. "
            "For research; **not for controlling a vehicle**."
        )
        top = gr.Column()
        slots = camera_grid("slots", type="pil", height=200, sources=["upload", "clipboard"], buttons=[])
        with gr.Row():
            default = "Is there a pedestrian in front of the ego car?"
            question = gr.Textbox(label="Question", value=default, scale=3, min_width=280)
            budget = gr.Slider(
                LOWEST,
                processor.max_queries,
                value=processor.num_queries,
                step=1,
                label="Queries per camera (fewer are faster)",
                scale=2,
                min_width=280,
                interactive=LOWEST < processor.max_queries,
            )
            ask = gr.Button("Ask", variant="primary", scale=1)
        reply = gr.Textbox(label="Answer", lines=2, max_lines=4, interactive=False)
        gr.Markdown("Where each camera's queries looked:")
        looked = camera_grid("looked", height=170, interactive=False, buttons=[])
        inputs = [question, budget, *(slots[camera] for camera in CAMERAS)]
        gr.on(
            [ask.click, question.submit],
            answer,
            inputs,
            [reply, *(looked[camera] for camera in CAMERAS)],
            api_name="answer",
        )
        listed = examples()
        if listed:
            labels = [f"{number}. {row[0]}" for number, row in enumerate(listed, 1)]
            with top:
                gr.Examples(listed, inputs, label="Generated scenes, with a question each", example_labels=labels)
    return page


if __name__ == "__main__":
    build().launch(css=CSS)
