"""A projector learns to write the words that a language model has learnt to read, without one in the loop.

    python -m training.align --checkpoint outputs/read --data outputs/prepare --output_dir outputs/aligned \\
        --feature_cache outputs/features/student --max_steps 450 --per_device_train_batch_size 16 \\
        --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_steps 20 --use_cpu

What a picture shows (`Rows.contents`) says what each of its visual tokens should be: a sum of word embeddings
(`training.learning.slots`). A token is to point where its target points and to be as long; and that a car, a moving
car, two cars are shown is to be read off it by dot product with these words. Token i has its own target whatever the
budget, so all tokens up to the largest budget learn at once. What nobody can say of a picture teaches nothing.

For a SmolDriver's Q-Formers and for the connector of a SmolVLM or Idefics3 alike; tower and language model stay as
they are. A connector, whose weights on thousands of inputs are small, takes a tenth of the learning rate, 1e-4.
`output_dir/final/align.json` tells, of held-out scenes, how near tokens come to their targets and how well what they
say tells pictures apart, at each budget. Run again after a kill: it goes on from the last whole checkpoint.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoProcessor, PreTrainedModel, TrainingArguments, set_seed
from trl import TrlParser

from smoldriver_hf import load_strictly, read_config
from training.checkpoints.folders import save_whole
from training.data.contents import shown_by
from training.data.rig import EXTRA_VIEWS
from training.data.rows import Rows, load_rows, read_dataset_info
from training.learning.ablations import ablate
from training.learning.callbacks import JsonlCallback, started_note
from training.learning.checks import check_data_cameras, checked_budgets, is_finished, record_arguments
from training.learning.features import FeatureCache, held_in
from training.learning.parts import BASELINES, modules_of
from training.learning.smolvlm import build_features, load_processor
from training.learning.trainer import WholeCheckpoints, clear_about_full_disk, last_checkpoint
from training.learning.writing import PictureCollator, ShownFrame, Targets, Writer, as_long_as_words, measured
from training.stages.command_line import run
from training.stages.recipes import Stage

HELD_OUT = 10  # one scene in so many is held out
MEASURED_ON = 32  # frames on which the length of the first tokens is measured


@dataclass
class AlignArguments:
    checkpoint: str = field(metadata={"help": "SmolDriver, SmolVLM or Idefics3 checkpoint: folder or Hub id."})
    data: str = field(metadata={"help": "Folder written by training.prepare, with contents of its frames."})
    feature_cache: str = field(metadata={"help": "Folder for the tower's features."})
    split: str = field(default="train", metadata={"help": "Split to train on; every tenth scene is held out."})
    num_queries: list[int] | None = field(
        default=None,
        metadata={"help": "Budgets: the largest is learnt, each is measured; default: powers of two up to all."},
    )
    first_token_weight: float = field(
        default=2.0, metadata={"help": "How much the first token, which every budget has, counts beside another."}
    )
    noise: float = field(default=0.0, metadata={"help": "Noise on features, in parts of their spread."})
    shared_qformer: bool = field(default=False, metadata={"help": "Ablation: one Q-Former for all cameras."})
    keep_frozen: str | None = field(default=None, metadata={"help": "Ablation: pattern of weights not to train."})


STAGE = Stage(
    start="checkpoint",
    inputs=("checkpoint", "data"),
    caches=("feature_cache",),
    result=lambda arguments: "final",
    resumes=True,
    figures=lambda folder: json.loads((folder / "final" / "align.json").read_text())["held_out"],
)


def main(args: AlignArguments, config: TrainingArguments) -> Path:
    """Align; returns the folder of the final checkpoint.

    Raises:
        ValueError: before the first step, for settings that fit neither each other nor checkpoint and data.
        FloatingPointError: the loss or a weight is not finite; the last checkpoint stays.
        OSError: the disk is full; the last checkpoint stays.
    """
    output_dir = Path(config.output_dir)
    final = output_dir / "final"
    rows = load_rows(args.data, args.split)
    told = {"contents": read_dataset_info(rows.path).get("contents")}
    if is_finished(final, args, config, rows, **told):
        return final
    note = started_note("align", args, config, rows, [args.checkpoint])
    cameras = known_cameras(args, rows)
    train, held_out = split_frames(shown_frames(rows, cameras))

    set_seed(config.seed)
    parts = load_parts(args, cameras)
    writer, collate = make_writer(args, config, parts, [*train, *held_out])
    first = collate(train[:MEASURED_ON])
    with torch.no_grad():
        tokens = writer.write(first["features"].to(config.device), first["camera_ids"].to(config.device))
    as_long_as_words(writer.projector, tokens, collate.targets.length)
    config.remove_unused_columns = False
    trainer = WholeCheckpoints(
        model=writer,
        args=config,
        data_collator=collate,
        train_dataset=train,  # type: ignore[arg-type]
        callbacks=[JsonlCallback(output_dir / "metrics.jsonl")],
    )
    ablate(trainer, args.shared_qformer, args.keep_frozen)
    with clear_about_full_disk(output_dir):
        record_arguments(args, config, rows, **told)
        trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))
        note |= {"steps": trainer.state.global_step, "frames": len(train)}
        note["held_out"] = measured(writer, collate, held_out, parts.tokens, config.per_device_eval_batch_size)
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        save_whole(final, parts.model.cpu().to(dtype), parts.processor, note=note)
    print(json.dumps({"output_dir": str(output_dir), "steps": note["steps"], **note["held_out"]}))
    return final


def known_cameras(args: AlignArguments, rows: Rows) -> list[str]:
    """The names that the projector knows cameras by, or for a connector, which knows none, the data's.

    Raises:
        ValueError: settings that do not fit the checkpoint, or data without images of any of its cameras.
    """
    config = read_config(args.checkpoint)
    modules_of(config.model_type)
    if args.first_token_weight <= 0 or args.noise < 0:
        raise ValueError(
            "first_token_weight must be positive and noise not negative; "
            f"got {args.first_token_weight} and {args.noise}"
        )
    fleet = [view for view in rows.cameras if view not in EXTRA_VIEWS]
    if config.model_type in BASELINES:
        if args.shared_qformer:
            raise ValueError(
                "shared_qformer is an ablation of SmolDriver's projector; a SmolVLM's connector is shared"
            )
        return fleet
    check_data_cameras(config.cameras, fleet)
    return list(config.cameras)


def shown_frames(rows: Rows, cameras: Sequence[str]) -> list[ShownFrame]:
    """The frames of which it is known what they show, with their pictures of these cameras.

    Raises:
        ValueError: there are none, or no camera shows an object.
    """
    frames = []
    for frame, _ in rows.frames():
        contents = rows.contents.get((frame["scene_token"], frame["frame_token"]))
        seen = [view for view in cameras if view in frame["images"] and view not in EXTRA_VIEWS]
        if contents is not None and seen:
            images = {camera: frame["images"][camera] for camera in seen}
            frames.append(ShownFrame(frame["scene_token"], images, contents))
    if not frames:
        raise ValueError(
            f"{rows.path} tells of no frame of split {rows.split!r} what any of these cameras shows: {list(cameras)}"
        )
    if not any(shown_by(frame.contents, camera) for frame in frames for camera in frame.images):
        raise ValueError(f"{rows.path}: no frame of split {rows.split!r} shows an object to {list(cameras)}")
    return frames


def split_frames(frames: Sequence[ShownFrame]) -> tuple[list[ShownFrame], list[ShownFrame]]:
    """Frames to train on, and those of every tenth scene.

    Raises:
        ValueError: a single scene.
    """
    scenes = sorted({frame.scene for frame in frames})
    if len(scenes) < 2:
        raise ValueError(f"all frames are of the scene {scenes[0]}; another one is needed to be held out")
    held_out = set(scenes[::HELD_OUT])
    return [one for one in frames if one.scene not in held_out], [one for one in frames if one.scene in held_out]


class Parts(NamedTuple):
    """What is aligned."""

    model: PreTrainedModel
    processor: Any
    cameras: list[str]  # in the order of their ids
    num_queries: int
    tokens: list[int]  # a camera's, at each budget


def load_parts(args: AlignArguments, cameras: list[str]) -> Parts:
    """The checkpoint, of which the projector alone will train.

    Raises:
        ValueError: budgets that it does not have.
    """
    model = load_strictly(args.checkpoint, dtype=torch.float32)
    model.requires_grad_(False)
    model.get_submodule(modules_of(model.config.model_type)["projector"]).requires_grad_(True)
    if model.config.model_type not in BASELINES:
        budgets = checked_budgets(args.num_queries, model.config)
        tokens = [budget // model.config.queries_per_token for budget in budgets]
        return Parts(model, AutoProcessor.from_pretrained(args.checkpoint), cameras, budgets[-1], tokens)
    processor = load_processor(args.checkpoint, cameras)
    only = processor.image_seq_len
    if args.num_queries not in (None, [only]):
        raise ValueError(f"a SmolVLM has {only} visual tokens an image and no other budget; got {args.num_queries}")
    return Parts(model, processor, cameras, only, [only])


def make_writer(
    args: AlignArguments, config: TrainingArguments, parts: Parts, frames: Sequence[ShownFrame]
) -> tuple[Writer, PictureCollator]:
    """What trains, on the device, and its batches."""
    model, processor = parts.model.to(config.device), parts.processor
    embeddings = model.get_input_embeddings().weight
    targets = Targets(processor.tokenizer, embeddings, [frame.contents for frame in frames], parts.tokens[-1])
    paths = [path for frame in frames for path in frame.images.values()]
    modules = modules_of(model.config.model_type)
    with held_in(torch.bfloat16 if config.bf16 else torch.float32, model.get_submodule(modules["tower"])):
        if model.config.model_type in BASELINES:
            features = build_features(model, processor.image_processor, paths, args.feature_cache)
        else:
            features = FeatureCache.build(model, processor, paths, args.feature_cache)
    projector = model.get_submodule(modules["projector"])
    writer = Writer(projector, targets, parts.num_queries, args.first_token_weight, args.noise)
    return writer.to(config.device), PictureCollator(features, parts.cameras, targets)


if __name__ == "__main__":
    run(main, AlignArguments, TrainingArguments, parser=TrlParser)
