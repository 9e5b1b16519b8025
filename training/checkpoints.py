"""Checkpoints of a training run, from which it goes on to the same weights to the bit."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

HELD_OUT_NAME = "held_out.json"  # in a checkpoint, which images its run has held out
SETTINGS_NAME = "settings.json"  # in a checkpoint, the flags that its weights depend on
FROZEN_NAME = "frozen"  # among them, the `frozen_digest`
OF_NOISE = ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"]
OF_NOISE += ["rescale_betas_zero_snr"]


def save_checkpoint(
    accelerator: Accelerator, args: argparse.Namespace, step: int, settings: dict[str, Any] | None = None
) -> None:
    """Saves `checkpoint-STEP`: written under another name and renamed, so a killed run leaves no half checkpoint.

    `settings` are kept in it for `check_settings`.
    """
    folder = Path(args.output_dir, f"checkpoint-{step}")
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if digest := getattr(args, "held_out_digest", None):
            (unfinished / HELD_OUT_NAME).write_text(json.dumps({"sha256": digest}) + "\n")
        if settings:
            (unfinished / SETTINGS_NAME).write_text(json.dumps(settings, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        earlier = [path for path in list_checkpoints(args.output_dir) if step_of(path) <= step]  # not another run's
        for old in earlier[: -max(1, args.checkpoints_total_limit)]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def kept_beside(args: argparse.Namespace, name: str) -> Path | None:
    """What a run that is gone on with has kept beside its checkpoints, by its name, or None.

    The checkpoint may have been copied elsewhere alone: then it is where the run was.
    """
    checkpoint = checkpoint_to_resume(args)
    if checkpoint is None:
        return None
    found = (folder / name for folder in (checkpoint.parent, Path(args.output_dir)))
    return next(filter(Path.is_file, found), None)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoint_to_resume(args: argparse.Namespace) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` asks for; None where it is not given, or there is none yet.

    What else a run leaves in its folder is of use to the next one only where a checkpoint is.

    Raises:
        FileNotFoundError: a folder is asked for that is not there.
    """
    if not args.resume_from_checkpoint:
        return None
    if args.resume_from_checkpoint == "latest":
        return next(reversed(list_checkpoints(args.output_dir)), None)
    folder = Path(args.resume_from_checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(f"--resume_from_checkpoint: no folder at {folder}. Give one, or 'latest'.")
    return folder


def resume(accelerator: Accelerator, args: argparse.Namespace, settings: dict[str, Any] | None = None) -> int:
    """Loads the checkpoint asked for and returns its step; 0 where there is none yet.

    `settings` must be those that it was saved with.
    """
    folder = checkpoint_to_resume(args)
    if not args.resume_from_checkpoint:
        if earlier := list_checkpoints(args.output_dir):
            accelerator.print(
                f"{args.output_dir} holds checkpoints of an earlier training, {earlier[-1].name} last, which a later "
                "--resume_from_checkpoint latest may take for this one's. Remove them, or give another --output_dir."
            )
        return 0
    if folder is None:
        accelerator.print(f"No checkpoint in {args.output_dir} yet: starting anew.")
        return 0
    named = re.fullmatch(r"checkpoint-(\d+)", folder.resolve().name)
    if named is None:
        raise ValueError(
            f"--resume_from_checkpoint: {folder} is not named checkpoint-STEP, and no file in it tells the step. Give "
            "it its name again."
        )
    averaged = any(folder.glob("custom_checkpoint_*.pkl"))  # the moving average is all that is registered
    if averaged != bool(args.use_ema):
        raise ValueError(
            f"--use_ema: {folder} was saved {'with' if averaged else 'without'} a moving average of the weights. "
            f"{'Add' if averaged else 'Leave out'} --use_ema, or start anew in another --output_dir."
        )
    check_held_out(folder, getattr(args, "held_out_digest", None))
    check_settings(folder, settings or {})
    try:
        accelerator.load_state(str(folder))
    except Exception as error:  # each file has a format, and errors, of its own
        others = [one.name for one in list_checkpoints(folder.parent) if one.resolve() != folder.resolve()]
        advice = f"Give another one ({', '.join(others)})" if others else "Start anew"
        raise RuntimeError(
            f"--resume_from_checkpoint: {folder} cannot be loaded: it is damaged, or of another model or --preset "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}). {advice}."
        ) from error
    step = int(named[1])
    accelerator.print(f"Resuming from {folder}, step {step}.")
    return step


def check_held_out(checkpoint: Path, digest: str | None) -> None:
    """Thresholds hold for images that no step has seen, so a run that goes on must hold out those that it began with.

    Args:
        checkpoint: what it goes on from. One of an earlier version does not tell.
        digest: of the images that are held out now, `held_out_digest` of `diffad.training.data`.

    Raises:
        ValueError: they are others.
    """
    kept = checkpoint / HELD_OUT_NAME
    if digest is not None and kept.is_file() and json.loads(kept.read_text())["sha256"] != digest:
        raise ValueError(
            f"--resume_from_checkpoint: {checkpoint} has been trained with other images held out, and may know those "
            "that now set the thresholds. Give the data, --category, --seed, --calibration_fraction, --part_pattern "
            "and --choose that it began with, or start anew in another --output_dir."
        )


def check_settings(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Half of a run with one loss or network, and half with another, is no run of either.

    Args:
        checkpoint: what the run goes on from. One of an earlier version does not tell.
        settings: by the names of their flags, what the weights depend on.

    Raises:
        ValueError: one is another.
    """
    kept = checkpoint / SETTINGS_NAME
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    given = json.loads(json.dumps(settings))
    for name, value in given.items():
        if known.get(name, value) != value:
            if name == FROZEN_NAME:
                raise ValueError(
                    "--pretrained_model_name_or_path, or another flag, gives another autoencoder, feature extractor "
                    f"or noise schedule than {checkpoint} was trained with. Give what it began with, or start anew in "
                    "another --output_dir."
                )
            now, before = ("not given" if one is None else shown(one) for one in (value, known[name]))
            raise ValueError(
                f"--{name} is {now}, but {checkpoint} was trained with {before}. Give that, or start anew in another "
                "--output_dir."
            )


def frozen_digest(scheduler: Any, *networks: torch.nn.Module) -> str:
    """SHA-256, in hex, of what a run has and a checkpoint has not: networks that are not trained, and the noise.

    It is taken of what was loaded, before anything is fitted, whose last digits another machine gives otherwise.
    """
    noise = {name: scheduler.config.get(name) for name in OF_NOISE}
    digest = hashlib.sha256(json.dumps(noise, default=str).encode())
    for network in networks:
        for name, value in sorted(network.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def shown(value: Any) -> str:
    """A flag's value as a command line has it."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
