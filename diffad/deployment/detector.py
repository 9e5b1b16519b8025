"""A pipeline behind a service: images as they are sent, to what was found in each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffad.calibration.drift import DriftTest
from diffad.deployment.batching import Batcher
from diffad.image_sizes import as_size
from diffad.prediction.detection_call import detection_call
from diffad.reading.grey_depth import TooManyPixelsError, check_known_range
from diffad.reading.image_arrays import image_to_rgb
from diffad.reading.image_files import image_file_header, one_large_at_a_time, read_image
from diffad.regions import Region, can_list_regions, find_regions, without_small_regions
from diffad.resizing import fit_map

if TYPE_CHECKING:
    from diffad.pipelines.explaining import Explanation

SHOWN_SIDE = 1024  # of a picture on the page, in pixels, at most


class TooLargeError(ValueError):
    """An image of more pixels than a service takes."""


class Sent(NamedTuple):
    """An image that could be read.

    size: (H, W) of the file.
    shown: (h, w, 3) uint8, reduced for the screen; None where nobody looks.
    network_input: (R, R', 3) in [0, 1]; or the file, of whose image the networks see tiles, decoded when its turn
        comes; None where it is no longer needed.
    """

    size: tuple[int, int]
    shown: np.ndarray | None
    network_input: np.ndarray | bytes | None


class Finding(NamedTuple):
    """What was found in an image.

    anomaly_map: (R, R) float32, at the networks' size.
    score, p_value, is_anomalous: as of `AnomalyOutput`; the last two are None without a calibration.
    reconstruction: (R, R, 3) in [0, 1], or None.
    """

    anomaly_map: np.ndarray
    score: float
    p_value: float | None
    is_anomalous: bool | None
    reconstruction: np.ndarray | None


class Detector:
    """Runs a pipeline over images from any number of threads, in batches, and tests for drift on the way.

    Equal images have equal results, whatever they are batched with: noise is the model's.

    Args:
        pipeline: an anomaly pipeline, or a `Runtime`.
        category: of a unified model.
        batch_size: images in one pass, at most.
        max_waiting: images that wait or are run, at most.
        max_pixels: of one image.
        report: called with each batch's size.

    Attributes:
        drift: the test, over all images in the order of their batches; None without a calibration.
    """

    def __init__(
        self,
        pipeline: Any,
        category: str | None = None,
        batch_size: int = 16,
        max_waiting: int = 256,
        max_pixels: int = 100_000_000,
        report: Callable[[int], None] = lambda size: None,
    ):
        self.pipeline, self.category, self.max_pixels = pipeline, category, max_pixels
        self.index = pipeline.category_index(category)
        self.drift: DriftTest | None = None
        self.evidence = 1.0
        if pipeline.has_thresholds:
            calibration = pipeline.calibration
            if not (scores := calibration.good_scores(self.index)):
                name = pipeline.categories[self.index]
                raise ValueError(
                    f"Category {name!r} is not calibrated. Run `diffad calibrate --category {name}` first."
                )
            self.drift = DriftTest(scores, calibration.false_alarm_rate)
        self.call = detection_call(pipeline, category, batch_size)
        self.running = threading.Lock()  # the networks
        self.decoding = threading.Semaphore(4)  # images in memory as they are decoded
        # tiles fill a batch by themselves; of several large images, those before one that fails would count twice
        self.batcher = Batcher(self._run, self.call.at_once, max_waiting, report)

    def read(self, name: str, content: bytes, for_screen: bool = False) -> Sent:
        """Decodes and resizes a file's bytes.

        Raises:
            UnreadableImageError: it is no image, or one of more than 8 bits whose range the model does not know.
            TooLargeError: it has too many pixels.
        """
        at_most = f"and {self.max_pixels:,} are the most. Reduce it or cut it up."
        try:
            (width, height), mode = image_file_header(name, content)
        except TooManyPixelsError as error:
            raise TooLargeError(f"{name} has too many pixels, {at_most}") from error
        if width * height > self.max_pixels:
            raise TooLargeError(f"{name} has {width} x {height} pixels, {at_most}")
        side, value_range = self.call.side, self.call.value_range
        check_known_range(mode, value_range)
        with self.decoding, one_large_at_a_time(width * height):
            image = read_image(name, content, reduce_large=side is not None)
            network_input: np.ndarray | bytes = content
            if side is not None:
                network_input = self.call.resizing.image(image, as_size(side), value_range).clip(0.0, 1.0)
            shown = None
            if for_screen:
                picture = image_to_rgb(image, value_range)
                picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
                shown = np.asarray(picture)
        return Sent((height, width), shown, network_input)

    def submit(self, sent: Sequence[Sent]) -> list[Future]:
        """The [`Finding`] of each, when it is there.

        Raises:
            BusyError: too many images wait.
        """
        return self.batcher.submit([one.network_input for one in sent])

    def explain(self, sent: Sent) -> Explanation | None:
        """What the peak of an image's map is made of; None where the pipeline cannot tell."""
        if not hasattr(self.pipeline, "explain") or not self.pipeline.has_thresholds or self.pipeline.tile_size:
            return None
        with self.running:
            return self.pipeline.explain(sent.network_input, category=self.category)

    def map_at(self, finding: Finding, sent: Sent, size: tuple[int, int]) -> np.ndarray:
        """A finding's map at a size of the image's, (H, W) float32."""
        return fit_map(finding.anomaly_map, size, sent.size, self.call.resizing)

    @property
    def smallest_area(self) -> float:
        """Of a region that counts, as a share of the image's area."""
        return self.call.smallest_area

    def thresholds_at(self, false_alarm_rate: float) -> tuple[float, float]:
        """As of `ScoreCalibration`, of this category."""
        return self.pipeline.calibration.thresholds_at(self.index, false_alarm_rate)

    def _run(self, network_inputs: list[Any]) -> list[Finding]:
        if self.pipeline.tile_size is None:
            return self._find(network_inputs)
        # one by one: each has as many tiles as it is large, and a map of its own size
        return [finding for content in network_inputs for finding in self._find([read_image("image", content)])]

    def _find(self, images: list[Any]) -> list[Finding]:
        with self.running:
            output = self.call.detect(images)
        pictures = output.reconstruction
        if pictures is not None and not isinstance(pictures, np.ndarray):
            pictures = pictures.permute(0, 2, 3, 1)  # (N, R, R, 3)
        findings = []
        for i in range(len(images)):
            score = float(output.anomaly_score[i])
            if self.drift is not None:
                self.evidence = self.drift.update(score).total
            findings.append(
                Finding(
                    np.array(output.anomaly_map[i]),  # a copy, which does not keep the whole batch in memory
                    score,
                    None if output.p_value is None else float(output.p_value[i]),
                    None if output.is_anomalous is None else bool(output.is_anomalous[i]),
                    None if pictures is None else np.array(pictures[i]),
                )
            )
        return findings


def found_regions(
    anomaly_map: np.ndarray, threshold: float, is_anomalous: bool, smallest_area: float
) -> tuple[np.ndarray, list[Region]]:
    """The mask (H, W) of an image's map of that size, and its regions, as of `AnomalyOutput`; none without SciPy."""
    mask = without_small_regions((anomaly_map > threshold) & is_anomalous, smallest_area)
    return mask, find_regions(anomaly_map, mask) if can_list_regions() else []
