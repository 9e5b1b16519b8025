"""Denoising network of Lu et al., "Removing Anomalies as Noises for Industrial Defect Localization" (ICCV 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.utils import BaseOutput
from torch import nn

DECODER_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")  # whose layers `forward` calls


@dataclass
class DenoisingUNet2DOutput(BaseOutput):
    """
    Output of [`DenoisingUNet2DModel`].

    Args:
        sample: (N, 2C, H, W): epsilon, then the learned-range variance in about [-1, 1]; None where only the features
            are wanted.
        features: (N, feature_channels, H / s, W / s), s = sample_size / feature_resolution: the clean image's
            standardised features, as predicted from the noisy image; None without a feature head.
    """

    sample: torch.Tensor | None
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
        Everything else is `UNet2DModel`'s. `num_class_embeds` makes the model class-conditional (the unified model);
        `up_block_types` are any of `DECODER_BLOCKS`.
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
        other_blocks = sorted({*up_block_types} - {*DECODER_BLOCKS})
        if other_blocks:
            raise ValueError(
                f"`up_block_types` must be taken from {DECODER_BLOCKS}, whose features can be had between their "
                f"layers, but holds {other_blocks}."
            )
        if any("Skip" in name for name in down_block_types):
            raise ValueError(
                f"`down_block_types` of skip connections need such a decoder, but is {down_block_types}. Use "
                "DownBlock2D, AttnDownBlock2D or ResnetDownsampleBlock2D."
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
        self.feature_head: nn.Sequential | None = None
        self.feature_level: int | None = None  # 0 is the finest
        if feature_channels:
            resolutions = [sample_size // 2**level for level in range(len(block_out_channels))]
            if feature_resolution not in resolutions:
                raise ValueError(
                    f"`feature_resolution` must be one of the decoder's {resolutions} for `sample_size` "
                    f"{sample_size} and {len(block_out_channels)} levels, but is {feature_resolution}."
                )
            self.feature_level = resolutions.index(feature_resolution)
            width = block_out_channels[self.feature_level]
            self.feature_head = nn.Sequential(
                nn.GroupNorm(norm_num_groups, width),
                nn.SiLU(),
                nn.Conv2d(width, 2 * width, kernel_size=3, padding=1),
                nn.SiLU(),
                nn.Conv2d(2 * width, feature_channels, kernel_size=1),
            )

    def enable_group_offload(
        self,
        onload_device: torch.device,
        offload_device: torch.device = torch.device("cpu"),  # noqa: B008 (the signature is diffusers')
        offload_type: str = "block_level",
        **options: Any,
    ) -> None:
        """Offloads layer by layer, as diffusers does.

        Raises:
            ValueError: `offload_type` is "block_level": a decoder block is never called as one, to be moved then.
        """
        if offload_type == "block_level":
            raise ValueError('`offload_type` must be "leaf_level": the layers of decoder blocks are called one by one.')
        super().enable_group_offload(onload_device, offload_device, offload_type, **options)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        features_only: bool = False,
    ) -> DenoisingUNet2DOutput | tuple[torch.Tensor | None, torch.Tensor | None]:
        """One pass of the network.

        Args:
            sample: x_t, (N, C, H, W); H and W multiples of 2 to the number of levels less one.
            timestep: t, a number or (N,).
            class_labels: (N,) integers, when the model was built with `num_class_embeds`.
            return_dict: False returns the output's fields as a tuple.
            features_only: ends once the features are predicted, and leaves out the finer levels of the decoder.

        Raises:
            ValueError: `class_labels` is missing, or of no use; or there is no feature head for `features_only`.
        """
        if features_only and self.feature_head is None:
            raise ValueError("`features_only` needs a feature head: build with `feature_channels` above 0.")
        if class_labels is None and self.class_embedding is not None:
            raise ValueError("`class_labels` is needed by a class-conditional network: one index for each sample.")
        if class_labels is not None and self.class_embedding is None:
            raise ValueError("`class_labels` has no use here. Leave it out, or build with `num_class_embeds`.")
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0

        # 1. Time and class, (N, D)
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])  # (N,)
        embedding = self.time_embedding(self.time_proj(timesteps).to(self.dtype))
        if self.class_embedding is not None:
            if self.config.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels)
            embedding = embedding + self.class_embedding(class_labels).to(self.dtype)

        # 2. Encoder
        hidden = self.conv_in(sample)  # (N, width, H, W)
        skips = [hidden]
        for block in self.down_blocks:
            hidden, outputs = block(hidden_states=hidden, temb=embedding)
            skips.extend(outputs)

        # 3. Middle block
        if self.mid_block is not None:
            hidden = self.mid_block(hidden, embedding)

        # 4. Decoder, from the coarsest level on; the features of a level are predicted before it is upsampled
        features = None
        for level, block in zip(reversed(range(len(self.up_blocks))), self.up_blocks, strict=True):
            attentions = getattr(block, "attentions", [None] * len(block.resnets))
            for resnet, attention in zip(block.resnets, attentions, strict=True):
                hidden = torch.cat([hidden, skips.pop()], dim=1)
                if block.gradient_checkpointing and torch.is_grad_enabled():
                    hidden = block._gradient_checkpointing_func(resnet, hidden, embedding)
                else:
                    hidden = resnet(hidden, embedding)
                if attention is not None:
                    hidden = attention(hidden)
            if self.feature_head is not None and level == self.feature_level:
                features = self.feature_head(hidden)  # (N, feature_channels, H / s, W / s)
                if features_only:
                    return DenoisingUNet2DOutput(sample=None, features=features) if return_dict else (None, features)
            for upsampler in block.upsamplers or ():
                needs_time = isinstance(upsampler, ResnetBlock2D)
                hidden = upsampler(hidden, embedding) if needs_time else upsampler(hidden)

        # 5. Epsilon and variance, (N, 2C, H, W)
        output = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        if self.config.time_embedding_type == "fourier":
            output = output / timesteps.reshape(-1, 1, 1, 1)
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
