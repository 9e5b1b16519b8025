"""A Gaussian of pretrained features at each position.

Defard et al., "PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and Localization", 2021.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from diffad.exporting import is_exporting
from diffad.moments import POSITIONS_AT_ONCE, FeatureMoments
from diffad.triangles import inverse_factor, multiply_parts, pack_triangle

# PaDiM's regularisation, as a share of the features' average variance; and what the features' covariances may take.
EPSILON = 0.01
FEATURE_BYTES = 90_000_000


def feature_gaussian(moments: FeatureMoments, epsilon: float = EPSILON) -> tuple[torch.Tensor, torch.Tensor]:
    """PaDiM's Gaussian (Defard et al., 2021, section 3.2) of features that nothing predicts, at each position.

    A single image, whose positions do not vary, is told from how they vary over the image.

    Args:
        moments: sums over the features (N, C, P).
        epsilon: what is added to the covariances' diagonals, as a share of the features' variance averaged over
            channels and positions.

    Returns:
        The means, (P, C), and the whitening, as `residual_gaussian`. Both float64.
    """
    num_positions, num_channels = moments.total.shape
    mean = moments.mean()
    smallest = 1e-6  # of the variance: half precision must hold the whitening where nothing varies
    if moments.count > 1:
        ridge = epsilon * moments.variance().mean().clamp(min=smallest)
        return mean, torch.cat([pack_triangle(inverse) for _, inverse in moments.whitening_parts(ridge)])
    spread = mean - mean.mean(dim=0)
    ridge = epsilon * spread.square().mean().clamp(min=smallest)
    inverse = inverse_factor(spread.mT @ spread / num_positions + ridge * torch.eye(num_channels).to(spread))
    return mean, pack_triangle(inverse).expand(num_positions, -1)


def shared_feature_gaussian(moments: FeatureMoments, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gaussian whose covariance all positions share, and whose mean is a position's own.

    What tiles show at a position differs from another by the edge alone, which the networks see nothing beyond.

    Args:
        moments: sums over the features of all positions, as if they were one: (N, C, 1).
        mean: at each position, (P, C), over as many images at each.

    Returns:
        `mean`, and the whitening (1, C (C + 1) / 2). Both float64.
    """
    covariance = moments.total_of_products[0] / moments.count - mean.mT @ mean / len(mean)
    ridge = EPSILON * covariance.diagonal().mean().clamp(min=1e-6)
    return mean, pack_triangle(inverse_factor(covariance + ridge * torch.eye(len(covariance)).to(covariance)))[None]


def feature_grid(size: tuple[int, int], num_channels: int) -> tuple[int, int]:
    """Rows and columns of positions whose Gaussians `feature_gaussian` gives, at most `size`, and of its ratio.

    Their triangles take up to 90 MB in half precision: 49 x 49 positions of 192 channels. Against synthetic defects on
    good bottles (MVTec-AD) a covariance of its own was worth more to a position than a finer grid: pixel AP 31.1 at
    48 x 48, 27.8 at 56 x 56 where 2 x 2 positions share one.
    """
    most = FEATURE_BYTES // (num_channels * (num_channels + 1))
    rows, columns = size
    return (
        max(1, min(rows, math.isqrt(most * rows // columns))),
        max(1, min(columns, math.isqrt(most * columns // rows))),
    )


def feature_distances(
    features: torch.Tensor,
    mean: torch.Tensor,
    whitening: list[torch.Tensor],
    is_shared: bool = False,
    num_seen: int = 0,
) -> torch.Tensor:
    """|W (f - mean)|^2 / C, the squared Mahalanobis distance of features at each position, as a mean over channels.

    Args:
        features: (N, C, P) float32, of one category.
        mean: (P, C), and
        whitening: W, as `triangle_parts` of (P, C (C + 1) / 2), or of (1, ...) where `is_shared`.
        is_shared: whether all positions have one covariance.
        num_seen: how many images the Gaussian was computed from, where these are among them, see
            `leave_one_out_of_features`; 0 for others.

    Returns:
        (N, P).
    """
    num_images, num_channels, num_positions = features.shape
    squares = []
    # as many positions at once as a cache holds; a graph's runtime divides by itself
    step = num_positions if is_exporting() or is_shared else POSITIONS_AT_ONCE
    for start in range(0, num_positions, step):
        positions = slice(start, start + step)
        rows = (features[:, :, positions] - mean.mT[:, positions]).permute(2, 0, 1)  # (P', N, C)
        if not is_exporting() and rows.stride(2) != 1:  # of a file; networks have channels last already
            rows = rows.contiguous()  # torch's product takes ten times as long without
        of_positions = whitening if step == num_positions else [part[positions] for part in whitening]
        if is_shared:
            rows = rows.flatten(0, 1)[None]  # (1, P' * N, C)
        square: Any = sum(product.square().sum(dim=2) for product in multiply_parts(of_positions, rows)) / num_channels
        squares.append(square.view(-1, num_images))  # (P', N)
    squared = torch.cat(squares)  # (P, N)
    if num_seen:
        count = num_seen * num_positions if is_shared else num_seen
        squared = leave_one_out_of_features(squared, num_channels, count)
    return squared.mT


def leave_one_out_of_features(distance: torch.Tensor, num_channels: int, count: int) -> torch.Tensor:
    """What images' distances would be, had `feature_gaussian` not seen them.

    With S the scatter of n images about their mean and x an image's offset from it, the others' scatter is
    S - n / (n - 1) x x^T, and x is n / (n - 1) times as far from their mean. By the Sherman-Morrison formula the
    distance follows from x's own, by S / (n - 1) and a ridge. The others' scatter is divided by n - 1 as well, so that
    their ridge is the same: by n - 2, their own, distances would be up to (n - 1) / (n - 2) times smaller. The ridge's
    scale, the features' average variance, stays that of all n.

    Args:
        distance: |Wx|^2 / C of images among those seen; any shape.
        num_channels: C.
        count: n; below 3 there is no covariance of the others, and the distances come back as they are.
    """
    if count < 3:
        return distance
    leverage = count / (count - 1) ** 2 * num_channels * distance  # below 1
    return (count / (count - 1)) ** 2 * distance / (1.0 - leverage).clamp(min=1e-6)
