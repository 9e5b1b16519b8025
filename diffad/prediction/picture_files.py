"""What is written of one image: its row, its map, mask and overlay; and the sheet of the most anomalous."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffad.files import write_whole
from diffad.prediction.journal import P_VALUE, PATH, PICTURE, PLACE, SCORE
from diffad.prediction.region_files import describe_regions
from diffad.reading.decoding import Decoded
from diffad.reading.grey_depth import BAND_PIXELS
from diffad.reading.image_files import LARGE_PIXELS, one_large_at_a_time
from diffad.reading.inputs import SHEET_NAME
from diffad.regions import can_list_regions, without_small_regions
from diffad.resizing import Resizing, fit_map, map_reach, region_at
from diffad.visualization import overlay, save_rows

SHEET_COLUMNS, SHEET_ROWS = 6, 4
SHEET_IMAGES = SHEET_COLUMNS * SHEET_ROWS


def _at_size(
    image: np.ndarray,
    shown: np.ndarray | None,
    size: tuple[int, int],
    finish: Callable[[np.ndarray], np.ndarray],
    resizing: Resizing,
) -> np.ndarray:
    """What `finish` makes of an image (h, w) at a size (H, W), in bands of rows, as that may be large.

    `shown` is the image as the overlay has it, which mostly is that size.
    """
    if shown is not None and shown.shape == size:
        return finish(shown)
    height, width = size
    reach = map_reach(size, size, resizing.cell)
    rows = resizing.map(np.eye(image.shape[0], dtype=np.float32), (reach[0], image.shape[0]))  # (H, h): its weights
    wide = resizing.map(image, (image.shape[0], reach[1]))[:, :width]  # (h, W)
    inside = None if resizing.region is None else region_at(resizing.region, size)
    result, step = np.empty(size, finish(image[:1]).dtype), max(1, BAND_PIXELS // width)
    for top in range(0, height, step):
        band = rows[top : min(top + step, height)] @ wide
        if inside is not None:
            band[~inside[top : top + step]] = 0.0
        result[top : top + step] = finish(band)
    return result


def write_outputs(
    row: dict[str, Any],
    output: Any,
    j: int,
    decoded: Decoded,
    output_dir: Path,
    threshold: float | None,
    smallest_area: float,
    resizing: Resizing,
    send: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Writes one image's pictures and completes its row.

    Without a name for them in `row["picture"]` there are none, and the row says nothing of the map's ends. `send` is
    called with the name of each, from the output on, once it is written.

    Raises:
        OSError: the disk is full: no picture of any other could be written.
    """
    anomaly_map = np.asarray(output.anomaly_map[j])  # (h, w)
    is_anomalous = threshold is not None and bool(output.is_anomalous[j])
    row |= {"score": f"{float(output.anomaly_score[j]):.6g}", "verdict": "scored"}
    if threshold is not None:
        row["p_value"] = f"{float(output.p_value[j]):.6g}"
        row["verdict"] = "anomalous" if is_anomalous else "normal"
        if can_list_regions():
            row["upright_size"], row["regions"] = decoded.size, []
    if not row["picture"] and not ("regions" in row and is_anomalous):
        return row
    shown = _shown_map(anomaly_map, decoded, resizing)  # (h', w')

    def to_mask(values: np.ndarray) -> np.ndarray:  # as `threshold_output`
        return (values > np.float32(math.inf if threshold is None else threshold)) & is_anomalous

    mask = None  # at the image's size, of an alarmed image alone
    if is_anomalous:
        with one_large_at_a_time(math.prod(decoded.size)):
            mask = _at_size(anomaly_map, shown, decoded.size, to_mask, resizing)
            mask = without_small_regions(mask, smallest_area)
            if row.get("regions") is not None and mask.any():
                at_size = _at_size(anomaly_map, shown, decoded.size, lambda values: values, resizing)
                row["regions"] = describe_regions(at_size, mask)
    if not row["picture"] or shown is None:
        return row
    low, high = float(shown.min()), float(shown.max())
    row |= {"map_low": f"{low:.6g}", "map_high": f"{high:.6g}"}

    def to_16_bits(values: np.ndarray) -> np.ndarray:
        scaled = (values - np.float32(low)) / np.float32(max(high - low, 1e-12)) * np.float32(65535.0)
        return (scaled + np.float32(0.5)).clip(0, 65535).astype(np.uint16)

    # each made when it is its turn: those of a large image are large
    pictures = {"maps": lambda: _at_size(anomaly_map, shown, decoded.size, to_16_bits, resizing)}
    if threshold is not None:
        found = np.zeros(decoded.size, bool) if mask is None else mask
        pictures["masks"] = lambda: found.astype(np.uint8) * 255
    in_overlay = shown
    pictures["overlays"] = lambda: _overlay(in_overlay, mask, decoded, is_anomalous, threshold, smallest_area)
    try:
        for folder, picture in pictures.items():
            with one_large_at_a_time(math.prod(decoded.size)):
                _save(Image.fromarray(picture()), output_dir, f"{folder}/{row['picture']}")
            send(f"{folder}/{row['picture']}")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        row["message"] = f"Scored, but its pictures cannot be written: {error}"
    return row


def draw_overlay(
    output: Any, j: int, decoded: Decoded, threshold: float | None, smallest_area: float, resizing: Resizing
) -> np.ndarray:
    """The image under its map, (h', w', 3) uint8, the mask's outline on it where it raises an alarm."""
    shown = _shown_map(np.asarray(output.anomaly_map[j]), decoded, resizing)
    assert shown is not None  # it was decoded to be drawn on
    is_anomalous = threshold is not None and bool(output.is_anomalous[j])
    return _overlay(shown, None, decoded, is_anomalous, threshold, smallest_area)


def _overlay(
    shown: np.ndarray,
    mask: np.ndarray | None,
    decoded: Decoded,
    is_anomalous: bool,
    threshold: float | None,
    smallest_area: float,
) -> np.ndarray:
    """An image under its map at the overlay's size; `mask` is that at the image's own, where it is known."""
    assert decoded.pixels is not None
    if threshold is not None and (mask is None or mask.shape != shown.shape):
        mask = without_small_regions((shown > np.float32(threshold)) & is_anomalous, smallest_area)
    return overlay(decoded.pixels, shown, mask, threshold)


def _shown_map(anomaly_map: np.ndarray, decoded: Decoded, resizing: Resizing) -> np.ndarray | None:
    """A map at the size of its overlay or, where nobody draws one, of its image; None if that is large."""
    size = decoded.size if decoded.pixels is None else decoded.pixels.shape[:2]
    if decoded.pixels is None and math.prod(size) > LARGE_PIXELS:
        return None
    return fit_map(anomaly_map, (size[0], size[1]), decoded.size, resizing)


def _save(image: Image.Image, output_dir: Path, name: str) -> None:
    """Writes a PNG below the output folder; its own folders are made, and none of them may be a link elsewhere."""
    *folders, _ = name.split("/")
    folder = output_dir
    for part in folders:
        folder = folder / part
        if folder.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, "a link stands in the place of a folder", str(folder))
        folder.mkdir(exist_ok=True)
    with write_whole(output_dir / name) as unfinished:
        # the default, 6, makes files a fifth smaller in three times the time: more than a small network takes for one
        image.save(unfinished, format="PNG", compress_level=2)


def save_most_anomalous(highest: Sequence[list[str]], drawn: dict[int, np.ndarray], output_dir: Path) -> None:
    """A contact sheet of the images with the highest scores.

    Args:
        highest: their rows, with `JOURNAL_COLUMNS`.
        drawn: overlays, by the place, of those that have none in a file.
        output_dir: where `overlays/` is, and the sheet goes.
    """
    tiles, captions = [], []
    for row in highest:
        path = output_dir / "overlays" / row[PICTURE]
        if int(row[PLACE]) in drawn:
            picture = Image.fromarray(drawn[int(row[PLACE])])
        elif row[PICTURE] and path.is_file():  # an earlier run's may have been taken away
            with Image.open(path) as stored:
                stored.load()
            picture = stored
        else:
            continue
        picture.thumbnail((320, 320))
        tiles.append(np.asarray(picture))
        p_value = f", p = {float(row[P_VALUE]):.2g}" if row[P_VALUE] else ""
        name = os.fsencode(Path(row[PATH]).name).decode("utf-8", "replace")  # fonts know no halves of letters
        name = "".join(letter if letter.isprintable() else "?" for letter in name)[:80]
        captions.append(f"{name}\n{float(row[SCORE]):.4g}{p_value}")
    if tiles:
        starts = range(0, len(tiles), SHEET_COLUMNS)
        rows = [tiles[i : i + SHEET_COLUMNS] for i in starts]
        save_rows(rows, output_dir / SHEET_NAME, captions=[captions[i : i + SHEET_COLUMNS] for i in starts])
