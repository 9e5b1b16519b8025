"""From measurements to one anomaly map and one score per image.

Plain functions over tensors. Lu et al. (ICCV 2023) is the source of `feature_error` and `joint_map` (eqs. 9-11),
He et al. (AAAI 2024) of `cosine_distance_map` (eqs. 9-10) and of the pooled image score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from diffad.exporting import is_exporting
from diffad.regions import level_of_area, num_smallest
from diffad.resizing import smoothing_weights

SMALLEST_SHARE = 1e-6  # of a mean's pixels that count, where those outside of a region do not


class Measurement(NamedTuple):
    """What the networks say of N images, before any statistic of good ones.

    maps: (N, S, H, W) float32 score maps at the processing resolution, not smoothed; S may be 0.
    residual: (N, T, C, h, w) float32, the true less the predicted or reconstructed features; None without one.
    features: (N, C, h, w) float32, the features themselves, whose Gaussian at each position is a map; or None.
    patches: (N, C, h, w) float32, features whose distance from the nearest of good images is a map; or None.
    image: (N,) integers, the images' numbers among those that the statistics come from; None for new images.
    """

    maps: torch.Tensor
    residual: torch.Tensor | None = None
    features: torch.Tensor | None = None
    patches: torch.Tensor | None = None
    image: torch.Tensor | None = None


def empty_measurement(measurement: Measurement) -> Measurement:
    """A measurement of the same shapes and of no images: what a process adds that has no image to look at."""
    maps, *others = measurement
    return Measurement(maps[:0], *(None if values is None else values[:0] for values in others))


def gaussian_smooth(maps: torch.Tensor, sigma: float, inside: torch.Tensor | None = None) -> torch.Tensor:
    """Smooths maps with a Gaussian of `sigma` pixels, cut off at 4 sigma, edges mirrored.

    Two one-dimensional convolutions, so the cost grows with sigma and not with its square.

    Args:
        maps: (..., H, W) float.
        sigma: standard deviation in pixels; 0 returns the maps as they are.
        inside: which pixels count, bool, of a shape that the maps' broadcasts; None for all. Each pixel is then a mean
            of those that count, so that nothing outside of a region shows inside.

    Raises:
        ValueError: `sigma` is negative or not finite.
    """
    radius = _radius(sigma)
    if radius == 0:
        return maps
    if inside is not None:
        share = gaussian_smooth(inside.to(maps), sigma).clamp(min=SMALLEST_SHARE)
        return gaussian_smooth(torch.where(inside, maps, 0.0), sigma) / share
    offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    kernel = kernel / kernel.sum()
    height, width = maps.shape[-2:]
    flat = maps.reshape(-1, 1, height, width)
    with torch.autocast(maps.device.type, enabled=False):  # would round the maps to three digits
        flat = F.conv2d(_mirror(flat, radius, dim=2), kernel.view(1, 1, -1, 1))
        flat = F.conv2d(_mirror(flat, radius, dim=3), kernel.view(1, 1, 1, -1))
    return flat.reshape(maps.shape)


def smooth_maps(
    maps: torch.Tensor, num_kl: int, kl_sigma: float, feature_sigma: float, inside: torch.Tensor | None = None
) -> torch.Tensor:
    """Maps (N, S, H, W), of which the first `num_kl` are smoothed by the one sigma and the others by the other."""
    parts = ((maps[:, :num_kl], kl_sigma), (maps[:, num_kl:], feature_sigma))
    return torch.cat([gaussian_smooth(part, sigma, inside) for part, sigma in parts], dim=1)


def _radius(sigma: float) -> int:
    if not 0.0 <= sigma < math.inf:
        raise ValueError(f"`sigma` must be finite and not negative, but is {sigma}.")
    return int(4.0 * sigma + 0.5)


def _mirror(maps: torch.Tensor, radius: int, dim: int) -> torch.Tensor:
    """Pads by `radius` on both ends of `dim`, mirrored at the edges (d c b a | a b c d | d c b a), any radius."""
    length = maps.shape[dim]
    index = torch.arange(-radius, length + radius, device=maps.device) % (2 * length)
    return maps.index_select(dim, torch.minimum(index, 2 * length - 1 - index))


def feature_error(residual: torch.Tensor, layer_channels: Sequence[int]) -> torch.Tensor:
    """Mean over each layer's channels of the squared feature residual (Lu et al., eq. 10).

    Layer by layer, because a deep layer's many channels would drown the fine ones that see a crack.

    Args:
        residual: true less predicted features, (N, T, C, h, w).
        layer_channels: widths of the L layers, which sum to C.

    Returns:
        (N, T * L, h, w).
    """
    layers = residual.square().split(list(layer_channels), dim=2)
    return torch.stack([layer.mean(dim=2) for layer in layers], dim=2).flatten(1, 2)


def joint_map(kl_maps: torch.Tensor, feature_maps: torch.Tensor, alpha: float) -> torch.Tensor:
    """The two scores joined and averaged over noise levels and layers (Lu et al., eq. 11).

    Args:
        kl_maps: normalised KL, (N, T, H, W); where T is 0 the feature error counts alone.
        feature_maps: normalised feature error, (N, T * L, H, W).
        alpha: weight of the KL in [0, 1].

    Returns:
        (N, H, W).
    """
    errors = feature_maps.mean(dim=1)
    return alpha * kl_maps.mean(dim=1) + (1.0 - alpha) * errors if kl_maps.shape[1] else errors


def outline_by_positions(
    of_cells: torch.Tensor, of_positions: torch.Tensor, inside: torch.Tensor | None = None
) -> torch.Tensor:
    """A map as high as that of cells, which falls away from its peak as that of positions does.

    Cells of several positions say whether something is there, their positions where it ends.

    Args:
        of_cells, of_positions: anomaly maps, (N, H, W) each.
        inside: (N, H, W) or (1, H, W) bool, whose pixels have the peaks; None for all.

    Returns:
        (N, H, W).
    """
    counted = (maps if inside is None else maps.masked_fill(~inside, -torch.inf) for maps in (of_cells, of_positions))
    peak, own_peak = (maps.amax(dim=(1, 2), keepdim=True) for maps in counted)  # (N, 1, 1)
    return of_positions + (peak - own_peak)


def heighten_contrast(maps: torch.Tensor, contrast: float, inside: torch.Tensor | None = None) -> torch.Tensor:
    """Lowers each map away from its peak, which stays: what lies around one image's defect outshines no other's.

        m - contrast * min(peak - m, peak - mean)

    Features see more than their own position, so the surroundings of a defect stand out too, the more so the higher the
    defect does. Pixels below the map's mean are lowered by as much as those at the mean. The order of a map's pixels
    stays, and so does its maximum.

    Args:
        maps: (N, H, W).
        contrast: not negative; 0 returns the maps as they are.
        inside: (N, H, W) or (1, H, W) bool, whose pixels have the peak and the mean; None for all.
    """
    if not contrast:
        return maps
    counted = maps if inside is None else torch.where(inside, maps, 0.0)
    share = 1.0 if inside is None else inside.float().mean(dim=(1, 2), keepdim=True)
    mean = counted.mean(dim=(1, 2), keepdim=True) / share  # (N, 1, 1)
    highest = counted if inside is None else maps.masked_fill(~inside, -torch.inf)
    peak = highest.amax(dim=(1, 2), keepdim=True).clamp(max=torch.finfo(maps.dtype).max)  # infinity less itself is NaN
    return maps - contrast * torch.minimum(peak - maps, (peak - mean).clamp(min=0.0))


def cut_small_peaks(maps: torch.Tensor, smallest_area: float, inside: torch.Tensor | None = None) -> torch.Tensor:
    """Lowers each map's peaks that are smaller than an area to where a region of that area stands together.

    So the maximum becomes that of what is large enough. A mask of the map at a threshold above that level is empty,
    and one below it holds a region that is large enough, beside smaller ones, perhaps.

    Args:
        maps: (N, H, W).
        smallest_area: share of the image's area, in [0, 1); 0 returns the maps as they are, and so does a graph that is
            exported: no runtime has an operator for it.
        inside: (N, H, W) or (1, H, W) bool, of which regions are made; None for all.
    """
    if not smallest_area or is_exporting():
        return maps
    num_pixels = num_smallest(smallest_area, (maps.shape[1], maps.shape[2]))
    counted = maps
    if inside is not None:
        lowest = maps.masked_fill(~inside, torch.inf).amin(dim=(1, 2), keepdim=True)
        counted = torch.where(inside, maps, lowest)
    levels = [level_of_area(one, num_pixels) for one in counted.float().cpu().numpy()]
    return torch.minimum(maps, maps.new_tensor(levels)[:, None, None])


def difference_map(images: torch.Tensor, other_images: torch.Tensor, sigma: float) -> torch.Tensor:
    """How far two images' colours are apart: absolute difference, averaged over the colours and smoothed.

    Args:
        images, other_images: (N, 3, H, W) in [-1, 1].
        sigma: of the smoothing, in pixels.

    Returns:
        (N, H, W) in [0, 1].
    """
    return gaussian_smooth((images - other_images).abs().mean(dim=1) / 2.0, sigma)


def resize_maps(
    maps: torch.Tensor, size: tuple[int, int], sigma: float = 0.0, inside: torch.Tensor | None = None
) -> torch.Tensor:
    """Maps of features, (N, E, h, w), interpolated bilinearly to (N, E, *size), and smoothed there if `sigma` says so.

    Both are linear, so together they are one small product along the columns and one along the rows: a fortieth of the
    time that smoothing takes afterwards. `inside`, (N, 1, h, w) or (1, 1, h, w) bool, is as of `gaussian_smooth`.
    """
    if inside is not None:
        share = resize_maps(inside.to(maps), size, sigma).clamp(min=SMALLEST_SHARE)
        return resize_maps(torch.where(inside, maps, 0.0), size, sigma) / share
    if _radius(sigma) == 0 or torch.compiler.is_dynamo_compiling():  # which knows no matrices of NumPy
        return gaussian_smooth(F.interpolate(maps, size, mode="bilinear"), sigma)
    rows, columns = (
        torch.from_numpy(smoothing_weights(*lengths, sigma)).to(maps)
        for lengths in zip(maps.shape[-2:], size, strict=True)
    )
    with torch.autocast(maps.device.type, enabled=False):  # would round the maps to three digits
        return rows @ (maps @ columns.mT)


def cosine_distance_map(
    layers: Sequence[torch.Tensor], other_layers: Sequence[torch.Tensor], size: tuple[int, int]
) -> torch.Tensor:
    """1 - cosine similarity of two images' features, layer by layer, upsampled and summed (He et al., eqs. 9-10).

    Args:
        layers: the input's features, each (N, C_i, h_i, w_i).
        other_layers: the reconstruction's, of the same shapes.
        size: height and width of the map.

    Returns:
        (N, *size), in [0, 2 * number of layers].
    """
    total = torch.zeros((layers[0].shape[0], 1, *size), device=layers[0].device)
    for layer, other in zip(layers, other_layers, strict=True):
        distance = 1.0 - F.cosine_similarity(layer.float(), other.float(), dim=1)  # (N, h_i, w_i)
        total += F.interpolate(distance[:, None], size, mode="bilinear", align_corners=True)
    return total[:, 0]


def max_score(
    maps: torch.Tensor, pooling_size: int = 1, pooling_rounds: int = 0, inside: torch.Tensor | None = None
) -> torch.Tensor:
    """The map's maximum, after rounds of stride-1 average pooling (He et al., section 4.1: 8 rounds of 8 x 8).

    Args:
        maps: (N, H, W).
        pooling_size: side of the pooling window in pixels; at most the map's own.
        pooling_rounds: how often to pool; each round takes `pooling_size - 1` off the map's sides. It stops where the
            map has become smaller than the window.
        inside: (H, W) bool, which pixels count; None for all. Averages are over those, in windows that lie at least
            half inside, or as much as any.

    Returns:
        (N,).
    """
    if inside is not None and not bool(inside.all()):
        shown = inside.to(maps)[None]  # (1, H, W)
        share = pool(shown, pooling_size, pooling_rounds)[0]
        counts = share >= share.amax().clamp(max=0.5)
        pooled = pool(torch.where(inside, maps, 0.0), pooling_size, pooling_rounds)
        return (pooled[:, counts] / share[counts]).amax(dim=1)
    return pool(maps, pooling_size, pooling_rounds).flatten(1).amax(dim=1)


def pool(maps: torch.Tensor, size: int, rounds: int) -> torch.Tensor:
    """Maps (N, H, W) after rounds of stride-1 average pooling, as of `max_score`."""
    pooled = maps[:, None]  # (N, 1, H, W)
    for _ in range(rounds):
        if min(pooled.shape[-2:]) < size:
            break
        pooled = F.avg_pool2d(pooled, size, stride=1)
    return pooled[:, 0]


def top_fraction_score(maps: torch.Tensor, fraction: float) -> torch.Tensor:
    """Mean of the highest `fraction` of a map's pixels, (N, H, W) -> (N,): a maximum that one pixel cannot decide."""
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"`fraction` must lie in (0, 1], but is {fraction}.")
    pixels = maps.flatten(1)
    count = max(1, math.ceil(fraction * pixels.shape[1]))
    return pixels.topk(count, dim=1).values.mean(dim=1)
