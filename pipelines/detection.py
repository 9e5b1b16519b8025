"""What the pipelines that detect anomalies share: calibration to good images.

This file is long so that a calibration stands in one place, from good images to thresholds.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from diffad.calibration.category_features import mean_features, nearest_category
from diffad.calibration.fitting import CalibrationFit, ScoreFunctions
from diffad.calibration.recorded_settings import OWN_NOISE, RECOGNISES_INSIDE, SMOOTHS_INSIDE
from diffad.calibration.score_calibration import ScoreCalibration
from diffad.images import ImageSequence, as_size, common_value_range, images_to_pixel_values, resize_images
from diffad.moments import FeatureMoments
from diffad.pipelines.base import AnomalyPipeline
from diffad.pipelines.checks import check_calibration_call, check_value_range
from diffad.pipelines.large_images import calibrate_large, size_of
from diffad.plain_values import plain_value
from diffad.precision import running_precision
from diffad.process_share import process_share
from diffad.read_ahead import read_ahead
from diffad.reading.grey_depth import warn_of_found_range
from diffad.region_of_interest import clear_outside, hide_outside, inside_region
from diffad.resizing import map_reach
from diffad.scoring import Measurement, empty_measurement, heighten_contrast
from diffad.seeding import image_generators
from diffad.tiling import tile_height_and_width
from diffad.warn_once import warn_once

DEFAULT_FALSE_ALARM_RATE = 0.01
FEWEST_IMAGES = 3  # of fewer, none can be left out: the others need a covariance
FEW_IMAGES = 20  # of which none can be spared for anything but statistics and thresholds
MOST_LEFT_OUT = 1000  # of a category: their measurements wait in a temporary file of 2 to 3 GB
MAX_STATISTICS_IMAGES = 512  # of a category: more hardly change the statistics, and the temporary file grows with them


class DetectionPipeline(AnomalyPipeline):
    """Base of the pipelines that detect anomalies: calibration. A call does not pass through here.

    A subclass says what its networks measure of images (`measure_pixels`), how that becomes smoothed maps
    (`score_maps`), how these become one map (`join_maps`), and how a map becomes a score (`image_scores`). Calibration
    learns from them what good images show.
    """

    tile_calibration: ScoreCalibration | None = None  # of pipelines that look at tiles

    @property
    def scores_features(self) -> bool:
        """Whether no map counts that a trained network has a part in."""
        return False

    @property
    def tile_size(self) -> tuple[int, int] | None:
        """Height and width of a tile in pixels of the images; None where they are looked at as a whole."""
        return tile_height_and_width(self.config.tile_size, as_size(self.input_resolution))

    @property
    def measuring_networks(self) -> tuple[Any, ...]:
        """The networks that `measure_pixels` runs, None where an optional one is missing."""
        raise NotImplementedError

    @property
    def scheduler_settings(self) -> dict[str, Any]:
        """What a calibration records of the scheduler, `{SCHEDULER: ...}`, or nothing where none counts."""
        return {}

    @property
    def precision(self) -> str:
        """In which these networks run, see `running_precision`."""
        return running_precision(self.measuring_networks, self._execution_device)

    def measure_images(
        self,
        images: Sequence[torch.Tensor] | ImageSequence,
        category: torch.Tensor,
        generators: Sequence[torch.Generator | None],
        region: torch.Tensor | None = None,
    ) -> Measurement:
        """What the networks say of images (3, H_i, W_i) in [0, 1], with noise by a generator each or the model's.

        `region` is that of each category, (K, h, w) bool, outside of which pixels are hidden.
        """
        size = as_size(self.input_resolution)
        pixel_values = images_to_pixel_values(images, size).to(self._execution_device)
        pixel_values = hide_outside(pixel_values, inside_region(region, category, size))
        return self.measure_pixels(pixel_values, category, generators)

    def measure_pixels(
        self,
        pixel_values: torch.Tensor,
        category: torch.Tensor,
        generators: Sequence[torch.Generator | None],
        of_tiles: bool = False,
    ) -> Measurement:
        """The same of images (N, 3, R, R') in [-1, 1] at the networks' size; `of_tiles`: of tiles of images."""
        raise NotImplementedError

    def score_maps(
        self,
        measurement: Measurement,
        category: torch.Tensor,
        calibration: ScoreCalibration | None,
        num_seen: int = 0,
    ) -> torch.Tensor:
        """Smoothed maps (N, S, H, W) of a measurement, not normalised, as of `diffad.scoring.ScoreFunctions`."""
        raise NotImplementedError

    def join_maps(
        self, maps: torch.Tensor, category: torch.Tensor, calibration: ScoreCalibration | None
    ) -> torch.Tensor:
        """The anomaly map (N, H, W) that `score_maps` make, normalised by a calibration where there is one."""
        raise NotImplementedError

    def image_scores(self, anomaly_map: torch.Tensor, inside: torch.Tensor | None = None) -> torch.Tensor:
        """The scores (N,) of anomaly maps (N, H, W), of the pixels `inside` (N, H, W) bool or of all."""
        raise NotImplementedError

    @torch.no_grad()
    def calibrate(
        self,
        images: Sequence[Any],
        statistics_images: Sequence[Any] | None = None,
        false_alarm_rate: float | None = None,
        category: str | int | None = None,
        batch_size: int = 16,
        generator: torch.Generator | None = None,
        accelerator: Accelerator | None = None,
        leave_one_out: bool = False,
        value_range: float | None = None,
        smallest_area: float | None = None,
        roi: Any = None,
    ) -> DetectionPipeline:
        """Learns what normal looks like from good images, in one pass over them and constant memory.

        (Those of a model of several categories are looked at once more, for what tells these apart.)

        Three things stand on each other: mean and covariance of the feature residual, mean and deviation of the maps,
        its Mahalanobis distances among them, and the scores of normalised maps. The first two are taken from the same
        images, each measured by the covariance of the others; the scores from images that neither has seen, so
        thresholds and p-values hold for new images.

        Args:
            images: good images that no network was trained on, no two of them copies, of parts of which neither
                training nor `statistics_images` show other photographs: PIL images, paths, arrays, or a column of a
                `datasets.Dataset`. Thresholds and p-values come from them.
            statistics_images: more good images, for the per-position statistics; those of training may serve. At most
                `MAX_STATISTICS_IMAGES`, evenly spread, are looked at, as their measurements wait in a temporary file,
                1 to 3 MB an image. Without them, every other of `images` does, up to as many, and the rest is left
                for the thresholds.
            false_alarm_rate: share of good parts that may raise an alarm, on average over sets of good images, in
                (0, 1); `diffad.calibration.conformal.false_alarm_bound` says what one set keeps with a confidence.
                None keeps what an earlier calibration has, and is 0.01 without one. In a model of several categories
                another rate than before sets the thresholds of all of them anew, by the scores that it keeps.
            category: which category the images are of, in a unified model; the others keep what they have.
            batch_size: images in a batch.
            generator: of noise of each image's own, whatever the batch. None measures all with the model's noise, as
                calls do that name none.
            accelerator: shares the images among its processes; each ends with the same calibration.
            leave_one_out: for a pipeline without a denoiser. All of `images` serve statistics and thresholds: each is
                scored by the Gaussian of the others and by their patches, which are a little further from it than those
                of all are from a new image. So the stated rate is close to the true one and no exact promise (Barber et
                al., "Predictive inference with the jackknife+", 2021); docs/method.md says how close it was found, with
                `position_trust` 0. Deviations at each position know the image's own outliers, and alarms are more. One
                or two images have statistics and no thresholds: masks, alarms and p-values stay None. Where the
                pipeline looks at tiles, it has no effect.
            value_range: of images of more than 8 bits, where the pipeline has none; None finds that which holds all
                images, where the first of either set has more than 8. It is saved with the calibration.
            smallest_area: of a region that counts, as a share of the image's area, in [0, 1). Each map's peaks that are
                smaller are cut before thresholds are set, as in each call, so that the rate holds for what remains.
                None keeps what an earlier calibration has; 0 drops nothing.
            roi: which pixels of this category's images count, as of `diffad.data.regions_of_interest.read_roi`: a mask
                of any size, or a file of one. Those outside count in no statistic, threshold, map or score. It is saved
                with the calibration; None keeps the one that an earlier calibration has.

        Returns:
            The pipeline, calibrated.

        Raises:
            ValueError: too few images, a wrong category, or a range that is not the other categories'.
        """
        if smallest_area is None:
            smallest_area = 0.0 if self.calibration is None else self.calibration.smallest_area
        if false_alarm_rate is None:
            is_new = self.calibration is None
            false_alarm_rate = DEFAULT_FALSE_ALARM_RATE if is_new else self.calibration.false_alarm_rate
        check_calibration_call(images, statistics_images, false_alarm_rate, batch_size, generator, smallest_area)
        false_alarm_rate, smallest_area = float(false_alarm_rate), float(smallest_area)
        leave_one_out = leave_one_out and self.tile_size is None
        if leave_one_out and (not self.scores_features or statistics_images is not None):
            raise ValueError("`leave_one_out` takes a pipeline without a denoiser, and no `statistics_images`.")
        if leave_one_out and len(self.categories) > 1 and len(images) < FEWEST_IMAGES:
            raise ValueError(
                f"`images` holds {len(images)} good images of {category!r}: in a model of several categories each "
                f"takes at least {FEWEST_IMAGES}."
            )
        num_statistics = None if statistics_images is None else len(statistics_images)
        for_statistics, for_scores = divided(len(images), num_statistics, leave_one_out)
        statistics_images = images if statistics_images is None else statistics_images
        index = self.category_index(category)
        found = self._found_value_range(index, value_range, images, statistics_images)
        shown = ImageSequence.of_rows(statistics_images, for_statistics, self.config.value_range or found)
        own_image = shown[:1] if accelerator is None or accelerator.is_main_process else None  # one process warns
        region = self._new_region(roi, index, own_image)
        moments = self._category_moments(shown, index, region, batch_size, accelerator)
        if self.tile_size is not None:
            if len(for_statistics) < FEWEST_IMAGES:
                raise ValueError(
                    f"`statistics_images`: {len(for_statistics)} images tell too little of tiles, whose statistics "
                    f"take at least {FEWEST_IMAGES}. Give more good images, or a pipeline without a `tile_size`."
                )
            generators = image_generators(generator, len(for_statistics) + len(for_scores))
            held_out = ImageSequence.of_rows(images, for_scores, self.config.value_range or found)
            options: dict[str, Any] = {
                "false_alarm_rate": false_alarm_rate,
                "accelerator": accelerator,
                "value_range": found,
            }
            options |= {"region": region, "smallest_area": smallest_area}
            calibrate_large(self, shown, held_out, index, generators, batch_size, **options)
            self.maybe_free_model_hooks()
            self._keep_category_moments(index, moments)
            self.calibrated_at = time.time()
            return self
        fit = self.calibration_fit(
            index,
            num_scores=len(images) if leave_one_out and len(images) >= FEWEST_IMAGES else len(for_scores),
            false_alarm_rate=false_alarm_rate,
            accelerator=accelerator,
            value_range=found,
            leave_one_out=leave_one_out,
            smallest_area=smallest_area,
            region=region,
            own_noise=generator is None,
        )
        for learn, part, indices in (
            (fit.add_statistics, statistics_images, for_statistics),
            (fit.add_scores, images, for_scores),
        ):
            if not indices:
                continue
            generators = image_generators(generator, len(indices))
            measurements = self.measurements(
                part, indices, index, batch_size, generators, accelerator, self.config.value_range or found, region
            )
            for measurement in read_ahead(measurements):
                learn(measurement)
        self.maybe_free_model_hooks()
        self.register_modules(calibration=fit.finish())
        self._keep_category_moments(index, moments)
        self.calibrated_at = time.time()
        return self

    def recognise(self, images: ImageSequence, batch_size: int) -> list[int]:
        """The index of each image's category, by its features: of a model of several, where none is given.

        Each category looks at its own region of interest alone, in one pass of the feature extractor for each region.

        Raises:
            ValueError: not all categories are calibrated, or were by an earlier version, which kept nothing of that.
        """
        calibration = self.calibration
        if calibration is None or calibration.category_mean is None or not calibration.category_mean.isfinite().all():
            raise ValueError(
                f"`category` is needed: this model knows {', '.join(self.categories)}, and its calibration not what "
                "they all look like. Pass one of them, or calibrate it again for each."
            )
        regions = self.region
        if regions is not None and not (calibration.config.settings or {}).get(RECOGNISES_INSIDE):
            regions = None  # an earlier version's means are those of whole images
            warn_once(
                "This pipeline was calibrated by an earlier version, which tells categories apart by what lies outside "
                "of their regions of interest as well. Load it with `calibration=None` and calibrate it for each "
                "again, or pass a `category`."
            )
        which = torch.zeros(len(self.categories), dtype=torch.long)  # of the distinct regions each category's is
        if regions is not None:
            regions, which = regions.unique(dim=0, return_inverse=True)
        means, covariances = calibration.category_mean, calibration.category_covariance
        found = [
            nearest_category(features[:, which], means, covariances)
            for features in self._category_features(images, batch_size, regions)
        ]
        return torch.cat(found).tolist()

    @property
    def _category_channels(self) -> int | None:
        several = len(self.categories) > 1 and self.feature_extractor is not None
        return sum(self.feature_extractor.layer_channels) if several else None

    def _category_features(
        self, images: ImageSequence, batch_size: int, regions: torch.Tensor | None
    ) -> Iterator[torch.Tensor]:
        """(B, D, C), batch by batch: what of the features tells categories apart, of each of D regions (D, h, w) bool.

        Of whole images, (B, 1, C), where there are none.
        """
        size = as_size(self.input_resolution)
        for start in range(0, len(images), batch_size):
            pixel_values = images_to_pixel_values(images[start : start + batch_size], size)
            pixel_values = pixel_values.to(self._execution_device)
            numbers = torch.arange(1 if regions is None else len(regions), device=pixel_values.device)
            of_regions = (
                hide_outside(pixel_values, inside_region(regions, i.expand(len(pixel_values)), size)) for i in numbers
            )
            yield torch.stack([mean_features(self.feature_extractor, one) for one in of_regions], dim=1)

    def _category_moments(
        self,
        images: ImageSequence,
        category: int,
        regions: torch.Tensor | None,
        batch_size: int,
        accelerator: Accelerator | None,
    ) -> FeatureMoments | None:
        """Mean and covariance of `_category_features` over good images, of this process's share and then of all.

        `regions` is that of each category, (K, h, w) bool, or None.
        """
        if self._category_channels is None or len(images) < 2:
            return None
        moments: FeatureMoments | None = None
        mine = process_share(len(images), accelerator)
        chosen = mine or range(1)  # whose features tell the shapes
        own = None if regions is None else regions[category : category + 1]
        for features in self._category_features(images[chosen.start : chosen.stop : chosen.step], batch_size, own):
            moments = moments or FeatureMoments(1, features.shape[2], features.device)
            moments.update(features[: len(features) if mine else 0].mT)
        if moments is not None:
            moments.reduce(accelerator)
        return moments

    def _keep_category_moments(self, category: int, moments: FeatureMoments | None) -> None:
        if moments is not None:
            self.calibration.category_mean[category] = moments.mean()[0]
            self.calibration.category_covariance[category] = moments.covariance()[0]

    @property
    def region(self) -> torch.Tensor | None:
        """Which pixels of each category's images count, (K, h, w) bool; None where all do."""
        return None if self.calibration is None else self.calibration.region

    def _new_region(self, roi: Any, category: int, images: ImageSequence | None) -> torch.Tensor | None:
        """The pipeline's `region` with one category's replaced; images of another ratio are warned of."""
        if roi is None:
            return self.region
        from diffad.data.regions_of_interest import read_roi  # with what reads data sets, which a call does not need

        names = self.categories
        size = None if images is None else size_of(next(iter(images.whole())))
        own = torch.from_numpy(read_roi(roi, names[category] if len(names) > 1 else None, size).copy())
        if self.region is None or len(names) < 2:
            region = torch.ones(max(1, len(names)), *own.shape, dtype=torch.bool)
        else:
            region = self.region.cpu().clone()
            own = F.adaptive_max_pool2d(own[None, None].float(), region.shape[1:])[0, 0] > 0.5
        region[category] = own
        return None if bool(region.all()) else region.to(self._execution_device)

    def score_inside(self, anomaly_map: torch.Tensor, category: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Joined maps (N, H, W) as they come out, 0 where nothing counts, and the scores (N,) of what does."""
        inside = inside_region(self.region, category, (anomaly_map.shape[-2], anomaly_map.shape[-1]))
        if inside is None:
            scores = self.image_scores(anomaly_map)
        else:
            pairs = zip(anomaly_map, inside, strict=True)
            scores = torch.cat([self.image_scores(one[None], where) for one, where in pairs])
        return self.lower_surroundings(anomaly_map, inside), scores

    def lower_surroundings(self, anomaly_map: torch.Tensor, inside: torch.Tensor | None) -> torch.Tensor:
        """What is done to calibrated maps (N, H, W) once their scores are known; `inside`, (N, H, W) bool, counts."""
        contrast = 0.0 if self.calibration is None else self.config.get("contrast", 0.0)
        return clear_outside(heighten_contrast(anomaly_map, contrast, inside), inside)

    def at_size(
        self,
        anomaly_map: torch.Tensor,
        size: tuple[int, int],
        category: torch.Tensor,
        cell: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Maps (N, H, W) at another size, 0 where nothing counts; of the images' own, `cell` as of `Resizing`."""
        resized = resize_images(anomaly_map[:, None], map_reach(size, size, cell))[:, 0, : size[0], : size[1]]
        return clear_outside(resized, inside_region(self.region, category, size))

    def leaves_each_out(self, num_images: int) -> bool:
        """Whether so many good images of a category need not be divided: all serve statistics and thresholds.

        Of a method with a denoiser, or with statistics of tiles, no image can be left out without a fit anew. Nor can
        it from deviations at each position (`position_trust`), which its own outliers raise; few images have no choice.
        """
        can_leave_out = self.scores_features and self.tile_size is None
        most = MOST_LEFT_OUT if self.config.get("position_trust", 1.0) == 0.0 else FEW_IMAGES - 1
        return can_leave_out and num_images <= most

    def _found_value_range(self, category: int, value_range: float | None, *sets: Sequence[Any]) -> float | None:
        """The range that a calibration of these images holds for, and saves; None where the pipeline has its own.

        Raises:
            ValueError: other categories were calibrated with a smaller one.
        """
        check_value_range(value_range)
        if self.config.value_range is not None:
            if value_range not in (None, self.config.value_range):
                raise ValueError(
                    f"`value_range` is {value_range:g}, but the pipeline's own is {self.config.value_range:g}. Leave "
                    "it out, or load the pipeline with another."
                )
            return None
        found = common_value_range(*sets) if value_range is None else value_range
        if found is not None and value_range is None:
            warn_of_found_range(found)
        earlier = self.value_range
        others = [] if self.calibration is None else self.calibration.calibrated_categories
        if earlier is None or not set(others) - {category}:
            return found
        if found is not None and found > earlier:
            raise ValueError(
                f"`value_range`: these images take {found:g}, and other categories were calibrated with {earlier:g}. "
                "Load the pipeline with `calibration=None` and a `value_range`, and calibrate every category."
            )
        return earlier

    def calibration_fit(
        self,
        category: int,
        num_scores: int,
        false_alarm_rate: float,
        accelerator: Accelerator | None = None,
        value_range: float | None = None,
        leave_one_out: bool = False,
        smallest_area: float = 0.0,
        of_tiles: bool = False,
        region: torch.Tensor | None = None,
        place_shape: tuple[int, int] | None = None,
        feature_moments: FeatureMoments | None = None,
        own_noise: bool = True,
    ) -> CalibrationFit:
        """A fit of this pipeline's calibration for one category, which has seen nothing yet; arguments as there.

        `of_tiles`: of its `tile_calibration` instead, whose `place_shape` is `ScoreCalibration`'s; `region`: of each
        category, (K, h, w) bool; `feature_moments`: as of `CalibrationFit`; `own_noise`: whether measurements have the
        model's noise.
        """
        names = set(setting_names(type(self))) - {"contrast"}  # which moves no score
        settings = {name: value for name, value in self.config.items() if name in names} | self.scheduler_settings
        if region is not None:
            settings[SMOOTHS_INSIDE] = True
            if self._category_channels is not None:
                settings[RECOGNISES_INSIDE] = True
        if not self.scores_features:
            settings[OWN_NOISE] = own_noise
        return CalibrationFit(
            ScoreFunctions(self.score_maps, self.join_maps, self.image_scores),
            category,
            num_scores,
            false_alarm_rate,
            previous=self.tile_calibration if of_tiles else self.calibration,
            num_categories=max(1, len(self.categories)),
            position_trust=self.config.get("position_trust", 1.0),
            accelerator=accelerator,
            leave_one_out=leave_one_out,
            shared=of_tiles,
            region=region,
            feature_moments=feature_moments,
            precision=self.precision,
            settings=settings,
            value_range=value_range,
            smallest_area=smallest_area,
            category_channels=None if of_tiles else self._category_channels,
            place_shape=place_shape,
        )

    def measurements(
        self,
        images: Sequence[Any],
        indices: Sequence[int],
        category: int,
        batch_size: int,
        generators: Sequence[torch.Generator | None],
        accelerator: Accelerator | None,
        value_range: float | None,
        region: torch.Tensor | None = None,
    ) -> Iterator[Measurement]:
        """Measurements of this process's share of the images at `indices`, batch by batch.

        Each index has a generator, or None. Where the process has no share, measurements of no images.
        """
        mine = process_share(len(indices), accelerator)
        chosen = mine or range(1)  # whose measurement tells the shapes
        starts: Any = range(0, len(chosen), batch_size)
        for start in self.progress_bar(starts) if len(starts) > 1 else starts:
            batch = chosen[start : start + batch_size]
            sequence = ImageSequence.of_rows(images, [indices[i] for i in batch], value_range)
            of_category = torch.full((len(batch),), category, device=self._execution_device)
            measurement = self.measure_images(sequence, of_category, [generators[i] for i in batch], region)
            yield measurement if mine else empty_measurement(measurement)

    def reset_schedule(self) -> None:
        """Sets the schedule of a method whose measurement has steps, before a trace and after it."""

    def export(
        self,
        path: str | os.PathLike,
        format: str | None = None,
        precision: str = "fp32",
        images: Sequence[Any] | None = None,
        input_type: str = "float32",
    ) -> Path:
        """A call as one graph, calibration inside, that runs without torch (`diffad.deployment.Runtime`).

        Args:
            path: of the file, .onnx or .xml.
            format: "onnx" or "openvino"; None goes by the path's ending.
            precision: "fp32", "fp16" (of the networks' weights) or "int8".
            images: for int8, at least 20 good images that no network was trained on.
            input_type: "float32", of pixels in [0, 1], or "uint8", from 0 to 255.

        Returns:
            The path.

        Raises:
            ValueError: an argument is wrong, or the pipeline has no graph.
            ImportError: a package is missing; the message names the extra that brings it.

        Example:
            >>> pipe.export("parts.onnx")  # doctest: +SKIP
            PosixPath('parts.onnx')
        """
        from diffad.deployment.export import export_pipeline

        return export_pipeline(self, path, format, precision, images, input_type)


def divided(num_images: int, num_statistics: int | None, leave_one_out: bool) -> tuple[list[int], list[int]]:
    """Which images serve the statistics, and which the scores, by their indices.

    Indices, as a slice of a data set's column would decode all of it.

    Args:
        num_images: of `calibrate`'s `images`.
        num_statistics: of its `statistics_images`, from which the first indices are; None where there are none, and
            every other of `images` serves.
        leave_one_out: all of `images` serve the statistics, which know what each would score by those of the others.

    Raises:
        ValueError: they are too few.
    """
    for_scores: list[int]
    if leave_one_out:
        for_statistics, for_scores = [*range(num_images)], []
    elif num_statistics is None:
        for_statistics = spread(range(1, num_images, 2), MAX_STATISTICS_IMAGES)
        for_scores = sorted({*range(num_images)} - {*for_statistics})
    else:
        for_statistics = spread(range(num_statistics), MAX_STATISTICS_IMAGES)
        for_scores = [*range(num_images)]
    if not for_statistics or not (for_scores or leave_one_out):
        raise ValueError(
            f"`images` holds {num_images} good images and `statistics_images` {len(for_statistics)}, too few to "
            "calibrate: it takes 1 of each, or 2 `images`, and deserves 100."
        )
    return for_statistics, for_scores


def spread(indices: range, count: int) -> list[int]:
    """At most `count` of the indices, evenly spread, as images often come in order of their time or kind."""
    count = min(count, len(indices))
    return [indices[i * len(indices) // count] for i in range(count)]


def setting_names(pipeline_class: type[DetectionPipeline]) -> list[str]:
    """The configuration values of a pipeline class: its arguments with a default that are no components."""
    parameters = inspect.signature(pipeline_class.__init__).parameters.values()
    settings = [p.name for p in parameters if p.default is not inspect.Parameter.empty]
    return [name for name in settings if name not in pipeline_class._optional_components]


def scheduler_record(scheduler: Any) -> dict[str, Any]:
    """A scheduler's configuration in the form that a calibration saves."""
    return {name: plain_value(value) for name, value in scheduler.config.items() if not name.startswith("_")}
