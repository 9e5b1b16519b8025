"""A frozen backbone as it runs fastest: without what its layers do not need, with batch norms and padding folded in."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

ROUNDING = 1e-4  # of a layer's largest value: what the order of float32 sums may change over a deep network


def inference_network(network: Any, images: torch.Tensor) -> Any:
    """A copy of a timm backbone that gives the same layers in less time; itself where there is nothing to gain.

    A batch norm that follows a convolution is a factor and an offset of its channels, which its weights can take
    (`fold_batch_norms`). timm's EfficientNets and MobileNets run on to their last block, whatever layers are asked for
    (`drop_unused_blocks`). On EfficientNet-lite0 the one saves a quarter of the time on a CPU, the other a sixth.
    TensorFlow's padding is a copy of the whole map, which a larger kernel does without (`fold_padding`).

    Both go by how timm's networks are put together, so the copy is tried on an image (N, 3, H, W) of `images`, in
    float32 on the CPU, and is taken only if it gives the same.
    """
    like = next(network.parameters())
    exact = copy.deepcopy(network).to("cpu", torch.float32)
    faster = copy.deepcopy(exact)
    if not fold_batch_norms(faster) + drop_unused_blocks(faster) + fold_padding(faster):
        return network
    images = images[:1].to("cpu", torch.float32)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        pairs = zip(faster(images), exact(images), strict=True)
        same = all(found.shape == layer.shape and equal(found, layer) for found, layer in pairs)
    return faster.to(like.device, like.dtype) if same else network


def equal(found: torch.Tensor, layer: torch.Tensor) -> bool:
    largest = float(layer.abs().max())
    return math.isfinite(largest) and torch.allclose(found, layer, rtol=0.0, atol=ROUNDING * largest)


def fold_batch_norms(network: nn.Module) -> int:
    """Puts batch norms into the convolutions that stand before them in the same module; returns how many."""
    pairs = [
        (parent, convolution, norm)
        for parent in network.modules()
        for (convolution, first), (norm, second) in pairwise(parent.named_children())
        if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d) and second.track_running_stats
        if first.out_channels == second.num_features
    ]
    for parent, convolution, norm in pairs:
        batch_norm = getattr(parent, norm)
        setattr(parent, convolution, fuse_conv_bn_eval(getattr(parent, convolution), batch_norm))
        setattr(parent, norm, getattr(batch_norm, "act", nn.Identity()))  # timm's norms hold their activation
    return len(pairs)


def drop_unused_blocks(network: Any) -> int:
    """Takes off the blocks behind the last layer that a timm EfficientNet or MobileNet gives; returns how many."""
    kind, _, last = network.feature_info.module_name()[-1].partition(".")
    if kind != "blocks" or not last.isdigit() or not isinstance(getattr(network, "blocks", None), nn.Sequential):
        return 0
    num_unused = len(network.blocks) - int(last) - 1
    if num_unused:
        network.blocks = network.blocks[: int(last) + 1]
    return num_unused


class EvenlyPadded(nn.Module):
    """A depthwise convolution of stride 2 with TensorFlow's padding: one pixel more behind the image than before it.

    A kernel with a row and a column of zeros in front gives the same with as much on both sides, which the convolution
    does itself. Uneven padding is a copy of the map, and takes longer than the convolution.
    """

    weight: torch.Tensor

    def __init__(self, convolution: Conv2dSame):
        super().__init__()
        self.convolution = convolution
        self.register_buffer("weight", F.pad(convolution.weight.detach(), (1, 0, 1, 0)))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, C, H / 2, W / 2). Where a side is odd, TensorFlow pads another way."""
        convolution = self.convolution
        if values.shape[-1] % 2 or values.shape[-2] % 2:
            return convolution(values)
        padding = [length // 2 for length in convolution.kernel_size]
        return F.conv2d(values, self.weight, convolution.bias, 2, padding, 1, convolution.groups)


def fold_padding(network: nn.Module) -> int:
    """Replaces the convolutions that `EvenlyPadded` is for; returns how many."""
    found = [
        (parent, name, child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if isinstance(child, Conv2dSame) and child.groups == child.in_channels == child.out_channels
        if child.stride == (2, 2) and child.dilation == (1, 1) and all(k % 2 for k in child.kernel_size)
    ]
    for parent, name, convolution in found:
        setattr(parent, name, EvenlyPadded(convolution))
    return len(found)
