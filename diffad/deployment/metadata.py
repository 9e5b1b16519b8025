"""What an exported file says of itself: JSON under one key of ONNX's metadata or OpenVINO's runtime information."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from diffad.warn_once import warn_once

KEY = "diffad"
FORMAT = 1  # of the graph's inputs, outputs and metadata; a file of another is refused
OUTPUTS = ("anomaly_map", "anomaly_score", "anomaly_mask", "is_anomalous", "p_value")  # without thresholds, the first 2


class Metadata(NamedTuple):
    """What a graph was made of.

    Attributes:
        format: `FORMAT` of the version that wrote it.
        version: diffad's.
        model: the pipeline's class and, where it is known, the folder's or repository's name.
        precision: "fp32", "fp16" (weights of the networks in half precision, arithmetic in float32) or "int8".
        input_size: height and width of the images that the graph takes, in pixels.
        map_size: height and width of its maps.
        categories: their names, in the order of their indices; empty for a model of one.
        false_alarm_rate: at which the thresholds were set; None for a graph without thresholds.
        image_threshold, pixel_threshold: of each category; infinite where it is not calibrated.
        value_range: of images of more than 8 bits, or None.
    """

    format: int
    version: str
    model: str
    precision: str
    input_size: list[int]
    map_size: list[int]
    categories: list[str]
    false_alarm_rate: float | None
    image_threshold: list[float]
    pixel_threshold: list[float]
    value_range: float | None

    def dumps(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def loads(cls, text: str | None, path: Path, version: str) -> Metadata:
        """What a file says; `version` is that of this diffad.

        Raises:
            ValueError: the file is no graph of diffad's, or one of another format.
        """
        if not text:
            raise ValueError(f"{path} is no graph of diffad's: make one with `diffad export MODEL {path}`.")
        values = json.loads(text)
        if values.get("format") != FORMAT:
            raise ValueError(
                f"{path} was exported by diffad {values.get('version')} in format {values.get('format')}, and this is "
                f"diffad {version}, which reads format {FORMAT}. Export the model again."
            )
        if values["version"] != version:
            warn_once(f"{path} was exported by diffad {values['version']}, and this is {version}: the format is one.")
        return cls(**{name: values[name] for name in cls._fields})
