"""Why an image has its score: which map, layer and noise level spoke at its peak, and the good images most like it."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from diffad.images import ImageInput, ImageSequence, as_size, images_to_pixel_values
from diffad.pipelines.checks import (
    MAP_NAMES,
    check_batch_size,
    check_calibration,
    check_generator,
    check_good_images,
    shares,
)
from diffad.region_of_interest import hide_outside, inside_region
from diffad.scoring import outline_by_positions
from diffad.triangles import unpack_triangle

if TYPE_CHECKING:
    from diffad.pipelines.pipeline_anomaly_denoise import AnomalyDenoisePipeline


class Explanation(NamedTuple):
    """What the score of one image is made of, at the peak of its map.

    score: the image's.
    peak: row and column of the highest pixel, in the image's own pixels.
    maps: what each map adds to the joined map there, in standard deviations of good images: `kl at 5` for each noise
        level, `feature_error`, `gaussian`, `nearest`. Their sum is the map's height before `smallest_area`.
    layers: of each map of features, the shares that the layers have in its squared distance, such as `stride 8`. They
        sum to 1. Some may be below 0: channels that vary together make up for each other.
    levels: the shares of the noise levels in the feature error's, likewise; empty without one.
    nearest: places in `good_images` of those most like the image, the nearest first, and how far they are: the root
        mean square difference of the standardised features.
    """

    score: float
    peak: tuple[int, int]
    maps: dict[str, float]
    layers: dict[str, dict[str, float]]
    levels: dict[str, float]
    nearest: list[tuple[int, float]]

    def in_words(self) -> str:
        """Which maps, layers and noise levels spoke."""

        def in_percent(shares: dict[str, float]) -> str:
            return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())

        told = []
        for name, height in sorted(self.maps.items(), key=lambda one: -one[1]):
            of_layers = in_percent(self.layers.get(name, {}))
            levels = "; noise " + in_percent(self.levels) if name == "feature_error" else ""
            told.append(f"{name.replace('_', ' ')} {height:+.1f}" + (f" ({of_layers}{levels})" if of_layers else ""))
        return "Where the map is highest, in standard deviations: " + "; ".join(told) + "."


@torch.no_grad()
def explain(
    pipeline: AnomalyDenoisePipeline,
    image: ImageInput,
    category: str | int | None = None,
    generator: torch.Generator | None = None,
    good_images: Sequence[Any] | None = None,
    num_nearest: int = 3,
    batch_size: int = 16,
) -> Explanation:
    """Why an image has its score.

    Args:
        pipeline: calibrated, and without tiles.
        image: one image, as a call takes it.
        category: of a unified model; None recognises it.
        generator: of the noise, as in a call.
        good_images: good images or their paths, such as those of the calibration; None compares with none.
        num_nearest: how many of them are told.
        batch_size: of them, in one pass.

    Raises:
        ValueError: several images, a pipeline that is not calibrated or one of tiles, or `good_images` that are no
            sequence.
    """
    if good_images is not None:
        check_good_images("good_images", good_images)
    check_batch_size(batch_size)
    check_generator(generator)
    if not isinstance(num_nearest, (int, np.integer)) or num_nearest < 1:
        raise ValueError(f"`num_nearest` must be a positive integer, but is {num_nearest!r}.")
    images = ImageSequence(image, pipeline.value_range)
    if len(images) != 1:
        raise ValueError(f"`image` must be one image, but holds {len(images)}. Call `explain` for each.")
    if pipeline.calibration is None:
        raise ValueError(
            "`explain` needs a calibrated pipeline: call `pipe.calibrate(good_images)`, or diffad calibrate."
        )
    if pipeline.tile_size is not None:
        raise ValueError("`explain` looks at whole images, and this pipeline at tiles: fit one with --tile_size none.")
    if category is None and len(pipeline.categories) > 1:
        category = pipeline.recognise(images, 1)[0]
    index = pipeline.category_index(category)

    of_category = torch.full((1,), index, device=pipeline._execution_device)
    own_noise = generator is None if pipeline.runs_denoiser else None
    settings = {**pipeline.config, **pipeline.scheduler_settings}
    check_calibration(pipeline.calibration, of_category, pipeline.categories, pipeline.precision, settings, own_noise)

    # 1. The maps (1, S, H, W), the joined map and its peak
    measurement = pipeline.measure_images(images, of_category, [generator], pipeline.region)
    calibration = pipeline.calibration
    maps = pipeline.score_maps(measurement, of_category, calibration)
    joined = pipeline.join_maps(maps, of_category, calibration)  # (1, H, W)
    _, scores = pipeline.score_inside(joined, of_category)
    height, width = joined.shape[1:]
    inside = inside_region(pipeline.region, of_category, (height, width))
    highest = int((joined if inside is None else joined.masked_fill(~inside, -torch.inf)).argmax())
    row, column = divmod(highest, width)
    place = (row + 0.5) / height, (column + 0.5) / width  # as shares of the sides

    # 2. What each map adds to it, what the layers add to each distance
    layers: dict[str, dict[str, float]] = {}
    levels: dict[str, float] = {}
    if measurement.residual is not None:
        layers["feature_error"], levels = residual_shares(pipeline, measurement.residual, index, place)
    if measurement.features is not None:
        layers["gaussian"] = gaussian_shares(pipeline, measurement.features, index, place)
    if measurement.patches is not None:
        layers["nearest"] = nearest_shares(pipeline, measurement.patches, index, place)

    # 3. The good images most like it
    nearest: list[tuple[int, float]] = []
    if good_images is not None:
        others = ImageSequence.of_rows(good_images, range(len(good_images)), pipeline.value_range)
        [nearest] = most_alike(pipeline, images, others, index, num_nearest, batch_size)
    size = images.sizes[0]
    return Explanation(
        float(scores[0]),
        (int(place[0] * size[0]), int(place[1] * size[1])),
        map_shares(pipeline, calibration.normalize(maps, of_category)[0], (row, column), inside),
        layers,
        levels,
        nearest,
    )


def map_shares(
    pipeline: AnomalyDenoisePipeline, normalized: torch.Tensor, peak: tuple[int, int], inside: torch.Tensor | None
) -> dict[str, float]:
    """What normalised maps (S, H, W) add to the joined map at a pixel, as `join_maps` weights them.

    `inside`, (1, H, W) bool, counts; None for all.
    """
    weights = shares(pipeline.weights)
    named = pipeline.calibration.named_maps(normalized[None], *MAP_NAMES[:2])
    kl = named["kl"][0]  # (T, H, W)
    of_name = {
        f"kl at {timestep}": weights["kl"] / len(kl) * one
        for timestep, one in zip(pipeline.config.timesteps, kl, strict=False)
    }
    errors = list(weights["feature_error"] * named["feature_error"][0])
    of_name |= {name: weights[name] * named[name][0, 0] for name in ("gaussian", "nearest") if weights[name]}
    if errors:
        rest = torch.stack([*of_name.values(), torch.zeros_like(normalized[0])]).sum(dim=0)
        if len(errors) == 2:
            of_cells, of_positions = ((rest + error)[None] for error in errors)
            joined = outline_by_positions(of_cells, of_positions, inside)[0]
            errors = [joined - rest]
        of_name["feature_error"] = errors[0]
    return {name: float(one[peak]) for name, one in of_name.items()}


def gaussian_shares(
    pipeline: AnomalyDenoisePipeline, features: torch.Tensor, index: int, place: tuple[float, float]
) -> dict[str, float]:
    """The layers' shares in the squared distance of features (1, C, h, w) from their Gaussian at a place."""
    rows, columns = features.shape[-2:]
    position = int(place[0] * rows) * columns + int(place[1] * columns)
    offset = features[0].float().flatten(1)[:, position] - pipeline.calibration.feature_mean[index, position]
    of_channels = _shares_of_channels(offset[None], pipeline.calibration.feature_whitening[index, position])[0]
    return _by_layer(pipeline, of_channels, pipeline.scored_layers)


def residual_shares(
    pipeline: AnomalyDenoisePipeline, residual: torch.Tensor, index: int, place: tuple[float, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """The layers' and the levels' shares in the squared distance of a residual (1, T, C, h, w) in its cell."""
    calibration = pipeline.calibration
    size, grid = calibration.config.residual_shape[1:], calibration.grid
    offset = F.adaptive_avg_pool2d(residual[0].float(), tuple(size))  # (T, C, h, w)
    offset = F.adaptive_avg_pool2d(offset - calibration.residual_mean[index].mT.unflatten(1, size), grid)
    cell = int(place[0] * grid[0]) * grid[1] + int(place[1] * grid[1])
    found = _shares_of_channels(offset.flatten(2)[:, :, cell], calibration.residual_whitening[index, cell])  # (T, C)
    of_levels = zip(pipeline.config.timesteps, found.sum(dim=1).tolist(), strict=True)
    levels = {f"at {timestep}": share for timestep, share in of_levels}
    return _by_layer(pipeline, found.sum(dim=0), pipeline.scored_layers), levels


def nearest_shares(
    pipeline: AnomalyDenoisePipeline, patches: torch.Tensor, index: int, place: tuple[float, float]
) -> dict[str, float]:
    """The layers' shares in the squared distance of the patch (of (1, C, h, w)) at a place from the nearest."""
    rows, columns = patches.shape[-2:]
    patch = patches[0, :, int(place[0] * rows), int(place[1] * columns)].float()
    coreset, directions = pipeline.calibration.coreset[index].float(), pipeline.calibration.patch_directions
    offset = coreset - (patch if directions is None else patch @ directions[index])  # (M, D)
    offset = offset[offset.square().sum(dim=1).argmin()]
    squares = (offset if directions is None else directions[index] @ offset).square()  # (C,), of the same sum
    return _by_layer(pipeline, squares / squares.sum().clamp(min=1e-12), pipeline.patch_layers)


def _shares_of_channels(offset: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Shares (T, C) of T parts and C channels in |W x|^2, x the mean of `offset` (T, C): x_tc (W^T W x)_c / T."""
    whitening = unpack_triangle(packed, offset.shape[1])
    mean = offset.mean(dim=0)
    products = offset * (whitening.mT @ (whitening @ mean)) / len(offset)
    return products / products.sum().clamp(min=1e-12)


def _by_layer(pipeline: AnomalyDenoisePipeline, of_channels: torch.Tensor, layers: Sequence[int]) -> dict[str, float]:
    """Shares (C,) of channels, added up in each of the layers that these are of."""
    strides = pipeline.feature_extractor.layer_strides
    names = [f"stride {strides[i]}" if strides.count(strides[i]) == 1 else f"layer {i}" for i in layers]
    of_layers = of_channels.split([pipeline.feature_extractor.layer_channels[i] for i in layers])
    return {name: float(one.sum()) for name, one in zip(names, of_layers, strict=True)}


def most_alike(
    pipeline: AnomalyDenoisePipeline,
    images: ImageSequence,
    good_images: ImageSequence,
    index: int,
    count: int,
    batch_size: int,
) -> list[list[tuple[int, float]]]:
    """For each image the good images whose standardised features are nearest, by the root mean square difference.

    Good images are looked at once, a batch at a time; the features of all `images` are kept meanwhile.
    """

    def features_of(sequence: ImageSequence) -> torch.Tensor:  # (N, C, h, w)
        size, device = as_size(pipeline.input_resolution), pipeline._execution_device
        category = torch.full((len(sequence),), index, device=device)
        pixel_values = images_to_pixel_values(sequence, size).to(device)
        pixel_values = hide_outside(pixel_values, inside_region(pipeline.region, category, size))
        extractor = pipeline.feature_extractor
        return extractor(pixel_values.to(extractor.dtype), pipeline.feature_resolution).float()

    own = features_of(images)
    distances: list[list[float]] = [[] for _ in own]
    for start in range(0, len(good_images), batch_size):
        others = features_of(good_images[start : start + batch_size])
        for one, of_image in zip(own, distances, strict=True):
            of_image += (others - one).square().mean(dim=(1, 2, 3)).sqrt().tolist()
    return [heapq.nsmallest(count, enumerate(of_image), key=lambda one: one[1]) for of_image in distances]
