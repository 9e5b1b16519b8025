"""`diffad predict` over many images: speed, memory, and what a killed run leaves.

    python tests/benchmarks/benchmark_predict.py runs/demo --count 1000

The images are ELPV's solar cells (`pip install -e ".[demo]"`). One run goes through and has its resident memory looked
at after every image. Another is killed with SIGKILL half-way and started again.
"""

from __future__ import annotations

import argparse
import csv
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from elpv_dataset.utils import load_dataset
from PIL import Image


def write_cells(folder: Path, count: int) -> list[str]:
    """`count` cells as PNG files, from the first again when all are there; their paths."""
    cells = load_dataset()[0]  # (2624, 300, 300) uint8
    folder.mkdir()
    paths = [folder / f"cell{i:05}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(cells[i % len(cells)]).save(path)
    return [str(path) for path in paths]


def predict(arguments: list[str], stop_after: int | None = None) -> tuple[list[float], list[float]]:
    """Runs the command. For each image that it reports: seconds since the start, and the process's memory in MiB.

    After `stop_after` images it gets SIGKILL.
    """
    command = [sys.executable, "-m", "diffad.cli", "predict", *arguments, "--json"]
    times, memory = [], []
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        resident = psutil.Process(process.pid).memory_info
        for line in process.stdout:
            json.loads(line)
            times.append(time.perf_counter() - started)
            memory.append(resident().rss / 2**20)
            if len(times) == stop_after:
                process.send_signal(signal.SIGKILL)
                break
        complaint = process.stderr.read()
    if stop_after is None and process.returncode:
        sys.exit(complaint)
    return times, memory


def scores(folder: Path) -> dict[str, float]:
    with open(folder / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {row["path"]: float(row["score"]) for row in rows}
    assert len(found) == len(rows), "an input stands twice in scores.csv"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a pipeline")
    parser.add_argument("--count", type=int, default=1000, help="images (1000)")
    parser.add_argument("--dtype", default="float32", help="as of diffad predict (float32)")
    parser.add_argument("--batch-size", type=int, default=16, help="as of diffad predict (16)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_cells(Path(folder, "cells"), args.count)
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        flags = [args.model, str(Path(folder, "cells")), "--dtype", args.dtype, "--batch-size", str(args.batch_size)]

        times, memory = predict([*flags, "--output", str(whole)])
        window = min(200, args.count // 3)
        early, late = memory[:window], memory[-window:]
        print(
            f"{len(times)} images of 300 x 300 px, {args.dtype}, {args.batch_size} a batch: "
            f"{(len(times) - args.batch_size) / (times[-1] - times[args.batch_size - 1]):.1f} images/s after the first "
            f"batch, which took {times[0]:.1f} s with the start\n"
            f"resident memory: median {statistics.median(early):.0f} MiB over the first {window} images (at most "
            f"{max(early):.0f}), {statistics.median(late):.0f} MiB over the last {window} (at most {max(late):.0f})"
        )

        done, _ = predict([*flags, "--output", str(killed)], stop_after=args.count // 2)
        left = sum(1 for path in killed.rglob("*") if "unfinished" in path.name)
        again, _ = predict([*flags, "--output", str(killed)])
        unfinished = [path for path in killed.rglob("*") if "unfinished" in path.name or "partial" in path.name]
        found, expected = scores(killed), scores(whole)
        assert sorted(found) == sorted(expected) == sorted(paths), "scores.csv does not hold every input"
        assert not unfinished, f"unfinished files remain: {unfinished}"
        for kind in ("overlays", "maps", "masks"):
            names = {path.stem for path in (killed / kind).iterdir()} if (killed / kind).exists() else None
            assert names is None or names == {Path(path).stem for path in paths}, f"{kind} are not all there"
        difference = max(abs(found[path] - expected[path]) / abs(expected[path]) for path in paths)
        print(
            f"killed after {len(done)} images, with {left} unfinished files; the second run did {len(again)} more. No "
            "unfinished file remains, and every input stands in scores.csv once; relative to the run that was not "
            f"killed, no score differs by more than {difference:.1e}"
        )


if __name__ == "__main__":
    main()
