"""`diffad benchmark --compare`: each runtime in one table."""

from __future__ import annotations

import json

import pytest
from conftest import textures, tiny_extractor
from typer.testing import CliRunner

from diffad import AnomalyDenoisePipeline
from diffad.cli import app
from diffad.evaluation import comparison

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def test_runtimes_stand_side_by_side_and_what_lacks_is_said(tmp_path, monkeypatch):
    # one graph: the others are further exports of the same
    shown = [one for one in comparison.RUNTIMES if one[1] == "model.onnx"]
    monkeypatch.setattr(comparison, "RUNTIMES", shown)
    pipeline = AnomalyDenoisePipeline(None, None, tiny_extractor(image_size=16), weights={"gaussian": 1.0})
    pipeline.calibrate(textures(12), false_alarm_rate=0.25).save_pretrained(tmp_path / "model")
    arguments = ["benchmark", str(tmp_path / "model"), "--compare", "--repeats", "1", "--json"]
    result = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)
    assert result["gflop_per_image"] > 0
    assert result["peak_gflops"] > 1
    assert [*result["runtimes"]] == ["torch", "torch, compiled", *(name for name, *_ in shown)]
    for name in ("torch", "ONNX Runtime"):
        for size in ("1", "16"):
            speed = result["runtimes"][name][size]
            milliseconds = speed["milliseconds_per_image"]
            assert speed["images_per_second"] == pytest.approx(1000.0 / milliseconds)
            expected = 1000.0 * result["gflop_per_image"] / result["peak_gflops"] / milliseconds
            assert speed["share_of_peak"] == pytest.approx(expected)
    assert result["runtimes"]["ONNX Runtime, TensorRT"].startswith("not here: `device` 'tensorrt'")
    text = comparison.comparison_text(result)
    assert "ONNX Runtime, TensorRT    not here" in text
    assert len(text.splitlines()) == len(shown) + 4
