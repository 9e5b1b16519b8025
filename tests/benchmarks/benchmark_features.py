#!/usr/bin/env python
"""A backbone as timm builds it beside its fastest form (`inference_network`): milliseconds an image, turn by turn.

python tests/benchmarks/benchmark_features.py tf_efficientnet_lite0 resnet18
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from diffad import TimmFeatureExtractor

REPEATS = 8


def milliseconds(run: Callable[[], Any], count: int) -> float:
    started = time.perf_counter()
    run()
    return 1000.0 * (time.perf_counter() - started) / count


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("backbones", nargs="+", help="timm's names of them; their weights are random")
    parser.add_argument("--batch_size", type=int, default=16, help="images a pass (16)")
    parser.add_argument("--image_size", type=int, default=224, help="pixels (224)")
    args = parser.parse_args(argv)
    images = torch.rand(args.batch_size, 3, args.image_size, args.image_size)
    images = images.contiguous(memory_format=torch.channels_last)
    for name in args.backbones:
        extractor = TimmFeatureExtractor(name, (4, 8, 16))
        networks = {"timm": extractor.network, "fastest": extractor.running_network(images)}
        times: dict[str, list[float]] = {kind: [] for kind in networks}
        for _ in range(1 + REPEATS):
            for kind, network in networks.items():
                times[kind].append(milliseconds(lambda network=network: network(images), args.batch_size))
        best = {kind: min(values[1:]) for kind, values in times.items()}
        print(f"{name}: {best['timm']:.1f} ms, {best['fastest']:.1f} ms, {best['timm'] / best['fastest']:.2f} times")


if __name__ == "__main__":
    main()
