"""The feature cache: same loss as pixels, continues where it was killed, and is refused where it does not belong."""

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import picture, tiny_model, tiny_processor, tiny_vision_config
from transformers import SiglipVisionConfig

from training.learning.collate import PackedSceneCollator, SceneCollator
from training.learning.features import FeatureCache, tower_fingerprint, write_features

CAMERAS = ["CAM_FRONT", "CAM_BACK"]


@pytest.fixture
def scenes(tmp_path):
    """Three scenes of two cameras on disk: [{camera: path}]"""
    folder = tmp_path / "images"
    folder.mkdir()
    scenes = []
    for number in range(3):
        scenes.append({camera: str(folder / f"{number}-{camera}.png") for camera in CAMERAS})
        for index, path in enumerate(scenes[-1].values()):
            picture(10 * number + index).save(path)
    return scenes


@pytest.fixture
def paths(scenes):
    return [path for scene in scenes for path in scene.values()]


@pytest.fixture
def model():
    return tiny_model().train()


@pytest.fixture
def processor():
    return tiny_processor()


def counting(encoded):
    """An `encode` that writes down what it was asked for; features are the path's number, (1, 2, 3) each."""

    def encode(paths):
        encoded.extend(paths)
        return torch.stack([torch.full((2, 3), float(os.path.basename(path).split("-")[0])) for path in paths])

    return encode


@pytest.mark.parametrize("vision", [tiny_vision_config(), "siglip"])
def test_same_loss_as_pixels(scenes, paths, processor, tmp_path, vision):
    if vision == "siglip":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision = SiglipVisionConfig(**sizes, image_size=28, patch_size=7)
    model = tiny_model(vision_config=vision)
    cache = FeatureCache.build(model, processor, paths, tmp_path / "cache", batch_size=4)
    pairs = [("Is there a car?", "Yes."), ("Is there a bus?", "No, but there is a truck behind.")]
    examples = [{"images": scene, "pairs": pairs} for scene in scenes]
    for collator in (PackedSceneCollator, SceneCollator):
        batches = (
            examples if collator is PackedSceneCollator else [{**example, "pairs": pairs[:1]} for example in examples]
        )
        live = collator(processor, num_queries=4)(batches)
        cached = collator(processor, num_queries=4, features=cache)(batches)
        assert "pixel_values" not in cached
        losses, gradients = [], []
        for batch in (live, cached):
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            losses.append(loss.item())
            gradients.append(
                torch.cat(
                    [w.grad.flatten() for w in model.model.multi_modal_projector.parameters() if w.grad is not None]
                )
            )
        assert losses[0] == pytest.approx(losses[1], abs=1e-3)
        assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999


def test_features_are_the_towers_without_its_class_token(processor, paths, tmp_path):
    model = tiny_model(vision_config=tiny_vision_config(hidden_dropout_prob=0.5)).train()
    cache = FeatureCache.build(model, processor, paths, tmp_path / "cache", dtype=torch.float32)
    assert model.model.vision_tower.training
    pixels = processor.image_processor(paths[:1], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.eval().model.vision_tower(pixels).last_hidden_state[0, 1:]
    assert expected.shape == (16, 32)
    torch.testing.assert_close(cache[paths[0]], expected, atol=1e-5, rtol=1e-4)


def test_a_second_call_computes_nothing_and_a_new_image_only_itself(paths, tmp_path):
    encoded: list[str] = []
    for count, expected in ((4, 4), (4, 4), (6, 6)):
        cache = write_features(tmp_path / "cache", paths[:count], counting(encoded), {"tower": 1}, shard_bytes=1)
        assert len(encoded) == expected and len(cache) == count
    assert encoded == paths
    assert FeatureCache(tmp_path / "cache", {"tower": 1})[paths[-1]].tolist() == [[2.0] * 3] * 2


def test_equal_files_are_computed_once_and_found_after_moving(paths, tmp_path):
    encoded: list[str] = []
    copy = tmp_path / "0-copy.png"
    copy.write_bytes(open(paths[0], "rb").read())
    cache = write_features(tmp_path / "cache", [paths[0], copy, paths[0]], counting(encoded), {})
    assert encoded in ([paths[0]], [str(copy)])
    assert torch.equal(cache[copy], cache[paths[0]])


def test_a_killed_build_continues_where_it_stopped(paths, tmp_path):
    encoded: list[str] = []
    encode = counting(encoded)

    def killed(batch):
        if len(encoded) >= 4:
            raise KeyboardInterrupt
        return encode(batch)

    with pytest.raises(KeyboardInterrupt):
        write_features(tmp_path / "cache", paths, killed, {}, batch_size=2, shard_bytes=1)
    partial = FeatureCache(tmp_path / "cache", {})
    assert sorted(partial) == sorted(paths[:4])
    with pytest.raises(KeyError, match="not among the 4 images"):
        partial[paths[5]]
    cache = write_features(tmp_path / "cache", paths, encode, {}, batch_size=2, shard_bytes=1)
    assert encoded == paths and sorted(cache) == sorted(paths)
    assert [name for name in os.listdir(tmp_path / "cache") if name.startswith(".")] == [".lock"]


def test_two_builds_at_once_do_the_work_once(paths, tmp_path):
    encoded: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        builds = [pool.submit(write_features, tmp_path / "cache", paths, counting(encoded), {}, batch_size=2)]
        builds.append(pool.submit(write_features, tmp_path / "cache", paths, counting(encoded), {}, batch_size=2))
    assert [sorted(build.result()) for build in builds] == [sorted(paths)] * 2
    assert encoded == paths


def test_a_changed_image_is_computed_again(paths, tmp_path):
    encoded: list[str] = []
    write_features(tmp_path / "cache", paths, counting(encoded), {})
    picture(99, (40, 20)).save(paths[2])
    write_features(tmp_path / "cache", paths, counting(encoded), {})
    assert encoded == [*paths, paths[2]]


def test_damage_is_noticed_and_repaired(paths, tmp_path):
    encoded: list[str] = []
    folder = tmp_path / "cache"
    write_features(folder, paths, counting(encoded), {}, batch_size=2, shard_bytes=1)
    index = json.loads((folder / "index.json").read_text())
    first, second, _ = index["shards"]
    content = bytearray((folder / first).read_bytes())
    content[-1] ^= 1
    (folder / first).write_bytes(content)
    (folder / second).unlink()
    with pytest.raises(ValueError, match=f"{second} is missing or cut"):
        FeatureCache(folder, {})
    cache = write_features(folder, paths, counting(encoded), {}, batch_size=2, shard_bytes=1)
    assert sorted(encoded[6:]) == sorted(paths[:4])
    assert cache[paths[1]].tolist() == [[0.0] * 3] * 2


def test_what_belongs_to_another_is_refused_with_the_reason(model, processor, paths, tmp_path):
    folder = tmp_path / "cache"
    FeatureCache.build(model, processor, paths, folder)
    FeatureCache(folder, tower_fingerprint(model, processor))

    with pytest.raises(ValueError, match=r"image_processor.size.height is 28 there and 56 here"):
        FeatureCache.build(model, tiny_processor(image_size=56), paths, folder)
    with pytest.raises(ValueError, match="dtype is 'float16' there and 'bfloat16' here"):
        FeatureCache.build(model, processor, paths, folder, dtype=torch.bfloat16)
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match="tower_weights is '") as error:
        FeatureCache.build(model, processor, paths, folder)
    assert "image_processor" not in str(error.value)
    with pytest.raises(ValueError, match="tower_weights"):
        FeatureCache(folder, tower_fingerprint(model, processor))
    encoded: list[str] = []
    picture(50).save(tmp_path / "new.png")
    with pytest.raises(ValueError, match="another model"):
        write_features(folder, [tmp_path / "new.png"], counting(encoded), {"tower": "teacher"})
    assert not encoded
    with pytest.raises(ValueError, match="no feature cache"):
        FeatureCache(tmp_path / "elsewhere", {})


def test_only_what_the_tower_depends_on_counts(model, processor):
    before = tower_fingerprint(model, processor)
    with torch.no_grad():
        model.lm_head.weight += 1
        model.model.multi_modal_projector.qformers.CAM_FRONT.queries += 1
    model.set_attn_implementation("eager")
    assert tower_fingerprint(model, processor) == before == tower_fingerprint(model.model, processor)


def test_features_out_of_range_and_unreadable_images_are_told(paths, tmp_path):
    def huge(batch):
        return torch.full((len(batch), 2, 3), 1e6)

    with pytest.raises(ValueError, match=r"0-CAM_FRONT.png: the features are not finite in torch.float16"):
        write_features(tmp_path / "cache", paths, huge, {})
    with pytest.raises(ValueError, match="gone.png: cannot be read: No such file"):
        write_features(tmp_path / "cache", [tmp_path / "gone.png"], huge, {})


def test_a_cache_travels_to_worker_processes(paths, tmp_path):
    cache = write_features(tmp_path / "cache", paths, counting([]), {})
    expected = cache[paths[3]]
    assert torch.equal(pickle.loads(pickle.dumps(cache))[paths[3]], expected)
    loader = torch.utils.data.DataLoader(
        paths, batch_size=2, num_workers=1, collate_fn=lambda names: [cache[n] for n in names]
    )
    assert torch.equal(next(iter(loader))[0], cache[paths[0]])


def test_a_full_disk_leaves_what_was_finished(paths, tmp_path, monkeypatch):
    import training.learning.features

    encoded: list[str] = []
    save = training.learning.features.save_file

    def save_twice(features, file):
        if len(list((tmp_path / "cache").glob("*.safetensors"))) == 2:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(features, file)

    monkeypatch.setattr(training.learning.features, "save_file", save_twice)
    with pytest.raises(OSError, match="No space left"):
        write_features(tmp_path / "cache", paths, counting(encoded), {}, batch_size=2, shard_bytes=1)
    monkeypatch.undo()
    assert [file.name for file in (tmp_path / "cache").glob(".*")] == [".lock"]
    assert len(FeatureCache(tmp_path / "cache", {})) == 4
    write_features(tmp_path / "cache", paths, counting(encoded), {}, batch_size=2, shard_bytes=1)
    assert len(encoded) == 8
