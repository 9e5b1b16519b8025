"""A calibration that learns more good images without the old files (`diffad.calibration.good_images`).

A first fit and an update take the same steps, and end with the same, whatever came in which portion:

1. Each new image is measured once. Its features go into the moments, unless it is held out for the thresholds or known.
2. The channels' scale follows from the moments.
3. The kept images are measured anew: distances by the Gaussian, which knows all images, patches, scores, thresholds.
"""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from diffad.calibration.good_images import (
    GoodImages,
    calibration_digest,
    kept_batches,
    remove_others,
    to_kept_pixels,
)
from diffad.images import ImageSequence, as_size, images_to_pixel_values
from diffad.moments import FeatureMoments
from diffad.pipelines.checks import check_batch_size, check_calibration, check_good_images
from diffad.process_share import of_all_processes, process_share
from diffad.region_of_interest import hide_outside, inside_region
from diffad.scoring import Measurement, empty_measurement

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffad.pipelines.pipeline_anomaly_denoise import AnomalyDenoisePipeline


def check_updatable(pipeline: AnomalyDenoisePipeline) -> None:
    """Raises a ValueError where a pipeline cannot learn in portions."""
    if not pipeline.scores_features or not pipeline.weights["gaussian"] or pipeline.config.score_strides:
        raise ValueError(
            "Only a model of `diffad fit` learns more good images: its features have a Gaussian, and nothing of it was "
            "trained. Calibrate this one by old and new images together."
        )
    if len(pipeline.categories) > 1 or pipeline.tile_size is not None:
        raise ValueError(
            "A model of several categories or of tiles does not learn good images in portions. Fit one for each "
            "category, with `--tile-size none`, or without `--kept-images`."
        )


@torch.no_grad()
def learn_good_images(
    pipeline: AnomalyDenoisePipeline,
    images: Sequence[Any],
    good_images: GoodImages,
    false_alarm_rate: float,
    batch_size: int = 16,
    region: torch.Tensor | None = None,
    smallest_area: float = 0.0,
    accelerator: Accelerator | None = None,
) -> list[int]:
    """Calibrates a pipeline to what `good_images` holds and to more good images, which are added to it.

    Args:
        pipeline: without a denoiser; its feature extractor and its calibration are replaced.
        images: good images, each another part.
        good_images: what former calls have seen; a new one for a first fit. After an error it is of no use.
        false_alarm_rate: of the thresholds.
        batch_size: images in one pass.
        region: what counts, (1, h, w) bool, or None for all.
        smallest_area: of a region that counts.
        accelerator: whose processes share the images; all call this with the same, and end with the same.

    Returns:
        Which of the images raise an alarm by the calibration so far.

    Raises:
        ValueError: the pipeline is none of `diffad fit`, or there are too few images.
    """
    check_updatable(pipeline)
    check_good_images("images", images)
    check_batch_size(batch_size)
    size, device = as_size(pipeline.input_resolution), pipeline._execution_device
    calibration, former = pipeline.calibration, pipeline.feature_extractor
    unscaled = pipeline.share_components(type(pipeline))
    extractor = copy.deepcopy(former)
    unscaled.register_modules(feature_extractor=extractor)

    def measured(pixel_values: torch.Tensor) -> tuple[Measurement, torch.Tensor]:
        category = torch.zeros(len(pixel_values), dtype=torch.long, device=device)
        pixel_values = hide_outside(pixel_values.to(device), inside_region(region, category, size))
        return unscaled.measure_pixels(pixel_values, category, [None] * len(pixel_values)), category

    # 1. New images. Their features have no scale yet: sums of several scales would not be the same to the last digit
    extractor.channel_mean.zero_()
    extractor.channel_std.fill_(1.0)
    alarms: list[int] = []
    num_known = 0
    former_keys = set(good_images.seen)
    if good_images.moments is not None and accelerator is not None and not accelerator.is_main_process:
        num_positions, num_channels = good_images.moments.total.shape
        good_images.moments = FeatureMoments(num_positions, num_channels, device)  # the main process has the former
    mine = process_share(len(images), accelerator)
    chosen = mine or range(min(1, len(images)))  # whose features tell the shapes
    sequence = ImageSequence.of_rows(images, chosen, pipeline.value_range)
    for start in range(0, len(chosen), batch_size):
        pixel_values = images_to_pixel_values(sequence[start : start + batch_size], size)
        kept = [good_images.keep(pixels) if mine else (True, False) for pixels in to_kept_pixels(pixel_values)]
        num_known += sum(is_known for _, is_known in kept)
        measurement, category = measured(pixel_values)
        features = measurement.features  # (B, C, h, w)
        assert features is not None  # by `check_updatable`
        if calibration is not None:
            scaled = (features - former.channel_mean) / former.channel_std
            maps = pipeline.score_maps(measurement._replace(features=scaled), category, calibration)
            _, scores = pipeline.score_inside(pipeline.join_maps(maps, category, calibration), category)
            is_anomalous = (scores > calibration.image_threshold[0]).tolist()
            alarms += [chosen[start + i] for i, alarm in enumerate(is_anomalous) if alarm]
        features = features.flatten(2)  # (B, C, P)
        if good_images.moments is None:
            good_images.moments = FeatureMoments(features.shape[2], features.shape[1], device)
        good_images.moments.update(features[[not is_held_out and not is_known for is_held_out, is_known in kept]])
    good_images.num_known = num_known = sum(of_all_processes(accelerator, num_known))
    good_images.unite(accelerator, former_keys)
    alarms = sorted({i for of_process in of_all_processes(accelerator, alarms) for i in of_process})
    if good_images.num_seen < 3 or not good_images.for_thresholds:
        raise ValueError(
            f"`images`: of {len(images)} good images, a hash of their content holds {len(good_images.for_thresholds)} "
            "out for the thresholds. It takes 3 others and 1 of these: give 20 different ones at least, better 100; "
            "copies of an image go where it goes."
        )
    if num_known and (accelerator is None or accelerator.is_main_process):
        warnings.warn(
            f"{num_known} of the {len(images)} images are known already, and left out: each image counts once.",
            stacklevel=3,
        )

    # 2. The channels' scale, by all images of the statistics, to which their moments are brought
    moments = copy.deepcopy(good_images.moments)
    assert moments is not None
    # coarsely: sums in another order then give the same scale to the bit, and so the same patches, whose rounding to
    # half precision would tip over otherwise
    extractor.set_standardization(*(values.to(device) for values in moments.over_positions()))
    extractor.channel_std.copy_(extractor.channel_std.bfloat16())
    steps = (extractor.channel_mean / extractor.channel_std * 128.0).round()
    extractor.channel_mean.copy_(steps / 128.0 * extractor.channel_std)
    mean, std = (values.flatten().double() for values in (extractor.channel_mean, extractor.channel_std))
    moments.rescale(1.0 / std, -mean / std)

    # 3. Statistics and thresholds, by the kept images
    value_range = None if calibration is None else calibration.config.value_range
    fit = pipeline.calibration_fit(
        0,
        len(good_images.for_thresholds),
        false_alarm_rate,
        accelerator,
        value_range=value_range,
        smallest_area=smallest_area,
        region=region,
        feature_moments=moments,
    )
    for learn, of_kind in (
        (fit.add_statistics, good_images.for_statistics),
        (fit.add_scores, good_images.for_thresholds),
    ):
        mine = process_share(len(of_kind), accelerator)
        for pixel_values in kept_batches(of_kind, batch_size, mine or range(1)):
            measurement = measured(pixel_values)[0]
            learn(measurement if mine else empty_measurement(measurement))
    pipeline.register_modules(calibration=fit.finish(), feature_extractor=extractor)
    pipeline.calibrated_at = time.time()
    pipeline.maybe_free_model_hooks()
    return alarms


def update_calibration(
    pipeline: AnomalyDenoisePipeline,
    images: Sequence[Any],
    good_images: GoodImages,
    batch_size: int = 16,
    accelerator: Accelerator | None = None,
) -> list[int]:
    """As `AnomalyDenoisePipeline.update`."""
    check_updatable(pipeline)
    of_one = torch.zeros(1, dtype=torch.long)
    check_calibration(pipeline.calibration, of_one, pipeline.categories, pipeline.precision, pipeline.config)
    config = pipeline.calibration.config
    settings = (config.false_alarm_rate, batch_size, pipeline.region, config.smallest_area)
    return learn_good_images(pipeline, images, good_images, *settings, accelerator)


def load_good_images(pipeline: AnomalyDenoisePipeline, folder: str | os.PathLike) -> GoodImages:
    """What is kept beside a pipeline that was loaded from `folder`.

    Raises:
        ValueError: the pipeline is none of `diffad fit`, or was loaded in another precision than float32.
        FileNotFoundError: it keeps nothing, or was calibrated since by another command.
    """
    check_updatable(pipeline)
    if pipeline.calibration is None:
        raise ValueError(f"{folder} is not calibrated, so there is nothing to update. Call `pipe.calibrate`.")
    if pipeline.feature_extractor.dtype != torch.float32:  # rounded, it is not what the kept images went through
        raise ValueError(f"`pipeline` is in {pipeline.feature_extractor.dtype}: load it in float32 to update it.")
    digest = calibration_digest(pipeline.calibration, pipeline.feature_extractor)
    return GoodImages.load(folder, digest, pipeline._execution_device)


def save_updatable(pipeline: AnomalyDenoisePipeline, good_images: GoodImages | None, folder: str | os.PathLike) -> None:
    """Saves a pipeline with what it keeps; a kill at any moment leaves the old two or the new two together."""
    path = None
    if good_images is not None:
        path = good_images.save(folder, calibration_digest(pipeline.calibration, pipeline.feature_extractor))
    pipeline.save_pretrained(folder)
    remove_others(folder, path)
