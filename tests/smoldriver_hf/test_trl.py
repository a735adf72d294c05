"""TRL's own vision collator and trainer work on our rows, and every image keeps its camera through them.

The row layout that TRL takes: `images` a list, one per image part of the prompt and in the same order; `prompt` a user
message whose image parts carry `"camera"`; `completion` an assistant message. A dict of images, or image parts that
hold their image already, are refused by TRL (`prepare_multimodal_messages` counts unfilled parts and indexes a list).
"""

import pytest
import torch
from datasets import Dataset
from tiny import lively, picture, scene, tiny_model, tiny_processor
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from smoldriver_hf import CAMERAS, SmolDriverModel


def row(images: dict, question: str, answer: str) -> dict:
    parts = [{"type": "image", "camera": camera} for camera in images]
    return {
        "images": list(images.values()),
        "prompt": [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
    }


def rows() -> list[dict]:
    back_first = {camera: scene()[camera] for camera in ("CAM_BACK", "CAM_FRONT", "CAM_BACK_LEFT")}
    return [
        row(back_first, "Is there a car behind? <image>", "Yes."),
        row(scene(1), "And a much longer question about six cameras?", "No, there is none."),
        row({"CAM_BACK_RIGHT": picture(7)}, "<|im_end|>", "<|im_start|>Yes"),
    ]


def collate(examples, processor, **options):
    return DataCollatorForVisionLanguageModeling(processor=processor, completion_only_loss=True, **options)(examples)


def through_datasets(examples):
    """The same rows after Arrow, which gives every part all keys, None where it has none."""
    return list(Dataset.from_list(examples))


@pytest.mark.parametrize("arrow", [False, True])
def test_cameras_are_neither_lost_nor_permuted(arrow):
    processor = tiny_processor()
    batch = collate(through_datasets(rows()) if arrow else rows(), processor)
    assert batch["camera_ids"].tolist() == [4, 1, 3, 0, 1, 2, 3, 4, 5, 5]
    images = [image for example in rows() for image in example["images"]]
    assert torch.equal(batch["pixel_values"], processor.image_processor(images, return_tensors="pt")["pixel_values"])
    assert (batch["input_ids"] == processor.image_token_id).sum(-1).tolist() == [24, 48, 8]


def test_labels_are_the_completion_only():
    processor = tiny_processor()
    batch = collate(rows(), processor)
    answers = [
        processor.tokenizer.decode(ids[labels != -100])
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    assert answers == ["Yes.<|im_end|>\n", "No, there is none.<|im_end|>\n", "< |im_start|>Yes<|im_end|>\n"]
    learnt = batch["labels"] != -100
    assert torch.equal(batch["labels"][learnt], batch["input_ids"][learnt])
    assert not (batch["labels"] == processor.image_token_id).any()


def test_each_row_collated_equals_the_processors_own_prompt():
    processor = tiny_processor()
    batch = collate(rows(), processor)
    for index, example in enumerate(rows()):
        parts = example["prompt"][0]["content"]
        images = {part["camera"]: image for part, image in zip(parts[:-1], example["images"], strict=True)}
        messages = [{"role": "user", "content": [*parts[:-1], parts[-1]]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        ids = processor(images=images, text=prompt, return_tensors="pt")["input_ids"][0]
        row_ids = batch["input_ids"][index][batch["attention_mask"][index].bool()]
        assert torch.equal(row_ids[: len(ids)], ids)


def test_a_collated_batch_gives_the_loss_of_its_rows():
    model, processor = lively(tiny_model()), tiny_processor()
    batch = collate(rows(), processor)
    counts, losses = [], []
    for example in rows():
        single = collate([example], processor)
        counts.append((single["labels"] != -100).sum())
        losses.append(model(**single).loss)
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(model(**batch).loss, expected, atol=1e-4, rtol=1e-4)


def test_assistant_only_loss_on_whole_conversations():
    processor = tiny_processor()
    examples = [
        {"images": example["images"], "messages": example["prompt"] + example["completion"]} for example in rows()
    ]
    collator = DataCollatorForVisionLanguageModeling(processor=processor, assistant_only_loss=True)
    batch = collator(examples)
    learnt = [processor.tokenizer.decode(ids[ids != -100]) for ids in batch["labels"]]
    assert learnt == ["Yes.<|im_end|>", "No, there is none.<|im_end|>", "< |im_start|>Yes<|im_end|>"]
    assert batch["camera_ids"].tolist() == [4, 1, 3, 0, 1, 2, 3, 4, 5, 5]


def test_text_only_rows():
    example = {**row({}, "What is a car?", "A vehicle."), "images": []}
    batch = collate([example], tiny_processor())
    assert "pixel_values" not in batch and (batch["labels"] != -100).sum() > 5


@pytest.mark.parametrize("text_first", [True, False])
def test_text_only_rows_beside_others(text_first):
    text = {**row({}, "What is a car?", "A vehicle."), "images": []}
    examples = [text, rows()[0]] if text_first else [rows()[0], text]
    model, processor = lively(tiny_model()), tiny_processor()
    batch = collate(examples, processor)
    assert batch["camera_ids"].tolist() == [4, 1, 3]
    place = 0 if text_first else 1
    alone = collate([text], processor)
    learnt = [batch["labels"][place] != -100, alone["labels"][0] != -100]
    both = [model(**batch).logits[place][learnt[0]], model(**alone).logits[0][learnt[1]]]
    torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4)


def online_rows(cameras) -> Dataset:
    """Prompts of unequal length about images in the order of `cameras`."""
    made = [
        row({camera: scene(number)[camera] for camera in cameras}, "Why?" * (1 + 3 * number), "") for number in (0, 1)
    ]
    return Dataset.from_list([{"prompt": example["prompt"], "images": example["images"]} for example in made])


@pytest.mark.parametrize(
    ("kind", "cameras", "beta"),
    [("GRPO", CAMERAS[3:], 0.0), ("GRPO", CAMERAS[::-1], 0.04), ("RLOO", ("CAM_BACK", "CAM_FRONT"), 0.05)],
)
def test_online_trainers_keep_every_images_camera(kind, cameras, beta, tmp_path, monkeypatch):
    """GRPO loses inputs that it does not know in its loss, and with a reference model it stops at them, as RLOO does:
    the model reads the cameras in the prompt."""
    folder = tmp_path / "model"
    lively(tiny_model()).save_pretrained(folder)
    processor = tiny_processor()
    if beta:
        processor.images_kwargs = {"return_camera_ids": False}
    seen, padded = [], []
    look = SmolDriverModel.get_image_features
    forward = SmolDriverModel.forward

    def spy(self, pixel_values=None, camera_ids=None, **options):
        seen.append([CAMERAS[index] for index in camera_ids.tolist()])
        return look(self, pixel_values, camera_ids, **options)

    def watch(self, input_ids=None, attention_mask=None, **options):
        if input_ids is not None and attention_mask is not None and input_ids.shape == attention_mask.shape:
            pads = (input_ids == processor.tokenizer.pad_token_id) & attention_mask.bool()
            padded.append(bool(pads[:, 0].any()))  # on the left
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(SmolDriverModel, "get_image_features", spy)
    monkeypatch.setattr(SmolDriverModel, "forward", watch)
    config, trainer = {"GRPO": (GRPOConfig, GRPOTrainer), "RLOO": (RLOOConfig, RLOOTrainer)}[kind]
    arguments = config(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        beta=beta,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer(
        model=str(folder),
        reward_funcs=lambda completions, **_: [float(len(str(completion))) for completion in completions],
        args=arguments,
        train_dataset=online_rows(cameras),
        processing_class=processor,
    ).train()
    assert len(seen) >= (3 if beta else 2) and not any(padded) and len(padded) > 1
    assert all(found == list(cameras) * (len(found) // len(cameras)) for found in seen)


def test_layouts_that_trl_does_not_take():
    processor = tiny_processor()
    example = rows()[0]
    with pytest.raises((KeyError, TypeError)):  # prepare_multimodal_messages asks for images[0]
        collate([{**example, "images": dict(enumerate(example["images"], start=1))}], processor)
    with pytest.raises(ValueError, match="does not match number of image placeholders"):
        collate([{**example, "images": example["images"][:2]}], processor)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_trainer_trains_every_qformer_that_saw_an_image(batch_size, tmp_path):
    model, processor = lively(tiny_model()), tiny_processor()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        max_length=None,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=True,
    )
    questions = [row(scene(index), "Is it safe?", "Yes, it is.") for index in range(4)]
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(questions), processing_class=processor
    )
    assert isinstance(trainer.data_collator, DataCollatorForVisionLanguageModeling)
    result = trainer.train()
    assert result.training_loss > 0
    idle = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not idle
    assert all(any(camera in name for name in before) for camera in CAMERAS)
