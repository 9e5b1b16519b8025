"""The layout of DiAD's published checkpoints: widths read off shapes, and names of the original for diffusers'."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

# What the shapes do not tell: `num_heads` of the published configuration, and its latents' scale.
NUM_ATTENTION_HEADS = 8
SCALING_FACTOR = 0.18215
UNET, CONTROL, AUTOENCODER = "model.diffusion_model.", "control_model.", "first_stage_model."
TEXT_ENCODER = "cond_stage_model.transformer.text_model."
FEATURE_EXTRACTOR = "pretrained_model."


def _highest(names: Iterable[str], prefix: str) -> int:
    """The highest number that follows `prefix` in `names`. KeyError names the first, if there is none."""
    followers = (name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix))
    numbers = [int(follower) for follower in followers if follower.isdecimal()]
    if not numbers:
        raise KeyError(f"{prefix}0")
    return max(numbers)


def _size(tensors: dict[str, torch.Tensor], name: str, dimension: int = 0) -> int:
    """One dimension of a tensor. KeyError names the tensor if it is missing, IndexError if it has no such dimension."""
    if tensors[name].ndim <= dimension:
        raise IndexError(f"{name} {tuple(tensors[name].shape)}")
    return tensors[name].shape[dimension]


def _encoder_config(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, Any]:
    """What the denoiser's and the semantic-guided network's configurations have in common."""
    blocks = 1 + _highest(tensors, f"{prefix}input_blocks.")
    downsamplers = [
        i for i in range(blocks) if any(name.startswith(f"{prefix}input_blocks.{i}.0.op.") for name in tensors)
    ]
    per_level = downsamplers[0] if downsamplers else blocks
    first_blocks = [f"{prefix}input_blocks.{i}" for i in range(1, blocks, per_level)]
    attends = [any(name.startswith(f"{block}.1.") for name in tensors) for block in first_blocks]

    def depth(block: str) -> int:
        return 1 + _highest(tensors, f"{block}.1.transformer_blocks.")

    depths = [depth(block) if attention else 1 for block, attention in zip(first_blocks, attends, strict=True)]
    middle_depth = depth(f"{prefix}middle_block")
    if not attends[-1]:
        depths[-1] = middle_depth  # diffusers gives the middle block the lowest level's depth
    return {
        "in_channels": _size(tensors, f"{prefix}input_blocks.0.0.weight", 1),
        "block_out_channels": tuple(_size(tensors, f"{block}.0.out_layers.3.weight") for block in first_blocks),
        "layers_per_block": per_level - 1,
        "down_block_types": tuple("CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends),
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else tuple(depths),
        "cross_attention_dim": _size(tensors, f"{prefix}middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1),
        "use_linear_projection": tensors[f"{prefix}middle_block.1.proj_in.weight"].ndim == 2,
        "attention_head_dim": NUM_ATTENTION_HEADS,  # diffusers' name for the number of heads
    }


def read_unet_config(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, Any]:
    config = _encoder_config(tensors, prefix)
    up_block_types = tuple(name.replace("Down", "Up") for name in reversed(config["down_block_types"]))
    return {
        **config,
        "up_block_types": up_block_types,
        "out_channels": tensors[f"{prefix}out.2.weight"].shape[0],
    }


def read_sg_network_config(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    # convolutions stand at even places, SiLUs between them; every second convolution widens
    last = _highest(tensors, f"{CONTROL}input_hint_block.")
    widening = [f"{CONTROL}input_hint_block.{place}.weight" for place in range(0, last, 4)]
    return {
        **_encoder_config(tensors, CONTROL),
        "conditioning_channels": _size(tensors, widening[0], 1),
        "conditioning_embedding_out_channels": tuple(_size(tensors, name) for name in widening),
    }


def read_vae_config(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    encoder, decoder = f"{AUTOENCODER}encoder.", f"{AUTOENCODER}decoder."
    levels = 1 + _highest(tensors, f"{encoder}down.")
    return {
        "in_channels": _size(tensors, f"{encoder}conv_in.weight", 1),
        "out_channels": _size(tensors, f"{decoder}conv_out.weight"),
        "latent_channels": _size(tensors, f"{AUTOENCODER}post_quant_conv.weight", 1),
        "block_out_channels": tuple(
            _size(tensors, f"{encoder}down.{level}.block.0.conv1.weight") for level in range(levels)
        ),
        "layers_per_block": 1 + _highest(tensors, f"{encoder}down.0.block."),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "scaling_factor": SCALING_FACTOR,
    }


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}

_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """`name` with its beginning replaced, where the table has it."""
    for ours, theirs in table.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    return name


def original_unet_name(name: str, config: Mapping[str, Any], prefix: str = UNET) -> str:
    """`down_blocks.1.resnets.0.conv1.weight` is `input_blocks.4.0.in_layers.2.weight`: numbered through."""
    per_level = config["layers_per_block"] + 1
    if match := re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions)\.(\d+)\.(.+)", name):
        side, kind, place, rest = match[1], match[3], int(match[4]), match[5]
        if kind == "resnets":
            rest = _renamed(rest, _RESNET)
        if side == "mid":
            return f"{prefix}middle_block.{2 * place if kind == 'resnets' else 1}.{rest}"
        block = int(match[2]) * per_level + place
        attention = int(kind == "attentions")
        return (
            prefix
            + (f"input_blocks.{block + 1}" if side == "down" else f"output_blocks.{block}")
            + f".{attention}.{rest}"
        )
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", name):
        return f"{prefix}input_blocks.{(int(match[1]) + 1) * per_level}.0.op.{match[2]}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.(.+)", name):
        level = int(match[1])
        after = 2 if config["up_block_types"][level] == "CrossAttnUpBlock2D" else 1
        return f"{prefix}output_blocks.{level * per_level + per_level - 1}.{after}.{match[2]}"
    return prefix + _renamed(name, _UNET_ENDS)


def original_sg_names(name: str, config: Mapping[str, Any]) -> list[str]:
    """The SFF block's convolutions over one layer are one here and several there; all else is one tensor."""
    per_level, last = (
        config["layers_per_block"] + 1,
        len(config["conditioning_embedding_out_channels"]) * 4 - 2,
    )
    if match := re.fullmatch(r"feature_fusion\.downsamplers\.(\d+)\.0\.weight", name):
        return [f"{CONTROL}down{int(match[1]) + 1}{target}.0.weight" for target in range(1, per_level + 1)]
    if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)\.(.+)", name):
        return [f"{CONTROL}zero_convs.{match[1]}.0.{match[2]}"]
    if match := re.fullmatch(r"controlnet_cond_embedding\.blocks\.(\d+)\.(.+)", name):
        return [f"{CONTROL}input_hint_block.{2 * int(match[1]) + 2}.{match[2]}"]
    ends = {
        "controlnet_mid_block": "middle_block_out.0",
        "controlnet_cond_embedding.conv_in": "input_hint_block.0",
        "controlnet_cond_embedding.conv_out": f"input_hint_block.{last}",
    }
    return [original_unet_name(_renamed(name, ends), config, CONTROL)]


def original_vae_name(name: str, levels: int) -> str:
    """`decoder.up_blocks.0` is `decoder.up.3`: the published decoder counts from the image."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if match := re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)", name):
        name = f"{match[1]}.mid.attn_1.{_renamed(match[2], _VAE_ATTENTION)}"
    return AUTOENCODER + name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
