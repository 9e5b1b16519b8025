"""Time and memory of `AnomalyMetrics`: `python tests/benchmarks/benchmark_metrics.py`.

Every measurement runs in a process of its own, so that the peak memory is its own too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

SIZE = 256
NUM_MAPS = 83  # the test split of MVTec-AD's bottle


def make_maps(first: int, num_maps: int):
    """Maps (n, 256, 256) float32 of noise, three in four with a brighter square, and their masks."""
    import numpy as np

    rng = np.random.default_rng(first)
    maps = rng.standard_normal((num_maps, SIZE, SIZE), dtype=np.float32)
    masks = np.zeros(maps.shape, bool)
    for i in range(num_maps):
        if (first + i) % 4:
            top, left, height, width = rng.integers(16, 96, 4)
            masks[i, top : top + height, left : left + width] = True
    maps[masks] += 1.0
    return maps, masks


def measure_time(batch_size: int, repeats: int = 7) -> None:
    import time

    from diffad.metrics import AnomalyMetrics

    maps, masks = make_maps(0, NUM_MAPS)
    scores, labels = maps.max(axis=(1, 2)), masks.any(axis=(1, 2))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        metrics = AnomalyMetrics()
        for i in range(0, NUM_MAPS, batch_size):
            part = slice(i, i + batch_size)
            metrics.update(anomaly_map=maps[part], mask=masks[part], anomaly_score=scores[part], label=labels[part])
        metrics.compute()
        times.append(time.perf_counter() - start)
    times.sort()
    print(
        f"{NUM_MAPS} maps of {SIZE} x {SIZE}, {batch_size} an update: "
        f"median {times[repeats // 2]:.3f} s, best {times[0]:.3f} s"
    )


def measure_memory(num_maps: int) -> None:
    import resource

    from diffad.metrics import AnomalyMetrics

    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB on Linux

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    make_maps(0, 1)
    before = peak()
    metrics = AnomalyMetrics()
    for i in range(num_maps):  # made one by one: only the metric could accumulate
        maps, masks = make_maps(i, 1)
        metrics.update(anomaly_map=maps, mask=masks, anomaly_score=maps.max(axis=(1, 2)), label=masks.any(axis=(1, 2)))
    metrics.compute()
    print(f"{num_maps} maps: peak {peak():.0f} MiB, {peak() - before:.0f} MiB of it the metric's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, help="only time, with this many maps an update")
    parser.add_argument("--num-maps", type=int, help="only the peak memory of this many maps")
    args = parser.parse_args()
    if args.batch_size:
        measure_time(args.batch_size)
    elif args.num_maps:
        measure_memory(args.num_maps)
    else:
        for arguments in (
            ["--batch-size", "1"],
            ["--batch-size", str(NUM_MAPS)],
            ["--num-maps", str(NUM_MAPS)],
            ["--num-maps", "100"],
            ["--num-maps", "2000"],
        ):
            subprocess.run([sys.executable, __file__, *arguments], check=True)


if __name__ == "__main__":
    main()
