"""The evaluation: the same answers as plain generation, resuming, and figures that say what they claim."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import prepared
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import lively, scene, tiny_model, tiny_processor, tiny_text_config

from smoldriver_hf import CAMERAS
from training.data.rig import NUSCENES
from training.data.rows import CONTENTS_SCHEMA, load_rows
from training.evaluate import EvaluateArguments, main
from training.evaluation.answering import PromptSight, SceneSight, SmolDriverAnswerer, fingerprint, load_answerer
from training.evaluation.controls import BLIND, SIGHTED, control_questions
from training.evaluation.predictions import choose_frames, predict
from training.evaluation.results import control_file, load_runs, without_nan
from training.evaluation.scoring import (
    calibration,
    challenge_references,
    choices_of,
    control_scores,
    intervals,
    submission,
)
from training.metrics.answers import yes_no_scores
from training.metrics.drivelm import score_drivelm

OPTIONS = "Please select the correct answer from the following options: A. Fast. B. Slow."
QUESTIONS = [
    ("What are objects to the front left of the ego car?", "There are two cars to the front left of the ego car."),
    ("Are there moving cars to the back of the ego car?", "Yes."),
    ("Would <c1,CAM_BACK,10.0,20.0> be in the moving direction of the ego vehicle?", "No."),
    (f"Predict the behavior of the ego vehicle. {OPTIONS}", "B"),
]


@pytest.fixture(scope="module", autouse=True)
def python_tokenizer():
    """Without starting a Java program for each score."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.metrics.language.available_tokenizer", lambda: "python")
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "QUESTIONS", QUESTIONS)
        return prepared.write_prepared(tmp_path_factory.mktemp("data"), frames=3, splits=("train", "test"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smoldriver")
    model = lively(tiny_model())
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory) -> Path:
    return prepared.write_smolvlm(tmp_path_factory.mktemp("smolvlm"))


@pytest.fixture(scope="module")
def arguments(data, checkpoint, tmp_path_factory) -> EvaluateArguments:
    return EvaluateArguments(
        checkpoint=str(checkpoint),
        data=str(data),
        output_dir=str(tmp_path_factory.mktemp("runs") / "whole"),
        controls=["blind", "questions", "drop:CAM_BACK", "drop_relevant", "corrupt:fog:3"],
        budgets=[1],
        num_queries=4,
        max_new_tokens=5,
        resamples=50,
        attention_frames=1,
    )


@pytest.fixture(scope="module")
def report(arguments) -> dict:
    return main(arguments)


def lines_of(output_dir: str | Path, control: str) -> list[dict]:
    text = control_file(Path(output_dir), control).read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_without_a_checkpoint_it_is_the_default_model(data, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("training.evaluate.fetch_default", lambda: checkpoint)
    args = EvaluateArguments(
        str(data), str(tmp_path / "run"), controls=[], max_frames=1, max_new_tokens=2, resamples=5
    )
    found = main(args)["checkpoint"]
    assert found["path"] == "default" and found["fingerprint"] == fingerprint(str(checkpoint))


def test_answers_are_those_of_plain_generation(arguments, report, checkpoint, data):
    model = load_answerer(str(checkpoint), CAMERAS).model
    processor = load_answerer(str(checkpoint), CAMERAS).processor
    rows = load_rows(data, "test")
    answers = {row["question_id"]: row["answer"] for row in lines_of(arguments.output_dir, "sighted")}
    assert list(answers) == [row["question_id"] for row in rows] and len(set(answers.values())) > 1
    for index in (0, 5, 11):
        row = rows[index]
        inputs = processor(images=row["images"], text=row["question"], num_queries=4, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answers[row["question_id"]] == processor.decode(ids, skip_special_tokens=True).strip()


def test_the_two_ways_of_asking_agree():
    model = lively(tiny_model())
    processor = tiny_processor(model.config)
    images, questions = scene(), ["Is it safe?", "What is ahead of the car?", "Why?"]
    sight = SceneSight(model, processor, images, num_queries=3)
    features = torch.cat(list(sight.scene.visual_tokens.values()))
    other = PromptSight(model, processor, CAMERAS, [[processor.image_token_id]] * 6, features)
    # The processor writes one placeholder per camera; each stands for three tokens.
    other.placeholders = [[processor.image_token_id] * 3] * 6
    assert sight.visual_tokens == other.visual_tokens == 18
    assert sight.answers(questions, 6, 2) == other.answers(questions, 6, 2)
    for question in questions:
        choices = ["Yes", "No", "A"]
        np.testing.assert_allclose(sight.scores(question, choices), other.scores(question, choices), atol=1e-4)


def test_a_prompt_that_is_too_long_is_an_error_of_its_own_only():
    model = tiny_model()
    answerer = SmolDriverAnswerer(model, tiny_processor(model.config), 1)
    for images in ({}, scene()):
        good, bad = answerer.look(images).answers(["Why?", "x" * 5000], 3, 2)
        assert good.error is None and bad.text == "" and "reads at most 2048" in bad.error


@pytest.mark.parametrize("image_splitting", [False, True])
def test_smolvlm_answers_like_its_own_processor(smolvlm, data, image_splitting):
    answerer = load_answerer(str(smolvlm), CAMERAS, image_splitting=image_splitting)
    lively(answerer.model)
    row = load_rows(data, "test")[1]
    sight = answerer.look(row["images"])
    (answer,) = sight.answers([row["question"]], 5, 4)
    idefics3 = answerer.view.idefics3
    from PIL import Image

    images = [Image.open(path) for path in row["images"].values()]
    inputs = idefics3(images=[images], text=[answerer.view.prompt(row["question"], CAMERAS)], return_tensors="pt")
    assert int((inputs["input_ids"] == idefics3.image_token_id).sum()) == sight.visual_tokens
    ids = answerer.model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.text == idefics3.tokenizer.decode(ids, skip_special_tokens=True).strip() != ""
    assert len(sight.scores(row["question"], ["Yes", "No"])) == 2
    assert answerer.look({}).visual_tokens == 0


def test_adapters_merged_and_in_four_bits(tmp_path):
    # bitsandbytes packs blocks of 64 on a CPU, so not the tiniest model.
    model = lively(tiny_model(text_config=tiny_text_config(hidden_size=128, intermediate_size=128)))
    checkpoint, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    model.save_pretrained(checkpoint)
    tiny_processor(model.config).save_pretrained(checkpoint)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=r".*language_model.*(q|v)_proj", init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    adapted.save_pretrained(adapter)
    images, question = scene(), "What is ahead?"

    def scores(answerer) -> list[float]:
        return answerer.look(images).scores(question, ["Yes", "No"])

    plain = scores(load_answerer(checkpoint, CAMERAS))
    merged = scores(load_answerer(checkpoint, CAMERAS, adapter=adapter))
    exported = adapted.eval().merge_and_unload()
    for parameter in exported.parameters():
        parameter.data = parameter.data.bfloat16().float()  # as hub_export saves it
    expected = scores(SmolDriverAnswerer(exported, tiny_processor(model.config)))
    np.testing.assert_allclose(merged, expected, atol=1e-3)
    assert np.abs(np.subtract(plain, merged)).max() > 0.1
    four_bits = load_answerer(checkpoint, CAMERAS, load_in_4bit=True, adapter=adapter)
    kinds = [type(module).__module__ for module in four_bits.model.modules() if type(module).__name__ == "Linear4bit"]
    assert any("peft" in kind for kind in kinds) and any("bitsandbytes" in kind for kind in kinds)  # not merged
    assert len(four_bits.look(images).answers([question], 3, 1)) == 1
    assert np.abs(np.subtract(scores(four_bits), merged)).max() < np.abs(merged).max()


def test_smolvlm_runs_with_blind_controls(smolvlm, data, tmp_path):
    args = EvaluateArguments(str(data), str(tmp_path / "run"), str(smolvlm), max_new_tokens=3, resamples=20)
    result = main(args)
    assert list(result["results"]) == ["sighted", "template_majority", "text_only", "black", "wrong_scene"]
    assert result["visual_tokens_per_scene"] == 24 and not (tmp_path / "run" / "attention.npz").exists()
    with pytest.raises(ValueError, match="budgets are for a SmolDriver"):
        main(replace(args, budgets=[4]))


def test_controls_reach_the_model(arguments, report):
    tokens = {control: scores["visual_tokens_per_scene"] for control, scores in report["results"].items()}
    assert tokens["sighted"] == tokens["black"] == tokens["corrupt:fog:3"] == 24
    assert tokens["sighted@1"] == 6 and tokens["drop:CAM_BACK"] == 20
    assert tokens["text_only"] == tokens["template_majority"] == 0
    changed = {control: scores.get("changed_from_sighted") for control, scores in report["results"].items()}
    assert changed["sighted"] is None and changed["absent_object"] is None
    assert all(
        changed[control] > 0 for control in ("black", "wrong_scene", "text_only", "drop:CAM_BACK", "paraphrase")
    )
    sighted = {row["question_id"]: row for row in lines_of(arguments.output_dir, "sighted")}
    for row in lines_of(arguments.output_dir, "paraphrase"):
        before = sighted[row["question_id"]]
        assert row["asked"] != before["asked"] and row["question"] == before["question"]
        assert row["reference"] == before["reference"]
    absent = lines_of(arguments.output_dir, "absent_object")
    assert [(row["camera"], row["reference"]) for row in absent] == [("CAM_FRONT_LEFT", "No.")] * 3
    assert report["results"]["absent_object"]["hallucination"]["CAM_FRONT_LEFT"]["answers"] == 3
    dropped = report["results"]["drop:CAM_BACK"]
    assert (dropped["named_camera"]["answers"], dropped["other_cameras"]["answers"]) == (6, 6)
    assert report["results"]["drop_relevant"]["answers"] == 9


def test_template_majority_learns_from_train(arguments, report):
    answers = {row["question"]: row["answer"] for row in lines_of(arguments.output_dir, "template_majority")}
    # Of the three train frames, those with an even number say more; ties go to the alphabetically first.
    assert answers[QUESTIONS[1][0]] == "Yes." and answers[QUESTIONS[3][0]] == "B"


def test_likelihoods_and_calibration(arguments, report):
    for control in ("sighted", "black", "text_only", "wrong_scene"):
        for row in lines_of(arguments.output_dir, control):
            assert row.get("choices", []) == choices_of(row["question"], row["reference"])
            assert all(value < 0 for value in row.get("log_likelihoods", []))
    assert "choices" not in json.dumps(lines_of(arguments.output_dir, "sighted@1"))
    assert report["calibration"]["sighted"]["yes_no"]["answers"] == 6
    assert set(report["calibration"]["abstention"]["kept"]) == {"sighted", "black", "text_only", "wrong_scene"}
    assert choices_of("Predict. " + OPTIONS, "B") == ["A", "B"]
    assert choices_of("Why?", "Because.") == []


def test_metrics_file_is_complete(arguments, report, data):
    output_dir = Path(arguments.output_dir)
    assert json.loads((output_dir / "metrics.json").read_text()) == json.loads(json.dumps(report))
    assert report["split_hash"] == load_rows(data, "test").split_hash and report["seed"] == 0
    assert report["checkpoint"]["fingerprint"].startswith("sha256:") and report["command"].startswith("python -m ")
    assert report["counts"]["frames"] == 3 and report["counts"]["scenes"] == 2 and report["counts"]["questions"] == 12
    predictions = lines_of(output_dir, "sighted")
    assert json.loads((output_dir / "output.json").read_text()) == submission(predictions)
    drivelm = report["results"]["sighted"]["drivelm"]
    assert drivelm == without_nan(score_drivelm(challenge_references(predictions), submission(predictions)))
    assert drivelm["counts"]["total"] == 12
    gaps = report["intervals"]["sighted_minus"]
    assert "perception" in gaps["black"] and "yes_no_balanced_accuracy" in gaps["text_only"]
    difference = report["results"]["sighted"]["accuracy"] - report["results"]["template_majority"]["accuracy"]
    assert gaps["template_majority"]["accuracy"]["estimate"] == pytest.approx(difference)
    maps = np.load(output_dir / "attention.npz")
    assert sorted(maps) == sorted(f"test0/test-frame0/{camera}" for camera in CAMERAS)
    assert all(maps[name].shape == (4, 4) and maps[name].sum() == pytest.approx(1, abs=1e-4) for name in maps)


def test_headline(arguments, report, data, tmp_path, capsys):
    """What contents are needed for is measured on the frames that have them; the others are counted."""
    assert list(report["headline"]) == ["perception", "existence", "existence_yes", "wrong_scene"]
    perception = report["headline"]["perception"]
    assert perception["score"] == report["intervals"]["sighted"]["perception"] and perception["answers"] == 12
    assert perception["blind"]["estimate"] == max(
        report["results"][control]["by_category"]["perception"]["accuracy"] for control in BLIND
    )
    folder = shutil.copytree(data, tmp_path / "data")
    things = [("car", "CAM_FRONT_LEFT", "moving"), ("car", "CAM_FRONT_LEFT", "parked"), ("car", "CAM_BACK", "moving")]
    things += [("bus", "CAM_FRONT_RIGHT", "parked")]
    objects = [{"name": name, "camera": camera, "status": status} for name, camera, status in things]
    known = [(f"test{number // 2}", f"test-frame{number}") for number in range(2)]
    contents = [
        {"scene_token": scene, "frame_token": frame, "objects": objects, "words": [], "unclear": []}
        for scene, frame in known
    ]
    (folder / "contents").mkdir()
    table = pa.Table.from_pylist(contents, schema=CONTENTS_SCHEMA)
    pq.write_table(table, folder / "contents" / "test-00000.parquet")
    output_dir = str(tmp_path / "run")
    changed = replace(arguments, data=str(folder), output_dir=output_dir, budgets=[], attention_frames=0)
    rows = main(replace(changed, controls=["swap_left_right", "black_relevant"]))["headline"]
    assert list(rows) == ["perception", "existence", "existence_yes", "follow", "black_relevant"]
    assert (rows["follow"]["answers"], rows["follow"]["left_out"]) == (2, 2)
    assert (rows["black_relevant"]["answers"], rows["black_relevant"]["left_out"]) == (9, 3)
    told = capsys.readouterr()
    assert "1 of 3 frames are not known" in told.err and "left and right swapped: answers that follow" in told.out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["headline"] == rows


def hide_answers(data: Path, folder: Path, keep: set[int]) -> Path:
    """The same data, whose test split hides all answers but those of some frames."""
    shutil.copytree(data, folder)
    (file,) = (folder / "questions").glob("test-*.parquet")
    table = pq.read_table(file)
    rows = [
        row
        | ({} if int(row["frame_token"][-1]) in keep else {"answer": ""})
        | ({"question": ""} if not number else {})
        for number, row in enumerate(table.to_pylist())
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    return folder


def test_hidden_answers_are_answered_and_not_scored(arguments, data, tmp_path, capsys):
    """The challenge's files: one without words too. What is known is scored, the rest only told."""
    args = replace(arguments, controls=["blind", "questions"], budgets=[], attention_frames=0)
    ids = [row["question_id"] for row in load_rows(data, "test")]
    args = replace(args, data=str(hide_answers(data, tmp_path / "none", set())), output_dir=str(tmp_path / "run"))
    report = main(args)
    output = json.loads((tmp_path / "run" / "output.json").read_text())
    assert [row["id"] for row in output] == ids and all(row["answer"] for row in output)
    assert list(report["results"]) == ["sighted"] and report["results"]["sighted"]["accuracy"] is None
    assert (report["counts"]["answers"], report["counts"]["references"]) == ({"sighted": 12}, 0)
    assert report["headline"] == {} and report["intervals"]["sighted"] == {}
    told = capsys.readouterr()
    assert "left out black: no question of split 'test' has an answer" in told.err
    assert "12 answers have no reference to compare with" in told.out
    with pytest.raises(ValueError, match="has no scores: its data hide the answers"):
        load_runs([str(tmp_path / "run")])
    some = hide_answers(data, tmp_path / "some", {1})
    report = main(replace(args, data=str(some), output_dir=str(tmp_path / "other")))
    assert report["counts"]["references"] == 4 and report["counts"]["answers"]["black"] == 12
    assert all(scores["answers"] == 4 for name, scores in report["results"].items() if name in ("sighted", *BLIND))
    assert report["results"]["absent_object"]["answers"] == 1  # of the frame whose list is known
    assert len(json.loads((tmp_path / "other" / "output.json").read_text())) == 12
    assert "8 answers have no reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bert_model": "no/where"}, "no encoder for BERTScore"),
        ({"controls": ["sighted", "wrong_scene"]}, "wrong_scene cannot be answered: split 'test' has one scene"),
        ({"split": "validation"}, "no frames for split 'validation'"),
        ({"output_dir": "FILE"}, "FILE"),
        ({"data": "BROKEN"}, "pictures are missing or cannot be read"),
    ],
)
def test_what_can_be_known_before_is_told_before_the_first_answer(arguments, tmp_path, monkeypatch, change, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(SceneSight, "answers", lambda *_: pytest.fail("asked before"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "QUESTIONS", QUESTIONS)
        data = prepared.write_prepared(tmp_path / "data", frames=2, splits=("train", "test"))
    if change.get("data") == "BROKEN":
        next((data / "images").glob("test1_*")).write_bytes(b"")
    if change.get("output_dir") == "FILE":
        (tmp_path / "FILE").touch()
    changed = {name: str(tmp_path / "FILE") if value == "FILE" else value for name, value in change.items()}
    changed["data"] = str(data)
    args = replace(arguments, **{"output_dir": str(tmp_path / "run"), "budgets": [], "controls": ["blind"], **changed})
    with pytest.raises((ValueError, OSError), match=message):
        main(args)
    assert not list((tmp_path / "run").glob("*/predictions.jsonl"))


def test_settings_that_end_in_an_error_are_refused():
    for name in ("max_new_tokens", "batch_size", "resamples"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
            EvaluateArguments("c", "d", "o", **{name: 0})
    with pytest.raises(ValueError, match="seed must be at least 0; got -1"):
        EvaluateArguments("c", "d", "o", seed=-1)


def test_a_killed_run_goes_on_and_gives_the_same(arguments, report, tmp_path, monkeypatch):
    args = replace(arguments, output_dir=str(tmp_path / "killed"))
    calls = []
    answers = SceneSight.answers

    def dies(self, *given):
        calls.append(given)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return answers(self, *given)

    monkeypatch.setattr(SceneSight, "answers", dies)
    with pytest.raises(KeyboardInterrupt):
        main(args)
    monkeypatch.setattr(SceneSight, "answers", answers)
    black = control_file(tmp_path / "killed", "black")
    before = black.read_text()
    assert 0 < len(before.splitlines()) < 12
    first = control_file(tmp_path / "killed", "sighted")
    first.write_text(first.read_text()[:-30])  # the power went while the last frame was written
    assert main(args)["results"] == report["results"]
    for control in report["results"]:
        mine, whole = (lines_of(folder, control) for folder in (args.output_dir, arguments.output_dir))
        assert mine == whole
        assert len({row["question_id"] for row in mine}) == len(mine)
    # Once more: nothing is asked, nothing changes.
    monkeypatch.setattr(SceneSight, "answers", dies)
    calls[:] = [None] * 4
    assert main(args)["results"] == report["results"]
    assert black.read_text().startswith(before)


def test_fewer_controls_and_frames_reuse_what_is_there(arguments, report, tmp_path, monkeypatch):
    folder = shutil.copytree(arguments.output_dir, tmp_path / "copy")
    monkeypatch.setattr(SceneSight, "answers", None)  # asking would fail
    again = main(replace(arguments, output_dir=str(folder), controls=["black"], budgets=[], attention_frames=0))
    assert again["results"] == {name: again["results"][name] for name in again["results"]}
    assert again["results"].keys() == report["results"].keys()
    fewer = main(replace(arguments, output_dir=str(folder), controls=["black"], max_frames=1, attention_frames=0))
    assert fewer["counts"]["frames"] == 1 and fewer["results"]["black"]["answers"] == 4
    assert lines_of(folder, "black") == lines_of(arguments.output_dir, "black")  # nothing is lost


def test_an_older_folder_goes_on_and_a_recipes_record_is_none(arguments, report, tmp_path, monkeypatch):
    folder = shutil.copytree(arguments.output_dir, tmp_path / "older")
    (folder / "made_with.json").rename(folder / "run.json")
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in ("figures", "controls", "coordinates"):
        del metrics[name]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    monkeypatch.setattr(SceneSight, "answers", None)  # asking would fail
    args = replace(arguments, output_dir=str(folder), attention_frames=0)
    again = main(args)
    assert again["results"] == report["results"] and again["figures"] == report["figures"]
    with pytest.raises(ValueError, match="num_queries was 4, is 2"):
        main(replace(args, num_queries=2))
    monkeypatch.undo()
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "run.json").write_text('{"stages": {}}')
    main(replace(args, output_dir=str(tmp_path / "recipe"), controls=["sighted"], budgets=[], max_frames=1))
    assert (tmp_path / "recipe" / "made_with.json").is_file()


def test_without_options_the_checkpoint_decides(arguments, tmp_path):
    args = replace(
        arguments, output_dir=str(tmp_path), controls=["sighted"], num_queries=None, budgets=[], resamples=5
    )
    result = main(replace(args, max_frames=1))
    assert result["visual_tokens_per_scene"] == 6 * 8 and (tmp_path / "attention.npz").exists()


def test_errors_teach(arguments, report, data, tmp_path):
    with pytest.raises(ValueError, match="num_queries was 4, is 2"):
        main(replace(arguments, num_queries=2))
    with pytest.raises(ValueError, match="from 1 to 8"):
        main(replace(arguments, output_dir=str(tmp_path / "a"), budgets=[9]))
    with pytest.raises(ValueError, match="unknown control 'blnd'"):
        main(replace(arguments, output_dir=str(tmp_path / "b"), controls=["blnd"]))
    with pytest.raises(ValueError, match="MAP_BEV.*cannot be shown"):
        main(replace(arguments, output_dir=str(tmp_path / "c"), cameras=["MAP_BEV"]))
    with pytest.raises(ValueError, match="precision int8 is for a SmolDriver"):
        load_answerer(arguments.checkpoint, CAMERAS, precision="int8", load_in_4bit=True)
    with pytest.raises(ValueError, match="holds no adapter"):
        load_answerer(arguments.checkpoint, CAMERAS, adapter=str(data))
    with pytest.raises(ValueError, match="image_splitting is for SmolVLM"):
        load_answerer(arguments.checkpoint, CAMERAS, image_splitting=True)
    (frame,) = choose_frames(load_rows(data, "test"), 1)
    file = tmp_path / "predictions.jsonl"
    row = {**control_questions(SIGHTED, frame[1], NUSCENES)[0], "reference": "Changed."}
    file.write_text(json.dumps({key: value for key, value in row.items() if key != "images"}) + "\n")
    with pytest.raises(ValueError, match="which the data does not ask any more"):
        predict(SIGHTED, lambda *_: [], [frame], NUSCENES, file)


def test_frames_chosen_by_hash_are_nested(data):
    rows = load_rows(data, "test")
    names = [{frame["frame_token"] for frame, _ in choose_frames(rows, number)} for number in (1, 2, None)]
    assert names[0] < names[1] < names[2] and [len(group) for group in names] == [1, 2, 3]
    with pytest.raises(ValueError, match="at least 1; got 0"):
        choose_frames(rows, 0)


def test_fingerprint_changes_with_the_weights(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    assert fingerprint(str(copy)) == fingerprint(str(checkpoint))
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint(str(copy)) != fingerprint(str(checkpoint))


def make_prediction(number: int, scene_token: str, reference: str, answer: str, **more) -> dict:
    question = "Are there cars to the back of the ego car?"
    fixed = {"category": "perception", "tag": [], "question": question, "asked": question, "error": None}
    row = {**fixed, "question_id": str(number), "scene_token": scene_token, "frame_token": "f", "visual_tokens": 6}
    return {**row, "reference": reference, "answer": answer, **more}


def test_intervals_of_known_answers():
    truth = ["Yes.", "No."] * 8
    sighted = [make_prediction(i, f"s{i // 4}", t, t) for i, t in enumerate(truth)]
    constant = [make_prediction(i, f"s{i // 4}", t, "Yes.") for i, t in enumerate(truth)]
    found = intervals({"sighted": sighted, "black": constant, "permuted": constant[:4]}, resamples=200, seed=0)
    assert found["sighted"]["accuracy"]["estimate"] == 1 and found["sighted"]["accuracy"]["low"] == 1
    gap = found["sighted_minus"]["black"]
    assert gap["accuracy"]["estimate"] == gap["perception"]["estimate"] == gap["type:yes_no"]["estimate"] == 0.5
    assert gap["yes_no_balanced_accuracy"]["estimate"] == pytest.approx(0.5)
    assert list(found["sighted_minus"]["permuted"]) == ["accuracy"]  # one scene: an estimate without an interval
    assert found["sighted_minus"]["permuted"]["accuracy"]["low"] is None
    uneven = [
        make_prediction(i, f"s{i % 5}", t, a) for i, (t, a) in enumerate(zip(truth, [*truth[1:], "?"], strict=True))
    ]
    uneven[0]["answer"] = uneven[3]["reference"] = "Yes."
    answers, references = [[row[key] for row in uneven] for key in ("answer", "reference")]
    balanced = intervals({"sighted": uneven}, 20, 0)["sighted"]["yes_no_balanced_accuracy"]["estimate"]
    assert balanced == pytest.approx(yes_no_scores(answers, references)["balanced_accuracy"]) and 0 < balanced < 1
    assert intervals({"black": constant}, 10, 0) == {}


def test_calibration_and_abstention():
    sure = {"choices": ["Yes", "No"], "log_likelihoods": [-0.01, -5.0]}
    unsure = {"choices": ["Yes", "No"], "log_likelihoods": [-0.7, -0.71]}
    sighted = [make_prediction(i, "s", "Yes.", "Yes.", **sure) for i in range(10)]
    black = [make_prediction(i, "s", "Yes.", "Yes.", **(sure if i == 0 else unsure)) for i in range(10)]
    found = calibration({"sighted": sighted, "black": black, "permuted": [make_prediction(0, "s", "Yes.", "No.")]})
    assert found["sighted"]["yes_no"]["accuracy"] == 1 and found["sighted"]["yes_no"]["ece"] < 0.02
    assert found["abstention"]["kept"] == {"sighted": 1.0, "black": 0.1}
    assert "permuted" not in found


def test_control_scores_without_challenge_numbering():
    rows = [make_prediction(i, "s", "Yes.", "No.", tag=[0]) for i in range(3)]
    scores = control_scores(rows, [], language=True)
    assert "drivelm" not in scores and "changed_from_sighted" not in scores and scores["exact_match"] == 0
    assert scores["by_type"]["yes_no"]["balanced_accuracy"] == 0 and scores["sacrebleu"]["signature"]
    broken = [make_prediction(i, "s", "Yes.", "No.", question_id=f"s_f_{i}", tag=[0]) for i in range(2)]
    broken[1]["question"] = "Is <c1,CAM_BACK,1.5> there?"
    assert "odd" in control_scores(broken, [], language=True)["drivelm"]["not_scored"]
