"""Regions of interest: which part of an image counts, from a mask (PNG) or polygons (COCO JSON)."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from diffad.data.masks import mask_to_array
from diffad.reading.grey_depth import UnreadableImageError
from diffad.reading.image_files import MAX_PIXELS, read_image
from diffad.reading.inputs import images_below
from diffad.reading.unicode_forms import file_below, same_name

LARGEST_SIDE = 1024  # pixels of a region that is kept: 1 MB a category
STRETCHED = 1.1  # the factor between the ratios of two images' sides from which on a word is due


def read_roi(
    roi: str | os.PathLike | np.ndarray | Image.Image,
    category: str | None = None,
    image_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Where the pixels that count lie, as (H, W) bool; what matters is the place in the image, not the size.

    Args:
        roi: an array that is not 0 where pixels count; a PIL image that is not 0 there, or has at least half of its
            largest value where its edges are soft; the path of such an image; a folder of these, one a category,
            `CATEGORY.png`; or a COCO JSON file, whose polygons of one category of that name count, or all polygons
            where `category` is None. A box is drawn where there is no polygon.
        category: the category's name, in a model of several.
        image_size: height and width of one of the images. A region of another ratio covers them by stretching, and is
            warned of.

    Raises:
        ValueError, FileNotFoundError: there is no such region, or no pixel in it.
    """
    if isinstance(roi, (str, os.PathLike)):
        if not os.fspath(roi):  # `Path` would take it for the working folder
            raise ValueError("`roi` is an empty path. Is a variable of the shell not set?")
        path = Path(roi)
        if path.is_dir():
            own = images_below(path) if category is None else []
            if category is None and len(own) != 1:
                raise FileNotFoundError(
                    f"`roi`: {path} holds {len(own)} masks, and this model has one category: give the mask's own file."
                )
            path = own[0] if own else file_below(path, f"{category}.png")
        if not path.is_file():
            raise FileNotFoundError(
                f"`roi`: no file at {path}. Give a mask (PNG), a folder of CATEGORY.png, or COCO JSON."
            )
        inside = _draw_polygons(path, category) if path.suffix.lower() == ".json" else _read_mask(path)
    else:
        inside = mask_to_array(roi) if isinstance(roi, Image.Image) else np.asarray(roi) != 0
    if inside.ndim != 2:
        raise ValueError(f"`roi` must be a mask (H, W), but has shape {inside.shape}.")
    if not inside.any():
        raise ValueError("`roi` holds no pixel that counts: a mask is not 0 where pixels do.")
    if image_size is not None:
        _warn_of_other_ratio(inside.shape, image_size)
    factor = max(inside.shape) / LARGEST_SIDE
    if factor > 1.0:
        size = [max(1, round(side / factor)) for side in inside.shape[::-1]]
        share = np.asarray(Image.fromarray(inside.astype(np.float32)).resize(size, Image.Resampling.BOX))
        inside = share >= min(0.5, float(share.max()))  # so that the smallest region stays
    return inside


def _warn_of_other_ratio(drawn: tuple[int, ...], image_size: tuple[int, int]) -> None:
    (height, width), (image_height, image_width) = drawn, image_size
    if not 1.0 / STRETCHED < height * image_width / (width * image_height) < STRETCHED:
        warnings.warn(
            f"`roi` is {height} x {width} pixels, and one of the images {image_height} x {image_width}: it is "
            "stretched to cover the images. Draw it on one of them, uncropped and upright.",
            stacklevel=6,  # of who calls `calibrate`, which torch wraps
        )


def _read_mask(path: Path) -> np.ndarray:
    try:
        return mask_to_array(read_image(path))
    except UnreadableImageError as error:
        why = f"cannot be read as a mask ({error.reason})"
        raise ValueError(f"`roi`: {path} {why}. Give a mask (PNG), or polygons (COCO JSON).") from error


def _corners(annotation: dict[str, Any]) -> list[list[float]]:
    """The polygons of a COCO annotation, or its box where it has none, as x, y, x, y, ..."""
    polygons = annotation.get("segmentation") or []
    if not isinstance(polygons, list):
        raise ValueError("one of the annotations is a mask in run lengths: draw a polygon, or give a PNG")
    if not polygons:
        left, top, width, height = annotation.get("bbox") or [0, 0, 0, 0]
        if not (width > 0 and height > 0):
            raise ValueError("one of the annotations has neither a polygon nor a box")
        right, bottom = left + width, top + height
        polygons = [[left, top, right, top, right, bottom, left, bottom]]
    if any(len(polygon) < 6 for polygon in polygons):
        raise ValueError("one of the polygons has fewer than three corners")
    return [[float(value) for value in polygon] for polygon in polygons]


def _draw_polygons(path: Path, category: str | None) -> np.ndarray:
    try:
        coco: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
        images, names = coco["images"], {one["id"]: one["name"] for one in coco.get("categories", [])}
        known = None if category is None else same_name(category, map(str, names.values())) or category
        chosen = [one for one in coco["annotations"] if category is None or names.get(one.get("category_id")) == known]
        drawn_on = {one.get("image_id") for one in chosen}
        if len(drawn_on) > 1:
            raise ValueError(f"polygons on {len(drawn_on)} images: keep those of one")
        own = [one for one in images if one.get("id") in drawn_on]
        if chosen and not own and len(images) > 1:
            raise ValueError(f"no image has the polygons' image_id, {', '.join(map(repr, drawn_on))}")
        image = (own or images)[0]
        width, height = int(image["width"]), int(image["height"])
        if not 0 < width * height <= MAX_PIXELS:
            raise ValueError(f"an image of {width} x {height} pixels")
        drawn = Image.new("1", (width, height))
        for annotation in chosen:
            for corners in _corners(annotation):
                if not all(map(math.isfinite, corners)):
                    raise ValueError("one of the polygons has a corner that is no number")
                if max(map(abs, corners), default=0.0) <= 1.0 < max(width, height):
                    raise ValueError("a polygon's corners are at most 1: give them in pixels, not as shares")
                ImageDraw.Draw(drawn).polygon(corners, fill=1, outline=1)
    except (AttributeError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise ValueError(
            f"`roi`: {path} is no COCO JSON with images (width, height) and annotations of polygons or boxes ({error})."
        ) from error
    if not chosen:
        of = "" if category is None else f" of {category!r}, but of {', '.join(sorted(set(names.values())))}"
        raise ValueError(f"`roi`: {path} has no polygon{of}.")
    return np.asarray(drawn)
