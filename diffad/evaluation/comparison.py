"""How fast a model is in each runtime, and how near that is to what the machine's arithmetic allows."""

from __future__ import annotations

import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import diffad
from diffad.cores import available_cores
from diffad.deployment.export import WEIGHTS, check_graph, describe, traced_onnx, write_graph
from diffad.deployment.graph import InspectionGraph
from diffad.deployment.quantization import quantize_networks
from diffad.deployment.runtime import Runtime
from diffad.image_sizes import as_size

BATCH_SIZES = (1, 16)
NOT_HERE = "not here"
NUM_CALIBRATION_IMAGES = 8  # for 8 bits, whose speed does not depend on them

# name, file, device and precision of `Runtime`
RUNTIMES = (
    ("ONNX Runtime", "model.onnx", "cpu", "float32"),
    ("ONNX Runtime, CUDA", "model.onnx", "cuda", "float32"),
    ("ONNX Runtime, TensorRT", "model.onnx", "tensorrt", "float32"),
    ("OpenVINO", "model.xml", "cpu", "float32"),
    ("OpenVINO, bf16", "model.xml", "cpu", "bfloat16"),
    ("OpenVINO, int8", "int8.xml", "cpu", "float32"),
    ("ONNX Runtime, int8", "int8.onnx", "cpu", "float32"),
)


def compare_runtimes(pipeline: Any, repeats: int = 5) -> dict[str, Any]:
    """Times a pipeline on the CPU, in torch, compiled, and exported, on random images of the networks' size.

    Args:
        pipeline: as of `export_pipeline`.
        repeats: timed calls, after one that warms up; the median counts.

    Returns:
        `gflop_per_image` (of convolutions and products), `peak_gflops` (of a product of two float32 matrices here),
        `cores`, and `runtimes`: by name, `{batch size: {"milliseconds_per_image", "images_per_second",
        "share_of_peak"}}`, or why there is nothing: "not here: ...".
    """
    check_graph(pipeline)
    size = as_size(pipeline.input_resolution)
    images = np.random.default_rng(0).random((max(BATCH_SIZES), *size, 3), dtype=np.float32)
    category = {"category": 0} if len(pipeline.categories) > 1 else {}
    graph = InspectionGraph(pipeline)
    with torch.no_grad():
        graph(torch.from_numpy(images[:1]))  # once, so that what is made once is made
        with FlopCounterMode(display=False) as counter:
            graph(torch.from_numpy(images[:1]))
    gflop, peak = counter.get_total_flops() / 1e9, peak_gflops()

    def measure(call: Callable[[np.ndarray], Any]) -> dict[int, dict[str, float]]:
        speeds = {count: measure_speed(call, images[:count], repeats) for count in BATCH_SIZES}
        return {n: {**speed, "share_of_peak": speed["images_per_second"] * gflop / peak} for n, speed in speeds.items()}

    traced = cache(lambda: traced_onnx(graph))
    good = [one[None] for one in images[:NUM_CALIBRATION_IMAGES]]
    in_8_bits = cache(lambda: quantize_networks(traced(), good, WEIGHTS))  # as fast as one that is calibrated for it

    results: dict[str, Any] = {}
    results["torch"] = measure(lambda pixels: pipeline(pixels, batch_size=len(pixels), **category))
    compiled = torch.compile(graph, fullgraph=True, dynamic=False)
    results["torch, compiled"] = _or_why_not(lambda: measure(lambda pixels: compiled(torch.from_numpy(pixels))))
    with TemporaryDirectory() as folder:
        for name, file, device, precision in RUNTIMES:

            def in_runtime(path: Path, device: str, precision: str) -> dict[int, dict[str, float]]:
                if precision == "bfloat16" and not _openvino_has("BF16"):
                    raise ValueError("this processor has no bfloat16")
                if path.stem == "int8" and isinstance(pipeline, diffad.DiADPipeline):
                    raise ValueError("DiAD has no graph in 8 bits")
                if not path.is_file():
                    metadata = describe(pipeline, "fp32")._replace(calibrated_in=None)  # nobody takes its verdicts
                    write_graph((in_8_bits if path.stem == "int8" else traced)(), metadata, path)
                return measure(Runtime(path, device, precision).run)

            results[name] = _or_why_not(lambda: in_runtime(Path(folder) / file, device, precision))  # noqa: B023
    return {"gflop_per_image": gflop, "peak_gflops": peak, "cores": available_cores(), "runtimes": results}


def peak_gflops() -> float:
    """What a product of two float32 matrices reaches in torch, with its threads, in GFLOP/s."""
    side = 2048
    left, right = torch.rand(side, side), torch.rand(side, side)
    seconds = []
    for _ in range(6):  # of which the first warms up
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return 2.0 * side**3 / min(seconds) / 1e9


def measure_speed(call: Callable[[np.ndarray], Any], images: np.ndarray, repeats: int) -> dict[str, float]:
    """The median of `repeats` calls with all images, after one that warms up."""
    seconds = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            started = time.perf_counter()
            call(images)
            seconds.append(time.perf_counter() - started)
    per_image = statistics.median(seconds[1:]) / len(images)
    return {"milliseconds_per_image": 1000.0 * per_image, "images_per_second": 1.0 / per_image}


def _or_why_not(measure: Callable[[], dict[int, dict[str, float]]]) -> dict[int, dict[str, float]] | str:
    """What is measured, or why this machine lacks it, in a line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return measure()
        except Exception as error:  # of runtimes, whose classes have no common base
            return f"{NOT_HERE}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"


def _openvino_has(capability: str) -> bool:
    openvino = importlib.import_module("openvino")
    return capability in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def comparison_text(result: dict[str, Any]) -> str:
    """The result as a table."""
    of_sizes = "".join(f"{f'batch {size}: ms':>15}{'images/s':>10}{'of peak':>9}" for size in BATCH_SIZES)
    lines = [f"{'':<24}{of_sizes}"]
    for name, speeds in result["runtimes"].items():
        if isinstance(speeds, str):
            lines.append(f"{name:<24}  {speeds}")
            continue
        cells = [
            f"{one['milliseconds_per_image']:>15.1f}{one['images_per_second']:>10.1f}{one['share_of_peak']:>9.0%}"
            for one in speeds.values()
        ]
        lines.append(f"{name:<24}{''.join(cells)}")
    lines.append(
        f"{result['gflop_per_image']:.2f} GFLOP an image; a product of matrices reaches {result['peak_gflops']:.0f} "
        f"GFLOP/s on {result['cores']} cores."
    )
    return "\n".join(lines)
