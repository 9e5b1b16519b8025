"""How much of a defect must be found: of data sets that say so, as MVTec LOCO does in `defects_config.json`.

Where a part is missing, any part of the place where it could be is as good an answer as all of it (Bergmann et al.,
"Beyond Dents and Scratches: Logical Constraints in Unsupervised Anomaly Detection and Localization", IJCV 2022, section
5.1).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from diffad.reading.image_files import read_image
from diffad.reading.inputs import images_below

CONFIG_NAME = "defects_config.json"


def read_defects(mask_folder: Path, size: tuple[int, int]) -> list[tuple[np.ndarray, float]] | None:
    """The defects of an image that has a folder of masks, each a file, whose value names its entry in the list.

    Args:
        mask_folder: `CATEGORY/ground_truth/DEFECT/IMAGE`; `CATEGORY` holds the list.
        size: (height, width) that the masks are resized to (nearest), in pixels.

    Returns:
        A mask (height, width) bool of each, and the share of its area, in (0, 1], from which on it counts as found in
        full: that of the full size, so that it is the same at any. None where there is no list.

    Raises:
        ValueError: the list is not as published, or a mask's value is not in it.
    """
    path = mask_folder.parents[2] / CONFIG_NAME
    if not path.is_file():
        return None
    try:
        entries = {int(entry["pixel_value"]): entry for entry in json.loads(path.read_text(encoding="utf-8-sig"))}
        saturation = {
            value: (float(entry["saturation_threshold"]), bool(entry["relative_saturation"]))
            for value, entry in entries.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not as expected ({error!r}): a list of pixel_value, saturation_threshold and "
            "relative_saturation."
        ) from error
    defects = []
    for mask_path in images_below(mask_folder):
        values = np.asarray(read_image(mask_path).convert("L"))
        value, area = int(values.max(initial=0)), int((values > 0).sum())
        if not area:
            continue
        if value not in saturation:
            raise ValueError(f"{mask_path} holds the value {value}, which is not in {path}: {sorted(saturation)}.")
        threshold, is_relative = saturation[value]
        share = min(1.0, threshold if is_relative else threshold / area)
        resized = Image.fromarray((values > 0).view(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)
        defects.append((np.asarray(resized) > 0, share))
    return defects
