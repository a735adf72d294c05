from training.data.contents import shown_by


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
