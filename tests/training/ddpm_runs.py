"""Short trainings of AnomalyDenoise: what several test files start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import BACKBONE, texture, tiny_pipeline, write_folder
from diffusers import DiffusionPipeline

from diffad import AnomalyDenoisePipeline
from diffad.training import train_ddpm


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A pipeline of a few thousand parameters to start from."""
    tiny_pipeline().save_pretrained(folder := tmp_path_factory.mktemp("tiny"))
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Fifteen good images: 13 to train on, which are three batches of four, and 2 held out."""
    return write_folder(tmp_path_factory.mktemp("data") / "part", 15)


def flags(data: Path, output: Path, *more: object, start: Path | None = None, steps: int = 2) -> list[str]:
    arguments = ["--train_data_dir", data, "--output_dir", output, "--max_train_steps", steps]
    arguments += ["--train_batch_size", 4, "--lr_warmup_steps", 1, "--false_alarm_rate", 0.4]
    if start is None:  # a preset, made as small as it goes
        arguments += ["--preset", "cpu-64", "--resolution", 16, "--backbone", BACKBONE, "--backbone_weights", "random"]
        arguments += ["--feature_strides", 2, 4]
    else:
        arguments += ["--pretrained_model_name_or_path", start]
    return [str(argument) for argument in (*arguments, *more)]


def train(*args, **kwargs) -> None:
    train_ddpm.main(flags(*args, **kwargs))


def load(output: Path) -> AnomalyDenoisePipeline:
    """A finished run's pipeline, checked to be calibrated and to work."""
    pipeline = DiffusionPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    category = pipeline.categories[0] if len(pipeline.categories) > 1 else None
    result = pipeline(texture(99), category=category)
    assert np.isfinite(result.anomaly_map).all()
    assert 0.0 < result.p_value[0] <= 1.0
    return pipeline
