"""TAEF2, the tiny autoencoder of FLUX.2's latents (Ollin Boer Bohan, https://github.com/madebyollin/taesd, MIT)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn


class Block(nn.Module):
    """Three convolutions and a skip, as in diffusers' `AutoencoderTiny`, behind a look over the whole image.

    Args:
        width: channels.
        looks_over_all: whether a group norm, whose statistics are those of all positions, is added before.
    """

    def __init__(self, width: int, looks_over_all: bool = False):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.pool = None
        if looks_over_all:
            self.pool = nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.GroupNorm(4, 4 * width),
                nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.pool is not None:
            hidden = hidden + self.pool(hidden)
        return F.relu(self.conv(hidden) + hidden)


class UpsampleConvolution(nn.Conv2d):
    """Twice as many rows and columns by nearest neighbours, then a 3 x 3 convolution, as one transposed convolution.

    Each pixel of the larger map sees 2 x 2 different ones of the smaller, so 4 products do the work of 9.
    """

    def __init__(self, width: int):
        super().__init__(width, width, 3, padding=1, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) to (N, C, 2h, 2w)."""
        flipped = self.weight.transpose(0, 1).flip(2, 3)
        kernel = 4.0 * F.avg_pool2d(F.pad(flipped, (1, 1, 1, 1)), 2, stride=1)  # (C, C, 4, 4), sums of 2 x 2 weights
        return F.conv_transpose2d(hidden, kernel, stride=2, padding=1)


class AutoencoderTAEF2(ModelMixin, ConfigMixin):
    r"""Between images and latents of 32 channels, 8 times smaller, by 1.3 million parameters each way.

    A pretrained autoencoder for `DiADPipeline` that is small enough for a CPU. Its latents have no common scale, so
    the pipeline brings each channel to that of good images (`latents_mean`, `latents_std`). It takes colours in
    [-1, 1]: the pipeline's `image_mean` and `image_std` are 0.5.

    Published weights become one by `diffad.conversion.load_taef2`, or `diffad convert taef2`.

    Args:
        in_channels: of images.
        latent_channels: C.
        block_out_channels: width of each level, from the full size to the smallest, all equal.
        layers_per_block: blocks of each level but the full size, which has one.
        scaling_factor, shift_factor: of the latents, as in diffusers; 1 and 0 leave them as they are.

    Example:
        ```py
        >>> vae = AutoencoderTAEF2(latent_channels=4, block_out_channels=(8, 8))
        >>> vae.encode(torch.zeros(1, 3, 16, 16)).latents.shape
        torch.Size([1, 4, 8, 8])
        ```
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 32,
        block_out_channels: Sequence[int] = (64, 64, 64, 64),
        layers_per_block: int = 3,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ):
        super().__init__()
        width, num_levels = block_out_channels[0], len(block_out_channels)
        if set(block_out_channels) != {width}:
            raise ValueError(f"`block_out_channels` must be one width for all levels, but is {block_out_channels}.")
        encoder: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1), Block(width)]
        for level in range(1, num_levels):
            encoder.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            encoder += [Block(width, level == num_levels - 1) for _ in range(layers_per_block)]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(width, latent_channels, 3, padding=1))
        decoder: list[nn.Module] = [nn.Conv2d(latent_channels, width, 3, padding=1), nn.ReLU()]
        for level in reversed(range(1, num_levels)):
            decoder += [Block(width, level == num_levels - 1) for _ in range(layers_per_block)]
            decoder += [nn.Identity(), UpsampleConvolution(width)]  # the published weights count an upsampling
        self.decoder = nn.Sequential(*decoder, Block(width), nn.Conv2d(width, in_channels, 3, padding=1))

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[torch.Tensor]:
        """Images (N, 3, H, W) in [-1, 1] to latents (N, C, H / 8, W / 8)."""
        images = (x / 2.0 + 0.5).contiguous(memory_format=torch.channels_last)
        latents = self.encoder(images).contiguous()
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Latents (N, C, h, w) to images (N, 3, 8h, 8w) in about [-1, 1]."""
        latents = (3.0 * torch.tanh(z / 3.0)).contiguous(memory_format=torch.channels_last)
        images = self.decoder(latents).contiguous() * 2.0 - 1.0
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Images through both."""
        return self.decode(self.encode(sample, return_dict=False)[0], return_dict=return_dict)
