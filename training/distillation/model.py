"""The student of the knowledge transfer with its loss as output, and what is kept of it in checkpoints."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from training.distillation.targets import Targets
from training.learning.collate import IGNORED

FROZEN_PARTS = ("student.model.language_model.", "student.lm_head.")


class TransferModel(nn.Module):
    """The student with the transfer's loss as its output, so that data-parallel wrappers see one forward."""

    def __init__(self, student: PreTrainedModel, targets: Targets, answer_distillation: float):
        super().__init__()
        self.student = student
        self.targets = targets
        self.answer_distillation = answer_distillation
        self.register_state_dict_post_hook(_without_language_model)
        self.register_load_state_dict_post_hook(_language_model_is_not_missing)

    def outputs(self, camera_ids: torch.Tensor, num_queries: int, **vision) -> torch.Tensor:
        """What is compared with the target, (images, queries, width), in the order of the images."""
        with self._query_outputs(camera_ids) as seen:
            tokens = self.student.get_image_features(
                camera_ids=camera_ids, num_queries=num_queries, return_dict=True, **vision
            ).pooler_output
        return self._comparable(tokens, seen)

    @contextmanager
    def _query_outputs(self, camera_ids: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """Catches what the Q-Formers hand to the connector, back in the order of the images."""
        seen: list[torch.Tensor] = []
        order = camera_ids.argsort(stable=True).argsort()  # the projector groups images by camera
        connector = self.student.model.multi_modal_projector.connector
        handle = connector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][order]))
        try:
            yield seen
        finally:
            handle.remove()

    def _comparable(self, tokens: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
        return (tokens if self.targets.weights is not None else seen[-1]).float() / self.targets.scale

    def forward(
        self,
        camera_ids: torch.Tensor,
        target: torch.Tensor,
        num_queries: int,
        text: Mapping[str, torch.Tensor] | None = None,
        teacher_logits: torch.Tensor | None = None,
        **vision,
    ) -> dict[str, torch.Tensor]:
        """`loss`, and its parts `alignment` and, with text, `divergence`."""
        if text is None:
            output = self.outputs(camera_ids, num_queries, **vision)
        else:
            labels = text["labels"]
            with self._query_outputs(camera_ids) as seen:
                student = self.student(
                    input_ids=text["input_ids"], attention_mask=text["attention_mask"], camera_ids=camera_ids, **vision
                )
            output = self._comparable(student.image_hidden_states, seen)
        error = (output - target[:, : output.shape[1]]).square().mean()
        losses = {"alignment": error / self.targets.variance}
        losses["loss"] = losses["alignment"]
        if text is not None:
            logits = student.logits[:, :-1][labels[:, 1:] != IGNORED]  # (answer tokens, vocab)
            losses["divergence"] = divergence(logits, teacher_logits)
            losses["loss"] = losses["loss"] + self.answer_distillation * losses["divergence"]
        return losses


def _without_language_model(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: dict) -> None:
    """Checkpoints hold what can change; the language model is the student's own."""
    for name in [name for name in state if name.startswith(tuple(prefix + part for part in FROZEN_PARTS))]:
        del state[name]


def _language_model_is_not_missing(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if not any(part in name for part in FROZEN_PARTS)]


def divergence(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the student's from the teacher's distribution, mean over (tokens, vocab) rows.

    Vocabularies may be padded to different sizes; tokens that only one of them has are left out.
    """
    size = min(logits.shape[-1], teacher_logits.shape[-1])
    student = logits[..., :size].float().log_softmax(-1)
    teacher = teacher_logits[..., :size].float().log_softmax(-1)
    return nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
