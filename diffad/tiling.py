"""Large images as tiles: where they lie, how they are cut out, and how their maps become one.

A tile is what the networks see at once, in the image's own pixels. Tiles overlap, and where they do their maps are
averaged by windows that fall off towards a tile's edge, so that no seam shows: at every place the weights sum to one.
The map is kept at a coarser grid than the image, of cells of a few pixels each, and made as large as the image at the
end: for 4000 x 3000 pixels and cells of 4 x 4 it takes 3 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

from diffad.images import Side, as_size, image_to_tensor, resize_images, size_of_ratio
from diffad.region_of_interest import hide_outside

CELL = 4  # pixels of the networks' input a side: the stride of the finest features that have a Gaussian
MOSTLY = 0.9  # of a tile counts, or as much as of any, where it serves statistics or training
MUCH_LARGER = 3.0  # a side, than the networks' input: below, a whole image still shows what is some ten pixels large


class TileGrid(NamedTuple):
    """Where the tiles of an image lie.

    Attributes:
        rows, columns: of the map's cells.
        cell: (height, width) of a cell in pixels of the image.
        tile: (rows, columns) of a tile's cells.
        tops, lefts: first cells of the tiles, down and across.
    """

    rows: int
    columns: int
    cell: tuple[int, int]
    tile: tuple[int, int]
    tops: list[int]
    lefts: list[int]

    @property
    def places(self) -> list[tuple[int, int]]:
        """First row and column of each tile, in cells."""
        return [(top, left) for top in self.tops for left in self.lefts]


def tile_height_and_width(tile_size: Side | None, input_size: tuple[int, int]) -> tuple[int, int] | None:
    """A tile's height and width: of one number, as many pixels as its square, at the ratio of `input_size`."""
    if isinstance(tile_size, int):
        return size_of_ratio(tile_size, input_size[0] / input_size[1])
    return None if tile_size is None else as_size(tile_size)


def tile_grid(
    size: tuple[int, int], tile_size: tuple[int, int], input_size: tuple[int, int], overlap: float
) -> TileGrid:
    """The tiles of an image, evenly spread so that they cover it and overlap by at least a share of their sides.

    Args:
        size: of the image in pixels, (height, width).
        tile_size: of a tile in pixels of the image; rounded up to whole cells.
        input_size: to which each tile is resized for the networks; a cell is `CELL` x `CELL` pixels of it, or of the
            image, whichever is more.
        overlap: in [0, 1), of a tile's sides.
    """
    lengths = []
    for length, tile, cell in zip(size, tile_size, cell_size(tile_size, input_size), strict=True):
        cells, of_tile = -(-length // cell), -(-tile // cell)
        step = max(1, int(of_tile * (1.0 - overlap)))
        count = 1 + max(0, -(-(cells - of_tile) // step))
        starts = [i * (cells - of_tile) // max(1, count - 1) for i in range(count)] if count > 1 else [0]
        lengths.append((cells, cell, of_tile, starts))
    (rows, cell_height, tile_rows, tops), (columns, cell_width, tile_columns, lefts) = lengths
    return TileGrid(rows, columns, (cell_height, cell_width), (tile_rows, tile_columns), tops, lefts)


def cell_size(tile_size: tuple[int, int], input_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a cell in pixels of the image; arguments as of `tile_grid`."""
    height, width = (max(1, round(CELL * tile / seen)) for tile, seen in zip(tile_size, input_size, strict=True))
    return height, width


def cut_tiles(
    image: Image.Image | torch.Tensor,
    grid: TileGrid,
    places: Sequence[tuple[int, int]],
    input_size: tuple[int, int],
    value_range: float | None = None,
) -> torch.Tensor:
    """Tiles of one image as the networks see them, (N, 3, *input_size) in [-1, 1].

    What of a tile lies beyond the image repeats the image's last pixels. The map's last cells reach beyond the image by
    less than a cell; at the image's size they are cut off.

    Args:
        image: a PIL image or a tensor (3, H, W) in [0, 1].
        grid: of the image.
        places: first row and column of each tile, in cells.
        input_size: height and width.
        value_range: of a PIL image of more than 8 bits.
    """
    height, width = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[-2:]
    tiles = []
    for row, column in places:
        top, left = row * grid.cell[0], column * grid.cell[1]
        bottom, right = top + grid.tile[0] * grid.cell[0], left + grid.tile[1] * grid.cell[1]
        inside = left, top, min(right, width), min(bottom, height)
        if isinstance(image, Image.Image):
            pixels = image_to_tensor(image.crop(inside), value_range)[None]  # (1, 3, h, w)
        else:
            pixels = image[None, :, inside[1] : inside[3], inside[0] : inside[2]]
        beyond = (0, right - inside[2], 0, bottom - inside[3])
        pixels = F.pad(pixels, beyond, mode="replicate") if any(beyond) else pixels
        tiles.append(resize_images(pixels, input_size))
    return torch.cat(tiles) * 2.0 - 1.0


def tile_views(
    image: Image.Image | torch.Tensor,
    grid: TileGrid,
    places: Sequence[tuple[int, int]],
    batch_size: int,
    input_size: tuple[int, int],
    value_range: float | None = None,
    inside: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """`cut_tiles`, batch by batch, what does not count hidden: `inside` says which of the image's cells do."""
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        cells = cells_of_tiles(grid, batch, inside)
        shown = None if cells is None else F.interpolate(cells[:, None].float(), input_size)[:, 0] > 0.5
        yield hide_outside(cut_tiles(image, grid, batch, input_size, value_range), shown)


def blending_window(cells: int, overlap: float) -> torch.Tensor:
    """(cells,) weights of a tile along one side: 1 in the middle, falling towards both ends over the overlap."""
    ramp = max(1.0, overlap * cells)
    distance = torch.arange(cells) + 0.5
    return (torch.minimum(distance, cells - distance) / ramp).clamp(max=1.0)


def blend_tiles(
    grid: TileGrid, places: Sequence[tuple[int, int]], maps: Iterable[torch.Tensor], overlap: float
) -> torch.Tensor:
    """The map of an image, (rows, columns), of its tiles' maps.

    Args:
        grid: of the image.
        places: of the tiles that have a map; what only others cover is 0.
        maps: (N, h, w), batch by batch in the order of `places`; each is resized to a tile's cells.
        overlap: as of `tile_grid`.
    """
    across, down = (blending_window(cells, overlap) for cells in (grid.tile[1], grid.tile[0]))
    window = down[:, None] * across  # (rows, columns) of a tile
    total = torch.zeros(grid.rows, grid.columns)
    remaining = iter(places)
    for batch in maps:
        height, width = batch.shape[-2:]
        whole_cells = height % grid.tile[0] == 0 and width % grid.tile[1] == 0
        to_cells = F.adaptive_avg_pool2d if whole_cells else resize_images
        for one in to_cells(batch.float()[:, None], grid.tile)[:, 0].cpu():
            top, left = next(remaining)
            part = total[top : top + grid.tile[0], left : left + grid.tile[1]]
            part += (window * one)[: part.shape[0], : part.shape[1]]
    return total / (
        summed_windows(grid.rows, grid.tops, down)[:, None] * summed_windows(grid.columns, grid.lefts, across)
    )


def summed_windows(cells: int, starts: Sequence[int], window: torch.Tensor) -> torch.Tensor:
    """(cells,): the sum of all tiles' windows along one side, by which a weighted sum is divided."""
    total = torch.zeros(cells)
    for start in starts:
        part = total[start : start + len(window)]
        part += window[: len(part)]
    return total


def cells_of_tiles(
    grid: TileGrid, places: Sequence[tuple[int, int]], inside: torch.Tensor | None
) -> torch.Tensor | None:
    """Which cells of each tile count, (N, rows, columns) of a tile, of those of the image (rows, columns), bool."""
    if inside is None:
        return None
    beyond = (0, grid.tile[1], 0, grid.tile[0])
    padded = F.pad(inside, beyond)
    return torch.stack([padded[row : row + grid.tile[0], left : left + grid.tile[1]] for row, left in places])


def places_inside(grid: TileGrid, inside: torch.Tensor | None, least: float = 0.0) -> list[tuple[int, int]]:
    """The places of tiles of which some cells count, and at least a share `least` of the most of any tile's."""
    cells = cells_of_tiles(grid, grid.places, inside)
    if cells is None:
        return grid.places
    counts = cells.flatten(1).sum(dim=1)
    fewest = max(1.0, least * float(counts.max()))
    return [place for place, count in zip(grid.places, counts.tolist(), strict=True) if count >= fewest]


def spread_places(places: Sequence[tuple[int, int]], count: int, image: int) -> list[tuple[int, int]]:
    """At most `count` of an image's tiles, spread over it; of other images, numbered `image`, they are others."""
    count = min(count, len(places))
    return [places[(i * len(places) // count + image) % len(places)] for i in range(count)]


def join_views(of_tiles: torch.Tensor, of_image: torch.Tensor) -> torch.Tensor:
    """The map of the tiles and that of the whole image, both in standard deviations, as one: the larger at each place.

    Args:
        of_tiles: (rows, columns).
        of_image: (h, w), which is resized.
    """
    return torch.maximum(of_tiles, resize_images(of_image[None, None].cpu(), of_tiles.shape)[0, 0])
