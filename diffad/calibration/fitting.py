"""Fitting a calibration to good images: one pass over them, in constant memory, over any number of processes.

This file is long so that the order in which statistics, deviations and scores are taken stands in one place.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object

from diffad.calibration.coreset import (
    CORESET_SIZE,
    greedy_coreset,
    num_directions,
    pool_size,
    principal_directions,
    sample_patches,
)
from diffad.calibration.feature_gaussian import feature_gaussian, shared_feature_gaussian
from diffad.calibration.recorded_settings import OWN_NOISE, RECOGNISES_INSIDE, SMOOTHS_INSIDE, changed_settings
from diffad.calibration.residual_gaussian import residual_gaussian, residual_grid, residual_size
from diffad.calibration.score_calibration import ScoreCalibration
from diffad.moments import FeatureMoments, MomentSums
from diffad.region_of_interest import inside_region, stand_ins, values_inside
from diffad.scoring import Measurement

NO_WEIGHT = 1e6  # as a map's deviation: what is divided by it no longer counts


class ScoreFunctions(NamedTuple):
    """How a method comes from measurements to scores: three functions over tensors.

    score_maps: `(measurement, category, calibration, num_seen)` to smoothed maps (N, S, H, W), those of the residual's
        distances behind the measured ones, and that of the nearest patches last; `num_seen` is
        `ScoreCalibration.log_distances`'.
    join_maps: `(maps, category, calibration)` to anomaly maps (N, H, W), normalised by the calibration.
    image_scores: anomaly maps to scores (N,), of the pixels that count where a region (H, W) bool is given as well.
        Twice the map gives twice the score.
    """

    score_maps: Callable[[Measurement, torch.Tensor, ScoreCalibration | None, int], torch.Tensor]
    join_maps: Callable[[torch.Tensor, torch.Tensor, ScoreCalibration | None], torch.Tensor]
    image_scores: Callable[..., torch.Tensor]


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
        position_trust: how far mean and variance at a position are trusted against those over all, in [0, 1].
        accelerator: adds up what its processes have seen, each its own images; a process without any adds a measurement
            of no images. Then every process ends with the same calibration.
        leave_one_out: whether the statistics' images set the thresholds as well, each scored by the Gaussian of the
            others (`leave_one_out_of_features`), instead of images of `add_scores`. For features that nothing predicts.
        shared: whether the measurements are of tiles, several an image, which say their image's number: one covariance
            of the features then serves all positions.
        region: of each category, (K, h, w) bool: what counts of the images; None for all.
        feature_moments: of the features of more images, of all processes, those of `add_statistics` among them, which
            are then not added.
        record: what is saved with it, `precision`, `settings`, `value_range`, `smallest_area` and the rest of
            [`ScoreCalibration`].
    """

    def __init__(
        self,
        functions: ScoreFunctions,
        category: int,
        num_scores: int,
        false_alarm_rate: float,
        previous: ScoreCalibration | None = None,
        num_categories: int = 1,
        position_trust: float = 1.0,
        accelerator: Accelerator | None = None,
        leave_one_out: bool = False,
        shared: bool = False,
        region: torch.Tensor | None = None,
        feature_moments: FeatureMoments | None = None,
        **record: Any,
    ):
        self.functions, self.category, self.num_scores = functions, category, num_scores
        self.false_alarm_rate, self.num_categories = false_alarm_rate, num_categories
        self.previous = previous if num_categories > 1 else None
        self.position_trust, self.accelerator = position_trust, accelerator
        self.leave_one_out, self.shared = leave_one_out, shared
        self.region = region
        self.record = record if not shared else {**record, "shared_whitening": True}
        self.residual_moments: FeatureMoments | None = None  # at each cell
        self.residual_sums = MomentSums()  # at each position
        self.feature_moments = feature_moments  # at each position, or of all together
        self.knows_features = feature_moments is not None
        self.feature_sums = MomentSums()  # at each position, where the former is of all
        self.image_numbers: list[int] = []  # of tiles
        self.map_moments = MomentSums()  # of each score map at each pixel
        self.joined_moments = MomentSums()  # of the joined maps of the statistics' images, over all pixels
        self.held_out_moments = MomentSums()  # the same of the thresholds' images
        self.calibration: ScoreCalibration | None = None
        self.waiting = TemporaryFile()  # noqa: SIM115 (residuals and maps, read again by `set_statistics`, which closes it)
        self.num_waiting = 0
        self.is_levelled, self.scale = False, 1.0
        self.scores: list[float] = []
        self.maxima: list[float] = []

    # -- 1. statistics -------------------------------------------------------------------------------------------

    def add_statistics(self, measurement: Measurement) -> None:
        """Learns mean and covariance of the residual; the maps wait for it, in a temporary file."""
        calibration = self.calibration = self.calibration or self._new_calibration(measurement)
        residual = measurement.maps.new_zeros(len(measurement.maps), 0)  # in the file, where a method has none
        if measurement.residual is not None:
            num_channels, *size = calibration.config.residual_shape
            residual = F.adaptive_avg_pool2d(measurement.residual.mean(dim=1), size)  # (N, C, h, w)
            if self.residual_moments is None:
                self.residual_moments = FeatureMoments(math.prod(calibration.grid), num_channels, residual.device)
            self.residual_sums.update(residual)
            self.residual_moments.update(F.adaptive_avg_pool2d(residual, calibration.grid).flatten(2))  # (N, C, P)
            if calibration.num_distances == 2:  # half precision, as far as it goes, makes up for several positions
                residual = half(residual)
        none = measurement.maps[:, :0]
        # in full: an image that few others surround is left out by a small difference of large numbers
        features = none if measurement.features is None else measurement.features
        patches = none if measurement.patches is None else half(measurement.patches)
        if measurement.features is not None and not self.knows_features:
            positions = 1 if self.shared else math.prod(features.shape[2:])
            if self.feature_moments is None:
                self.feature_moments = FeatureMoments(positions, features.shape[1], features.device)
            flat = measurement.features.flatten(2)  # (N, C, P)
            if self.shared:
                self.feature_sums.update(flat)
                flat = flat.movedim(1, 2).reshape(-1, flat.shape[1], 1)  # (N * P, C, 1)
            self.feature_moments.update(flat)
        for values in (residual, measurement.maps, features, patches):
            np.save(self.waiting, values.cpu().numpy())
        self.image_numbers += [] if measurement.image is None else measurement.image.tolist()
        self.num_waiting += len(measurement.maps)

    def set_statistics(self) -> ScoreCalibration:
        """The calibration without thresholds, all that maps need.

        Raises:
            ValueError: `add_statistics` has not been called.
        """
        calibration = self._known_calibration()
        # 1. The residual's Gaussian at each cell, the features' at each position, and the patches that are kept
        num_seen, for_seen = 0, calibration
        if self.residual_moments is not None:
            for sums in (self.residual_sums, self.residual_moments):
                sums.reduce(self.accelerator)
            self._replace_outside(self.residual_moments, calibration.grid)
            mean = self.residual_sums.mean().flatten(1).mT  # (h * w, C)
            gaussian = residual_gaussian(self.residual_moments, mean, calibration.grid)
            calibration.set_residual_gaussian(self.category, *gaussian)
            num_seen = self.residual_moments.count
            self.residual_moments = None  # larger than all else here
        if self.feature_moments is not None and self.shared:
            for sums in (self.feature_sums, self.feature_moments):
                sums.reduce(self.accelerator)
            num_seen = self.feature_sums.count
            gaussian = shared_feature_gaussian(self.feature_moments, self.feature_sums.mean().mT)
            calibration.set_feature_gaussian(self.category, *gaussian)
            self.feature_moments = None
        elif self.feature_moments is not None:
            if not self.knows_features:
                self.feature_moments.reduce(self.accelerator)
            self._replace_outside(self.feature_moments, tuple(calibration.config.feature_shape[1:]))
            num_seen = self.feature_moments.count
            gaussian = feature_gaussian(self.feature_moments)
            self.feature_moments = None
            calibration.set_feature_gaussian(self.category, *gaussian)
            for_seen = copy.deepcopy(calibration)  # in full precision: leaving an image out magnifies its rounding
            for_seen.feature_whitening = for_seen.feature_whitening.float()
            for_seen.set_feature_gaussian(self.category, *gaussian)
        if calibration.coreset is not None:
            num_images = self._set_coreset(calibration, for_seen)
            num_seen = num_seen if self.knows_features else num_images
        # 2. Mean and deviation of each map at each pixel, (S, H, W); an image is measured by the Gaussian of the others
        smoothed = TemporaryFile()  # noqa: SIM115 (closed below)
        for maps in self._waiting_maps(for_seen, num_seen):
            self.map_moments.update(maps)
            np.save(smoothed, maps.cpu().numpy())
        self.map_moments.reduce(self.accelerator)
        self._replace_outside(self.map_moments, calibration.map_mean.shape[-2:])
        moments = self.map_moments.mean(), self.map_moments.standard_deviation()
        map_mean, map_std = trust_positions(*moments, self.position_trust)
        of_features = calibration.num_feature_maps - calibration.num_distances
        if of_features and num_seen < 3:  # of one or two images, the distances to each other say nothing
            map_mean[-of_features:], map_std[-of_features:] = 0.0, NO_WEIGHT
            if of_features == len(map_std) and calibration.feature_mean is not None:
                map_std[0] = 1.0  # the Gaussian alone, as it is
        calibration.map_mean[self.category] = map_mean
        calibration.map_std[self.category] = map_std
        # 3. Deviation of the joined maps, see `finish`
        for maps in read_arrays(smoothed, calibration.map_mean.device):
            joined = self.functions.join_maps(maps, self._indices(maps), calibration)
            self.joined_moments.update(self._values_inside(joined).flatten())
            if self.leave_one_out and self.num_scores:
                self._add_scores_of(joined)
        self.joined_moments.reduce(self.accelerator)
        smoothed.close()
        self.waiting.close()
        return calibration

    def _waiting_maps(self, calibration: ScoreCalibration, num_seen: int) -> Iterator[torch.Tensor]:
        """The score maps of what waits in the file, (N, S, H, W) batch by batch."""
        for measurement in self._waiting_measurements(calibration.map_mean.device):
            yield self.functions.score_maps(measurement, self._indices(measurement.maps), calibration, num_seen)

    def _waiting_measurements(self, device: torch.device) -> Iterator[Measurement]:
        """What waits in the file, batch by batch; images have their numbers as `process_share` gives them out."""
        first, step = (
            (0, 1) if self.accelerator is None else (self.accelerator.process_index, self.accelerator.num_processes)
        )
        count, arrays = 0, read_arrays(self.waiting, device)
        for residual, maps, features, patches in zip(arrays, arrays, arrays, arrays, strict=True):
            numbers = self.image_numbers[count : count + len(maps)]
            image = first + step * torch.arange(count, count + len(maps), device=device)
            image = torch.tensor(numbers, device=device) if numbers else image
            count += len(maps)
            yield Measurement(
                maps,
                residual[:, None].float() if residual.ndim == 4 else None,
                features if features.shape[1] else None,
                patches.float() if patches.shape[1] else None,
                image,
            )

    def _set_coreset(self, calibration: ScoreCalibration, for_seen: ScoreCalibration) -> int:
        """Chooses patches that are near all of those of the statistics' images; returns how many images these are."""
        device, sampled, num_images = calibration.coreset.device, [], self.num_waiting
        if self.accelerator is not None:
            num_images = int(self.accelerator.reduce(torch.tensor(num_images, device=self.accelerator.device)))
        for measurement in self._waiting_measurements(device):
            if measurement.patches is None or measurement.image is None:
                continue
            inside = self._inside(measurement.patches.shape[-2:])
            for patches, image in zip(measurement.patches, measurement.image.tolist(), strict=True):
                chosen = sample_patches(patches, image, max(1, pool_size(len(patches)) // num_images), inside)
                sampled.append((image, chosen.cpu().numpy()))
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            sampled = gather_object(sampled)
        sampled = sorted(sampled, key=lambda one: one[0])  # one process's order
        owner = torch.tensor([image for image, patches in sampled for _ in patches], device=device)
        pool = torch.from_numpy(np.concatenate([patches for _, patches in sampled])).to(device)
        with torch.autocast(device.type, enabled=False):  # small distances are differences of large numbers
            if calibration.patch_directions is not None:
                directions = principal_directions(pool, calibration.patch_directions.shape[2])
                pool = pool @ directions
                for one in (calibration, for_seen):
                    one.patch_directions[self.category] = directions
            chosen = greedy_coreset(pool, CORESET_SIZE)
        for one in (calibration, for_seen):
            one.coreset[self.category] = pool[chosen].half()
            one.coreset_owner[self.category] = owner[chosen]
        return num_images

    # -- 2. thresholds -------------------------------------------------------------------------------------------

    def add_scores(self, measurement: Measurement) -> None:
        """Learns from images that no statistic has seen what new good images score."""
        if not self.waiting.closed:
            self.set_statistics()
        calibration = self._known_calibration()
        indices = self._indices(measurement.maps)
        maps = self.functions.score_maps(measurement, indices, calibration, 0)
        anomaly_map = self.functions.join_maps(maps, indices, calibration)  # (N, H, W)
        self.held_out_moments.update(self._values_inside(anomaly_map).flatten())
        self._add_scores_of(anomaly_map)

    def _add_scores_of(self, anomaly_map: torch.Tensor) -> None:
        """Scores and maxima of joined maps (N, H, W)."""
        if len(anomaly_map):
            inside = self._inside(anomaly_map.shape[-2:])
            of_region = () if inside is None else (inside,)
            self.scores += self.functions.image_scores(anomaly_map, *of_region).tolist()
            self.maxima += self._values_inside(anomaly_map).flatten(1).amax(dim=1).tolist()
        if not math.isfinite(sum(self.scores) + sum(self.maxima)):
            raise ValueError(
                "The map of a good image holds NaN or infinity, so it can set no threshold. Run the networks in "
                "float32, and look at the image."
            )

    def add_joined_maps(self, anomaly_map: torch.Tensor) -> None:
        """`add_scores` of maps (N, H, W) that are complete: those of large images, of their tiles and the whole."""
        anomaly_map = anomaly_map.to(self._known_calibration().map_mean.device)  # that of the region
        self.held_out_moments.update(self._values_inside(anomaly_map).flatten())
        self._add_scores_of(anomaly_map)

    def level(self) -> ScoreCalibration:
        """Makes the joined maps of the statistics' images have deviation 1: `finish` for one view of several."""
        calibration, count = self._known_calibration(), self.map_moments.count
        variance = self.joined_moments.variance() * count / max(1, count - 1)
        calibration.map_std[self.category] *= max(float(variance) ** 0.5, 1e-6)
        self.is_levelled = True
        return calibration

    def finish(self) -> ScoreCalibration:
        """The calibration with thresholds, and maps of deviation 1.

        A joined map is a mean of maps that each have deviation 1 at every pixel, so its own is smaller: 0.78 for solar
        cells. One constant a category makes it 1 over all pixels of good images. It comes from the statistics' images,
        each measured by the Gaussian of the others, which count for one less as the maps' mean is theirs, and from the
        thresholds' images, of which alone there are often too few: 62 solar cells tell it within 6%, all 411 within 2%.
        Scores grow with the maps, those of good images and of bad ones alike, so thresholds stay as valid as they are.
        """
        if not self.waiting.closed:
            self.set_statistics()  # which scores the images that are left out in turn
        scores, maxima = self.scores, self.maxima
        self.held_out_moments.reduce(self.accelerator)
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            scores, maxima = gather_object(scores), gather_object(maxima)
        if not scores and self.num_scores:
            raise ValueError("There are no scores to set thresholds by. Call `add_scores` with measurements first.")
        if not scores:
            return self._known_calibration()
        num_statistics, num_scores = self.map_moments.count, (0 if self.leave_one_out else len(scores))
        if self.is_levelled:  # by its statistics' images; what is joined here is more than one view of an image
            squares, degrees = num_scores * self.held_out_moments.variance(), num_scores
        else:
            squares, degrees = num_statistics * self.joined_moments.variance(), num_statistics - 1 + num_scores
            if num_scores:
                squares = squares + num_scores * self.held_out_moments.variance()
        scale = self.scale = max(float(squares / degrees) ** 0.5, 1e-6)
        calibration = self._known_calibration()
        calibration.map_std[self.category] *= scale
        calibration.set_thresholds(
            self.category, [score / scale for score in scores], [maximum / scale for maximum in maxima]
        )
        return calibration

    # -- the region that counts -------------------------------------------------------------------------------------

    def _inside(self, size: Sequence[int]) -> torch.Tensor | None:
        """Which pixels count, (H, W) bool; None for all."""
        if self.region is None:
            return None
        of_category = self.region[self.category : self.category + 1]
        inside = inside_region(of_category, torch.zeros(1, dtype=torch.long, device=of_category.device), size)
        return None if inside is None else inside[0]

    def _values_inside(self, maps: torch.Tensor) -> torch.Tensor:
        return values_inside(maps, self._inside(maps.shape[-2:]))

    def _replace_outside(self, sums: MomentSums | FeatureMoments, size: Sequence[int]) -> None:
        """Where nothing counts, what other places show stands in: averages over all places are then of those."""
        if (inside := self._inside(size)) is not None:
            sums.replace_positions(stand_ins(inside.flatten()))

    # -- shapes --------------------------------------------------------------------------------------------------

    def _known_calibration(self) -> ScoreCalibration:
        if self.calibration is None:
            raise ValueError("There are no statistics yet. Call `add_statistics` with measurements of good images.")
        return self.calibration

    def _indices(self, maps: torch.Tensor) -> torch.Tensor:
        return torch.full((len(maps),), self.category, device=maps.device)

    def _new_calibration(self, measurement: Measurement) -> ScoreCalibration:
        """An empty calibration of the measurement's shapes, with the other categories' statistics kept."""
        residual_shape = grid = None
        num_maps = measurement.maps.shape[1]
        if measurement.residual is not None:
            num_channels, height, width = measurement.residual.shape[2:]
            grid = residual_grid((height, width), num_channels, self.num_categories)
            residual_shape = (num_channels, *residual_size((height, width), grid, num_channels))
            num_maps += 1 if grid == residual_shape[1:] else 2  # the residual's distances are maps, too
        feature_shape = None if measurement.features is None else tuple(measurement.features.shape[1:])
        coreset_shape = patch_channels = None
        if measurement.patches is not None:
            num_channels = measurement.patches.shape[1]
            coreset_shape = (CORESET_SIZE, num_directions(num_channels))
            patch_channels = num_channels if num_channels > coreset_shape[1] else None
        num_maps += (feature_shape is not None) + (coreset_shape is not None)
        previous = self.previous
        if previous is not None:
            self._check_previous(previous, num_maps, residual_shape, feature_shape, coreset_shape)
        calibration = ScoreCalibration(
            num_categories=self.num_categories,
            map_shape=(num_maps, *measurement.maps.shape[-2:]),
            residual_shape=residual_shape,
            residual_places=grid,
            feature_shape=feature_shape,
            coreset_shape=coreset_shape,
            patch_channels=patch_channels,
            num_scores=max(self.num_scores, 0 if previous is None else previous.config.num_scores),
            false_alarm_rate=self.false_alarm_rate,
            region_shape=None if self.region is None else tuple(self.region.shape[1:]),
            keeps_maxima=True,
            leave_one_out=self.leave_one_out
            or (previous is not None and previous.leave_one_out and bool(self._other_categories(previous))),
            **self.record,
        ).to(measurement.maps.device)
        if previous is not None:
            for name, values in previous.named_buffers():
                if name == "region":
                    continue
                getattr(calibration, name)[..., : values.shape[-1]] = values
            if previous.config.false_alarm_rate != self.false_alarm_rate:
                for i in self._other_categories(previous):
                    of_scores, of_pixels = previous.thresholds_at(i, self.false_alarm_rate)
                    calibration.image_threshold[i], calibration.pixel_threshold[i] = of_scores, of_pixels
        if self.region is not None:
            calibration.region.copy_(self.region)
        return calibration

    def _other_categories(self, previous: ScoreCalibration) -> list[int]:
        """Those but this one that are calibrated."""
        return [i for i in previous.image_threshold.isfinite().nonzero().flatten().tolist() if i != self.category]

    def _check_previous(
        self,
        previous: ScoreCalibration,
        num_maps: int,
        residual_shape: tuple[int, ...] | None,
        feature_shape: tuple[int, ...] | None,
        coreset_shape: tuple[int, ...] | None,
    ) -> None:
        config = previous.config
        knows_others = bool(self._other_categories(previous))
        shapes = (residual_shape, feature_shape, coreset_shape)
        found = (num_maps, *(shape and list(shape) for shape in shapes))
        known = (config.residual_shape, config.feature_shape, config.coreset_shape)
        if found != (config.map_shape[0], *(shape and list(shape) for shape in known)):
            raise ValueError(
                "`calibration` holds other categories' statistics of other scores than this pipeline's settings give, "
                "or an earlier version's. Load the pipeline with `calibration=None` and calibrate every category."
            )
        settings = dict(self.record.get("settings") or {})
        if previous.region is None:
            for name in (SMOOTHS_INSIDE, RECOGNISES_INSIDE):
                settings.pop(name, None)  # the others have no region
        if knows_others and (changed := changed_settings(config.settings, settings)):
            named = ["generator" if name == OWN_NOISE else name for name in changed]
            raise ValueError(
                f"The other categories were calibrated with other settings ({', '.join(named)}). Use the same, or "
                "load the pipeline with `calibration=None` and calibrate every category."
            )
        if config.false_alarm_rate != self.false_alarm_rate:
            for i in self._other_categories(previous):
                if previous.known_maxima(i) is None:
                    raise ValueError(
                        f"`false_alarm_rate` is {self.false_alarm_rate:g}, and category {i} was calibrated at "
                        f"{config.false_alarm_rate:g} by an earlier version, which kept too little to set its mask's "
                        "threshold anew. Pass that rate, or load the pipeline with `calibration=None` and calibrate "
                        "every category."
                    )
        for name in ("precision", "smallest_area") if knows_others else ():
            if config.get(name) not in (None, self.record.get(name)):
                raise ValueError(
                    f"The other categories were calibrated with {name} {config[name]}, and this is "
                    f"{self.record.get(name)}. Use the same, or load the pipeline with `calibration=None` and "
                    "calibrate every category."
                )


def half(values: torch.Tensor) -> torch.Tensor:
    """In half precision, as far as it goes."""
    return values.clamp(-65504.0, 65504.0).half()


def read_arrays(file: IO[bytes], device: torch.device) -> Iterator[torch.Tensor]:
    """The arrays of a file, one after another, from its beginning."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    while file.tell() < end:
        yield torch.from_numpy(np.load(file)).to(device)


def trust_positions(mean: torch.Tensor, std: torch.Tensor, trust: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of maps (S, H, W) at each pixel, drawn towards those over all pixels of a map.

    Args:
        mean, std: over images, at each pixel.
        trust: 1 keeps them; at 0 all pixels of a map have the same.
    """
    mean_of_all = mean.mean(dim=(-2, -1), keepdim=True)
    variance_of_all = (std.square() + (mean - mean_of_all).square()).mean(dim=(-2, -1), keepdim=True)
    variance = trust * std.square() + (1.0 - trust) * variance_of_all
    return trust * mean + (1.0 - trust) * mean_of_all, variance.sqrt()
