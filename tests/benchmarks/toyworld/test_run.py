"""The benchmark from end to end with stages that only leave their files: shared ones run once, choices follow."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from evaluations import write_evaluation

from benchmarks.toyworld import asking, run
from benchmarks.toyworld.run import ToyworldArguments, chosen, main, recipe_of
from benchmarks.toyworld.variants import BUDGETS, GROUPS, QUICK_ABLATIONS, VARIANTS
from training.evaluation.controls import expand_controls
from training.stages.recipes import module_of

HALF, BLIND, SEES = [True, True, False] * 2, [True, False, False] * 2, [True] * 6


class Stages:
    """Stands in for `subprocess.run` of `training.run`: leaves what each command's STAGE and the results look for."""

    def __init__(self):
        self.ran: list[str] = []
        self.best: set[str] = set()  # variants that are right on everything

    def __call__(self, command, env, stdout=None, stderr=None):
        words = command[command.index("-m") + 1 :]
        arguments: dict[str, str] = {}
        for word in words[1:]:
            if word.startswith("--"):
                name = word[2:]
            arguments[name] = word
        module, folder = words[0].removeprefix("training."), Path(arguments["output_dir"])
        self.ran.append("/".join(folder.parts[folder.parts.index("out") + 1 :]))
        assert env["OMP_NUM_THREADS"] == "1"
        folder.mkdir(parents=True, exist_ok=True)
        if module == "evaluate":
            self.evaluate(folder, words)
            return SimpleNamespace(returncode=0)
        note = json.dumps({"held_out": {"tokens_4": {"perception": 60.0}}})
        result = folder / module_of(module).STAGE.result({**arguments, "merge": arguments.get("merge") != "false"})
        result.mkdir(exist_ok=True)
        for name in ("model.safetensors", "drivelm.json", "read.json", "align.json"):
            (result / name).write_text(note)
        (folder / "transfer_metrics.json").write_text('{"start": {"loss": 1.0}}')
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
        return SimpleNamespace(returncode=0)

    def evaluate(self, folder: Path, words: list[str]) -> None:
        variant = folder.parent.name
        asked = words[words.index("--controls") + 1 :]
        asked = asked[: next(place for place, word in enumerate(asked) if word.startswith("--"))]
        controls = [str(one) for one in expand_controls(asked, ["CAM_FRONT"], (1, 3))]
        answers = BLIND if "blind" in variant else SEES if variant in self.best else HALF
        write_evaluation(folder, dict.fromkeys(controls, answers))


@pytest.fixture
def stages(monkeypatch) -> Stages:
    fake = Stages()
    monkeypatch.setattr(run.runner.subprocess, "run", fake)
    for module, name in ((run, "fetch_dinov2_small"), (run, "fetch_minilm"), (asking, "fetch_minilm")):
        monkeypatch.setattr(module, name, lambda: "parts")
    return fake


def arguments(tmp_path: Path, *only: str, **others) -> ToyworldArguments:
    return ToyworldArguments(str(tmp_path / "out"), str(tmp_path / "results.json"), only=list(only), **others)


def test_shared_stages_run_once_and_a_second_call_runs_nothing(tmp_path, stages, capsys):
    args = arguments(tmp_path, "models", "no-align", seeds=[0, 1])
    found = main(args)
    assert len(stages.ran) == len(set(stages.ran))
    assert {name for name in stages.ran if name.endswith("/read")} == {"seed0/read", "seed1/read"}
    assert "seed0/no-align/adapt" in stages.ran and "seed1/no-align/adapt" not in stages.ran
    assert {"common/fog/prepare", "seed1/smolvlm-ft/fog", "seed0/smoldriver/corruptions"} <= set(stages.ran)
    assert "seed1/smoldriver/corruptions" not in stages.ran
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert found["models"]["smoldriver"]["seeds"] == 2 and found["format"] == 2
    assert found["minus_blind"]["smoldriver"]["perception"]["estimate"] == pytest.approx(1 / 3)
    assert found["stages"]["seed0.read"]["tokens_4"] == {"perception": 60.0}
    assert found["stages"]["seed0.read"]["minutes"] >= 0 and "machine" in found and found["versions"]["torch"]
    assert "*How well do they answer?*" in capsys.readouterr().out
    count = len(stages.ran)
    assert main(args)["models"] == found["models"] and len(stages.ran) == count


def test_results_are_written_after_every_evaluation(tmp_path, stages, monkeypatch):
    told = []
    collect = run.collect
    monkeypatch.setattr(run, "collect", lambda *args: told.append(len(stages.ran)) or collect(*args))
    main(arguments(tmp_path, "smoldriver", seeds=[0], brief=True, jobs=1))
    assert stages.ran[-1] == "seed0/smoldriver/evaluation" and told == [len(stages.ran)] * 2


def test_what_one_seed_does_not_decide_is_trained_again(tmp_path, stages):
    stages.best = {"no-align"}  # a difference in every scene; the other ablation equals SmolDriver
    args = arguments(tmp_path, "models", "no-align", "healed", seeds=[0, 1, 2], ablation_seeds=2, brief=True)
    found = main(args)
    assert found["models"]["healed"]["seeds"] == 2 and found["models"]["no-align"]["seeds"] == 1


def test_the_best_of_the_study_is_tried_together_and_elsewhere(tmp_path, stages):
    stages.best = {"study-tokens-8", "study-width-128"}
    found = main(arguments(tmp_path, "study", seeds=[0]))
    assert found["study_best"] == ("tokens-8", "width-128")
    assert {"study-best", "study-elsewhere", "study-elsewhere-best"} <= set(found["models"])
    assert "seed0/short/tokens-8/width-128/adapt" in stages.ran
    assert [name for name in stages.ran if name.endswith("read")] == ["seed0/read", "seed0/seven/read"]


def test_a_failure_leaves_the_rest_done_and_told(tmp_path, stages, monkeypatch):
    def fail(command, env, **streams):
        if any(word.endswith("no-align/adapt") for word in command):
            return SimpleNamespace(returncode=1)
        return stages(command, env, **streams)

    monkeypatch.setattr(run.runner.subprocess, "run", fail)
    with pytest.raises(ChildProcessError, match=r"stage seed0\.no-align\.adapt failed"):
        main(arguments(tmp_path, "models", "no-align", seeds=[0], brief=True))
    assert set(json.loads((tmp_path / "results.json").read_text())["models"]) == set(GROUPS["models"])


def test_quick_is_shorter_in_a_folder_of_its_own(stages):
    args = ToyworldArguments(quick=True)
    assert args.root.name == "benchmark-quick" and args.results == args.root / "results.json"
    assert ToyworldArguments().results == Path("benchmarks/results/toyworld.json")
    assert set(chosen(args)) == {*GROUPS["models"], *QUICK_ABLATIONS}
    quick, full = (
        recipe_of({"smoldriver": VARIANTS["smoldriver"]}, {"smoldriver": [0]}, one)
        for one in (args, ToyworldArguments())
    )
    assert quick["seed0.adapt"]["max_steps"] < full["seed0.adapt"]["max_steps"]
    assert quick["common.toyworld"]["scenes"] < full["common.toyworld"]["scenes"]
    assert "seed0.smoldriver.fog" in full and "seed0.smoldriver.fog" not in quick
    for sections in (quick, full):
        asked = sections["seed0.smoldriver.evaluation"]
        assert {"blind", "swap_left_right", "black_relevant", "paraphrase"} <= set(asked["controls"])
        assert asked["budgets"] == list(BUDGETS) and asked["data"] == "common.prepare"


def test_all_is_one_recipe_which_refuses_other_numbers(tmp_path, stages):
    main(arguments(tmp_path, "smoldriver", seeds=[0], brief=True))
    written = yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())
    assert written["env"]["OMP_NUM_THREADS"] == "1" and written["seed0.merge"]["adapter"] == "seed0.adapt"
    with pytest.raises(ValueError, match=r"common.toyworld was run before.*scenes was 700, is 300"):
        main(arguments(tmp_path, "smoldriver", "blind", seeds=[0], quick=True))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"only": ["modles"]}, "only takes some of models, bases, ablations, .*; got modles"),
        ({"seeds": []}, "at least one seed is needed"),
        ({"ablation_seeds": 0}, "at least one seed is needed"),
    ],
)
def test_mistakes_are_told_before_anything_runs(wrong, message):
    with pytest.raises(ValueError, match=message):
        ToyworldArguments(**wrong)
