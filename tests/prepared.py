"""A small prepared data set and tiny checkpoints on disk: what tests of training stages start from."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tiny import picture, tiny_model, tiny_processor, tiny_text_config, tiny_tokenizer
from transformers import Idefics3ImageProcessorPil, SmolVLMConfig, SmolVLMForConditionalGeneration

from smoldriver_hf import CAMERAS
from training.data.rig import EXTRA_VIEWS
from training.data.rows import CONTENTS_SCHEMA, QUESTION_SCHEMA

SMOLVLM_TOKENS = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
SMOLVLM_TOKENS += [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
QUESTIONS = [("Is there a car?", "Yes."), ("Is there a bus?", "No."), ("How many cars?", "Two."), ("Brake?", "No.")]


def write_prepared(folder: Path, frames: int = 4, questions: int = 4, cameras=CAMERAS, splits=("train",)) -> Path:
    """A folder as `training.prepare` writes it, with pictures; each frame answers a little differently."""
    image_root = folder / "images"
    image_root.mkdir(parents=True)
    for name in ("frames", "questions"):
        (folder / name).mkdir()
    for split in splits:
        frame_rows, question_rows = [], []
        for index in range(frames):
            token = {"scene_token": f"{split}{index // 2}", "frame_token": f"{split}-frame{index}"}
            paths = {camera: f"{split}{index}_{camera}.png" for camera in cameras}
            for number, path in enumerate(paths.values()):
                picture(100 * index + number).save(image_root / path)
            frame_rows.append({**token, **paths})
            for number in range(questions):
                question, answer = QUESTIONS[number % len(QUESTIONS)]
                question_rows.append(
                    {
                        **token,
                        "question_id": f"{token['scene_token']}_{token['frame_token']}_{number}",
                        "category": "perception",
                        "tag": [0],
                        "question": question,
                        "answer": answer if index % 2 else f"{answer} In frame {index}.",
                        "objects": [],
                    }
                )
        pq.write_table(pa.Table.from_pylist(frame_rows), folder / "frames" / f"{split}-00000.parquet")
        table = pa.Table.from_pylist(question_rows, schema=QUESTION_SCHEMA)
        pq.write_table(table, folder / "questions" / f"{split}-00000.parquet")
    info = {"image_root": "images", "split_hash": f"{frames}x{questions}x{len(cameras)}", "source": "tests"}
    info |= {"options": {"coordinates": "pixels"}}
    fleet = [camera for camera in cameras if camera not in EXTRA_VIEWS]
    if not set(fleet) <= set(CAMERAS):  # other cameras than nuScenes': their rig has to be said
        info["rig"] = {name: {"azimuth": 360 * index / len(fleet)} for index, name in enumerate(fleet)}
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


def write_shown(folder: Path, contents: dict[tuple[str, str], dict], split: str = "train") -> None:
    """What frames of a prepared folder show, by scene and frame token, as `training.prepare` writes it."""
    rows = [
        {"scene_token": scene, "frame_token": frame, **shown, "words": list(shown["words"].items())}
        for (scene, frame), shown in contents.items()
    ]
    (folder / "contents").mkdir(exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=CONTENTS_SCHEMA)
    pq.write_table(table, folder / "contents" / f"{split}-00000.parquet")


def write_smoldriver(folder: Path, **changes) -> Path:
    """A tiny random SmolDriver with its processor."""
    model = tiny_model(**changes)
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
    return folder


def write_smolvlm(folder: Path, tile: int = 24) -> Path:
    """A tiny random SmolVLM as its publisher would save one: 4 visual tokens per tile of 24 pixels."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *SMOLVLM_TOKENS]})
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            vision_config={**vision, "image_size": tile, "patch_size": tile // 4},
            text_config=tiny_text_config(vocab_size=280).to_dict(),
            scale_factor=2,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            tie_word_embeddings=False,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * tile}, max_image_size={"longest_edge": tile}, do_image_splitting=True
    ).save_pretrained(folder)
    return folder
