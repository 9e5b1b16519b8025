#!/usr/bin/env python
"""anomalib's PaDiM and PatchCore exported to OpenVINO beside diffad's exported models: images a second, and accuracy.

    pip install anomalib openvino onnx onnxscript
    diffad fit DATA --output runs/parts && diffad export runs/parts parts.xml
    python tests/benchmarks/benchmark_anomalib.py --data DATA --files parts.xml

Backbone, weights, image size and good images are those of `evaluate_anomalib.py`, which says how both are fitted.
anomalib writes its files itself (`to_openvino`), in float32 and for one image; its pre-processor, here the
normalisation alone, is inside, and its post-processor, which scales scores, is left out. All files take pixels at the
networks' size, one image at a time, on the same cores in the same run, in float32. They are timed in turn, `--rounds`
times, and the median call counts. Accuracy is that of the exported files on the test split, by diffad's metrics.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino
import torch
from accelerate import Accelerator
from anomalib.models import Padim, Patchcore
from anomalib.pre_processing import PreProcessor
from evaluate_anomalib import STRIDES, TITLES, fit_model
from torchvision.transforms.v2 import Normalize

from diffad import AnomalyOutput, TimmFeatureExtractor
from diffad.cores import available_cores
from diffad.data import load_anomaly_dataset
from diffad.deployment import Runtime
from diffad.evaluation.baselines import load_training_images
from diffad.evaluation.detectors import call_for, evaluate_detectors
from diffad.evaluation.report import describe_machine
from diffad.images import images_to_tensors, resize_images

SHOWN = ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_pro")
Call = Callable[[np.ndarray], Any]  # of one image (1, S, S, 3) in [0, 1]


def export_model(name: str, model: torch.nn.Module, extractor: TimmFeatureExtractor, size: int, folder: Path) -> Path:
    """A fitted model of anomalib as its own export writes it, from pixels (1, 3, S, S) in [0, 1]."""
    normalize = Normalize(extractor.image_mean.flatten().tolist(), extractor.image_std.flatten().tolist())
    options: dict[str, Any] = {
        "backbone": extractor.config.backbone,
        "layers": list(extractor.network.feature_info.out_indices),
        "pre_trained": False,
        "pre_processor": PreProcessor(normalize),
        **dict.fromkeys(("post_processor", "evaluator", "visualizer"), False),
    }
    module = Padim(**options, n_features=model.n_features) if name == "padim" else Patchcore(**options)
    module.model = model
    one_image = {"dynamic_shapes": None}  # of any number, some models come out with the two that they are traced with
    return module.to_openvino(folder, model_file_name=name, input_size=(size, size), onnx_kwargs=one_image)


def compiled(path: Path) -> Any:
    """A file at work in OpenVINO, as `Runtime` sets it: in float32, on all cores of this process."""
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(available_cores())}
    return openvino.Core().compile_model(path, "CPU", options)


def milliseconds(calls: dict[str, Call], size: int, rounds: int, repeats: int = 5) -> dict[str, float]:
    """The median call of each, on random images; all of them in turn, in each round."""
    images = np.random.default_rng(0).random((repeats, 1, size, size, 3), dtype=np.float32)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call(images[0])  # what the others left in the caches is no part of it
            for image in images:
                started = time.perf_counter()
                call(image)
                times[name].append(time.perf_counter() - started)
    return {name: 1000.0 * statistics.median(seconds) for name, seconds in times.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data set of one category, with a test split")
    parser.add_argument("--files", nargs="+", default=[], help="models that `diffad export` wrote, .xml or .onnx")
    parser.add_argument("--models", nargs="+", choices=TITLES, default=list(TITLES), help="(padim patchcore)")
    parser.add_argument("--n_features", type=int, default=100, help="random channels of PaDiM (%(default)s)")
    parser.add_argument("--coreset_ratio", type=float, default=0.01, help="of PatchCore's patches (%(default)s)")
    parser.add_argument("--image_size", type=int, default=224, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="in which all files are timed in turn (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of channels and coreset (%(default)s)")
    args = parser.parse_args(argv)
    args.batch_size, args.fast_coreset, args.tile, args.tile_stride = 16, True, None, None

    accelerator = Accelerator(cpu=True, mixed_precision="no")
    test = load_anomaly_dataset(args.data, split="test")
    good = load_training_images(args.data, None, None, test, accelerator)
    if good is None or len(set(test["category"])) != 1:
        parser.error("--data: give a data set of one category that has good training images")
    category, size = test[0]["category"], args.image_size

    calls: dict[str, Call] = {}
    detectors: dict[str, Callable[[list[Any], list[int]], list[AnomalyOutput]]] = {}
    with TemporaryDirectory() as folder:
        for name in args.models:
            model, extractor, _ = fit_model(name, good, accelerator.device, args)
            graph = compiled(export_model(name, model, extractor, size, Path(folder)))

            def detect(pictures: list[Any], indices: list[int], graph: Any = graph) -> list[AnomalyOutput]:
                images = [resize_images(one[None], (size, size)).numpy() for one in images_to_tensors(pictures)]
                outputs = [graph(image) for image in images]
                maps = [torch.from_numpy(np.array(one["anomaly_map"])).reshape(1, size, size) for one in outputs]
                scores = [torch.from_numpy(np.array(one["pred_score"])).reshape(1) for one in outputs]
                return [AnomalyOutput(anomaly_map=torch.cat(maps), anomaly_score=torch.cat(scores))]

            title = f"{TITLES[name]}, anomalib"
            detectors[title] = detect
            calls[title] = lambda image, graph=graph: graph(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
    for file in args.files:
        runtime = Runtime(file)
        detectors[file] = lambda pictures, indices, runtime=runtime: [call_for(runtime, pictures, category)]
        calls[file] = runtime.run

    results: dict[str, dict[str, Any]] = {}
    for title, milliseconds_of_one in milliseconds(calls, size, args.rounds).items():
        found = evaluate_detectors(detectors[title], 1, test, title, accelerator, 256, 0.3, args.batch_size)[0].result
        results[title] = {
            "images_per_second": round(1000.0 / milliseconds_of_one, 1),
            "milliseconds": round(milliseconds_of_one, 2),
            **{name: found[name] for name in SHOWN},
        }
    report = {
        "data": category,
        "strides": {name: STRIDES[name] for name in args.models},
        "cores": available_cores(),
        "machine": describe_machine(),
        "results": results,
    }
    print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    main()
