"""On a GPU: the numbers of the CPU, in half precision close to them, and training. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import generator, texture, textures, tiny_pipeline, write_folder
from tiny_diad import tiny_diad

from diffad import AnomalyDenoisePipeline, DiADPipeline
from diffad.pipelines.pipeline_gradient_denoising import GradientDenoisingPipeline
from diffad.training import fit, train_ddpm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HALVES = [torch.bfloat16, torch.float16]
IMAGES = [*textures(4, first_seed=100), *(texture(200 + i, defect=True) for i in range(4))]


def calibrated(method: str) -> AnomalyDenoisePipeline | DiADPipeline:
    if method == "diad":
        return tiny_diad().to("cpu")
    pipeline = tiny_pipeline().to("cpu")
    return pipeline.calibrate(textures(12), false_alarm_rate=0.25, generator=generator())


@pytest.mark.parametrize("method", ["anomaly-denoise", "diad"])
def test_float32_gives_the_numbers_of_the_cpu(method):
    pipeline = calibrated(method)
    expected = pipeline(IMAGES, generator=generator())
    found = pipeline.to("cuda")(IMAGES, generator=generator())
    np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(found.anomaly_score, expected.anomaly_score, rtol=2e-3, atol=2e-3)
    assert (found.is_anomalous == expected.is_anomalous).mean() > 0.8


def test_a_calibration_on_the_gpu_is_that_of_the_cpu():
    expected = calibrated("anomaly-denoise").calibration
    pipeline = tiny_pipeline().to("cuda")
    found = pipeline.calibrate(textures(12), false_alarm_rate=0.25, generator=generator()).calibration
    for name in ("map_mean", "map_std", "normal_scores", "image_threshold", "pixel_threshold"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("method", ["anomaly-denoise", "diad"])
def test_half_precision_ranks_pixels_as_float32_does(method, dtype):
    pipeline = calibrated(method)
    expected = pipeline(IMAGES, generator=generator())
    pipeline.to("cuda", dtype)
    found = pipeline(IMAGES, generator=generator())
    assert found.anomaly_map.dtype == np.float32
    assert np.isfinite(found.anomaly_map).all()
    correlation = np.corrcoef(found.anomaly_map.flatten(), expected.anomaly_map.flatten())[0, 1]
    assert correlation > 0.98


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_can_be_calibrated(dtype):
    pipeline = tiny_pipeline().to("cuda", dtype)
    pipeline.calibrate(textures(12), false_alarm_rate=0.25, generator=generator())
    output = pipeline(IMAGES)
    assert np.isfinite(output.anomaly_map).all()
    assert output.anomaly_score[4:].mean() > output.anomaly_score[:4].mean()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_gradient_denoising(dtype):
    pipeline = tiny_pipeline().to("cuda")
    pipeline.fit_gaussian(textures(20))
    denoising = GradientDenoisingPipeline.from_pipe(pipeline).to("cuda", dtype)
    output = denoising(textures(2), num_iterations=10, generator=generator())
    assert np.isfinite(output.reconstruction).all()
    assert output.reconstruction.min() >= 0.0
    assert output.reconstruction.max() <= 1.0


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training(tmp_path: Path, monkeypatch, fresh_accelerate, precision):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    tiny_pipeline().save_pretrained(tmp_path / "start")
    data = write_folder(tmp_path / "part", 15)
    flags = ["--train_data_dir", data, "--output_dir", tmp_path / "run", "--max_train_steps", 20]
    flags += ["--pretrained_model_name_or_path", tmp_path / "start", "--train_batch_size", 4, "--lr_warmup_steps", 1]
    flags += ["--false_alarm_rate", 0.4, "--mixed_precision", precision, "--use_ema"]
    torch.cuda.reset_peak_memory_stats()
    train_ddpm.main([str(flag) for flag in flags])
    flags += ["--max_train_steps", 30, "--resume_from_checkpoint", "latest"]
    train_ddpm.main([str(flag) for flag in flags])  # as it left off, averages and all
    assert torch.cuda.max_memory_allocated() > 0
    pipeline = AnomalyDenoisePipeline.from_pretrained(tmp_path / "run").to("cuda")
    assert np.isfinite(pipeline(IMAGES).anomaly_map).all()


def test_fit(tmp_path: Path, monkeypatch, fresh_accelerate):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    data = write_folder(tmp_path / "part", 20, size=64)
    flags = ["--train_data_dir", data, "--output_dir", tmp_path / "run", "--backbone", "test_resnet"]
    flags += ["--backbone_weights", "random", "--feature_strides", 2, 4, "--resolution", 64]
    fit.main([str(flag) for flag in flags])
    pipeline = AnomalyDenoisePipeline.from_pretrained(tmp_path / "run")
    expected = pipeline(textures(3, 64)).anomaly_score
    np.testing.assert_allclose(pipeline.to("cuda")(textures(3, 64)).anomaly_score, expected, rtol=5e-3)
