#!/usr/bin/env python
"""Trains AnomalyDenoise (Lu et al., "Removing Anomalies as Noises for Industrial Defect Localization", ICCV 2023).

    accelerate launch training/train_ddpm.py --train_data_dir DIR --output_dir runs/mine

Good images in, a calibrated `AnomalyDenoisePipeline` out. Several categories in DIR train one class-conditional model.
Without a --preset, a --config or a pipeline to start from, the flags of configs/automatic.yaml hold.

This file is long so that a run stands in one place: its flags, its networks, its loss, its steps.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import concatenate_datasets
from diffusers import DDPMScheduler
from torch.utils.data import DataLoader

from diffad import AnomalyDenoisePipeline, DenoisingUNet2DModel, TimmFeatureExtractor
from diffad.data.checks import dataset_sizes
from diffad.images import as_side, as_size, images_to_pixel_values, resize_images, size_of_ratio
from diffad.likelihood import kl_divergence_map, predicted_clean_sample, variational_bound
from diffad.models.denoising_unet_2d import DENOISING_UNET_PRESETS
from diffad.pipelines.checks import scored_layers
from diffad.pipelines.detection import spread
from diffad.pipelines.feature_maps import FEATURE_WEIGHTS, chosen_contrast
from diffad.reading.unicode_forms import same_name
from diffad.tiling import tile_height_and_width
from diffad.training.arguments import (
    ABOVE_ZERO,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    FlagParser,
    add_shared_arguments,
    add_tiles,
    given_flags,
    parse_arguments,
    warn_of_overruled,
)
from diffad.training.cached_encodings import CachedEncodings, choose_flips, flip_pairs
from diffad.training.checkpoints import FROZEN_NAME, frozen_digest
from diffad.training.choice import choose_settings, describe_choice
from diffad.training.data import (
    ResizedImages,
    augment,
    check_tile_size,
    choose_tile_size,
    common_ratio,
    create_data_loader,
    held_out_digest,
    hold_out_for_choice,
    load_good_images,
    load_pictures,
    load_region,
    spread_batches,
)
from diffad.training.duration import steps_in
from diffad.training.early_stopping import same_loss
from diffad.training.feature_sizes import (
    DEFAULT_SIDE,
    add_feature_image_size,
    choose_feature_sizes,
    describe_sizes,
    extractor_image_size,
    side_multiple,
)
from diffad.training.finish import finish
from diffad.training.loop import create_accelerator, held_output_dir, train
from diffad.training.pretrained import check_method
from diffad.visualization import heat_map, save_rows, to_uint8

HELD_OUT_IMAGES = 32  # with one noise each: on the same every time, few show a trend
# flags that say what networks are like
OF_NETWORKS = {"preset", "resolution", "backbone", "backbone_weights", "feature_strides", "feature_layers"}
OF_NETWORKS |= {"feature_image_size", "feature_resolution", "beta_schedule"}
OF_LOSS = {"feature_loss_weight", "timestep_exponent"}
# what --choose sets
CHOSEN = {"alpha", "feature_sigma", "kl_sigma", "contrast", "position_trust"}
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
AUTOMATIC = Path(__file__).parent / "configs" / "automatic.yaml"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = FlagParser(description="Trains AnomalyDenoise on good images.")
    add_shared_arguments(parser, any_ratio=True, calibrates=True)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--preset",
        choices=sorted(DENOISING_UNET_PRESETS),
        help="architecture (that of configs/automatic.yaml, and its other flags)",
    )
    model.add_argument("--pretrained_model_name_or_path", metavar="DIR", help="start from this pipeline's weights")
    model.add_argument("--backbone", default="tf_efficientnet_lite0", help="timm model of the features")
    model.add_argument("--backbone_weights", help="'timm', 'random' or a file (default: installed package, then timm)")
    model.add_argument("--feature_strides", type=POSITIVE, nargs="+", default=[2, 4, 8, 16], help="(2 4 8 16)")
    model.add_argument(
        "--feature_layers", type=COUNT, nargs="+", help="the backbone's layers by timm's index, instead of strides"
    )
    add_feature_image_size(model)
    model.add_argument(
        "--cache_features",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compute the features of every image, and of each of its flips, once and keep them on disk: 2 bytes a "
        "channel and position, 0.2 MB an image for cpu-64 and two sizes",
    )
    model.add_argument(
        "--feature_resolution", type=POSITIVE, help="side of the predicted features (default: the preset's)"
    )
    model.add_argument("--beta_schedule", choices=BETA_SCHEDULES, default="linear", help="diffusers' name (linear)")

    model.add_argument(
        "--minutes",
        type=ABOVE_ZERO,
        help="of the whole run, instead of --max_train_steps: a few steps are timed at the start",
    )

    loss = parser.add_argument_group("loss")
    loss.add_argument("--feature_loss_weight", type=NOT_NEGATIVE, default=1.0, help="of eq. 10 (1)")
    loss.add_argument(
        "--timestep_exponent",
        type=NOT_NEGATIVE,
        default=1.0,
        help="t = 1000 u^p: above 1, small timesteps come up more (1)",
    )

    add_tiles(model)

    score = parser.add_argument_group("score")
    score.add_argument("--timesteps", type=COUNT, nargs="+", default=[5, 50, 100], help="noise levels (5 50 100)")
    score.add_argument(
        "--choose",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="choose weights of the maps and their smoothing by synthetic defects on good images held out for it",
    )
    score.add_argument("--position_trust", type=SHARE, default=1.0, help="of statistics at a position (1)")
    score.add_argument("--alpha", type=SHARE, default=0.5, help="weight of the KL in eq. 11 (0.5)")
    score.add_argument("--kl_sigma", type=NOT_NEGATIVE, default=2.0, help="smoothing of the KL maps, pixels (2)")
    score.add_argument("--feature_sigma", type=NOT_NEGATIVE, default=4.0, help="of the feature error, pixels (4)")
    score.add_argument("--score_strides", type=POSITIVE, nargs="+", help="strides whose feature error counts (all)")
    score.add_argument(
        "--score_fraction", type=SHARE, default=0.0, help="share of top pixels averaged (0: the maximum)"
    )
    score.add_argument("--contrast", type=NOT_NEGATIVE, default=0.0, help="share taken off of the way to the peak (0)")
    argv = [*(sys.argv[1:] if argv is None else argv)]
    early, _ = parser.parse_known_args(argv)
    if early.preset is None and early.config is None and early.pretrained_model_name_or_path is None:
        argv = ["--config", str(AUTOMATIC), *argv]
    args = parse_arguments(parser, argv)
    args.preset = args.preset or "paper-256"
    # a number of steps given by hand wins over the minutes of automatic.yaml, and minutes win over the steps of a
    # --config; argparse takes beginnings of a flag
    if args.minutes is not None and any(one.startswith(("--max_t", "--num_t")) for one in argv):
        args.minutes = None
    if args.minutes is not None:
        args.num_train_epochs = None
    if args.choose:
        why = "--choose chooses in their place, unless good images are too few. Add --no-choose to keep what you gave"
        warn_of_overruled(given_flags(argv, CHOSEN), why)
    if args.pretrained_model_name_or_path:
        warn_of_overruled(given_flags(argv, OF_NETWORKS))
    # what else only the end of the run would find
    if any(not 0 <= t < 1000 for t in args.timesteps):
        parser.error("--timesteps must lie in [0, 999]")
    if args.cache_features and args.rotation_degrees:
        parser.error("--cache_features holds no rotated images: add --rotation_degrees 0")
    return args


def create_components(
    args: argparse.Namespace, categories: list[str], ratio: float = 1.0
) -> tuple[DenoisingUNet2DModel, DDPMScheduler, TimmFeatureExtractor, list[str]]:
    """The networks, and the categories' names in the order of their labels.

    `args.resolution` becomes the side, or height and width, at which the denoiser sees images.

    Args:
        args: of the run.
        categories: of the data.
        ratio: of the images, height over width, which counts where `args` names no resolution.
    """
    if args.pretrained_model_name_or_path:
        check_method(args.pretrained_model_name_or_path, "--pretrained_model_name_or_path", "AnomalyDenoisePipeline")
        trained = AnomalyDenoisePipeline.from_pretrained(args.pretrained_model_name_or_path)
        if trained.unet is None:
            raise ValueError(
                f"--pretrained_model_name_or_path: {args.pretrained_model_name_or_path} has no denoiser to go on with. "
                "Give a pipeline that train_ddpm.py or `diffad train` has saved, or leave it out."
            )
        args.resolution = trained.processing_resolution
        names = trained_categories(args, trained, categories)
        for network in (trained.unet, trained.feature_extractor):
            network.to(memory_format=torch.channels_last)
        return trained.unet, trained.scheduler, trained.feature_extractor, names
    preset = dict(DENOISING_UNET_PRESETS[args.preset])
    multiple = 2 ** (len(preset["block_out_channels"]) - 1)  # the denoiser halves so often
    if isinstance(args.resolution, int):  # the features keep their share of the resolution
        preset["feature_resolution"] = preset["feature_resolution"] * args.resolution // preset["sample_size"]
        preset["sample_size"] = args.resolution
    elif args.resolution is None:
        args.resolution = as_side(size_of_ratio(preset["sample_size"], ratio, multiple))
    if any(side % multiple for side in as_size(args.resolution)):
        raise ValueError(
            f"--resolution must be a multiple of {multiple} for --preset {args.preset}, but is {args.resolution}."
        )
    image_size = None
    if args.feature_image_size:
        multiple = side_multiple(args.backbone, args.feature_strides, args.feature_layers)
        image_size = extractor_image_size(args.feature_image_size, args.resolution, multiple)
    extractor = TimmFeatureExtractor.from_backbone(
        args.backbone,
        args.feature_strides,
        image_size,
        args.backbone_weights,
        args.feature_layers,
    )
    if args.feature_resolution:
        preset["feature_resolution"] = args.feature_resolution
    unet = DenoisingUNet2DModel(
        **preset,
        feature_channels=extractor.num_channels,
        num_class_embeds=len(categories) if len(categories) > 1 else None,
    )
    scheduler = DDPMScheduler(1000, beta_schedule=args.beta_schedule, variance_type="learned_range")
    return unet, scheduler, extractor, categories


def trained_categories(args: argparse.Namespace, trained: AnomalyDenoisePipeline, categories: list[str]) -> list[str]:
    """The names of a trained pipeline's labels, which stay; a model of one category is trained on any other one.

    Raises:
        ValueError: it does not know a category of the data, or they lack one where settings are chosen for all.
    """
    path, names = args.pretrained_model_name_or_path, trained.categories
    if len(names) < 2 and len(categories) > 1:
        raise ValueError(
            f"--pretrained_model_name_or_path: {path} is a model of one category, and the data have "
            f"{', '.join(categories)}. Choose one with --category, or train a model of all from scratch."
        )
    if len(names) < 2:
        return categories
    unknown = [name for name in categories if same_name(name, names) is None]
    if unknown:
        raise ValueError(
            f"--pretrained_model_name_or_path: {path} does not know {', '.join(unknown)}: it knows {', '.join(names)}. "
            "Choose among these with --category, or train a model of all from scratch."
        )
    if args.choose and len(categories) < len(names):
        raise ValueError(
            f"--choose takes images of all categories that {path} knows, {', '.join(names)}, and the data have only "
            f"{', '.join(categories)}. Give all of them, or leave --choose out."
        )
    return names


def create_pipeline(
    unet: DenoisingUNet2DModel,
    scheduler: DDPMScheduler,
    extractor: TimmFeatureExtractor,
    categories: list[str],
    args: argparse.Namespace,
) -> AnomalyDenoisePipeline:
    """The pipeline of trained networks, ready to run."""
    for network in (unet, extractor):
        # half-precision convolutions then take two thirds of the time, on CPUs as on tensor cores
        network.eval().to(memory_format=torch.channels_last)
    return AnomalyDenoisePipeline(
        unet=unet,
        scheduler=scheduler,
        feature_extractor=extractor,
        timesteps=args.timesteps,
        alpha=args.alpha,
        kl_sigma=args.kl_sigma,
        feature_sigma=args.feature_sigma,
        score_fraction=args.score_fraction,
        position_trust=args.position_trust,
        contrast=args.contrast,
        score_strides=args.score_strides,
        processing_resolution=args.resolution,
        tile_size=args.tile_size,
        tile_overlap=args.tile_overlap,
        categories=categories,
        value_range=args.value_range,
    )


def denoising_loss(
    unet: torch.nn.Module,
    scheduler: DDPMScheduler,
    clean: torch.Tensor,
    features: torch.Tensor,
    class_labels: torch.Tensor | None,
    generator: torch.Generator,
    timestep_exponent: float,
) -> dict[str, torch.Tensor]:
    """The three terms of the loss for a batch, as scalars.

    Args:
        unet: a `DenoisingUNet2DModel`, wrapped or not.
        scheduler: the forward process.
        clean: x_0, (N, 3, H, W) in [-1, 1].
        features: its standardised features, (N, C, h, w).
        class_labels: (N,) for a unified model.
        generator: of timesteps and noise.
        timestep_exponent: p of t = T u^p.
    """
    steps = scheduler.config.num_train_timesteps
    uniform = torch.rand(len(clean), generator=generator, device=clean.device)
    timesteps = (steps * uniform**timestep_exponent).long().clamp(max=steps - 1)  # (N,)
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    noisy = scheduler.add_noise(clean, noise, timesteps)

    prediction = unet(noisy, timesteps, class_labels=class_labels)
    epsilon, variance = prediction.sample.float().chunk(2, dim=1)  # (N, 3, H, W) each

    noise_loss = F.mse_loss(epsilon, noise)  # eq. 4
    # eqs. 5-8: the bound trains the variance alone, so the mean's gradient stops (Improved DDPM, section 3.1, with its
    # weight for a loss over all T steps)
    bound = variational_bound(
        scheduler, torch.cat([epsilon.detach(), variance], dim=1), noisy, clean, timesteps, clip_sample=False
    )
    variance_loss = bound.mean() * steps / 1000.0
    feature_loss = F.mse_loss(prediction.features.float(), features.float())  # eq. 10
    return {"noise": noise_loss, "variance": variance_loss, "feature": feature_loss}


def save_validation_pictures(
    unet: DenoisingUNet2DModel,
    scheduler: DDPMScheduler,
    extractor: TimmFeatureExtractor,
    images: list[torch.Tensor],
    size: tuple[int, int],
    device: torch.device,
    path: Path,
) -> None:
    """One row an image, at `size`: itself, noised to t = 100, the predicted clean image, KL, feature error."""
    pixel_values = images_to_pixel_values(images, as_size(extractor.input_resolution(size))).to(device)
    clean = resize_images(pixel_values, size)
    timesteps = torch.full((len(clean),), 100, device=device)
    noise = torch.randn(clean.shape, generator=torch.Generator(device).manual_seed(0), device=device)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    labels = torch.zeros(len(clean), dtype=torch.long, device=device) if unet.config.num_class_embeds else None
    prediction = unet(noisy, timesteps, class_labels=labels)
    output = prediction.sample.float()
    predicted = predicted_clean_sample(scheduler, output[:, : clean.shape[1]], noisy, timesteps)
    kl = kl_divergence_map(scheduler, output, noisy, clean, timesteps).mean(dim=1)
    features = extractor(pixel_values, prediction.features.shape[-2:])
    error = (features - prediction.features.float()).square().mean(dim=1)
    rows = [
        [to_uint8(clean[i]), to_uint8(noisy[i]), to_uint8(predicted[i]), heat_map(kl[i]), heat_map(error[i])]
        for i in range(len(clean))
    ]
    save_rows(rows, path, ["image", "noised, t = 100", "predicted", "KL", "feature error"])


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = create_accelerator(args)
    with held_output_dir(args, accelerator):
        run(args, accelerator)
    accelerator.end_training()


def run(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Trains, calibrates and saves, in `--output_dir`, which is held."""
    started = time.time()

    # 1. Good images, and some held out for the thresholds
    training, held_out, categories = load_good_images(args)
    training, unseen = hold_out_for_choice(training, args) if args.choose else (training, None)
    if args.choose and unseen is None:
        accelerator.print("Too few good images or parts to hold out any for a choice: `weights` stay as they are.")
    if unseen is not None:
        args.held_out_digest = held_out_digest(args, held_out, unseen)
    sizes = dataset_sizes(training)
    height, width = as_size(args.resolution or 1)
    ratio = common_ratio(sizes) if args.resolution is None else height / width
    if args.feature_image_size == "auto":
        multiple = side_multiple(args.backbone, args.feature_strides, args.feature_layers)
        one_size = as_side(size_of_ratio(DEFAULT_SIDE, ratio, multiple))
        sides = choose_feature_sizes(args, sizes, one_size, training["category"], multiple)
        args.feature_image_size = sides or [DEFAULT_SIDE]
    unet, scheduler, extractor, names = create_components(args, categories, ratio)
    frozen = frozen_digest(scheduler, extractor)
    labels = [same_name(name, categories) or name for name in names]  # as the data spell them
    scored_layers(args.score_strides, extractor)  # the pipeline checks it as well, but after the training
    size = as_size(args.resolution)
    stride = unet.config.sample_size // unet.config.feature_resolution
    feature_size = size[0] // stride, size[1] // stride
    seen = as_size(extractor.input_resolution(size))
    if args.tile_size == "auto":
        args.tile_size = choose_tile_size(sizes, seen, training["category"])
    elif args.tile_size is not None:
        check_tile_size(args.tile_size, sizes)
    tiles, region = tile_height_and_width(args.tile_size, seen), load_region(args, labels, categories)
    images = ResizedImages(training, seen, labels, args.value_range, tiles, args.tile_overlap, region)
    accelerator.print(
        f"{len(training)} good images of {', '.join(categories)} for training, {len(held_out)} held out; "
        f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f}M parameters, {size[0]} x {size[1]} px"
        + ("" if tiles is None else f", of the whole and of tiles of {tiles[0]} x {tiles[1]}")
    )
    if len(extractor.image_sizes) > 1:
        accelerator.print(describe_sizes(extractor))

    # 2. Features, standardised so that a few channels of large activations do not make up the loss
    extractor.to(accelerator.device)
    if not args.pretrained_model_name_or_path:  # 256 images settle a channel's mean and deviation
        extractor.fit_standardization(spread_batches(images, 256, accelerator.device), feature_size)

    @torch.no_grad()
    def encode(pixel_values: torch.Tensor) -> torch.Tensor:
        """Features (N, C, h, w) of images in [-1, 1]."""
        with accelerator.autocast():
            return extractor(pixel_values.to(accelerator.device), feature_size)

    pairs = flip_pairs(args)
    flips = torch.tensor(pairs, device=accelerator.device)  # (F, 2)

    def with_features(images: ResizedImages) -> ResizedImages | CachedEncodings:
        if not args.cache_features:
            return images
        return CachedEncodings(images, encode, pairs, (extractor.num_channels, *feature_size), torch.float16)

    # 3. Train
    def batch_loss(model: torch.nn.Module, batch: Any, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        pixels, *cached, class_index = batch  # (N, 3, R, R), features of each flip (N, F, C, h, w), (N,)
        if args.cache_features:
            pixel_values, features = choose_flips(pixels, cached[0], flips, generator)
        else:
            pixel_values = augment(pixels, args, generator)
            features = encode(pixel_values)
        clean = resize_images(pixel_values, size)
        class_labels = class_index if unet.config.num_class_embeds else None
        parts = denoising_loss(model, scheduler, clean, features, class_labels, generator, args.timestep_exponent)
        return parts["noise"] + parts["variance"] + args.feature_loss_weight * parts["feature"], parts

    def save_pictures(path: Path) -> None:
        save_validation_pictures(unet, scheduler, extractor, pictures, size, accelerator.device, path)

    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    data_loader = create_data_loader(with_features(images), args)
    wanted = args.validation_steps and accelerator.is_main_process
    pictures = load_pictures(held_out, 4, args.value_range) if wanted else []
    held_out_loss = None
    if unseen is not None:  # of whole images
        few = unseen.select(spread(range(len(unseen)), HELD_OUT_IMAGES))
        others = with_features(ResizedImages(few, seen, labels, args.value_range, region=region))
        held_out_loss = same_loss(batch_loss, list(DataLoader(others, args.train_batch_size)), accelerator)
    if args.minutes is not None:
        args.max_train_steps = steps_in(args, time.time() - started, unet, batch_loss, data_loader, accelerator)
    of_weights = OF_LOSS if args.pretrained_model_name_or_path else OF_LOSS | OF_NETWORKS
    settings = {**{name: getattr(args, name) for name in sorted(of_weights)}, FROZEN_NAME: frozen}
    record = train(unet, batch_loss, data_loader, args, accelerator, save_pictures, held_out_loss, settings)

    # 4. Calibrate on good images and save the pipeline
    pipeline = create_pipeline(unet, scheduler, extractor, names, args)
    pipeline.set_progress_bar_config(disable=not accelerator.is_local_main_process)
    if unseen is not None:
        pipeline.register_to_config(contrast=chosen_contrast(args.tile_size))
        ranking = choose_settings(pipeline, training, unseen, labels, args.seed, accelerator, region)
        if ranking:
            chosen = {name: ranking[0][name] for name in ("weights", "kl_sigma", "feature_sigma")}
            accelerator.print(describe_choice(ranking))
            record["choice"] = ranking
        else:
            chosen = {"weights": FEATURE_WEIGHTS, "kl_sigma": 1.0, "feature_sigma": 1.0}
            accelerator.print("No defect could be drawn in the region of interest: weights are those of diffad fit.")
        pipeline.register_to_config(**chosen, position_trust=0.0)  # as the choice normalises
        training = concatenate_datasets([training, unseen])  # whose statistics they may serve
    finish(pipeline, training, held_out, categories, args, record, accelerator)
    accelerator.print(f"Saved a calibrated pipeline to {args.output_dir} after {time.time() - started:.0f} s.")


if __name__ == "__main__":
    main()
