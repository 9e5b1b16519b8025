"""The model that a command is given: a saved pipeline, or an exported file."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any


def load_pipeline(model: str | os.PathLike, device: str | None = None, dtype: str = "float32") -> Any:
    """A saved pipeline of either method, on its device, without a progress bar of its own."""
    import torch

    from diffad.cores import limit_threads
    from diffad.pipelines import loading
    from diffad.pipelines.saving import finish_saving
    from diffad.precision import warn_of_emulation

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"`dtype` must be float32, bfloat16 or float16, but is {dtype!r}.")
    if device is not None and not is_device(device):
        raise ValueError(f"`device` must be cpu, cuda, cuda:1 or another of torch's, but is {device!r}.")
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`device` is {device}, but torch finds no GPU here. Leave it out to run on what there is.")
    folder = Path(model)
    if not os.fspath(model):
        raise ValueError("`model` is empty. Is a variable of the shell not set?")
    if is_exported(model):
        raise ValueError(f"`model` must be a saved pipeline here, but {model} is an exported file.")
    if folder.is_dir():
        finish_saving(folder)
    is_local = folder.exists() or os.fspath(model).count("/") != 1 or folder.parent.is_dir()
    if is_local and not folder.exists():
        others = [one.name for one in folder.parent.iterdir()] if folder.parent.is_dir() else []
        alike = difflib.get_close_matches(folder.name, others, n=1)
        meant = f" Did you mean {folder.parent / alike[0]}?" if alike else ""
        raise FileNotFoundError(
            f"{model} holds no pipeline: there is no such folder.{meant} Give the folder that training or `diffad "
            "demo` has saved one in, or its id on the Hub, org/name."
        )
    if is_local and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{model} holds no pipeline (no model_index.json there). Give the folder that training or `diffad demo` "
            "has saved one in, or its id on the Hub, org/name."
        )
    limit_threads()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "bfloat16":
        warn_of_emulation(torch.device(device).type, "Give --dtype float32.")
    try:
        pipeline = loading.load_pipeline(model, dtype=getattr(torch, dtype))
    except OSError as error:
        if not is_local or isinstance(error, PermissionError):
            raise
        raise OSError(f"{model} is incomplete or damaged: copy it again, or train it anew. ({error})") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def is_device(name: str) -> bool:
    """Whether torch knows a device of this name, be it there or not."""
    import torch

    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


def is_exported(model: str | os.PathLike) -> bool:
    """Whether a model is one file, for `diffad.deployment.Runtime`."""
    return Path(model).suffix.lower() in (".onnx", ".xml")


def load_model(model: str, device: str | None = None, dtype: str | None = None) -> Any:
    """A saved pipeline, or an exported one, for which torch need not be there.

    Of no `dtype`, a pipeline is in float32, and an exported file in its calibration's precision.
    """
    if is_exported(model):
        from diffad.deployment import Runtime

        return Runtime(model, device or "cpu", dtype)
    return load_pipeline(model, device, dtype or "float32")
