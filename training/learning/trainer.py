"""Trainers that never write half a checkpoint and never step on a loss that is not a number."""

import errno
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from accelerate import DistributedType
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer

from training.learning.looking import ASKED_CAMERAS, TOKEN_CAMERAS, CameraAttention

UNFINISHED = "checkpoint.unfinished"


class WholeCheckpoints(Trainer):
    """Mixed into a trainer: checkpoints appear whole under their name or not at all, and a bad loss stops the run.

    The loss of every micro-batch is checked before its backward pass. Beside trl's loss that costs nothing worth
    having back: trl reads its accuracy off the device at the same moment, so the queue is empty already. Gradients
    that overflow are seen one step later, as a bad loss; so that no checkpoint of such a step is kept, the weights
    that train are checked before a save.
    """

    _saving = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if not torch.isfinite(loss.detach()):
            raise FloatingPointError(
                f"the loss is {loss.item()} in step {self.state.global_step + 1}; {self._last_whole()}. "
                "Lower the learning rate, clip gradients (max_grad_norm), or look at this batch"
            )
        return result

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._saving else folder

    def _save_checkpoint(self, model, trial):
        """Into a folder of another name, which takes its own once every process has written its share."""
        for name, weight in self.model.named_parameters():
            if weight.requires_grad and not torch.isfinite(weight.detach()).all():
                raise FloatingPointError(
                    f"{name} is not finite after step {self.state.global_step}; {self._last_whole()}. "
                    "Lower the learning rate or clip gradients (max_grad_norm)"
                )
        root = Path(self.args.output_dir)
        unfinished, name = root / UNFINISHED, f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save tells a full disk by a RuntimeError
            shutil.rmtree(unfinished, ignore_errors=True)
            raise self._not_saved(error) from error
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(root / name, ignore_errors=True)
            os.replace(unfinished / name, root / name)
            shutil.rmtree(unfinished, ignore_errors=True)
            keep_last(root, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def whole_state_dict(self) -> dict[str, torch.Tensor] | None:
        """All weights where processes hold shards of them (call it on each), else None: the model has them."""
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            return self.accelerator.get_state_dict(self.model_wrapped)
        return None

    def _last_whole(self) -> str:
        last = last_checkpoint(self.args.output_dir)
        return (
            f"the last whole checkpoint is {last}, from where a new run goes on" if last else "there is no checkpoint"
        )

    def _not_saved(self, error: Exception) -> OSError:
        free = shutil.disk_usage(self.args.output_dir).free
        return OSError(
            errno.ENOSPC if free < 1 << 20 else errno.EIO,
            f"the checkpoint of step {self.state.global_step} could not be written ({error}); {free >> 20} MB are "
            f"free on the disk of {self.args.output_dir}; {self._last_whole()}",
        )


class SceneTrainer(WholeCheckpoints, SFTTrainer):
    """trl's trainer of answers, with whole checkpoints, and the supervision of where a model looks.

    Args:
        camera_attention: watches the model that trains; None leaves its attention alone. Its share of attention is
            logged as `camera_attention`: the earliest sign of whether a model learns to look.
        camera_attention_loss: the weight of its loss beside the answers'.
        learning_rates: of parts of the model by their names, where it is another than `args.learning_rate`; the
            schedule is that of all.
    """

    def __init__(
        self,
        *args,
        camera_attention: CameraAttention | None = None,
        camera_attention_loss: float = 0.0,
        learning_rates: Mapping[str, float] = MappingProxyType({}),
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.camera_attention = camera_attention
        self.camera_attention_loss = camera_attention_loss
        self.learning_rates = dict(learning_rates)

    def create_optimizer(self, model=None):
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        owners = model or self.model
        for part, rate in self.learning_rates.items():
            own = {id(weight) for name, weight in owners.named_parameters() if f"{part}." in name}
            for group in list(optimizer.param_groups):
                moved = [weight for weight in group["params"] if id(weight) in own]
                group["params"] = [weight for weight in group["params"] if id(weight) not in own]
                if moved:
                    optimizer.add_param_group({**group, "params": moved, "lr": rate})
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        token_cameras, asked_cameras = inputs.pop(TOKEN_CAMERAS, None), inputs.pop(ASKED_CAMERAS, None)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.camera_attention is None:
            return result
        loss, share = self.camera_attention.loss(token_cameras, asked_cameras)
        if not math.isnan(share):
            self._metrics["train" if self.model.training else "eval"]["camera_attention"].append(share)
        if not self.model.training:  # the evaluation loss stays that of the answers
            return result
        # With a count of tokens the loss is a share of the whole step's, else of one micro-batch's.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        looking = self.camera_attention_loss * loss / steps
        return (result[0] + looking, *result[1:]) if return_outputs else result + looking


@dataclass
class WithWeights:
    """A model to be saved with weights that were gathered from elsewhere, or with its own."""

    model: PreTrainedModel | PeftModel
    weights: dict[str, torch.Tensor] | None

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        self.model.save_pretrained(folder, **({"state_dict": self.weights} if self.weights is not None else {}))


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest whole checkpoint of a run, or None."""
    return get_last_checkpoint(str(output_dir)) if os.path.isdir(output_dir) else None


def keep_last(root: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, each under another name first: half of one is none."""
    folders = [path for path in root.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
    folders.sort(key=lambda path: int(path.name[11:]))
    for folder in folders[: -limit or None] if limit else []:
        doomed = root / UNFINISHED
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed)


@contextmanager
def clear_about_full_disk(output_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Tell a disk that filled up anywhere in a run (log, picture, final checkpoint) by where and what to do.

    Raises:
        OSError: with errno ENOSPC.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = (error.errno == errno.ENOSPC) if isinstance(error, OSError) else "No space left" in str(error)
        if not full or "last whole checkpoint" in str(error) or "there is no checkpoint" in str(error):
            raise
        last = last_checkpoint(output_dir)
        raise OSError(
            errno.ENOSPC,
            f"the disk of {output_dir} is full ({error}). Free some space and run again: "
            + (f"the run goes on from {last}" if last else "it starts anew, there is no checkpoint yet"),
        ) from error
