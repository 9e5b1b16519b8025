"""What an exported file says of itself: JSON under one key of ONNX's metadata or OpenVINO's runtime information."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from diffad.calibration.conformal import false_alarm_bound, thresholds_at
from diffad.warn_once import warn_once

KEY = "diffad"
FORMAT = 2  # of the graph's inputs, outputs and metadata; a file of another is refused
OUTPUTS = ("anomaly_map", "anomaly_score", "anomaly_mask", "is_anomalous", "p_value")  # without thresholds, the first 2


class Metadata(NamedTuple):
    """What a graph was made of, and what of its calibration is asked for outside: `ScoreCalibration`'s names.

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
        normal_scores: of each category, held-out good images' scores, ascending.
        normal_maxima: the maxima of their maps, likewise; empty where the calibration kept none.
        input_type: "float32", or "uint8" for pixels from 0 to 255.
        smallest_area: of a region that counts, as a share of the image's area. Where it is not 0, the graph gives map
            and score as they are, and `Runtime` takes off what is smaller, and heightens the contrast.
        contrast: of maps, as of the pipelines.
        calibrated_in: in which precision the statistics were taken, "float32" or another; None where nobody knows.
        leave_one_out: whether the good images were each left out in turn, so that the false-alarm rate is not exact;
            None in files that do not say it.
        reconstruction: whether the graph's last output is `reconstruction`, (N, R, R, 3) in [0, 1], of the maps' size.
        score_fraction: of the map's pixels, whose mean is the score; 0 for the maximum.
        quantization: of int8, what became of the good `images` that set its thresholds: the `median_map_error` (the
            norm of the difference by that of the map in float32), and the shares that raise an alarm, `alarms_before`,
            in float32, and `alarms`. None otherwise.
        region: of interest, `{"size": [h, w], "counts": [off, on, off, ...]}` along the rows; None without one.
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
    normal_scores: list[list[float]]
    normal_maxima: list[list[float]]
    input_type: str
    smallest_area: float
    score_fraction: float
    region: dict[str, list[int]] | None
    quantization: dict[str, float] | None
    contrast: float = 0.0
    reconstruction: bool = False
    calibrated_in: str | None = None
    leave_one_out: bool | None = None

    def good_scores(self, category: int) -> list[float]:
        """Held-out good images' scores."""
        return self.normal_scores[category]

    def num_good_images(self, category: int) -> int:
        """How many good images one category's thresholds come from."""
        return len(self.normal_scores[category])

    def stated_false_alarm_rate(self, category: int) -> float:
        """The rate that holds on average over sets of good images; n vouch for no less than 1 / (n + 1)."""
        return max(self.false_alarm_rate or 0.0, 1.0 / (self.num_good_images(category) + 1))

    def false_alarm_bound(self, category: int, confidence: float = 0.95) -> float:
        """The false-alarm rate that one category's threshold keeps with a given confidence, see `conformal`."""
        return false_alarm_bound(self.num_good_images(category), self.false_alarm_rate or 0.0, confidence)

    def thresholds_at(self, category: int, false_alarm_rate: float) -> tuple[float, float]:
        """The thresholds of scores and of pixels that another false-alarm rate would have set.

        Raises:
            ValueError: the rate is not in (0, 1).
        """
        maxima = self.normal_maxima[category] if self.normal_maxima else None
        return thresholds_at(self.normal_scores[category], maxima, self.pixel_threshold[category], false_alarm_rate)

    def at_rate(self, false_alarm_rate: float) -> Metadata:
        """With the thresholds of another false-alarm rate.

        Raises:
            ValueError: there are none, or the rate is not in (0, 1).
        """
        if self.false_alarm_rate is None:
            raise ValueError("`false_alarm_rate` takes a calibrated model, and this graph was exported without.")
        pairs = [
            self.thresholds_at(i, false_alarm_rate) if self.normal_scores[i] else (float("inf"), float("inf"))
            for i in range(len(self.image_threshold))
        ]
        of_images, of_pixels = ([*column] for column in zip(*pairs, strict=True))
        return self._replace(false_alarm_rate=false_alarm_rate, image_threshold=of_images, pixel_threshold=of_pixels)

    def dumps(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def loads(cls, text: str | None, path: Path, version: str) -> Metadata:
        """What a file says; `version` is that of this diffad.

        Raises:
            ValueError: the file is no graph of diffad's, one of another format, or what it says is damaged.
        """
        damaged = f"{path} is damaged, as nobody can read what it says of itself: export the model again."
        if not text:
            raise ValueError(f"{path} is no graph of diffad's: make one with `diffad export MODEL {path}`.")
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(damaged) from error
        if not isinstance(values, dict):
            raise ValueError(damaged)
        if values.get("format") != FORMAT:
            raise ValueError(
                f"{path} was exported by diffad {values.get('version')} in format {values.get('format')}, and this is "
                f"diffad {version}, which reads format {FORMAT}. Export the model again."
            )
        if missing := set(cls._fields) - cls._field_defaults.keys() - values.keys():
            raise ValueError(f"{damaged} ({', '.join(sorted(missing))} missing)")
        if values["version"] != version:
            warn_once(f"{path} was exported by diffad {values['version']}, and this is {version}: the format is one.")
        return cls(**{name: values[name] for name in cls._fields if name in values or name not in cls._field_defaults})
