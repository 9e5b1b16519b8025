#!/usr/bin/env python
"""How fast several models, files and installed versions are, in turn in one run on the same cores.

    python tests/benchmarks/benchmark_steps.py --step "version 0.1" OLD/bin/python runs/demo_0_1 \
        --step today python runs/demo --step "one level" python runs/demo_100 --step OpenVINO python demo_100.xml

Each step has a process of its own, which loads its model and waits. In each round all are timed one after the other, so
that what else the machine does meets all alike. Whole calls are timed, on random images of one size; the median of the
rounds counts, and the ratio is that to the first step, round by round. Weights do not matter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

BATCH_SIZES = (1, 16)

# of what version 0.1 has as well
WORKER = """
import statistics, sys, time
import numpy as np
model, repeats, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if model.endswith((".onnx", ".xml")):
    from diffad.deployment import Runtime
    pipeline = Runtime(model)
else:
    from diffad import AnomalyDenoisePipeline
    pipeline = AnomalyDenoisePipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
images = np.random.default_rng(0).random((16, side, side, 3), dtype=np.float32)
print("ready", flush=True)
for line in sys.stdin:
    count, seconds = int(line), []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        pipeline(images[:count], batch_size=count)
        seconds.append(time.perf_counter() - started)
    print(statistics.median(seconds[1:]) / count, flush=True)
"""


class Step:
    """A process with a model in it."""

    def __init__(self, python: str, model: str, repeats: int, image_size: int, folder: str):
        command = [python, "-c", WORKER, model, str(repeats), str(image_size)]
        # `folder` has no diffad: the installed one is meant
        self.process = subprocess.Popen(
            command, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.answer()

    def answer(self) -> str:
        """The next line; a ValueError where the process has ended."""
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise ValueError(f"`--step`: {self.process.args[0]} cannot run {self.process.args[3]}.")
        return line.strip()

    def seconds(self, count: int) -> float:
        """An image, in a batch of `count`: the median of the calls after a first one."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return float(self.answer())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--step",
        nargs=3,
        action="append",
        required=True,
        metavar=("NAME", "PYTHON", "MODEL"),
        help="a model's folder or file and the Python that has the diffad to run it",
    )
    parser.add_argument("--image_size", type=int, default=224, help="side of the images (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of a step in a round (%(default)s)")
    args = parser.parse_args(argv)

    with TemporaryDirectory() as folder:
        steps = {
            name: Step(python, os.path.abspath(model), args.repeats, args.image_size, folder)
            for name, python, model in args.step
        }
        seconds: dict[int, dict[str, list[float]]] = {n: {name: [] for name in steps} for n in BATCH_SIZES}
        for _ in range(args.rounds):
            for count in BATCH_SIZES:
                for name, step in steps.items():
                    seconds[count][name].append(step.seconds(count))
        for step in steps.values():
            step.process.communicate()  # end of its input

    first = next(iter(steps))
    results = {
        name: {
            f"batch {count}": {
                "milliseconds_per_image": round(1000.0 * statistics.median(of_step[name]), 2),
                "images_per_second": round(1.0 / statistics.median(of_step[name]), 1),
                "times_the_first": round(
                    statistics.median(a / b for a, b in zip(of_step[first], of_step[name], strict=True)), 2
                ),
            }
            for count, of_step in seconds.items()
        }
        for name in steps
    }
    print(json.dumps(results, indent=2))
    return results


if __name__ == "__main__":
    main()
