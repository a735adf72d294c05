"""Rigs: what follows from azimuths, and tables that are none."""

import json

import pytest

from training.data.rig import NUSCENES, load_rig, read_rig, whereabouts

SIX = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")


def test_nuscenes_six_are_one_instance():
    assert NUSCENES.names == SIX
    assert [NUSCENES.sector(name) for name in SIX] == [
        "front left", "front", "front right", "back left", "back", "back right"
    ]  # fmt: skip
    assert NUSCENES.neighbours("CAM_BACK") == ("CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
    assert NUSCENES.neighbours("CAM_FRONT") == SIX[:3]
    assert [NUSCENES.mirror(name) for name in SIX] == [SIX[2], SIX[1], SIX[0], SIX[5], SIX[4], SIX[3]]


def test_four_cameras_and_a_second_lens():
    four, seven = read_rig("four"), read_rig("seven")
    assert list(four.sectors) == ["front", "left", "back", "right"]
    assert four.neighbours("left") == ("front", "left", "back") and four.mirror("left") == "right"
    assert seven.sectors["front"] == ("CAM_FRONT", "CAM_FRONT_NARROW")
    assert seven.mirror("CAM_FRONT_NARROW") == "CAM_FRONT_NARROW"
    assert seven.neighbours("CAM_FRONT_LEFT") == ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_NARROW", "CAM_BACK_LEFT")
    assert whereabouts("left") == "to the left of the ego car" and whereabouts("back") == "behind the ego car"


@pytest.mark.parametrize(
    ("rig", "question", "cameras"),
    [
        ("nuscenes", "Are there cars to the back left of the ego car?", ["CAM_BACK_LEFT"]),
        ("nuscenes", "What is <c1,CAM_BACK,1.0,2.0> in front of the ego car?", ["CAM_FRONT", "CAM_BACK"]),
        ("four", "Are there cars to the left of the ego car?", ["left"]),
        ("four", "Is <c1,back,1.0,2.0> parked? Turn left, go on to the right, look back.", ["back"]),
        ("seven", "Is there any traffic element in the front view?", ["CAM_FRONT", "CAM_FRONT_NARROW"]),
    ],
)
def test_cameras_that_a_question_names(rig, question, cameras):
    assert read_rig(rig).named_in(question) == tuple(cameras)


def test_a_rig_travels_as_a_table(tmp_path):
    for name in ("nuscenes", "four", "seven"):
        rig = read_rig(name)
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(rig.to_table()))
        assert read_rig(file) == rig == load_rig({"rig": json.loads(file.read_text())}, rig.names)


def test_older_prepared_data_have_nuscenes_cameras():
    assert load_rig({}, [*SIX, "LIDAR_BEV"]) is NUSCENES
    with pytest.raises(ValueError, match="does not tell where left look; prepare it again.*--rig FILE"):
        load_rig({}, ["CAM_FRONT", "left"])


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("a: {azimuth: 0}\nb: {azimuth: 0}", "a and b both have azimuth 0"),
        ("a: {azimuth: 0}\nb: {azimuth: 360}", "a and b both have azimuth 0"),
        ("a: {azimuth: 0}\na: {azimuth: 20}", "'a' appears twice"),
        ("a: {azimuth: north}", "azimuth of a must be a number; got 'north'"),
        ("a: {azimuth: .nan}", "azimuth of a must be a number; got nan"),
        ("a: {}", "a needs an azimuth"),
        ("'': {azimuth: 0}", "'' is no name for a camera"),
        ("front-left: {azimuth: 0}", "'front-left' is no name for a camera"),
        ("3: {azimuth: 0}", "3 is no name for a camera"),
        ("MAP_BEV: {azimuth: 0}", "'MAP_BEV' is no name for a camera"),
        ("a: {azimuth: 0, yaw: 3}", "a has yaw; known: azimuth, place, size, field_of_view"),
        ("a: {azimuth: 0, place: [1, 2]}", "place of a must be 3 numbers"),
        ("a: {azimuth: 0, size: [1600.5, 900]}", "size of a must be a width and a height"),
        ("a: {azimuth: 0, field_of_view: 190}", "field_of_view of a must lie between"),
        ("- a\n- b", "expected a rig"),
        ("", "expected a rig"),
        ("a: [", "neither YAML nor JSON"),
    ],
)
def test_a_wrong_rig_is_an_error_that_names_the_file(tmp_path, table, problem):
    file = tmp_path / "rig.yaml"
    file.write_text(table)
    with pytest.raises(ValueError, match="rig.yaml") as error:
        read_rig(file)
    assert problem in str(error.value)


def test_an_unknown_rig_names_those_that_are():
    with pytest.raises(ValueError, match="five is neither a file nor one of four, nuscenes, seven"):
        read_rig("five")
    with pytest.raises(ValueError, match="the rig has no camera 'CAM_BACK'; it has front, left, back, right"):
        read_rig("four").sector("CAM_BACK")
