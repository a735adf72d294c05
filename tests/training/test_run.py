"""The runner: finished stages are skipped, changes refused, failures and kills survived."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from filelock import FileLock

from training import run
from training.run import RunArguments, fingerprint, main
from training.stages.files import flags
from training.stages.recipes import module_of, read_recipe


def recipe_file(folder: Path, **sections) -> str:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(folder / "out"), **sections}, sort_keys=False))
    return str(file)


class Commands:
    """Stands in for `subprocess.run`: writes what a stage would have written, or fails, or is killed."""

    def __init__(self):
        self.ran: list[str] = []
        self.calls: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.found: dict[str, list[str]] = {}
        self.fails: dict[str, int | type[BaseException]] = {}

    def __call__(self, command, env, stdout=None, stderr=None):
        words = command[len(command) - command[::-1].index("-m") :]  # after the last -m: a launcher may have its own
        arguments = {word[2:]: value for word, value in zip(words, words[1:], strict=False) if word.startswith("--")}
        folder = Path(arguments["output_dir"])
        self.ran.append(folder.name)
        self.calls.append(command)
        self.environments.append(env)
        self.found[folder.name] = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "half.txt").write_text("begun")
        if stdout is not None:
            stdout.write(f"{folder.name} says\n")
        failure = self.fails.pop(folder.name, 0)
        if not isinstance(failure, int):
            raise failure()
        if failure == 0:
            self.write(words[0].removeprefix("training."), folder, arguments)
        return SimpleNamespace(returncode=failure)

    def write(self, module: str, folder: Path, arguments: dict[str, str]) -> None:
        if module == "toyworld":
            (folder / "drivelm.json").write_text(f"{arguments['scenes']} scenes")
        elif module == "prepare":
            (folder / "frames").mkdir()
            (folder / "frames/train.parquet").write_text(Path(arguments["drivelm_json"]).read_text())
            (folder / "dataset.json").write_text('{"split_hash": "abc"}')
            (folder / "picture.jpg").write_text("pixels")
        elif module == "finetune":
            result = folder / ("adapter" if arguments.get("merge") == "false" else "final")
            result.mkdir()
            (result / "model.safetensors").write_text("trained")
            (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
        elif module == "evaluate":
            (folder / "metrics.json").write_text('{"results": {"sighted": {"accuracy": 0.5}}}')
        else:
            (folder / "model.safetensors").write_text("weights")


@pytest.fixture
def commands(monkeypatch) -> Commands:
    fake = Commands()
    monkeypatch.setattr(run.subprocess, "run", fake)
    return fake


TOYWORLD = {"module": "toyworld", "scenes": 3}
PREPARE = {"module": "prepare", "from": "toyworld", "drivelm_json": "toyworld/drivelm.json"}
HEAL = {"module": "finetune", "from": "assemble", "data": "prepare", "max_steps": 2}
SECTIONS = {
    "toyworld": TOYWORLD,
    "prepare": PREPARE,
    "assemble": {"module": "assemble", "offline": True},
    "heal": HEAL,
    "adapt": HEAL | {"from": "heal", "merge": False},
    "merge": {"module": "merge", "from": "heal", "adapter": "adapt", "dtype": "bfloat16"},
}


def stages_of(file: Path) -> dict:
    return json.loads(file.read_text())["stages"]


def test_flags():
    arguments = {
        "scenes": 3,
        "none": None,
        "yes": True,
        "no": False,
        "many": [1, 2],
        "kwargs": {"a": 1},
        "text": "a b",
    }
    assert flags(arguments) == [
        *(
            "--scenes",
            "3",
            "--yes",
            "true",
            "--no",
            "false",
            "--many",
            "1",
            "2",
            "--kwargs",
            '{"a": 1}',
            "--text",
            "a b",
        )
    ]


def test_fingerprints(tmp_path):
    assert fingerprint("publisher/model") == {"path": "publisher/model"}
    (tmp_path / "a.txt").write_text("a")
    first = fingerprint(str(tmp_path))
    assert (
        list(first["files"]) == ["a.txt"] and fingerprint(str(tmp_path / "a.txt"))["sha256"] == first["files"]["a.txt"]
    )
    (tmp_path / "a.txt").write_text("b")
    assert fingerprint(str(tmp_path))["sha256"] != first["sha256"]
    (tmp_path / "drivelm.json").write_text("{}")  # a toy world now: pictures are left out
    (tmp_path / "a.jpg").write_text("pixels")
    assert list(fingerprint(str(tmp_path))["files"]) == ["drivelm.json"]


def test_stages_run_once_and_are_recorded(tmp_path, commands, capsys):
    recipe = recipe_file(tmp_path, **SECTIONS)
    file = main(RunArguments(recipe))
    assert commands.ran == list(SECTIONS)
    record = stages_of(file)
    assert list(record) == list(SECTIONS)
    for stage, entry in record.items():
        assert entry["status"] == "finished" and entry["minutes"] >= 0 and entry["versions"]["torch"]
        module = SECTIONS[stage]["module"]
        assert entry["command"].startswith(f"python -m training.{module} --output_dir ")
        assert set(entry["inputs"]) <= set(module_of(module).STAGE.inputs) and len(entry["output"]["sha256"]) == 64
    assert record["heal"]["inputs"]["data"]["split_hash"] == "abc"
    assert record["heal"]["figures"]["first"]["loss"] == 3.0 and record["heal"]["figures"]["last"]["loss"] == 2.0
    assert record["adapt"]["output"]["path"].endswith("adapter")
    before = file.read_bytes()
    assert main(RunArguments(recipe)) == file
    assert commands.ran == list(SECTIONS) and file.read_bytes() == before
    assert capsys.readouterr().out.count("finished before") == len(SECTIONS)


def test_a_stage_that_was_added_runs_alone(tmp_path, commands):
    main(RunArguments(recipe_file(tmp_path, toyworld=TOYWORLD)))
    main(RunArguments(recipe_file(tmp_path, toyworld=TOYWORLD, prepare=PREPARE)))
    assert commands.ran == ["toyworld", "prepare"]


def test_changed_arguments_are_refused(tmp_path, commands):
    main(RunArguments(recipe_file(tmp_path, toyworld=TOYWORLD | {"seed": 1})))
    with pytest.raises(
        ValueError, match="stage toyworld was run before.*scenes was 3, is 4; seed was 1, is None. Delete"
    ):
        main(RunArguments(recipe_file(tmp_path, toyworld=TOYWORLD | {"scenes": 4})))
    assert commands.ran == ["toyworld"]
    run.shutil.rmtree(tmp_path / "out/toyworld")  # as the error says
    main(RunArguments(recipe_file(tmp_path, toyworld=TOYWORLD | {"scenes": 4})))
    assert commands.ran == ["toyworld"] * 2


def test_changed_inputs_and_results_are_refused(tmp_path, commands):
    recipe = recipe_file(tmp_path, **SECTIONS)
    main(RunArguments(recipe))
    out = tmp_path / "out"
    picture = out / "prepare/picture.jpg"
    picture.write_text("other pixels")  # large and never read back: not part of the prepared data's fingerprint
    main(RunArguments(recipe))
    result = out / "heal/final/model.safetensors"
    result.write_text("tampered")
    with pytest.raises(ValueError, match="stage heal .*its result .*heal/final was changed after it was written"):
        main(RunArguments(recipe))
    result.write_text("trained")
    table = out / "prepare/frames/train.parquet"
    whole = table.read_text()
    table.write_text("other rows")
    with pytest.raises(ValueError, match="stage prepare .*its result .*prepare was changed"):
        main(RunArguments(recipe))
    table.write_text(whole)
    main(RunArguments(recipe))
    assert commands.ran == list(SECTIONS)


def test_other_data_is_refused_by_name(tmp_path, commands):
    data = tmp_path / "data"
    (data / "frames").mkdir(parents=True)
    (data / "dataset.json").write_text('{"split_hash": "abc"}')
    (data / "frames/train.parquet").write_text("rows")
    recipe = recipe_file(tmp_path, heal={"module": "finetune", "checkpoint": "publisher/model"})
    main(RunArguments(recipe, data=str(data)))
    (data / "frames/train.parquet").write_text("other rows")
    with pytest.raises(ValueError, match="stage heal .*data .*data has other contents in frames/train.parquet"):
        main(RunArguments(recipe, data=str(data)))
    with pytest.raises(ValueError, match="data was .*, is 'elsewhere'"):
        main(RunArguments(recipe, data="elsewhere"))


@pytest.mark.parametrize("failure", [3, KeyboardInterrupt], ids=["failed", "killed"])
@pytest.mark.parametrize(("stage", "keeps"), [("assemble", []), ("heal", ["half.txt"])])
def test_a_stage_that_did_not_finish_runs_again(tmp_path, commands, failure, stage, keeps):
    """What resumes by itself finds its folder as it left it; of the rest the half-written folder is removed."""
    recipe = recipe_file(tmp_path, **SECTIONS)
    commands.fails[stage] = failure
    with pytest.raises((ChildProcessError, KeyboardInterrupt)) as error:
        main(RunArguments(recipe))
    if failure == 3:
        assert f"stage {stage} failed (exit status 3)" in str(error.value) and "run.json" in str(error.value)
    done = list(SECTIONS)[: list(SECTIONS).index(stage)]
    record = stages_of(tmp_path / "out/run.json")
    assert {name: entry["status"] for name, entry in record.items()} == {
        **dict.fromkeys(done, "finished"),
        stage: "running",
    }
    assert "output" not in record[stage] and f"training.{SECTIONS[stage]['module']}" in record[stage]["command"]
    commands.ran.clear()
    main(RunArguments(recipe))
    assert commands.ran == [name for name in SECTIONS if name not in done]
    assert commands.found[stage] == keeps
    assert {entry["status"] for entry in stages_of(tmp_path / "out/run.json").values()} == {"finished"}


def test_a_failed_stage_with_other_arguments_is_refused_too(tmp_path, commands):
    """Half a training run must not go on with another learning rate."""
    commands.fails["heal"] = 1
    with pytest.raises(ChildProcessError):
        main(RunArguments(recipe_file(tmp_path, **SECTIONS)))
    with pytest.raises(ValueError, match="stage heal .*max_steps was 2, is 9"):
        main(RunArguments(recipe_file(tmp_path, **{**SECTIONS, "heal": HEAL | {"max_steps": 9}})))


def test_a_result_that_is_gone_is_made_again(tmp_path, commands):
    recipe = recipe_file(tmp_path, toyworld=TOYWORLD, prepare=PREPARE)
    main(RunArguments(recipe))
    run.shutil.rmtree(tmp_path / "out/prepare")
    main(RunArguments(recipe))
    assert commands.ran == ["toyworld", "prepare", "prepare"]


def test_launcher_and_environment(tmp_path, commands, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "mine")
    recipe = recipe_file(tmp_path, env={"OMP_NUM_THREADS": 2}, **SECTIONS)
    file = main(RunArguments(recipe, launcher="torchrun --nproc_per_node 2"))
    for name, call, env in zip(commands.ran, commands.calls, commands.environments, strict=True):
        start = ["torchrun", "--nproc_per_node", "2"] if SECTIONS[name]["module"] == "finetune" else [sys.executable]
        assert call[: len(start) + 1] == [*start, "-m"]
        assert env["OMP_NUM_THREADS"] == "2" and env["PYTHONPATH"].split(":") == [str(run.ROOT), "mine"]
    assert stages_of(file)["heal"]["command"].startswith("torchrun --nproc_per_node 2 -m training.finetune ")


def test_a_stage_in_several_processes(tmp_path, commands):
    recipe = recipe_file(tmp_path, env={"OMP_NUM_THREADS": 2}, **SECTIONS | {"heal": HEAL | {"processes": 2}})
    file = main(RunArguments(recipe))
    heal = commands.ran.index("heal")
    assert commands.calls[heal][1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert "--processes" not in commands.calls[heal]
    assert [env["OMP_NUM_THREADS"] for env in commands.environments] == [
        "1" if name == "heal" else "2" for name in SECTIONS
    ]
    record = stages_of(file)["heal"]
    assert record["command"].startswith("python -m torch.distributed.run ") and record["arguments"]["processes"] == 2
    launched = main(RunArguments(recipe, output_dir=str(tmp_path / "other"), launcher="torchrun --nproc_per_node 4"))
    assert stages_of(launched)["heal"]["command"].startswith("torchrun --nproc_per_node 4 -m training.finetune ")


def test_stages_side_by_side_say_what_they_say_in_logs(tmp_path, commands, capsys):
    others = {"blind": HEAL | {"from": "assemble"}, "told": {"module": "evaluate", "from": "heal", "data": "prepare"}}
    recipe = recipe_file(tmp_path, **SECTIONS, **others)
    commands.fails["heal"] = 2
    with pytest.raises(ChildProcessError, match=r"stage heal failed .*logs/heal.txt ends: .*heal says"):
        main(RunArguments(recipe, jobs=2))
    assert set(commands.ran) == {"toyworld", "prepare", "assemble", "heal", "blind"}  # what does not need it
    commands.ran.clear()
    file = main(RunArguments(recipe, jobs=2))
    assert commands.ran[0] == "heal" and set(commands.ran) == {"heal", "adapt", "merge", "told"}
    assert {entry["status"] for entry in stages_of(file).values()} == {"finished"}
    assert (tmp_path / "out/logs/heal.txt").read_text().count("heal says") == 2
    assert "adapt says" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="jobs must be at least 1; got 0"):
        RunArguments(recipe, jobs=0)


def test_who_waits_is_told_what_was_run(tmp_path, commands):
    recipe = read_recipe(recipe_file(tmp_path, **SECTIONS))
    told: list[str] = []
    run.run(recipe, tmp_path / "out", after=told.append)
    run.run(recipe, tmp_path / "out", after=told.append)
    assert told == list(SECTIONS)


def test_two_runs_never_share_a_folder(tmp_path, commands):
    recipe = recipe_file(tmp_path, toyworld=TOYWORLD)
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.lock"), pytest.raises(ValueError, match="another run is at work in .*out"):
        main(RunArguments(recipe))
    assert commands.ran == []
    main(RunArguments(recipe, output_dir=str(tmp_path / "other")))
    assert (tmp_path / "other/toyworld/drivelm.json").is_file() and not (tmp_path / "out/toyworld").exists()


def test_the_record_is_never_half_written(tmp_path, commands, monkeypatch):
    recipe = recipe_file(tmp_path, toyworld=TOYWORLD, prepare=PREPARE)
    main(RunArguments(recipe))
    run.shutil.rmtree(tmp_path / "out/prepare")
    before = (tmp_path / "out/run.json").read_bytes()

    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(run.os, "replace", full)
    with pytest.raises(OSError, match="disk is full"):
        main(RunArguments(recipe))
    assert (tmp_path / "out/run.json").read_bytes() == before


def test_a_real_world_is_made_and_prepared(tmp_path, capfd):
    sections = {"toyworld": TOYWORLD | {"width": 160, "num_workers": 1}, "prepare": PREPARE | {"coordinates": "none"}}
    recipe = recipe_file(tmp_path, **sections)
    record = stages_of(main(RunArguments(recipe)))
    assert [entry["status"] for entry in record.values()] == ["finished"] * 2
    info = json.loads((tmp_path / "out/prepare/dataset.json").read_text())
    assert record["prepare"]["output"]["split_hash"] == info["split_hash"]
    assert sum(counts["scenes"] for counts in info["counts"].values()) == 3
    capfd.readouterr()
    main(RunArguments(recipe))
    assert capfd.readouterr().out.count("finished before") == 2
