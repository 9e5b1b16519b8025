"""When a training has learnt what it can: the loss of good images that it has not seen.

The learning rate falls to the end, and the loss with it, as long as there are images enough. Of few images a network
learns the pixels by heart: the loss of others then rises, and further steps only cost time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from diffad.files import write_text_whole
from diffad.training.checkpoints import kept_beside

MEASURES = 20  # of the loss in a whole run
PATIENCE = 5  # measures without a new best, after which a run ends: a quarter of its steps
KEPT_NAME = "held_out_loss.json"


class HeldOutLoss:
    """The held-out loss every twentieth of a run, kept beside its checkpoints, where a run that goes on finds it.

    Args:
        loss: of the network it is given, a scalar: on the same images, with the same noise each time.
        args: of the run, `max_train_steps` among them.
        first_step: where the run begins, or goes on.
        accelerator: whose processes all measure; the mean decides for all of them.
    """

    def __init__(
        self,
        loss: Callable[[nn.Module], torch.Tensor],
        args: argparse.Namespace,
        first_step: int,
        accelerator: Accelerator,
    ):
        self.loss, self.accelerator = loss, accelerator
        self.every = max(1, args.max_train_steps // MEASURES)
        self.path = Path(args.output_dir, KEPT_NAME)
        self.values: dict[int, float] = {}  # by step
        if first_step and (kept := kept_beside(args, KEPT_NAME)) is not None:
            known = json.loads(kept.read_text(encoding="utf-8"))
            self.values = {int(step): value for step, value in known.items() if int(step) <= first_step}

    @torch.no_grad()
    def measure(self, model: nn.Module, ema: EMAModel | None, step: int) -> float:
        """The loss now, of the averaged weights where there are some; the network goes on as it was."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if ema is not None:
            ema.store(parameters)
            ema.copy_to(parameters)
        model.eval()
        with self.accelerator.autocast():
            loss = self.loss(model)
        model.train()
        if ema is not None:
            ema.restore(parameters)
        self.values[step] = float(self.accelerator.gather(loss.detach().float().reshape(1)).mean())
        if self.accelerator.is_main_process:
            write_text_whole(self.path, json.dumps(self.values, indent=1) + "\n")
        return self.values[step]

    def has_converged(self) -> bool:
        """Whether the last `PATIENCE` measures are all above an earlier one."""
        losses = [self.values[step] for step in sorted(self.values)]
        return len(losses) > PATIENCE and min(losses[-PATIENCE:]) > min(losses[:-PATIENCE])


def same_loss(
    batch_loss: Callable[[nn.Module, Any, torch.Generator], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    batches: Sequence[Any],
    accelerator: Accelerator,
) -> Callable[[nn.Module], torch.Tensor]:
    """The mean loss of some batches, with the same noise each time: a function of the network alone."""

    def loss(model: nn.Module) -> torch.Tensor:
        losses = []
        for number, batch in enumerate(batches):
            generator = torch.Generator(accelerator.device).manual_seed(number)
            losses.append(batch_loss(model, [one.to(accelerator.device) for one in batch], generator)[0])
        return torch.stack(losses).mean()

    return loss
