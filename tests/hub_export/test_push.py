import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from exported import export, save_checkpoint
from fake_hub import FakeHub
from safetensors.torch import load_file, save_file

from hub_export import push
from hub_export.check import STAMP, folder_hashes
from hub_export.push import PushArguments

ROOT = Path(__file__).resolve().parents[2]
REPO = "anna/smoldriver"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("push")
    return export(root / "smoldriver", save_checkpoint(root / "final"))


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "smoldriver")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "good-token")
        yield hub


def tree(hub, revision="main"):
    repository = hub.repositories[REPO]
    files = repository.trees[repository.resolve(revision)]
    return {path: hub.blobs[file["lfs"] or file["oid"]] for path, file in files.items()}


def change_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor + 1 for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    restamp(folder)


def restamp(folder):
    stamp = json.loads((folder / STAMP).read_text())
    (folder / STAMP).write_text(json.dumps({**stamp, "files": folder_hashes(folder)}))


def test_one_commit_holds_everything_and_the_card_names_it(hub, folder):
    revision = push.main(PushArguments(str(folder), REPO))
    published = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".hub_export" not in path.parts
    }
    assert tree(hub, revision) == published  # one commit, complete in itself
    assert (
        hub.repositories[REPO].log[revision][1:] == hub.repositories[REPO].log[revision][-1:]
    )  # first after creation
    card = tree(hub)["README.md"].decode()
    assert f'repository, revision = "{REPO}", "{revision}"' in card
    assert {name: content for name, content in tree(hub).items() if name != "README.md"} == {
        name: content for name, content in published.items() if name != "README.md"
    }


def test_the_same_push_again_does_nothing(hub, folder):
    revision = push.main(PushArguments(str(folder), REPO))
    commits, uploads = hub.commits, len(hub.uploads)
    assert push.main(PushArguments(str(folder), REPO)) == revision
    assert (hub.commits, len(hub.uploads)) == (commits, uploads)


def test_a_later_push_removes_what_is_gone_and_leaves_the_pinned_commit_alone(hub, folder):
    (folder / "notes.txt").write_text("first edition\n")
    restamp(folder)
    first = push.main(PushArguments(str(folder), REPO))
    before = tree(hub, first)
    (folder / "notes.txt").unlink()
    change_weights(folder)
    second = push.main(PushArguments(str(folder), REPO))
    assert second != first and tree(hub, first) == before
    assert "notes.txt" in before and "notes.txt" not in tree(hub)
    assert tree(hub)["model.safetensors"] == (folder / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_a_card_that_was_not_pinned_is_pinned_by_the_next_push(hub, folder, monkeypatch):
    commit = push.HfApi.create_commit

    def lost_after_content(self, *args, **kwargs):
        if kwargs["commit_message"].startswith("Pin"):
            raise OSError("connection lost")
        return commit(self, *args, **kwargs)

    with monkeypatch.context() as broken:
        broken.setattr(push.HfApi, "create_commit", lost_after_content)
        with pytest.raises(ValueError, match="interrupted"):
            push.main(PushArguments(str(folder), REPO))
    assert '"smoldriver", None' in tree(hub)["README.md"].decode()
    content = hub.repositories[REPO].refs["main"]
    assert push.main(PushArguments(str(folder), REPO)) == content
    assert content in tree(hub)["README.md"].decode()


def test_a_connection_lost_in_mid_upload_leaves_the_repository_as_it_was(hub, folder, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    first = push.main(PushArguments(str(folder), REPO))
    before, head = tree(hub), hub.repositories[REPO].refs["main"]
    change_weights(folder)
    hub.break_uploads = True
    with pytest.raises(ValueError, match="interrupted.*run the same command again"):
        push.main(PushArguments(str(folder), REPO))
    assert hub.repositories[REPO].refs["main"] == head and tree(hub) == before

    hub.break_uploads = False
    uploads = len(hub.uploads)
    second = push.main(PushArguments(str(folder), REPO))
    assert len(hub.uploads) == uploads + 1  # the weights; everything else was there
    assert second != first and tree(hub)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_dry_run_lists_files_and_sends_nothing(hub, folder, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert push.main(PushArguments(str(folder), REPO, dry_run=True)) is None
    shown = capsys.readouterr().out
    assert f"{(folder / 'model.safetensors').stat().st_size:,}  model.safetensors" in shown
    assert "nothing was sent" in shown and ".hub_export" not in shown and hub.repositories == {}


def test_a_pull_request_leaves_main_alone(hub, folder):
    push.main(PushArguments(str(folder), REPO))
    head = hub.repositories[REPO].refs["main"]
    change_weights(folder)
    revision = push.main(PushArguments(str(folder), REPO, pr=True))
    repository = hub.repositories[REPO]
    assert repository.refs["main"] == head
    assert revision in repository.log[repository.refs["refs/pr/1"]]
    assert revision in tree(hub, "refs/pr/1")["README.md"].decode()


def test_a_pull_request_needs_a_repository(hub, folder):
    with pytest.raises(ValueError, match="not there"):
        push.main(PushArguments(str(folder), REPO, pr=True))
    assert hub.repositories == {}


def test_private_repositories_are_private_from_the_start(hub, folder):
    push.main(PushArguments(str(folder), REPO, private=True))
    assert hub.repositories[REPO].private


@pytest.mark.parametrize("token, message", [("wrong", "does not accept the token"), ("other-token", "may not write")])
def test_a_wrong_token_is_a_clear_error(hub, folder, monkeypatch, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=message) as caught:
        push.main(PushArguments(str(folder), REPO))
    assert token not in str(caught.value).replace(message, "") and hub.repositories == {}


def test_an_unreachable_server_is_a_clear_error(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "good-token")
    with pytest.raises(ValueError, match="cannot be reached"):
        push.main(PushArguments(str(folder), REPO))


def test_nothing_unchecked_is_pushed(hub, folder):
    (folder / "README.md").write_text("better")
    with pytest.raises(ValueError, match="changed since it was checked"):
        push.main(PushArguments(str(folder), REPO))
    (folder / STAMP).unlink()
    with pytest.raises(ValueError, match="no stamp"):
        push.main(PushArguments(str(folder), REPO))
    with pytest.raises(ValueError, match="owner/name"):
        push.main(PushArguments(str(folder), "smoldriver"))
    assert hub.repositories == {}


STRANGER = """
import sys
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

repo, revision = sys.argv[1:]
try:
    AutoModelForImageTextToText.from_pretrained(repo, revision=revision)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("loaded without trust")
AutoProcessor.from_pretrained(repo, revision=revision, trust_remote_code=True)
for auto_class in (AutoModelForImageTextToText, AutoModel):
    model = auto_class.from_pretrained(repo, revision=revision, trust_remote_code=True)
print(float(sum(parameter.double().abs().sum() for parameter in model.parameters())))
"""


def test_a_stranger_loads_the_pinned_revision_after_a_second_push(hub, folder, tmp_path):
    """The whole road over HTTP and through the command line, into an empty HF_HOME."""
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "hub_export", "push", str(folder), REPO]
    pushing = {**environment, "HF_TOKEN": "good-token", "HF_HOME": str(tmp_path / "mine")}
    done = subprocess.run(command, cwd=ROOT, env=pushing, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    revision = done.stdout.split()[-1]
    wanted = load_file(folder / "model.safetensors")
    wanted = sum(tensor.double().abs().sum() for name, tensor in wanted.items() if not name.startswith("lm_head"))
    change_weights(folder)
    assert push.main(PushArguments(str(folder), REPO)) != revision

    stranger = {**environment, "HF_HOME": str(tmp_path / "theirs")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", STRANGER, REPO, revision],
        cwd=tmp_path,
        env=stranger,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == pytest.approx(float(wanted))
