"""Models that look, match or guess, under the controls: each is told from the others by the headline figures."""

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import picture

from training.data.asked import asked_by
from training.data.contents import Contents
from training.data.rig import NUSCENES, Rig, read_rig
from training.data.wording import (
    STATUSES,
    SceneObject,
    count_word,
    existence_question,
    objects_answer,
    perception_questions,
)
from training.evaluation.answering import Answer
from training.evaluation.controls import Control
from training.evaluation.headline import TITLES, headline
from training.evaluation.predictions import ControlledModel
from training.evaluation.results import frame_key
from training.evaluation.surroundings import surroundings

CONTROLS = ("sighted", "text_only", "wrong_scene", "swap_left_right", "black_relevant")
CLASSES = ("car", "bus", "barrier")
SING = ("Please sing a song.", "La.")


class World:
    """Frames with what each of their pictures shows, and questions in the project's wording."""

    def __init__(self, folder: Path, rig: Rig, frames: int = 10):
        self.rig, self.frames, self.contents, self.shown = rig, [], {}, {}
        for number in range(frames):
            rng = random.Random(number)
            names = [rng.choice(CLASSES) for _ in range(rng.randint(3, 10))]
            things = [(name, rng.choice(rig.names), rng.choice(STATUSES[name] or [None])) for name in names]
            images = {}
            for camera in rig.names:
                file = folder / f"{number}-{camera}.png"
                picture(0, (4, 4)).save(file)
                images[camera] = str(file)
                self.shown[str(file)] = [(name, status) for name, where, status in things if where == camera]
            frame = {"scene_token": f"s{number // 2}", "frame_token": f"f{number}", "images": images}
            objects = [SceneObject(n, c, (0.0, 0.0), float(i), s) for i, (n, c, s) in enumerate(things)]
            pairs = [(pair["Q"], pair["A"]) for pair in perception_questions(objects, rng, rig=rig, key_objects=[])]
            pairs = [pair for pair in pairs if asked_by(pair[0])]
            for name, sector in ((name, sector) for name in CLASSES for sector in rig.sectors):
                status = rng.choice(STATUSES[name] or [None])
                there = any(n == name and s == status and rig.sector(camera) == sector for n, camera, s in things)
                pairs.append((existence_question(name, status, sector), "Yes." if there else "No."))
            pairs = list(dict.fromkeys(pairs))
            fixed = {**frame, "tag": [0], "objects": []}
            rows = [
                {**fixed, "question_id": f"{number}_{i}", "question": q, "answer": a, "category": category}
                for i, (q, a, category) in enumerate([*((*pair, "perception") for pair in pairs), (*SING, "behavior")])
            ]
            self.frames.append((frame, rows))
            things = [{"name": n, "camera": c, "status": s, "distance": None} for n, c, s in things]
            self.contents[frame_key(frame)] = Contents(objects=things, words={}, unclear=[])

    def measured(self, model, contents=None, cameras=None) -> dict:
        """The headline of a fake model."""
        cameras = cameras or self.rig.names
        known = self.contents if contents is None else contents
        asked = ControlledModel(Fake(model, self), cameras, [frame for frame, _ in self.frames], self.rig, 5, 8, 0)
        results = {
            name: [row for frame, rows in self.frames for row in asked.answer(Control(name), frame, rows)]
            for name in CONTROLS
        }
        around = surroundings(self.frames, known, cameras, self.rig)
        return headline(results, around, self.rig, resamples=50, seed=0)


class Fake:
    """An answerer whose answers are `model(question, {camera: [(class, status), ...]}, rig)`."""

    def __init__(self, model, world: World):
        self.model, self.world = model, world

    def look(self, images, num_queries=None):
        seen = {camera: self.world.shown.get(str(picture), []) for camera, picture in images.items()}

        def answers(questions, max_new_tokens, batch_size):
            return [Answer(self.model(question, seen, self.world.rig)) for question in questions]

        return SimpleNamespace(
            answers=answers, scores=lambda question, choices: [-1.0] * len(choices), visual_tokens=6
        )


def looker(question: str, seen: dict, rig: Rig) -> str:
    """Reads what the named camera shows."""
    asked = asked_by(question)
    if asked is None:
        return "La."
    there = [thing for camera in rig.sectors[asked.sector] for thing in seen.get(camera, [])]
    counts = Counter(name for name, _ in there)
    if asked.kind == "existence":
        return (
            "Yes." if any(name == asked.name and asked.status in (None, status) for name, status in there) else "No."
        )
    if asked.kind == "count":
        return f"{count_word(counts[asked.name])}."
    return objects_answer(counts, asked.sector) if counts else "There is nothing."


def matcher(question: str, seen: dict, rig: Rig) -> str:
    """Says "Yes." to what any camera shows, and knows nothing else."""
    asked = asked_by(question)
    if asked is None or asked.kind != "existence":
        return "Many."
    everything = [thing for things in seen.values() for thing in things]
    there = any(name == asked.name and asked.status in (None, status) for name, status in everything)
    return "Yes." if there else "No."


def stateless(question: str, seen: dict, rig: Rig) -> str:
    """Looks where the question points, and sees classes without their state."""
    asked = asked_by(question)
    if asked is None or asked.kind != "existence":
        return looker(question, seen, rig)
    there = [name for camera in rig.sectors[asked.sector] for name, _ in seen.get(camera, [])]
    return "Yes." if asked.name in there else "No."


def constant(question: str, seen: dict, rig: Rig) -> str:
    return "Yes."


@pytest.fixture(scope="module", params=["nuscenes", "four", "seven"])
def world(request, tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp(request.param), read_rig(request.param))


def scores(rows: dict) -> dict[str, float]:
    return {name: row["score"]["estimate"] for name, row in rows.items()}


def test_who_looks_where_it_is_asked(world):
    rows = world.measured(looker)
    assert list(rows) == list(TITLES) and [row["title"] for row in rows.values()] == list(TITLES.values())
    found = scores(rows)
    assert all(found[name] == 1 for name in list(TITLES)[:7])  # all that is asked of true pictures, and `follow`
    assert rows["follow"]["true_images"]["estimate"] == 1 and rows["follow"]["swapped_images"]["estimate"] == 0
    assert found["wrong_scene"] < 0.7 and rows["wrong_scene"]["true_images"]["estimate"] == 1
    black = rows["black_relevant"]
    assert black["score"]["estimate"] < 0.7 and black["true_images"]["estimate"] == 1
    named = sum(len(questions) - 1 for _, questions in world.frames)
    assert (black["answers"], black["left_out"]) == (named, len(world.frames))  # nobody names a camera to sing
    assert black["score"]["low"] < black["score"]["estimate"] < black["score"]["high"]


def test_who_matches_the_scene_is_found_out(world):
    rows = world.measured(matcher)
    found = scores(rows)
    assert (found["existence_yes"], found["no_nowhere"], found["no_elsewhere"]) == (1, 1, 0)
    assert found["follow"] == 0
    assert found["no_other_state"] == 1  # the state it is asked about is nowhere


def test_who_sees_no_state_is_found_out(world):
    found = scores(world.measured(stateless))
    assert (found["no_nowhere"], found["no_other_state"]) == (1, 0)


def test_a_constant_answer_follows_nothing(world):
    rows = world.measured(constant)
    found = scores(rows)
    assert found["existence"] == 0.5 and found["existence_yes"] == 1
    assert found["no_nowhere"] == found["no_elsewhere"] == found["no_other_state"] == found["follow"] == 0
    assert rows["existence"]["blind"]["estimate"] == 0.5


def test_every_no_has_one_reason(world):
    rows = world.measured(looker)
    parts = [rows[name]["answers"] for name in ("no_nowhere", "no_elsewhere", "no_other_state")]
    no = [row for _, rows in world.frames for row in rows if row["answer"] == "No."]
    assert sum(parts) == len(no) and min(parts) > 2
    assert rows["existence"]["answers"] == len(no) + rows["existence_yes"]["answers"]


def test_the_blind_score_is_the_best_on_the_same_questions(world):
    rows = world.measured(looker)
    for name in ("perception", "existence", "no_elsewhere", "black_relevant"):
        assert rows[name]["blind_control"] in ("text_only", "wrong_scene")
    # Without pictures it says "No.": so a "No." is worth something beside "Yes." only.
    assert rows["no_elsewhere"]["blind"]["estimate"] == 1 and rows["existence_yes"]["blind"]["estimate"] < 0.7
    assert rows["wrong_scene"]["blind"] is None


def test_without_contents_the_rest_is_measured(world):
    rows = world.measured(looker, contents={})
    assert list(rows) == ["perception", "existence", "existence_yes", "wrong_scene", "black_relevant"]


def test_contents_that_contradict_the_data_are_not_believed(world):
    """Key objects are a few of those that are there: what they lack is not nowhere."""
    lacking = {key: {**contents, "objects": contents["objects"][:1]} for key, contents in world.contents.items()}
    assert surroundings(world.frames, lacking, world.rig.names, world.rig) == {}
    half = dict(list(world.contents.items())[:8])
    rows, whole = world.measured(looker, contents=half), world.measured(looker)
    assert rows["follow"]["answers"] < whole["follow"]["answers"]
    assert rows["follow"]["left_out"] > whole["follow"]["left_out"]
    assert rows["no_nowhere"]["left_out"] > 0 == whole["no_nowhere"]["left_out"]


def test_cameras_that_are_not_shown_are_no_places(tmp_path):
    world = World(tmp_path, NUSCENES)
    cameras = ["CAM_FRONT", "CAM_FRONT_LEFT", "CAM_BACK_LEFT", "CAM_BACK_RIGHT"]
    rows = world.measured(looker, cameras=cameras)
    found = scores(rows)
    assert found["follow"] == found["no_nowhere"] == found["no_elsewhere"] == 1 > found["perception"]
    assert rows["no_elsewhere"]["left_out"] > 0
    around = surroundings(world.frames, world.contents, cameras, NUSCENES)
    for key, there in around.items():
        assert not there.shows("back", NUSCENES) and there.shows("front left", NUSCENES)
        at = {thing["camera"] for thing in there.swapped["objects"]}
        assert at <= set(cameras) and {"CAM_FRONT_LEFT"} & at == {"CAM_FRONT_LEFT"} & {  # its counterpart is not shown
            thing["camera"] for thing in world.contents[key]["objects"]
        }
