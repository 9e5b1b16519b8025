"""A Gaussian of the feature residual at each cell, as PaDiM (Defard et al., 2021) has of the features themselves."""

from __future__ import annotations

import math

import torch

from diffad.moments import PRIOR_IMAGES, FeatureMoments, shrink
from diffad.triangles import inverse_factor, multiply_parts, pack_triangle

# Share of the identity in the correlations of the feature residual.
RIDGE = 0.05

# How many numbers the covariances may take, 64 MB in float32, see `residual_grid`; how many an image's residual, see
# `residual_size`; and how many cells are factorised together, which bounds the memory of float64 copies.
COVARIANCE_NUMBERS = 2**24
RESIDUAL_NUMBERS = 2**19
CELLS_AT_ONCE = 64


def residual_grid(size: tuple[int, int], num_channels: int, num_categories: int = 1) -> tuple[int, int]:
    """Rows and columns of the cells that have a covariance of their own, of a residual map of `size`.

    A covariance takes C (C + 1) / 2 numbers; those of all cells and categories together are bounded, whatever the
    map's size: to 32 x 32 cells for 176 channels, to 3 x 3 for ResNet-50's 1,792. The sides are divisors of the map's,
    so a cell is a whole number of positions. The covariance is that of the residual's average over them: on held-out
    good images against synthetic defects that was worth more than one of single positions, which share it.
    """
    cells = COVARIANCE_NUMBERS // (num_categories * num_channels * (num_channels + 1) // 2)
    most = max(1, math.isqrt(cells))
    rows, columns = (max(d for d in range(1, most + 1) if side % d == 0) for side in size)
    return rows, columns


def residual_size(size: tuple[int, int], grid: tuple[int, int], num_channels: int) -> tuple[int, int]:
    """Rows and columns of the positions at which a residual map of `size` is measured: its own, or fewer.

    All of them where its C channels make up to 2^19 numbers, 1 MB in half precision, which is what an image's residual
    may take while it is calibrated; else divisors of `size`, as many as that allows, and never fewer than the `grid`'s
    cells.
    """
    most = math.isqrt(RESIDUAL_NUMBERS // num_channels)
    rows, columns = (
        max(d for d in range(cells, max(most, cells) + 1) if side % d == 0 and d % cells == 0)
        for side, cells in zip(size, grid, strict=True)
    )
    return rows, columns


def by_cell(residual: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(N, C, h, w) to (P, C, A, N): P cells of A positions each, see `from_cells`."""
    rows, columns = grid
    residual = residual.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # (N, C, rows, a, columns, b)
    return residual.permute(2, 4, 1, 3, 5, 0).flatten(3, 4).flatten(0, 1)


def from_cells(values: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """(P, A, N) to (N, h, w), the inverse of `by_cell` for one channel."""
    values = values.unflatten(1, (size[0] // grid[0], -1)).unflatten(0, grid)  # (rows, columns, a, b, N)
    return values.permute(4, 0, 2, 1, 3).reshape(-1, *size)


def residual_gaussian(
    moments: FeatureMoments, mean: torch.Tensor, grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gaussian of the feature residual at every cell, from sums over good images.

    Few images leave most of a covariance to chance, so each statistic is shrunk towards what needs fewer numbers, as if
    `PRIOR_IMAGES` images had shown it: means towards 0, where a denoiser's residual should be; variances towards their
    average over the cells; correlations towards theirs. A ridge keeps directions that no image has shown finite.

    Args:
        moments: sums over residuals (N, C, P), averaged over the positions of each cell.
        mean: of the residual at every one of Q positions, (Q, C).
        grid: rows and columns of the P cells.

    Returns:
        The shrunk means, (Q, C), and the whitening, (P, C (C + 1) / 2): the lower triangle, row by row, of the matrix W
        for which W^T W is the covariance's inverse. Both float64.
    """
    num_cells, num_channels = moments.total.shape
    weight = moments.count / (moments.count + PRIOR_IMAGES)
    raw_mean = moments.mean()  # (P, C)

    def covariance(cells: slice) -> torch.Tensor:  # about the shrunk mean, (P', C, C)
        raw = raw_mean[cells]
        offset = (1.0 - weight) * raw
        products = moments.total_of_products[cells] / moments.count
        return products - raw[:, :, None] * raw[:, None, :] + offset[:, :, None] * offset[:, None, :]

    parts = [slice(start, start + CELLS_AT_ONCE) for start in range(0, num_cells, CELLS_AT_ONCE)]
    mean_square = moments.total_of_products.diagonal(dim1=1, dim2=2) / moments.count
    variance = mean_square - raw_mean.square() + ((1.0 - weight) * raw_mean).square()  # (P, C)
    variance = shrink(variance.mT.unflatten(1, grid), moments.count, PRIOR_IMAGES).flatten(1).mT
    deviation = variance.sqrt()

    def correlation(cells: slice) -> torch.Tensor:
        return covariance(cells) / (deviation[cells, :, None] * deviation[cells, None, :])

    identity = torch.eye(num_channels, dtype=torch.float64, device=raw_mean.device)
    average = torch.stack([correlation(part).sum(dim=0) for part in parts]).sum(dim=0) / num_cells  # (C, C)
    average = average.where(identity == 0, 1.0)
    whitening = []
    for part in parts:
        shrunk = weight * correlation(part) + (1.0 - weight) * average  # (P', C, C)
        inverse = inverse_factor((1.0 - RIDGE) * shrunk + RIDGE * identity)
        whitening.append(pack_triangle(inverse / deviation[part, None, :]))
    return weight * mean, torch.cat(whitening)


def residual_distances(
    residual: torch.Tensor,
    mean: torch.Tensor,
    whitening: list[torch.Tensor],
    grid: tuple[int, int],
    num_seen: int = 0,
) -> tuple[torch.Tensor, ...]:
    """|W (r - mean)|^2 / C, the squared Mahalanobis distance of a residual, as a mean over channels.

    Args:
        residual: (N, C, h, w) float32, of one category.
        mean: (h * w, C).
        whitening: W of each of P cells, as `triangle_parts`.
        grid: rows and columns of the cells.
        num_seen: how many images the Gaussian was computed from, where these are among them, see `leave_one_out`; 0 for
            others.

    Returns:
        (N, rows, columns), of the residual's average at each cell. Where cells are of several positions, also
        (N, h, w), of each position by its cell's covariance.
    """
    num_channels, size = residual.shape[1], (residual.shape[2], residual.shape[3])
    centered = by_cell(residual - mean.mT.unflatten(1, size), grid)  # (P, C, A, N)
    whitened = torch.cat(multiply_parts(whitening, centered.flatten(2).mT), dim=2).mT.view_as(centered)
    has_positions = size != tuple(grid)
    average = whitened.mean(dim=2, keepdim=True) if has_positions else whitened  # (P, C, 1, N)
    cell = average.square().mean(dim=1)  # (P, 1, N)
    of_cells = leave_one_out(cell, cell, cell, num_channels, num_seen) if num_seen else cell
    if not has_positions:
        return (from_cells(of_cells, grid, grid),)
    position = whitened.square().mean(dim=1)  # (P, A, N)
    if num_seen:
        product = (whitened * average).mean(dim=1)  # (P, A, N)
        position = leave_one_out(position, product, cell, num_channels, num_seen)
    return from_cells(of_cells, grid, grid), from_cells(position, grid, size)


def leave_one_out(
    distance: torch.Tensor,
    product: torch.Tensor,
    cell_distance: torch.Tensor,
    num_channels: int,
    count: int,
) -> torch.Tensor:
    """What images' distances would be, had the Gaussian of `residual_gaussian` not seen them.

    An image draws mean and covariance towards itself, so among a few hundred it looks much closer than a new one will.
    Its share of the covariance is one product of rank one, which the Sherman-Morrison formula takes out again: all
    images can serve the covariance, and still say what a new one's distance will be. Variances and the average of the
    correlations stay as they are: a single image of hundreds hardly moves them (for 300 images of 176 channels the
    result is within 1% of 300 Gaussians of 299 images). One of three does, and so does one of fewer images than
    channels (15% for 60 images of 100 channels): distances then come out too small, though never below those given.

    Args:
        distance: |Wy|^2 / C of residuals y of images among those seen; any shape.
        product: Wy . Wx / C with x, the average over the cell's positions that the covariance was computed from.
        cell_distance: |Wx|^2 / C.
        num_channels: C.
        count: images seen.

    Returns:
        The distances, of the same shape.
    """
    share = (1.0 - RIDGE) * num_channels / (count + PRIOR_IMAGES)
    leverage = share * cell_distance  # below 1
    of_mean = (count + PRIOR_IMAGES) / (count + PRIOR_IMAGES - 1.0)
    return of_mean**2 * (distance + share * product.square() / (1.0 - leverage).clamp(min=1e-6))
