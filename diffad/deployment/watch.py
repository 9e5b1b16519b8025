"""`diffad watch`: images are scored as they come into a folder, each once, over any number of restarts.

An event is a file's name, size and time of change: a file that is written anew under its old name is a new event. A
row in `scores.csv` says that an event is done. Whatever must not be lost is on disk before that row: pictures, and what
waits for a receiver (`outbox`). So a process that is killed anywhere does an event again, and enters it once.
"""

from __future__ import annotations

import csv
import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from diffad.calibration.drift import DriftTest
from diffad.deployment.outbox import Outbox
from diffad.files import bounded_name, digest, locked_folder, write_whole
from diffad.installation import needs_extra
from diffad.prediction.detection_call import DetectionCall, detection_call, detection_settings
from diffad.prediction.drift_table import CalibrationScores, describe, save_calibration_scores
from diffad.prediction.journal import COLUMNS, ENCODING, SCORES_NAME, read_rows
from diffad.prediction.output_folder import begin_settings, check_output, check_settings
from diffad.prediction.picture_files import write_outputs
from diffad.reading.decoding import Decoded, decoded_batches
from diffad.reading.input_file import Input, describe_input
from diffad.reading.inputs import LOCK_NAME, images_below, is_image_name, is_input_folder, is_own
from diffad.warn_once import warn_once

RESCAN_SECONDS = 60.0  # how often the folder is listed beside what the system reports, which may lose some
PATIENCE = 10.0  # times `settle` that a file which cannot be read is waited for before it is said to be broken


def event_number(file: str, size: str, modified: str) -> str:
    """Tells an event from all others, in 10 letters."""
    return digest("\0".join((file, size, modified)))


def number_of_row(row: dict[str, Any]) -> str:
    """The event that a row is of: its picture's name says it, as programs for tables round `modified`'s 19 digits."""
    named = re.search(r"-([0-9a-f]{10})\.png$", row["picture"])
    return named[1] if named else event_number(row["file"], row["size"], row["modified"])


class Waiting(NamedTuple):
    """A file that may still be written to.

    one: as it was last seen.
    since: when it was first seen so, on the monotonic clock.
    settle: how long it must stay so, in seconds.
    """

    one: Input
    since: float
    settle: float


class SettlingFiles:
    """Files that have come, until they have not changed for `settle` seconds.

    Args:
        settle: in seconds.
        done: numbers of the events that are done; about 100 bytes each stay in memory.
    """

    def __init__(self, settle: float, done: set[str]):
        self.settle, self.done = settle, done
        self.waiting: dict[str, Waiting] = {}
        self.doubtful: set[str] = set()  # could not be read when they had settled

    def note(self, path: Path) -> None:
        """Looks at a file that is there, or was a moment ago."""
        one = describe_input(path)
        known = self.waiting.get(one.file)
        if not one.size or event_number(*one[1:]) in self.done:
            self.waiting.pop(one.file, None)
        elif known is None or known.one[1:] != one[1:]:
            self.waiting[one.file] = Waiting(one, time.monotonic(), self.settle)

    def ready(self) -> list[Input]:
        """Takes out the files that are whole, in the order of their times."""
        for known in list(self.waiting.values()):
            self.note(known.one.path)
        now = time.monotonic()
        settled = [known.one for known in self.waiting.values() if now - known.since >= known.settle]
        for one in settled:
            del self.waiting[one.file]
        return sorted(settled, key=lambda one: (int(one.modified), one.file))

    def wait_longer(self, one: Input) -> bool:
        """Gives a file that could not be read more time, once; returns whether it was given some."""
        number = event_number(*one[1:])
        if number in self.doubtful:
            self.doubtful.discard(number)
            return False
        self.doubtful.add(number)
        self.waiting[one.file] = Waiting(one, time.monotonic(), PATIENCE * self.settle)
        return True


def coming_files(
    folder: Path, output_dir: Path, files: SettlingFiles, poll: bool, stop: threading.Event
) -> Iterator[list[Input]]:
    """Files below a folder, once they are whole; an empty list now and then, so that the caller gets a turn.

    With `poll` it waits where the folder goes away, as a network drive may for a while.

    Raises:
        FileNotFoundError: the folder is no longer there, and is not polled.
    """
    tick = min(max(files.settle / 2.0, 0.05), 1.0)
    next_scan = 0.0
    for changed in _changes(folder, poll, tick, stop):
        if not folder.is_dir():  # what is reported of a renamed one is of its old name
            gone = f"The watched folder {folder} is no longer there."
            if not poll:
                raise FileNotFoundError(
                    f"{gone} It was renamed or removed: put it back and start again. What has a row in "
                    "scores.csv stays done."
                )
            warn_once(f"{gone} It is looked for until it is back.")
            yield []
            continue
        started = time.monotonic()
        if started >= next_scan:
            changed = [folder]
        for path in changed:
            for image in images_below(path) if path.is_dir() else [path]:
                if _is_input(image, folder, output_dir):
                    files.note(image)
        if started >= next_scan:
            took = time.monotonic() - started
            next_scan = time.monotonic() + max(files.settle if poll else RESCAN_SECONDS, 20.0 * took)
        yield files.ready()


def _changes(folder: Path, poll: bool, tick: float, stop: threading.Event) -> Iterator[list[Path]]:
    """What the system says has changed, every `tick` seconds at least; with `poll` nothing is asked of it."""
    yield []
    if poll:
        while not stop.wait(tick):
            yield []
        return
    with needs_extra("watch"):
        from watchfiles import watch
    milliseconds = int(1000 * tick)
    missed: list[Path] = []
    while not stop.is_set():
        changes = watch(
            folder,
            watch_filter=None,
            debounce=milliseconds,
            step=min(50, milliseconds),
            stop_event=stop,
            rust_timeout=milliseconds,
            yield_on_timeout=True,
            raise_interrupt=False,
        )
        try:
            for found in changes:
                yield [*missed, *(Path(path) for path in dict.fromkeys(path for _, path in found))]
                missed = []
            return
        except RuntimeError as error:
            if "Unable to decode path" not in str(error):
                raise
            missed = [folder]  # watchfiles ends at a name that is no UTF-8; once it has begun again, a list has all
            yield []  # many such names must not keep the caller waiting


def _is_input(path: Path, folder: Path, output_dir: Path) -> bool:
    if path == folder or not path.is_relative_to(folder) or path.is_relative_to(output_dir):
        return False
    *folders, name = parts = path.relative_to(folder).parts
    if not is_image_name(name) or not all(map(is_input_folder, folders)):
        return False
    return not any(is_own(folder.joinpath(*parts[:i]), part) for i, part in enumerate(parts))


def take_up_table(output_dir: Path) -> tuple[set[str], list[float]]:
    """Rewrites `scores.csv` without what a killed process left of a line; numbers of its events, and its scores."""
    done: set[str] = set()
    scores: list[float] = []
    path = output_dir / SCORES_NAME
    with write_whole(path) as unfinished, open(unfinished, "w", **ENCODING) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in read_rows(path):
            number = number_of_row(row)
            if number not in done:
                done.add(number)
                writer.writerow(row)
                if row["score"]:
                    scores.append(float(row["score"]))
    return done, scores


def opened_when_free(path: Path) -> BinaryIO:
    """A file for appending and reading. On Windows a program that shows it may hold it, and is given a minute."""
    given_up = time.monotonic() + 60.0
    while True:
        try:
            return open(path, "ab+")
        except PermissionError as error:
            if time.monotonic() > given_up:
                raise PermissionError(
                    f"{path} cannot be written: close the program that has it open, and start again."
                ) from error
        time.sleep(1.0)


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows to `scores.csv`, on disk when it returns.

    It is opened anew each time: an editor that saves it puts another file in its place. One that is new gets a header.
    """
    with opened_when_free(path) as file:
        is_new = not file.tell()
        if not is_new:
            file.seek(-1, os.SEEK_END)
            if file.read(1) not in b"\r\n":
                file.write(b"\r\n")  # editors may leave out the last one, and two rows would become one
        table = io.TextIOWrapper(file, **ENCODING)
        writer = csv.DictWriter(table, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerows({column: row.get(column) for column in COLUMNS} for row in rows)
        table.flush()
        os.fsync(file.fileno())


def watch_folder(
    pipeline: Any,
    folder: str | Path,
    output_dir: str | Path,
    stop: threading.Event,
    settle: float = 1.0,
    poll: bool = False,
    outboxes: Callable[[Path], dict[str, Outbox]] = lambda folder: {},
    category: str | None = None,
    batch_size: int = 16,
    num_workers: int = 2,
    report: Callable[[dict[str, Any]], None] = lambda event: None,
) -> int:
    """Scores what comes into a folder, until `stop` is set; what it held before comes first.

    Args:
        pipeline: an anomaly pipeline; uncalibrated, it gives no masks, no verdicts, and nothing of drift.
        folder: with its subfolders. What `diffad.reading.inputs` takes for an image counts; hidden files, as programs
            make while they write, do not.
        output_dir: as `predict_files` writes it, without the sheet and the regions' files. `scores.csv` grows by a row
            an event, and rows may be edited or taken away meanwhile: what lacks a row then, the next start does again.
            A picture's name holds the event's number, so that a rewritten file's pictures replace none.
        stop: set by another thread or a signal. What has been begun is finished.
        settle: a file is whole once it has not changed for so many seconds; one that cannot be read then is given ten
            times as long.
        poll: lists the folder every `settle` seconds, for drives that report nothing, such as network drives.
        outboxes: makes the receivers, by name, below a folder: "anomaly" gets events of anomalous images, "all" those
            of all, and both get drift's.
        category: of a unified model.
        batch_size: images in one pass, at most.
        num_workers: threads that decode and write.
        report: called with each event once it is done.

    Returns:
        How many events were done.

    Raises:
        ValueError: a path is empty, the folder does not exist, or `output_dir` holds results of another calibration or
            folder, or a score that somebody has edited into no number.
        FileNotFoundError: either folder was renamed or removed meanwhile (the watched one where it is not polled).
            Started again, it goes on.
        RuntimeError: another process writes to `output_dir`.
    """
    for name, path in (("folder", folder), ("output_dir", output_dir)):
        if not os.fspath(path):  # `Path` would take it for the working folder
            raise ValueError(f"`{name}` is an empty path. Is a variable of the shell not set?")
    folder, output_dir = Path(os.path.realpath(folder)), Path(os.path.realpath(output_dir))
    if not folder.is_dir():
        raise ValueError(f"`folder` must be a folder, but there is none at {folder}.")
    if folder.is_relative_to(output_dir):
        raise ValueError(f"`output_dir` must not be the watched folder or one above it, but is {output_dir}.")
    if not 0.0 < settle < float("inf"):
        raise ValueError(f"`settle` must be above 0 seconds and finite, but is {settle:g}.")
    check_output(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    index = pipeline.category_index(category)
    settings = detection_settings(pipeline, category, "watch")
    call = detection_call(pipeline, category, batch_size)
    with locked_folder(output_dir, LOCK_NAME):
        root = check_settings(settings, output_dir) or begin_settings(settings, str(folder), output_dir)
        if root != str(folder):
            raise ValueError(f"{output_dir} holds results of images in {root}. Give another `output_dir`.")
        done, scores = take_up_table(output_dir)
        drift = None
        if pipeline.has_thresholds:
            save_calibration_scores(output_dir, pipeline, index)
            known = CalibrationScores.beside(output_dir / SCORES_NAME)
            drift = DriftTest(known.normal_scores, known.false_alarm_rate)
            for score in scores:
                drift.update(score)
        del scores
        files, count = SettlingFiles(settle, done), 0
        receivers = outboxes(output_dir / "outbox")
        try:
            with ThreadPoolExecutor(num_workers) as pool:
                for found in coming_files(folder, output_dir, files, poll, stop):
                    todo = [(int(event_number(*one[1:]), 16), one) for one in found]
                    of_images = (call.side, call.at_once, pool, call.value_range, call.resizing)
                    for batch in decoded_batches(todo, *of_images, refuse_unknown_range=True):
                        if stop.is_set():
                            break
                        if not output_dir.is_dir():
                            raise FileNotFoundError(
                                f"{output_dir / SCORES_NAME} cannot be written: its folder was renamed or removed. Put "
                                "it back and start again."
                            )
                        rows = _score(call, batch, files, folder, output_dir, pool)
                        events = [_event(row, output_dir) for row in rows]
                        events += _drift_events(rows, drift)
                        for event in events:
                            for name, outbox in receivers.items():
                                if name == "all" or event["verdict"] in ("anomalous", "drift"):
                                    outbox.put(event)
                        append_rows(output_dir / SCORES_NAME, rows)
                        files.done.update(event["event"] for event in events)
                        count += len(rows)
                        for event in events:
                            report(event)
        finally:
            for outbox in receivers.values():
                outbox.close()
    return count


def _score(
    call: DetectionCall,
    batch: Sequence[tuple[int, Input, Decoded | Exception]],
    files: SettlingFiles,
    folder: Path,
    output_dir: Path,
    pool: ThreadPoolExecutor,
) -> list[dict[str, Any]]:
    """Rows of what was read, with their pictures written; what has changed meanwhile comes again."""
    kept = []
    for _, one, decoded in batch:
        if describe_input(one.path)[1:] != one[1:]:
            files.note(one.path)
        elif isinstance(decoded, Decoded) or not files.wait_longer(one):
            kept.append((one, decoded))
    good = [decoded for _, decoded in kept if isinstance(decoded, Decoded)]
    if good:
        output = call.detect([decoded.network_input for decoded in good])
    rows: list[Any] = []
    j = 0
    for one, decoded in kept:
        row = {"path": str(one.path), "file": one.file, "size": one.size, "modified": one.modified}
        if isinstance(decoded, Decoded):
            place = one.path.relative_to(folder)
            names = [*map(bounded_name, place.parts[:-1]), bounded_name(place.stem, f"-{event_number(*one[1:])}.png")]
            row["picture"] = "/".join(names)
            outputs = (output, j, decoded, output_dir, call.threshold, call.smallest_area, call.resizing)
            rows.append(pool.submit(write_outputs, row, *outputs))
            j += 1
        else:
            rows.append({**row, "verdict": "unreadable", "message": str(decoded)})
    return [row if isinstance(row, dict) else row.result() for row in rows]


def _event(row: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """What a receiver gets of a row."""
    numbers = {name: float(row[name]) for name in ("score", "p_value") if row.get(name)}
    pictures = {}
    if row.get("picture"):
        pictures = {"overlay": str(output_dir / "overlays" / row["picture"])}
    regions = [{name: one[name] for name in ("box", "area", "peak", "mean")} for one in row.get("regions", ())]
    return {
        "event": event_number(row["file"], row["size"], row["modified"]),
        "verdict": row["verdict"],
        "path": row["path"],
        **numbers,
        **({"regions": regions} if "regions" in row else {}),
        **pictures,
        "message": row.get("message", ""),
    }


def _drift_events(rows: Sequence[dict[str, Any]], drift: DriftTest | None) -> list[dict[str, Any]]:
    """Takes rows into the test; an event where it was drift's first."""
    events: list[dict[str, Any]] = []
    for row in rows:
        if drift is None or not row.get("score") or drift.drifted_at is not None:
            continue
        total = drift.update(float(row["score"])).total
        if drift.drifted_at is not None:
            number = digest(f"drift at {event_number(row['file'], row['size'], row['modified'])}")
            message = describe(drift, total, {drift.drifted_at: row["path"]})
            events.append({"event": number, "verdict": "drift", "path": row["path"], "message": message})
    return events
