"""KolektorSDD and KolektorSDD2: a mask beside every image, which is empty for a good one.

Tabernik et al., "Segmentation-based deep-learning approach for surface-defect detection", 2020; Božič et al., "Mixed
supervision for surface-defect detection: from weakly to fully supervised learning", 2021.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffad.data.masks import mask_to_array
from diffad.data.records import check_split, make_record
from diffad.reading.grey_depth import UnreadableImageError
from diffad.reading.image_files import read_image
from diffad.reading.inputs import list_folder, subfolders

TRAIN_SHARE = 0.7  # of the items of KolektorSDD, which has no split of its own


def find_kolektor(root: Path) -> dict[str, Any]:
    """Folders `kos01`, `kos02`, ..., one for each item, with `Part0.jpg` and `Part0_label.bmp`."""
    items = [one for one in subfolders(root) if re.fullmatch(r"kos\d+", one.name, re.IGNORECASE)]
    return {root.name: items} if any(_pairs(item, "_label") for item in items) else {}


def read_kolektor(category: str, items: list[Path], split: str) -> Iterator[dict]:
    """Training: the good images of 70% of the items. Test: the other items, and all defective images."""
    check_split(split, ("train", "test"), f"category {category!r}")
    order = np.random.default_rng(0).permutation(len(items))
    for_training = {items[i] for i in order[: int(TRAIN_SHARE * len(items))]}
    for item in items:
        for record, defective in _labelled(category, item, "_label"):
            if defective is None or (split == "train") == (item in for_training and not defective):
                yield record


def find_kolektor_2(root: Path) -> dict[str, Any]:
    """`train/` and `test/`, with `10000.png` and `10000_GT.png`."""
    return {root.name: root} if any(_pairs(folder, "_GT") for folder in _splits(root).values()) else {}


def read_kolektor_2(category: str, root: Path, split: str) -> Iterator[dict]:
    """The published split; of training, the good images."""
    folders = _splits(root)
    check_split(split, folders, root)
    for record, defective in _labelled(category, folders[split], "_GT"):
        if split == "test" or not defective:
            yield record


def _splits(root: Path) -> dict[str, Path]:
    return {one.name.lower(): one for one in subfolders(root) if one.name.lower() in ("train", "test")}


def _labelled(category: str, folder: Path, ending: str) -> Iterator[tuple[dict, bool | None]]:
    """A record for each image of a folder, and whether it is defective by its mask.

    None where the mask cannot be read: the record keeps it, so that the check of all files names it.
    """
    for image, mask in _pairs(folder, ending):
        defective: bool | None = None
        with contextlib.suppress(UnreadableImageError):
            defective = bool(mask_to_array(read_image(mask)).any())
        yield make_record(image, category, "good" if defective is False else "defect", mask), defective


def _pairs(folder: Path, ending: str) -> list[tuple[Path, Path]]:
    """Images and their masks, which are called as they are with `ending` behind the name; none where there are none.

    The ending may be in any case: else masks would be taken for images.

    Raises:
        FileNotFoundError: some images have a mask, and one has not.
    """
    files = [folder / entry.name for entry in list_folder(folder).files] if folder.is_dir() else []
    masks = {one.stem[: -len(ending)]: one for one in files if one.stem.lower().endswith(ending.lower())}
    images = [one for one in files if not one.stem.lower().endswith(ending.lower())] if masks else []
    for image in images:
        if image.stem not in masks:
            raise FileNotFoundError(f"There is no mask for {image}: expected {image.stem}{ending}.* beside it.")
    return [(image, masks[image.stem]) for image in images]
