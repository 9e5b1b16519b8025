"""The records that every layout gives: columns, names of splits and of good images, and lists of records by split."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Features, Value

from diffad.data.image_feature import ImageFile

FEATURES = Features(
    {
        "image": ImageFile(),
        "mask": ImageFile(),
        "label": Value("int64"),
        "category": Value("string"),
        "defect": Value("string"),
        "path": Value("string"),
    }
)
SPLITS = {  # and what their folders are called, in any case
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing"),
}
GOOD_NAMES = {
    "good",
    "goods",
    "ok",
    "okay",
    "normal",
    "pass",
    "passed",
    "defectfree",
    "nodefect",
    "nodefects",
    "notdefective",
    "undamaged",
    "nondefective",
    "healthy",
    "faultless",
}


def is_good_name(name: str) -> bool:
    """Whether a folder or label of this name is of good images: `Good`, `OK `, `defect-free`, `good_parts`, ..."""
    letters = re.sub(r"[-_\s]+", "", name).casefold()  # tables that people write have spaces behind names
    return letters in GOOD_NAMES or re.sub("(parts|images|samples|photos|pictures|pics)$", "", letters) in GOOD_NAMES


def make_record(image: Path, category: str, defect: str, mask: Path | None) -> dict[str, Any]:
    good = defect == "good"
    return {
        "image": str(image),
        "mask": None if good or mask is None else str(mask),
        "label": int(not good),
        "category": category,
        "defect": defect,
        "path": str(image),
    }


def check_split(split: str, available: Iterable[str], where: Path | str) -> None:
    if split not in available:
        raise ValueError(f"`split`: {where} has no {split!r}, only {sorted(available)}.")


def read_listed(category: str, listed: dict[str, list[dict]], split: str) -> Iterator[dict]:
    """Records that a file of the data set lists, by split."""
    check_split(split, listed, f"category {category!r}")
    has_ground_truth = any(record["mask"] for record in listed[split])
    for record in listed[split]:
        if record["label"] and has_ground_truth and not os.path.isfile(record["mask"] or ""):
            expected = record["mask"] or "a mask to be listed"
            raise FileNotFoundError(f"There is no mask for {record['path']}: expected {expected}")
        yield record
