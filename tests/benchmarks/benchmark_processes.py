"""`accelerate launch -m diffad.predict` with 1, 2 and 4 processes: the same tables to the bit, and how much faster.

    python tests/benchmarks/benchmark_processes.py runs/parts --count 997 --batch-size 16

Images are drawn, `--size` pixels a side. All runs have one thread a process, so that no sum is split otherwise.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import write_folder
from launching import launch_command

TABLES = ("scores.csv", "regions.csv", "regions.json", "regions.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a pipeline")
    parser.add_argument("--count", type=int, default=997, help="images (997)")
    parser.add_argument("--size", type=int, default=256, help="pixels a side (256)")
    parser.add_argument("--batch-size", type=int, default=16, help="as of diffad predict (16)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="(1 2 4)")
    parser.add_argument("--max-pictures", type=int, default=0, help="as of diffad predict (0: scores alone)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        parts = write_folder(Path(name, "parts"), args.count, args.size)
        expected = None
        for processes in args.processes:
            output = Path(name, str(processes))
            flags = [args.model, parts, "--output", output, "--batch-size", args.batch_size]
            flags += ["--max-pictures", args.max_pictures]
            started = time.perf_counter()
            command = launch_command("diffad.predict", *flags, processes=processes)
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            seconds = time.perf_counter() - started
            if done.returncode:
                sys.exit(done.stdout)
            tables = {table: (output / table).read_bytes() for table in TABLES if (output / table).is_file()}
            expected = expected or tables
            same = "the first tables to the bit" if tables == expected else "OTHER TABLES"
            told = re.search(r"[\d.]+ images/s in each process.*? of the time", " ".join(done.stdout.split()))
            print(f"{processes} processes: {seconds:.1f} s with the start, {same}; {told[0] if told else ''}")


if __name__ == "__main__":
    main()
