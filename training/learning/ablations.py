"""Ablations of the projector that training can make without another model.

One Q-Former for all cameras: six copies that start equal and take the mean of their gradients stay equal, so they are
one, and the checkpoint keeps its names. Weights that shall not train: their gradients are switched off.
"""

import re
from collections import defaultdict

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

QFORMER = re.compile(r"(.*\bqformers\.)(\w+)\.(.+)")  # before the camera, the camera, the weight


def qformer_copies(model: nn.Module) -> list[list[nn.Parameter]]:
    """The trainable weights of all Q-Formers, grouped by what is the same weight of different cameras."""
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        match = QFORMER.fullmatch(name)
        if match and parameter.requires_grad:
            groups[match[1], match[3]].append(parameter)
    return list(groups.values())


class SharedQFormers(TrainerCallback):
    """Keeps the Q-Formers of all cameras equal."""

    def __init__(self) -> None:
        self.copies: list[list[nn.Parameter]] = []

    @torch.no_grad()
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.copies = qformer_copies(model)
        for first, *others in self.copies:
            for other in others:
                other.copy_(first)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for copies in self.copies:
            gradients = [copy.grad for copy in copies if copy.grad is not None]
            if gradients:
                mean = torch.stack(gradients).sum(0) / len(copies)
                for copy in copies:
                    copy.grad = mean.clone()


def ablate(trainer: Trainer, shared_qformer: bool, keep_frozen: str | None) -> None:
    """Set a trainer's ablations up, before it trains.

    Args:
        shared_qformer: one Q-Former for all cameras.
        keep_frozen: regular expression over whole names of weights that shall not train.

    Raises:
        ValueError: `keep_frozen` matches no weight that would train.
    """
    if shared_qformer:
        trainer.add_callback(SharedQFormers())
    if keep_frozen is None:
        return
    training = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    frozen = [weight for name, weight in training.items() if re.fullmatch(keep_frozen, name)]
    if not frozen:
        raise ValueError(f"keep_frozen {keep_frozen!r} matches no weight that would train")
    for weight in frozen:
        weight.requires_grad_(False)
