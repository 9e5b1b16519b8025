"""What `diffad predict` writes of regions: a table, a COCO file, and the lines that both are made of.

While a run goes on, each process writes a line for each of its images to a `regions.partial-0.jsonl` of its own. At the
end, or by the next run, they are merged into `regions.jsonl`, in the order of the images' places; `regions.csv` and
`regions.json` are made of it, line by line, so that memory does not grow with the images. Coordinates are those of the
upright picture, as it is shown after its EXIF orientation.
"""

from __future__ import annotations

import csv
import heapq
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

from diffad.files import write_whole
from diffad.prediction.journal import EARLIER, ENCODING, by_process
from diffad.regions import outlined_regions, run_lengths

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


def region_journal(output_dir: Path, process: int) -> Path:
    return output_dir / f"regions.partial-{process}.jsonl"


class RegionJournal:
    """The lines of a run's process, and those of all processes and earlier runs.

    Args:
        output_dir: where the files are.
        process: its number.
    """

    def __init__(self, output_dir: Path, process: int = 0):
        self.output_dir, self.path = output_dir, output_dir / LINES_NAME
        self._own = region_journal(output_dir, process)
        self._file: IO[str] | None = None

    def enter(
        self, place: int, file: str, path: str, name: str, size: tuple[int, int], regions: list[dict[str, Any]]
    ) -> None:
        """An image's line, on the disk when this returns.

        Args:
            place: of the image among all; those of a process grow.
            file: `Input.file`, which tells files apart.
            path: as it was given.
            name: below the images' common folder, with `/`.
            size: (height, width) of the upright picture.
            regions: as of `describe_regions`.
        """
        line = {"place": place, "file": file, "path": path, "name": name}
        if self._file is None:
            self._file = open(self._own, "w", encoding="ascii")  # noqa: SIM115 (open until `close`)
        self._file.write(json.dumps({**line, "height": size[0], "width": size[1], "regions": regions}) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def merge(self, place_of_line: Callable[[dict[str, Any]], int | None]) -> None:
        """Makes `regions.jsonl` of all lines, each image's once.

        Args:
            place_of_line: the place that a line now has; None leaves it out.
        """
        journals = sorted(self.output_dir.glob("regions.partial-[0-9]*.jsonl"))
        if not journals and not self.path.is_file():
            return
        with write_whole(self.path) as unfinished, open(unfinished, "w", encoding="ascii") as file:
            before: tuple[int, str] | None = None
            seen: set[tuple[int, str]] = set()  # of lines that are in no order of places
            lines = (chain.from_iterable(map(_read_lines, one)) for one in ([self.path], *by_process(journals)))
            for line, text in heapq.merge(*lines, key=lambda one: _place(one[0])):
                place = place_of_line(line)
                if place is None:
                    continue
                key = (place, line["file"])
                if key != before and key not in seen:
                    # mostly as it stands: to write half a million anew takes seconds
                    stays = place == line.get("place") and text.isascii()
                    file.write(text if stays else json.dumps(line | {"place": place}) + "\n")
                before = key
                if EARLIER in (place, _place(line)):
                    seen.add(key)
        for path in journals:
            path.unlink()

    def lines(self) -> Iterator[dict[str, Any]]:
        """All merged lines."""
        return (line for line, _ in _read_lines(self.path))

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


def _read_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """All lines of a file, and their texts, but one that a killed run has left half written."""
    if not path.is_file():
        return
    with open(path, encoding="ascii", errors="replace") as file:
        for text in file:
            try:
                yield json.loads(text), text if text.endswith("\n") else f"{text}\n"
            except json.JSONDecodeError:
                continue


def _place(line: dict[str, Any]) -> int:
    return line.get("place", EARLIER)  # an earlier version's lines have none


def _write_list(entries: Iterable[dict[str, Any]], file: IO[str]) -> None:
    """The entries of a JSON list, one at a time."""
    for i, entry in enumerate(entries):
        file.write((",\n" if i else "\n") + json.dumps(entry))
