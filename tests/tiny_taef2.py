"""A small autoencoder of TAEF2's kind, and its weights as they are published."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from diffad.models.autoencoder_taef2 import AutoencoderTAEF2


def tiny_taef2(levels: int = 3, latent_channels: int = 6) -> AutoencoderTAEF2:
    torch.manual_seed(0)
    vae = AutoencoderTAEF2(latent_channels=latent_channels, block_out_channels=(8,) * levels)
    return vae.requires_grad_(False).eval()


def save_as_published(vae: AutoencoderTAEF2, folder: Path) -> None:
    """Half precision, tensors by layer number; the decoder's first layer, which has none, counts."""
    folder.mkdir(exist_ok=True)
    for part, first in (("encoder", 0), ("decoder", 1)):
        tensors = {}
        for name, tensor in vae.state_dict().items():
            kind, layer, rest = name.split(".", 2)
            if kind == part:
                tensors[f"{int(layer) + first}.{rest}"] = tensor.half()
        save_file(tensors, folder / f"taef2_{part}.safetensors")
