"""The images of a test that tell most, as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from diffad.data.masks import mask_to_array
from diffad.evaluation.detectors import call_for, pixel_threshold
from diffad.images import image_to_rgb, resize_images
from diffad.pipelines.output import AnomalyOutput
from diffad.reading.inputs import REPORT_SHEETS
from diffad.visualization import beside_overlay, save_rows, to_uint8

IMAGES_A_GROUP = 4  # at most
PICTURE_HEIGHT = 256  # pixels of a case's picture; larger ones are scaled down to it


@dataclass(frozen=True)
class Case:
    """A picture worth a look.

    Args:
        title: of its group, such as "defective, lowest score"; neighbours with one title stand together.
        caption: its file, score and verdict, as from `case_caption`.
        picture: (H, columns W, 3) uint8: the image, its reconstruction where the method makes one, and its overlay,
            side by side.
        columns: how many stand side by side.
    """

    title: str
    caption: str
    picture: np.ndarray
    columns: int = 2


def choose_cases(records: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Which images to show: the extremes of either kind, so that the errors show too.

    Args:
        records: of one category, as in a report's `scores`.

    Returns:
        Indices into `records` by title: defective images with the highest and the lowest scores, good ones with the
        highest and the lowest, up to `IMAGES_A_GROUP` each. The most extreme stands first; no image stands twice; empty
        groups are left out.
    """
    groups = {}
    for label, kind in ((1, "defective"), (0, "good")):
        of_kind = [i for i, record in enumerate(records) if record["label"] == label]
        ordered = sorted(of_kind, key=lambda i: records[i]["score"], reverse=True)
        highest = ordered[: min(IMAGES_A_GROUP, (len(ordered) + 1) // 2)]
        groups[f"{kind}, highest score"] = highest
        groups[f"{kind}, lowest score"] = ordered[len(highest) :][::-1][:IMAGES_A_GROUP]
    return {title: indices for title, indices in groups.items() if indices}


def case_caption(record: Mapping[str, Any]) -> str:
    """File name, kind of defect, score, p-value and verdict of one record of a report's `scores`."""
    defect = record.get("defect")
    kind = f" ({defect})" if record["label"] and defect not in (None, "", "defective") else ""
    parts = [f"score {record['score']:.4g}"]
    if record.get("p_value") is not None:
        parts.append(f"p = {record['p_value']:.2g}")
    if record.get("is_anomalous") is not None:
        words = ("missed", "found") if record["label"] else ("passed", "false alarm")
        parts.append(words[int(record["is_anomalous"])])
    return f"{PurePath(record['path']).name}{kind}: {', '.join(parts)}"


def draw_cases(
    pipeline: Any,
    images: Dataset,
    records: Sequence[dict[str, Any]],
    category: str,
) -> list[Case]:
    """The images with the highest and the lowest scores of either kind, beside their maps and the defects' outlines.

    Between them stands what the method makes of the image as a good one, where it does.
    """
    threshold = pixel_threshold(pipeline, category)
    cases = []
    for title, indices in choose_cases(records).items():
        rows = [images[i] for i in indices]
        output = call_for(pipeline, [row["image"] for row in rows], category)
        for position, (i, row) in enumerate(zip(indices, rows, strict=True)):
            drawn = draw_case(row, output, position, threshold)
            columns = 2 if output.reconstruction is None else 3
            cases.append(Case(title, case_caption(records[i]), drawn, columns))
    return cases


def draw_case(row: dict[str, Any], output: AnomalyOutput, position: int, threshold: float | None) -> np.ndarray:
    """An image beside its map, as of `beside_overlay`; no higher than the page shows it.

    Args:
        row: of the data set.
        output: of a call with tensors.
        position: of the image among those of the call.
        threshold: of the map, or None.
    """
    picture = image_to_rgb(row["image"])
    mask = None if row["mask"] is None else Image.fromarray(mask_to_array(row["mask"]))
    if picture.height > PICTURE_HEIGHT:  # at full size many categories would add up
        size = (max(1, round(picture.width * PICTURE_HEIGHT / picture.height)), PICTURE_HEIGHT)
        picture = picture.resize(size, Image.Resampling.BILINEAR)
        mask = None if mask is None else mask.resize(size, Image.Resampling.NEAREST)
    size = (picture.height, picture.width)
    shown = resize_images(torch.as_tensor(output.anomaly_map)[position][None, None].float(), size)[0, 0].numpy()
    restored = None
    if output.reconstruction is not None:
        pixels = torch.as_tensor(output.reconstruction)[position][None].float()  # (1, 3, h, w) in [0, 1]
        restored = to_uint8(resize_images(pixels, size)[0] * 2.0 - 1.0)
    return beside_overlay(np.asarray(picture), shown, None if mask is None else np.asarray(mask), threshold, restored)


def save_sheets(cases: dict[str, list[Case]], path: Path) -> None:
    """Contact sheets of all categories' cases, beside `path`: one of defective images and one of good ones."""
    for ending in REPORT_SHEETS:
        kind = ending.removeprefix("-").removesuffix(".png")
        rows: dict[str, list[np.ndarray]] = {}
        for category, of_category in cases.items():
            for case in of_category:
                if case.title.startswith(kind):
                    rows.setdefault(f"{category}: {case.title}", []).extend(np.hsplit(case.picture, case.columns))
        if rows:
            save_rows(list(rows.values()), path.with_name(path.stem + ending), row_titles=list(rows))
