"""How many steps a number of minutes are."""

from __future__ import annotations

import copy
import itertools
import statistics
import time

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from diffad.training.loop import BatchLoss

TIMED_STEPS, FEWEST_STEPS = 6, 50
TRAINING_SHARE = 0.8  # of the minutes; the rest is for the choice and the calibration


def steps_in(
    minutes: float,
    unet: torch.nn.Module,
    batch_loss: BatchLoss,
    data_loader: DataLoader,
    accelerator: Accelerator,
) -> int:
    """How many training steps fit, the same number on every process.

    It times a few on a copy of the network, which leaves no trace in the run: with as many `--max_train_steps` a later
    one repeats it.

    Args:
        minutes: of the whole run; `TRAINING_SHARE` of them are for training.
        unet: the network to train.
        batch_loss: as in `diffad.training.loop.train`.
        data_loader: of the training.
        accelerator: of the run.
    """
    model = copy.deepcopy(unet).to(accelerator.device).train()
    optimizer = torch.optim.AdamW(model.parameters())
    seconds = []
    with torch.random.fork_rng():  # which says the order of the images
        batches = itertools.islice(itertools.cycle(data_loader), TIMED_STEPS)
        for step, batch in enumerate(batches):
            batch = [one.to(accelerator.device) for one in batch]
            started = time.perf_counter()
            with accelerator.autocast():
                loss, _ = batch_loss(model, batch, torch.Generator(accelerator.device).manual_seed(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            float(loss.detach())  # waits for a GPU
            seconds.append(time.perf_counter() - started)
    slowest = gather_object([statistics.median(seconds[1:])])
    return max(FEWEST_STEPS, int(TRAINING_SHARE * 60.0 * minutes / max(slowest)))
