"""Between images and the latents of an autoencoder."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, AutoencoderTiny


def latent_factor(vae: AutoencoderKL | AutoencoderTiny) -> int:
    """How many times smaller an autoencoder's latents are than images."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def encode_latents(vae: AutoencoderKL | AutoencoderTiny, pixel_values: torch.Tensor) -> torch.Tensor:
    """Latents of about unit variance, (N, 3, H, W) to (N, C, H / f, W / f) float32; the mode of a Gaussian's."""
    encoded = vae.encode(pixel_values.to(vae.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return (latents.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def decode_latents(vae: AutoencoderKL | AutoencoderTiny, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode_latents`, (N, C, h, w) to (N, 3, f h, f w) float32, not clamped; f is `latent_factor`."""
    latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
