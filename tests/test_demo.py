"""What the demo draws and how it resumes; the run itself takes minutes and is no test."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import textures, tiny_pipeline, write_mvtec
from PIL import Image

from diffad import demo
from diffad.data import load_anomaly_dataset
from diffad.evaluation.detectors import evaluate_category

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_missing_packages_are_named_before_anything_is_written(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "elpv_dataset" else find_spec(n, *a))
    with pytest.raises(ImportError, match=r'elpv_dataset.*pip install "diffad\[demo\]"'):
        demo.run_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_an_unfinished_demo_resumes_only_with_the_same_arguments(tmp_path):
    arguments = ["--seed", "0"]
    assert demo._resume_flags(tmp_path / "demo", arguments) == ["--resume_from_checkpoint", "latest"]
    checkpoint = tmp_path / "demo" / "checkpoint-250"
    checkpoint.mkdir()
    demo._resume_flags(tmp_path / "demo", arguments)
    assert checkpoint.is_dir()  # interrupted: it goes on from here
    demo._resume_flags(tmp_path / "demo", ["--seed", "1"])
    assert not checkpoint.exists()  # of another run
    assert json.loads((tmp_path / "demo" / "unfinished.json").read_text()) == ["--seed", "1"]


def test_checkpoints_of_another_training_stay(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    with pytest.raises(ValueError, match=r"`output`: .* holds checkpoints of another training, checkpoint-500 last"):
        demo._resume_flags(tmp_path, ["--seed", "0"])
    assert (tmp_path / "checkpoint-500").is_dir()


def test_the_pictures_show_both_kinds_of_errors(tmp_path: Path):
    data = write_mvtec(tmp_path / "data", good=7, bad=8)
    test = load_anomaly_dataset(data, split="test")
    pipeline = tiny_pipeline().calibrate(textures(12), false_alarm_rate=0.3)
    accelerator = Accelerator()
    _, records, _ = evaluate_category(pipeline, test, "tile", accelerator, resolution=32)

    demo.draw_cells(pipeline, test, records, tmp_path / "cells.png")
    sheet = np.asarray(Image.open(tmp_path / "cells.png"))
    assert sheet.shape[0] == 8 * 164  # four groups, each of images and maps
    assert sheet.shape[1] > 6 * 164

    demo.draw_scores(records, float(pipeline.calibration.image_threshold[0]), tmp_path / "scores.png")
    figure = np.asarray(Image.open(tmp_path / "scores.png").convert("RGB")).astype(int)
    for colour in ((0x31, 0x68, 0x8E), (0xD1, 0x49, 0x5B)):  # the curve, and the defective images' bars (paler)
        near = np.abs(figure - np.array(colour)).sum(axis=2)
        assert (near < 120).sum() > 50


@pytest.mark.skipif(importlib.util.find_spec("elpv_dataset") is None, reason="needs diffad[demo]'s data")
def test_the_demos_cells_are_where_it_looks_for_them():
    train = load_anomaly_dataset("elpv/mono", split="train")
    test = load_anomaly_dataset("elpv", split="test", category=demo.CATEGORY)
    labels = list(test["label"])
    assert len(train) == 411
    assert (labels.count(0), labels.count(1)) == (177, 313)  # what the report's text says
    assert not set(train["path"]) & set(test["path"])
