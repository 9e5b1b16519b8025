"""Distances to the nearest features of good images (Roth et al., "Towards Total Recall in Industrial Anomaly
Detection", CVPR 2022: PatchCore).

A Gaussian at each position knows how features vary there, and nothing of what stands beside it; the nearest feature of
any place is blind to places, and takes any number of kinds of good parts. They miss different defects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from diffad.exporting import is_exporting

CORESET_SIZE = 6000  # patches kept of a category: 0.9 MB for 76 directions in half precision
POOL_BYTES = 80_000_000  # of the patches of all images, of which they are chosen: 131,578 of 152 channels
CHOSEN_AT_ONCE = 32  # patches of a full coreset, so that each look at the pool serves as many
ALL_DIRECTIONS = 64  # channels of which none is given up
PATCHES_AT_ONCE = 1024  # of an image, whose distances are taken together
CORESET_AT_ONCE = 250  # of which a graph takes distances together
FINEST_STRIDE = 8  # PatchCore leaves out what is finer


def patch_layers(strides: Sequence[int]) -> list[int]:
    """Indices of the layers that patches are made of: strides from 8 on, or the coarsest where there is none."""
    chosen = [i for i, stride in enumerate(strides) if stride >= FINEST_STRIDE]
    return chosen or [i for i, stride in enumerate(strides) if stride == max(strides)]


def locally_aware_patches(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Patch features (Roth et al., eqs. 1 to 3): averages over 3 x 3 positions, of several layers at the finest's size.

    Args:
        layers: (N, C_i, h_i, w_i).

    Returns:
        (N, C, h, w), C the sum of C_i, h and w those of the finest.
    """
    size = max((layer.shape[-2:] for layer in layers), key=math.prod)
    pooled = [F.avg_pool2d(layer.float(), 3, stride=1, padding=1) for layer in layers]
    return torch.cat(
        [layer if layer.shape[-2:] == size else F.interpolate(layer, size, mode="bilinear") for layer in pooled], dim=1
    )


def sample_patches(patches: torch.Tensor, image: int, count: int, inside: torch.Tensor | None = None) -> torch.Tensor:
    """`count` of one image's patches (C, h, w), or all that there are: (n, C). Which ones its number `image` says.

    Of those `inside`, (h, w) bool, where it is given.
    """
    flat = patches.flatten(1).mT  # (h * w, C)
    flat = flat if inside is None else flat[inside.flatten()]
    chosen = np.random.default_rng(image).permutation(len(flat))[:count]
    return flat[torch.from_numpy(np.sort(chosen)).to(flat.device)]


def pool_size(num_channels: int) -> int:
    """How many patches of all images the kept ones are chosen from."""
    return max(2**15, POOL_BYTES // (4 * num_channels))


def num_directions(num_channels: int) -> int:
    """How many principal directions distances are taken in."""
    return min(num_channels, max(ALL_DIRECTIONS, num_channels // 2))


def principal_directions(patches: torch.Tensor, count: int) -> torch.Tensor:
    """Orthonormal directions (C, count) in which patches (n, C) vary most about their mean: their PCA.

    Distances in half of EfficientNet-lite0's 152 channels, which hold 95% of the variance, cost half of the products
    and find what those in all of them find (docs/tried.md).
    """
    if len(patches) < 2:  # nothing varies
        return torch.eye(patches.shape[1], count, device=patches.device)
    covariance = patches.float().mT.cov().cpu().double()  # some devices have no float64
    return torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :count].float().to(patches.device)


def project(patches: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Coordinates (N, D, h, w) of patches (N, C, h, w) along directions (C, D)."""
    if is_exporting():  # NNCF takes a convolution's weights for a constant, and these are the category's
        return torch.matmul(directions.mT, patches.float().flatten(2)).unflatten(2, patches.shape[-2:])
    return F.conv2d(patches.float(), directions.mT[:, :, None, None])


def greedy_coreset(patches: torch.Tensor, size: int) -> torch.Tensor:
    """Indices (size,) of patches that are near all the others (Roth et al., algorithm 1: greedy k-center).

    Several are chosen at once, 32 of a full coreset: patches are dealt out at random to as many groups, and each group
    gives the one of its own that is farthest from all those that were chosen before. One product then serves them all,
    where one at a time would read the pool for each. As chance deals, no group is a place or a time: where few images
    or few places vary, all groups choose there. Of 131,000 patches of real images the one that is farthest from the
    6000 lies at 1.01 to 1.02 times the distance that one at a time leaves (docs/tried.md).

    Args:
        patches: (n, C) float.
        size: how many to choose. Where there are fewer, the first is repeated.
    """
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0)).to(patches.device)
    patches, count = patches[order].float(), min(size, len(patches))
    at_once = max(1, CHOSEN_AT_ONCE * size // CORESET_SIZE)
    rounds = math.ceil(len(patches) / at_once)  # patch i is in group i % at_once
    groups = torch.arange(min(at_once, len(patches)), device=patches.device)
    square = patches.square().sum(dim=1)
    # what fills the last round up is never the farthest
    padded = torch.full((rounds * len(groups),), -torch.inf, device=patches.device)
    distance = padded[: len(patches)].fill_(torch.inf)
    chosen = last = groups
    while len(chosen) < count:
        # |p - q|^2 = |p|^2 - 2 p q + |q|^2
        to_last = torch.addmm(square[last], patches, patches[last].mT, alpha=-2.0).amin(dim=1).add_(square)  # (n,)
        torch.minimum(distance, to_last, out=distance)
        distance[last] = -torch.inf  # not twice, where patches are equal
        last = padded.view(rounds, len(groups)).argmax(dim=0) * len(groups) + groups
        last = last[padded[last] != -torch.inf]  # of a group that is chosen whole
        chosen = torch.cat([chosen, last])
    return torch.cat([order[chosen[:count]], chosen.new_zeros(size - count)])


def nearest_distances(
    patches: torch.Tensor,
    coreset: torch.Tensor,
    owner: torch.Tensor | None = None,
    image: torch.Tensor | None = None,
) -> torch.Tensor:
    """Euclidean distance of every patch from the nearest of the coreset.

    Args:
        patches: (N, C, h, w).
        coreset: (M, C).
        owner: (M,), the number of the image that each of the coreset is from; with `image`.
        image: (N,), the images' own numbers: their patches are no neighbours of theirs.

    Returns:
        (N, h, w) float32.
    """
    coreset = coreset.float()
    offset = coreset.square().sum(dim=1)  # (M,)
    if is_exporting():  # a part of the coreset at a time, which bounds memory; images there are any number of
        flat = patches.float().flatten(2).mT  # (N, h * w, C)
        nearest = [
            (torch.matmul(flat, part.mT) * -2.0 + part.square().sum(dim=1)).amin(dim=2)
            for part in coreset.split(CORESET_AT_ONCE)
        ]
        squared = torch.stack(nearest).amin(dim=0) + flat.square().sum(dim=2)
        return squared.clamp(min=0.0).sqrt().unflatten(1, patches.shape[-2:])
    squared = patches.new_empty(len(patches), patches[0, 0].numel() if len(patches) else 0, dtype=torch.float32)
    for i, one in enumerate(patches.float().flatten(2)):  # (C, h * w)
        own = None if owner is None or image is None else owner == image[i]
        # a part of the positions at a time: with 6000 patches 1024 of them take 25 MB
        for found, part in zip(squared[i].split(PATCHES_AT_ONCE), one.split(PATCHES_AT_ONCE, dim=1), strict=True):
            product = torch.addmm(offset, part.mT, coreset.mT, alpha=-2.0)  # (P, M)
            if own is not None:
                product[:, own & ~own.all()] = torch.inf  # where all that are kept are its own, they are what there is
            found.copy_(product.amin(dim=1) + part.square().sum(dim=0))
    return squared.clamp(min=0.0).sqrt().view(len(patches), *patches.shape[-2:])
