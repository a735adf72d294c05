import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from exported import export, save_checkpoint, save_world
from tiny import CAMERAS

from hub_export import demo

gradio_client = pytest.importorskip("gradio_client", reason="the demo's own requirements are not installed here")
pytest.importorskip("gradio")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The exported folder alone, away from the project."""
    root = tmp_path_factory.mktemp("demo")
    made = export(root / "smoldriver", save_checkpoint(root / "final"), examples=str(save_world(root / "world")))
    return Path(shutil.copytree(made, root / "elsewhere" / "smoldriver"))


@pytest.fixture(scope="module")
def client(folder):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment |= {"HF_HOME": str(folder.parent / "hf"), "GRADIO_SERVER_NAME": "127.0.0.1"}
    command = [sys.executable, "-P", str(folder / "demo" / "app.py")]
    server = subprocess.Popen(command, cwd=folder.parent, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        line = next(line for line in server.stdout if "Running on local URL" in line)
        yield gradio_client.Client(line.split()[-1], verbose=False)
    finally:
        server.terminate()
        server.wait(timeout=60)


def images(folder, without=()):
    files = {camera: folder / "demo" / "examples" / "0" / f"{camera}.jpg" for camera in CAMERAS}
    return [None if camera in without else gradio_client.handle_file(str(files[camera])) for camera in CAMERAS]


@pytest.mark.parametrize("without, budget", [((), 8), (("CAM_BACK",), 2)])
def test_the_answer_is_streamed_and_ends_as_the_models_own(client, folder, without, budget):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    job = client.submit("Is there a car?", budget, *images(folder, without), api_name="/answer")
    answer, *overlays = job.result()
    steps = [step[0] for step in job.outputs()]
    assert len(steps) > 3 and all(later.startswith(step) for step, later in zip(steps[:-2], steps[1:-1], strict=True))
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    files = {c: str(folder / "demo" / "examples" / "0" / f"{c}.jpg") for c in CAMERAS if c not in without}
    scene = model.encode_scene(files, processor, num_queries=budget)
    assert answer == scene.ask("Is there a car?", max_new_tokens=64)
    assert len(overlays) == len(CAMERAS)
    first = job.outputs()[0][1:]
    assert [camera for camera, overlay in zip(CAMERAS, first, strict=True) if overlay is None] == list(without)


def test_a_browser_shows_the_answer_with_a_camera_missing(client, folder, tmp_path):
    """As a visitor: an example, one camera taken away, Ask. The page has no horizontal scroll on a phone."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not shutil.which("chromium"):
        pytest.skip("no chromium here")
    options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    options += ["--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as chromium:
        browser = chromium.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=shutil.which("chromium"),
            args=options,
            viewport={"width": 390, "height": 844},
        )
        page = browser.new_page()
        page.goto(client.src)
        page.get_by_role("button", name="1. Is there a car?").click()
        page.wait_for_function("document.querySelectorAll('.slots img').length == 6")
        page.locator(".slots").get_by_label("Remove Image").nth(4).click()
        page.wait_for_function("document.querySelectorAll('.slots img').length == 5")
        page.get_by_role("button", name="Ask").click()
        page.wait_for_function("document.querySelectorAll('.looked img').length == 5")
        answer = page.get_by_label("Answer")
        playwright.expect(answer).not_to_have_value("")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        browser.close()


def test_no_image_and_no_question_are_told(client, folder):
    with pytest.raises(gradio_client.exceptions.AppError, match="at least one camera"):
        client.predict("Is there a car?", 8, *images(folder, CAMERAS), api_name="/answer")
    with pytest.raises(gradio_client.exceptions.AppError, match="Ask a question"):
        client.predict("  ", 8, *images(folder), api_name="/answer")


def test_the_examples_are_those_of_the_world(folder, tmp_path):
    examples = demo.read_world(save_world(tmp_path / "world"), list(CAMERAS))
    assert [len(example["images"]) for example in examples] == [6, 5]
    assert [(example["question"], example["reference"]) for example in examples] == [("Is there a car?", "Yes.")] * 2
    assert (folder / "picture.png").is_file()
