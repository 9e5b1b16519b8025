"""Between images and the latents of an autoencoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from diffad.moments import MomentSums


def latent_factor(vae: Any) -> int:
    """How many times smaller an autoencoder's latents are than images."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def has_scale(vae: Any) -> bool:
    """Whether an autoencoder's configuration says what brings its latents to about unit variance."""
    return (vae.config.get("scaling_factor") or 1.0) != 1.0


def encode_latents(
    vae: Any,
    pixel_values: torch.Tensor,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> torch.Tensor:
    """Latents of about unit variance, (N, 3, H, W) to (N, C, H / f, W / f) float32; the mode of a Gaussian's.

    Args:
        vae: any autoencoder of diffusers that makes latents of images.
        pixel_values: as it takes them.
        mean, std: of each channel, (C,); None takes the autoencoder's own shift and scale.
    """
    encoded = vae.encode(pixel_values.to(vae.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    offset, scale = _offset_and_scale(vae, latents.device, mean, std)
    return (latents.float() - offset) / scale


def decode_latents(
    vae: Any,
    latents: torch.Tensor,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> torch.Tensor:
    """The inverse of `encode_latents`, (N, C, h, w) to (N, 3, f h, f w) float32, not clamped; f is `latent_factor`."""
    offset, scale = _offset_and_scale(vae, latents.device, mean, std)
    return vae.decode((latents * scale + offset).to(vae.dtype), return_dict=False)[0].float()


def latent_statistics(vae: Any, batches: Iterable[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of the latents, over images and places; for `encode_latents`.

    Args:
        vae: the autoencoder.
        batches: images (N, 3, H, W) as it takes them.
    """
    moments = MomentSums()
    as_they_are = [0.0] * vae.config.latent_channels, [1.0] * vae.config.latent_channels
    for pixel_values in batches:
        latents = encode_latents(vae, pixel_values, *as_they_are)
        moments.update(latents.movedim(1, -1).flatten(0, 2))  # (N * h * w, C)
    std = moments.variance().sqrt()
    std = std.clamp(min=1e-3 * float(std.max()) + 1e-12)  # a channel that never varies is not blown up
    return moments.mean().tolist(), std.tolist()


def _offset_and_scale(
    vae: Any, device: torch.device, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[float | torch.Tensor, float | torch.Tensor]:
    """What is taken off latents, and what they are divided by: numbers, or (1, C, 1, 1) each."""
    if mean is None or std is None:
        return vae.config.get("shift_factor") or 0.0, 1.0 / (vae.config.get("scaling_factor") or 1.0)
    offset, scale = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
    return offset, scale
