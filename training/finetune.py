"""Healing, QLoRA and the SmolVLM baseline: one SFTTrainer script, one set of arguments a run.

    python -m training.finetune --config SETTINGS.yaml
    python -m training.finetune --config SETTINGS.yaml --max_steps 10   # any field can be given
    torchrun --nproc_per_node 2 -m training.finetune --config … --per_device_train_batch_size 4   # half of one's 8

`training.run` runs it as a stage of a recipe. Started again after a kill, it goes on from the last whole checkpoint in
`output_dir` and ends with the weights of an uninterrupted run. At the end `output_dir/final` is a complete checkpoint
(model with adapters merged, processor), `output_dir/adapter` the adapter alone.

A checkpoint of SmolVLM or Idefics3 is trained with transformers' own classes on the same rows and prompts: the
baseline. `--blind text` leaves the images out, `--blind black` makes them black: the controls.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import trl
from accelerate import DistributedType
from datasets import Dataset
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig, TrlParser

from smoldriver_hf import read_config
from training.checkpoints.folders import save_whole
from training.data.rig import EXTRA_VIEWS, Rig
from training.data.rows import Rows, load_rows
from training.learning.ablations import ablate
from training.learning.callbacks import JsonlCallback, first_and_last, loss_curve, started_note
from training.learning.checks import (
    check_arguments,
    check_data_cameras,
    check_examples,
    check_sharding,
    is_finished,
    is_sharded,
    record_arguments,
)
from training.learning.collate import DrawByEpoch, PackedSceneCollator, SceneCollator, packed_mask_dtype
from training.learning.examples import collate_rows, training_examples
from training.learning.features import FeatureCache
from training.learning.looking import CameraAttention
from training.learning.parts import BASELINES, LANGUAGE_LINEARS, check_how, how_of, load_model, lora_config, modules_of
from training.learning.smolvlm import (
    BaselineCollator,
    PackedBaselineCollator,
    SceneView,
    build_features,
    load_processor,
    see_cached,
)
from training.learning.trainer import SceneTrainer, WithWeights, clear_about_full_disk, last_checkpoint
from training.merge import merged
from training.stages.command_line import run
from training.stages.files import remove
from training.stages.recipes import Stage


@dataclass
class FinetuneArguments:
    checkpoint: str = field(metadata={"help": "SmolDriver, SmolVLM or Idefics3 checkpoint: folder or Hub id."})
    data: str = field(metadata={"help": "Folder written by training.prepare."})
    split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split for the evaluation loss."})
    questions: str | None = field(
        default=None, metadata={"help": "Regular expression: train only on questions it is found in."}
    )
    reword: float = field(
        default=0.0, metadata={"help": "Share of training questions in other words, others each epoch."}
    )
    cameras: list[str] | None = field(default=None, metadata={"help": "Cameras to show; default: the checkpoint's."})
    blind: str | None = field(default=None, metadata={"help": "Control: text (no images) or black (black images)."})
    tower: str = field(default="frozen", metadata={"help": "Vision tower: frozen, lora or full."})
    projector: str = field(default="full", metadata={"help": "Q-Formers and connector: frozen, lora or full."})
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Of a projector that trains in full; default: learning_rate."}
    )
    language_model: str = field(default="lora", metadata={"help": "Language model: frozen, lora or full."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapters."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapters."})
    lora_pattern: str = field(
        default=LANGUAGE_LINEARS,
        metadata={"help": "Regular expression over whole module names: the language model's linears to adapt."},
    )
    train_embeddings: bool = field(
        default=False, metadata={"help": "Train embeddings and head beside the adapter, for words not learnt before."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: NF4 with double quantisation."})
    num_queries: list[int] | None = field(
        default=None, metadata={"help": "Budgets, one drawn per step; default: the checkpoint's."}
    )
    pairs_per_sequence: int = field(default=1, metadata={"help": "Questions of a frame that share one image prefix."})
    feature_cache: str | None = field(default=None, metadata={"help": "Folder for the frozen tower's features."})
    image_splitting: bool = field(default=False, metadata={"help": "Baseline: cut images into tiles."})
    longest_edge: int | None = field(default=None, metadata={"help": "Baseline: longer side before cutting."})
    shared_qformer: bool = field(default=False, metadata={"help": "Ablation: one Q-Former for all cameras."})
    keep_frozen: str | None = field(
        default=None, metadata={"help": "Ablation: regular expression over names of weights that shall not train."}
    )
    camera_attention_loss: float = field(
        default=0.0,
        metadata={"help": "Weight of the loss that teaches heads to look at the cameras a question names; 0: none."},
    )
    camera_attention_layer: int | None = field(default=None, metadata={"help": "Its layer; default: the middle one."})
    camera_attention_heads: list[int] | None = field(
        default=None, metadata={"help": "Its heads of that layer; default: the first half."}
    )
    merge: bool = field(default=True, metadata={"help": "Fold adapters in at the end; else training.merge does."})


STAGE = Stage(
    start="checkpoint",
    inputs=("checkpoint", "data"),
    caches=("feature_cache",),
    result=lambda arguments: "final" if arguments.get("merge", True) else "adapter",
    resumes=True,
    distributed=True,
    figures=lambda folder: first_and_last(folder / "metrics.jsonl"),
)


def main(args: FinetuneArguments, config: SFTConfig) -> Path:
    """Train; returns the folder of the final checkpoint, or of the adapter where it is not merged.

    Raises:
        ValueError: before the first step, for settings that fit neither each other nor checkpoint and data.
        FloatingPointError: the loss or a weight is not finite; the last checkpoint stays.
        OSError: the disk is full; the last checkpoint stays.
    """
    check_how(args)
    output_dir = Path(config.output_dir)
    result = output_dir / ("final" if args.merge or "lora" not in how_of(args).values() else "adapter")
    rows = load_rows(args.data, args.split)
    if is_finished(result, args, config, rows):
        return result
    note = started_note("finetune", args, config, rows, [args.checkpoint], versions=(trl, peft, datasets))

    model_type = read_config(args.checkpoint).model_type
    modules = modules_of(model_type)
    processor, view = load_processors(args, model_type, rows)
    model = load_model(args, model_type, config.bf16, is_sharded())
    cameras = args.cameras or view.cameras
    check_arguments(args, config, model, modules, cameras, view.cameras)
    check_data_cameras(cameras, rows.cameras)

    train, held_out, features = load_examples(args, config, model, view, rows, cameras)
    collator = make_collator(args, model, view, features, config.seed, rows.rig)
    check_examples(train, collator, model)

    config.max_length = None  # truncation would cut image tokens
    config.remove_unused_columns = False
    # DDP waits for the gradient of every weight; a Q-Former whose camera a batch does not show has none.
    config.ddp_find_unused_parameters = any(len(shown) < len(view.cameras) for shown in train["cameras"])
    trainer = SceneTrainer(
        model=model,
        args=config,
        data_collator=partial(collate_rows, collator),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
        peft_config=lora_config(args, modules),
        callbacks=[JsonlCallback(output_dir / "metrics.jsonl"), DrawByEpoch(collator, bool(args.reword))],
        camera_attention=watched(args, model),
        camera_attention_loss=args.camera_attention_loss,
        learning_rates={modules["projector"]: args.projector_learning_rate} if args.projector_learning_rate else {},
    )
    ablate(trainer, args.shared_qformer, args.keep_frozen)
    check_sharding(trainer.accelerator.distributed_type)
    if trainer.accelerator.distributed_type != DistributedType.DEEPSPEED:  # which keeps float32 copies itself
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:  # trl makes bf16 of what trains beside 4-bit weights; small updates get lost
                parameter.data = parameter.data.float()
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    asked = sum(map(len, train["questions"]))
    print(f"{len(train)} sequences, {asked} questions, {trainable / 1e6:.2f} M trainable parameters")
    with clear_about_full_disk(output_dir):
        record_arguments(args, config, rows)
        trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))
        finish(trainer, processor, args, note)
    return result


def load_processors(args: FinetuneArguments, model_type: str, rows: Rows) -> tuple[ProcessorMixin, Any]:
    """The checkpoint's processor, and what the collator sees of it: the same, or for a baseline a `SceneView`."""
    if model_type not in BASELINES:
        processor = AutoProcessor.from_pretrained(args.checkpoint)
        return processor, processor
    cameras = [view for view in rows.cameras if view not in EXTRA_VIEWS]  # prompts may name them; it knows none itself
    processor = load_processor(args.checkpoint, cameras, args.image_splitting, args.longest_edge)
    return processor, SceneView(processor, cameras)


def load_examples(
    args: FinetuneArguments, config: SFTConfig, model: PreTrainedModel, view: Any, rows: Rows, cameras: list[str]
) -> tuple[Dataset, Dataset | None, FeatureCache | None]:
    """Training and evaluation examples, and the frozen tower's features of their images where they are cached."""
    shown = [] if args.blind == "text" else cameras
    black = Path(config.output_dir) / "black.png" if args.blind == "black" else None
    held_out, features = None, None
    with config.main_process_first(desc="examples and features"):  # the others find files there
        train = training_examples(rows, shown, args.pairs_per_sequence, black, args.questions, args.reword)
        if args.eval_split:
            others = load_rows(args.data, args.eval_split)
            held_out = training_examples(others, shown, args.pairs_per_sequence, black, args.questions)
        if args.feature_cache:
            paths = {path for part in (train, held_out) if part for paths in part["images"] for path in paths}
            if isinstance(view, SceneView):
                features = build_features(model, view.idefics3.image_processor, sorted(paths), args.feature_cache)
                see_cached(model)
            else:
                features = FeatureCache.build(model, view, sorted(paths), args.feature_cache)
    return train, held_out, features


def make_collator(
    args: FinetuneArguments, model: PreTrainedModel, view: Any, features: Any, seed: int, rig: Rig
) -> SceneCollator:
    """Packed where several questions share a sequence, else a row per question."""
    baseline = model.config.model_type in BASELINES
    common = {
        "cameras": [] if args.blind == "text" else args.cameras,
        "num_queries": args.num_queries,
        "features": features,
        "seed": seed,
        "rig": rig if args.camera_attention_loss else None,
    }
    if args.pairs_per_sequence == 1:
        return (BaselineCollator if baseline else SceneCollator)(view, **common)
    packed = PackedBaselineCollator if baseline else PackedSceneCollator
    return packed(view, mask_dtype=packed_mask_dtype(model), **common)


def watched(args: FinetuneArguments, model: PreTrainedModel) -> CameraAttention | None:
    """The supervision of where the model looks, if it is asked for.

    Raises:
        ValueError: of a model that is shown nothing, or of a layer that is not there.
    """
    if not args.camera_attention_loss:
        return None
    if args.blind:
        raise ValueError(f"a model that is blind ({args.blind}) has nowhere to look: leave camera_attention_loss out")
    return CameraAttention(model, args.camera_attention_layer, args.camera_attention_heads)


def finish(trainer: SceneTrainer, processor: Any, args: Any, note: dict[str, Any]) -> None:
    """Save adapter, merged checkpoint, loss curve and the note, with what the run reached.

    Args:
        args: of the stage; `checkpoint` and `merge` count.
    """
    config = trainer.args
    output_dir = Path(config.output_dir)
    weights = trainer.whole_state_dict()  # on every process: sharded weights are gathered
    if not trainer.is_world_process_zero():
        return
    loss_curve(output_dir / "metrics.jsonl", output_dir / "loss.png")
    note = {**note, "steps": trainer.state.global_step, **first_and_last(output_dir / "metrics.jsonl")}
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, peft.PeftModel):
        remove(output_dir / "adapter")  # of a run that was killed between here and the end
        save_whole(output_dir / "adapter", WithWeights(model, weights), processor, note=note)
        if args.merge:
            unset_hf_deepspeed_config()  # or the base would be sharded as it is read
            model = merged(args.checkpoint, output_dir / "adapter", dtype)
            save_whole(output_dir / "final", model, processor, note=note)
    else:
        save_whole(output_dir / "final", WithWeights(model.to(dtype), weights), processor, note=note)
    print(json.dumps({"output_dir": str(output_dir), "steps": note["steps"], **note["last"]}))


if __name__ == "__main__":
    run(main, FinetuneArguments, SFTConfig, parser=TrlParser)
