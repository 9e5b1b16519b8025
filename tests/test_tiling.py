"""Where tiles lie, what they show, and how their maps become one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import texture
from PIL import Image

from diffad.tiling import blend_tiles, cut_tiles, join_views, spread_places, tile_grid, tile_height_and_width

SIZES = [(120, 80), (33, 200), (32, 32), (10, 7), (129, 32)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_tiles_cover_the_image_and_overlap(size, overlap):
    grid = tile_grid(size, (32, 32), (32, 32), overlap)
    assert (grid.rows, grid.columns) == (-(-size[0] // 4), -(-size[1] // 4))  # cells of 4 x 4 pixels
    seen = np.zeros((grid.rows, grid.columns), int)
    for row, column in grid.places:
        seen[row : row + 8, column : column + 8] += 1
    assert seen.min() >= 1
    for starts, cells in ((grid.tops, grid.rows), (grid.lefts, grid.columns)):
        assert starts[0] == 0
        assert starts[-1] == max(0, cells - 8)
        assert all(0 < later - start <= 8 * (1.0 - overlap) for start, later in pairwise(starts))


@pytest.mark.parametrize("size", SIZES)
def test_weights_sum_to_one(size):
    grid = tile_grid(size, (32, 32), (32, 32), 0.25)
    maps = torch.full((len(grid.places), 32, 32), 3.0)
    assert torch.allclose(
        blend_tiles(grid, grid.places, maps.split(5), 0.25), torch.full((grid.rows, grid.columns), 3.0)
    )


def test_blended_tiles_of_a_ramp_are_the_ramp_without_seams():
    grid = tile_grid((96, 64), (32, 32), (32, 32), 0.25)
    ramp = torch.arange(24.0)[:, None] + 0.1 * torch.arange(16.0)
    maps = torch.stack([ramp[row : row + 8, column : column + 8] for row, column in grid.places])
    maps = maps.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)  # as large as the networks' input
    assert torch.allclose(blend_tiles(grid, grid.places, [maps], 0.25), ramp, atol=1e-5)


def test_a_seam_falls_off_over_the_overlap():
    grid = tile_grid((32, 56), (32, 32), (32, 32), 0.25)
    assert grid.lefts == [0, 6]
    maps = torch.stack([torch.zeros(32, 32), torch.ones(32, 32)])
    row = blend_tiles(grid, grid.places, [maps], 0.25)[0]
    assert torch.allclose(row[:6], torch.zeros(6))
    assert torch.allclose(row[8:], torch.ones(6))
    assert row.diff().max() < 1.0


@pytest.mark.parametrize("kind", ["picture", "tensor", "deep"])
def test_tiles_are_the_images_own_pixels(kind):
    pixels = texture(0, (50, 40))
    image = {
        "picture": lambda: Image.fromarray(pixels),
        "tensor": lambda: torch.from_numpy(pixels).permute(2, 0, 1) / 255.0,
        "deep": lambda: Image.fromarray(pixels[..., 0].astype(np.uint16)),
    }[kind]()
    grid = tile_grid((50, 40), (32, 32), (32, 32), 0.25)
    tiles = cut_tiles(image, grid, grid.places, (32, 32), value_range=255.0)
    expected = pixels[..., [0]].repeat(3, axis=2) if kind == "deep" else pixels
    expected = np.pad(expected, ((0, 2), (0, 0), (0, 0)), mode="edge")  # 50 pixels are 13 cells of 4
    for tile, (row, column) in zip(tiles, grid.places, strict=True):
        cut = expected[4 * row : 4 * row + 32, 4 * column : 4 * column + 32]
        assert np.allclose((tile.permute(1, 2, 0).numpy() + 1.0) * 127.5, cut, atol=1e-3)


def test_larger_tiles_are_resized_and_keep_cells_of_the_networks_input():
    grid = tile_grid((640, 640), (128, 128), (32, 32), 0.0)
    assert grid.cell == (16, 16)
    assert grid.tile == (8, 8)
    assert cut_tiles(torch.rand(3, 640, 640), grid, grid.places[:2], (32, 32)).shape == (2, 3, 32, 32)
    assert tile_height_and_width(64, (96, 24)) == (128, 32)
    assert tile_height_and_width((64, 50), (96, 24)) == (64, 50)
    assert tile_height_and_width(None, (96, 24)) is None


def test_places_are_spread_and_differ_between_images():
    grid = tile_grid((320, 320), (32, 32), (32, 32), 0.25)
    assert spread_places(grid.places, 1000, 3) != spread_places(grid.places, 1000, 4)
    assert sorted(spread_places(grid.places, 1000, 3)) == grid.places
    few = [spread_places(grid.places, 4, image) for image in range(3)]
    assert all(len(set(places)) == 4 for places in few)
    assert len({place for places in few for place in places}) == 12


def test_the_whole_image_counts_where_it_is_more_unusual():
    of_tiles, of_image = torch.zeros(20, 10), torch.full((4, 2), -1.0)
    of_tiles[3, 3], of_image[3, 1] = 5.0, 7.0
    joined = join_views(of_tiles, of_image)
    assert joined.shape == (20, 10)
    assert joined[3, 3] == 5.0
    assert joined.max() == 7.0
    assert joined.min() >= 0.0 or joined.min() > -1.0
