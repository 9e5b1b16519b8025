#!/usr/bin/env python
"""Keeps what features of good images are like: a detector in a minute or two, with nothing trained.

    accelerate launch training/fit.py --train_data_dir DIR --output_dir runs/parts

A Gaussian at each position (Defard et al., "PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and
Localization", 2021) and patches to measure distances from (Roth et al., "Towards Total Recall in Industrial Anomaly
Detection", 2022), as an `AnomalyDenoisePipeline` without a denoiser: the same call, calibration, commands and card. Any
number of processes share the images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset, concatenate_datasets

from diffad import AnomalyDenoisePipeline, TimmFeatureExtractor
from diffad.calibration.feature_gaussian import feature_grid
from diffad.calibration.good_images import FEWEST_KEPT, GoodImages
from diffad.cores import limit_threads
from diffad.data.checks import dataset_sizes
from diffad.images import ImageSequence, Side, as_side, as_size, images_to_pixel_values, size_of_ratio
from diffad.model_card import remove_reports
from diffad.models.feature_extractor import LITE0_BACKBONE
from diffad.models.gaussian_feature_model import one_size
from diffad.pipelines.detection import MOST_LEFT_OUT
from diffad.pipelines.feature_maps import FEATURE_WEIGHTS, chosen_contrast
from diffad.pipelines.updating import learn_good_images, save_updatable
from diffad.region_of_interest import hide_outside, inside_region
from diffad.training.arguments import (
    ABOVE_ZERO,
    COUNT,
    POSITIVE,
    RATE,
    SEED,
    FlagParser,
    OneSideOrTwo,
    add_resolution,
    add_source_arguments,
    add_tiles,
    check_source,
    local_path,
)
from diffad.training.data import (
    HELD_OUT_FRACTION,
    check_tile_size,
    choose_tile_size,
    common_ratio,
    hold_out,
    load_region,
    read_good_images,
)
from diffad.training.feature_sizes import (
    DEFAULT_SIDE,
    add_feature_image_size,
    choose_feature_sizes,
    describe_sizes,
    extractor_image_size,
    side_multiple,
)
from diffad.training.finish import save_examples, save_record
from diffad.training.loop import held_output_dir

STANDARDIZATION_IMAGES = 32  # some 80,000 positions, which tell a channel's mean and deviation


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = FlagParser(description="Keeps what features of good images are like: a detector with nothing trained.")
    data = parser.add_argument_group("data")
    add_source_arguments(data, with_region=True)
    data.add_argument(
        "--streaming",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="read the data once as a stream, and keep only its good images on disk",
    )
    data.add_argument("--value_range", type=ABOVE_ZERO, help="of images of more than 8 bits, 4095 for a camera of 12")
    data.add_argument(
        "--calibration_fraction",
        type=RATE,
        help=f"share of good images held out for thresholds (default: each of up to {MOST_LEFT_OUT} of a category is "
        f"left out in turn; {HELD_OUT_FRACTION} of more, of tiles, with --part_pattern or --kept_images)",
    )
    data.add_argument("--part_pattern", metavar="REGEX", help="finds the part in an image's path, see train_ddpm.py")
    data.add_argument(
        "--kept_images",
        type=COUNT,
        default=0,
        metavar="K",
        help="good images that the model keeps for the statistics, and as many for the thresholds, so that `diffad "
        "update` can learn more; 0 for none, which then cannot (0)",
    )
    data.add_argument("--false_alarm_rate", type=RATE, default=0.01, help="of good parts that may alarm (0.01)")
    features = parser.add_argument_group("features")
    features.add_argument("--backbone", default=LITE0_BACKBONE, help=f"timm model ({LITE0_BACKBONE})")
    features.add_argument(
        "--backbone_weights", help="'timm', 'random' or a file (default: installed package, then timm)"
    )
    features.add_argument("--feature_strides", type=POSITIVE, nargs="+", default=[2, 4, 8, 16], help="(2 4 8 16)")
    features.add_argument(
        "--feature_layers", type=COUNT, nargs="+", help="the backbone's layers by timm's index, instead of strides"
    )
    add_resolution(features, "as many pixels as 224 x 224, at the ratio of the images where they share one")
    add_feature_image_size(features)
    features.add_argument(
        "--feature_resolution",
        type=POSITIVE,
        nargs="+",
        metavar=("ROWS", "COLUMNS"),
        action=OneSideOrTwo,
        help="positions that have a Gaussian (as 90 MB allow)",
    )
    add_tiles(parser)
    parser.add_argument(
        "--output_dir", type=local_path, default="runs/model", help="where the pipeline goes (%(default)s)"
    )
    parser.add_argument("--batch_size", type=POSITIVE, default=16, help="images in one pass (16)")
    parser.add_argument("--seed", type=SEED, default=0, help="of which images are held out (0)")
    parser.add_argument("--num_example_images", type=COUNT, default=2, help="good images saved as pictures (2)")
    args = parser.parse_args(argv)
    check_source(parser, args)
    if 0 < args.kept_images < FEWEST_KEPT:
        parser.error(f"--kept_images must be 0 or at least {FEWEST_KEPT}, but is {args.kept_images}")
    if args.kept_images and args.part_pattern is not None:
        parser.error("--kept_images: a hash says which images are held out, and would tear parts of --part_pattern.")
    return args


def divide(
    images: Dataset, pipeline: AnomalyDenoisePipeline, args: argparse.Namespace
) -> tuple[Dataset, Dataset | None]:
    """One category's good images for the statistics, and those for the thresholds.

    None where the former are left out in turn, or where a hash divides them later (`--kept_images`).
    """
    may_leave_out = args.part_pattern is None and args.calibration_fraction is None
    if args.kept_images or (may_leave_out and pipeline.leaves_each_out(len(images))):
        return images, None
    training, held_out, _ = hold_out(images, args)
    return training, held_out


def standardise_channels(
    extractor: TimmFeatureExtractor,
    good: Dataset,
    args: argparse.Namespace,
    categories: list[str],
    device: torch.device,
) -> None:
    """By some of the statistics' images, spread over all of them."""
    chosen = np.linspace(0, len(good) - 1, min(len(good), STANDARDIZATION_IMAGES)).astype(int).tolist()
    size, region = as_size(extractor.input_resolution(args.resolution)), load_region(args, categories)
    grid = args.feature_resolution or feature_grid((size[0] // 4, size[1] // 4), extractor.num_channels)

    def batches() -> Iterator[torch.Tensor]:
        for start in range(0, len(chosen), args.batch_size):
            rows = [good[i] for i in chosen[start : start + args.batch_size]]
            images = ImageSequence([row["image"] for row in rows], args.value_range)
            number = torch.tensor([categories.index(row["category"]) for row in rows])
            pixel_values = images_to_pixel_values(images, size)
            yield hide_outside(pixel_values, inside_region(region, number, size)).to(device)

    extractor.fit_standardization(batches(), as_size(grid))


def calibrate_category(
    pipeline: AnomalyDenoisePipeline,
    good: Dataset,
    held_out: Dataset | None,
    name: str | None,
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> str:
    """Fits one category's Gaussian and thresholds; says from which images, and what the thresholds vouch for."""
    options: dict[str, Any] = {
        "false_alarm_rate": args.false_alarm_rate,
        "category": name,
        "batch_size": args.batch_size,
        "accelerator": accelerator,
        "roi": args.roi,
    }
    if held_out is None:
        pipeline.calibrate(good["image"], leave_one_out=True, **options)
        how = ", each left out in turn for the thresholds" if pipeline.has_thresholds else ""
        return f"{len(good)} good images{how}; {describe_rate(pipeline, name)}"
    pipeline.calibrate(held_out["image"], good["image"], **options)
    how = f"{len(good)} good images, and {len(held_out)} held out for the thresholds"
    return f"{how}; {describe_rate(pipeline, name)}"


def calibrate_updatable(
    pipeline: AnomalyDenoisePipeline, good: Dataset, args: argparse.Namespace, accelerator: Accelerator
) -> tuple[GoodImages, str]:
    """Fits Gaussian and thresholds so that `diffad update` can go on; says from which images."""
    good_images = GoodImages(args.kept_images, args.calibration_fraction or HELD_OUT_FRACTION)
    region = load_region(args, good["category"][:1])
    settings = (args.false_alarm_rate, args.batch_size, region)
    learn_good_images(pipeline, good["image"], good_images, *settings, accelerator=accelerator)
    held_out, of_statistics = len(good_images.for_thresholds), len(good_images.for_statistics)
    how = f"{good_images.num_seen} good images ({of_statistics} kept), and {held_out} kept for the thresholds"
    return good_images, how


def describe_rate(pipeline: AnomalyDenoisePipeline, name: str | None) -> str:
    """What the thresholds vouch for."""
    if not pipeline.has_thresholds:
        return "so few vouch for no false-alarm rate: masks, alarms and p-values stay None"
    return pipeline.calibration.describe_rate(pipeline.category_index(name))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    limit_threads()
    accelerator = Accelerator(mixed_precision="no")
    started, good = time.time(), read_good_images(args)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)  # not where the data cannot be read
    with held_output_dir(args, accelerator):
        run(args, good, started, accelerator)
    accelerator.end_training()


def run(args: argparse.Namespace, good: Dataset, started: float, accelerator: Accelerator) -> None:
    """Fits, calibrates and saves, in `--output_dir`, which is held."""
    set_seed(args.seed)  # of random weights

    # 1. What images look like, and the backbone
    of_image = np.asarray(good["category"])
    categories = sorted(set(of_image.tolist()))
    sizes = dataset_sizes(good)
    large, multi_scale = args.tile_size == "auto", args.feature_image_size == "auto"
    multiple = side_multiple(args.backbone, args.feature_strides, args.feature_layers)
    if args.resolution is None:
        given = [] if args.feature_image_size in (None, "auto") else args.feature_image_size
        side = min([DEFAULT_SIDE, *given[-1:]])  # maps need no more pixels than the backbone sees
        args.resolution = as_side(size_of_ratio(side, common_ratio(sizes), multiple))
    if args.tile_size not in (None, "auto"):
        check_tile_size(args.tile_size, sizes)
    if args.feature_image_size == "auto":
        args.feature_image_size = choose_feature_sizes(args, sizes, args.resolution, good["category"], multiple)
    image_size: int | Sequence[Side] = one_size(args.resolution)
    if args.feature_image_size is not None:
        image_size = extractor_image_size(args.feature_image_size, args.resolution, multiple)
    extractor = TimmFeatureExtractor.from_backbone(
        args.backbone, args.feature_strides, image_size, args.backbone_weights, args.feature_layers
    )
    if args.tile_size == "auto":
        args.tile_size = choose_tile_size(sizes, extractor.input_resolution(args.resolution), good["category"])
    if len(extractor.image_sizes) > 1:
        accelerator.print(describe_sizes(extractor))
    if large and args.tile_size is not None:
        accelerator.print(
            f"The images are large: tiles of {' x '.join(map(str, as_size(args.tile_size)))} px, and the whole"
            f"{', at one size' if multi_scale else ''}."
        )

    # 2. A pipeline without a denoiser
    pipeline = AnomalyDenoisePipeline(
        None,
        None,
        extractor,
        position_trust=0.0,
        weights=FEATURE_WEIGHTS,
        contrast=chosen_contrast(args.tile_size),
        processing_resolution=args.resolution,
        feature_resolution=args.feature_resolution,
        categories=categories if len(categories) > 1 else None,
        value_range=args.value_range,
        tile_size=args.tile_size,
        tile_overlap=args.tile_overlap,
    ).to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)

    # 3. The channels' scale, and category by category the Gaussian and the thresholds: by images of their own
    divided = [divide(good.select(np.flatnonzero(of_image == category)), pipeline, args) for category in categories]
    if not args.kept_images:
        of_statistics = concatenate_datasets([statistics for statistics, _ in divided])
        standardise_channels(extractor, of_statistics, args, categories, accelerator.device)
    good_images = None
    for category, (statistics, held_out) in zip(categories, divided, strict=True):
        name = category if len(categories) > 1 else None
        if args.kept_images:
            good_images, how = calibrate_updatable(pipeline, statistics, args, accelerator)
            how = f"{how}; {describe_rate(pipeline, name)}"
        else:
            how = calibrate_category(pipeline, statistics, held_out, name, args, accelerator)
        accelerator.print(f"{category}: {how}.")

    # 4. Save
    if accelerator.is_main_process:
        remove_reports(args.output_dir)  # they speak of the model that was here before
        save_updatable(pipeline, good_images, args.output_dir)
        save_examples(pipeline, good, args)
        save_record(args, {"categories": categories, "seconds": round(time.time() - started, 1)})
        print(f"Saved to {args.output_dir}, {time.time() - started:.0f} s.")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
