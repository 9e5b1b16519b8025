"""What the pipelines that detect anomalies share: calibration to good images."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from diffad.calibration.fitting import CalibrationFit, ScoreFunctions
from diffad.calibration.score_calibration import ScoreCalibration
from diffad.grey_depth import warn_of_found_range
from diffad.images import ImageSequence, common_value_range
from diffad.moments import PRIOR_IMAGES
from diffad.pipelines.base import AnomalyPipeline
from diffad.precision import running_precision
from diffad.process_share import process_share
from diffad.scoring import Measurement, empty_measurement, split_measurement
from diffad.seeding import image_generators

MAX_STATISTICS_IMAGES = 512  # of a category: more hardly change the statistics, and the temporary file grows with them


class DetectionPipeline(AnomalyPipeline):
    """Base of the pipelines that detect anomalies: calibration. A call does not pass through here.

    A subclass says what its networks measure of images (`measure_images`), how that becomes smoothed maps
    (`score_maps`), how these become one map (`join_maps`), and how a map becomes a score (`image_scores`). Calibration
    learns from them what good images show.
    """

    @property
    def mean_prior_images(self) -> float:
        """How many images say that the residual's mean is 0, as that of a network that predicts features should be."""
        return PRIOR_IMAGES

    @property
    def measuring_networks(self) -> tuple[Any, ...]:
        """The networks that `measure_images` runs, None where an optional one is missing."""
        raise NotImplementedError

    def measure_images(
        self,
        images: Sequence[torch.Tensor] | ImageSequence,
        category: torch.Tensor,
        generators: Sequence[torch.Generator | None],
    ) -> Measurement:
        """What the networks say of images (3, H_i, W_i) in [0, 1], whose noise comes from a generator each."""
        raise NotImplementedError

    def score_maps(
        self,
        measurement: Measurement,
        category: torch.Tensor,
        calibration: ScoreCalibration | None,
        num_seen: int = 0,
    ) -> torch.Tensor:
        """As of `ScoreFunctions`."""
        raise NotImplementedError

    def join_maps(
        self, maps: torch.Tensor, category: torch.Tensor, calibration: ScoreCalibration | None
    ) -> torch.Tensor:
        """As of `ScoreFunctions`."""
        raise NotImplementedError

    def image_scores(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        """As of `ScoreFunctions`."""
        raise NotImplementedError

    @torch.no_grad()
    def calibrate(
        self,
        images: Sequence[Any],
        statistics_images: Sequence[Any] | None = None,
        false_alarm_rate: float = 0.01,
        category: str | int | None = None,
        batch_size: int = 16,
        generator: torch.Generator | None = None,
        accelerator: Accelerator | None = None,
        leave_one_out: bool = False,
    ) -> DetectionPipeline:
        """Learns what normal looks like from good images, in one pass over them and constant memory.

        Three things stand on each other: mean and covariance of the feature residual, mean and deviation of the maps,
        its Mahalanobis distances among them, and the scores of normalised maps. The first two are taken from the same
        images, each measured by the covariance of the others; the scores from images that neither has seen, so
        thresholds and p-values hold for new images.

        Args:
            images: good images that no network was trained on, of parts of which neither training nor
                `statistics_images` show other photographs: PIL images, paths, arrays, or a column of a
                `datasets.Dataset`. Thresholds and p-values come from them.
            statistics_images: more good images, for the per-position statistics; those of training may serve. At most
                `MAX_STATISTICS_IMAGES`, evenly spread, are looked at, as their measurements wait in a temporary file,
                1 to 3 MB an image. Without them, every other of `images` does, up to as many, and the rest is left
                for the thresholds.
            false_alarm_rate: share of good parts that may raise an alarm, on average over sets of good images, in
                (0, 1); `diffad.calibration.conformal.false_alarm_bound` says what one set keeps with a confidence.
            category: which category the images are of, in a unified model; the others keep what they have.
            batch_size: images in a batch.
            generator: makes the calibration repeatable. Each image has noise of its own, whatever the batch.
            accelerator: shares the images among its processes; each ends with the same calibration.
            leave_one_out: for few images. All of `images` serve statistics and thresholds: each is scored by the
                statistics of the others alone, which are made anew for it. The time grows with the square of their
                number. A single image has statistics and no thresholds: masks, alarms and p-values stay None.

        Returns:
            The pipeline, calibrated.

        Raises:
            ValueError: too few images, or a wrong category.
        """
        if not 0.0 < false_alarm_rate < 1.0:
            raise ValueError(f"`false_alarm_rate` must lie in (0, 1), but is {false_alarm_rate}.")
        if leave_one_out:
            return self._calibrate_leaving_one_out(images, false_alarm_rate, category, batch_size, generator)
        # indices, as a slice of a data set's column would decode all of it
        if statistics_images is None:
            statistics_images = images
            for_statistics = spread(range(1, len(images), 2), MAX_STATISTICS_IMAGES)
            for_scores = sorted({*range(len(images))} - {*for_statistics})
        else:
            for_statistics = spread(range(len(statistics_images)), MAX_STATISTICS_IMAGES)
            for_scores = [*range(len(images))]
        if min(len(for_statistics), len(for_scores)) < 1:
            raise ValueError(
                f"`images` holds {len(images)} good images and `statistics_images` {len(for_statistics)}, too few to "
                "calibrate: it takes 1 of each, or 2 `images`, and deserves 100."
            )
        self._find_value_range(images, statistics_images)
        fit = self.calibration_fit(self.category_index(category), len(for_scores), false_alarm_rate, accelerator)
        for learn, part, indices in (
            (fit.add_statistics, statistics_images, for_statistics),
            (fit.add_scores, images, for_scores),
        ):
            generators = image_generators(generator, len(indices))
            for measurement in self._measurements(part, indices, fit.category, batch_size, generators, accelerator):
                learn(measurement)
        self.maybe_free_model_hooks()
        self.register_modules(calibration=fit.finish())
        return self

    def _find_value_range(self, *sets: Sequence[Any]) -> None:
        """A calibration holds for one range of images of more than 8 bits."""
        if self.config.value_range is None and (found := common_value_range(*sets)) is not None:
            warn_of_found_range(found)
            self.register_to_config(value_range=found)

    def _calibrate_leaving_one_out(
        self,
        images: Sequence[Any],
        false_alarm_rate: float,
        category: str | None,
        batch_size: int,
        generator: torch.Generator | None,
    ) -> DetectionPipeline:
        """`calibrate` of few images, whose measurements are all in memory, as (1, ...) each."""
        if not len(images):
            raise ValueError("`images` is empty: a calibration takes good images, and deserves 100.")
        self._find_value_range(images)
        index, everything, generators = (
            self.category_index(category),
            [*range(len(images))],
            image_generators(generator, len(images)),
        )
        batches = self._measurements(images, everything, index, batch_size, generators, None)
        measurements = [one for batch in batches for one in split_measurement(batch)]
        num_scores = len(images) if len(images) > 1 else 0

        def fit_without(left_out: int | None) -> CalibrationFit:
            fit = self.calibration_fit(index, num_scores, false_alarm_rate)
            for i, measurement in enumerate(measurements):
                if i != left_out:
                    fit.add_statistics(measurement)
            return fit

        fit = fit_without(None)
        for i in everything if num_scores else []:
            without = fit_without(i)
            without.add_scores(measurements[i])
            fit.take_scores(without)
        self.maybe_free_model_hooks()
        self.register_modules(calibration=fit.finish())
        return self

    def calibration_fit(
        self, category: int, num_scores: int, false_alarm_rate: float, accelerator: Accelerator | None = None
    ) -> CalibrationFit:
        """A fit of this pipeline's calibration for one category, which has seen nothing yet; arguments as there."""
        settings = {name: value for name, value in self.config.items() if name in setting_names(type(self))}
        return CalibrationFit(
            ScoreFunctions(self.score_maps, self.join_maps, self.image_scores),
            category,
            num_scores,
            false_alarm_rate,
            previous=self.calibration,
            num_categories=max(1, len(self.categories)),
            position_prior_images=self.config.position_prior_images,
            position_trust=self.config.get("position_trust", 1.0),
            accelerator=accelerator,
            precision=running_precision(self.measuring_networks, self._execution_device),
            settings=settings,
            mean_prior_images=self.mean_prior_images,
        )

    def _measurements(
        self,
        images: Sequence[Any],
        indices: Sequence[int],
        category: int,
        batch_size: int,
        generators: Sequence[torch.Generator],
        accelerator: Accelerator | None,
    ) -> Iterator[Measurement]:
        """Measurements of this process's share of the images at `indices`, batch by batch.

        Each index has a generator. Where the process has no share, measurements of no images.
        """
        mine = process_share(len(indices), accelerator)
        chosen = mine or range(1)  # whose measurement tells the shapes
        starts: Any = range(0, len(chosen), batch_size)
        for start in self.progress_bar(starts) if len(starts) > 1 else starts:
            batch = chosen[start : start + batch_size]
            sequence = ImageSequence([images[indices[i]] for i in batch], self.config.value_range)
            if sequence.found_value_range is not None:
                raise ValueError(
                    "`images` and `statistics_images` hold images of 8 bits and of more, the first ones of 8: give the "
                    "pipeline a `value_range`, such as 4095 for a camera of 12 bits."
                )
            of_category = torch.full((len(batch),), category, device=self._execution_device)
            measurement = self.measure_images(sequence, of_category, [generators[i] for i in batch])
            yield measurement if mine else empty_measurement(measurement)


def spread(indices: range, count: int) -> list[int]:
    """At most `count` of the indices, evenly spread, as images often come in order of their time or kind."""
    count = min(count, len(indices))
    return [indices[i * len(indices) // count] for i in range(count)]


def setting_names(pipeline_class: type[DetectionPipeline]) -> list[str]:
    """The configuration values of a pipeline class: its arguments with a default that are no components."""
    parameters = inspect.signature(pipeline_class.__init__).parameters.values()
    settings = [p.name for p in parameters if p.default is not inspect.Parameter.empty]
    return [name for name in settings if name not in pipeline_class._optional_components]
