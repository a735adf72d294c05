"""The README's picture is drawn from a scene that answers the questions below it."""

import pytest
from PIL import Image

from benchmarks.scene import GRID, QUESTIONS, TILE, answered_frame, draw


def frame(*questions: str) -> dict:
    pairs = [{"Q": question, "A": f"{number}."} for number, question in enumerate(questions)]
    return {"image_paths": {"CAM_FRONT": "front.jpg"}, "QA": {"perception": pairs}}


def test_the_first_frame_that_answers():
    world = {"scene": {"key_frames": {"a": frame(QUESTIONS[0]), "b": frame("Other?", *QUESTIONS)}}}
    assert answered_frame(world) == ({"CAM_FRONT": "front.jpg"}, ["1.", "2."])
    with pytest.raises(ValueError, match="take more --scenes"):
        answered_frame({"scene": {"key_frames": {"a": frame(QUESTIONS[0])}}})


def test_every_camera_stands_in_its_place(tmp_path):
    images = {}
    for number, camera in enumerate(camera for row in GRID for camera in row):
        images[camera] = tmp_path / f"{camera}.png"
        Image.new("RGB", TILE, (10 * number, 0, 200)).save(images[camera])
    sheet = draw(images, ["There are two cars.", "One traffic light is red."])
    for row in range(2):
        for column in range(3):
            middle = (column * (TILE[0] + 4) + TILE[0] // 2, row * (TILE[1] + 4) + TILE[1] // 2)
            assert sheet.getpixel(middle) == (10 * (3 * row + column), 0, 200)
    assert sheet.getpixel((sheet.width - 1, sheet.height - 1)) == (255, 255, 255)
