"""In which precision networks train and run. bfloat16 pays where a device has it; elsewhere it is emulated, slowly."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env

PRECISIONS = ("auto", "no", "fp16", "bf16")


def training_device() -> str:
    """The device type that training takes here: a GPU, unless `accelerate launch --cpu` forbids it."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def is_bfloat16_fast(device_type: str) -> bool:
    """Whether training in bfloat16 is faster than in float32 on a "cuda", "mps" or "cpu" device.

    On a CPU that takes AVX-512's bfloat16 extension: oneDNN, which multiplies there, also accepts AVX-512 without it
    and ARM's extension, but has no fast way back through a convolution for them. On MPS it was not measured: False.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


def warn_of_emulation(device_type: str, remedy: str) -> None:
    """Warns where bfloat16 was asked for on a CPU that is slow at it; `remedy` says what to ask for instead."""
    if device_type == "cpu" and not is_bfloat16_fast("cpu"):
        warnings.warn(
            f"This CPU is slow at bfloat16: emulated, it takes several times as long as float32. {remedy}",
            stacklevel=2,
        )


def resolve_precision(name: str | None) -> str | None:
    """`--mixed_precision` as accelerate takes it: "auto" becomes "bf16" where that is fast, elsewhere "no"."""
    if name == "auto":
        return "bf16" if is_bfloat16_fast(training_device()) else "no"
    if name == "bf16":
        warn_of_emulation(training_device(), "Give --mixed_precision auto, or no.")
    return name


def checked_precision(accelerator: Accelerator) -> str:
    """The precision that accelerate has taken, for the record.

    Raises:
        ValueError: it is float16 on a CPU, where accelerate would compute in float32 without a word.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 takes a GPU: give auto, bf16 or no.")
    return accelerator.mixed_precision


def running_precision(networks: Iterable[torch.nn.Module | None], device: torch.device) -> str:
    """The precision in which networks run on a device: autocast's, or that of their weights, such as "float32".

    Where they differ, all of them: "bfloat16, float32". None stands for a network that is missing.
    """
    if torch.is_autocast_enabled(device.type):
        return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
    return ", ".join(sorted({str(network.dtype).removeprefix("torch.") for network in networks if network is not None}))
