"""The over-fitting check's own logic: whose images are swapped in, and that answers come from a foreign process."""

import pytest
from drivelm_files import make_world, write_world
from tiny import scene, tiny_model, tiny_processor

from training import prepare
from training.data.rows import load_rows
from training.overfit import answers, swaps


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Three frames that agree on every answer but one."""
    folder = tmp_path_factory.mktemp("world")
    world = make_world(scenes=1, frames=3)
    frames = list(world["scene-0"]["key_frames"].values())
    frames[1]["QA"]["perception"][0]["A"] = "No."
    file = write_world(folder, world)
    prepare.main(
        prepare.PrepareArguments(
            drivelm_json=str(file),
            image_root=str(folder),
            output_dir=str(folder / "data"),
            coordinates="none",
            split="train",
        )
    )
    return load_rows(folder / "data", "train")


def test_only_questions_with_differing_answers_are_swapped(rows):
    swapped = swaps(rows)
    assert {rows[index]["question"] for index in swapped} == {"Are there cars to the back of the ego car?"}
    assert len(swapped) == 3
    for index, other in swapped.items():
        assert other["answer"] != rows[index]["answer"]
        assert other["images"] != rows[index]["images"]


def test_answers_come_from_a_process_without_the_package(tmp_path):
    model = tiny_model()
    processor = tiny_processor(model.config)
    checkpoint = tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    images = {}
    for camera, image in scene().items():
        image.save(tmp_path / f"{camera}.png")
        images[camera] = str(tmp_path / f"{camera}.png")
    given = answers(checkpoint, {4: "What is ahead?", 7: "Is it safe?"}, {4: images, 7: images}, budget=8)
    expected = model.encode_scene(images, processor).ask_all(["What is ahead?", "Is it safe?"], max_new_tokens=64)
    assert given == {4: expected[0].text, 7: expected[1].text}
