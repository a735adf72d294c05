"""What a frozen vision tower sees, computed once per image and kept on disk.

    cache = FeatureCache.build(model, processor, paths, "features/")   # a second call finds them done
    cache["samples/CAM_FRONT/x.jpg"]                                   # (patches, vision_hidden)

A folder holds safetensors shards and `index.json`, which says which weights and image processing they are of, where
each image is and what its bytes hashed to. Shards are written under another name first and the index after them, so a
run that is killed continues where the index ends; a folder of another tower or image size is refused. Of two runs that
want the same folder one waits for the other.

    index.json            fingerprint, dtype, shards {file: bytes, sha256}, images {path: bytes, mtime_ns, sha256}
    <hash>.safetensors    image sha256 → features, (patches, vision_hidden)
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from training.stages.files import sha256, whole, write_json

FORMAT = 1
SHARD_BYTES = 1 << 26  # what a killed run computes again, at most

Encode = Callable[[list[str]], torch.Tensor]
"""Paths of images → (images, patches, hidden)"""


class FeatureCache(Mapping[str, torch.Tensor]):
    """Image path → features (patches, hidden), read from the folder's shards on demand.

    Paths may be relative; they are compared as absolute ones. Data loader workers may share or pickle a cache.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, Any]):
        """Open a cache that was built before.

        Raises:
            ValueError: the folder holds no cache, one with another fingerprint, or one with shards missing.
        """
        self.folder = Path(folder)
        index = _read_index(self.folder)
        if index is None:
            raise ValueError(f"{self.folder} holds no feature cache (no index.json)")
        _refuse_another(self.folder, index["fingerprint"], fingerprint)
        for name, shard in index["shards"].items():
            if not _has_size(self.folder / name, shard["bytes"]):
                raise ValueError(f"{self.folder / name} is missing or cut; build the cache again to compute it anew")
        self.fingerprint = index["fingerprint"]
        self._shards = {key: name for name, shard in index["shards"].items() for key in shard["images"]}
        hashes = {path: image["sha256"] for path, image in index["images"].items()}
        self._hashes = {path: key for path, key in hashes.items() if key in self._shards}  # others are not done yet
        self._open: dict[str, Any] = {}

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        processor: Any,
        image_paths: Iterable[str | os.PathLike[str]],
        folder: str | os.PathLike[str],
        dtype: torch.dtype = torch.float16,
        batch_size: int = 16,
    ) -> "FeatureCache":
        """Compute what a SmolDriver's tower sees in images, as far as the folder lacks it, and open the cache.

        Args:
            model: a SmolDriver with the tower on its device; it is run in evaluation mode.
            image_paths: image files; repeated paths and equal files are computed once.
            dtype: of what is kept. float16 rounds eight times less than bfloat16, whose range is needed only by towers
                without a final norm.
            batch_size: images per call of the tower.

        Raises:
            ValueError: the folder belongs to another tower or image processing, an image is unreadable, or features
                exceed the range of `dtype`.
        """
        base = model.base_model

        def encode(paths: list[str]) -> torch.Tensor:
            pixels = processor.image_processor(paths, return_tensors="pt")["pixel_values"]
            return base.get_vision_features(pixels.to(base.device)).pooler_output

        with evaluating(base.vision_tower):
            return write_features(folder, image_paths, encode, tower_fingerprint(model, processor), dtype, batch_size)

    def __getitem__(self, path: str | os.PathLike[str]) -> torch.Tensor:
        name = os.path.abspath(os.fspath(path))
        if name not in self._hashes:
            raise KeyError(f"{name} is not among the {len(self)} images of the feature cache {self.folder}")
        key = self._hashes[name]
        shard = self._shards[key]
        if shard not in self._open:
            self._open[shard] = safe_open(self.folder / shard, framework="pt")
        return self._open[shard].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._hashes)

    def __len__(self) -> int:
        return len(self._hashes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # file handles stay where they were opened


def write_features(
    folder: str | os.PathLike[str],
    image_paths: Iterable[str | os.PathLike[str]],
    encode: Encode,
    fingerprint: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
    batch_size: int = 16,
    shard_bytes: int = SHARD_BYTES,
) -> FeatureCache:
    """Run `encode` on the images that a folder has no features of, keep the results there and open it.

    Args:
        encode: paths → (images, patches, hidden) of any floating type.
        fingerprint: what the features depend on beside the image; JSON values.
        dtype: of what is kept; another one than the folder's is another fingerprint.
        shard_bytes: about how much to keep in one file.

    Raises:
        ValueError: see `FeatureCache.build`.
        safetensors.SafetensorError, OSError: for example the disk is full; what was finished stays usable.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = {**fingerprint, "dtype": str(dtype).removeprefix("torch.")}
    with FileLock(folder / ".lock"):  # who comes second finds done what the first one did
        index = _read_index(folder) or {"format": FORMAT, "fingerprint": fingerprint, "shards": {}, "images": {}}
        _refuse_another(folder, index["fingerprint"], fingerprint)
        _drop_broken_shards(folder, index)
        paths = list(dict.fromkeys(os.path.abspath(os.fspath(path)) for path in image_paths))
        _hash_images(index, paths)
        done = {key for shard in index["shards"].values() for key in shard["images"]}
        path_of = {index["images"][path]["sha256"]: path for path in paths}
        missing = {key: path for key, path in path_of.items() if key not in done}
        _encode(folder, index, missing, encode, dtype, batch_size, shard_bytes)
        write_json(folder / "index.json", index, indent=1)
        return FeatureCache(folder, fingerprint)


def _encode(
    folder: Path,
    index: dict[str, Any],
    missing: Mapping[str, str],
    encode: Encode,
    dtype: torch.dtype,
    batch_size: int,
    shard_bytes: int,
) -> None:
    """Run `encode` on files, hash → path, and keep the results shard by shard."""
    pending: dict[str, torch.Tensor] = {}
    hashes = list(missing)
    with torch.no_grad(), tqdm(total=len(missing), desc="Encoding images", unit="image", disable=not missing) as bar:
        for start in range(0, len(missing), batch_size):
            keys = hashes[start : start + batch_size]
            kept = encode([missing[key] for key in keys]).to("cpu", dtype)  # (images, patches, hidden)
            for key, features in zip(keys, kept, strict=True):
                if not features.isfinite().all():
                    raise ValueError(
                        f"{missing[key]}: the features are not finite in {dtype}; use torch.bfloat16 or float32"
                    )
                pending[key] = features.clone()
            bar.update(len(keys))
            if sum(features.nbytes for features in pending.values()) >= shard_bytes:
                _save_shard(folder, index, pending)
                pending = {}
    if pending:
        _save_shard(folder, index, pending)


def tower_fingerprint(model: PreTrainedModel, processor: Any) -> dict[str, Any]:
    """What a SmolDriver's vision features depend on: the tower's weights and settings, and the image processing."""
    return vision_fingerprint(model.base_model.vision_tower, processor.image_processor)


def vision_fingerprint(tower: PreTrainedModel, image_processor: Any) -> dict[str, Any]:
    """What the features of any tower depend on."""
    return {
        "tower_weights": weights_hash(tower),
        "tower": settings_of(tower.config),
        "image_processor": image_settings(image_processor),
    }


def weights_hash(module: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of a module's state."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """A config's own fields, without those that every config has."""
    common = set(PreTrainedConfig().to_dict())
    fields = json.loads(config.to_json_string(use_diff=False))
    return {"model_type": config.model_type} | {key: value for key, value in fields.items() if key not in common}


def image_settings(image_processor: Any) -> dict[str, Any]:
    """How an image processor turns a picture into pixel values."""
    names = ("processor_class", "auto_map", "transformers_version")
    fields = json.loads(image_processor.to_json_string())
    return {key: value for key, value in fields.items() if key not in names}


def _refuse_another(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise one ValueError that names every difference between two fingerprints."""
    wanted = json.loads(json.dumps(wanted))  # tuples become lists, as in the file
    differences = [
        f"{name} is {value!r} there and {other!r} here"
        for name, value, other in _flat_pairs(found, wanted)
        if value != other and not (name == "dtype" and other is None)  # whoever only reads takes any type
    ]
    if differences:
        raise ValueError(
            f"the feature cache {folder} is of another model or image processing: {'; '.join(differences)}. "
            "Use another folder, or delete this one"
        )


def _flat_pairs(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value, other's value) of all fields of either."""
    for key in dict.fromkeys((*one, *other)):
        value, counterpart = one.get(key), other.get(key)
        if isinstance(value, Mapping) and isinstance(counterpart, Mapping):
            yield from _flat_pairs(value, counterpart, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value, counterpart


def _drop_broken_shards(folder: Path, index: dict[str, Any]) -> None:
    """Forget shards whose bytes are not those that were written, so that they are computed again."""
    shards = index["shards"]
    with tqdm(list(shards), desc="Verifying features", unit="shard", disable=not shards, leave=False) as names:
        for name in names:
            file, shard = folder / name, shards[name]
            if not _has_size(file, shard["bytes"]) or sha256(file) != shard["sha256"]:
                tqdm.write(f"{file} is missing or damaged: its {len(shard['images'])} images are computed again")
                del shards[name]


def _hash_images(index: dict[str, Any], paths: list[str]) -> None:
    """Bring `index["images"]` up to date; files of known size and time are not read again."""
    images = index["images"]
    with tqdm(paths, desc="Hashing images", unit="image", leave=False) as bar:
        for path in bar:
            try:
                status = os.stat(path)
            except OSError as error:
                raise ValueError(f"image {path}: cannot be read: {error.strerror}") from error
            known = images.get(path)
            if known is None or (known["bytes"], known["mtime_ns"]) != (status.st_size, status.st_mtime_ns):
                images[path] = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256(path)}


def _save_shard(folder: Path, index: dict[str, Any], features: dict[str, torch.Tensor]) -> None:
    # Named by content: two processes that happen to write the same shard write the same bytes.
    name = f"{hashlib.sha256(' '.join(features).encode()).hexdigest()[:16]}.safetensors"
    with whole(folder / name) as unfinished:
        save_file(features, unfinished)
        entry = {"bytes": unfinished.stat().st_size, "sha256": sha256(unfinished), "images": list(features)}
    index["shards"][name] = entry
    write_json(folder / "index.json", index, indent=1)


def _read_index(folder: Path) -> dict[str, Any] | None:
    file = folder / "index.json"
    if not file.is_file():
        return None
    index = json.loads(file.read_text(encoding="utf-8"))
    if index.get("format") != FORMAT:
        raise ValueError(f"{file}: expected format {FORMAT}, got {index.get('format')!r}")
    return index


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in evaluation mode, and back as it was."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def held_in(dtype: torch.dtype, tower: nn.Module) -> Iterator[None]:
    """A float32 tower in another type, as `training.finetune` holds a frozen one, and back with the same bits."""
    before = {name: weight.clone() for name, weight in tower.state_dict().items()}
    try:
        tower.to(dtype)
        yield
    finally:
        tower.to(torch.float32)
        tower.load_state_dict(before)
