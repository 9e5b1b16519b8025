"""`--mixed_precision auto` takes bfloat16 only where it is fast, and what is slow says so."""

from __future__ import annotations

import platform
import sys
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_pipeline

from diffad.commands.models import load_pipeline
from diffad.precision import checked_precision, is_bfloat16_fast, resolve_precision, training_device
from diffad.training import evaluate, train_ddpm

CPU_FLAGS = Path("/proc/cpuinfo")


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # as `accelerate launch --cpu` does


@pytest.fixture
def slow(monkeypatch, on_the_cpu):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


@pytest.fixture
def fast(monkeypatch, on_the_cpu):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)


def test_a_launch_on_the_cpu_leaves_a_gpu_alone(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert training_device() == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert training_device() == "cpu"


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="reads Linux's flags of an x86")
def test_auto_is_what_the_kernel_says_of_this_cpu(on_the_cpu):
    flags = next(line for line in CPU_FLAGS.read_text().splitlines() if line.startswith("flags")).split()
    assert resolve_precision("auto") == ("bf16" if "avx512_bf16" in flags else "no")


def test_auto_is_float32_where_bfloat16_is_emulated(slow):
    assert resolve_precision("auto") == "no"
    assert not is_bfloat16_fast("mps")


def test_auto_is_bfloat16_where_that_is_fast(fast):
    assert resolve_precision("auto") == "bf16"


def test_a_gpu_that_emulates_bfloat16_trains_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not is_bfloat16_fast("cuda")


def test_slow_bfloat16_stays_what_was_asked_for_with_a_warning(slow, tmp_path):
    with pytest.warns(UserWarning, match=r"slow at bfloat16.*--mixed_precision auto"):
        assert resolve_precision("bf16") == "bf16"
    tiny_pipeline().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="Give --dtype float32"):
        load_pipeline(str(tmp_path), "cpu", "bfloat16")


@pytest.mark.parametrize("settings", [{"mixed_precision": "fp16"}, {}])
def test_float16_on_a_cpu_is_an_error(on_the_cpu, monkeypatch, fresh_accelerate, settings):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no" if settings else "fp16")  # accelerate's own settings
    with pytest.raises(ValueError, match="--mixed_precision fp16 takes a GPU: give auto, bf16 or no"):
        checked_precision(Accelerator(**settings))


def test_an_evaluation_and_a_training_in_float16_are_refused_on_a_cpu(on_the_cpu, fresh_accelerate, tmp_path):
    more = ["--mixed_precision", "fp16"]
    with pytest.raises(ValueError, match="--mixed_precision fp16 takes a GPU"):
        evaluate.main(["--model", "m", "--data", "d", *more])
    with pytest.raises(ValueError, match="--mixed_precision fp16 takes a GPU"):
        train_ddpm.main(["--train_data_dir", "parts", "--output_dir", str(tmp_path / "run"), *more])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [None, "no", "fp16"])
def test_other_precisions_pass_without_a_word(slow, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_precision(name) == name


def test_fast_bfloat16_passes_without_a_word(fast):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_precision("bf16") == "bf16"
