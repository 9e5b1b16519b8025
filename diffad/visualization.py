"""Heat maps, overlays and contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffad.files import write_whole
from diffad.inferno import INFERNO

if TYPE_CHECKING:  # what draws the results of an exported model has no torch
    import torch

OUTLINE = (0, 255, 255)  # absent from the colour map, so that an outline is never taken for heat


def to_uint8(image: torch.Tensor | np.ndarray) -> np.ndarray:
    """An image for the screen, (H, W, 3) uint8, from a (3, H, W) tensor in [-1, 1] or an (H, W, 3) array in [0, 1]."""
    if not isinstance(image, np.ndarray):
        image = image.detach().float().cpu().permute(1, 2, 0).numpy() / 2.0 + 0.5
    return (np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def heat_map(anomaly_map: torch.Tensor | np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """A map as colours, (H, W) -> (H, W, 3) uint8; `low` and `high` are the ends of the scale (the map's own)."""
    values = np.asarray(
        anomaly_map if isinstance(anomaly_map, np.ndarray) else anomaly_map.detach().float().cpu(), dtype=np.float32
    )
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0)
    return INFERNO[np.minimum((scaled * np.float32(256.0)).astype(np.int64), 255)]


def outline(mask: np.ndarray, width: int = 1) -> np.ndarray:
    """The border of a mask's regions, inside them, (H, W) bool."""
    mask = inside = np.asarray(mask, dtype=bool)
    for _ in range(width):  # what keeps its four neighbours; beyond the image counts as inside
        padded = np.pad(inside, 1, constant_values=True)
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def overlay(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    mask: np.ndarray | None = None,
    threshold: float | None = None,
    opacity: float = 0.6,
) -> np.ndarray:
    """The map laid over its image, hot places opaque, with the mask's outline.

    Args:
        image: (H, W, 3) uint8.
        anomaly_map: (H, W).
        mask: (H, W) bool, or None for no outline.
        threshold: of pixels. The colours then go from a third of it to three times it, the same for all images, and a
            good image has none; without it, over the map's own range.
        opacity: of the hottest places, in [0, 1].

    Returns:
        (H, W, 3) uint8.
    """
    if threshold is not None and 0.0 < threshold < np.inf:
        low, high = threshold / 3.0, 3.0 * threshold
    else:
        low, high = float(np.min(anomaly_map)), float(np.max(anomaly_map))
    strength = np.clip((anomaly_map - low) / max(high - low, 1e-12), 0.0, 1.0)[..., None] * opacity
    blended = image * (1.0 - strength) + heat_map(anomaly_map, low, high) * strength
    blended = (blended + 0.5).astype(np.uint8)
    if mask is not None:
        blended[outline(mask, max(1, min(image.shape[:2]) // 150))] = OUTLINE
    return blended


def beside_overlay(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    mask: np.ndarray | None = None,
    threshold: float | None = None,
    reconstruction: np.ndarray | None = None,
) -> np.ndarray:
    """An image, its reconstruction if there is one, and its overlay from left to right, (H, 2 W or 3 W, 3) uint8.

    Args:
        image: (H, W, 3) uint8.
        anomaly_map: (H, W).
        mask: (H, W) bool to outline, or None.
        threshold: as in `overlay`.
        reconstruction: (H, W, 3) uint8, or None.
    """
    middle = [] if reconstruction is None else [reconstruction]
    return np.concatenate([image, *middle, overlay(image, anomaly_map, mask, threshold)], axis=1)


def save_rows(
    rows: Sequence[Sequence[np.ndarray]],
    path: str | Path,
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    tile: int = 160,
    captions: Sequence[Sequence[str]] = (),
) -> None:
    """Writes a contact sheet: rows of (H, W, 3) uint8 pictures, each as large as `tile` x `tile` pixels can show it.

    `captions`, one for each picture and of any number of lines, stand below; of a line that is too long the end stays.
    """
    gap, head = 4, 18 if column_titles else 0
    foot = 14 * max((caption.count("\n") + 1 for row in captions for caption in row), default=0)
    font = ImageFont.load_default(12)
    side = 6 + max((int(font.getlength(title)) for title in row_titles), default=-6)
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (side + columns * (tile + gap), head + len(rows) * (tile + foot + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, title in enumerate(column_titles):
        draw.text((side + j * (tile + gap) + 2, 2), title, fill="black", font=font)
    for i, row in enumerate(rows):
        top = head + i * (tile + foot + gap)
        if i < len(row_titles):
            draw.text((2, top + tile // 2 - 8), row_titles[i], fill="black", font=font)
        for j, picture in enumerate(row):
            largest = max(picture.shape[:2])
            height, width = (max(1, round(tile * length / largest)) for length in picture.shape[:2])
            shown = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
            middle = (tile - shown.width) // 2, (tile - shown.height) // 2
            sheet.paste(shown, (side + j * (tile + gap) + middle[0], top + middle[1]))
        for j, caption in enumerate(captions[i] if captions else ()):
            lines = "\n".join(_end_that_fits(line, font, tile) for line in caption.split("\n"))
            draw.multiline_text((side + j * (tile + gap), top + tile + 1), lines, fill="black", font=font, spacing=0)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(Path(path)) as unfinished:
        sheet.save(unfinished)


def _end_that_fits(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"..{line}") > width:
        line = line[1:]
    return f"..{line}"
