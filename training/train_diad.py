#!/usr/bin/env python
"""Trains DiAD (He et al., "A Diffusion-based Framework for Multi-class Anomaly Detection", AAAI 2024).

    accelerate launch training/train_diad.py --train_data_dir DIR --output_dir runs/diad \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --vae_path runs/autoencoder

Good images in, a calibrated `DiADPipeline` out. Several categories in DIR train one model, which is not told which it
sees. The semantic-guided network and the denoiser's decoder are trained, the denoiser's encoder and the autoencoder
stay frozen. From scratch (`--preset`) there is no trained encoder to keep, so the whole denoiser is trained.

This file is long so that a run stands in one place: its flags, its networks, its loss, its steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffad import DiADPipeline, SemanticGuidedNetwork, TimmFeatureExtractor
from diffad.data.synthetic_defects import SMALLEST_SIDE
from diffad.files import write_text_whole
from diffad.images import IMAGENET_MEAN, IMAGENET_STD, denormalize_images, images_to_pixel_values, normalize_images
from diffad.latents import encode_latents, has_scale, latent_factor, latent_statistics
from diffad.models.prompt_embedding import PromptEmbedding
from diffad.models.semantic_guided_network import FUSIONS, GUIDANCE_OUTPUTS
from diffad.pipelines.feature_maps import FEATURE_WEIGHTS
from diffad.training.arguments import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    FlagParser,
    add_diad_arguments,
    add_shared_arguments,
    given_flags,
    number,
    parse_arguments,
    warn_of_overruled,
)
from diffad.training.cached_encodings import CachedEncodings, choose_flips, flip_pairs
from diffad.training.checkpoints import FROZEN_NAME, frozen_digest, kept_beside
from diffad.training.data import (
    ResizedImages,
    augment,
    create_data_loader,
    load_good_images,
    load_pictures,
    load_region,
    spread_batches,
)
from diffad.training.diad_presets import DIAD_PRESETS, SCHEDULER
from diffad.training.drawn_defects import draw_defects
from diffad.training.finish import finish
from diffad.training.loop import create_accelerator, held_output_dir, train
from diffad.training.pretrained import check_method
from diffad.training.sharded_networks import is_sharded, whole_network
from diffad.training.train_autoencoder import load_autoencoder
from diffad.visualization import heat_map, save_rows, to_uint8

STATISTICS_NAME = "latent_statistics.json"
OF_NETWORKS = {"guidance_outputs", "fusion", "zero_convolutions", "backbone", "backbone_weights"}
OF_NETWORKS |= {"feature_strides", "feature_layers", "feature_image_size"}
# flags that the weights depend on, beside those of the loop and of the guidance
OF_WEIGHTS = (
    "preset",
    "resolution",
    "image_mean",
    "image_std",
    "train_whole_unet",
    "zero_convolutions",
    "defect_share",
)
STATISTICS_IMAGES = 64  # spread over all categories, which tell the latents' mean and deviation


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = FlagParser(description="Trains DiAD on good images.")
    add_shared_arguments(parser, calibrates=True)
    add_diad_arguments(parser)
    parser.set_defaults(  # the paper's, for MVTec-AD
        output_dir="runs/diad",
        rotation_degrees=0.0,
        train_batch_size=12,
        gradient_accumulation_steps=4,
        max_train_steps=75_000,
        learning_rate=1e-5,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        adam_weight_decay=0.01,
        image_mean=None,
        image_std=None,
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_model_name_or_path",
        metavar="ID",
        help="start from this Stable Diffusion, or from this DiADPipeline (folder or Hub id)",
    )
    model.add_argument("--revision", help="of the pretrained model on the Hub: a branch, tag or commit")
    model.add_argument("--variant", help="of the pretrained model's files, such as fp16")
    model.add_argument("--preset", choices=sorted(DIAD_PRESETS), help="train this architecture from scratch")
    model.add_argument("--vae_path", metavar="ID", help="autoencoder (default: the pretrained model's)")
    model.add_argument(
        "--train_whole_unet",
        action=argparse.BooleanOptionalAction,
        help="train the denoiser's encoder too (default: with --preset only, where it was never trained)",
    )
    model.add_argument(
        "--guidance_outputs",
        nargs="+",
        choices=(*GUIDANCE_OUTPUTS, "none"),
        default=["middle", "sgdb4"],
        help="what the guidance adds to the denoiser; none for no guidance (middle sgdb4)",
    )
    model.add_argument(
        "--fusion", choices=(*FUSIONS, "none"), default="instance_norm_silu", help="SFF block (instance_norm_silu)"
    )
    model.add_argument(
        "--zero_convolutions",
        action=argparse.BooleanOptionalAction,
        help="start as if without guidance (default: but with --preset, where it would take long to be learnt)",
    )
    model.add_argument(
        "--defect_share",
        type=SHARE,
        default=0.0,
        help="of the guiding images that get a drawn defect, which is to be left out (0)",
    )
    model.add_argument(
        "--cache_latents",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="encode every image, and each of its flips, once and not each time",
    )

    score = parser.add_argument_group("score")
    score.add_argument("--num_inference_steps", type=POSITIVE, default=10, help="of the reverse process (10)")
    score.add_argument("--strength", type=number(), default=1.0, help="below 1, start from the noised image (1)")
    score.add_argument(
        "--distance",
        choices=("cosine", "mahalanobis"),
        default="cosine",
        help="of image and reconstruction: the paper's, or one that knows how good images vary (cosine)",
    )
    score.add_argument(
        "--feature_weight",
        type=SHARE,
        default=0.0,
        help="of the features' own maps, those of training/fit.py, beside the reconstruction's (0)",
    )
    score.add_argument("--score_strides", type=POSITIVE, nargs="+", help="strides that are compared (all)")
    score.add_argument("--sigma", type=NOT_NEGATIVE, default=5.0, help="smoothing of the map, pixels (5)")
    score.add_argument(
        "--pooling_size", type=POSITIVE, default=8, help="window of the score's average pooling, pixels (8)"
    )
    score.add_argument("--pooling_rounds", type=COUNT, default=8, help="how often the score pools (8)")
    score.add_argument("--position_trust", type=SHARE, default=1.0, help="of statistics at a position (1)")
    score.add_argument("--contrast", type=NOT_NEGATIVE, default=0.0, help="share taken off of the way to the peak (0)")
    argv = [*(sys.argv[1:] if argv is None else argv)]
    args = parse_arguments(parser, argv)
    if (args.preset is None) == (args.pretrained_model_name_or_path is None):
        parser.error("give one of --pretrained_model_name_or_path and --preset")
    if args.preset and (args.revision or args.variant):
        parser.error("--revision and --variant are of --pretrained_model_name_or_path: leave them out with --preset")
    if args.preset and not args.vae_path:
        parser.error("--preset needs --vae_path: train an autoencoder with train_autoencoder.py first")
    if args.feature_weight == 1.0:
        parser.error("--feature_weight must be below 1: features alone are what training/fit.py fits, without training")
    if args.cache_latents and args.rotation_degrees:
        parser.error("--cache_latents holds no rotated images: add --rotation_degrees 0")
    if "none" in args.guidance_outputs and len(args.guidance_outputs) > 1:
        parser.error("--guidance_outputs none goes with no other")
    if args.guidance_outputs == ["none"] and args.defect_share:
        parser.error("--defect_share draws on what guides, and --guidance_outputs none guides by nothing: make it 0")
    if args.train_whole_unet is None:
        args.train_whole_unet = args.preset is not None
    if args.zero_convolutions is None:
        args.zero_convolutions = args.preset is None
    if not args.zero_convolutions and args.preset is None:
        parser.error("--no-zero_convolutions is for a denoiser trained from scratch, with --preset: leave it out")
    if args.pretrained_model_name_or_path and (given := given_flags(argv, OF_NETWORKS)) and is_trained(args):
        warn_of_overruled(given)
    return args


def is_trained(args: argparse.Namespace) -> bool:
    """Whether `--pretrained_model_name_or_path` is a `DiADPipeline`, which has all networks, and no Stable Diffusion.

    Raises:
        OSError: there is no such folder or repository.
        ValueError: it holds another pipeline of this package.
    """
    flag = "--pretrained_model_name_or_path"
    return check_method(args.pretrained_model_name_or_path, flag, "DiADPipeline", args.revision) == "DiADPipeline"


def create_components(args: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's networks and scheduler, new or pretrained."""
    guidance = None if args.guidance_outputs == ["none"] else tuple(args.guidance_outputs)
    fusion = None if args.fusion == "none" else args.fusion
    components: dict[str, Any] = {}
    if args.preset:
        preset = DIAD_PRESETS[args.preset]
        components["vae"] = load_autoencoder(args.vae_path)
        channels = components["vae"].config.latent_channels
        unet = UNet2DConditionModel(**preset["unet"], in_channels=channels, out_channels=channels)
        stack = preset["conditioning_embedding_out_channels"]
        guide = guidance and SemanticGuidedNetwork.from_unet(
            unet, guidance, fusion, conditioning_embedding_out_channels=stack
        )
        if guide and not args.zero_convolutions:
            guide.initialize_beside_untrained()
        components |= {
            "unet": unet,
            "sg_network": guide,
            "scheduler": DDIMScheduler(**{**SCHEDULER, **preset["scheduler"]}),
            # zeros, as the preset's denoiser does not attend to a prompt
            "prompt_embedding": PromptEmbedding(length=1, width=unet.config.cross_attention_dim),
        }
    else:
        name, chosen = args.pretrained_model_name_or_path, {"revision": args.revision}
        files = {**chosen, "variant": args.variant}
        if is_trained(args):
            trained = DiADPipeline.from_pretrained(name, **files)
            components = {
                part: getattr(trained, part) for part in ("vae", "unet", "sg_network", "scheduler", "prompt_embedding")
            }
            if trained.feature_extractor is not None:
                components["feature_extractor"] = trained.feature_extractor
            args.resolution = args.resolution or trained.processing_resolution
            given = load_autoencoder(args.vae_path) if args.vae_path else trained.vae
            if same_weights(given, trained.vae):
                # the colours that its autoencoder takes, and the latents that its denoiser knows
                components |= {part: trained.config[part] for part in ("latents_mean", "latents_std")}
                args.image_mean = args.image_mean or trained.config.image_mean
                args.image_std = args.image_std or trained.config.image_std
            else:
                components["vae"] = given
                warnings.warn(
                    f"--vae_path: {args.vae_path} is not the autoencoder of {name}, whose latents_mean, latents_std, "
                    "image_mean and image_std are left out: they are taken anew. Leave --vae_path out to keep them.",
                    stacklevel=2,
                )
        else:
            unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", **files)
            tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **chosen)
            text_encoder = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", dtype=torch.float32, **files)
            components = {
                "latents_mean": None,  # its denoiser knows the latents as they are
                "latents_std": None,
                "unet": unet,
                "sg_network": guidance and SemanticGuidedNetwork.from_unet(unet, guidance, fusion),
                "scheduler": DDIMScheduler.from_pretrained(name, subfolder="scheduler", **chosen),
                "prompt_embedding": PromptEmbedding.from_text_encoder(tokenizer, text_encoder),
            }
    if "vae" not in components:
        components["vae"] = (
            load_autoencoder(args.vae_path)
            if args.vae_path
            else load_autoencoder(
                args.pretrained_model_name_or_path, args.revision, args.variant, "--pretrained_model_name_or_path"
            )
        )
    # the paper fine-tunes Stable Diffusion's autoencoder on ImageNet's colours; all others take [-1, 1]
    fine_tuned = isinstance(components["vae"], AutoencoderKL)
    args.image_mean = args.image_mean or list(IMAGENET_MEAN if fine_tuned else (0.5, 0.5, 0.5))
    args.image_std = args.image_std or list(IMAGENET_STD if fine_tuned else (0.5, 0.5, 0.5))
    if "feature_extractor" not in components:
        components["feature_extractor"] = TimmFeatureExtractor.from_backbone(
            args.backbone,
            args.feature_strides,
            args.feature_image_size,
            args.backbone_weights,
            args.feature_layers,
        )
    return components


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have the same weights, by the same names."""
    state, others = one.state_dict(), other.state_dict()
    return state.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in state.items())


def joined_weights(feature_weight: float) -> dict[str, float] | None:
    """Of the reconstruction and of the features' own maps, in the ratio of `training/fit.py`."""
    if not feature_weight:
        return None
    own = {name: feature_weight * share for name, share in FEATURE_WEIGHTS.items()}
    return {"reconstruction": 1.0 - feature_weight, **own}


def create_pipeline(components: dict[str, Any], categories: list[str], args: argparse.Namespace) -> DiADPipeline:
    """The pipeline, not yet trained, with the frozen networks frozen.

    Raises:
        ValueError: `--resolution` does not fit the autoencoder, or other flags the networks or the scheduler.
    """
    multiple, most = latent_factor(components["vae"]), components["scheduler"].config.num_train_timesteps
    if args.resolution % multiple:
        raise ValueError(f"--resolution must be a multiple of {multiple} for this autoencoder, not {args.resolution}.")
    if args.num_inference_steps > most:
        raise ValueError(f"--num_inference_steps must be at most {most} here, but is {args.num_inference_steps}.")
    pipeline = DiADPipeline(
        **components,
        num_inference_steps=args.num_inference_steps,
        strength=args.strength,
        distance=args.distance,
        weights=joined_weights(args.feature_weight),
        score_strides=args.score_strides,
        sigma=args.sigma,
        pooling_size=args.pooling_size,
        pooling_rounds=args.pooling_rounds,
        contrast=args.contrast,
        position_trust=args.position_trust,
        processing_resolution=args.resolution,
        categories=categories,
        value_range=args.value_range,
        image_mean=args.image_mean,
        image_std=args.image_std,
    )
    if args.defect_share and pipeline.sg_network is None:
        raise ValueError("--defect_share draws on what guides, and this pipeline has no `sg_network`. Leave it out.")
    if args.defect_share and args.resolution < SMALLEST_SIDE:
        raise ValueError(f"--defect_share needs a --resolution of {SMALLEST_SIDE} or more, not {args.resolution}.")
    pipeline.set_progress_bar_config(disable=True)
    for frozen in (pipeline.vae, pipeline.prompt_embedding, pipeline.feature_extractor):
        frozen.requires_grad_(False).eval()
    return pipeline


@torch.no_grad()
def find_latent_statistics(
    pipeline: DiADPipeline, images: ResizedImages, args: argparse.Namespace, accelerator: Accelerator
) -> tuple[list[float], list[float]]:
    """Mean and deviation of the latents' channels over good images; a resumed run has those that it began with."""
    if (kept := kept_beside(args, STATISTICS_NAME)) is not None:
        known = json.loads(kept.read_text(encoding="utf-8"))
        mean, std = known["mean"], known["std"]
    else:
        batches = spread_batches(images, STATISTICS_IMAGES, accelerator.device)
        normalized = (normalize_images(batch, args.image_mean, args.image_std) for batch in batches)
        mean, std = latent_statistics(pipeline.vae, normalized)
    if accelerator.is_main_process:
        write_text_whole(Path(args.output_dir, STATISTICS_NAME), json.dumps({"mean": mean, "std": std}) + "\n")
    return mean, std


class GuidedDenoiser(nn.Module):
    """Both trained networks in one forward, so that several processes exchange every gradient."""

    def __init__(self, unet: UNet2DConditionModel, sg_network: SemanticGuidedNetwork | None):
        super().__init__()
        self.unet = unet
        self.sg_network = sg_network

    def forward(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pixel_values: torch.Tensor,
    ) -> torch.Tensor:
        """Epsilon or velocity, (N, C, h, w), for noisy latents of the same shape, guided by images (N, 3, H, W)."""
        residuals = {}
        if self.sg_network is not None:
            down, middle = self.sg_network(
                noisy_latents, timesteps, prompt_embeds, pixel_values=pixel_values, return_dict=False
            )
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.unet(noisy_latents, timesteps, prompt_embeds, **residuals).sample


def choose_trained(unet: UNet2DConditionModel, sg_network: SemanticGuidedNetwork | None, whole_unet: bool) -> None:
    """Freezes all but the guidance and the denoiser's decoder; with `whole_unet`, nothing of them."""
    unet.requires_grad_(whole_unet)
    for part in (unet.up_blocks, unet.conv_norm_out, unet.conv_out):
        part.requires_grad_(True)
    if sg_network is not None:
        sg_network.requires_grad_(True)


def training_scheduler(scheduler: Any) -> DDIMScheduler:
    """The forward process of a pipeline's scheduler. Its own is for inference: Euler's, say, scales noisy latents.

    Raises:
        ValueError: the denoiser predicts what is not trained here.
    """
    prediction = scheduler.config.get("prediction_type")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"--pretrained_model_name_or_path: its {type(scheduler).__name__} has the prediction_type {prediction!r}, "
            "and only epsilon and v_prediction are trained here. Start from another pipeline, or from a --preset."
        )
    return DDIMScheduler.from_config(scheduler.config)


def noise_loss(
    model: nn.Module,
    scheduler: DDIMScheduler,
    latents: torch.Tensor,
    pixel_values: torch.Tensor,
    prompt_embeds: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of epsilon, or of velocity, at uniform timesteps, a scalar.

    Args:
        model: a `GuidedDenoiser`, wrapped or not.
        scheduler: the forward process.
        latents: of clean images, (N, C, h, w).
        pixel_values: the images, normalised, (N, 3, H, W).
        prompt_embeds: the empty prompt's embedding, (1, L, D).
        generator: of timesteps and noise.
    """
    count, device = len(latents), latents.device
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (count,), generator=generator, device=device)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    prediction = model(noisy, timesteps, prompt_embeds.expand(count, -1, -1), pixel_values)
    return F.mse_loss(prediction.float(), target)


def save_validation_pictures(pipeline: DiADPipeline, images: list[torch.Tensor], path: Path) -> None:
    """One row an image: itself, what the autoencoder alone makes of it, its reconstruction, the map that is raw yet."""
    resolution, device = pipeline.processing_resolution, pipeline.device
    statistics = (pipeline.config.image_mean, pipeline.config.image_std)
    originals = images_to_pixel_values(images, (resolution, resolution)).to(device)
    decoded = denormalize_images(
        pipeline.decode(pipeline.encode(normalize_images(originals, *statistics))), *statistics
    )
    restored = pipeline.reconstruct(originals)
    category = torch.zeros(len(images), dtype=torch.long, device=device)  # without a calibration, any
    maps = pipeline.score_maps(pipeline.compare(originals, restored), category, None)
    maps = pipeline.join_maps(maps, category, None)
    rows = [
        [to_uint8(originals[i]), to_uint8(decoded[i]), to_uint8(restored[i]), heat_map(maps[i])]
        for i in range(len(images))
    ]
    save_rows(rows, path, ["image", "autoencoder", "reconstruction", "anomaly map"])


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = create_accelerator(args, can_shard=True)
    with held_output_dir(args, accelerator):
        run(args, accelerator)
    accelerator.end_training()


def run(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Trains, calibrates and saves, in `--output_dir`, which is held."""
    started = time.time()

    # 1. Networks; good images, and some held out for the thresholds
    components = create_components(args)
    if args.resolution is None:
        args.resolution = DIAD_PRESETS[args.preset]["resolution"] if args.preset else 256
    training, held_out, categories = load_good_images(args)
    forward_process = training_scheduler(components["scheduler"])
    pipeline = create_pipeline(components, categories, args)
    pipeline.to(accelerator.device)
    choose_trained(pipeline.unet, pipeline.sg_network, args.train_whole_unet)
    model = GuidedDenoiser(pipeline.unet, pipeline.sg_network)
    if not is_sharded(accelerator):  # which takes no other order of a weight's numbers
        # convolutions over latents as small as these take two thirds of the time, on CPUs as on tensor cores
        model.to(memory_format=torch.channels_last)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    accelerator.print(
        f"{len(training)} good images of {', '.join(categories)} for training, {len(held_out)} held out; "
        f"{sum(p.numel() for p in trained) / 1e6:.1f}M of {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M "
        f"parameters are trained, {args.resolution} px"
    )

    # 2. Images, and their latents where they do not change
    @torch.no_grad()
    def encode(images: torch.Tensor) -> torch.Tensor:
        """Latents (N, C, h, w) of images in [-1, 1]."""
        with accelerator.autocast():
            pixel_values = normalize_images(images.to(accelerator.device), args.image_mean, args.image_std)
            return encode_latents(pipeline.vae, pixel_values, pipeline.config.latents_mean, pipeline.config.latents_std)

    region = load_region(args, categories)
    images = ResizedImages(training, args.resolution, categories, args.value_range, region=region)
    if "latents_mean" not in components and not has_scale(pipeline.vae):  # the denoiser knows no latents of it yet
        mean, std = find_latent_statistics(pipeline, images, args, accelerator)
        pipeline.register_to_config(latents_mean=mean, latents_std=std)
    if args.feature_weight:  # a few channels of large activations would make up most of a distance
        batches = spread_batches(images, STATISTICS_IMAGES, accelerator.device)
        pipeline.feature_extractor.fit_standardization(batches, pipeline.feature_resolution)
    pairs = flip_pairs(args)
    flips = torch.tensor(pairs, device=accelerator.device)  # (F, 2)
    examples: ResizedImages | CachedEncodings = images
    if args.cache_latents:
        side = args.resolution // pipeline.size_multiple
        examples = CachedEncodings(images, encode, pairs, (pipeline.vae.config.latent_channels, side, side))

    # 3. Train
    prompt_embeds = pipeline.prompt_embedding()

    def batch_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        pixels, *cached, _ = batch  # (N, 3, R, R), latents of each flip (N, F, C, h, w), (N,)
        if args.cache_latents:
            augmented, latents = choose_flips(pixels, cached[0], flips, generator)
        else:
            augmented = augment(pixels, args, generator)
            latents = encode(augmented)
        guiding = draw_defects(augmented, args.defect_share, generator)
        pixel_values = normalize_images(guiding, args.image_mean, args.image_std)
        loss = noise_loss(model, forward_process, latents, pixel_values, prompt_embeds, generator)
        return loss, {"noise": loss}

    def save_pictures(path: Path) -> None:
        save_validation_pictures(pipeline, pictures, path)

    if args.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
        if model.sg_network is not None:
            model.sg_network.enable_gradient_checkpointing()
    wanted = args.validation_steps and accelerator.is_main_process
    pictures = load_pictures(held_out, 4, args.value_range) if wanted else []
    settings = {name: getattr(args, name) for name in OF_WEIGHTS}
    guidance = {} if pipeline.sg_network is None else pipeline.sg_network.config
    settings |= {name: guidance.get(name) for name in ("guidance_outputs", "fusion")}
    settings[FROZEN_NAME] = frozen_digest(forward_process, pipeline.vae)  # no loss has the feature extractor
    data_loader = create_data_loader(examples, args)
    record = train(model, batch_loss, data_loader, args, accelerator, save_pictures, None, settings)

    if is_sharded(accelerator):
        guide = model.sg_network and whole_network(SemanticGuidedNetwork, model.sg_network)
        pipeline.register_modules(unet=whole_network(UNet2DConditionModel, model.unet), sg_network=guide)

    # 4. Calibrate on good images and save the pipeline
    finish(pipeline, training, held_out, categories, args, record, accelerator)
    accelerator.print(f"Saved a calibrated pipeline to {args.output_dir} after {time.time() - started:.0f} s.")


if __name__ == "__main__":
    main()
