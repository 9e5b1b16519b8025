"""Scores image files of any number in constant memory, with whatever detects, and writes what it finds.

Every file is written under another name and renamed, and `scores.csv` appears only when every input is accounted for: a
killed run leaves no half-written file, and the next one goes on where it stopped, on as many processes as it has.
Nothing is written outside the output folder, and no input is written to. What becomes of these files where the output
is in a store, `diffad.prediction.remote_output` knows.
"""

from __future__ import annotations

import csv
import heapq
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from diffad.files import locked_folder
from diffad.prediction.detection_call import DetectionCall
from diffad.prediction.journal import (
    COLUMNS,
    ENCODING,
    FILE,
    JOURNAL_COLUMNS,
    PATH,
    PICTURE,
    PLACE,
    SCORE,
    VERDICTS,
    complete_scores,
    merged_journals,
    process_journal,
    take_up,
)
from diffad.prediction.listed_files import ListedFiles
from diffad.prediction.manifest import Manifest
from diffad.prediction.output_folder import begin_settings, check_output, check_settings
from diffad.prediction.picture_files import SHEET_IMAGES, draw_overlay, save_most_anomalous, write_outputs
from diffad.prediction.region_files import RegionJournal
from diffad.prediction.remote_output import LocalOutput
from diffad.process_share import of_all_processes, on_main
from diffad.reading.decoding import Decoded, decoded_batches
from diffad.reading.input_file import Input
from diffad.reading.inputs import LOCK_NAME, SHEET_NAME
from diffad.reading.remote_files import STORE_WORKERS, is_url
from diffad.reading.remote_reader import RemoteReader
from diffad.regions import can_list_regions

if TYPE_CHECKING:
    from accelerate import Accelerator

# of a batch: places, inputs, and what could be read of them
Batch: TypeAlias = Sequence[tuple[int, Input, Decoded | Exception]]


class Run(NamedTuple):
    """A run, as one of its processes has it.

    Attributes:
        call: of what detects.
        inputs: with what earlier runs have done of them.
        output: with the folder that this process writes to.
        process: this one's number, below `num_processes`.
        num_processes: that share the inputs, in whole batches.
        shape: images in each batch, of every process.
        with_pictures: whether images get overlays, maps and masks.
        workers: threads that decode and write.
        ahead: images that are decoded ahead, if more than a batch.
        read: the bytes of an image in a store.
    """

    call: DetectionCall
    inputs: ListedFiles | Manifest
    output: LocalOutput
    process: int
    num_processes: int
    shape: int
    with_pictures: bool
    workers: int
    ahead: int
    read: RemoteReader


def score_files(
    call: DetectionCall,
    settings: dict[str, Any],
    paths: Sequence[Path | Input] | Manifest,
    output: LocalOutput,
    recorded: dict[str, Any] | None = None,
    num_workers: int = 2,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
    max_pictures: int = 100_000,
    accelerator: Accelerator | None = None,
    spent: dict[str, float] | None = None,
) -> dict[str, int]:
    """`predict_files`, of anything that detects.

    Args:
        call: of what detects.
        settings: what later runs into the same folder must agree in.
        paths: as in `predict_files`.
        output: to which the tables are still to be pushed.
        recorded: what stands beside `settings`, and may differ in later runs.
        num_workers: as in `predict_files`, with all that follows.
        report: as there.
        max_pictures: as there.
        accelerator: as there.
        spent: as there.
    """
    with held_folder(output.folder, accelerator):
        inputs = on_main(accelerator, lambda: plan(settings, recorded or {}, paths, output))
        run = begin_run(call, inputs, output, num_workers, max_pictures, accelerator)
        counts, own_spent = score_share(run, report)
        of_all = of_all_processes(accelerator, (counts, own_spent, output.segments))
        on_main(accelerator, lambda: write_tables(run, (name for _, _, segments in of_all for name in segments)))
    if spent is not None:
        spent |= {name: sum(one[name] for _, one, _ in of_all) for name in own_spent}
        spent["without_pictures"] = inputs.num_without_pictures if run.with_pictures else 0
    new = sum((counts for counts, _, _ in of_all), Counter())
    found = {verdict: inputs.counts[verdict] + new[verdict] for verdict in VERDICTS}
    return found | {"skipped": sum(inputs.counts.values())}


@contextmanager
def held_folder(output_dir: Path, accelerator: Accelerator | None) -> Iterator[None]:
    """Makes the output folder; until the block ends, the main process keeps all other runs from it."""
    with ExitStack() as held:

        def hold() -> None:
            check_output(output_dir)
            output_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked_folder(output_dir, LOCK_NAME))

        on_main(accelerator, hold)
        yield


def plan(
    settings: dict[str, Any],
    recorded: dict[str, Any],
    paths: Sequence[Path | Input] | Manifest,
    output: LocalOutput,
) -> ListedFiles | Manifest:
    """What there is to do, and what earlier runs have done of it, by the main process alone."""
    inputs = paths if isinstance(paths, Manifest) else ListedFiles(paths)
    agreed = settings | {"manifest": inputs.digest()}
    earlier = check_settings(agreed, output.folder)
    inputs.root = earlier or begin_settings(agreed | recorded, inputs.common_root(), output.folder)
    take_up(output.folder, inputs)
    RegionJournal(output.folder).merge(inputs.place_of_line)
    output.push()
    return inputs


def begin_run(
    call: DetectionCall,
    inputs: ListedFiles | Manifest,
    output: LocalOutput,
    num_workers: int,
    max_pictures: int,
    accelerator: Accelerator | None,
) -> Run:
    """The run of this process, with what depends on the inputs' number and place."""
    most = call.at_once**2  # from here on all batches are full
    num_inputs = inputs.count_up_to(max(most, max_pictures + 1))  # once, as it may read a store
    are_far = inputs.are_far
    workers = max(num_workers, STORE_WORKERS) if are_far or output.is_far else num_workers
    return Run(
        call,
        inputs,
        output,
        process=0 if accelerator is None else accelerator.process_index,
        num_processes=1 if accelerator is None else accelerator.num_processes,
        shape=batch_shape(min(num_inputs, most), call.at_once),
        with_pictures=num_inputs <= max_pictures,
        workers=workers,
        ahead=workers if are_far else 0,
        read=RemoteReader(),
    )


def score_share(run: Run, report: Callable[[dict[str, Any]], None]) -> tuple[Counter[str], dict[str, float]]:
    """Scores this process's share; a row is in its journals once its files are written.

    Returns:
        Counts by verdict, and the share's part of `spent`.
    """
    counts: Counter[str] = Counter()
    spent = {"seconds": -time.perf_counter(), "waiting": 0.0, "retried": 0.0}
    with (
        run.output.all_rows(),
        open(process_journal(run.output.folder, run.process), "w", **ENCODING) as file,
        ThreadPoolExecutor(run.workers) as pool,
        closing(RegionJournal(run.output.folder, run.process)) as regions,
    ):
        writer = csv.DictWriter(file, JOURNAL_COLUMNS)
        writer.writeheader()
        for rows in scored_rows(run, pool, spent):
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
            run.output.send_rows(pool)
    spent["seconds"] += time.perf_counter()
    spent["retried"] += run.read.retried
    return counts, spent


def scored_rows(
    run: Run, pool: ThreadPoolExecutor, spent: dict[str, float]
) -> Iterator[list[dict[str, Any] | Future[dict[str, Any]]]]:
    """The rows of each batch, or what will give them, once the networks have looked at the batch after it.

    So its files are written meanwhile. The first list is empty.
    """
    names: dict[int, str] = {}  # of pictures, by place, until their image is done

    def is_own(place: int) -> bool:  # so processes share whole batches
        return place // run.shape % run.num_processes == run.process

    def own() -> Iterator[tuple[int, Input]]:
        for place, one, names[place] in run.inputs.todo(is_own, run.with_pictures):
            yield place, one

    being_written: list[dict[str, Any] | Future[dict[str, Any]]] = []
    for batch in waited_for(decode(run, own(), pool, run.with_pictures), spent):
        output = detect(run, batch)
        yield being_written
        being_written = []
        for place, one, decoded in batch:
            row = {"place": place, "path": str(one.path), "name": run.inputs.name(place, one)}
            row |= {"file": one.file, "size": one.size, "modified": one.modified}
            picture = names.pop(place)
            if not isinstance(decoded, Decoded):
                being_written.append({**row, "verdict": "unreadable", "message": str(decoded)})
                continue
            row["picture"] = picture
            folder, call = run.output.folder, run.call
            outputs = (output, place % run.shape, decoded, folder, call.threshold, call.smallest_area, call.resizing)
            being_written.append(pool.submit(write_outputs, row, *outputs, run.output.send))
    yield being_written


def decode(run: Run, todo: Iterable[tuple[int, Input]], pool: ThreadPoolExecutor, with_pixels: bool) -> Iterator[Batch]:
    """Batches of images, no two of one in the same slot; `with_pixels`, to be drawn on."""
    call = run.call
    of_images = (call.side, run.shape, pool, call.value_range, call.resizing, with_pixels)
    return decoded_batches(todo, *of_images, by_slot=True, read=run.read, ahead=run.ahead)


def detect(run: Run, batch: Batch) -> Any:
    """Each image in the slot that its place gives it, the rest filled up: sums depend on shape and slot.

    None where no image of the batch could be read.
    """
    good = [(place, decoded) for place, _, decoded in batch if isinstance(decoded, Decoded)]
    if not good:
        return None
    slots = [good[0][1]] * run.shape
    for place, decoded in good:
        slots[place % run.shape] = decoded
    return run.call.detect([decoded.network_input for decoded in slots])


def write_tables(run: Run, segments: Iterable[str]) -> None:
    """Makes the tables of all processes' journals, line by line, and the sheet, by the main process alone.

    `segments` are those of the journals that are in a store.
    """
    output_dir = run.output.folder
    run.output.collect(segments)
    scored = (row for row in merged_journals(output_dir) if row[SCORE])
    highest = heapq.nlargest(SHEET_IMAGES, scored, key=lambda row: float(row[SCORE]))
    try:
        run.output.fetch(f"overlays/{row[PICTURE]}" for row in highest if row[PICTURE])
        save_most_anomalous(highest, draw(run, [row for row in highest if not row[PICTURE]]), output_dir)
    except OSError as error:
        warnings.warn(f"{SHEET_NAME} cannot be written: {error}", stacklevel=2)
    regions = RegionJournal(output_dir)
    regions.merge(run.inputs.place_when_complete)
    if run.call.threshold is not None and can_list_regions():
        regions.write_files(run.call.category)
    complete_scores(output_dir)


def draw(run: Run, rows: Sequence[list[str]]) -> dict[int, np.ndarray]:
    """Overlays of images that have none, by their places."""
    known = ((int(row[PLACE]), row[PATH], row[FILE]) for row in rows)
    todo = [(i, Input(path if is_url(path) else Path(path), file, "", "")) for i, path, file in known if i >= 0]
    drawn = {}
    with ThreadPoolExecutor(run.workers) as pool:
        for batch in decode(run, todo, pool, with_pixels=True):
            output = detect(run, batch)
            for place, _, decoded in batch:
                if isinstance(decoded, Decoded):
                    call, slot = run.call, place % run.shape
                    drawn[place] = draw_overlay(
                        output, slot, decoded, call.threshold, call.smallest_area, call.resizing
                    )
    return drawn


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
