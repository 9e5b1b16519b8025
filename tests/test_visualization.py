"""Pictures: sizes, colours, and that they show what they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import texture
from PIL import Image

from diffad.visualization import OUTLINE, heat_map, outline, overlay, save_rows, to_uint8


def peak(height: int = 20, width: int = 30) -> np.ndarray:
    anomaly_map = np.zeros((height, width), dtype=np.float32)
    anomaly_map[5:9, 10:16] = 4.0
    return anomaly_map


def test_to_uint8_of_both_ranges():
    tensor = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1).expand(3, 2, 4)
    assert to_uint8(tensor).shape == (2, 4, 3)
    assert to_uint8(tensor)[0, 0].tolist() == [0, 128, 255]
    assert to_uint8(tensor.bfloat16()).dtype == np.uint8
    assert to_uint8(np.array([[[0.0, 0.5, 1.0]]])).tolist() == [[[0, 128, 255]]]
    assert to_uint8(np.array([[[-3.0, 0.5, 7.0]]])).tolist() == [[[0, 128, 255]]]  # clipped, not wrapped
    pixels = texture(0)
    assert np.array_equal(to_uint8(pixels / 255.0), pixels)


def test_heat_maps_grow_brighter():
    colours = heat_map(np.linspace(0.0, 1.0, 32).reshape(1, 32))
    assert colours.shape == (1, 32, 3)
    assert colours.dtype == np.uint8
    brightness = colours[0].astype(float) @ [0.3, 0.6, 0.1]
    assert (np.diff(brightness) > 0).all()
    assert brightness[0] < 10
    assert np.array_equal(heat_map(torch.linspace(0.0, 1.0, 32).view(1, 32)), colours)


def test_the_scale_of_a_heat_map_can_be_fixed():
    assert np.array_equal(heat_map(peak(), low=0.0, high=4.0), heat_map(peak()))
    faint = heat_map(peak(), low=0.0, high=40.0)
    assert faint.max() < heat_map(peak()).max()
    above = heat_map(peak() * 100.0, low=0.0, high=4.0)  # clipped to the scale's end
    assert np.array_equal(above, heat_map(peak()))


def test_a_flat_map_is_dark():
    assert heat_map(np.full((4, 4), 3.0)).max() < 10
    image = texture(0)
    assert np.array_equal(overlay(image, np.full((16, 16), 3.0)), image)


def test_the_outline_is_the_border_inside():
    mask = peak() > 0
    border = outline(mask)
    assert border.sum() == 4 * 6 - 2 * 4
    assert not (border & ~mask).any()
    assert border[5, 10]
    assert not border[6, 12]
    assert outline(mask, width=2).sum() == 4 * 6
    assert not outline(np.zeros((5, 5))).any()
    # a region that touches the image's edge is open there
    assert not outline(np.ones((5, 5))).any()


def test_an_overlay_shows_the_image_where_all_is_well_and_heat_where_not():
    image = texture(0, (20, 30))
    anomaly_map = peak()
    laid = overlay(image, anomaly_map)
    hot = anomaly_map > 0
    assert laid.shape == image.shape
    assert laid.dtype == np.uint8
    assert np.array_equal(laid[~hot], image[~hot])
    expected = 0.4 * image[hot] + 0.6 * heat_map(anomaly_map)[hot]
    assert np.abs(laid[hot] - expected).max() <= 1.0
    marked = overlay(image, anomaly_map, mask=hot)
    cyan = (marked == OUTLINE).all(axis=2)
    assert np.array_equal(cyan, outline(hot))
    assert np.array_equal(marked[~cyan], laid[~cyan])
    assert np.array_equal(overlay(image, anomaly_map, opacity=0.0), image)


def test_captions_stand_below_their_pictures_and_keep_their_ends(tmp_path):
    picture = np.full((8, 8, 3), 128, dtype=np.uint8)
    captions = [["a.png\n1.5", f"{'long' * 30}/b.png\n0.5"]]
    save_rows([[picture, picture]], tmp_path / "sheet.png", tile=80, captions=captions)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[:2] == (80 + 2 * 14 + 4, 2 * 84)
    assert (sheet[:80, :80] == 128).all()
    written = (sheet[80:] < 100).all(axis=2)
    assert written[:14].any()
    assert written[14:].any()
    left, right = np.flatnonzero(written.any(axis=0) & (np.arange(168) >= 84))[[0, -1]]
    assert left >= 84
    assert right < 164  # no letter below the next picture


def test_a_picture_of_a_line_scan_has_a_place_on_a_sheet(tmp_path):
    save_rows([[np.full((2, 900, 3), 7, dtype=np.uint8), np.full((900, 1, 3), 7, dtype=np.uint8)]], tmp_path / "s.png")
    shown = (np.asarray(Image.open(tmp_path / "s.png")) == 7).all(axis=2)
    assert shown.sum() == 160 + 160


@pytest.mark.parametrize("titles", [False, True])
def test_a_contact_sheet_has_a_place_for_every_picture(tmp_path, titles):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    rows = [
        [np.full((8, 12, 3), colour, dtype=np.uint8) for colour in colours],
        [np.full((30, 30, 3), colours[2], dtype=np.uint8)],  # a shorter row
    ]
    names = {"column_titles": ["image", "map", "mask"], "row_titles": ["good", "defective"]} if titles else {}
    save_rows(rows, tmp_path / "new" / "sheet.png", tile=40, **names)
    sheet = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))
    for colour, columns in zip(colours, ([0], [1], [2]), strict=True):
        found = (sheet == colour).all(axis=2)
        wide = 40 * 27  # 8 x 12 keeps its ratio
        assert found.sum() == wide + (40 * 40 if colour == colours[2] else 0), columns
    assert sheet.shape[0] >= 80
    assert sheet.shape[1] >= 120
    if titles:
        dark = (sheet < 100).all(axis=2)
        assert dark.any(axis=0).sum() > 20  # letters
        assert sheet.shape[1] > 125 + 20  # beside the rows
