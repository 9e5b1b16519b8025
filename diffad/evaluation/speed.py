"""How fast a pipeline is, where its time goes, and how much memory it takes."""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch

from diffad.deployment.runtime import Runtime
from diffad.images import as_size


def benchmark_pipeline(pipeline: Any, batch_size: int = 16, repeats: int = 5) -> dict[str, Any]:
    """Times whole calls on random images at the pipeline's own resolution.

    Args:
        pipeline: an anomaly pipeline, on its device and in its dtype, or a `Runtime`, whose graph is one part.
        batch_size: images in a call.
        repeats: timed calls, after one that warms up.

    Returns:
        `milliseconds_per_image` (median), `images_per_second`, `milliseconds_by_part` (of each network, and of the
        rest), `peak_memory_mib` (of the process, or of the GPU's allocations).
    """
    device = torch.device("cpu") if isinstance(pipeline, Runtime) else pipeline._execution_device
    size = as_size(pipeline.input_resolution)
    images = np.random.default_rng(0).random((batch_size, *size, 3), dtype=np.float32)
    category = {"category": 0} if len(pipeline.categories) > 1 else {}
    spent: defaultdict[str, float] = defaultdict(float)
    begun: dict[str, float] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def begin(name: str) -> Any:
        return lambda module, args: begun.__setitem__(name, now())

    def end(name: str) -> Any:
        return lambda module, args, output: spent.__setitem__(name, spent[name] + now() - begun[name])

    components = {} if isinstance(pipeline, Runtime) else pipeline.components
    networks = {n: m for n, m in components.items() if isinstance(m, torch.nn.Module) and "calibration" not in n}
    if "feature_extractor" in networks:  # which a pipeline asks for its layers
        pipeline(images[:1], batch_size=1, **category)
        networks["feature_extractor"] = pipeline.feature_extractor.running_network()
    hooks = [m.register_forward_pre_hook(begin(n)) for n, m in networks.items()]
    hooks += [m.register_forward_hook(end(n)) for n, m in networks.items()]
    times = []
    try:
        for repeat in range(repeats + 1):
            if repeat == 1:
                spent.clear()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
            started = now()
            pipeline(images, batch_size=batch_size, **category)
            if repeat:
                times.append(now() - started)
    finally:
        for hook in hooks:
            hook.remove()
    total, images_timed = sum(times), repeats * batch_size
    by_part = {name: 1000.0 * seconds / images_timed for name, seconds in spent.items()}
    by_part["rest"] = 1000.0 * (total - sum(spent.values())) / images_timed
    per_image = 1000.0 * statistics.median(times) / batch_size
    return {
        "milliseconds_per_image": round(per_image, 2),
        "images_per_second": round(1000.0 / per_image, 1),
        "milliseconds_by_part": {name: round(value, 2) for name, value in by_part.items()},
        "peak_memory_mib": round(_peak_memory(device) / 2**20),
        "batch_size": batch_size,
        "resolution": pipeline.processing_resolution,
    }


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil  # accelerate's own

        return psutil.Process().memory_info().peak_wset

    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
