"""Questions from objects: DriveLM's wording, true answers, and no gain for a blind guesser."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.rig import NUSCENES
from training.data.wording import (
    STATUSES,
    SceneObject,
    choose_key_objects,
    object_tag,
    perception_questions,
)

SECTORS = {name: NUSCENES.sector(name) for name in NUSCENES.names}

DRIVELM = Path(__file__).resolve().parents[3].parent / "shared" / "drivelm" / "drivelm_9frames.json"
TAG = re.compile(r"<c\d+,CAM_[A-Z_]+,\d+\.\d,\d+\.\d>")

COUNT = "(?:one|two|three|many)"
SECTOR = "(?:front left|front right|front|back left|back right|back)"
SINGULAR = f"(?:{'|'.join(STATUSES)})"
PLURAL = f"(?:{'|'.join(name + ('es' if name == 'bus' else 's') for name in STATUSES)})"
GROUP = f"(?:one {SINGULAR}|(?:two|three|many) {PLURAL})"
STATE = "(?:moving|parked|stopped|standing|red|green|with a rider|without a rider|with riders|without riders)"
PLACE = f"(?:in front of the ego car|behind the ego car|(?:to|at) the {SECTOR} of the ego car)"

GRAMMAR = {
    "what are": (
        re.compile(f"What are objects to the {SECTOR} of the ego car\\?"),
        re.compile(
            f"There (?:is|are) {GROUP}(?: and {GROUP}|(?:, {GROUP})+, and {GROUP})? {PLACE}\\.",
        ),
    ),
    "status": (
        re.compile(
            f"What is the status of the (?:{SINGULAR} that is|{PLURAL} that are) to the {SECTOR} of the ego car\\?"
        ),
        re.compile(
            f"(?:{COUNT} (?:of the {PLURAL}|{SINGULAR}|{PLURAL}) (?:is|are) {STATE}"
            f"(?:, {COUNT} (?:is|are) {STATE})*(?:, and (?:{COUNT}|the other) (?:is|are) {STATE})?)\\.",
            re.IGNORECASE,
        ),
    ),
    "existence": (
        re.compile(
            f"Are there (?:(?:(?:moving|parked|stopped|standing|red|green) )?{PLURAL}|{PLURAL} with(?:out)? riders)"
            f" to the {SECTOR} of the ego car\\?"
        ),
        re.compile(r"Yes\.|No\."),
    ),
    "observed": (
        re.compile(f"What is the observed status of object {TAG.pattern}\\?"),
        re.compile(r"Moving\.|Stationary\."),
    ),
    "description": (re.compile(f"What is the visual description of {TAG.pattern}\\?"), re.compile(r"[A-Z].*\.")),
}
OURS = {
    "count": (
        re.compile(f"How many {PLURAL} are there to the {SECTOR} of the ego car\\?"),
        re.compile(r"(?:Zero|One|Two|Three|Many)\."),
    ),
    "closest": (
        re.compile(f"What is the closest object to the {SECTOR} of the ego car\\?"),
        re.compile(f"A {SINGULAR}\\."),
    ),
}


@st.composite
def scene_objects(draw: st.DrawFn) -> SceneObject:
    name = draw(st.sampled_from(sorted(STATUSES)))
    camera = "CAM_FRONT" if name == "traffic light" else draw(st.sampled_from(sorted(SECTORS)))
    return SceneObject(
        name=name,
        camera=camera,
        center=(draw(st.floats(0, 1600)), draw(st.floats(0, 900))),
        distance=draw(st.floats(1, 60)),
        status=draw(st.sampled_from((*STATUSES[name], None))),
    )


SCENES = st.lists(scene_objects(), max_size=25)


def templates_of(question: str) -> list[str]:
    return [name for name, (pattern, _) in (GRAMMAR | OURS).items() if pattern.fullmatch(question)]


def car(camera: str = "CAM_BACK", status: str | None = "moving", distance: float = 10.0) -> SceneObject:
    return SceneObject("car", camera, (800.0, 450.0), distance, status)


def answers(objects: list[SceneObject], seed: int = 0) -> dict[str, str]:
    return {row["Q"]: row["A"] for row in perception_questions(objects, random.Random(seed))}


@pytest.mark.skipif(not DRIVELM.exists(), reason="the real DriveLM frames are not here")
def test_grammar_is_the_one_of_the_real_file() -> None:
    """The patterns that our sentences must match below are first proved on the real sentences."""
    frames = [frame for scene in json.loads(DRIVELM.read_text()).values() for frame in scene["key_frames"].values()]
    seen: Counter[str] = Counter()
    misfits = []
    for row in (row for frame in frames for row in frame["QA"]["perception"]):
        for name, (question, answer) in GRAMMAR.items():
            if question.fullmatch(row["Q"]):
                seen[name] += 1
                if not answer.fullmatch(row["A"]):
                    misfits.append(row["A"])
    starts = ("What are objects", "What is the status", "Are there", "What is the observed", "What is the visual")
    rows = [row["Q"] for frame in frames for row in frame["QA"]["perception"] if row["Q"].startswith(starts)]
    assert sum(seen.values()) == len(rows)  # no question of these five kinds is worded otherwise
    assert min(seen.values()) > 20
    # People rephrased a few: "The truck to the front right of the ego car is moving.", "many obstacles", a lost comma.
    assert len(misfits) / len(rows) < 0.06, misfits


@given(SCENES, st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_every_question_and_answer_obeys_the_grammar(objects: list[SceneObject], seed: int) -> None:
    for row in perception_questions(objects, random.Random(seed)):
        names = templates_of(row["Q"])
        assert len(names) == 1, row
        assert (GRAMMAR | OURS)[names[0]][1].fullmatch(row["A"]), row


@pytest.mark.skipif(not DRIVELM.exists(), reason="the real DriveLM frames are not here")
def test_real_sentences_are_reproduced_word_for_word() -> None:
    rows = {
        (row["Q"], row["A"])
        for scene in json.loads(DRIVELM.read_text()).values()
        for frame in scene["key_frames"].values()
        for row in frame["QA"]["perception"]
    }

    def some(name: str, camera: str, *states: str | None) -> list[SceneObject]:
        return [SceneObject(name, camera, (1.0, 1.0), 5.0 + i, state) for i, state in enumerate(states)]

    moving, parked = ["moving"], ["parked"]
    made = [
        some("car", "CAM_BACK", "moving", "moving"),
        some("car", "CAM_BACK_LEFT", "moving", "parked"),
        some("truck", "CAM_BACK_LEFT", *parked * 5, "moving"),
        some("truck", "CAM_BACK_LEFT", *parked * 5, "moving", "moving"),
        some("car", "CAM_FRONT_RIGHT", "moving", "moving", "parked"),
        some("bus", "CAM_BACK", "stopped"),
        some("construction vehicle", "CAM_BACK_RIGHT", "parked"),
        some("barrier", "CAM_FRONT", None, None, None),
        some("traffic cone", "CAM_BACK_RIGHT", None, None, None),
        some("truck", "CAM_FRONT", "moving") + some("car", "CAM_BACK", "parked"),
        some("truck", "CAM_BACK", "moving"),
        some("car", "CAM_FRONT", *moving * 4),
        some("truck", "CAM_FRONT_LEFT", "moving") + some("barrier", "CAM_FRONT_LEFT", None),
    ]
    kinds = ("What are objects", "What is the status")
    written = [
        (row["Q"], row["A"])
        for objects in made
        for row in perception_questions(objects, random.Random(0))
        if row["Q"].startswith(kinds)
    ]
    found = [pair for pair in written if pair in rows]
    assert len(found) >= 16, [pair for pair in written if pair not in rows]


@given(SCENES, st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_existence_is_balanced_and_true(objects: list[SceneObject], seed: int) -> None:
    rows = [row for row in perception_questions(objects, random.Random(seed)) if row["Q"].startswith("Are there")]
    assert Counter(row["A"] for row in rows)["Yes."] * 2 == len(rows)
    phrases = {"Yes.": Counter[str](), "No.": Counter[str]()}
    for row in rows:
        match = re.fullmatch(r"Are there (.*) to the (.*) of the ego car\?", row["Q"])
        assert match is not None
        phrase, sector = match.groups()
        phrases[row["A"]][phrase] += 1
        here = [item for item in objects if SECTORS[item.camera] == sector]
        name = max((n for n in STATUSES if n in phrase), key=len)  # "bus" is no part of another class word
        state = re.match(r"(moving|parked|stopped|standing|red|green) |.* (with(?:out)? rider)s$", phrase)
        wanted = (state[1] or state[2]) if state else None
        same = [item for item in here if item.name == name]
        assert (row["A"] == "Yes.") == any(wanted in (None, item.status) for item in same), row
        if row["A"] == "No." and wanted:
            assert all(item.status is not None for item in same)
    lights = {phrase for phrase in phrases["Yes."] | phrases["No."] if "traffic light" in phrase}
    for phrase in set(phrases["Yes."] | phrases["No."]) - lights:
        assert phrases["Yes."][phrase] == phrases["No."][phrase] == 1  # the phrase alone never tells


def test_a_blind_guesser_who_knows_the_sector_gains_little() -> None:
    """Crowded front, empty back: the existence answers still cannot be told from the sector."""
    rng = random.Random(0)
    by_sector: dict[str, Counter[str]] = {sector: Counter() for sector in SECTORS.values()}
    for _ in range(300):
        objects = []
        for name in ("car", "truck", "pedestrian", "barrier"):
            for camera in SECTORS:
                if rng.random() < (0.6 if "FRONT" in camera else 0.25):
                    status = rng.choice(STATUSES[name]) if STATUSES[name] else None
                    objects.append(SceneObject(name, camera, (1.0, 1.0), rng.uniform(3, 50), status))
        for row in perception_questions(objects, rng):
            match = re.fullmatch(r"Are there .* to the (.*) of the ego car\?", row["Q"])
            if match:
                by_sector[match[1]][row["A"]] += 1
    assert all(sum(counts.values()) > 200 for counts in by_sector.values())
    best = sum(max(counts.values()) for counts in by_sector.values()) / sum(
        sum(counts.values()) for counts in by_sector.values()
    )
    assert best < 0.6


def test_a_red_light_is_denied_as_green_in_the_same_view() -> None:
    light = SceneObject("traffic light", "CAM_FRONT", (700.0, 82.2), 30.0, "red")
    said = answers([light])
    assert said["Are there red traffic lights to the front of the ego car?"] == "Yes."
    assert said["Are there green traffic lights to the front of the ego car?"] == "No."
    assert said["What is the visual description of <c1,CAM_FRONT,700.0,82.2>?"] == "Red light."
    assert said["What is the status of the traffic light that is to the front of the ego car?"] == (
        "One traffic light is red."
    )


@given(SCENES, st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_counts_and_closest_are_true(objects: list[SceneObject], seed: int) -> None:
    words = {0: "Zero.", 1: "One.", 2: "Two.", 3: "Three."}
    for question, answer in answers(objects, seed).items():
        count = re.fullmatch(r"How many (.*) are there to the (.*) of the ego car\?", question)
        closest = re.fullmatch(r"What is the closest object to the (.*) of the ego car\?", question)
        if count:
            name = "bus" if count[1] == "buses" else count[1][:-1]
            here = [item for item in objects if SECTORS[item.camera] == count[2] and item.name == name]
            assert answer == words.get(len(here), "Many.")
        if closest:
            here = [item for item in objects if SECTORS[item.camera] == closest[1]]
            assert answer == f"A {min(here, key=lambda item: item.distance).name}."


def test_status_is_not_asked_where_one_is_unknown() -> None:
    known = [car(distance=5.0), car(distance=6.0, status="parked")]
    question = "What is the status of the cars that are to the back of the ego car?"
    assert answers(known)[question] == "One of the cars is moving, and one is parked."
    assert question not in answers([*known, car(distance=7.0, status=None)])


def test_three_states_in_one_group() -> None:
    said = answers([car(status="stopped"), car(status="parked"), car(), car(), car()])
    assert said["What is the status of the cars that are to the back of the ego car?"] == (
        "Three of the cars are moving, one is parked, and one is stopped."
    )


def test_closest_needs_a_clear_winner() -> None:
    truck = SceneObject("truck", "CAM_BACK", (1.0, 1.0), 10.5, "parked")
    question = "What is the closest object to the back of the ego car?"
    assert question not in answers([car(distance=10.0), truck])
    assert answers([car(distance=5.0), truck])[question] == "A car."


@given(SCENES, st.integers(0, 2**32), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_order_of_objects_does_not_matter(objects: list[SceneObject], seed: int, mixer: random.Random) -> None:
    mixed = list(objects)
    mixer.shuffle(mixed)
    assert perception_questions(objects, random.Random(seed)) == perception_questions(mixed, random.Random(seed))


def test_tags_follow_the_key_objects_given() -> None:
    near, far = car(distance=4.0), SceneObject("bus", "CAM_FRONT", (12.34, 500.0), 30.0, "stopped")
    assert object_tag(2, far) == "<c2,CAM_FRONT,12.3,500.0>"
    assert choose_key_objects([far, near]) == [near, far]
    rows = perception_questions([near, far], random.Random(0), key_objects=[far])
    tagged = [row for row in rows if TAG.search(row["Q"])]
    assert tagged == [
        {"Q": "What is the observed status of object <c1,CAM_FRONT,12.3,500.0>?", "A": "Stationary."},
        {"Q": "What is the visual description of <c1,CAM_FRONT,12.3,500.0>?", "A": "Bus."},
    ]


@pytest.mark.parametrize(
    ("name", "camera", "status", "message"),
    [
        ("sedan", "CAM_BACK", None, "one of car, truck"),
        ("car", "CAM_TOP", None, "no camera 'CAM_TOP'; it has CAM_FRONT_LEFT"),
        ("car", "CAM_BACK", "standing", "moving, parked, stopped"),
        ("barrier", "CAM_BACK", "parked", "None only"),
    ],
)
def test_wrong_objects_are_explained(name: str, camera: str, status: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perception_questions([SceneObject(name, camera, (0.0, 0.0), 1.0, status)], random.Random(0))


def test_nothing_around_asks_nothing() -> None:
    assert perception_questions([], random.Random(0)) == []
