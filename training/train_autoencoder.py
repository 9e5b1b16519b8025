#!/usr/bin/env python
"""Trains DiAD's autoencoder (He et al., "A Diffusion-based Framework for Multi-class Anomaly Detection", AAAI 2024).

    accelerate launch training/train_autoencoder.py --train_data_dir DIR --output_dir runs/autoencoder \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5

Good images in, an `AutoencoderKL` out, for `train_diad.py --vae_path`. With the same data, seed,
--calibration_fraction and --part_pattern, both scripts hold out the same images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import reduce
from datasets import Dataset
from diffusers import AutoencoderKL
from torch import nn

import diffad
from diffad import TimmFeatureExtractor
from diffad.images import denormalize_images, images_to_pixel_values, images_to_tensors, normalize_images
from diffad.latents import encode_latents
from diffad.pipelines.saving import save_whole
from diffad.pipelines.sharing import push_autoencoder
from diffad.registration import COMPONENTS
from diffad.training.arguments import (
    NOT_NEGATIVE,
    FlagParser,
    add_diad_arguments,
    add_shared_arguments,
    parse_arguments,
)
from diffad.training.data import (
    ResizedImages,
    augment,
    create_data_loader,
    load_good_images,
    load_pictures,
    spread_batches,
)
from diffad.training.finish import save_record, told_how_to_upload
from diffad.training.loop import create_accelerator, held_output_dir, train
from diffad.training.pretrained import check_there, pipeline_class
from diffad.visualization import heat_map, save_rows, to_uint8

AUTOENCODER_PRESETS: dict[str, dict[str, Any]] = {
    # 8 times smaller, like Stable Diffusion's, but 40 times lighter: minutes on two CPU cores
    "cpu-128": {
        "sample_size": 128,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (16, 32, 64, 128),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "mid_block_add_attention": False,
    },
}

# flags that the weights depend on, beside those of the loop
OF_LOSS = ("preset", "resolution", "image_mean", "image_std", "reconstruction_loss", "kl_weight", "perceptual_weight")
OF_PERCEPTUAL_LOSS = ["perceptual_loss", "backbone", "backbone_weights", "feature_strides", "feature_layers"]
OF_PERCEPTUAL_LOSS += ["feature_image_size"]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = FlagParser(description="Trains DiAD's autoencoder on good images.")
    add_shared_arguments(parser)
    add_diad_arguments(parser)
    parser.set_defaults(output_dir="runs/autoencoder")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_model_name_or_path",
        metavar="ID",
        help="fine-tune this AutoencoderKL, or this pipeline's (folder or Hub id)",
    )
    model.add_argument("--revision", help="of the pretrained model on the Hub: a branch, tag or commit")
    model.add_argument("--variant", help="of the pretrained model's files, such as fp16")
    model.add_argument("--preset", choices=sorted(AUTOENCODER_PRESETS), help="train this architecture from scratch")

    loss = parser.add_argument_group("loss")
    loss.add_argument("--reconstruction_loss", choices=("l1", "l2"), default="l1", help="of normalised pixels (l1)")
    loss.add_argument(
        "--kl_weight", type=NOT_NEGATIVE, default=1e-6, help="of the latents' KL, per value of the image (1e-6)"
    )
    loss.add_argument("--perceptual_weight", type=NOT_NEGATIVE, default=0.0, help="of the features' distance (0)")
    loss.add_argument(
        "--perceptual_loss",
        choices=("cosine", "l2"),
        default="cosine",
        help="the anomaly map's cosine distance, or the squared error of standardised features (cosine)",
    )
    args = parse_arguments(parser, argv)
    if (args.preset is None) == (args.pretrained_model_name_or_path is None):
        parser.error("give one of --pretrained_model_name_or_path and --preset")
    return args


def load_autoencoder(
    name_or_path: str, revision: str | None = None, variant: str | None = None, flag: str = "--vae_path"
) -> Any:
    """An autoencoder of diffusers or of this package, or the one in the `vae` folder of a pipeline.

    Raises:
        OSError: there is none, said with the name of the flag that gives it.
        ValueError: what is there is no autoencoder.
    """
    check_there(name_or_path, flag)
    options: dict[str, Any] = {"revision": revision}
    try:
        config = AutoencoderKL.load_config(name_or_path, **options)
    except OSError:  # no config.json at the top: a pipeline
        options["subfolder"] = "vae"
        try:
            config = AutoencoderKL.load_config(name_or_path, **options)
        except OSError as error:
            what = "no autoencoder (neither config.json nor vae/config.json there)"
            if not Path(name_or_path).is_dir():
                what = f"no autoencoder that the Hub gives ({error})"
            elif Path(name_or_path, "model_index.json").is_file():
                what = f"a pipeline of the class {pipeline_class(name_or_path, flag)}, which has no autoencoder"
            raise FileNotFoundError(
                f"{flag}: {name_or_path} holds {what}. Give what train_autoencoder.py has saved, or a pipeline of "
                "latent diffusion."
            ) from error
    name = config.get("_class_name", "")
    known = getattr(diffad if name in COMPONENTS else diffusers, name, None)
    if not name.startswith("Autoencoder") or known is None:
        kind = name or "model of no class"
        raise ValueError(f"{flag}: {name_or_path} holds a {kind}, and no autoencoder of diffusers.")
    return known.from_pretrained(name_or_path, variant=variant, **options)


class Autoencoding(nn.Module):
    """Encodes, samples and decodes in one forward, so that several processes exchange every gradient."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pixel_values: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstructions (N, 3, H, W), and the KL of the latents' Gaussian from the standard one, (N,) in nats."""
        posterior = self.vae.encode(pixel_values).latent_dist
        return self.vae.decode(posterior.sample(generator)).sample, posterior.kl()


def perceptual_distance(
    extractor: TimmFeatureExtractor, images: torch.Tensor, reconstruction: torch.Tensor, kind: str
) -> torch.Tensor:
    """How far a reconstruction's features are from the image's, a scalar; both (N, 3, R, R) in [-1, 1]."""
    if kind == "cosine":  # as in the anomaly map (He et al., eqs. 9-10)
        with torch.no_grad():
            layers = extractor.layers(images)
        distances = [
            1.0 - F.cosine_similarity(layer.float(), other.float(), dim=1).mean()
            for layer, other in zip(layers, extractor.layers(reconstruction), strict=True)
        ]
        return torch.stack(distances).sum()
    size = (images.shape[-1] // extractor.config.strides[0],) * 2
    with torch.no_grad():
        features = extractor(images, size)
    return F.mse_loss(extractor(reconstruction, size).float(), features.float())


def reconstruction_losses(
    autoencoding: nn.Module,
    extractor: TimmFeatureExtractor | None,
    images: torch.Tensor,
    generator: torch.Generator,
    args: argparse.Namespace,
) -> dict[str, torch.Tensor]:
    """The terms of the loss without their weights, as scalars, for images (N, 3, R, R) in [-1, 1].

    The KL counts per value of the image, as in latent diffusion (Rombach et al., CVPR 2022, appendix G).
    """
    pixel_values = normalize_images(images, args.image_mean, args.image_std)
    reconstruction, kl = autoencoding(pixel_values, generator)
    distance = F.l1_loss if args.reconstruction_loss == "l1" else F.mse_loss
    losses = {
        "reconstruction": distance(reconstruction.float(), pixel_values),
        "kl": kl.float().mean() / pixel_values[0].numel(),
    }
    if extractor is not None:
        restored = denormalize_images(reconstruction.float(), args.image_mean, args.image_std)
        losses["perceptual"] = perceptual_distance(extractor, images, restored, args.perceptual_loss)
    return losses


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, batches: Iterable[torch.Tensor]) -> float:
    """What makes the latents' standard deviation 1, in one pass over batches of normalised images (N, 3, R, R).

    Every process brings its own batches and gets the same result.
    """
    count, total, total_of_squares = 0.0, 0.0, 0.0
    for pixel_values in batches:
        # on the CPU, as not every device has float64
        latents = encode_latents(vae, pixel_values).cpu().double() / vae.config.scaling_factor
        count += latents.numel()
        total += float(latents.sum())
        total_of_squares += float(latents.square().sum())
    count, total, total_of_squares = sum_over_processes([count, total, total_of_squares])
    return (total_of_squares / count - (total / count) ** 2) ** -0.5


@torch.no_grad()
def autoencode(
    vae: AutoencoderKL, images: list[torch.Tensor], args: argparse.Namespace, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images at the training's resolution, and as they come back from the latents' means, (N, 3, R, R), [-1, 1]."""
    originals = images_to_pixel_values(images, (args.resolution, args.resolution)).to(device)
    pixel_values = normalize_images(originals, args.image_mean, args.image_std)
    decoded = vae.decode(vae.encode(pixel_values).latent_dist.mode()).sample.float()
    return originals, denormalize_images(decoded, args.image_mean, args.image_std).clamp(-1.0, 1.0)


def held_out_error(vae: AutoencoderKL, held_out: Dataset, args: argparse.Namespace, device: torch.device) -> float:
    """Mean absolute error over held-out images; 1 is from black to white. The processes share the batches."""
    state, total = PartialState(), 0.0
    for start in range(0, len(held_out), 16)[state.process_index :: state.num_processes]:
        rows = [held_out[i]["image"] for i in range(start, min(start + 16, len(held_out)))]
        originals, restored = autoencode(vae, images_to_tensors(rows, value_range=args.value_range), args, device)
        total += float((originals - restored).abs().mean()) * len(rows) / 2.0
    return sum_over_processes([total])[0] / len(held_out)


def sum_over_processes(values: list[float]) -> list[float]:
    """Each value's sum over all processes, in float64."""
    state = PartialState()
    if state.num_processes == 1:
        return values
    return reduce(torch.tensor(values, dtype=torch.float64, device=state.device), "sum").tolist()


def save_validation_pictures(
    vae: AutoencoderKL, images: list[torch.Tensor], args: argparse.Namespace, device: torch.device, path: Path
) -> None:
    """One row an image: itself, its reconstruction, and the distance between them."""
    originals, restored = autoencode(vae, images, args, device)
    rows = [
        [to_uint8(original), to_uint8(one), heat_map((original - one).abs().mean(dim=0))]
        for original, one in zip(originals, restored, strict=True)
    ]
    save_rows(rows, path, ["image", "reconstruction", "difference"])


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = create_accelerator(args)
    with held_output_dir(args, accelerator):
        run(args, accelerator)
    accelerator.end_training()


def run(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Trains and saves, in `--output_dir`, which is held."""
    started = time.time()

    # 1. The autoencoder, good images, and some held out
    if args.preset:
        vae = AutoencoderKL(**AUTOENCODER_PRESETS[args.preset])
        args.resolution = args.resolution or vae.config.sample_size
    else:
        vae = load_autoencoder(
            args.pretrained_model_name_or_path, args.revision, args.variant, "--pretrained_model_name_or_path"
        )
        if not isinstance(vae, AutoencoderKL):
            raise ValueError(
                f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path} holds a {type(vae).__name__}, "
                "and only an AutoencoderKL is fine-tuned here. Give it to train_diad.py as it is, by --vae_path."
            )
        args.resolution = args.resolution or 256
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if args.resolution % factor:
        raise ValueError(f"--resolution must be a multiple of {factor} for this autoencoder, but is {args.resolution}.")
    training, held_out, categories = load_good_images(args)
    images = ResizedImages(training, args.resolution, categories, args.value_range)
    accelerator.print(
        f"{len(training)} good images of {', '.join(categories)} for training, {len(held_out)} held out; "
        f"{sum(p.numel() for p in vae.parameters()) / 1e6:.1f}M parameters, {args.resolution} px"
    )

    # 2. The features of the perceptual loss
    extractor = None
    if args.perceptual_weight:
        extractor = TimmFeatureExtractor.from_backbone(
            args.backbone,
            args.feature_strides,
            args.feature_image_size,
            args.backbone_weights,
            args.feature_layers,
        ).to(accelerator.device)
        if args.perceptual_loss == "l2":
            feature_size = (args.resolution // extractor.config.strides[0],) * 2
            extractor.fit_standardization(spread_batches(images, 256, accelerator.device), feature_size)

    # 3. Train
    weights = {"reconstruction": 1.0, "kl": args.kl_weight, "perceptual": args.perceptual_weight}

    def batch_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        pixels, _ = batch  # (N, 3, R, R) uint8, (N,)
        augmented = augment(pixels, args, generator)
        with accelerator.autocast():
            parts = reconstruction_losses(model, extractor, augmented, generator, args)
        return sum(weights[name] * value for name, value in parts.items()), parts

    def save_pictures(path: Path) -> None:
        save_validation_pictures(vae, pictures, args, accelerator.device, path)

    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    pictures = (
        load_pictures(held_out, 4, args.value_range) if args.validation_steps and accelerator.is_main_process else []
    )
    data_loader = create_data_loader(images, args)
    of_weights = [*OF_LOSS, *(OF_PERCEPTUAL_LOSS if extractor is not None else ())]
    settings = {name: getattr(args, name) for name in of_weights}
    record = train(Autoencoding(vae), batch_loss, data_loader, args, accelerator, save_pictures, None, settings)

    # 4. Scale the latents of a new autoencoder, and save it
    with accelerator.autocast():
        if args.preset:
            batches = spread_batches(images, 512, accelerator.device, shared=True)
            normalized = (normalize_images(batch, args.image_mean, args.image_std) for batch in batches)
            vae.register_to_config(scaling_factor=latent_scale(vae, normalized))
        error = held_out_error(vae, held_out, args, accelerator.device)
    if accelerator.is_main_process:
        with save_whole(args.output_dir) as unfinished:
            vae.save_pretrained(unfinished)
        save_record(args, {"categories": categories, **record, "held_out_l1": round(error, 6)})
    accelerator.wait_for_everyone()  # for what is saved; an upload takes longer than a collective may
    accelerator.print(
        f"Saved an autoencoder to {args.output_dir} after {time.time() - started:.0f} s; on held-out images its "
        f"reconstructions are off by {error:.4f} of the range from black to white."
    )
    if args.push_to_hub and accelerator.is_main_process:
        folder, repository = str(args.output_dir), args.hub_model_id
        with told_how_to_upload(
            "The autoencoder is saved; `diffad.pipelines.sharing.push_autoencoder(AutoencoderKL.from_pretrained("
            f"{folder!r}), {folder!r}, {repository!r})` uploads it."
        ):
            push_autoencoder(vae, folder, repository, args.hub_token)


if __name__ == "__main__":
    main()
