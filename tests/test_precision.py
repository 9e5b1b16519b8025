"""`--mixed_precision auto` takes bfloat16 only where it is fast, and what is slow says so."""

from __future__ import annotations

import platform
import sys
import warnings
from pathlib import Path

import pytest
import torch

from diffad.precision import fastest_device, multiplies_bfloat16, resolve_precision, warn_of_emulation

CPU_FLAGS = Path("/proc/cpuinfo")


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # as `accelerate launch --cpu` does


@pytest.fixture
def without_bfloat16(monkeypatch, on_the_cpu):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


def test_a_launch_on_the_cpu_leaves_a_gpu_alone(on_the_cpu):
    assert fastest_device() == "cpu"


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="reads Linux's flags of an x86")
def test_auto_is_what_the_kernel_says_of_this_cpu(on_the_cpu):
    flags = next(line for line in CPU_FLAGS.read_text().splitlines() if line.startswith("flags")).split()
    assert multiplies_bfloat16("cpu") == ("avx512_bf16" in flags)
    assert resolve_precision("auto") == ("bf16" if "avx512_bf16" in flags else "no")


def test_auto_is_float32_where_bfloat16_is_emulated(without_bfloat16):
    assert resolve_precision("auto") == "no"


def test_bfloat16_that_is_emulated_stays_what_was_asked_for_with_a_warning(without_bfloat16):
    with pytest.warns(UserWarning, match=r"no bfloat16 instructions.*--mixed_precision auto"):
        assert resolve_precision("bf16") == "bf16"
    with pytest.warns(UserWarning, match="Give --dtype float32"):
        warn_of_emulation("cpu", "Give --dtype float32.")


@pytest.mark.parametrize("name", [None, "no", "fp16"])
def test_other_precisions_pass_without_a_word(without_bfloat16, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_precision(name) == name
        warn_of_emulation("cuda", "")
