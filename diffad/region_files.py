"""What `diffad predict` writes of regions: a table, a COCO file, and the lines that both are made of.

`regions.jsonl` gets a line for each image while a run goes on, and is taken up by the next; `regions.csv` and
`regions.json` are made of it at the end, line by line, so that memory does not grow with the images. Coordinates are
those of the upright picture, as it is shown after its EXIF orientation.
"""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from diffad.files import write_whole
from diffad.journal import ENCODING
from diffad.regions import can_list_regions, outlined_regions, run_lengths

LINES_NAME, TABLE_NAME, COCO_NAME = REGION_FILES = ("regions.jsonl", "regions.csv", "regions.json")
TABLE_COLUMNS = ("image", "category", "x", "y", "width", "height", "area", "peak", "mean")
DEFECT = {"id": 1, "name": "anomaly"}  # the one kind of object; what kind of defect it is, no good image teaches


def describe_regions(anomaly_map: np.ndarray, mask: np.ndarray) -> list[dict[str, Any]]:
    """An image's regions as its line holds them: box, area, peak, mean, and COCO's run lengths as `counts`.

    Args:
        anomaly_map: (H, W) float, of the picture's size.
        mask: (H, W) bool.
    """
    return [
        {
            "box": region.box,
            "area": region.area,
            "peak": float(f"{region.peak:.6g}"),
            "mean": float(f"{region.mean:.6g}"),
            "counts": run_lengths(inside, *region.box[:2], *mask.shape),
        }
        for region, inside in outlined_regions(anomaly_map, mask)
    ]


class RegionJournal:
    """The lines of a run, and of those before it whose images are done.

    Args:
        output_dir: where the three files are.
        done: the verdicts of the files that earlier runs have done (by `Input.file`); lines of others are left out.
    """

    def __init__(self, output_dir: Path, done: Mapping[str, str]):
        self.output_dir, self.path = output_dir, output_dir / LINES_NAME
        kept: set[str] = set()
        if self.path.is_file():
            self._keep(done, kept)
        without = sum(verdict in ("normal", "anomalous") and file not in kept for file, verdict in done.items())
        if without and can_list_regions():
            warnings.warn(
                f"{TABLE_NAME} and {COCO_NAME} lack {without} images that an earlier run without regions has scored. "
                "Give another `output_dir` for all of them.",
                stacklevel=3,
            )

    def _keep(self, done: Mapping[str, str], kept: set[str]) -> None:
        with write_whole(self.path) as unfinished, open(unfinished, "w", encoding="ascii") as file:
            for line in self.lines():
                if line["file"] in done and line["file"] not in kept:
                    kept.add(line["file"])
                    file.write(json.dumps(line) + "\n")

    def enter(self, file: str, path: str, name: str, size: tuple[int, int], regions: list[dict[str, Any]]) -> None:
        """An image's line, on the disk when this returns.

        Args:
            file: `Input.file`, which tells images apart.
            path: as it was given.
            name: below the images' common folder, with `/`.
            size: (height, width) of the upright picture.
            regions: as of `describe_regions`.
        """
        line = {"file": file, "path": path, "name": name, "height": size[0], "width": size[1], "regions": regions}
        with open(self.path, "a", encoding="ascii") as journal:
            journal.write(json.dumps(line) + "\n")

    def lines(self) -> Iterator[dict[str, Any]]:
        """All lines but one that a killed run has left half written."""
        if not self.path.is_file():
            return
        with open(self.path, encoding="ascii", errors="replace") as file:
            for text in file:
                try:
                    yield json.loads(text)
                except json.JSONDecodeError:
                    continue

    def write_files(self, category: str | None) -> None:
        """`regions.csv` and `regions.json` of all lines."""
        with write_whole(self.output_dir / TABLE_NAME) as unfinished, open(unfinished, "w", **ENCODING) as file:
            writer = csv.writer(file)
            writer.writerow(TABLE_COLUMNS)
            for line in self.lines():
                for one in line["regions"]:
                    writer.writerow((line["path"], category or "", *one["box"], one["area"], one["peak"], one["mean"]))
        with write_whole(self.output_dir / COCO_NAME) as unfinished, open(unfinished, "w", encoding="ascii") as file:
            kind = DEFECT | ({"supercategory": category} if category else {})
            file.write('{"info": {"description": "Regions that diffad has found"}, "licenses": [],\n')
            file.write(f'"categories": {json.dumps([kind])},\n"images": [')
            _write_list(self._images(), file)
            file.write('],\n"annotations": [')
            _write_list(self._annotations(), file)
            file.write("]}\n")

    def _images(self) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(self.lines(), start=1):
            yield {"id": number, "file_name": line["name"], "height": line["height"], "width": line["width"]}

    def _annotations(self) -> Iterator[dict[str, Any]]:
        number = 0
        for image, line in enumerate(self.lines(), start=1):
            for one in line["regions"]:
                number += 1
                size = [line["height"], line["width"]]
                yield {
                    "id": number,
                    "image_id": image,
                    "category_id": DEFECT["id"],
                    "bbox": one["box"],
                    "area": one["area"],
                    "iscrowd": 0,
                    "score": one["peak"],
                    "segmentation": {"size": size, "counts": one["counts"]},
                }


def _write_list(entries: Iterable[dict[str, Any]], file: IO[str]) -> None:
    """The entries of a JSON list, one at a time."""
    for i, entry in enumerate(entries):
        file.write((",\n" if i else "\n") + json.dumps(entry))
