"""Detection in tiles: maps of large images, and their calibration. Any pipeline that says what it measures of pixels.

An image is looked at as a whole, resized, and in tiles at its own pixels. What is wrong at large shows in the one, what
is small in the others. Each view has statistics of its own: the whole image at each place; tiles share theirs wherever
they lie, and the map that is blended of them has a mean and a deviation at each place of the image, or, where good
images do not show the same at the same place, one for all places.
The larger of the two, in standard deviations, is the image's map. Thresholds come from such maps of held-out images, so
the false-alarm rate is that of images. One image at a time is in memory, decoded once, and a batch of its tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image

from diffad.calibration.fitting import trust_positions
from diffad.calibration.score_calibration import ScoreCalibration
from diffad.images import ImageSequence, as_size, resize_image
from diffad.moments import MomentSums
from diffad.process_share import process_share
from diffad.read_ahead import read_ahead
from diffad.region_of_interest import hide_outside, inside_region, stand_ins
from diffad.scoring import Measurement, cut_small_peaks, empty_measurement, resize_maps
from diffad.tiling import (
    MOSTLY,
    TileGrid,
    blend_tiles,
    cells_of_tiles,
    join_views,
    places_inside,
    spread_places,
    tile_grid,
    tile_views,
)

if TYPE_CHECKING:
    from diffad.pipelines.detection import DetectionPipeline

MAX_STATISTICS_TILES = 512  # of a category; each shows as many positions as a whole image
MAX_PLACE_IMAGES = 64  # of a category, whose every tile is looked at to know what is usual at a place


class Calibrations(NamedTuple):
    """Of whole images and of tiles; None before they are known."""

    of_image: ScoreCalibration | None
    of_tiles: ScoreCalibration | None


class LargeImage(NamedTuple):
    """An image that is looked at in several views, and what they have in common.

    Attributes:
        pixels: a PIL image, upright, or a tensor (3, H, W) in [0, 1].
        category: its index.
        generator: of its noise, first that of the whole, then that of the tiles in their order; None gives each
            view the model's own.
        batch_size: tiles in one pass of the networks.
        value_range: of images of more than 8 bits.
        region: of each category, (K, h, w) bool; None where all pixels count.
    """

    pixels: Image.Image | torch.Tensor
    category: int
    generator: torch.Generator | None
    batch_size: int
    value_range: float | None
    region: torch.Tensor | None


def detect_large(
    pipeline: DetectionPipeline,
    images: ImageSequence,
    category: torch.Tensor,
    generators: Sequence[torch.Generator | None],
    batch_size: int,
    size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps and scores of images, one after another.

    Args:
        pipeline: which looks at tiles.
        images: N of any size.
        category: (N,) indices.
        generators: one an image, of its noise.
        batch_size: tiles in one pass of the networks.
        size: of the maps.

    Returns:
        (N, *size) and (N,), on the CPU.
    """
    calibrations = Calibrations(pipeline.calibration, pipeline.tile_calibration)
    maps, scores = [], []
    for pixels, index, generator in zip(images.whole(), category.cpu().split(1), generators, strict=True):
        image = LargeImage(pixels, int(index), generator, batch_size, images.value_range, pipeline.region)
        joined, score = pipeline.score_inside(large_image_map(pipeline, image, calibrations)[None], index)
        scores.append(score)
        own_size = size_of(pixels)
        maps.append(
            pipeline.at_size(joined, size, index, grid_of(pipeline, own_size).cell if size == own_size else None)
        )
    return torch.cat(maps), torch.cat(scores)


def large_image_map(pipeline: DetectionPipeline, image: LargeImage, calibrations: Calibrations) -> torch.Tensor:
    """The anomaly map of one image, (rows, columns) of `tile_grid`'s cells, on the CPU; raw without calibrations."""
    of_image = whole_map(pipeline, image, calibrations.of_image)
    return join_large(blended_map(pipeline, image, calibrations.of_tiles), of_image, image.category, calibrations)


def whole_map(pipeline: DetectionPipeline, image: LargeImage, calibration: ScoreCalibration | None) -> torch.Tensor:
    """The map of an image as a whole, (R, R') of the networks' size."""
    measurement, index = measure_view(pipeline, whole_view(pipeline, image), image, of_tiles=False)
    return pipeline.join_maps(pipeline.score_maps(measurement, index, calibration), index, calibration)[0]


def blended_map(
    pipeline: DetectionPipeline,
    image: LargeImage,
    calibration: ScoreCalibration | None,
    number: int | None = None,
    places: Sequence[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """The map of an image's tiles, (rows, columns), on the CPU.

    Args:
        pipeline, image: as of `large_image_map`.
        calibration: of tiles.
        number: of an image that is among those of the statistics, which is then measured by the others' patches.
        places: of the tiles that are looked at, whose share of the map it then is; None takes all that count.
    """
    grid = grid_of(pipeline, size_of(image.pixels))
    inside = cells_inside(image.region, image.category, grid)
    places = places_inside(grid, inside) if places is None else places

    def joined_map(pixel_values: torch.Tensor) -> torch.Tensor:  # (N, R, R')
        measurement, index = measure_view(pipeline, pixel_values, image, of_tiles=True)
        if number is not None:
            measurement = measurement._replace(image=torch.full_like(index, number))
        return pipeline.join_maps(pipeline.score_maps(measurement, index, calibration), index, calibration)

    size = as_size(pipeline.input_resolution)
    tiles = tile_views(image.pixels, grid, places, image.batch_size, size, image.value_range, inside)
    return blend_tiles(grid, places, map(joined_map, tiles), pipeline.config.tile_overlap)


def join_large(
    of_tiles: torch.Tensor, of_image: torch.Tensor, category: int, calibrations: Calibrations
) -> torch.Tensor:
    """The anomaly map of an image, (rows, columns), of `blended_map` and `whole_map`."""
    if calibrations.of_image is None or calibrations.of_tiles is None:
        return join_views(of_tiles, of_image)
    joined = join_views(calibrations.of_tiles.normalize_places(of_tiles, category), of_image)
    inside = inside_region(calibrations.of_image.region, torch.tensor([category]), joined.shape)  # (1, rows, columns)
    return cut_small_peaks(joined[None], calibrations.of_image.smallest_area, inside)[0]


def calibrate_large(
    pipeline: DetectionPipeline,
    statistics: ImageSequence,
    held_out: ImageSequence,
    category: int,
    generators: Sequence[torch.Generator | None],
    batch_size: int,
    false_alarm_rate: float,
    accelerator: Accelerator | None,
    value_range: float | None,
    region: torch.Tensor | None,
    smallest_area: float,
) -> None:
    """Gives a pipeline the calibrations of whole images and of tiles, and thresholds of both together.

    Args:
        statistics: images of which at most `MAX_STATISTICS_TILES` tiles, spread over them, are looked at.
        held_out: images of whose maps the thresholds come.
        category: of the images.
        generators: of the noise of the statistics' images, then of the others.
        batch_size, false_alarm_rate, accelerator, value_range, region, smallest_area: as of
            `DetectionPipeline.calibrate`.
    """
    own_noise = all(one is None for one in generators)
    options: dict[str, Any] = {"accelerator": accelerator, "value_range": value_range, "own_noise": own_noise}
    of_image: dict[str, Any] = {"smallest_area": smallest_area, "region": region}
    fit = pipeline.calibration_fit(category, len(held_out), false_alarm_rate, **of_image, **options)
    options["place_shape"] = place_shape(pipeline, statistics)
    tile_fit = pipeline.calibration_fit(category, 0, false_alarm_rate, of_tiles=True, **options)

    # 1. Statistics of each view, and maps of deviation 1
    count, size = max(1, MAX_STATISTICS_TILES // len(statistics)), as_size(pipeline.input_resolution)
    for i, pixels, is_mine in own_images(statistics, accelerator):
        image = LargeImage(pixels, category, generators[i], batch_size, statistics.value_range, region)
        measurement, _ = measure_view(pipeline, whole_view(pipeline, image), image, of_tiles=False)
        fit.add_statistics(measurement if is_mine else empty_measurement(measurement))
        grid = grid_of(pipeline, size_of(pixels))
        inside = cells_inside(region, category, grid)
        places = spread_places(places_inside(grid, inside, MOSTLY), count, i)
        views = tile_views(pixels, grid, places, batch_size, size, statistics.value_range, inside)
        for start, tiles in zip(range(0, len(places), batch_size), views, strict=True):
            measurement, _ = measure_view(pipeline, tiles, image, of_tiles=True)
            cells = cells_of_tiles(grid, places[start : start + batch_size], inside)
            measurement = replace_hidden(measurement, cells)._replace(image=torch.full((len(tiles),), i))
            tile_fit.add_statistics(measurement if is_mine else empty_measurement(measurement))
    for one in (fit, tile_fit):
        one.set_statistics()
    of_tiles = tile_fit.level()
    calibrations = Calibrations(fit.level(), of_tiles)

    # 2. Mean and deviation of the tiles' maps at each place of the image, or of all places together
    sums, of_even, step = MomentSums(), MomentSums(), -(-len(statistics) // MAX_PLACE_IMAGES)
    for i, pixels, is_mine in own_images(statistics[::step], accelerator):
        image = LargeImage(pixels, category, generators[i * step], batch_size, statistics.value_range, region)
        blended = blended_map(pipeline, image, of_tiles, number=i * step)
        at_places = resize_maps(blended[None, None], options["place_shape"])[: int(is_mine)]  # (1, 1, rows, columns)
        sums.update(at_places)
        of_even.update(at_places[: 1 - i % 2])
    inside_places = inside_region(region, torch.tensor([category]), options["place_shape"])
    for moments in (sums, of_even):
        moments.reduce(accelerator)
        if inside_places is not None:
            moments.replace_positions(stand_ins(inside_places.flatten()))
    place_mean, place_std = sums.mean()[0], sums.standard_deviation()[0]
    if not places_are_alike(sums, of_even):
        place_mean, place_std = (one[0] for one in trust_positions(place_mean[None], place_std[None], trust=0.0))
    of_tiles.set_places(category, place_mean, place_std)

    # 3. Thresholds of the images' maps
    for i, pixels, is_mine in own_images(held_out, accelerator):
        noise = generators[len(statistics) + i]
        image = LargeImage(pixels, category, noise, batch_size, held_out.value_range, region)
        fit.add_joined_maps(large_image_map(pipeline, image, calibrations)[None][: int(is_mine)])
    calibration = fit.finish()
    of_tiles.set_places(category, place_mean, place_std * fit.scale)
    pipeline.register_modules(calibration=calibration, tile_calibration=of_tiles)


def replace_hidden(measurement: Measurement, cells: torch.Tensor | None) -> Measurement:
    """What was measured of tiles, where what is hidden of a tile takes what is shown of it (`stand_ins`).

    So statistics that all positions share are those of what counts. `cells` says what does, (N, rows, columns) bool.
    """
    if cells is None or bool(cells.all()):
        return measurement

    def replaced(values: torch.Tensor) -> torch.Tensor:  # (N, ..., h, w)
        shown = F.interpolate(cells[:, None].float(), values.shape[-2:], mode="area")[:, 0].flatten(1).to(values.device)
        shown = shown >= shown.amax(dim=1, keepdim=True).clamp(max=0.5)  # (N, h * w)
        pairs = zip(values.flatten(-2), shown, strict=True)
        return torch.stack([one[..., stand_ins(where)] for one, where in pairs]).view_as(values)

    maps, residual, features, patches, image = measurement
    residual, features, patches = (
        None if values is None else replaced(values) for values in (residual, features, patches)
    )
    return Measurement(replaced(maps), residual, features, patches, image)


def places_are_alike(sums: MomentSums, of_even: MomentSums) -> bool:
    """Whether a place of the image shows much the same in every good image, so that it deserves statistics of its own.

    The means at each place, of every other image and of the rest, are correlated over the places. By Spearman and
    Brown's formula (1910) a correlation r of two halves is one of 2 r / (1 + r) between the mean over all images and
    what it is to tell: the share of its variance over the places that is no chance. Above a half, where r is above a
    third, a place's own mean is nearer to the truth than the mean over all places.

    Args:
        sums: of all images' maps.
        of_even: of every other one's.
    """
    num_others = sums.count - of_even.count
    if not (of_even.count and num_others):
        return True
    halves = of_even.mean(), (sums.total - of_even.total) / num_others
    a, b = (one.flatten() - one.mean() for one in halves)
    r = float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt().clamp(min=1e-12))
    return r > 1.0 / 3.0


def place_shape(pipeline: DetectionPipeline, statistics: ImageSequence) -> tuple[int, int]:
    """Rows and columns of the places that have statistics: the cells of the first image, or what others have."""
    earlier = pipeline.tile_calibration
    if earlier is not None and earlier.config.place_shape is not None:
        return tuple(earlier.config.place_shape)
    grid = grid_of(pipeline, size_of(next(iter(statistics[:1].whole()))))
    return grid.rows, grid.columns


def own_images(
    images: ImageSequence, accelerator: Accelerator | None
) -> Iterator[tuple[int, Image.Image | torch.Tensor, bool]]:
    """This process's images with their numbers, the next decoded ahead; where it has none, the first, not its own."""
    mine = process_share(len(images), accelerator)
    chosen = list(mine or range(1))
    decoded = (image for i in chosen for image in images[i : i + 1].whole())
    for i, image in zip(chosen, read_ahead(decoded), strict=True):
        yield i, image, bool(mine)


def size_of(image: Image.Image | torch.Tensor) -> tuple[int, int]:
    """Height and width."""
    return (image.height, image.width) if isinstance(image, Image.Image) else (image.shape[-2], image.shape[-1])


def grid_of(pipeline: DetectionPipeline, size: tuple[int, int]) -> TileGrid:
    """The tiles of images of a size."""
    if pipeline.tile_size is None:
        raise ValueError("`pipeline` looks at whole images: it has no `tile_size`.")
    return tile_grid(size, pipeline.tile_size, as_size(pipeline.input_resolution), pipeline.config.tile_overlap)


def cells_inside(region: torch.Tensor | None, category: int, grid: TileGrid) -> torch.Tensor | None:
    """Which cells of an image count, (rows, columns) bool, on the CPU; None for all."""
    inside = inside_region(region, torch.tensor([category]), (grid.rows, grid.columns))
    return None if inside is None else inside[0]


def whole_view(pipeline: DetectionPipeline, image: LargeImage) -> torch.Tensor:
    """The image at the networks' size, (1, 3, R, R') in [-1, 1], what does not count hidden."""
    size = as_size(pipeline.input_resolution)
    pixel_values = resize_image(image.pixels, size, image.value_range) * 2.0 - 1.0
    return hide_outside(pixel_values, inside_region(image.region, torch.tensor([image.category]), size))


def measure_view(
    pipeline: DetectionPipeline, pixel_values: torch.Tensor, image: LargeImage, of_tiles: bool
) -> tuple[Measurement, torch.Tensor]:
    """What the networks say of views of one image, and its category's index for each, (N,)."""
    device = pipeline._execution_device
    index = torch.full((len(pixel_values),), image.category, device=device)
    generators = [image.generator] * len(pixel_values)
    return pipeline.measure_pixels(pixel_values.to(device), index, generators, of_tiles), index
