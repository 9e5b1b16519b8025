"""A training of nine weights, through the loop that every script runs: called by tests, and run as a script."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import nn
from torch.utils.data import Dataset

from diffad.training.arguments import add_shared_arguments, parse_arguments
from diffad.training.data import create_data_loader
from diffad.training.loop import create_accelerator, train

# Three batches an epoch; two batches a step, so that every other step takes them from two epochs.
FLAGS = ["--train_data_dir", "none", "--train_batch_size", "4", "--gradient_accumulation_steps", "2", "--use_ema"]


class Points(Dataset):
    category_index = np.zeros(13, dtype=int)

    def __len__(self) -> int:
        return 13

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.randn(3, generator=torch.Generator().manual_seed(i))


def run(
    output: Path,
    *flags: object,
    on_batch: Callable[[int, nn.Module], torch.Tensor | None] | None = None,
    held_out_loss: Callable[[nn.Module], torch.Tensor] | None = None,
) -> dict:
    """Trains for 6 steps unless the flags say otherwise; saves the weights that it ends with and returns the record.

    `on_batch` is called with the number of batches before this one, and may return what to add to the loss;
    `held_out_loss` is the loop's.
    """
    parser = argparse.ArgumentParser()
    add_shared_arguments(parser)
    more = ["--output_dir", output, "--max_train_steps", 6, "--lr_warmup_steps", 1, "--learning_rate", 0.1, *flags]
    args = parse_arguments(parser, [*FLAGS, *map(str, more)])
    accelerator = create_accelerator(args)
    model = nn.Linear(3, 3)
    seen = 0

    def batch_loss(
        model: nn.Module, batch: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        nonlocal seen
        noise = torch.randn(batch.shape, generator=generator)
        loss = F.mse_loss(model(batch + noise), batch)  # (N, 3)
        added = on_batch(seen, model) if on_batch is not None else None
        seen += 1
        return loss if added is None else loss + added, {"error": loss}

    record = train(model, batch_loss, create_data_loader(Points(), args), args, accelerator, None, held_out_loss)
    torch.save(model.state_dict(), Path(output, f"weights-{accelerator.process_index}.pt"))
    accelerator.end_training()
    return record


def not_a_number(model: nn.Module) -> torch.Tensor:
    """A loss that is NaN, and so is its gradient."""
    return sum(parameter.sum() for parameter in model.parameters()) * float("nan")


if __name__ == "__main__":
    # OUTPUT BATCH PROCESS WHAT [FLAGS]: at this batch, in this process, a signal to its group by number, or "nan"
    output, batch, process, what, *flags = sys.argv[1:]

    def act(number: int, model: nn.Module) -> torch.Tensor | None:
        if number == int(batch) and PartialState().process_index == int(process):
            if what == "nan":
                return not_a_number(model)
            os.killpg(0, int(what))
        return None

    run(Path(output), *flags, on_batch=act)
