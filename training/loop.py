"""The one training loop: each script brings a model, the loss of a batch and what to show."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import create_repo
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffad.cores import limit_threads
from diffad.files import locked_folder
from diffad.model_card import SECRETS
from diffad.model_folder import MODEL_LOCK_NAME
from diffad.precision import checked_precision, resolve_precision
from diffad.process_share import on_main
from diffad.seeding import step_generator
from diffad.training.checkpoints import checkpoint_to_resume, list_checkpoints, resume, save_checkpoint
from diffad.training.early_stopping import HeldOutLoss
from diffad.training.sharded_networks import check_sharding, is_sharded
from diffad.training.stop_signals import catch_stop_signals, received_anywhere

# (model, batch, generator) -> the loss, a scalar, and the parts of it that the log names
BatchLoss: TypeAlias = Callable[[nn.Module, Any, torch.Generator], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def create_accelerator(args: argparse.Namespace, can_shard: bool = False) -> Accelerator:
    """Accelerate, with a data order that the seed and the epoch alone decide, so that a resumed run sees the same.

    Raises:
        ValueError: weights are to be sharded, and `can_shard` or a flag says that they cannot be; fp16 on a CPU.
    """
    limit_threads()
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
    check_sharding(args, accelerator, can_shard)
    args.mixed_precision = checked_precision(accelerator)  # also where accelerate's own settings say so
    set_seed(args.seed)
    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    if args.report_to:
        scalars = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, bool)) and k not in SECRETS}
        accelerator.init_trackers("diffad", config=scalars)
    return accelerator


def create_repository(args: argparse.Namespace) -> None:
    """Creates what `--push_to_hub` pushes to, where it is not there: else only the end of the run would find an error.

    Raises:
        RuntimeError: its name is none, nobody is logged in, or the Hub cannot be reached.
    """
    try:
        create_repo(args.hub_model_id, token=args.hub_token, exist_ok=True)
    except Exception as error:  # the network has errors of its own
        raise RuntimeError(
            f"--push_to_hub: no repository {args.hub_model_id!r} can be had ({error}). Mend --hub_model_id, log in (`"
            "hf auth login`, or --hub_token), or leave --push_to_hub out."
        ) from error


@contextmanager
def held_output_dir(args: argparse.Namespace, accelerator: Accelerator) -> Iterator[None]:
    """Keeps other runs out of `--output_dir`, where checkpoints of two would be taken for one's.

    Raises:
        RuntimeError: another run holds it.
        SystemExit: so it is for the main process, of which this is none.
    """
    with ExitStack() as stack:
        lock = locked_folder(Path(args.output_dir), MODEL_LOCK_NAME, "--output_dir")
        on_main(accelerator, lambda: stack.enter_context(lock))
        yield


def train(
    model: nn.Module,
    batch_loss: BatchLoss,
    data_loader: DataLoader,
    args: argparse.Namespace,
    accelerator: Accelerator,
    save_pictures: Callable[[Path], None] | None = None,
    held_out_loss: Callable[[nn.Module], torch.Tensor] | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains a model, which ends in evaluation mode, with the averaged weights where `args.use_ema`.

    Every process calls this. Ctrl-C and SIGTERM are looked at between steps: a checkpoint is written, from which
    `--resume_from_checkpoint latest` comes to the same weights to the bit.

    Args:
        model: its parameters that require gradients are trained.
        batch_loss: the loss of a batch, as a scalar, and its named parts for the log. It is given `model` as accelerate
            wraps it, a batch of `data_loader` on the process's device, and the batch's own generator.
        data_loader: not yet accelerate's.
        args: the shared flags.
        accelerator: of `create_accelerator`.
        save_pictures: writes a sheet of validation pictures to a path, called every `args.validation_steps` on the main
            process, with the model in evaluation mode.
        held_out_loss: of images that are not trained on, as `HeldOutLoss` takes it: the run ends early where it no
            longer falls.
        settings: the script's own flags that the weights depend on, by name: a run that goes on must have the same.

    Returns:
        For `training.json`: `steps`, `training_seconds` of this call and, where it was measured, `held_out_loss` by
        step.

    Raises:
        RuntimeError: the loss or its gradient is not finite, or the processes' weights differ at the end; or, with
            `args.push_to_hub`, the Hub gives no repository to push to.
        ValueError: a checkpoint cannot be gone on from with these flags.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM.
    """
    if args.push_to_hub:
        on_main(accelerator, lambda: create_repository(args))
    # 1. Optimizer, averages, and what accelerate makes of them; where a checkpoint left off
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    accumulation = args.gradient_accumulation_steps
    images_a_step = accumulation * data_loader.batch_size * accelerator.num_processes
    if args.num_train_epochs is not None:
        batches = len(data_loader) // accelerator.num_processes  # of each process, whole ones
        args.max_train_steps = math.ceil(args.num_train_epochs * batches / accumulation)
    optimizer, schedule = create_optimizer(trained, args, accelerator, images_a_step)
    model, optimizer, data_loader, schedule = accelerator.prepare(model, optimizer, data_loader, schedule)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # others where it is sharded
    ema = create_ema(trained, args, accelerator)
    settings = {**(settings or {}), **({"ema_decay": args.ema_decay} if args.use_ema else {})}
    step = first_step = resume(accelerator, args, settings)
    check_steps(step, args)
    check_rates(optimizer, schedule, args, images_a_step)
    take_place(schedule, args, accelerator)
    if step < args.max_train_steps <= args.lr_warmup_steps and args.lr_scheduler != "constant":
        accelerator.print(
            f"--lr_warmup_steps {args.lr_warmup_steps} are no fewer than the {args.max_train_steps} steps of this run: "
            f"the learning rate never comes to {step_rate(args, images_a_step):g}. Give fewer."
        )
    if ema is not None:
        ema.to(accelerator.device)  # a checkpoint is loaded into memory, beside a GPU
    held_out = None if held_out_loss is None else HeldOutLoss(held_out_loss, args, first_step, accelerator)
    first, last = step * accumulation, args.max_train_steps * accumulation  # batches
    if held_out is not None and held_out.has_converged():
        first = last  # it had ended early
    progress = tqdm(
        total=args.max_train_steps, initial=step, desc="Training", disable=not accelerator.is_local_main_process
    )
    exchange_is_cheap = accelerator.num_processes == 1 or accelerator.device.type == "cpu"
    model.train()
    started = time.time()

    with catch_stop_signals() as received, progress:
        for number, batch in training_batches(data_loader, accelerator, first, last):
            # 2. A step, of `accumulation` batches
            with accelerator.accumulate(model):
                loss, parts = batch_loss(model, batch, step_generator(args.seed, number, accelerator))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    gradient_norm = accelerator.clip_grad_norm_(trained, args.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            if ema is not None:
                ema.step(trained)
            progress.update()

            # 3. Looks at the loss and for signals, seldom where that waits for a GPU
            is_last, is_tenth = step == args.max_train_steps, step % 10 == 0
            if held_out is not None and step % held_out.every == 0:
                accelerator.log({"held-out loss": held_out.measure(model, ema, step)}, step=step)
                is_last = is_last or held_out.has_converged()
            stop = received_anywhere(received, accelerator) if exchange_is_cheap or is_last or is_tenth else 0
            is_saved = bool(stop) or is_last or step % args.checkpointing_steps == 0
            if is_saved or is_tenth:
                values = read_loss(loss, parts, gradient_norm, step, args, accelerator)
            if is_last or is_tenth:
                rate = (step - first_step) * images_a_step / (time.time() - started)
                progress.set_postfix({**{k: f"{v:.3f}" for k, v in values.items()}, "images/s": f"{rate:.0f}"})
                accelerator.log({**values, "lr": schedule.get_last_lr()[0], "images_per_s": rate}, step=step)

            # 4. Pictures and checkpoints
            is_shown = bool(args.validation_steps) and step % args.validation_steps == 0
            if save_pictures is not None and is_shown and accelerator.is_main_process:
                model.eval()
                with torch.no_grad(), accelerator.autocast():
                    save_pictures(Path(args.output_dir, "validation", f"step-{step}.png"))
                model.train()
            if is_saved:
                save_checkpoint(accelerator, args, step, settings)
            if stop:
                progress.close()
                accelerator.print(f"Stopped at step {step}. Add --resume_from_checkpoint latest to go on.")
                accelerator.end_training()
                raise SystemExit(128 + stop)
            if is_last:
                break

    if step < args.max_train_steps:
        accelerator.print(f"The loss of held-out images no longer falls: stopped after {step} steps.")
    if not is_sharded(accelerator):
        check_replicas(model, accelerator)
    if ema is not None:
        ema.copy_to(trained)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()  # its forward is float32's again
    record = {"steps": step, "training_seconds": round(time.time() - started, 1)}
    return record if held_out is None else {**record, "held_out_loss": held_out.values}


def training_batches(
    data_loader: DataLoaderShard, accelerator: Accelerator, first: int, last: int
) -> Iterator[tuple[int, Any]]:
    """Numbered batches [first, last), epoch after epoch; a resumed run skips without reading images."""
    number = first
    while number < last:
        epoch, offset = divmod(number, len(data_loader))
        data_loader.set_epoch(epoch)
        loader = accelerator.skip_first_batches(data_loader, offset) if offset else data_loader
        loader.set_epoch(epoch)  # before accelerate 1.15, one that skips is shuffled as the first epoch is
        for batch in loader:
            yield number, batch
            number += 1
            if number == last:
                return


def create_optimizer(
    parameters: Sequence[nn.Parameter], args: argparse.Namespace, accelerator: Accelerator, images_a_step: int
) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW, in 8 bits where asked for (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022)."""
    options = {
        "lr": step_rate(args, images_a_step),
        "weight_decay": args.adam_weight_decay,
    }
    if args.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("--use_8bit_adam takes bitsandbytes: pip install bitsandbytes") from error
        optimizer = AdamW8bit(parameters, **options)
    else:
        optimizer = torch.optim.AdamW(parameters, fused=True, **options)
    # accelerate steps the schedule once for every process
    try:
        schedule = get_scheduler(
            args.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
            num_training_steps=args.max_train_steps * accelerator.num_processes,
        )
    except ValueError as error:  # the polynomial one ends at 1e-7
        raise ValueError(f"--lr_scheduler {args.lr_scheduler}, --learning_rate {options['lr']:g}: {error}") from error
    return optimizer, schedule


def check_steps(step: int, args: argparse.Namespace) -> None:
    """Raises a ValueError where the checkpoint has more steps than are asked for: its weights are not those."""
    if step > args.max_train_steps:
        flag = "--max_train_steps is"
        if args.num_train_epochs is not None:
            flag = f"--num_train_epochs {args.num_train_epochs} makes"
        raise ValueError(
            f"{flag} {args.max_train_steps}, but the checkpoint has been trained for {step} steps. Give as many or "
            "more, an earlier checkpoint to --resume_from_checkpoint, or start anew in another --output_dir."
        )


def step_rate(args: argparse.Namespace, images_a_step: int) -> float:
    """The learning rate at its height."""
    return args.learning_rate * (images_a_step if args.scale_lr else 1)


def check_rates(optimizer: Any, schedule: Any, args: argparse.Namespace, images_a_step: int) -> None:
    """A checkpoint brings the rates that its run began with, so that other ones of the flags would do nothing.

    Raises:
        ValueError: the flags say others.
    """
    scaled = " (times the images a step, by --scale_lr)" if args.scale_lr else ""
    rates = {
        f"--learning_rate{scaled}": (schedule.scheduler.base_lrs[0], step_rate(args, images_a_step)),
        "--adam_weight_decay": (optimizer.param_groups[0]["weight_decay"], args.adam_weight_decay),
    }
    for flag, (loaded, given) in rates.items():
        if loaded != given:
            raise ValueError(
                f"{flag} is {given:g}, but the checkpoint was trained with {loaded:g}, which a resumed run keeps. "
                "Give that, or start anew in another --output_dir."
            )


def take_place(schedule: Any, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """The place of a checkpoint's step on the schedule, where other processes than now have come to it.

    accelerate steps a schedule once for every process, and a checkpoint tells the sum.
    """
    checkpoint = checkpoint_to_resume(args)
    if checkpoint is None:
        return
    before, now = len(list(checkpoint.glob("random_states_*.pkl"))), accelerator.num_processes  # a file of each
    if before in (0, now):
        return
    inner = schedule.scheduler
    inner.last_epoch = inner.last_epoch // before * now
    (group,), (highest,), (factor,) = inner.optimizer.param_groups, inner.base_lrs, inner.lr_lambdas
    group["lr"] = highest * factor(inner.last_epoch)
    inner._last_lr = [group["lr"]]


def create_ema(
    parameters: Sequence[nn.Parameter], args: argparse.Namespace, accelerator: Accelerator
) -> EMAModel | None:
    """Diffusers' EMA, in the checkpoints; the warm-up's power suits runs of a thousand steps as well as of a million.

    It starts from the weights as they are, so before a checkpoint is loaded.
    """
    if not args.use_ema:
        return None
    ema = EMAModel(parameters, decay=args.ema_decay, use_ema_warmup=True, power=3 / 4, foreach=True)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    return ema


def read_loss(
    loss: torch.Tensor,
    parts: dict[str, torch.Tensor],
    gradient_norm: torch.Tensor,
    step: int,
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> dict[str, float]:
    """The loss's parts, averaged over the processes, as numbers.

    Raises:
        RuntimeError: loss or gradient is not finite on some process; on all of them, so that none waits for it.
    """
    tensors = {**parts, "loss": loss, "gradient's norm": gradient_norm}
    if accelerator.optimizer_step_was_skipped:  # fp16's scaler has seen the gradient, and goes on with a smaller scale
        del tensors["gradient's norm"]
    whole = (one.full_tensor() if isinstance(one, DTensor) else one for one in tensors.values())  # if it is sharded
    row = torch.stack([tensor.detach().float() for tensor in whole])  # (K,)
    values = dict(zip(tensors, accelerator.gather(row[None]).mean(dim=0).tolist(), strict=True))
    wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        kept = list_checkpoints(args.output_dir)
        raise RuntimeError(
            f"Training has diverged: at step {step}, {', '.join(wrong)}. Start again with a lower --learning_rate than "
            f"{args.learning_rate:g} or more --lr_warmup_steps than {args.lr_warmup_steps}. This state was not saved; "
            + (f"{kept[-1]} is the last good checkpoint." if kept else "there is no earlier checkpoint.")
        )
    return {name: values[name] for name in parts}


def check_replicas(model: nn.Module, accelerator: Accelerator) -> None:
    """Every process must have come to the same weights.

    Raises:
        RuntimeError: they differ, so gradients were not exchanged.
    """
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64  # MPS has no float64
    sums = (p.detach().abs().sum(dtype=dtype) for p in model.parameters())
    checksum = sum(sums, torch.zeros(1, dtype=dtype, device=accelerator.device))
    gathered = accelerator.gather(checksum)
    if not torch.equal(gathered, gathered[:1].expand_as(gathered)):
        raise RuntimeError(f"Processes ended with different weights (sums {gathered.tolist()}).")
