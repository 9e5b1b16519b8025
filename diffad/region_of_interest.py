"""Regions of interest: what lies outside of one counts in no statistic, threshold, map or score.

A region is the same of all images of a category, a place in the image whatever its size. Pixels outside are hidden
before the networks see them, by the mean colour inside, so that nothing there can show through a receptive field.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def inside_region(region: torch.Tensor | None, category: torch.Tensor, size: Sequence[int]) -> torch.Tensor | None:
    """Where the pixels of N images count, (N, *size) bool; None without a region.

    Args:
        region: of each category, (K, h, w) bool.
        category: (N,) integers, on whose device the result is.
        size: height and width. A pixel counts where at least half of it does, or what counts of it most.
    """
    if region is None:
        return None
    share = F.interpolate(region[category.to(region.device)].float()[:, None], tuple(size), mode="area")[:, 0]
    share = share.to(category.device)
    return share >= share.amax(dim=(1, 2), keepdim=True).clamp(max=0.5)


def hide_outside(pixel_values: torch.Tensor, inside: torch.Tensor | None) -> torch.Tensor:
    """Images (N, 3, H, W) whose pixels outside have the mean colour of those inside (N, H, W)."""
    if inside is None:
        return pixel_values
    shown = inside[:, None].to(pixel_values)  # (N, 1, H, W)
    mean = (pixel_values * shown).sum(dim=(2, 3), keepdim=True) / shown.sum(dim=(2, 3), keepdim=True).clamp(min=1.0)
    return torch.where(inside[:, None], pixel_values, mean)


def clear_outside(maps: torch.Tensor, inside: torch.Tensor | None) -> torch.Tensor:
    """Maps (N, H, W) that are 0 outside."""
    return maps if inside is None else torch.where(inside, maps, 0.0)


def values_inside(maps: torch.Tensor, inside: torch.Tensor | None) -> torch.Tensor:
    """The pixels of maps (N, H, W) that count, (N, 1, n), of one region (H, W); the maps where there is none."""
    return maps if inside is None or bool(inside.all()) else maps[:, inside][:, None]


def stand_ins(inside: torch.Tensor) -> torch.Tensor:
    """For each of P positions, (P,) bool, the one whose sums it takes: its own inside, outside one that is.

    Averages over all positions are then averages over those inside.
    """
    index = torch.arange(len(inside), device=inside.device)
    chosen = index[inside]
    return torch.where(inside, index, chosen[index % len(chosen)])
