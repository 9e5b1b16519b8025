"""Denoising network of Lu et al., "Removing Anomalies as Noises for Industrial Defect Localization" (ICCV 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DModel  # noqa: F401 (diffusers looks ModelMixin up in this module to load it)
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn


@dataclass
class DenoisingUNet2DOutput(BaseOutput):
    """
    Output of [`DenoisingUNet2DModel`].

    Args:
        sample: (N, 2C, H, W): epsilon, then the learned-range variance in about [-1, 1].
        features: (N, feature_channels, H / s, W / s), s = sample_size / feature_resolution: the clean image's
            standardised features, as predicted from the noisy image; None without a feature head.
    """

    sample: torch.Tensor
    features: torch.Tensor | None = None


class DenoisingUNet2DModel(UNet2DModel):
    r"""diffusers' `UNet2DModel` that also learns the variance and predicts the clean image's pretrained features.

    Lu et al. (ICCV 2023), figure 3: the denoiser's own output, and a head on the decoder's features at
    `feature_resolution` (64 for 256 px images). The learned variance is that of Improved DDPM (eq. 15).

    Args:
        sample_size: side of the training images in pixels.
        in_channels: C, the image's channels. The output has 2C.
        feature_channels: width of the features to predict (`TimmFeatureExtractor.num_channels`); 0 for no head.
        feature_resolution: side of the feature map for images of `sample_size`; one of the decoder's resolutions.
        out_channels: 2C, and nothing else; there so that a saved configuration says it.
        Everything else is `UNet2DModel`'s. `num_class_embeds` makes the model class-conditional (the unified model).
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        in_channels: int = 3,
        out_channels: int | None = None,
        feature_channels: int = 272,
        feature_resolution: int = 64,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (128, 256, 384, 512),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 64,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
    ):
        if out_channels not in (None, 2 * in_channels):
            raise ValueError(
                f"`out_channels` must be twice `in_channels` ({2 * in_channels}: epsilon and variance), but is "
                f"{out_channels}. Leave it out."
            )
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=2 * in_channels,
            center_input_sample=center_input_sample,
            time_embedding_type=time_embedding_type,
            time_embedding_dim=time_embedding_dim,
            freq_shift=freq_shift,
            flip_sin_to_cos=flip_sin_to_cos,
            down_block_types=down_block_types,
            mid_block_type=mid_block_type,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            mid_block_scale_factor=mid_block_scale_factor,
            downsample_padding=downsample_padding,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            dropout=dropout,
            act_fn=act_fn,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            attn_norm_num_groups=attn_norm_num_groups,
            norm_eps=norm_eps,
            resnet_time_scale_shift=resnet_time_scale_shift,
            add_attention=add_attention,
            class_embed_type=class_embed_type,
            num_class_embeds=num_class_embeds,
            num_train_timesteps=num_train_timesteps,
        )
        self._decoder_features: torch.Tensor | None = None
        self.feature_head = None
        if feature_channels:
            resolutions = [sample_size // 2**level for level in range(len(block_out_channels))]
            if feature_resolution not in resolutions:
                raise ValueError(
                    f"`feature_resolution` must be one of the decoder's {resolutions} for `sample_size` "
                    f"{sample_size} and {len(block_out_channels)} levels, but is {feature_resolution}."
                )
            level = resolutions.index(feature_resolution)
            width = block_out_channels[level]
            self.feature_head = nn.Sequential(
                nn.GroupNorm(norm_num_groups, width),
                nn.SiLU(),
                nn.Conv2d(width, 2 * width, kernel_size=3, padding=1),
                nn.SiLU(),
                nn.Conv2d(2 * width, feature_channels, kernel_size=1),
            )
            # The decoder's features of a level are what its block hands to its upsampler, or, on the last level, to
            # the output's norm. A hook takes them there: the base class's forward stays as it is.
            decoder_block = self.up_blocks[len(block_out_channels) - 1 - level]
            after = decoder_block.upsamplers[0] if decoder_block.upsamplers else self.conv_norm_out
            after.register_forward_pre_hook(self._keep_decoder_features)

    def _keep_decoder_features(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._decoder_features = args[0]

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DenoisingUNet2DOutput | tuple[torch.Tensor, torch.Tensor | None]:
        """One pass of the network.

        Args:
            sample: x_t, (N, C, H, W); H and W multiples of 2 to the number of levels less one.
            timestep: t, a number or (N,).
            class_labels: (N,) integers, when the model was built with `num_class_embeds`.
            return_dict: False returns the output's fields as a tuple.
        """
        output = super().forward(sample, timestep, class_labels=class_labels, return_dict=False)[0]
        features = None
        if self.feature_head is not None:
            features = self.feature_head(self._decoder_features)  # (N, feature_channels, H / s, W / s)
            self._decoder_features = None
        if not return_dict:
            return output, features
        return DenoisingUNet2DOutput(sample=output, features=features)


_ATTENTION = (
    "DownBlock2D",
    "DownBlock2D",
    "DownBlock2D",
    "AttnDownBlock2D",
    "AttnDownBlock2D",
    "AttnDownBlock2D",
)

# Architectures by name: what `training/train_ddpm.py --preset` takes. Feature widths come from the extractor.
DENOISING_UNET_PRESETS: dict[str, dict[str, Any]] = {
    # Lu et al., section 4.1: 256 px, base width 128, attention at 32, 16 and 8.
    "paper-256": {
        "sample_size": 256,
        "feature_resolution": 64,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": _ATTENTION,
        "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(_ATTENTION)),
        "layers_per_block": 2,
        "resnet_time_scale_shift": "scale_shift",
        "norm_num_groups": 32,
    },
    # Trains in minutes on two CPU cores. Most of the width stands where the features are predicted: at 64 px the
    # finest level costs the most time and matters the least.
    "cpu-64": {
        "sample_size": 64,
        "feature_resolution": 16,
        "block_out_channels": (16, 32, 96, 160),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 32,
    },
    # Trains in about an hour on two CPU cores that have bfloat16 instructions.
    "cpu-128": {
        "sample_size": 128,
        "feature_resolution": 32,
        "block_out_channels": (32, 64, 128, 192),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 32,
    },
}
