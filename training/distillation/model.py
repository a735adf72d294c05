"""The student of the knowledge transfer with its loss as output, and what is kept of it in checkpoints."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from training.distillation.targets import Targets

FROZEN_PARTS = ("student.model.language_model.", "student.lm_head.")


class TransferModel(nn.Module):
    """The student with the transfer's loss as its output, so that data-parallel wrappers see one forward."""

    def __init__(self, student: PreTrainedModel, targets: Targets):
        super().__init__()
        self.student = student
        self.targets = targets
        self.register_state_dict_post_hook(_without_language_model)
        self.register_load_state_dict_post_hook(_language_model_is_not_missing)

    def outputs(self, camera_ids: torch.Tensor, num_queries: int, **vision) -> torch.Tensor:
        """What is compared with the target, (images, queries, width), in the order of the images."""
        seen: list[torch.Tensor] = []  # what the Q-Formers hand to the connector, grouped by camera
        connector = self.student.model.multi_modal_projector.connector
        with connector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            tokens = self.student.get_image_features(
                camera_ids=camera_ids, num_queries=num_queries, return_dict=True, **vision
            ).pooler_output
        if self.targets.weights is None:
            tokens = seen[-1][camera_ids.argsort(stable=True).argsort()]  # back in the order of the images
        return tokens.float() / self.targets.scale

    def forward(
        self, camera_ids: torch.Tensor, target: torch.Tensor, num_queries: int, **vision
    ) -> dict[str, torch.Tensor]:
        """`loss`: the squared error over the variance of the target."""
        output = self.outputs(camera_ids, num_queries, **vision)
        error = (output - target[:, : output.shape[1]]).square().mean()
        return {"loss": error / self.targets.variance}


def _without_language_model(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: dict) -> None:
    """Checkpoints hold what can change; the language model is the student's own."""
    for name in [name for name in state if name.startswith(tuple(prefix + part for part in FROZEN_PARTS))]:
        del state[name]


def _language_model_is_not_missing(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if not any(part in name for part in FROZEN_PARTS)]
