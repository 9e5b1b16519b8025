"""A pipeline as one graph, from pixels to verdicts, for runtimes other than torch."""

from __future__ import annotations

import copy
import hashlib
import importlib
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import diffad
from diffad.calibration.score_calibration import ScoreCalibration
from diffad.deployment.graph import NETWORKS, InspectionGraph, MeasurementGraph
from diffad.deployment.metadata import FORMAT, KEY, OUTPUTS, Metadata
from diffad.deployment.quantization import FEWEST_FOR_INT8, HELD_OUT, MOST_IMAGES, quantize_networks
from diffad.deployment.runtime import (
    FILE_KEY,
    NO_DIGEST,
    OPENVINO_PRECISIONS,
    WEIGHTS_KEY,
    Run,
    graph_files,
    load_onnx,
    load_openvino,
    sha256_of,
)
from diffad.files import write_whole
from diffad.image_sizes import as_size
from diffad.installation import needs_extra
from diffad.model_folder import check_writable
from diffad.reading.image_arrays import common_value_range, resized_array
from diffad.reading.image_files import read_image
from diffad.region_of_interest import inside_region
from diffad.scoring import Measurement
from diffad.warn_once import warn_once

FORMATS = {".onnx": "onnx", ".xml": "openvino"}
PRECISIONS = ("fp32", "fp16", "int8")
CATEGORIES_KEY = "diffad_categories"  # of an .xml's runtime information: how many there are
OPSET = 20
THRESHOLDS = ("image_threshold", "pixel_threshold", "normal_scores")  # constants of these names
WEIGHTS = tuple(f"networks.{name}." for name in NETWORKS)  # how the names of the networks' weights begin
SCHEDULERS = ("DDIMScheduler", "DPMSolverMultistepScheduler")  # of DiAD, whose steps are numbers alone
MOST_SAMPLES = 63  # from 64 on diffusers' `Upsample2D` lays them out anew: the same graph, but another trace


def export_pipeline(
    pipeline: Any,
    path: str | os.PathLike,
    format: str | None = None,
    precision: str = "fp32",
    images: Sequence[Any] | None = None,
    input_type: str = "float32",
) -> Path:
    """Writes a pipeline as one file that runs without torch (`diffad.deployment.Runtime`).

    The graph takes `image`, (N, R', R', 3) float32 in [0, 1] of any N, and gives `OUTPUTS`, and of DiAD the
    `reconstruction`, (N, R, R, 3) in [0, 1]. A unified model's takes `category` as well, an index () of all images.
    Thresholds are constants; the file's `Metadata` says them, and the good images' scores, from which `Runtime` sets
    others. A model with a smallest area gives map and score alone, and `Runtime` the rest.

    Args:
        pipeline: of either method; DiAD's with one of `SCHEDULERS`.
        path: of the file; OpenVINO's, an .xml, has its numbers in a .bin beside it.
        format: "onnx" or "openvino"; None goes by the path's ending.
        precision: "fp32"; "fp16", where the networks' weights are in half precision; or "int8", where the networks
            compute with 8 bits, chosen on `images`, by which the calibration is made anew.
        images: for int8, at least 20 good images: every fifth sets the thresholds, and the rest serve the 8 bits and
            the statistics. A training of networks must not have seen them; `fit` trains none, so its own will do.
        input_type: "float32", or "uint8" for a graph that takes pixels from 0 to 255, as cameras give them. `Runtime`
            then rounds to them after it has resized, which moves scores a little.

    Returns:
        The path.

    Raises:
        ValueError: an argument is wrong, or the pipeline has no graph.
        ImportError: a package is missing; the message names the extra that brings it.
        OSError: nothing can be written there.
    """
    path = Path(path)
    format = FORMATS.get(path.suffix) if format is None else format
    suffix = next((ending for ending, name in FORMATS.items() if name == format), None)
    if suffix is None or path.suffix != suffix:
        given = f"{path}" if format is None else f"{path} and {format}"
        raise ValueError(f"The output must end in .onnx (`format` onnx) or .xml (openvino), but is {given}.")
    if folder := next(filter(Path.is_dir, graph_files(path)), None):  # before all the work
        raise ValueError(f"The output must be a file, but {folder} is a folder. Give another name, or take it away.")
    check_writable(path.parent)
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be fp32, fp16 or int8, but is {precision!r}.")
    if input_type not in ("float32", "uint8"):
        raise ValueError(f"`input_type` must be float32 or uint8, but is {input_type!r}.")
    check_graph(pipeline)
    if precision == "int8" and isinstance(pipeline, diffad.DiADPipeline):
        raise ValueError("`precision` int8 takes an AnomalyDenoisePipeline: DiAD's graph is fp32 or fp16.")
    if (precision == "int8") != (images is not None):
        raise ValueError(
            "int8 takes `images`, good ones, for its 8 bits and its thresholds, and no other precision does."
        )
    if precision == "int8" and (len(pipeline.categories) > 1 or not pipeline.has_thresholds):
        raise ValueError("`precision` int8 takes a calibrated model of one category.")
    if precision == "int8" and pipeline.calibration.smallest_area:
        raise ValueError("`precision` int8 takes a model without a smallest area: its thresholds are the graph's own.")
    if images is not None and len(images) < FEWEST_FOR_INT8:
        raise ValueError(f"`images` holds {len(images)} good images, and int8 takes at least {FEWEST_FOR_INT8}.")
    found = None
    if images is not None:
        model, pipeline, found = quantized(pipeline, images, suffix, input_type)
    else:
        model = traced_onnx(InspectionGraph(pipeline, input_type))
    if precision == "fp16":
        halve_weights(model)
    metadata = describe(pipeline, precision, input_type)._replace(quantization=found)
    warn_of_precision(metadata, format)
    write_graph(model, metadata, path)
    return path


def warn_of_precision(metadata: Metadata, format: str | None) -> None:
    """Warns where no runtime computes in the calibration's precision."""
    known, of_openvino = metadata.calibrated_in, metadata.calibrated_in in OPENVINO_PRECISIONS
    if known not in (None, "float32") and not (of_openvino and format == "openvino"):
        warn_once(
            f"`pipeline` was calibrated in {known}, and this file computes in float32, which moves scores: the stated "
            "false-alarm rate then holds no longer. Calibrate it in float32 and export it again"
            + (", or export it to OpenVINO." if of_openvino else ".")
        )


def check_graph(pipeline: Any) -> None:
    """Raises a ValueError where a pipeline does what no graph does yet."""
    is_diad = isinstance(pipeline, diffad.DiADPipeline)
    if not is_diad and not isinstance(pipeline, diffad.AnomalyDenoisePipeline):
        raise ValueError(
            f"`pipeline` must be an AnomalyDenoisePipeline or a DiADPipeline, but is a {type(pipeline).__name__}."
        )
    if pipeline.tile_size is not None:
        raise ValueError(
            "`pipeline` looks at tiles, as many as an image is large, which is no one graph. Run it by diffad itself, "
            "or fit a model with `--tile_size none`."
        )
    if pipeline.region is not None and len(pipeline.categories) > 1:
        raise ValueError(
            "`pipeline` has regions of interest of several categories, for which there is no graph: export a model of "
            "each category."
        )
    if is_diad:
        check_diad_graph(pipeline)


def check_diad_graph(pipeline: Any) -> None:
    """Raises a ValueError where a `DiADPipeline` does what no graph does."""
    if pipeline.feature_extractor is None:
        raise ValueError("`pipeline` has no feature extractor, and gives no map without one.")
    name, config = pipeline.scheduler.__class__.__name__, pipeline.scheduler.config
    draws = str(config.get("algorithm_type")).startswith("sde")
    if name not in SCHEDULERS or draws or config.get("thresholding"):
        raise ValueError(
            f"`scheduler`: there is a graph with {' or '.join(SCHEDULERS)} alone, without thresholding or an "
            f'`algorithm_type` of "sde", and not with this {name}. Set one by `from_config`, and calibrate again.'
        )
    calibration = pipeline.calibration
    of_part = pipeline.region is not None or (calibration is not None and calibration.smallest_area)
    if pipeline.config.pooling_rounds and of_part:
        raise ValueError(
            "`pipeline` pools the map before its maximum, for which no graph has a region of interest or a smallest "
            "area. Load it with `pooling_rounds=0` and calibrate it again."
        )


def describe(pipeline: Any, precision: str, input_type: str = "float32") -> Metadata:
    """The metadata of a pipeline's graph."""
    calibration = pipeline.calibration if pipeline.has_thresholds else None
    name = Path(str(pipeline.config.get("_name_or_path") or "")).name
    return Metadata(
        format=FORMAT,
        version=diffad.__version__,
        model=" ".join(filter(None, (type(pipeline).__name__, name))),
        precision=precision,
        input_size=[*as_size(pipeline.input_resolution)],
        map_size=[*as_size(pipeline.processing_resolution)],
        categories=pipeline.categories if len(pipeline.categories) > 1 else [],
        false_alarm_rate=None if calibration is None else calibration.config.false_alarm_rate,
        image_threshold=[] if calibration is None else calibration.image_threshold.tolist(),
        pixel_threshold=[] if calibration is None else calibration.pixel_threshold.tolist(),
        value_range=pipeline.value_range,
        input_type=input_type,
        smallest_area=0.0 if pipeline.calibration is None else pipeline.calibration.smallest_area,
        score_fraction=pipeline.config.get("score_fraction", 0.0),
        quantization=None,
        contrast=pipeline.config.get("contrast", 0.0),
        reconstruction=isinstance(pipeline, diffad.DiADPipeline),
        calibrated_in=None if calibration is None else calibration.config.precision,
        leave_one_out=calibration is not None and calibration.leave_one_out,
        region=None if pipeline.region is None else run_lengths_of(pipeline.region[0].cpu().numpy()),
        **kept_scores(calibration),
    )


def kept_scores(calibration: ScoreCalibration | None) -> dict[str, list[list[float]]]:
    """The good images' scores and maxima, by category, as `Metadata` has them."""
    if calibration is None:
        return {"normal_scores": [], "normal_maxima": []}
    categories = range(len(calibration.image_threshold))
    scores = [calibration.good_scores(i) for i in categories]
    maxima = [calibration.good_maxima(i) for i in categories]
    if not any(maxima) and bool((calibration.image_threshold == calibration.pixel_threshold).all()):
        maxima = scores  # a score that is its map's maximum says it
    return {"normal_scores": scores, "normal_maxima": maxima if any(maxima) else []}


def run_lengths_of(region: np.ndarray) -> dict[str, list[int]]:
    """A region (h, w) bool as `Metadata.region`: along the rows, how many pixels do not count, count, do not, ..."""
    changes = np.flatnonzero(np.diff(region.ravel())) + 1
    edges = [0, *changes.tolist(), region.size]
    return {"size": [*region.shape], "counts": [0] * bool(region.ravel()[0]) + np.diff(edges).tolist()}


def traced_onnx(graph: InspectionGraph) -> Any:
    """A graph as an `onnx.ModelProto`."""
    with needs_extra("export"):
        onnx = importlib.import_module("onnx")
        importlib.import_module("onnxscript")
    pipeline, measures = graph.pipeline, isinstance(graph, MeasurementGraph)
    if pipeline._execution_device.type != "cpu" or any(
        network is not None and network.dtype != torch.float32 for network in pipeline.measuring_networks
    ):
        raise ValueError(
            "`pipeline` must be on the CPU and in float32 to be exported: `pipe.to('cpu', torch.float32)`."
        )
    size, count = as_size(pipeline.input_resolution), 2
    image = torch.rand(count, *size, 3, generator=torch.Generator().manual_seed(0))
    inputs: dict[str, Any] = {"image": image if graph.input_type == "float32" else (image * 255.0).byte()}
    defaults = {}
    if not measures and pipeline.has_thresholds and not pipeline.calibration.smallest_area:
        defaults = {name: getattr(pipeline.calibration, name) for name in THRESHOLDS}
    inputs |= defaults
    if len(pipeline.categories) > 1 and not measures:
        inputs["category"] = torch.tensor(0)
    samples = graph.noise[..., 0, 0, 0].numel()  # of the denoiser, for each image
    batch = torch.export.Dim("batch", max=max(2, MOST_SAMPLES // max(1, samples)))
    shapes = {name: {0: batch} if name == "image" else None for name in inputs}
    calibration = pipeline.calibration
    laid_out = nullcontext() if calibration is None else calibration.laid_out_for_export()
    with torch.no_grad(), warnings.catch_warnings(), laid_out:
        warnings.simplefilter("ignore")  # of torch to itself
        outputs = graph(**inputs)  # once, so that what is made once is made
        pipeline.reset_schedule()
        try:
            program = torch.export.export(graph, (), inputs, dynamic_shapes=shapes, strict=False)
        finally:
            pipeline.reset_schedule()  # until which a scheduler keeps what it was traced with
        exported = torch.onnx.export(
            program,
            kwargs=inputs,
            input_names=list(inputs),
            output_names=graph.measured if isinstance(graph, MeasurementGraph) else graph.output_names(len(outputs)),
            opset_version=OPSET,
            verbose=False,
        )
    assert exported is not None
    model = exported.model_proto
    del model.graph.value_info[:]  # shapes between the nodes, which runtimes find out themselves
    # inputs of the trace, so that nothing else is made of them; constants of the file
    kept = [one for one in model.graph.input if one.name not in defaults]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(value.numpy(), name) for name, value in defaults.items()
    )
    return model


def quantized(pipeline: Any, images: Sequence[Any], suffix: str, input_type: str) -> tuple[Any, Any, dict[str, float]]:
    """A pipeline's graph with networks in 8 bits, and the pipeline of what these say of good images.

    Rounding moves features by more than good images differ. So statistics and thresholds are taken anew, from what the
    networks in 8 bits say in the runtime that the file is for: of four images of five the 8 bits and the statistics,
    of every fifth the thresholds.

    Returns:
        The graph, the pipeline, and what became of every fifth: `Metadata.quantization`.
    """
    import onnx

    size = as_size(pipeline.input_resolution)
    value_range = common_value_range(images) if pipeline.value_range is None else pipeline.value_range

    def pixels_of(i: int) -> np.ndarray:
        one = read_image(images[i]) if isinstance(images[i], (str, os.PathLike)) else images[i]
        return np.array(resized_array(one, size, value_range)[None])  # writable, as torch wants it

    held_out = range(0, len(images), HELD_OUT)
    others = [i for i in range(len(images)) if i % HELD_OUT]
    few = [pixels_of(i) for i in others[:MOST_IMAGES]]  # NNCF looks at no more

    fitted = copy.copy(pipeline)
    fitted.register_modules(calibration=None)
    graph = MeasurementGraph(pipeline)
    run = loaded_run(quantize_networks(traced_onnx(graph), few, WEIGHTS), describe(pipeline, "int8"), suffix)
    nothing = torch.zeros(1, 0, *as_size(pipeline.processing_resolution))

    def measurement(pixels: np.ndarray) -> Measurement:
        found = dict(zip(graph.measured, map(torch.from_numpy, run({"image": pixels})), strict=True))
        return Measurement(**{"maps": nothing, **found})

    fit = fitted.calibration_fit(
        0,
        len(held_out),
        pipeline.calibration.false_alarm_rate,
        value_range=value_range if pipeline.config.value_range is None else None,
        region=pipeline.region,
    )
    for i in others:
        fit.add_statistics(measurement(pixels_of(i)))
    for i in held_out:
        fit.add_scores(measurement(pixels_of(i)))
    fitted.register_modules(calibration=fit.finish())

    as_input = (lambda pixels: np.rint(pixels * 255.0).astype(np.uint8)) if input_type == "uint8" else np.asarray
    model = quantize_networks(
        traced_onnx(InspectionGraph(fitted, input_type)), [as_input(pixels) for pixels in few], WEIGHTS
    )
    run, in_float = loaded_run(model, describe(fitted, "int8"), suffix), InspectionGraph(pipeline)
    inside = inside_region(pipeline.region, torch.zeros(1, dtype=torch.long), as_size(pipeline.processing_resolution))
    counted = np.s_[:] if inside is None else inside.numpy()  # (1, H, W); outside, a map's zeros may be its maximum
    errors, before, scores, maxima = [], [], [], []
    for pixels in map(pixels_of, held_out):
        after = dict(zip(OUTPUTS, run({"image": as_input(pixels)}), strict=True))
        with torch.no_grad():
            expected = dict(zip(OUTPUTS, in_float(torch.from_numpy(pixels)), strict=True))
        anomaly_map = expected["anomaly_map"].numpy()
        errors.append(np.linalg.norm(after["anomaly_map"] - anomaly_map) / np.linalg.norm(anomaly_map))
        before.append(bool(expected["is_anomalous"]))
        scores.append(float(after["anomaly_score"][0]))
        maxima.append(float(after["anomaly_map"][counted].max()))
    # by the graph's own last digits, in which torch's sums may differ
    calibration = fitted.calibration
    calibration.set_thresholds(0, scores, maxima)
    for constant in model.graph.initializer:
        if constant.name in THRESHOLDS:
            value = getattr(calibration, constant.name).numpy()
            constant.CopyFrom(onnx.numpy_helper.from_array(value, constant.name))
    found = {
        "images": len(held_out),
        "median_map_error": float(np.median(errors)),
        "alarms_before": float(np.mean(before)),
        "alarms": float(np.mean(np.array(scores) > float(calibration.image_threshold[0]))),
    }
    return model, fitted, found


def loaded_run(model: Any, metadata: Metadata, suffix: str) -> Run:
    """A graph at work in the runtime of files with that ending."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder, f"graph{suffix}")
        write_graph(model, metadata, path)
        return (load_onnx if suffix == ".onnx" else load_openvino)(path, "cpu", "float32")[0]


def halve_weights(model: Any) -> None:
    """Stores the networks' weights in half precision; they are float32 again before they are used."""
    import onnx

    casts = []
    for weight in model.graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or not weight.name.startswith(WEIGHTS):
            continue
        name, values = weight.name, onnx.numpy_helper.to_array(weight)
        weight.CopyFrom(onnx.numpy_helper.from_array(values.astype("float16"), f"{name}.half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    for cast in reversed(casts):
        model.graph.node.insert(0, cast)


def write_graph(model: Any, metadata: Metadata, path: Path) -> None:
    """Writes an `onnx.ModelProto` with its metadata, in the format of the path's ending; no half-written file stays."""
    import onnx

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".onnx":
        onnx.helper.set_model_props(model, {KEY: metadata.dumps(), FILE_KEY: NO_DIGEST})
        content = model.SerializeToString()
        before, _, behind = content.rpartition(NO_DIGEST.encode())
        with write_whole(path) as unfinished, open(unfinished, "wb") as file:
            file.writelines([before, hashlib.sha256(content).hexdigest().encode(), behind])
        return
    with needs_extra("openvino"):
        openvino = importlib.import_module("openvino")
    with TemporaryDirectory(dir=path.parent) as folder:
        onnx.save(model, Path(folder) / "graph.onnx")
        converted = openvino.Core().read_model(Path(folder) / "graph.onnx")
        converted.set_rt_info(metadata.dumps(), KEY)
        converted.set_rt_info(str(max(1, len(metadata.categories))), CATEGORIES_KEY)  # for programs that read no JSON
        openvino.save_model(converted, Path(folder) / path.name, compress_to_fp16=False)
        converted.set_rt_info(sha256_of(Path(folder) / path.with_suffix(".bin").name), WEIGHTS_KEY)
        openvino.save_model(converted, Path(folder) / path.name, compress_to_fp16=False)  # the same .bin once more
        path.unlink(missing_ok=True)  # so that a kill between the two leaves no graph with another one's numbers
        (Path(folder) / path.with_suffix(".bin").name).replace(path.with_suffix(".bin"))
        (Path(folder) / path.name).replace(path)
