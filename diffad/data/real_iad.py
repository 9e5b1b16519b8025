"""Real-IAD: a JSON file for each category lists its images, which are photographed from five sides.

Wang et al., "Real-IAD: A Real-World Multi-View Dataset for Benchmarking Versatile Industrial Anomaly Detection", CVPR
2024.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffad.data.records import is_good_name, make_record

IMAGE_FOLDERS = ("realiad_1024", "realiad_512", "realiad_256", "realiad_raw")  # the first that is there


def find_real_iad(root: Path) -> dict[str, Any]:
    """Records by category and split, of those categories that have a JSON file and images.

    Raises:
        ValueError: a JSON file is not as published.
    """
    base = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), None)
    lists = root / "realiad_jsons"
    lists = lists / lists.name if (lists / lists.name).is_dir() else lists  # all five views
    if base is None or not lists.is_dir():
        return {}
    return {path.stem: _records(path, base) for path in sorted(lists.glob("*.json")) if (base / path.stem).is_dir()}


def _records(path: Path, base: Path) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    folder = base / path.stem
    try:
        listed = json.loads(path.read_text(encoding="utf-8-sig"))
        for split in ("train", "test"):
            for row in listed[split]:
                defect = "good" if is_good_name(row["anomaly_class"]) else row["anomaly_class"]
                mask = folder / row["mask_path"] if row.get("mask_path") else None
                if split == "test" or defect == "good":
                    record = make_record(folder / row["image_path"], path.stem, defect, mask)
                    found.setdefault(split, []).append(record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not as expected ({error!r}): `train` and `test`, in each a list of image_path, mask_path and "
            "anomaly_class."
        ) from error
    return found
