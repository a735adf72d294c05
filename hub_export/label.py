"""Answer the questions of a prepared data set with an exported model, on one machine or on many.

    python -m hub_export label outputs/smoldriver outputs/fleet --split test --out outputs/answers
    torchrun --nproc_per_node 8 -m hub_export label outputs/smoldriver outputs/fleet --split test --out outputs/answers

    # Ray Data: the machines of a cluster, or two actors on this one
    python -m hub_export label outputs/smoldriver outputs/fleet --split test --out outputs/answers --ray_actors 2

The data set is what `training.prepare` writes (`dataset.json`, `frames/` and `questions/` as Parquet). Each input
shard `questions/SPLIT-….parquet` becomes one output shard of the same name, which appears complete or not at all;
shards that are there are not done again, so an interrupted run is started again by the same command. A frame is
encoded once for all of its questions. A question that cannot be answered has an `error` and no `answer`; the others
are not affected, and the command ends with exit status 2. Remove a shard, and it is asked again. Ray Data needs
`pip install "ray[data]"`.
"""

import os
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from hub_export.files import check_model
from hub_export.prepared import FRAME_KEYS, FrameKey, Prepared, frame_key, read_questions
from smoldriver_hf import load
from smoldriver_hf.budgets_smoldriver import argument

SCHEMA = pa.schema([(name, pa.string()) for name in ("question_id", *FRAME_KEYS, "question", "answer", "error")])


@dataclass
class LabelArguments:
    model: str = field(metadata={"help": "Exported folder or Hub repository.", "positional": True})
    data: str = field(metadata={"help": "Prepared folder.", "positional": True})
    out: str = field(metadata={"help": "Folder for the answers, one file per input shard."})
    split: str = field(default="test", metadata={"help": "Which split's questions."})
    revision: str | None = field(default=None, metadata={"help": "Commit of a Hub repository."})
    num_queries: int | str | None = field(
        default=None, metadata={"help": "Budget per camera, or CAM_FRONT=16,CAM_BACK=2.", "aliases": ["--budget"]}
    )
    batch_size: int = field(default=16, metadata={"help": "Questions of one frame decoded side by side."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer."})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, or auto: as the weights are."})
    ray_actors: int = field(default=0, metadata={"help": "Spread the shards over this many Ray Data actors."})

    def __post_init__(self) -> None:
        self.num_queries = argument(self.num_queries)


class Labeller:
    """A model with the frames it labels; one per process or Ray actor."""

    def __init__(self, args: LabelArguments):
        self.args = args
        model, self.processor = load(
            args.model, precision=None, dtype=args.dtype, revision=args.revision, trust_remote_code=True
        )
        self.model = model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
        self.processor.num_image_tokens(args.num_queries)  # one that the model does not have, every frame would refuse
        self.frames = Prepared(args.data).images(args.split)
        there = sorted({camera for images in self.frames.values() for camera in images})
        unknown = [camera for camera in there if camera not in self.processor.cameras]
        if unknown == there:
            raise ValueError(f"{args.data} has images of {there}; {args.model} knows {self.processor.cameras}")
        if unknown:
            print(f"{args.model} knows no {', '.join(unknown)}: these images are left out")

    def answer_frame(self, key: FrameKey, questions: list[str]) -> list[tuple[str | None, str | None]]:
        """(answer, error) of each question about one frame, which is encoded once."""
        images = {camera: path for camera, path in self.frames[key].items() if camera in self.processor.cameras}
        try:
            scene = self.model.encode_scene(images, self.processor, num_queries=self.args.num_queries)
        except ValueError as error:  # an unreadable image: the next frame may be fine
            return [(None, str(error))] * len(questions)
        answers = scene.ask_all(questions, batch_size=self.args.batch_size, max_new_tokens=self.args.max_new_tokens)
        return [(answer.text, None if answer.error is None else str(answer.error)) for answer in answers]

    def label(self, shard: Path) -> Path:
        """Answer one input shard; returns the output shard."""
        rows = read_questions(shard, ["question_id", "question"])
        answered: list[tuple[str | None, str | None]] = [(None, None)] * len(rows)
        places = sorted(range(len(rows)), key=lambda place: frame_key(rows[place]))
        for key, same_frame in groupby(places, key=lambda place: frame_key(rows[place])):
            group = list(same_frame)
            if key not in self.frames:
                raise ValueError(f"{shard.name}: question {rows[group[0]]['question_id']} has no frame {key}")
            given = self.answer_frame(key, [rows[place]["question"] for place in group])
            for place, answer in zip(group, given, strict=True):
                answered[place] = answer
        table = [
            {**row, "answer": answer, "error": error} for row, (answer, error) in zip(rows, answered, strict=True)
        ]
        target = Path(self.args.out) / shard.name
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
        pq.write_table(pa.Table.from_pylist(table, schema=SCHEMA), unfinished)
        os.replace(unfinished, target)
        return target


class RayLabeller:
    """`Labeller` as Ray Data calls it: a batch of shard names → the names of what was written."""

    def __init__(self, args: LabelArguments):
        self.labeller = Labeller(args)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"written": [str(self.labeller.label(Path(shard))) for shard in batch["shard"]]}


def label_with_ray(args: LabelArguments, shards: list[Path]) -> None:
    """Spread the shards over actors; each writes its own output files."""
    import ray.data

    absolute = {"data": str(Path(args.data).resolve()), "out": str(Path(args.out).resolve())}
    if Path(args.model).is_dir():
        absolute["model"] = str(Path(args.model).resolve())
    args = LabelArguments(**{**vars(args), **absolute})
    names = [{"shard": str(shard.resolve())} for shard in shards]
    (
        ray.data.from_items(names, override_num_blocks=len(names))
        .map_batches(
            RayLabeller,
            fn_constructor_args=(args,),
            batch_size=1,
            num_cpus=0.4,  # a whole CPU each would leave none for Ray Data's own tasks on a small machine
            num_gpus=1 if torch.cuda.is_available() else 0,
            compute=ray.data.ActorPoolStrategy(size=args.ray_actors),
        )
        .materialize()
    )


def main(args: LabelArguments) -> Path:
    """Label every open shard, or this process's share of them under torchrun; returns the output folder.

    Raises:
        ValueError: no model, no prepared folder, no such split, a question without its frame, or only images of
            cameras that the model does not know.
    """
    check_model(args.model)
    every, out = Prepared(args.data).shards(args.split), Path(args.out)
    open_shards = [shard for shard in every if not (out / shard.name).exists()]
    if args.ray_actors:
        if open_shards:
            label_with_ray(args, open_shards)
        return out
    mine = [shard for shard in _own(every) if shard in open_shards]
    if mine:
        labeller = Labeller(args)
        for shard in tqdm(mine, desc="label, process {} of {}".format(*_place()), unit="shard"):
            labeller.label(shard)
    return out


def command(args: LabelArguments) -> None:
    """`main` for the shell, where questions without an answer are an error once all others are answered.

    Raises:
        ValueError: see `main`; or questions of this process's shards have no answer.
    """
    out, shards = main(args), Prepared(args.data).shards(args.split)
    told = [row for shard in (shards if args.ray_actors else _own(shards)) for row in _errors(out / shard.name)]
    if told:
        raise ValueError(
            f"{len(told)} questions have no answer, the first is {told[0]['question_id']}: {told[0]['error']}; "
            f"the others are in {out}"
        )


def _errors(file: Path) -> list[dict[str, Any]]:
    return pq.read_table(file, columns=["question_id", "error"], filters=pc.field("error").is_valid()).to_pylist()


def _place() -> tuple[int, int]:
    """(number, counted from 1; of how many) of this process under torchrun."""
    return int(os.environ.get("RANK", "0")) + 1, int(os.environ.get("WORLD_SIZE", "1"))


def _own(shards: list[Path]) -> list[Path]:
    """This process's share, by name and not by place among the open ones: who starts later sees fewer of these."""
    number, processes = _place()
    return shards[number - 1 :: processes]
