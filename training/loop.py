"""What the training scripts do alike: accelerator, optimizer, checkpoints that resume."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from diffad.model_card import SECRETS
from diffad.precision import resolve_precision

logger = get_logger(__name__)


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerate, with a data order that the seed and the epoch alone decide, so that a resumed run sees the same."""
    accelerator = Accelerator(
        # Every step takes as many batches, also where an epoch ends: a step's batches follow from its number alone.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=resolve_precision(args.mixed_precision),
        log_with=args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=os.path.join(args.output_dir, "logs")
        ),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    args.mixed_precision = accelerator.mixed_precision  # also where accelerate's own settings say so
    set_seed(args.seed)
    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    if args.report_to:
        scalars = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, bool)) and k not in SECRETS}
        accelerator.init_trackers("diffad", config=scalars)
    return accelerator


def training_batches(
    data_loader: DataLoader, accelerator: Accelerator, first: int, last: int
) -> Iterator[tuple[int, Any]]:
    """Numbered batches [first, last), epoch after epoch; a resumed run skips without reading images."""
    number = first
    while number < last:
        epoch, offset = divmod(number, len(data_loader))
        data_loader.set_epoch(epoch)
        loader = accelerator.skip_first_batches(data_loader, offset) if offset else data_loader
        for batch in loader:
            yield number, batch
            number += 1
            if number == last:
                return


def create_optimizer(
    parameters: Sequence[torch.nn.Parameter], args: argparse.Namespace, accelerator: Accelerator
) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.adam_weight_decay, fused=True)
    # accelerate steps the schedule once for every process
    schedule = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    return optimizer, schedule


def create_ema(parameters: Sequence[torch.nn.Parameter], args: argparse.Namespace) -> EMAModel | None:
    """Diffusers' EMA; the warm-up's power suits runs of a thousand steps as well as of a million."""
    if not args.use_ema:
        return None
    return EMAModel(parameters, decay=args.ema_decay, use_ema_warmup=True, power=3 / 4, foreach=True)


def save_checkpoint(accelerator: Accelerator, args: argparse.Namespace, step: int) -> None:
    """Saves `checkpoint-STEP`: written under another name and renamed, so a killed run leaves no half checkpoint."""
    folder = Path(args.output_dir, f"checkpoint-{step}")
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        for old in list_checkpoints(args.output_dir)[: -args.checkpoints_total_limit or None]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def resume(accelerator: Accelerator, args: argparse.Namespace) -> int:
    """Loads the checkpoint asked for and returns its step; 0 where there is none yet."""
    if not args.resume_from_checkpoint:
        return 0
    if args.resume_from_checkpoint == "latest":
        checkpoints = list_checkpoints(args.output_dir)
        if not checkpoints:
            accelerator.print(f"No checkpoint in {args.output_dir} yet: starting anew.")
            return 0
        folder = checkpoints[-1]
    else:
        folder = Path(args.resume_from_checkpoint)
        if not folder.is_dir():
            raise FileNotFoundError(f"--resume_from_checkpoint: no folder at {folder}. Give one, or 'latest'.")
    accelerator.load_state(str(folder))
    step = int(folder.name.removeprefix("checkpoint-"))
    accelerator.print(f"Resuming from {folder}, step {step}.")
    return step


def check_replicas(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Every process must have come to the same weights.

    Raises:
        RuntimeError: they differ, so gradients were not exchanged.
    """
    checksum = sum(p.detach().double().abs().sum() for p in model.parameters()).reshape(1)
    gathered = accelerator.gather(checksum.float() if checksum.device.type == "mps" else checksum)
    if not torch.equal(gathered, gathered[:1].expand_as(gathered)):
        raise RuntimeError(f"Processes ended with different weights (sums {gathered.tolist()}).")
