"""Fitting a calibration to good images: one pass over them, in constant memory, over any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object

from diffad.calibration.residual_gaussian import residual_gaussian, residual_grid, residual_size
from diffad.calibration.score_calibration import ScoreCalibration
from diffad.moments import PRIOR_IMAGES, FeatureMoments, MomentSums
from diffad.scoring import Measurement


class ScoreFunctions(NamedTuple):
    """How a method comes from measurements to scores: three functions over tensors.

    score_maps: `(measurement, category, calibration, num_seen)` to smoothed maps (N, S, H, W), those of the residual's
        distances last; `num_seen` is `ScoreCalibration.log_distances`'.
    join_maps: `(maps, category, calibration)` to anomaly maps (N, H, W), normalised by the calibration.
    image_scores: anomaly maps to scores (N,). Twice the map gives twice the score.
    """

    score_maps: Callable[[Measurement, torch.Tensor, ScoreCalibration | None, int], torch.Tensor]
    join_maps: Callable[[torch.Tensor, torch.Tensor, ScoreCalibration | None], torch.Tensor]
    image_scores: Callable[[torch.Tensor], torch.Tensor]


class CalibrationFit:
    """What one category's good images say, measurement by measurement.

    First `add_statistics` takes the measurements that mean, covariance and deviations come from, then `add_scores`
    those that thresholds come from. Methods that share their networks' work can learn from a measurement side by side.

    Args:
        functions: how measurements become maps and scores.
        category: index of the images' category.
        num_scores: images of `add_scores`, of all processes.
        false_alarm_rate: of the thresholds, in (0, 1).
        previous: the pipeline's calibration so far, whose other categories are kept.
        num_categories: K.
        position_prior_images: what the average deviation counts for in the map of positions, see
            `MomentSums.standard_deviation`.
        accelerator: adds up what its processes have seen, each its own images; a process without any adds a measurement
            of no images. Then every process ends with the same calibration.
        record: what is saved with it, `precision` and `settings` of [`ScoreCalibration`].
    """

    def __init__(
        self,
        functions: ScoreFunctions,
        category: int,
        num_scores: int,
        false_alarm_rate: float,
        previous: ScoreCalibration | None = None,
        num_categories: int = 1,
        position_prior_images: float = PRIOR_IMAGES,
        accelerator: Accelerator | None = None,
        **record: Any,
    ):
        self.functions, self.category, self.num_scores = functions, category, num_scores
        self.false_alarm_rate, self.num_categories = false_alarm_rate, num_categories
        self.previous = previous if num_categories > 1 else None
        self.position_prior_images, self.accelerator, self.record = position_prior_images, accelerator, record
        self.residual_moments: FeatureMoments | None = None  # at each cell
        self.residual_sums = MomentSums()  # at each position
        self.map_moments = MomentSums()
        self.pixel_moments = MomentSums()  # of the joined maps of held-out images, over all their pixels
        self.calibration: ScoreCalibration | None = None
        self.measured: IO[bytes] | None = None  # residuals and maps, which wait for the covariance of all residuals
        self.has_statistics = False
        self.scores: list[float] = []
        self.maxima: list[float] = []

    # -- 1. statistics -------------------------------------------------------------------------------------------

    def add_statistics(self, measurement: Measurement) -> None:
        """Learns mean and covariance of the residual; the maps wait for it, in a temporary file."""
        if self.calibration is None:
            self.calibration = self._new_calibration(measurement)
        if measurement.residual is None:
            self._add_maps(measurement)
            return
        calibration = self.calibration
        _, *size = calibration.config.residual_shape
        residual = F.adaptive_avg_pool2d(measurement.residual.mean(dim=1), size)  # (N, C, h, w)
        if self.residual_moments is None:
            num_cells, num_channels = math.prod(calibration.grid), residual.shape[1]
            self.residual_moments = FeatureMoments(num_cells, num_channels, residual.device)
            self.measured = TemporaryFile()  # noqa: SIM115 (closed by `set_statistics`)
        self.residual_sums.update(residual)
        self.residual_moments.update(F.adaptive_avg_pool2d(residual, calibration.grid).flatten(2))  # (N, C, P)
        # half precision, as far as it goes, makes up for a cell's several positions
        kept = residual.clamp(-65504.0, 65504.0).half() if calibration.num_distances == 2 else residual
        for values in (kept[:, None], measurement.maps):
            np.save(self.measured, values.cpu().numpy())

    def set_statistics(self) -> ScoreCalibration:
        """The calibration without thresholds, all that maps need."""
        calibration = self.calibration
        if self.residual_moments is not None:
            for sums in (self.residual_sums, self.residual_moments):
                sums.reduce(self.accelerator)
            mean = self.residual_sums.mean().flatten(1).mT  # (h * w, C)
            gaussian = residual_gaussian(self.residual_moments, mean, calibration.grid)
            calibration.set_residual_gaussian(self.category, *gaussian)
            self._add_waiting_maps(num_seen=self.residual_moments.count)
            self.residual_moments = None  # larger than all else here
        self.map_moments.reduce(self.accelerator)
        map_std = self.map_moments.standard_deviation()  # (S, H, W)
        if calibration.num_distances == 2:  # the positions' distances are the last map
            map_std[-1] = self.map_moments.standard_deviation(self.position_prior_images)[-1]
        calibration.map_mean[self.category] = self.map_moments.mean()
        calibration.map_std[self.category] = map_std
        self.has_statistics = True
        return calibration

    def _add_waiting_maps(self, num_seen: int) -> None:
        """The maps of what waits in the file; each image is measured by the covariance of the others."""
        end = self.measured.tell()
        self.measured.seek(0)
        while self.measured.tell() < end:
            residual, maps = (
                torch.from_numpy(np.load(self.measured)).float().to(self.calibration.map_mean.device) for _ in range(2)
            )
            self._add_maps(Measurement(maps, residual), num_seen)
        self.measured.close()

    def _add_maps(self, measurement: Measurement, num_seen: int = 0) -> None:
        indices = self._indices(measurement)
        self.map_moments.update(self.functions.score_maps(measurement, indices, self.calibration, num_seen))

    # -- 2. thresholds -------------------------------------------------------------------------------------------

    def add_scores(self, measurement: Measurement) -> None:
        """Learns from images that no statistic has seen what new good images score."""
        if not self.has_statistics:
            self.set_statistics()
        indices = self._indices(measurement)
        maps = self.functions.score_maps(measurement, indices, self.calibration, 0)
        anomaly_map = self.functions.join_maps(maps, indices, self.calibration)  # (N, H, W)
        self.pixel_moments.update(anomaly_map.flatten())
        self.scores += self.functions.image_scores(anomaly_map).tolist() if len(anomaly_map) else []
        self.maxima += anomaly_map.flatten(1).amax(dim=1).tolist() if len(anomaly_map) else []

    def finish(self) -> ScoreCalibration:
        """The calibration with thresholds, and maps of deviation 1."""
        scores, maxima = self.scores, self.maxima
        self.pixel_moments.reduce(self.accelerator)
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            scores, maxima = gather_object(scores), gather_object(maxima)
        # A joined map is a mean of maps, each of deviation 1 at every position, and so of a smaller one. Scores grow
        # with the maps, the same for good images and bad: thresholds stay as valid as they are.
        scale = max(float(self.pixel_moments.variance()) ** 0.5, 1e-6)
        self.calibration.map_std[self.category] *= scale
        self.calibration.set_thresholds(
            self.category, [score / scale for score in scores], [maximum / scale for maximum in maxima]
        )
        return self.calibration

    # -- shapes --------------------------------------------------------------------------------------------------

    def _indices(self, measurement: Measurement) -> torch.Tensor:
        return torch.full((len(measurement.maps),), self.category, device=measurement.maps.device)

    def _new_calibration(self, measurement: Measurement) -> ScoreCalibration:
        """An empty calibration of the measurement's shapes, with the other categories' statistics kept."""
        residual_shape = grid = None
        num_maps = measurement.maps.shape[1]
        if measurement.residual is not None:
            num_channels, *size = measurement.residual.shape[2:]
            grid = residual_grid(tuple(size), num_channels, self.num_categories)
            residual_shape = (num_channels, *residual_size(tuple(size), grid, num_channels))
            num_maps += 1 if grid == residual_shape[1:] else 2  # the residual's distances are maps, too
        previous = self.previous
        if previous is not None:
            self._check_previous(previous, num_maps, residual_shape)
        calibration = ScoreCalibration(
            num_categories=self.num_categories,
            map_shape=(num_maps, *measurement.maps.shape[-2:]),
            residual_shape=residual_shape,
            residual_places=grid,
            num_scores=max(self.num_scores, 0 if previous is None else previous.config.num_scores),
            false_alarm_rate=self.false_alarm_rate,
            **self.record,
        ).to(measurement.maps.device)
        if previous is not None:
            for name, values in previous.named_buffers():
                getattr(calibration, name)[..., : values.shape[-1]] = values
        return calibration

    def _check_previous(
        self, previous: ScoreCalibration, num_maps: int, residual_shape: tuple[int, int, int] | None
    ) -> None:
        config = previous.config
        found = (num_maps, residual_shape and list(residual_shape))
        if found != (config.map_shape[0], config.residual_shape and list(config.residual_shape)):
            raise ValueError(
                "`calibration` holds other categories' statistics of other scores than this pipeline's settings give, "
                "or an earlier version's. Load the pipeline with `calibration=None` and calibrate every category."
            )
        others = previous.image_threshold.isfinite()
        others[self.category] = False
        if others.any() and config.false_alarm_rate != self.false_alarm_rate:
            raise ValueError(
                f"`false_alarm_rate` is {self.false_alarm_rate:g}, but the other categories' thresholds are for "
                f"{config.false_alarm_rate:g}. Pass that, or load the pipeline with `calibration=None` and calibrate "
                "every category."
            )
