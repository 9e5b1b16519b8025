"""Runs a pipeline over image files of any number, in constant memory, and writes what it finds.

    accelerate launch -m diffad.predict MODEL IMAGES... --output DIR

is `diffad predict` on any number of processes. Every file is written under another name and renamed, and `scores.csv`
appears only when every input is accounted for: a killed run leaves no half-written file, and the next one goes on where
it stopped, on as many processes as it has. Nothing is written outside the output folder, and no input is written to.
What becomes of these files where the output is in a store, `diffad.remote_output` knows.
"""

from __future__ import annotations

import csv
import heapq
import json
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from diffad.decoding import Decoded, decoded_batches, decoding_of
from diffad.deployment.runtime import Runtime
from diffad.files import locked_folder
from diffad.grey_depth import warn_of_found_range
from diffad.image_arrays import WITHOUT_TORCH
from diffad.image_sizes import Side
from diffad.input_sources import range_of_inputs
from diffad.inputs import LOCK_NAME, SHEET_NAME, find_images
from diffad.journal import (
    COLUMNS,
    ENCODING,
    FILE,
    JOURNAL_COLUMNS,
    PATH,
    PICTURE,
    PLACE,
    SCORE,
    VERDICTS,
    Input,
    complete_scores,
    merged_journals,
    process_journal,
    take_up,
)
from diffad.listed_files import ListedFiles
from diffad.manifest import Manifest
from diffad.model_digest import model_digest
from diffad.output_folder import SETTINGS_NAME, begin_settings, check_output, check_settings
from diffad.picture_files import SHEET_IMAGES, draw_overlay, save_most_anomalous, write_outputs
from diffad.process_share import of_all_processes, on_main
from diffad.region_files import RegionJournal
from diffad.regions import can_list_regions
from diffad.remote_files import STORE_WORKERS, is_url
from diffad.remote_output import LocalOutput, opened_output
from diffad.remote_reader import RemoteReader
from diffad.resizing import Resizing

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["find_images", "predict_files", "score_files"]

# network inputs, each (R, R', 3) in [0, 1] -> an output of arrays or CPU tensors
Detect: TypeAlias = Callable[[list[Any]], Any]


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
            scored), `settings.json` and, calibrated, the defects as a list (`diffad.region_files`) and
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
            and `retried`, requests to stores that were made again; all summed over the processes.

    Returns:
        Counts of "normal", "anomalous", "unreadable" and, uncalibrated, "scored" images, and of those "skipped"
        because an earlier run had done them. What could not be read or written then, and what has been replaced since,
        is done again.

    Raises:
        ImportError: the package of the output's store is not installed.
        OSError: the disk is full, or the output's store does not take what is written.
        ValueError: `output_dir` holds results of another calibration, category or manifest, or of images
            elsewhere, or files of another program's that would be replaced; or the category is unknown.
        RuntimeError: another process writes to `output_dir`, or one of `accelerator`'s has ended early.
    """
    index = pipeline.category_index(category)
    settings, threshold = detection_settings(pipeline, category)
    detect = pipeline_detect(pipeline, category, batch_size)
    side, at_once = decoding_of(pipeline, batch_size)
    if settings["value_range"] is None:
        settings["value_range"] = on_main(accelerator, lambda: range_of_inputs(paths))
        if settings["value_range"] is not None:
            warn_of_found_range(settings["value_range"])
    resizing = resizing_of(pipeline, category)
    with (
        opened_output(output_dir, accelerator) as output,
        same_threads(pipeline, output.folder, accelerator) as threads,
    ):
        counts = score_files(
            detect,
            side,
            threshold,
            settings,
            paths,
            output,
            at_once,
            num_workers,
            report,
            resizing,
            max_pictures,
            accelerator,
            spent,
            threads,
        )
        if pipeline.has_thresholds:
            from diffad.drift_table import save_calibration_scores

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


def detection_settings(pipeline: Any, category: str | None) -> tuple[dict[str, Any], float | None]:
    """What results of a pipeline must agree in to stand in one folder, and its threshold of pixels, if it has one."""
    settings: dict[str, Any] = {"category": category, "calibration": None, "command": "predict"}
    settings["value_range"] = pipeline.value_range
    settings["noise"] = noise_of(pipeline)
    settings["precision"] = pipeline.precision
    if not pipeline.has_thresholds:  # which would tell one model from another
        return settings | {"model": model_digest(pipeline)}, None
    index = pipeline.category_index(category)
    calibration = pipeline.calibration
    settings["calibration"] = [float(calibration.image_threshold[index]), float(calibration.pixel_threshold[index])]
    settings["smallest_area"] = calibration.smallest_area or None
    return settings, settings["calibration"][1]


def noise_of(pipeline: Any) -> str | None:
    """Whose noise images get, for records; None where none is drawn, and of a `Runtime`, whose graph has it."""
    return None if getattr(pipeline, "scores_features", True) else "the model's"


def resizing_of(pipeline: Any, category: str | None) -> Resizing:
    """As the pipeline resizes images and maps of a category in a call of its own."""
    if isinstance(pipeline, Runtime):
        return WITHOUT_TORCH._replace(region=pipeline.region)
    from diffad.images import WITH_TORCH, as_size

    region, cell = pipeline.region, None
    if pipeline.tile_size is not None:
        from diffad.tiling import cell_size

        cell = cell_size(pipeline.tile_size, as_size(pipeline.input_resolution))
    of_category = None if region is None else region[pipeline.category_index(category)].cpu().numpy()
    return WITH_TORCH._replace(region=of_category, cell=cell)


def pipeline_detect(pipeline: Any, category: str | None, batch_size: int) -> Detect:
    """A pipeline as `score_files` takes it."""
    if isinstance(pipeline, Runtime):
        index = pipeline.category_index(category)
        return lambda network_inputs: pipeline.run(np.stack(network_inputs), index)

    def detect(network_inputs: list[Any]) -> Any:
        return pipeline(
            network_inputs,
            batch_size=batch_size,
            match_input_resolution=False,
            output_type="pt",
            **({"category": category} if category is not None else {}),
        )

    return detect


def score_files(
    detect: Detect,
    side: Side | None,
    threshold: float | None,
    settings: dict[str, Any],
    paths: Sequence[Path | Input] | Manifest,
    output: str | Path | LocalOutput,
    batch_size: int = 16,
    num_workers: int = 2,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
    resizing: Resizing = WITHOUT_TORCH,
    max_pictures: int = 100_000,
    accelerator: Accelerator | None = None,
    spent: dict[str, float] | None = None,
    recorded: dict[str, Any] | None = None,
) -> dict[str, int]:
    """`predict_files`, of anything that detects.

    Args:
        detect: from a batch of images (R, R', 3) in [0, 1] to an output with `anomaly_map` (N, h, w) and
            `anomaly_score` (N,) and, unless `threshold` is None, `anomaly_mask`, `p_value` and `is_anomalous`.
        side: of the networks' images, in pixels, or height and width; None hands `detect` the images as they are.
        threshold: of a map's pixels; None gives no masks and no verdicts.
        settings: what later runs into the same folder must agree in; `value_range`, which may be None or missing, is
            that of images of more than 8 bits, and `smallest_area` that of regions, as a share of the image's.
        paths: as in `predict_files`, with all that follows.
        output: a folder, or an opened output, to which the tables are still to be pushed.
        batch_size: as there.
        num_workers: as there.
        report: as there.
        resizing: of images and maps.
        max_pictures: as there.
        accelerator: as there.
        spent: as there.
        recorded: what stands beside `settings`, and may differ in later runs.
    """
    output = output if isinstance(output, LocalOutput) else LocalOutput(output)
    output_dir = output.folder
    process, num_processes = 0, 1
    if accelerator is not None:
        process, num_processes = accelerator.process_index, accelerator.num_processes
    value_range, smallest_area = settings.get("value_range"), settings.get("smallest_area") or 0.0

    with ExitStack() as stack:
        # 1. What there is to do; the main process looks, and holds the folder
        def plan() -> ListedFiles | Manifest:
            check_output(output_dir)
            output_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_folder(output_dir, LOCK_NAME))
            inputs = paths if isinstance(paths, Manifest) else ListedFiles(paths)
            agreed = settings | {"manifest": inputs.digest()}
            earlier = check_settings(agreed, output_dir)
            inputs.root = earlier or begin_settings(agreed | (recorded or {}), inputs.common_root(), output_dir)
            take_up(output_dir, inputs)
            regions.merge(inputs.place_of_line)
            output.push()
            return inputs

        regions = RegionJournal(output_dir, process)
        inputs = on_main(accelerator, plan)
        most = batch_size**2  # from here on all batches are full
        num_inputs = inputs.count_up_to(max(most, max_pictures + 1))  # once, as it may read a store
        shape, with_pictures = batch_shape(min(num_inputs, most), batch_size), num_inputs <= max_pictures
        workers = max(num_workers, STORE_WORKERS) if inputs.are_far or output.is_far else num_workers
        names: dict[int, str] = {}  # of pictures, by place, until their image is done
        read = RemoteReader()

        def own() -> Iterator[tuple[int, Input]]:
            def is_own(place: int) -> bool:  # so processes share whole batches
                return place // shape % num_processes == process

            for place, one, names[place] in inputs.todo(is_own, with_pictures):
                yield place, one

        def decode(todo: Iterable[tuple[int, Input]], pool: ThreadPoolExecutor, with_pixels: bool) -> Iterator[Any]:
            of_images = (side, shape, pool, value_range, resizing, with_pixels)
            return decoded_batches(todo, *of_images, by_slot=True, read=read, ahead=workers if inputs.are_far else 0)

        def detect_batch(batch: Sequence[tuple[int, Input, Decoded | Exception]]) -> Any:
            """Each image in the slot that its place gives it, the rest filled up: sums depend on shape and slot."""
            good = [(place, decoded) for place, _, decoded in batch if isinstance(decoded, Decoded)]
            if not good:
                return None
            slots = [good[0][1]] * shape
            for place, decoded in good:
                slots[place % shape] = decoded
            return detect([decoded.network_input for decoded in slots])

        # 2. This process's share, batch by batch; a row is in its journals once its files are written
        counts: Counter[str] = Counter()
        own_spent = {"seconds": -time.perf_counter(), "waiting": 0.0, "retried": 0.0}
        with (
            output.all_rows(),
            open(process_journal(output_dir, process), "w", **ENCODING) as file,
            ThreadPoolExecutor(workers) as pool,
            closing(regions),
        ):
            writer = csv.DictWriter(file, JOURNAL_COLUMNS)
            writer.writeheader()

            def enter(rows: Iterable[dict[str, Any] | Future]) -> None:
                for row in rows:
                    row = row.result() if isinstance(row, Future) else row
                    if "regions" in row:
                        regions.enter(
                            row["place"], row["file"], row["path"], row["name"], row["upright_size"], row["regions"]
                        )
                    writer.writerow({column: row.get(column) for column in JOURNAL_COLUMNS})
                    counts[row["verdict"]] += 1
                    report({column: row.get(column) for column in COLUMNS})
                file.flush()
                output.send_rows(pool)

            being_written: list[dict[str, Any] | Future] = []
            batches = decode(own(), pool, with_pixels=with_pictures)
            for batch in waited_for(batches, own_spent):
                detected = detect_batch(batch)
                enter(being_written)
                being_written = []
                for place, one, decoded in batch:
                    row = {"place": place, "path": str(one.path), "name": inputs.name(place, one)}
                    row |= {"file": one.file, "size": one.size, "modified": one.modified}
                    picture = names.pop(place)
                    if not isinstance(decoded, Decoded):
                        being_written.append({**row, "verdict": "unreadable", "message": str(decoded)})
                        continue
                    outputs = (detected, place % shape, decoded, output_dir, threshold, smallest_area, resizing)
                    row["picture"] = picture
                    being_written.append(pool.submit(write_outputs, row, *outputs, output.send))
            enter(being_written)
        own_spent["seconds"] += time.perf_counter()
        own_spent["retried"] += read.retried

        # 3. The main process makes the tables of all journals, line by line
        of_all = of_all_processes(accelerator, (counts, own_spent, output.segments))

        def finish() -> None:
            output.collect(name for _, _, segments in of_all for name in segments)
            scored = (row for row in merged_journals(output_dir) if row[SCORE])
            highest = heapq.nlargest(SHEET_IMAGES, scored, key=lambda row: float(row[SCORE]))
            try:
                output.fetch(f"overlays/{row[PICTURE]}" for row in highest if row[PICTURE])
                save_most_anomalous(highest, draw([row for row in highest if not row[PICTURE]]), output_dir)
            except OSError as error:
                warnings.warn(f"{SHEET_NAME} cannot be written: {error}", stacklevel=2)
            regions.merge(inputs.place_when_complete)
            if threshold is not None and can_list_regions():
                regions.write_files(settings.get("category"))
            complete_scores(output_dir)

        def draw(rows: Sequence[list[str]]) -> dict[int, np.ndarray]:
            """Overlays of images that have none, by their places."""
            known = ((int(row[PLACE]), row[PATH], row[FILE]) for row in rows)
            todo = [(i, Input(path if is_url(path) else Path(path), file, "", "")) for i, path, file in known if i >= 0]
            drawn = {}
            with ThreadPoolExecutor(workers) as pool:
                for batch in decode(todo, pool, with_pixels=True):
                    detected = detect_batch(batch)
                    for place, _, decoded in batch:
                        if isinstance(decoded, Decoded):
                            outputs = (detected, place % shape, decoded, threshold, smallest_area, resizing)
                            drawn[place] = draw_overlay(*outputs)
            return drawn

        on_main(accelerator, finish)
    if spent is not None:
        spent |= {name: sum(one[name] for _, one, _ in of_all) for name in own_spent}
    new = sum((counts for counts, _, _ in of_all), Counter())
    found = {verdict: inputs.counts[verdict] + new[verdict] for verdict in VERDICTS}
    return found | {"skipped": sum(inputs.counts.values())}


def batch_shape(num_images: int, batch_size: int) -> int:
    """Images in each batch, as even as at most `batch_size` allows, so that little is filled up."""
    return math.ceil(num_images / math.ceil(num_images / batch_size))


def waited_for(batches: Iterator[Any], spent: dict[str, float]) -> Iterator[Any]:
    """The same batches; adds to `spent["waiting"]` how many seconds each has been waited for."""
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        spent["waiting"] += time.perf_counter() - started
        if batch is None:
            return
        yield batch


if __name__ == "__main__":
    from diffad.cli import main

    main(["predict", *sys.argv[1:]])
