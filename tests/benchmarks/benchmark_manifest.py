"""`diffad predict` over a manifest of a million lines: memory, the first score, images a second, and a killed run.

    python tests/benchmarks/benchmark_manifest.py --count 1000000

The lines name a few drawn images again and again, and the model is the tests' tiny one, so what is measured is all that
surrounds the networks. One process is killed with SIGKILL after a share of the lines (`--kill-at`), a second one goes
on. Each says how long after its imports (so with loading the model) its first row stood, what memory it had at every
ten thousandth row, and the most that it ever had.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import textures, tiny_extractor, tiny_pipeline, write_folder

from diffad import AnomalyDenoisePipeline
from diffad.commands.models import load_pipeline
from diffad.predict import predict_files
from diffad.prediction.manifest import Manifest

NUM_IMAGES, EVERY = 10, 10_000


def tiny_model(denoiser: bool) -> AnomalyDenoisePipeline:
    pipeline = tiny_pipeline() if denoiser else AnomalyDenoisePipeline(None, None, tiny_extractor(image_size=16))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.calibrate(textures(40), false_alarm_rate=0.05)


def run(args: argparse.Namespace) -> None:
    """The run itself, in a process of its own; prints a JSON line now and then."""
    memory, started, rows = psutil.Process().memory_info, time.perf_counter(), 0
    pipeline = load_pipeline(str(args.model), "cpu")

    def report(row: dict[str, Any]) -> None:
        nonlocal rows
        rows += 1
        if rows == 1 or rows % EVERY == 0:
            seconds = time.perf_counter() - started
            print(json.dumps({"rows": rows, "seconds": seconds, "mib": memory().rss / 2**20}), flush=True)

    counts = predict_files(
        pipeline, Manifest(args.manifest), args.output, args.batch_size, report=report, max_pictures=0
    )
    seconds, most = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"counts": counts, "seconds": seconds, "mib": most}), flush=True)


def watch(flags: list[str], kill_at: int | None) -> list[dict[str, Any]]:
    """What a run says; it gets SIGKILL once it has done so many rows."""
    command, told = [sys.executable, __file__, "--run", *flags], []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            told.append(json.loads(line))
            if kill_at is not None and told[-1].get("rows", 0) >= kill_at:
                process.kill()
                break
    return told


def describe(told: list[dict[str, Any]]) -> str:
    rows = [one for one in told if "rows" in one]
    rate = (rows[-1]["rows"] - 1) / max(rows[-1]["seconds"] - rows[0]["seconds"], 1e-9)
    memory = f"{rows[min(1, len(rows) - 1)]['mib']:.0f} MiB at first, {rows[-1]['mib']:.0f} MiB at last"
    return (
        f"first row after {rows[0]['seconds']:.2f} s, {rate:.0f} images/s, resident {memory}, at most "
        f"{max(one['mib'] for one in told):.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="lines (1000000)")
    parser.add_argument("--kill-at", type=int, default=500_000, help="rows after which the first run is killed")
    parser.add_argument("--batch-size", type=int, default=64, help="as of diffad predict (64)")
    parser.add_argument("--folder", type=Path, help="kept; the next call with it goes on where this one was killed")
    parser.add_argument("--denoiser", action="store_true", help="the tiny model has one")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    for name in ("--model", "--manifest", "--output"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "manifest.csv").is_file():
            write_folder(folder / "parts", NUM_IMAGES)
            tiny_model(args.denoiser).save_pretrained(folder / "model")
            with open(folder / "manifest.csv", "w") as file:
                file.write("path\n" + "".join(f"parts/{i % NUM_IMAGES:03}.png\n" for i in range(args.count)))
        flags = ["--model", str(folder / "model"), "--manifest", str(folder / "manifest.csv")]
        flags += ["--output", str(folder / "out"), "--batch-size", str(args.batch_size)]
        for kill_at in (args.kill_at, None):
            told = watch(flags, kill_at)
            rows = [one for one in told if "rows" in one]
            print(f"{rows[-1]['rows']} rows{'' if kill_at is None else ', then killed'}: {describe(told)}", flush=True)
            if args.folder and kill_at is not None and "counts" not in told[-1]:
                return
            if "counts" in told[-1]:
                break
        last = told[-1]
        print(
            f"{last['counts']}; tables and sheet {last['seconds'] - rows[-1]['seconds']:.0f} s after the last row above"
        )
        with open(folder / "out" / "scores.csv", newline="") as table, open(folder / "manifest.csv") as lines:
            next(lines)
            for row, line in zip(csv.DictReader(table), lines, strict=True):
                assert row["file"] == line.strip(), f"scores.csv has {row['file']} in the place of {line}"


if __name__ == "__main__":
    main()
