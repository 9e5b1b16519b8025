"""Where bfloat16 pays: elsewhere it is emulated, at several times the cost of float32."""

from __future__ import annotations

import platform
import warnings

import torch
from accelerate.utils import parse_flag_from_env

PRECISIONS = ("auto", "no", "fp16", "bf16")


def fastest_device() -> str:
    """The device type that accelerate trains on here: a GPU, unless `accelerate launch --cpu` forbids it."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def multiplies_bfloat16(device_type: str) -> bool:
    """Whether a "cuda", "mps" or "cpu" device has instructions that multiply bfloat16."""
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # AVX-512 without its bfloat16 extension satisfies oneDNN, which then emulates them, too
    native = platform.machine().lower() not in ("x86_64", "amd64") or torch.cpu._is_avx512_bf16_supported()
    return native and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def warn_of_emulation(device_type: str, remedy: str) -> None:
    """Warns where bfloat16 was asked for on a CPU without it; `remedy` says what to ask for instead."""
    if device_type == "cpu" and not multiplies_bfloat16("cpu"):
        warnings.warn(
            f"This CPU has no bfloat16 instructions: emulated, it takes several times as long as float32. {remedy}",
            stacklevel=2,
        )


def resolve_precision(name: str | None) -> str | None:
    """`--mixed_precision` as accelerate takes it: "auto" becomes "bf16" where that is fast, elsewhere "no"."""
    if name == "auto":
        return "bf16" if multiplies_bfloat16(fastest_device()) else "no"
    if name == "bf16":
        warn_of_emulation(fastest_device(), "Give --mixed_precision auto, or no.")
    return name
