"""Runs a pipeline over image files of any number, in constant memory, and writes what it finds.

Every file is written under another name and renamed, and `scores.csv` appears only when every input is accounted for:
a killed run leaves no half-written file, and the next one goes on where it stopped.
"""

from __future__ import annotations

import csv
import heapq
import json
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from diffad.images import image_to_rgb, images_to_tensors, read_image, resize_images
from diffad.seeding import image_generator
from diffad.visualization import overlay, save_rows

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
COLUMNS = ("path", "score", "p_value", "verdict", "map_low", "map_high", "message")
VERDICTS = ("normal", "anomalous", "unreadable", "scored")
SCORES_NAME, JOURNAL_NAME = "scores.csv", "scores.partial.csv"
SETTINGS_NAME = "settings.json"
SHEET_NAME, SHEET_COLUMNS, SHEET_ROWS = "most_anomalous.png", 6, 4


def find_images(paths: Sequence[str | Path], output_dir: str | Path | None = None) -> list[Path]:
    """Image files among `paths` and below the folders in it, in order, each once.

    What lies below `output_dir` is left out: an earlier run's pictures are no inputs of the next.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: there are no images.
    """
    found: dict[Path, None] = {}
    written = None if output_dir is None else Path(output_dir).absolute()
    for path in map(Path, paths):
        if path.is_dir():
            inside = (p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            shown = (p for p in inside if not p.name.startswith("."))
            found.update(dict.fromkeys(p for p in shown if written is None or written not in p.absolute().parents))
        elif path.is_file():
            found[path] = None
        else:
            raise FileNotFoundError(f"There is no file or folder at {path}.")
    if not found:
        raise ValueError(f"There are no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {', '.join(map(str, paths))}.")
    return list(found)


class Decoded(NamedTuple):
    """An input that could be read: its pixels, (H, W, 3) uint8, and what the networks see, (3, R, R) in [0, 1]."""

    pixels: np.ndarray
    network_input: torch.Tensor


def predict_files(
    pipeline: Any,
    paths: Sequence[Path],
    output_dir: str | Path,
    batch_size: int = 16,
    category: str | None = None,
    seed: int = 0,
    num_workers: int = 2,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, int]:
    """Scores image files and writes overlays, maps, masks, `scores.csv` and a sheet of the most anomalous.

    Args:
        pipeline: an anomaly pipeline; uncalibrated, it gives no masks and no verdicts.
        paths: image files, as from `find_images`. The outputs keep their folders below the common one.
        output_dir: gets `overlays/`, `maps/` (16-bit PNG: map_low at 0, map_high at 65535, both in scores.csv),
            `masks/` (0 or 255), `most_anomalous.png`, `scores.csv` (in order of `paths`, below what earlier runs have
            scored) and `settings.json`. The pictures of `part.png` are named so too, those of `part.jpg`
            `part.jpg.png`.
        batch_size: images in one pass of the networks.
        category: of a unified model.
        seed: the noise of an image follows from this and its place in `paths`.
        num_workers: threads that decode ahead, one batch at most, and write what the batch before has shown.
        report: called with each new row of scores.csv, as a dict.

    Returns:
        Counts of "normal", "anomalous", "unreadable" and, uncalibrated, "scored" images, and of those "skipped"
        because an earlier run had done them. What could not be read then is tried again.

    Raises:
        ValueError: `output_dir` holds results of another calibration, category or seed, or of images elsewhere; or the
            category is unknown.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"`output_dir` must be a folder, but {output_dir} is a file.")
    index = pipeline.category_index(category)
    output_dir.mkdir(parents=True, exist_ok=True)
    root = _check_settings(pipeline, index, paths, output_dir, category, seed)
    done = _take_up(output_dir, set(map(str, paths)))
    todo = [(i, path) for i, path in enumerate(paths) if str(path) not in done]
    counts = dict.fromkeys(VERDICTS, 0) | {"skipped": len(paths) - len(todo)}
    for path in paths:
        if str(path) in done:
            counts[done[str(path)]] += 1
    threshold = None if pipeline.calibration is None else float(pipeline.calibration.pixel_threshold[index])
    side = pipeline.input_resolution
    journal = output_dir / JOURNAL_NAME
    with open(journal, "a", newline="", encoding="utf-8") as file, ThreadPoolExecutor(num_workers) as pool:
        writer = csv.DictWriter(file, COLUMNS)

        def enter(rows: Iterable[dict[str, Any] | Future]) -> None:
            """Into the journal, once their files are written."""
            for row in rows:
                row = row.result() if isinstance(row, Future) else row
                writer.writerow(row)
                counts[row["verdict"]] += 1
                report({column: row.get(column) for column in COLUMNS})
            file.flush()

        being_written: list[dict[str, Any] | Future] = []
        for batch in _decoded_batches(todo, side, batch_size, pool):
            good = [(i, decoded) for i, _, decoded in batch if isinstance(decoded, Decoded)]
            if good:
                output = pipeline(
                    [decoded.network_input for _, decoded in good],
                    batch_size=batch_size,
                    match_input_resolution=False,
                    generator=[image_generator(seed, i) for i, _ in good],
                    output_type="pt",
                    **({"category": category} if category is not None else {}),
                )
            enter(being_written)
            being_written, j = [], 0
            for _, path, decoded in batch:
                if isinstance(decoded, Decoded):
                    name = _output_name(path, root)
                    arguments = (output, j, decoded.pixels, output_dir, name, threshold)
                    being_written.append(pool.submit(_write_outputs, path, *arguments))
                    j += 1
                else:
                    being_written.append({"path": str(path), "verdict": "unreadable", "message": str(decoded)})
        enter(being_written)
    save_most_anomalous(journal, output_dir, root)
    journal.replace(output_dir / SCORES_NAME)
    return counts


def save_most_anomalous(scores: Path, output_dir: Path, root: Path) -> None:
    """A contact sheet of the overlays with the highest scores, from a table like scores.csv."""
    scored = (row for row in _read_rows(scores) if row["score"])
    highest = heapq.nlargest(SHEET_COLUMNS * SHEET_ROWS, scored, key=lambda row: float(row["score"]))
    tiles, captions = [], []
    for row in highest:
        path = Path(row["path"])
        if not path.absolute().is_relative_to(root):
            continue  # an earlier run's, by a path from another working folder
        overlay_path = output_dir / "overlays" / _output_name(path, root)
        if overlay_path.is_file():  # an earlier run's may have been taken away
            with Image.open(overlay_path) as picture:
                picture.thumbnail((320, 320))
                tiles.append(np.asarray(picture))
            p_value = f", p = {float(row['p_value']):.2g}" if row["p_value"] else ""
            captions.append(f"{path.name}\n{float(row['score']):.4g}{p_value}")
    if tiles:
        unfinished = output_dir / f".unfinished.{SHEET_NAME}"
        starts = range(0, len(tiles), SHEET_COLUMNS)
        rows = [tiles[i : i + SHEET_COLUMNS] for i in starts]
        save_rows(rows, unfinished, captions=[captions[i : i + SHEET_COLUMNS] for i in starts])
        unfinished.replace(output_dir / SHEET_NAME)


def _check_settings(
    pipeline: Any, index: int, paths: Sequence[Path], output_dir: Path, category: str | None, seed: int
) -> Path:
    """The folder that the outputs' names start from: the inputs' common one, or that of an earlier run.

    Raises:
        ValueError: the earlier run's results and new ones would not fit together.
    """
    folders = {path.absolute().parent for path in paths}
    settings: dict[str, Any] = {"root": os.path.commonpath(folders), "category": category, "seed": seed}
    if pipeline.calibration is not None:
        thresholds = (pipeline.calibration.image_threshold, pipeline.calibration.pixel_threshold)
        settings["calibration"] = [float(threshold[index]) for threshold in thresholds]
    else:
        settings["calibration"] = None
    path = output_dir / SETTINGS_NAME
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings if name != "root" and settings[name] != earlier[name]]
        if changed:
            raise ValueError(
                f"{output_dir} holds results of another {' and '.join(changed)}. Give another `output_dir`, or remove "
                "that one."
            )
        elsewhere = next((folder for folder in folders if not folder.is_relative_to(earlier["root"])), None)
        if elsewhere is not None:
            raise ValueError(
                f"{output_dir} holds results of images in {earlier['root']}, and {elsewhere} lies elsewhere. Give "
                "another `output_dir`."
            )
        return Path(earlier["root"])
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return Path(settings["root"])


def _output_name(path: Path, root: Path) -> Path:
    """Of an input's pictures; no two inputs share one."""
    name = path.absolute().relative_to(root)
    return name if name.suffix == ".png" else name.with_name(f"{name.name}.png")


def _decoded_batches(
    todo: Sequence[tuple[int, Path]], side: int, batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[list[tuple[int, Path, Decoded | Exception]]]:
    """Decoded images, or the error of reading them, with one batch decoded ahead."""

    def decode(path: Path) -> Decoded | Exception:
        try:
            pixels = np.asarray(image_to_rgb(read_image(path)))
        except (ValueError, OSError) as error:
            return error
        image = images_to_tensors(pixels)[0]
        resized = resize_images(image[None], (side, side))[0]
        return Decoded(pixels, resized.clamp(0.0, 1.0))  # rounding may have left the range

    entries = iter(todo)
    waiting: deque[tuple[int, Path, Future]] = deque()
    batch: list[tuple[int, Path, Decoded | Exception]] = []
    while True:
        while len(waiting) <= batch_size and (entry := next(entries, None)) is not None:
            waiting.append((*entry, pool.submit(decode, entry[1])))
        if not waiting:
            break
        i, path, future = waiting.popleft()
        batch.append((i, path, future.result()))
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_outputs(
    path: Path, output: Any, j: int, pixels: np.ndarray, output_dir: Path, name: Path, threshold: float | None
) -> dict[str, Any]:
    """Writes one image's pictures and returns its row."""
    size = pixels.shape[:2]
    anomaly_map = resize_images(output.anomaly_map[j][None, None], size)[0, 0].numpy()  # (H, W)
    low, high = float(anomaly_map.min()), float(anomaly_map.max())
    scaled = (anomaly_map - low) / max(high - low, 1e-12) * 65535.0
    row = {
        "path": str(path),
        "score": f"{float(output.anomaly_score[j]):.6g}",
        "map_low": f"{low:.6g}",
        "map_high": f"{high:.6g}",
        "verdict": "scored",
    }
    _save(Image.fromarray((scaled + 0.5).astype(np.uint16)), output_dir / "maps" / name)
    mask = None
    if threshold is not None:
        mask = resize_images(output.anomaly_mask[j][None, None].float(), size)[0, 0].numpy() > 0.5
        _save(Image.fromarray(mask.astype(np.uint8) * 255), output_dir / "masks" / name)
        row["p_value"] = f"{float(output.p_value[j]):.6g}"
        row["verdict"] = "anomalous" if bool(output.is_anomalous[j]) else "normal"
    _save(Image.fromarray(overlay(pixels, anomaly_map, mask, threshold)), output_dir / "overlays" / name)
    return row


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    # the default, 6, makes files a fifth smaller in three times the time: more than a small network takes for the image
    image.save(unfinished, format="PNG", compress_level=2)
    unfinished.replace(path)


def _take_up(output_dir: Path, wanted: Collection[str]) -> dict[str, str]:
    """Begins the journal with what earlier runs have done; returns the verdict of each of their paths.

    Left out are what a killed run left of a line, and those `wanted` files that could not be read: they may have been
    mended.
    """
    done: dict[str, str] = {}
    journal = output_dir / JOURNAL_NAME
    unfinished = journal.with_name(f".{journal.name}.unfinished")
    with open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for name in (SCORES_NAME, JOURNAL_NAME):
            for row in _read_rows(output_dir / name):
                again = row["verdict"] == "unreadable" and row["path"] in wanted
                if row["path"] not in done and not again:
                    writer.writerow(row)
                    done[row["path"]] = VERDICTS[VERDICTS.index(row["verdict"])]  # the one string for all rows
    unfinished.replace(journal)
    return done


def _read_rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a table that is whole or, killed, broken off in its last line."""
    if path.is_file():
        with open(path, newline="", encoding="utf-8") as file:
            yield from (row for row in csv.DictReader(file) if None not in row.values())
