import pytest

from smoldriver_hf.fingerprint import fingerprint


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_weights_and_settings_count_and_nothing_else(folder):
    # What evaluations of before have noted stays true.
    before = fingerprint(folder)
    assert before == "sha256:072692169431d1cf5531ca8d4ebd5cc4f292083ab4807d1ec136ad74e0594fe3"
    (folder / "loss.png").write_bytes(b"picture")
    assert fingerprint(str(folder)) == before
    (folder / "model.safetensors").write_bytes(b"Weights")
    assert fingerprint(folder) != before


def test_a_file_of_another_name_is_another_folder(folder):
    before = fingerprint(folder)
    (folder / "config.json").rename(folder / "settings.json")
    assert fingerprint(folder) != before
