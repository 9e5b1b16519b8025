#!/usr/bin/env python
"""How long a new process takes to the first result of an exported file, and how much disk its packages take.

    python tests/benchmarks/benchmark_runtime.py parts.onnx parts.xml --image part.png

Each file is tried `--repeats` times, from starting Python to the verdict on one image; the median and the slowest
count. The packages are those that an environment without torch needs, with what they need in turn.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

FIRST = "import sys; from diffad.deployment import Runtime; print(Runtime(sys.argv[1])(sys.argv[2]).anomaly_score[0])"
PACKAGES = ("numpy", "pillow", "typer", "rich")
RUNTIMES = {".onnx": "onnxruntime", ".xml": "openvino"}


def needed(names: Sequence[str]) -> set[str]:
    """Installed distributions that `names` need, these among them; extras aside."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop().lower())
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            waiting += [re.split(r"[^\w.-]", one, maxsplit=1)[0] for one in requirements if "extra ==" not in one]
    return found


def megabytes(names: set[str]) -> float:
    """On disk, bytecode aside."""
    paths = {Path(file.locate()) for name in names for file in distribution(name).files or []}
    return sum(path.stat().st_size for path in paths if path.is_file() and path.suffix != ".pyc") / 1e6


def first_result(file: str, image: str) -> float:
    """Seconds from starting Python to the score of one image."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", FIRST, file, image], check=True, capture_output=True)
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="exported models")
    parser.add_argument("--image", required=True, help="to look at")
    parser.add_argument("--repeats", type=int, default=5, help="new processes for each (5)")
    args = parser.parse_args(argv)
    results = {}
    for file in args.files:
        seconds = [first_result(file, args.image) for _ in range(args.repeats)]
        packages = needed([*PACKAGES, RUNTIMES[Path(file).suffix]])
        results[file] = {
            "median_seconds": round(statistics.median(seconds), 2),
            "slowest_seconds": round(max(seconds), 2),
            "packages": sorted(packages),
            "megabytes": round(megabytes(packages)),
        }
    print(json.dumps(results, indent=2))
    return results


if __name__ == "__main__":
    main()
