"""How many steps a number of minutes are."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from diffad.files import write_text_whole
from diffad.training.checkpoints import kept_beside
from diffad.training.loop import BatchLoss

TIMED_STEPS, FEWEST_STEPS = 6, 10
KEPT_NAME = "steps.json"
TRAINING_SHARE = 0.8  # of the minutes; the rest is for the choice and the calibration


def steps_in(
    args: argparse.Namespace,
    seconds_spent: float,
    unet: torch.nn.Module,
    batch_loss: BatchLoss,
    data_loader: DataLoader,
    accelerator: Accelerator,
) -> int:
    """How many training steps fit, the same number on every process.

    It times a few on a copy of the network, which leaves no trace in the run: with as many `--max_train_steps` a later
    one repeats it.

    Args:
        args: of the run. `TRAINING_SHARE` of its `minutes` are for what comes before the end of training. A run that
            goes on takes the number that it began with, which is kept beside its checkpoint.
        seconds_spent: of the run so far.
        unet: the network to train.
        batch_loss: as in `diffad.training.loop.train`.
        data_loader: of the training.
        accelerator: of the run.
    """

    def keep(values: dict[str, float]) -> None:
        if accelerator.is_main_process:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            write_text_whole(Path(args.output_dir, KEPT_NAME), json.dumps(values) + "\n")

    if (kept := kept_beside(args, KEPT_NAME)) is not None:
        known = json.loads(kept.read_text())
        keep(known)
        accelerator.print(
            f"It goes on with the {known['max_train_steps']} steps that it began with, of {known['minutes']:g} "
            "minutes: --max_train_steps asks for others."
        )
        args.minutes = known["minutes"]  # for the record
        return int(known["max_train_steps"])
    model = copy.deepcopy(unet).to(accelerator.device).train()
    optimizer = torch.optim.AdamW(model.parameters())
    seconds = []
    with torch.random.fork_rng():  # which says the order of the images
        batches = itertools.cycle(data_loader)
        for step in range(TIMED_STEPS):
            started = time.perf_counter()
            batch = [one.to(accelerator.device) for one in next(batches)]
            with accelerator.autocast():
                loss, _ = batch_loss(model, batch, torch.Generator(accelerator.device).manual_seed(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            float(loss.detach())  # waits for a GPU
            seconds.append(time.perf_counter() - started)
    a_step = statistics.median(seconds[1:]) * args.gradient_accumulation_steps
    left = TRAINING_SHARE * 60.0 * args.minutes - seconds_spent
    steps = min(gather_object([max(FEWEST_STEPS, int(left / a_step))]))
    keep({"minutes": args.minutes, "max_train_steps": steps})
    accelerator.print(f"{args.minutes:g} minutes are {steps} steps: --max_train_steps repeats it.")
    return steps
