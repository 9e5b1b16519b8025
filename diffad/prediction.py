"""Runs a pipeline over image files of any number, in constant memory, and writes what it finds.

Every file is written under another name and renamed, and `scores.csv` appears only when every input is accounted for:
a killed run leaves no half-written file, and the next one goes on where it stopped.
"""

from __future__ import annotations

import csv
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffad.images import images_to_tensors, read_image, resize_images
from diffad.visualization import overlay, to_uint8

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
COLUMNS = ("path", "score", "p_value", "verdict", "map_low", "map_high", "message")


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Image files among `paths` and below the folders in it, in order, each once.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: there are no images.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = (p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            found.update(dict.fromkeys(p for p in inside if not p.name.startswith(".")))
        elif path.is_file():
            found[path] = None
        else:
            raise FileNotFoundError(f"There is no file or folder at {path}.")
    if not found:
        raise ValueError(f"There are no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {', '.join(map(str, paths))}.")
    return list(found)


def image_generator(seed: int, index: int) -> torch.Generator:
    """Randomness of one image, from the run's seed and the image's place among the others.

    Mixed, because torch's generator on the CPU takes no more than the lowest 32 bits of a seed.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, index]).generate_state(1)[0]))


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
    """Scores image files and writes overlays, maps, masks and `scores.csv`.

    Args:
        pipeline: an anomaly pipeline; uncalibrated, it gives no masks and no verdicts.
        paths: image files, as from `find_images`. The outputs keep their folders below the common one.
        output_dir: gets `overlays/`, `maps/` (16-bit PNG: map_low at 0, map_high at 65535, both in scores.csv),
            `masks/` (0 or 255) and `scores.csv`.
        batch_size: images in one pass of the networks.
        category: of a unified model.
        seed: the noise of an image follows from this and its place in `paths`.
        num_workers: threads that decode ahead, two batches at most.
        report: called with each row of scores.csv, as a dict.

    Returns:
        Counts of "normal", "anomalous", "unreadable" and, uncalibrated, "scored" images, and of those "skipped"
        because an earlier run had done them.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    root = Path(os.path.commonpath([p.absolute().parent for p in paths]))
    journal = output_dir / "scores.partial.csv"
    rows = {row["path"]: row for name in ("scores.csv", journal.name) for row in _read_rows(output_dir / name)}
    todo = [(i, path) for i, path in enumerate(paths) if str(path) not in rows]
    counts = {"normal": 0, "anomalous": 0, "unreadable": 0, "scored": 0, "skipped": len(paths) - len(todo)}
    for path in paths:
        if str(path) in rows:
            counts[rows[str(path)]["verdict"]] += 1
    _write_rows(journal, rows.values())  # without a line that a killed run left unfinished
    threshold = None if pipeline.calibration is None else float(pipeline.calibration.pixel_threshold.min())
    with open(journal, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        for batch in _decoded_batches(todo, batch_size, num_workers):
            batch_rows = [
                {"path": str(path), "verdict": "unreadable", "message": str(image)}
                for _, path, image in batch
                if isinstance(image, Exception)
            ]
            good = [entry for entry in batch if not isinstance(entry[2], Exception)]
            if good:
                images = [image for _, _, image in good]
                output = pipeline(
                    images,
                    batch_size=batch_size,
                    match_input_resolution=False,
                    generator=[image_generator(seed, i) for i, _, _ in good],
                    output_type="pt",
                    **({"category": category} if category is not None else {}),
                )
                for j, (_, path, image) in enumerate(good):
                    name = path.absolute().relative_to(root).with_suffix(".png")
                    batch_rows.append(
                        {"path": str(path), **_write_outputs(output, j, image, output_dir, name, threshold)}
                    )
            for row in batch_rows:
                writer.writerow(row)
                counts[row["verdict"]] += 1
                report({column: row.get(column) for column in COLUMNS})
                rows[row["path"]] = row
            file.flush()
    wanted = dict.fromkeys(map(str, paths))
    ordered = [rows[path] for path in wanted] + [row for path, row in rows.items() if path not in wanted]
    _write_rows(output_dir / "scores.csv", ordered)
    journal.unlink()
    return counts


def _decoded_batches(
    todo: Sequence[tuple[int, Path]], batch_size: int, num_workers: int
) -> Iterator[list[tuple[int, Path, torch.Tensor | Exception]]]:
    """Decoded images (3, H, W) in [0, 1], or the error of reading them, at most two batches ahead."""

    def decode(path: Path) -> torch.Tensor | Exception:
        try:
            return images_to_tensors(read_image(path))[0]
        except (ValueError, OSError) as error:
            return error

    with ThreadPoolExecutor(num_workers) as pool:
        waiting: deque[tuple[int, Path, Future]] = deque()
        batch: list[tuple[int, Path, torch.Tensor | Exception]] = []
        entries = iter(todo)
        while True:
            for i, path in entries:
                waiting.append((i, path, pool.submit(decode, path)))
                if len(waiting) >= 2 * batch_size:
                    break
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
    output: Any, j: int, image: torch.Tensor, output_dir: Path, name: Path, threshold: float | None
) -> dict[str, Any]:
    """Writes one image's pictures and returns its row."""
    size = tuple(image.shape[-2:])
    anomaly_map = resize_images(output.anomaly_map[j][None, None], size)[0, 0].numpy()  # (H, W)
    low, high = float(anomaly_map.min()), float(anomaly_map.max())
    scaled = (anomaly_map - low) / max(high - low, 1e-12) * 65535.0
    row = {"score": f"{float(output.anomaly_score[j]):.6g}", "map_low": f"{low:.6g}", "map_high": f"{high:.6g}"}
    _save(Image.fromarray((scaled + 0.5).astype(np.uint16)), output_dir / "maps" / name)
    mask, ends = None, {}
    if threshold is not None:
        mask = resize_images(output.anomaly_mask[j][None, None].float(), size)[0, 0].numpy() > 0.5
        _save(Image.fromarray(mask.astype(np.uint8) * 255), output_dir / "masks" / name)
        # one scale for all images: nothing is coloured on a good one
        ends = {"low": threshold / 3.0, "high": 3.0 * threshold} if threshold > 0.0 else {}
        row["p_value"] = f"{float(output.p_value[j]):.6g}"
        row["verdict"] = "anomalous" if bool(output.is_anomalous[j]) else "normal"
    else:
        row["verdict"] = "scored"
    picture = overlay(to_uint8(image.permute(1, 2, 0).numpy()), anomaly_map, mask, **ends)
    _save(Image.fromarray(picture), output_dir / "overlays" / name)
    return row


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    image.save(unfinished, format="PNG")
    unfinished.replace(path)


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row.values()]  # a killed run may have left half a line


def _write_rows(path: Path, rows: Any) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    with open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)
