"""Runs a pipeline over image files of any number, and writes what it finds.

    accelerate launch -m diffad.predict MODEL IMAGES... --output DIR

is `diffad predict` on any number of processes. How the files are gone through, and what a killed run leaves, stands in
`diffad.prediction.file_scoring`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffad.deployment.runtime import Runtime
from diffad.prediction.detection_call import detection_call, detection_settings
from diffad.prediction.file_scoring import score_files
from diffad.prediction.input_sources import range_of_inputs
from diffad.prediction.manifest import Manifest
from diffad.prediction.output_folder import SETTINGS_NAME
from diffad.prediction.remote_output import opened_output
from diffad.process_share import of_all_processes, on_main
from diffad.reading.grey_depth import warn_of_found_range
from diffad.reading.input_file import Input
from diffad.reading.inputs import find_images

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["find_images", "predict_files"]


def predict_files(
    pipeline: Any,
    paths: Sequence[Path | Input] | Manifest,
    output_dir: str | Path,
    batch_size: int = 16,
    category: str | None = None,
    num_workers: int = 2,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
    max_pictures: int = 100_000,
    accelerator: Accelerator | None = None,
    spent: dict[str, float] | None = None,
) -> dict[str, int]:
    """Scores image files and writes overlays, maps, masks, `scores.csv` and a sheet of the most anomalous.

    Args:
        pipeline: an anomaly pipeline, or a `Runtime`; uncalibrated, it gives no masks and no verdicts.
        paths: image files, as from `find_images`; a file of several names counts once. The outputs keep their folders
            below the common one. Or what `find_inputs` gives: files in stores, or a `Manifest`, whose outputs are
            called by their lines' numbers.
        output_dir: gets `overlays/`, `maps/` (16-bit PNG: map_low at 0, map_high at 65535, both in scores.csv),
            `masks/` (0 or 255), `most_anomalous.png`, `scores.csv` (in order of `paths`, below what earlier runs have
            scored), `settings.json` and, calibrated, the defects as a list (`diffad.prediction.region_files`) and
            `calibration.json` (the scores that tell drift). Maps and masks have the size of their image, and so have
            overlays, those of more than 16 megapixels reduced. The pictures of `part.png` are named so too, those of
            `part.jpg` `part.jpg.png`; `picture` in scores.csv says how where a name is too long or another's. May be
            the URL of a folder in a store, as text, to which one run at a time writes.
        batch_size: images in one pass of the networks, at most. All batches have one shape, and the last one is filled
            up, so that no image's numbers depend on where it stands.
        category: of a unified model.
        num_workers: threads that decode ahead, one batch at most, and write what the batch before has shown; files in
            stores have more.
        report: called with each new row of scores.csv, as a dict; in each process with its own.
        max_pictures: of more images there are no overlays, maps and masks, but scores, regions and the sheet.
        accelerator: whose processes share the images. The tables are those of one process.
        spent: gets `seconds`, the time spent on batches, `waiting`, how much of it the networks have waited for images,
            and `retried`, requests to stores that were made again; all summed over the processes. And
            `without_pictures`: of the images that were skipped, those that an earlier run gave no pictures, where this
            one draws them.

    Returns:
        Counts of "normal", "anomalous", "unreadable" and, uncalibrated, "scored" images, and of those "skipped"
        because an earlier run had done them. What could not be read or written then, and what has been replaced since,
        is done again.

    Raises:
        ImportError: the package of the output's store is not installed.
        OSError: the disk is full, or the output's store does not take what is written.
        ValueError: `output_dir` holds results of another calibration, category or manifest, or of images
            elsewhere, or files of another program's that would be replaced, or a score that somebody has edited into no
            number; or the category is unknown.
        RuntimeError: another process writes to `output_dir`, or one of `accelerator`'s has ended early.
    """
    index = pipeline.category_index(category)
    settings = detection_settings(pipeline, category, "predict")
    call = detection_call(pipeline, category, batch_size)
    if call.value_range is None:
        settings["value_range"] = on_main(accelerator, lambda: range_of_inputs(paths))
        if settings["value_range"] is not None:
            warn_of_found_range(settings["value_range"])
            call = call._replace(value_range=settings["value_range"])
    with (
        opened_output(output_dir, accelerator) as output,
        same_threads(pipeline, output.folder, accelerator) as threads,
    ):
        counts = score_files(
            call,
            settings,
            paths,
            output,
            recorded=threads,
            num_workers=num_workers,
            report=report,
            max_pictures=max_pictures,
            accelerator=accelerator,
            spent=spent,
        )
        if pipeline.has_thresholds:
            from diffad.prediction.drift_table import save_calibration_scores

            on_main(accelerator, lambda: save_calibration_scores(output.folder, pipeline, index))
        on_main(accelerator, output.push)
        if spent is not None:
            spent["retried"] += sum(of_all_processes(accelerator, output.retried))
    return counts


@contextmanager
def same_threads(pipeline: Any, output_dir: Path, accelerator: Accelerator | None) -> Iterator[dict[str, int]]:
    """The number of torch's threads that a folder's results were begun with, as sums over threads differ in last bits.

    Gives what is to be written down of it: nothing of an exported model, whose runtime has its own threads.
    """
    if isinstance(pipeline, Runtime):
        yield {}
        return
    import torch

    def begun_with() -> int:
        try:
            return int(json.loads((output_dir / SETTINGS_NAME).read_text(encoding="utf-8"))["threads"])
        except (OSError, ValueError, KeyError, TypeError):
            return before

    before = torch.get_num_threads()
    threads = on_main(accelerator, begun_with)
    torch.set_num_threads(threads)
    try:
        yield {"threads": threads}
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    from diffad.cli import main

    main(["predict", *sys.argv[1:]])
