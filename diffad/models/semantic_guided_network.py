"""Semantic-guided network of He et al., "A Diffusion-based Framework for Multi-class Anomaly Detection" (AAAI 2024)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.controlnets.controlnet import ControlNetModel, zero_module
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

GUIDANCE_OUTPUTS = ("middle", "sgdb3", "sgdb4")
FUSIONS = ("instance_norm_silu", "batch_norm_relu")
SILU_GAIN = 1.68  # 1 / sqrt(E[silu(x)^2]) of a normal x: with it, variance stays the same from layer to layer


# Fields have defaults, unlike those of diffusers' `ControlNetOutput`: accelerate's offloading hooks need them.
@dataclass
class SemanticGuidedNetworkOutput(BaseOutput):
    """
    Output of [`SemanticGuidedNetwork`]: what the denoiser adds, a scalar zero where that is nothing.

    Args:
        down_block_res_samples: one for each of the denoiser's skips, of the skip's shape (N, C, h, w) or (); to be
            passed to the denoiser as `down_block_additional_residuals`.
        mid_block_res_sample: (N, C, h, w), of the shape of the middle block's output, or (); to be passed as
            `mid_block_additional_residual`.
    """

    down_block_res_samples: tuple[torch.Tensor, ...] | None = None
    mid_block_res_sample: torch.Tensor | None = None


class SpatialAwareFeatureFusion(nn.Module):
    r"""SFF block (He et al., eq. 8): every layer of the lowest encoder level receives every layer of the level above.

    Each pair of layers has its own 3x3 convolution of stride 2. Those that read the same layer run as one, with
    their outputs side by side, as both norms work on each channel by itself.

    Args:
        source_channels: widths of the upper level's layers.
        target_channels: widths of the lowest level's layers.
        fusion: `"instance_norm_silu"` or `"batch_norm_relu"`.
    """

    def __init__(self, source_channels: Sequence[int], target_channels: Sequence[int], fusion: str):
        super().__init__()
        width = sum(target_channels)
        norm = nn.InstanceNorm2d if fusion == "instance_norm_silu" else nn.BatchNorm2d
        self.target_channels = list(target_channels)
        self.downsamplers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, kernel_size=3, stride=2, padding=1, bias=False), norm(width))
            for channels in source_channels
        )
        self.activation = nn.SiLU() if fusion == "instance_norm_silu" else nn.ReLU()

    def forward(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Fuses `sources`, each (N, C_s, 2h, 2w), into `targets`, each (N, C_t, h, w)."""
        maps = (
            self.activation(downsampler(source)) for downsampler, source in zip(self.downsamplers, sources, strict=True)
        )
        received = functools.reduce(torch.add, maps)  # (N, sum of C_t, h, w)
        return [
            self.activation(target + part)
            for target, part in zip(targets, received.split(self.target_channels, dim=1), strict=True)
        ]


class SemanticGuidedNetwork(ControlNetModel):
    r"""The denoiser's encoder and middle block over again, guided by the input image (He et al., section 3.2).

    A `ControlNetModel` whose outputs are only those that the denoiser uses, with the SFF block on the lowest level.
    A skip that receives nothing has no zero convolution, and its place in the output holds a scalar zero.

    The published training starts both the zero convolutions and the SFF block's convolutions at zero. Their product
    then has no gradient, so that the block never leaves zero. Here the zero convolutions alone start at zero, and, with
    `initialize_beside_untrained`, not even they.

    Args:
        conditioning_channels: the image's channels.
        conditioning_embedding_out_channels: widths of the conv-SiLU stack (eq. 7) at each of its resolutions. Every
            one after the first halves the resolution; together they must reach the autoencoder's factor, 8 for four.
        guidance_outputs: what the denoiser receives, any of `"middle"` (its middle block), `"sgdb4"` (its last
            encoder level's skips) and `"sgdb3"` (those of the level above).
        fusion: the SFF block's norm and activation, `"instance_norm_silu"` or `"batch_norm_relu"`; None for no SFF
            block. It belongs to `"sgdb4"`.
        Everything else is `ControlNetModel`'s and must be the denoiser's: use `from_unet`.
    """

    # Options of the base class that have no meaning here.
    ignore_for_config = [  # noqa: RUF012 - diffusers' own name and type
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "class_embed_type",
        "addition_embed_type",
        "addition_time_embed_dim",
        "num_class_embeds",
        "projection_class_embeddings_input_dim",
        "controlnet_conditioning_channel_order",
        "global_pool_conditions",
        "addition_embed_type_num_heads",
    ]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        conditioning_channels: int = 3,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type: str = "UNetMidBlock2DCrossAttn",
        only_cross_attention: bool | tuple[bool, ...] = False,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 768,
        transformer_layers_per_block: int | tuple[int, ...] = 1,
        attention_head_dim: int | tuple[int, ...] = 8,
        num_attention_heads: int | tuple[int, ...] | None = None,
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256),
        guidance_outputs: tuple[str, ...] = ("middle", "sgdb4"),
        fusion: str | None = "instance_norm_silu",
    ):
        if isinstance(guidance_outputs, str) or not guidance_outputs or set(guidance_outputs) - {*GUIDANCE_OUTPUTS}:
            raise ValueError(
                f"`guidance_outputs` must be a non-empty list of {GUIDANCE_OUTPUTS}, but is {guidance_outputs!r}. "
                "To denoise without guidance, use no semantic-guided network."
            )
        if fusion not in (*FUSIONS, None):
            raise ValueError(f"`fusion` must be one of {FUSIONS} or None, but is {fusion!r}.")
        if len(block_out_channels) < 2:
            raise ValueError(f"`block_out_channels` must have two levels or more, but is {block_out_channels}.")
        super().__init__(
            in_channels=in_channels,
            conditioning_channels=conditioning_channels,
            flip_sin_to_cos=flip_sin_to_cos,
            freq_shift=freq_shift,
            down_block_types=down_block_types,
            mid_block_type=mid_block_type,
            only_cross_attention=only_cross_attention,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            downsample_padding=downsample_padding,
            mid_block_scale_factor=mid_block_scale_factor,
            act_fn=act_fn,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            cross_attention_dim=cross_attention_dim,
            transformer_layers_per_block=transformer_layers_per_block,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            use_linear_projection=use_linear_projection,
            upcast_attention=upcast_attention,
            resnet_time_scale_shift=resnet_time_scale_shift,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
        )
        # A level's skips: what enters it (the first convolution's output, or the downsampler's, with the width of the
        # level above), then its blocks' outputs. In Stable Diffusion the lowest level has skips 9, 10 and 11.
        per_level = layers_per_block + 1
        skip_channels = [block_out_channels[0]]
        for level, channels in enumerate(block_out_channels):
            skip_channels += [channels] * (per_level if level < len(block_out_channels) - 1 else layers_per_block)
        self.num_skips = len(skip_channels)
        lowest = range(self.num_skips - per_level, self.num_skips)
        above = range(lowest.start - per_level, lowest.start)

        self.output_skips = [*(above if "sgdb3" in guidance_outputs else ())]
        self.output_skips += [*(lowest if "sgdb4" in guidance_outputs else ())]
        self.fusion_sources: list[int] = []
        self.fusion_targets: list[int] = []
        self.feature_fusion = None
        if fusion is not None and "sgdb4" in guidance_outputs:
            self.fusion_sources, self.fusion_targets = [*above], [*lowest]
            self.feature_fusion = SpatialAwareFeatureFusion(
                [skip_channels[skip] for skip in above], [skip_channels[skip] for skip in lowest], fusion
            )
        self.controlnet_down_blocks = nn.ModuleDict(
            {
                str(skip): zero_module(nn.Conv2d(skip_channels[skip], skip_channels[skip], kernel_size=1))
                for skip in sorted({*self.output_skips, *self.fusion_sources})
            }
        )
        # Weights that no output depends on would cost memory and have no gradient.
        if "middle" not in guidance_outputs:
            self.mid_block = self.controlnet_mid_block = None
            if "sgdb4" not in guidance_outputs:
                del self.down_blocks[-1]
                self.down_blocks[-1].downsamplers = None

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        guidance_outputs: tuple[str, ...] = ("middle", "sgdb4"),
        fusion: str | None = "instance_norm_silu",
        conditioning_channels: int = 3,
        conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256),
        load_weights_from_unet: bool = True,
    ) -> SemanticGuidedNetwork:
        """A network for `unet`, with its configuration and a copy of its encoder's and middle block's weights.

        The zero convolutions stand at zero: the denoiser's output is at first what it is without guidance. The other
        arguments are those of the class.

        Raises:
            ValueError: `unet` takes conditions beside the timestep and the prompt's embedding.
        """
        unsupported = [
            name
            for name in (
                "encoder_hid_dim_type",
                "class_embed_type",
                "num_class_embeds",
                "addition_embed_type",
            )
            if unet.config.get(name) is not None
        ]
        if unsupported:
            raise ValueError(
                f"`unet` is configured with {unsupported}, which the semantic-guided network does not take. Use a "
                "denoiser conditioned on the timestep and the prompt's embedding alone, like Stable Diffusion 1.5's."
            )
        shared = {name: unet.config[name] for name in cls._get_init_keys(cls) & unet.config.keys()}
        network = cls(
            **{
                **shared,
                "conditioning_channels": conditioning_channels,
                "conditioning_embedding_out_channels": conditioning_embedding_out_channels,
                "guidance_outputs": guidance_outputs,
                "fusion": fusion,
            }
        )
        if load_weights_from_unet:
            weights = unet.state_dict()
            copied = ("conv_in.", "time_embedding.", "down_blocks.", "mid_block.")
            network.load_state_dict(
                {name: weights[name] for name in network.state_dict() if name.startswith(copied)},
                strict=False,
            )
        return network

    @torch.no_grad()
    def initialize_beside_untrained(self) -> None:
        """Random weights in the place of zero convolutions, for a denoiser that is trained from scratch.

        A pretrained denoiser is what the zeros protect. An untrained one has nothing to protect, and learns without
        guidance first: Zhang et al., "Adding Conditional Control" (ICCV 2023) see ControlNet heed its condition only
        after thousands of steps. The stack that embeds the image (eq. 7) is initialised as He et al., "Delving Deep
        into Rectifiers" (ICCV 2015) do, so that at first an image is as strong as the noise that it is added to.
        """
        stack = self.controlnet_cond_embedding
        for convolution in (stack.conv_in, *stack.blocks, stack.conv_out):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="linear")
            convolution.weight.mul_(SILU_GAIN)
            nn.init.zeros_(convolution.bias)
        for convolution in (*self.controlnet_down_blocks.values(), self.controlnet_mid_block):
            if isinstance(convolution, nn.Conv2d):  # without guidance of the middle block there is none
                convolution.reset_parameters()

    @apply_forward_hook  # moves an offloaded network to its device, as a call of `forward` does
    def embed_condition(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The conv-SiLU stack (eq. 7). It does not depend on the timestep: call it once for an image.

        Args:
            pixel_values: (N, 3, H, W), normalised with ImageNet's statistics.

        Returns:
            (N, block_out_channels[0], H / f, W / f), f the autoencoder's factor.
        """
        return self.controlnet_cond_embedding(pixel_values)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        conditioning_embedding: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SemanticGuidedNetworkOutput | tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """One pass of the network.

        Args:
            sample: noisy latents, (N, C, h, w).
            timestep: a number, (1,) or (N,).
            encoder_hidden_states: embedding of the empty prompt, (1, L, D) or (N, L, D).
            conditioning_embedding: `embed_condition`'s output, (1, ...) or (N, ...).
            pixel_values: the image itself in its place, (N, 3, H, W); for training.
            return_dict: False returns the output's fields as a tuple.
        """
        if (conditioning_embedding is None) == (pixel_values is None):
            raise ValueError("Give one of `conditioning_embedding` (from `embed_condition`) and `pixel_values`.")
        if conditioning_embedding is None:
            conditioning_embedding = self.embed_condition(pixel_values)
        batch_size, _, height, width = sample.shape
        if conditioning_embedding.shape[0] not in (1, batch_size) or conditioning_embedding.shape[2:] != (
            height,
            width,
        ):
            factor = 2 ** (len(self.config.conditioning_embedding_out_channels) - 1)
            raise ValueError(
                f"`sample` of shape {tuple(sample.shape)} and the image's embedding of shape "
                f"{tuple(conditioning_embedding.shape)} must agree in N, height and width. The embedding is {factor} "
                "times smaller than the image, set by `conditioning_embedding_out_channels`: it must be the "
                "autoencoder's factor."
            )
        # Every downsampler halves, rounding up.
        reduction = 2 ** (len(self.config.block_out_channels) - 1)
        if self.fusion_targets and self.config.fusion == "instance_norm_silu" and min(height, width) <= reduction:
            raise ValueError(
                f"`sample` of {height} x {width} is too small: instance norm needs maps of 2 x 2 or more on the lowest "
                f"of the network's {len(self.config.block_out_channels)} levels, so `sample` must be larger than "
                f"{reduction} on each side. Use a larger `processing_resolution`, or fewer levels."
            )

        # 1. time
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(batch_size)  # (N,)
        embedding = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))  # (N, 4 x model channels)
        encoder_hidden_states = encoder_hidden_states.expand(batch_size, -1, -1)

        # 2. encoder
        hidden = self.conv_in(sample) + conditioning_embedding
        skips = [hidden]
        for block in self.down_blocks:
            prompt = {"encoder_hidden_states": encoder_hidden_states} if _attends(block) else {}
            hidden, outputs = block(hidden_states=hidden, temb=embedding, **prompt)
            skips.extend(outputs)

        # 3. middle block
        nothing = sample.new_zeros(())  # the denoiser adds a residual to each skip: this one fits all
        middle = nothing
        if self.mid_block is not None:
            prompt = {"encoder_hidden_states": encoder_hidden_states} if _attends(self.mid_block) else {}
            middle = self.controlnet_mid_block(self.mid_block(hidden, embedding, **prompt))

        # 4. zero convolutions, then SFF (eq. 8) over what they return
        residuals = {int(skip): conv(skips[int(skip)]) for skip, conv in self.controlnet_down_blocks.items()}
        if self.feature_fusion is not None:
            fused = self.feature_fusion(
                [residuals[skip] for skip in self.fusion_sources],
                [residuals[skip] for skip in self.fusion_targets],
            )
            residuals.update(zip(self.fusion_targets, fused, strict=True))

        down = tuple(residuals[skip] if skip in self.output_skips else nothing for skip in range(self.num_skips))
        if not return_dict:
            return down, middle
        return SemanticGuidedNetworkOutput(down_block_res_samples=down, mid_block_res_sample=middle)


def _attends(block: nn.Module) -> bool:
    return getattr(block, "has_cross_attention", False)
