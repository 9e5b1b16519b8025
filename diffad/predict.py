"""Runs a pipeline over image files of any number, in constant memory, and writes what it finds.

Every file is written under another name and renamed, and `scores.csv` appears only when every input is accounted for:
a killed run leaves no half-written file, and the next one goes on where it stopped. Nothing is written outside the
output folder, and no input is written to.
"""

from __future__ import annotations

import csv
import errno
import heapq
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from diffad.decoding import Decoded, decoded_batches, decoding_of
from diffad.deployment.runtime import Runtime
from diffad.files import locked_folder, write_text_whole, write_whole
from diffad.grey_depth import BAND_PIXELS, warn_of_found_range
from diffad.image_arrays import WITHOUT_TORCH, find_value_range
from diffad.image_files import one_large_at_a_time
from diffad.image_sizes import Side
from diffad.inputs import LOCK_NAME, PICTURE_FOLDERS, SHEET_NAME, find_images
from diffad.journal import (
    COLUMNS,
    ENCODING,
    JOURNAL_NAME,
    SCORES_NAME,
    VERDICTS,
    Input,
    check_scores,
    common_folder,
    distinct_inputs,
    name_pictures,
    place_below,
    read_rows,
    take_up,
)
from diffad.part_verdicts import PART_VERDICTS_NAME
from diffad.region_files import REGION_FILES, RegionJournal, describe_regions
from diffad.regions import can_list_regions, without_small_regions
from diffad.resizing import Resizing, fit_map, map_reach, region_at
from diffad.visualization import overlay, save_rows

__all__ = ["find_images", "predict_files", "score_files"]

SETTINGS_NAME = "settings.json"
SHEET_COLUMNS, SHEET_ROWS = 6, 4

# (network inputs, each (R, R', 3) in [0, 1]; places of the images among all) -> an output of arrays or CPU tensors
Detect: TypeAlias = Callable[[list[Any], list[int]], Any]


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
        pipeline: an anomaly pipeline, or a `Runtime`; uncalibrated, it gives no masks and no verdicts.
        paths: image files, as from `find_images`; a file of several names counts once. The outputs keep their folders
            below the common one.
        output_dir: gets `overlays/`, `maps/` (16-bit PNG: map_low at 0, map_high at 65535, both in scores.csv),
            `masks/` (0 or 255), `most_anomalous.png`, `scores.csv` (in order of `paths`, below what earlier runs have
            scored), `settings.json` and, calibrated, the defects as a list (`diffad.region_files`) and
            `calibration.json` (the scores that tell drift). Maps and masks have the size of their image, and so have
            overlays, those of more than 16 megapixels reduced. The pictures of `part.png` are named so too, those of
            `part.jpg` `part.jpg.png`; `picture` in scores.csv says how where a name is too long or another's.
        batch_size: images in one pass of the networks.
        category: of a unified model.
        seed: the noise of an image follows from this and its place in `paths`.
        num_workers: threads that decode ahead, one batch at most, and write what the batch before has shown.
        report: called with each new row of scores.csv, as a dict.

    Returns:
        Counts of "normal", "anomalous", "unreadable" and, uncalibrated, "scored" images, and of those "skipped"
        because an earlier run had done them. What could not be read or written then, and what has been replaced since,
        is done again.

    Raises:
        ValueError: `output_dir` holds results of another calibration, category or seed, or of images elsewhere, or
            files of another program's that would be replaced; or the category is unknown.
        RuntimeError: another process writes to `output_dir`.
    """
    index = pipeline.category_index(category)
    settings, threshold = detection_settings(pipeline, category, seed)
    detect = pipeline_detect(pipeline, category, batch_size, seed)
    side, at_once = decoding_of(pipeline, batch_size)
    if settings["value_range"] is None and (found := find_value_range(paths, skip_unreadable=True)) is not None:
        warn_of_found_range(found)
        settings["value_range"] = found
    resizing = resizing_of(pipeline, category)
    counts = score_files(detect, side, threshold, settings, paths, output_dir, at_once, num_workers, report, resizing)
    if pipeline.has_thresholds and not isinstance(pipeline, Runtime):
        from diffad.drift_table import save_calibration_scores

        save_calibration_scores(Path(output_dir), pipeline, index)
    return counts


def detection_settings(pipeline: Any, category: str | None, seed: int) -> tuple[dict[str, Any], float | None]:
    """What results of a pipeline must agree in to stand in one folder, and its threshold of pixels, if it has one."""
    settings: dict[str, Any] = {"category": category, "seed": seed, "calibration": None}
    settings["value_range"] = pipeline.value_range
    if not pipeline.has_thresholds:
        return settings, None
    index = pipeline.category_index(category)
    if isinstance(pipeline, Runtime):
        thresholds, smallest_area = pipeline.metadata, 0.0
    else:
        thresholds, smallest_area = pipeline.calibration, pipeline.calibration.config.smallest_area
    settings["calibration"] = [float(thresholds.image_threshold[index]), float(thresholds.pixel_threshold[index])]
    settings["smallest_area"] = smallest_area or None
    return settings, settings["calibration"][1]


def resizing_of(pipeline: Any, category: str | None) -> Resizing:
    """As the pipeline resizes images and maps of a category in a call of its own."""
    if isinstance(pipeline, Runtime):
        return WITHOUT_TORCH
    from diffad.images import WITH_TORCH, as_size

    region, cell = pipeline.region, None
    if pipeline.tile_size is not None:
        from diffad.tiling import cell_size

        cell = cell_size(pipeline.tile_size, as_size(pipeline.input_resolution))
    of_category = None if region is None else region[pipeline.category_index(category)].cpu().numpy()
    return WITH_TORCH._replace(region=of_category, cell=cell)


def pipeline_detect(pipeline: Any, category: str | None, batch_size: int, seed: int) -> Detect:
    """A pipeline as `score_files` takes it."""
    if isinstance(pipeline, Runtime):
        index = pipeline.category_index(category)
        return lambda network_inputs, places: pipeline.run(np.stack(network_inputs), index)
    from diffad.seeding import image_generator

    def detect(network_inputs: list[Any], places: list[int]) -> Any:
        return pipeline(
            network_inputs,
            batch_size=batch_size,
            match_input_resolution=False,
            generator=[image_generator(seed, place) for place in places],
            output_type="pt",
            **({"category": category} if category is not None else {}),
        )

    return detect


def score_files(
    detect: Detect,
    side: Side | None,
    threshold: float | None,
    settings: dict[str, Any],
    paths: Sequence[Path],
    output_dir: str | Path,
    batch_size: int = 16,
    num_workers: int = 2,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
    resizing: Resizing = WITHOUT_TORCH,
) -> dict[str, int]:
    """`predict_files`, of anything that detects.

    Args:
        detect: from a batch of images (R, R', 3) in [0, 1] and their places in `paths` to an output with `anomaly_map`
            (N, h, w) and `anomaly_score` (N,) and, unless `threshold` is None, `anomaly_mask`,
            `p_value` and `is_anomalous`.
        side: of the networks' images, in pixels, or height and width; None hands `detect` the images as they are.
        threshold: of a map's pixels; None gives no masks and no verdicts.
        settings: what later runs into the same folder must agree in; `value_range`, which may be None or missing, is
            that of images of more than 8 bits, and `smallest_area` that of regions, as a share of the image's.
        paths: as in `predict_files`, with all that follows.
        output_dir: as there.
        batch_size: as there.
        num_workers: as there.
        report: as there.
        resizing: of images and maps.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"`output_dir` must be a folder, but {output_dir} is a file.")
    check_output(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with locked_folder(output_dir, LOCK_NAME):
        inputs = distinct_inputs([Path(path) for path in paths])
        root = check_settings(settings, output_dir) or begin_settings(settings, common_folder(inputs), output_dir)
        done = take_up(output_dir, inputs, root)
        todo = [(i, one) for i, one in enumerate(inputs) if one.file not in done.verdicts]
        pictures = name_pictures(_places(todo, root, output_dir), done.pictures)
        counts = dict.fromkeys(VERDICTS, 0) | {"skipped": len(inputs) - len(todo)}
        for one in inputs:
            if one.file in done.verdicts:
                counts[done.verdicts[one.file]] += 1
        journal = output_dir / JOURNAL_NAME
        regions = RegionJournal(output_dir, done.verdicts)
        smallest_area = settings.get("smallest_area") or 0.0
        with open(journal, "a", **ENCODING) as file, ThreadPoolExecutor(num_workers) as pool:
            writer = csv.DictWriter(file, COLUMNS)

            def enter(rows: Iterable[dict[str, Any] | Future]) -> None:
                """Into the journals, once their files are written; an image in that of scores is in both."""
                for row in rows:
                    row = row.result() if isinstance(row, Future) else row
                    if "regions" in row:
                        place = place_below(root, Path(row["path"]))
                        name = row["path"] if place is None else place.as_posix()
                        regions.enter(row["file"], row["path"], name, row.pop("upright_size"), row.pop("regions"))
                    writer.writerow(row)
                    counts[row["verdict"]] += 1
                    report({column: row.get(column) for column in COLUMNS})
                file.flush()

            being_written: list[dict[str, Any] | Future] = []
            for batch in decoded_batches(todo, side, batch_size, pool, settings.get("value_range"), resizing):
                good = [(i, decoded) for i, _, decoded in batch if isinstance(decoded, Decoded)]
                if good:
                    output = detect([decoded.network_input for _, decoded in good], [i for i, _ in good])
                enter(being_written)
                being_written, j = [], 0
                for _, one, decoded in batch:
                    row = {"path": str(one.path), "file": one.file, "size": one.size, "modified": one.modified}
                    if isinstance(decoded, Decoded):
                        row["picture"] = pictures[one.file]
                        being_written.append(
                            pool.submit(
                                write_outputs, row, output, j, decoded, output_dir, threshold, smallest_area, resizing
                            )
                        )
                        j += 1
                    else:
                        being_written.append({**row, "verdict": "unreadable", "message": str(decoded)})
            enter(being_written)
        try:
            save_most_anomalous(journal, output_dir)
        except OSError as error:
            warnings.warn(f"{output_dir / SHEET_NAME} cannot be written: {error}", stacklevel=2)
        if threshold is not None and can_list_regions():
            regions.write_files(settings.get("category"))
        journal.replace(output_dir / SCORES_NAME)
    return counts


def save_most_anomalous(scores: Path, output_dir: Path) -> None:
    """A contact sheet of the overlays with the highest scores, from a table like scores.csv."""
    scored = (row for row in read_rows(scores) if row["score"])
    highest = heapq.nlargest(SHEET_COLUMNS * SHEET_ROWS, scored, key=lambda row: float(row["score"]))
    tiles, captions = [], []
    for row in highest:
        overlay_path = output_dir / "overlays" / row["picture"]
        if row["picture"] and overlay_path.is_file():  # an earlier run's may have been taken away
            with Image.open(overlay_path) as picture:
                picture.thumbnail((320, 320))
                tiles.append(np.asarray(picture))
            p_value = f", p = {float(row['p_value']):.2g}" if row["p_value"] else ""
            name = os.fsencode(Path(row["path"]).name).decode("utf-8", "replace")  # fonts know no halves of letters
            name = "".join(letter if letter.isprintable() else "?" for letter in name)[:80]
            captions.append(f"{name}\n{float(row['score']):.4g}{p_value}")
    if tiles:
        starts = range(0, len(tiles), SHEET_COLUMNS)
        rows = [tiles[i : i + SHEET_COLUMNS] for i in starts]
        save_rows(rows, output_dir / SHEET_NAME, captions=[captions[i : i + SHEET_COLUMNS] for i in starts])


def check_output(output_dir: Path) -> None:
    """Raises where pictures would go into links, or between or over files of another program's."""
    is_ours = any((output_dir / name).is_file() for name in (LOCK_NAME, SETTINGS_NAME, JOURNAL_NAME))
    for name in (*PICTURE_FOLDERS, SHEET_NAME, *REGION_FILES, PART_VERDICTS_NAME):
        path = output_dir / name
        if path.is_symlink():
            raise ValueError(f"{path} is a link, and nothing is written outside the output. Give another `output_dir`.")
        if not is_ours and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
            raise ValueError(
                f"{path} exists, but {output_dir} holds no results of diffad's: it would be written to. Give another "
                "`output_dir`."
            )
    check_scores(output_dir)


def check_settings(settings: dict[str, Any], output_dir: Path) -> str | None:
    """The folder that the names of an earlier run's outputs start from; None where there was none.

    Raises:
        ValueError: the earlier run's results and new ones would not fit together.
    """
    path = output_dir / SETTINGS_NAME
    if not path.is_file():
        return None
    try:
        earlier = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        root = earlier["root"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of diffad's, and would be replaced. Give another `output_dir`.") from error
    changed = [name for name in settings if settings[name] != earlier.get(name)]
    if changed:
        values = ", ".join(f"{name} {earlier.get(name)} there and {settings[name]} now" for name in changed)
        raise ValueError(
            f"{output_dir} holds results of another {' and '.join(changed)} ({values}). Give another `output_dir`, "
            "or remove that one."
        )
    return root


def begin_settings(settings: dict[str, Any], root: str, output_dir: Path) -> str:
    """Writes down what later runs must agree in, and the folder that the outputs' names start from; returns that."""
    write_text_whole(output_dir / SETTINGS_NAME, json.dumps({"root": root, **settings}, indent=2) + "\n")
    return root


def _places(todo: Sequence[tuple[int, Input]], root: str, output_dir: Path) -> list[tuple[str, Path]]:
    """Where each file lies below `root`."""
    places = []
    for _, one in todo:
        place = place_below(root, one.path)
        if place is None:
            raise ValueError(
                f"{output_dir} holds results of images in {root}, and {one.path.parent} lies elsewhere. Give another "
                "`output_dir`."
            )
        places.append((one.file, place))
    return places


def _at_size(
    image: np.ndarray,
    shown: np.ndarray,
    size: tuple[int, int],
    finish: Callable[[np.ndarray], np.ndarray],
    resizing: Resizing,
) -> np.ndarray:
    """What `finish` makes of an image (h, w) at a size (H, W), in bands of rows, as that may be large.

    `shown` is the image as the overlay has it, which mostly is that size.
    """
    if shown.shape == size:
        return finish(shown)
    height, width = size
    reach = map_reach(size, size, resizing.cell)
    rows = resizing.map(np.eye(image.shape[0], dtype=np.float32), (reach[0], image.shape[0]))  # (H, h): its weights
    wide = resizing.map(image, (image.shape[0], reach[1]))[:, :width]  # (h, W)
    inside = None if resizing.region is None else region_at(resizing.region, size)
    result, step = np.empty(size, finish(shown[:1]).dtype), max(1, BAND_PIXELS // width)
    for top in range(0, height, step):
        band = rows[top : min(top + step, height)] @ wide
        if inside is not None:
            band[~inside[top : top + step]] = 0.0
        result[top : top + step] = finish(band)
    return result


def write_outputs(
    row: dict[str, Any],
    output: Any,
    j: int,
    decoded: Decoded,
    output_dir: Path,
    threshold: float | None,
    smallest_area: float,
    resizing: Resizing,
) -> dict[str, Any]:
    """Writes one image's pictures and completes its row.

    Raises:
        OSError: the disk is full: no picture of any other could be written.
    """
    anomaly_map = np.asarray(output.anomaly_map[j])  # (h, w)
    shown = fit_map(anomaly_map, decoded.pixels.shape[:2], decoded.size, resizing)  # (h', w')
    low, high = float(shown.min()), float(shown.max())

    def to_16_bits(values: np.ndarray) -> np.ndarray:
        scaled = (values - np.float32(low)) / np.float32(max(high - low, 1e-12)) * np.float32(65535.0)
        return (scaled + np.float32(0.5)).clip(0, 65535).astype(np.uint16)

    def to_mask(values: np.ndarray) -> np.ndarray:  # as `threshold_output`
        is_above = values > np.float32(math.inf if threshold is None else threshold)
        return is_above & bool(output.is_anomalous[j])

    def mask() -> np.ndarray:
        if not bool(output.is_anomalous[j]):
            return np.zeros(decoded.size, bool)
        at_size = _at_size(anomaly_map, shown, decoded.size, to_mask, resizing)
        return without_small_regions(at_size, smallest_area)

    row |= {
        "score": f"{float(output.anomaly_score[j]):.6g}",
        "map_low": f"{low:.6g}",
        "map_high": f"{high:.6g}",
        "verdict": "scored",
    }
    if threshold is not None:
        row["p_value"] = f"{float(output.p_value[j]):.6g}"
        row["verdict"] = "anomalous" if bool(output.is_anomalous[j]) else "normal"
        if can_list_regions():
            row["upright_size"], row["regions"] = decoded.size, []

    def mask_picture() -> np.ndarray:
        found = mask()
        if row.get("regions") is not None and found.any():
            at_size = _at_size(anomaly_map, shown, decoded.size, lambda values: values, resizing)
            row["regions"] = describe_regions(at_size, found)
        return found.astype(np.uint8) * 255

    # each made when it is its turn: those of a large image are large
    pictures: dict[str, Callable[[], np.ndarray]] = {} if threshold is None else {"masks": mask_picture}
    pictures["maps"] = lambda: _at_size(anomaly_map, shown, decoded.size, to_16_bits, resizing)
    outlined = None if threshold is None else without_small_regions(to_mask(shown), smallest_area)
    pictures["overlays"] = lambda: overlay(decoded.pixels, shown, outlined, threshold)
    try:
        for folder, picture in pictures.items():
            with one_large_at_a_time(math.prod(decoded.size)):
                _save(Image.fromarray(picture()), output_dir, f"{folder}/{row['picture']}")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        row["message"] = f"Scored, but its pictures cannot be written: {error}"
    return row


def _save(image: Image.Image, output_dir: Path, name: str) -> None:
    """Writes a PNG below the output folder; its own folders are made, and none of them may be a link elsewhere."""
    *folders, _ = name.split("/")
    folder = output_dir
    for part in folders:
        folder = folder / part
        if folder.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, "a link stands in the place of a folder", str(folder))
        folder.mkdir(exist_ok=True)
    with write_whole(output_dir / name) as unfinished:
        # the default, 6, makes files a fifth smaller in three times the time: more than a small network takes for one
        image.save(unfinished, format="PNG", compress_level=2)
