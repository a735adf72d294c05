import pytest

from training.data.contents import contents_of_key_objects, limited, moved, read_contents, shown_by, write_contents


def thing(name, camera, distance):
    return {"name": name, "camera": camera, "status": None, "distance": distance}


def test_a_camera_shows_its_own_from_near_to_far():
    things = [
        thing("car", "FRONT", 9.0),
        thing("bus", "BACK", 1.0),
        thing("cone", "FRONT", None),
        thing("van", "FRONT", 2.0),
    ]
    contents = {"objects": things, "words": {}, "unclear": []}
    assert [item["name"] for item in shown_by(contents, "FRONT")] == ["van", "car", "cone"]
    assert shown_by(contents, "LEFT") == []


def test_pictures_change_places_with_all_that_they_show():
    contents = {
        "objects": [thing("car", "LEFT", 1.0), thing("bus", "FRONT", 2.0)],
        "words": {"LEFT": ["rain"], "FRONT": ["slow"]},
        "unclear": [["van", "RIGHT"]],  # as JSON has it
    }
    swapped = moved(contents, {"LEFT": "RIGHT", "RIGHT": "LEFT"})
    assert [(item["name"], item["camera"]) for item in swapped["objects"]] == [("car", "RIGHT"), ("bus", "FRONT")]
    assert swapped["words"] == {"RIGHT": ["rain"], "FRONT": ["slow"]} and swapped["unclear"] == [("van", "LEFT")]
    assert contents["objects"][0]["camera"] == "LEFT"  # nothing is changed in place
    left = limited(contents, ["LEFT"])
    assert (left["objects"], left["words"], left["unclear"]) == (contents["objects"][:1], {"LEFT": ["rain"]}, [])


@pytest.mark.parametrize(
    ("category", "status", "description", "told"),
    [
        ("Vehicle", "Moving", "Black sedan.", ("car", "moving")),
        ("Vehicle", "Stationary", "White truck.", ("truck", "parked")),
        ("Vehicle", "Moving", "Champagne-colored sedan car", ("car", "moving")),
        ("Vehicle", "Moving", "Cyclist in red.", ("bicycle", "with rider")),
        ("Pedestrian", "Stationary", "Woman wearing a red top.", ("pedestrian", "standing")),
        ("Traffic element", None, "Green light.", ("traffic light", "green")),
        ("Obstacle", None, "Orange cones.", ("traffic cone", None)),
        ("Traffic element", None, "Red lights on a pole.", ("traffic light", "red")),
        ("Traffic element", None, "No entry.", ("traffic element", None)),
        ("Vehicle", "Moving", "", ("vehicle", None)),
        ("Vehicle", "Moving", "Light gray vehicle.", ("vehicle", None)),
        ("Anything else", "Moving", "Something.", None),
    ],
)
def test_what_drivelms_key_objects_tell(category, status, description, told):
    info = {"Category": category, "Visual_description": description} | ({"Status": status} if status else {})
    objects = contents_of_key_objects([("CAM_BACK", info)])["objects"]
    assert objects == ([] if told is None else [{**thing(told[0], "CAM_BACK", None), "status": told[1]}])


def test_the_file_and_what_is_none(tmp_path):
    contents = {"a": {"objects": [thing("car", "FRONT", 1.5)], "words": {"FRONT": ["rain"]}, "unclear": []}}
    write_contents(tmp_path, contents)
    assert read_contents(tmp_path / "contents.json") == contents


@pytest.mark.parametrize(
    "frame",
    [
        '{"objects": []}',
        '{"objects": [{"name": "car"}], "words": {}, "unclear": []}',
        '{"objects": [{"name": 3, "camera": "A", "status": null, "distance": 1}], "words": {}, "unclear": []}',
        '{"objects": [{"name": "car", "camera": "A", "status": null, "distance": "1"}], "words": {}, "unclear": []}',
        '{"objects": [], "words": ["rain"], "unclear": []}',
        '{"objects": [], "words": {"A": "rain"}, "unclear": []}',
        '{"objects": [], "words": {"A": [1]}, "unclear": []}',
        '{"objects": [], "words": {}, "unclear": [["car"]]}',
        "[]",
    ],
)
def test_a_file_of_another_form(tmp_path, frame):
    (tmp_path / "contents.json").write_text(f'{{"a": {frame}}}')
    with pytest.raises(ValueError, match=r"contents.json does not hold \{frame token"):
        read_contents(tmp_path / "contents.json")


def test_a_file_that_was_cut(tmp_path):
    (tmp_path / "contents.json").write_text('{"a": {"objects": [')
    with pytest.raises(ValueError, match=r"contents.json does not hold \{frame token"):
        read_contents(tmp_path / "contents.json")
