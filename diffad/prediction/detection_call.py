"""How `diffad predict`, `watch` and `serve` call a model: what it takes of an image, and what its results belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from diffad.deployment.runtime import Runtime
from diffad.image_sizes import Side
from diffad.prediction.model_digest import model_digest
from diffad.reading.decoding import decoding_of
from diffad.reading.image_arrays import WITHOUT_TORCH
from diffad.resizing import Resizing

# network inputs, each (R, R', 3) in [0, 1] -> an output of arrays or CPU tensors
Detect: TypeAlias = Callable[[list[Any]], Any]


class DetectionCall(NamedTuple):
    """A model as it is called for one category, batch by batch.

    Attributes:
        detect: from a batch of images (R, R', 3) in [0, 1] to an output with `anomaly_map` (N, h, w) and
            `anomaly_score` (N,) and, unless `threshold` is None, `anomaly_mask`, `p_value` and `is_anomalous`.
        side: of the networks' images, in pixels, or height and width; None hands `detect` the images as they are.
        at_once: images in one batch, at most.
        category: of a unified model.
        value_range: of images of more than 8 bits; None where each has its own.
        threshold: of a map's pixels; None gives no masks and no verdicts.
        smallest_area: of a region that counts, as a share of the image's area.
        resizing: of images and maps.
    """

    detect: Detect
    side: Side | None
    at_once: int
    category: str | None = None
    value_range: float | None = None
    threshold: float | None = None
    smallest_area: float = 0.0
    resizing: Resizing = WITHOUT_TORCH


def detection_call(pipeline: Any, category: str | None, batch_size: int) -> DetectionCall:
    """A pipeline, or a `Runtime`, as it is called for one category with at most `batch_size` images at once."""
    side, at_once = decoding_of(pipeline, batch_size)
    detect, resizing = _detect(pipeline, category, batch_size), _resizing(pipeline, category)
    call = DetectionCall(detect, side, at_once, category, pipeline.value_range, resizing=resizing)
    if not pipeline.has_thresholds:
        return call
    calibration = pipeline.calibration
    threshold = float(calibration.pixel_threshold[pipeline.category_index(category)])
    return call._replace(threshold=threshold, smallest_area=calibration.smallest_area or 0.0)


def _detect(pipeline: Any, category: str | None, batch_size: int) -> Detect:
    if isinstance(pipeline, Runtime):
        index = pipeline.category_index(category)
        return lambda network_inputs: pipeline.run(np.stack(network_inputs), index)

    def detect(network_inputs: list[Any]) -> Any:
        return pipeline(
            network_inputs,
            batch_size=batch_size,
            match_input_resolution=False,
            output_type="pt",
            **({"category": category} if category is not None else {}),
        )

    return detect


def _resizing(pipeline: Any, category: str | None) -> Resizing:
    """As the pipeline resizes images and maps of a category in a call of its own."""
    if isinstance(pipeline, Runtime):
        return WITHOUT_TORCH._replace(region=pipeline.region)
    from diffad.images import WITH_TORCH, as_size

    region, cell = pipeline.region, None
    if pipeline.tile_size is not None:
        from diffad.tiling import cell_size

        cell = cell_size(pipeline.tile_size, as_size(pipeline.input_resolution))
    of_category = None if region is None else region[pipeline.category_index(category)].cpu().numpy()
    return WITH_TORCH._replace(region=of_category, cell=cell)


def detection_settings(pipeline: Any, category: str | None, command: str) -> dict[str, Any]:
    """What results of a pipeline and a command must agree in to stand in one folder."""
    settings: dict[str, Any] = {"category": category, "calibration": None, "command": command}
    settings["value_range"] = pipeline.value_range
    settings["noise"] = noise_of(pipeline)
    settings["precision"] = pipeline.precision
    if not pipeline.has_thresholds:  # which would tell one model from another
        return settings | {"model": model_digest(pipeline)}
    index, calibration = pipeline.category_index(category), pipeline.calibration
    settings["calibration"] = [float(calibration.image_threshold[index]), float(calibration.pixel_threshold[index])]
    settings["smallest_area"] = calibration.smallest_area or None
    return settings


def noise_of(pipeline: Any) -> str | None:
    """Whose noise images get, for records; None where none is drawn, and of a `Runtime`, whose graph has it."""
    return None if getattr(pipeline, "scores_features", True) else "the model's"
