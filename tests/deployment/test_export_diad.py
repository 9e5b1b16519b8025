"""An exported DiAD: every step of the reverse process in one graph."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
from conftest import texture, textures
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from PIL import Image
from tiny_diad import tiny_diad

from diffad import DiADPipeline
from diffad.deployment import Runtime
from diffad.deployment.metadata import OUTPUTS
from diffad.image_sizes import as_size

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
IMAGES = [*textures(3, first_seed=100), *(texture(200 + i, defect=True) for i in range(2))]


def changed(**settings) -> DiADPipeline:
    """The tiny pipeline with other settings, not calibrated."""
    pipeline = DiADPipeline(**{**tiny_diad().components, "calibration": None}, **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_runtime_agrees(pipeline: DiADPipeline, path, category: list[str] | None = None) -> None:
    expected = pipeline(IMAGES, category)
    for count in (len(IMAGES), 1):
        actual = Runtime(path)(IMAGES[:count], category and category[:count])
        for name in (*OUTPUTS, "reconstruction"):
            found, one = getattr(actual, name), getattr(expected, name)[:count]
            assert found.shape == one.shape
            assert np.abs(found.astype(float) - one).max() <= 2e-5 * np.abs(one).max(), name
    assert 0 < expected.is_anomalous.sum() < len(IMAGES)


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_a_graph_gives_what_a_call_gives(tmp_path, suffix):
    if suffix == ".xml":
        pytest.importorskip("openvino")
    pipeline = tiny_diad()
    assert_runtime_agrees(pipeline, pipeline.export(tmp_path / f"diad{suffix}"))


def test_an_exported_model_is_served_with_its_reconstruction(tmp_path):
    pytest.importorskip("fastapi")
    from diffad.deployment.detector import Detector

    pipeline, buffer = tiny_diad(), io.BytesIO()
    Image.fromarray(IMAGES[-1]).save(buffer, "png")
    pictures = []
    for model in (pipeline, Runtime(pipeline.export(tmp_path / "diad.onnx"))):
        detector = Detector(model)
        [future] = detector.submit([detector.read("image", buffer.getvalue())])
        pictures.append(future.result(60).reconstruction)
    assert pictures[0].shape == (*as_size(pipeline.processing_resolution), 3)
    np.testing.assert_allclose(pictures[1], pictures[0], atol=1e-4)


def test_a_graph_has_a_region_of_interest_a_smallest_area_and_a_cameras_pixels(tmp_path):
    pipeline = changed(num_inference_steps=1, processing_resolution=16, pooling_rounds=0)
    region = np.zeros((32, 32), dtype=bool)
    region[4:, 8:] = True
    good, images = ([np.asarray(Image.fromarray(one).resize((16, 16))) for one in of] for of in (textures(12), IMAGES))
    pipeline.calibrate(good, false_alarm_rate=0.2, roi=region, smallest_area=0.02)
    runtime = Runtime(pipeline.export(tmp_path / "diad.onnx", input_type="uint8"))
    expected, actual = pipeline(images), runtime(images)
    for name in (*OUTPUTS, "reconstruction"):
        found, one = getattr(actual, name).astype(float), getattr(expected, name)
        assert np.abs(found - one).max() <= 2e-5 * np.abs(one).max(), name
    assert (actual.anomaly_map[:, :2] == 0.0).all()


def test_a_graph_joins_the_features_own_maps(tmp_path):
    weights = {"reconstruction": 2.0, "gaussian": 1.0, "nearest": 1.0}
    pipeline = changed(
        num_inference_steps=2, processing_resolution=16, pooling_rounds=1, distance="mahalanobis", contrast=0.2,
        position_trust=0.0, weights=weights,
    ).calibrate(textures(12), textures(24, first_seed=50), false_alarm_rate=0.2)  # fmt: skip
    assert_runtime_agrees(pipeline, pipeline.export(tmp_path / "diad.onnx"))


def test_another_scheduler_that_starts_at_the_encoded_image_and_distances_of_several_categories(tmp_path):
    pipeline = changed(
        num_inference_steps=4, strength=0.5, distance="mahalanobis", processing_resolution=16, pooling_rounds=0,
        categories=["a", "b"],
    )  # fmt: skip
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    for category, seed in (("a", 0), ("b", 300)):
        pipeline.calibrate(textures(12, first_seed=seed), false_alarm_rate=0.25, category=category)
    path = pipeline.export(tmp_path / "diad.onnx")
    assert_runtime_agrees(pipeline, path, category=["a", "b", "a", "b", "a"])
    copy.deepcopy(pipeline.scheduler)  # which keeps nothing of the trace
    # both steps use the same convolutions
    dims = [len(one.dims) for one in onnx.load(path).graph.initializer if one.name.startswith("networks.unet.")]
    assert dims.count(4) == sum(weights.ndim == 4 for weights in pipeline.unet.parameters())


def test_what_has_no_graph_is_said(tmp_path):
    path = tmp_path / "diad.onnx"
    drawing = changed()
    drawing.scheduler = DDPMScheduler.from_config(drawing.scheduler.config)
    with pytest.raises(ValueError, match=r"`scheduler`: there is a graph with DDIMScheduler or .* not with this DDPM"):
        drawing.export(path)
    drawing.scheduler = DDIMScheduler(thresholding=True)
    with pytest.raises(ValueError, match="without thresholding"):
        drawing.export(path)
    with pytest.raises(ValueError, match="`precision` int8 takes an AnomalyDenoisePipeline"):
        tiny_diad().export(path, precision="int8", images=textures(20))
    pooled = tiny_diad()
    pooled.calibrate(textures(8), false_alarm_rate=0.25, smallest_area=0.02)
    with pytest.raises(ValueError, match="pooling_rounds=0"):
        pooled.export(path)
    blind = changed()
    blind.register_modules(feature_extractor=None)
    with pytest.raises(ValueError, match="no feature extractor"):
        blind.export(path)
    assert not path.exists()
