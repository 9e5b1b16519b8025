"""Fitting a calibration to good images, in one pass over them and constant memory."""

from __future__ import annotations

import math
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from diffad.calibration.residual_gaussian import residual_gaussian, residual_grid, residual_size
from diffad.calibration.score_calibration import ScoreCalibration
from diffad.moments import FeatureMoments, MomentSums

if TYPE_CHECKING:
    from diffad.pipelines.base import AnomalyPipeline, Measurement


class CalibrationFit:
    """What one category's good images say, measurement by measurement, in constant memory.

    First `add_statistics` takes the measurements that mean, covariance and deviations come from, then `add_scores`
    those that thresholds come from. Pipelines that share their networks' work can learn from a measurement side by
    side.

    Args:
        pipeline: whose maps and scores these are.
        category: index of the images' category.
        num_scores: images of `add_scores`.
        false_alarm_rate: of the thresholds, in (0, 1).
    """

    def __init__(self, pipeline: AnomalyPipeline, category: int, num_scores: int, false_alarm_rate: float):
        self.pipeline, self.category = pipeline, category
        self.num_scores, self.false_alarm_rate = num_scores, false_alarm_rate
        self.residual_moments: FeatureMoments | None = None  # at each place
        self.residual_sums = MomentSums()  # at each position
        self.map_moments = MomentSums()
        self.calibration: ScoreCalibration | None = None
        self.measured: IO[bytes] | None = None  # residuals and maps, which wait for the covariance of all residuals
        self.scores: list[torch.Tensor] = []
        self.maxima: list[torch.Tensor] = []

    def add_statistics(self, measurement: Measurement) -> None:
        if self.calibration is None:
            self.calibration = self._new_calibration(measurement)
        if measurement.residual is None:
            self._add_maps(measurement)
            return
        calibration = self.calibration
        residual = F.adaptive_avg_pool2d(measurement.residual.mean(dim=1), calibration.config.residual_shape[1:])
        if self.residual_moments is None:
            num_places, num_channels = math.prod(calibration.grid), residual.shape[1]
            self.residual_moments = FeatureMoments(num_places, num_channels, residual.device)
            self.measured = TemporaryFile()  # noqa: SIM115 (closed by `set_statistics`)
        self.residual_sums.update(residual)
        self.residual_moments.update(F.adaptive_avg_pool2d(residual, calibration.grid).flatten(2))
        # half precision, as far as it goes, makes up for a place's several positions
        kept = residual.clamp(-65504.0, 65504.0).half() if calibration.num_distances == 2 else residual
        for values in (kept[:, None], measurement.maps):
            np.save(self.measured, values.cpu().numpy())

    def set_statistics(self) -> ScoreCalibration:
        """The calibration without thresholds, all that maps need."""
        if self.residual_moments is not None:
            num_seen, end = self.residual_moments.count, self.measured.tell()
            mean = self.residual_sums.mean().flatten(1).mT  # (h * w, C)
            gaussian = residual_gaussian(self.residual_moments, mean, self.calibration.grid)
            self.calibration.set_residual_gaussian(self.category, *gaussian)
            self.residual_moments = None  # larger than all else here
            self.measured.seek(0)
            while self.measured.tell() < end:
                residual, maps = (
                    torch.from_numpy(np.load(self.measured)).float().to(self.calibration.map_mean.device)
                    for _ in range(2)
                )
                self._add_maps(Measurement(maps, residual), num_seen)
            self.measured.close()
        self.calibration.map_mean[self.category] = self.map_moments.mean()
        map_std = self.map_moments.standard_deviation()  # (S, H, W)
        if self.calibration.num_distances == 2:  # the positions' distances are the last map
            prior_images = self.pipeline.config.position_prior_images
            map_std[-1] = self.map_moments.standard_deviation(prior_images)[-1]
        self.calibration.map_std[self.category] = map_std
        return self.calibration

    def _add_maps(self, measurement: Measurement, num_seen: int = 0) -> None:
        indices = self._indices(measurement)
        self.map_moments.update(self.pipeline.score_maps(measurement, indices, self.calibration, num_seen))

    def add_scores(self, measurement: Measurement) -> None:
        if not self.scores:
            self.set_statistics()
        anomaly_map = self.pipeline.anomaly_maps(measurement, self._indices(measurement), self.calibration)
        self.scores.append(self.pipeline.image_scores(anomaly_map))
        self.maxima.append(anomaly_map.flatten(1).amax(dim=1))

    def finish(self) -> ScoreCalibration:
        self.calibration.set_thresholds(self.category, torch.cat(self.scores), torch.cat(self.maxima))
        return self.calibration

    def _indices(self, measurement: Measurement) -> torch.Tensor:
        return torch.full((len(measurement.maps),), self.category, device=measurement.maps.device)

    def _new_calibration(self, measurement: Measurement) -> ScoreCalibration:
        """An empty calibration of the measurement's shapes, with the other categories' statistics kept."""
        pipeline = self.pipeline
        num_categories = len(pipeline.config.categories or ["default"])
        previous = pipeline.calibration if num_categories > 1 else None
        residual_shape = grid = None
        num_maps = measurement.maps.shape[1]
        if measurement.residual is not None:
            num_channels, *size = measurement.residual.shape[2:]
            grid = residual_grid(tuple(size), num_channels, num_categories)
            residual_shape = (num_channels, *residual_size(tuple(size), grid, num_channels))
            num_maps += 1 if grid == residual_shape[1:] else 2  # the residual's distances are maps, too
        if previous is not None:
            self._check_previous(previous, num_maps, residual_shape)
        calibration = ScoreCalibration(
            num_categories=num_categories,
            map_shape=(num_maps, *measurement.maps.shape[-2:]),
            residual_shape=residual_shape,
            residual_places=grid,
            num_scores=max(self.num_scores, 0 if previous is None else previous.config.num_scores),
            false_alarm_rate=self.false_alarm_rate,
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
