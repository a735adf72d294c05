"""Aligning: only the projector changes, it learns to write words, a kill costs nothing, bad data is refused."""

import json
from pathlib import Path

import pytest
import torch
from drivelm_files import make_world, write_world
from prepared import write_prepared, write_shown, write_smoldriver, write_smolvlm
from safetensors.torch import load_file
from tiny import tiny_config
from transformers import TrainingArguments

from smoldriver_hf import CAMERAS, SmolDriverProjectorConfig, load_strictly
from training import align, prepare
from training.align import AlignArguments
from training.data.rows import load_rows
from training.learning.features import weights_hash
from training.learning.parts import modules_of

THINGS = ("car", "pedestrian", "bus", "barrier")
PROJECTOR = {"smoldriver": "multi_modal_projector", "smolvlm": "connector"}


def told(index: int) -> dict:
    """What frame `index` shows: a car or a pedestrian ahead, sometimes something behind."""
    objects = [{"name": THINGS[index % 2], "camera": CAMERAS[0], "status": "moving", "distance": 5.0}]
    if index % 3 == 0:
        objects.append({"name": "bus", "camera": CAMERAS[3], "status": "parked", "distance": 9.0})
    return {"objects": objects, "words": {CAMERAS[3]: ["rain"]}, "unclear": [("truck", CAMERAS[1])]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("align")
    write_prepared(root / "data", frames=8, questions=1)
    write_shown(root / "data", SHOWN)
    write_smolvlm(root / "smolvlm")
    projector = SmolDriverProjectorConfig(
        hidden_size=32, num_attention_heads=2, intermediate_size=64, camera_vectors=True
    )
    write_smoldriver(root / "smoldriver", projector_config=projector)
    return root


SHOWN = {(f"train{index // 2}", f"train-frame{index}"): told(index) for index in range(8)}


def run(root: Path, output_dir: Path, kind: str = "smoldriver", checkpoint: Path | None = None, **changes) -> Path:
    own = {name: changes.pop(name) for name in list(changes) if name in AlignArguments.__dataclass_fields__}
    own = {"data": str(root / "data"), "feature_cache": str(root / f"features-{kind}"), **own}
    args = AlignArguments(str(checkpoint or root / kind), **own)
    settings = {"use_cpu": True, "report_to": "none", "max_steps": 4, "save_steps": 2, "logging_steps": 1}
    settings |= {"per_device_train_batch_size": 3, "learning_rate": 3e-3, "seed": 0, "disable_tqdm": True}
    return align.main(args, TrainingArguments(output_dir=str(output_dir), **{**settings, **changes}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", PROJECTOR)
def test_only_the_projector_learns_and_it_does(root, tmp_path, kind):
    final = run(root, tmp_path / "run", kind, max_steps=40)
    before, after = weights(root / kind), weights(final)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(PROJECTOR[kind] in name for name in changed)
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, logged) if "loss" in line]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    note = json.loads((final / "align.json").read_text())
    figures = align.STAGE.figures(tmp_path / "run")
    count, budgets = (8, ["1", "2", "4", "8"]) if kind == "smoldriver" else (4, ["4"])
    assert note["steps"] == 40 and note["frames"] == 6 and figures["frames"] == 2
    assert len(figures["cosine"]) == count and list(figures["area_under_curve"]) == budgets
    assert min(figures["cosine"]) > 0.5  # of unseen pictures, most of which show nothing
    assert run(root, tmp_path / "run", kind, max_steps=40) == final  # nothing to do


@pytest.mark.parametrize("kind", PROJECTOR)
def test_features_in_bf16_are_those_that_finetuning_keeps(root, tmp_path, kind):
    """A cache of one stage serves the others, and the tower keeps its bits."""
    final = run(root, tmp_path / "run", kind, max_steps=1, bf16=True, feature_cache=str(tmp_path / "features"))
    index = json.loads((tmp_path / "features" / "index.json").read_text())
    model = load_strictly(str(root / kind), dtype=torch.float32)
    tower = model.get_submodule(modules_of(model.config.model_type)["tower"])
    before = {name: weight.bfloat16() for name, weight in tower.state_dict().items()}
    assert index["fingerprint"]["tower_weights"] == weights_hash(tower.to(torch.bfloat16))
    after = load_strictly(str(final)).get_submodule(modules_of(model.config.model_type)["tower"]).state_dict()
    assert all(torch.equal(before[name], after[name].bfloat16()) for name in before)


def test_camera_vectors_and_every_cameras_queries_learn(root, tmp_path):
    before, after = weights(root / "smoldriver"), weights(run(root, tmp_path / "run"))
    for camera in CAMERAS:
        for name in ("camera_vector", "queries"):
            key = f"model.multi_modal_projector.qformers.{camera}.{name}"
            assert not torch.equal(before[key], after[key]), key


@pytest.mark.parametrize("kind", PROJECTOR)
def test_a_killed_run_ends_with_the_same_weights(root, tmp_path, kind):
    whole = weights(run(root, tmp_path / "whole", kind, noise=0.1))

    class Killed(Exception):
        pass

    class StopsAfterTwo(align.WholeCheckpoints):
        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise Killed
            return super().compute_loss(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "WholeCheckpoints", StopsAfterTwo)
        with pytest.raises(Killed):
            run(root, tmp_path / "killed", kind, noise=0.1)
    resumed = weights(run(root, tmp_path / "killed", kind, noise=0.1))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_one_qformer_for_all_cameras_stays_one(root, tmp_path):
    after = weights(run(root, tmp_path / "run", shared_qformer=True))
    names = [name for name in after if f"qformers.{CAMERAS[0]}." in name]
    assert names
    for name in names:
        for camera in CAMERAS[1:]:
            assert torch.equal(after[name], after[name.replace(CAMERAS[0], camera)])


def test_weights_that_are_kept_frozen_stay(root, tmp_path):
    before = weights(root / "smoldriver")
    after = weights(run(root, tmp_path / "run", keep_frozen=r".*\.queries"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.endswith(".queries") for name in changed)


def test_a_budget_in_tokens_where_a_token_takes_several_queries(root, tmp_path):
    projector = SmolDriverProjectorConfig(
        hidden_size=32, num_attention_heads=2, intermediate_size=64, scale_factor=2, embedding_std=0.1
    )
    config = tiny_config(projector_config=projector, max_queries=16, connector="pixel_shuffle")
    changes = {"projector_config": config.projector_config, "max_queries": 16, "connector": "pixel_shuffle"}
    checkpoint = write_smoldriver(tmp_path / "square", **changes)
    final = run(root, tmp_path / "run", checkpoint=checkpoint)
    assert list(align.STAGE.figures(tmp_path / "run")["area_under_curve"]) == ["4"]
    model = load_strictly(str(final))
    assert model.config.connector == "pixel_shuffle"


def test_only_frames_that_are_told_of_are_learnt(root, tmp_path):
    write_prepared(tmp_path / "data", frames=8, questions=1)
    write_shown(tmp_path / "data", {frame: shown for frame, shown in SHOWN.items() if frame[1] != "train-frame2"})
    final = run(root, tmp_path / "run", max_steps=1, data=str(tmp_path / "data"))
    note = json.loads((final / "align.json").read_text())
    assert (note["frames"], note["held_out"]["frames"]) == (5, 2)


def test_what_drivelms_key_objects_tell_is_learnt(tmp_path):
    """A camera without a key object shows nothing; extra views are no pictures of a camera."""
    objects = {
        "<c1,CAM_BACK,1088.3,497.5>": ("Vehicle", "Moving", "Black sedan."),
        "<c2,CAM_FRONT,200.0,400.0>": ("Pedestrian", None, "A person."),
    }
    world = make_world(3, frames=2)
    for scene in world.values():
        for frame in scene["key_frames"].values():
            frame["key_object_infos"] = {
                tag: {"Category": kind, "Status": status, "Visual_description": text}
                for tag, (kind, status, text) in objects.items()
            }
            frame["image_paths"]["LIDAR_BEV"] = frame["image_paths"]["CAM_FRONT"]
    file = write_world(tmp_path / "drivelm", world)
    prepare.main(prepare.PrepareArguments(str(file), str(file.parent), str(tmp_path / "data"), split="train"))
    rows = load_rows(tmp_path / "data", "train")
    assert "LIDAR_BEV" in rows.cameras
    frames = align.shown_frames(rows, rows.cameras)
    assert len(frames) == 6 and set(frames[0].images) == set(CAMERAS)
    assert {(thing["name"], thing["status"]) for thing in frames[0].contents["objects"]} == {
        ("car", "moving"),
        ("pedestrian", None),
    }
    write_smoldriver(tmp_path / "smoldriver")
    final = run(tmp_path, tmp_path / "run", max_steps=2)
    assert json.loads((final / "align.json").read_text())["held_out"]["frames"] == 2


def test_new_contents_are_another_run(root, tmp_path):
    """The questions, and so the split's hash, stay the same."""
    data = tmp_path / "data"
    write_prepared(data, frames=8, questions=1)
    write_shown(data, SHOWN)
    run(root, tmp_path / "run", data=str(data), max_steps=1)
    info = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**info, "contents": "others"}))
    with pytest.raises(ValueError, match="contents was None, is 'others'"):
        run(root, tmp_path / "run", data=str(data), max_steps=1)


def test_mistakes_are_told_before_the_first_step(root, tmp_path):
    def refused(match, kind="smoldriver", **changes):
        with pytest.raises(ValueError, match=match):
            run(root, tmp_path / "run", kind, **changes)

    refused("num_queries must lie between 1 and 8; got .*9", num_queries=[1, 9])
    refused("4 visual tokens an image and no other budget; got .*2", "smolvlm", num_queries=[2])
    refused("shared_qformer is an ablation of SmolDriver", "smolvlm", shared_qformer=True)
    refused("first_token_weight must be positive", first_token_weight=0.0)
    refused("noise not negative; got 2.0 and -1", noise=-1.0)
    refused("matches no weight", keep_frozen="nothing")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_data_that_do_not_tell_what_they_show_are_refused(root, tmp_path):
    def refused(match, shown, cameras=CAMERAS):
        folder = tmp_path / f"data-{len(list(tmp_path.iterdir()))}"
        write_prepared(folder, frames=8, questions=1, cameras=cameras)
        if shown:
            write_shown(folder, shown)
        with pytest.raises(ValueError, match=match):
            run(root, tmp_path / "run", data=str(folder))

    refused("does not tell what the pictures of its train split show", {})
    first = next(iter(SHOWN))
    refused("all frames are of the scene train0", {first: SHOWN[first]})
    nothing = {"objects": [], "words": {}, "unclear": []}
    refused("no frame of split 'train' shows an object", dict.fromkeys(SHOWN, nothing))
    refused("no frame of split 'train' shows an object", SHOWN, cameras=[CAMERAS[1]])
    refused("tells of no frame of split 'train' what any", {("elsewhere", "frame"): SHOWN[first]})
    refused("the data has images of", SHOWN, cameras=["LEFT", "RIGHT"])
    assert not (tmp_path / "run").exists()
