from training.data.rig import read_rig
from training.toyworld.contents import contents_of
from training.toyworld.scene import in_ego_path, sample_frame


def test_words_stand_where_they_show():
    for number in range(30):
        frame = sample_frame(3, number, 0, 1)
        contents = contents_of(frame, [(item, "CAM_FRONT") for item in frame.objects], [("car", "CAM_BACK_LEFT")])
        assert set(contents["words"]) == {"CAM_FRONT", "CAM_BACK"}
        assert frame.weather in contents["words"]["CAM_BACK"] and frame.direction in contents["words"]["CAM_FRONT"]
        near = [item.distance for item in frame.objects if in_ego_path(frame, item) and item.distance <= 11]
        assert ("near" in contents["words"]["CAM_FRONT"]) == bool(near)
        assert [thing["name"] for thing in contents["objects"]] == [item.name for item in frame.objects]
        assert contents["unclear"] == [("car", "CAM_BACK_LEFT")]


def test_both_front_lenses_of_a_rig_tell_what_is_ahead():
    rig = read_rig("seven")
    words = contents_of(sample_frame(0, 0, 0, 1, rig=rig), [])["words"]
    assert all(camera in words for camera in rig.sectors["front"])
    assert set(contents_of(sample_frame(0, 0, 0, 1, rig=read_rig("four")), [])["words"]) <= set(read_rig("four").names)
