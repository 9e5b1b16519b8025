"""A pipeline as one graph, from pixels to verdicts, for runtimes other than torch."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

import diffad
from diffad.calibration.score_calibration import ScoreCalibration
from diffad.deployment.metadata import FORMAT, KEY, OUTPUTS, Metadata
from diffad.deployment.quantization import FEWEST_IMAGES, quantize_networks, scores_and_maxima
from diffad.exporting import is_exporting
from diffad.files import write_whole
from diffad.image_arrays import common_value_range, resized_array
from diffad.image_files import read_image
from diffad.image_sizes import as_size
from diffad.installation import needs_extra
from diffad.pipelines.output import AnomalyOutput, threshold_output
from diffad.region_of_interest import clear_outside, hide_outside, inside_region
from diffad.seeding import draw_noise

FORMATS = {".onnx": "onnx", ".xml": "openvino"}
PRECISIONS = ("fp32", "fp16", "int8")
OPSET = 20
THRESHOLDS = ("image_threshold", "pixel_threshold", "normal_scores")  # constants of these names
NETWORKS = ("networks.unet.", "networks.feature_extractor.")  # how the names of their weights begin
MOST_SAMPLES = 63  # from 64 on diffusers' `Upsample2D` lays them out anew: the same graph, but another trace


@dataclass
class GraphThresholds:
    """A calibration's thresholds as `threshold_output` takes them, here inputs of a graph."""

    map_mean: torch.Tensor  # says on which device
    image_threshold: torch.Tensor  # (K,)
    pixel_threshold: torch.Tensor  # (K,)
    normal_scores: torch.Tensor  # (K, n)
    has_thresholds: bool = True
    smallest_area: float = 0.0

    p_value: ClassVar[Any] = ScoreCalibration.p_value


class InspectionGraph(nn.Module):
    """Steps 2 to 9 of an `AnomalyDenoisePipeline`'s call as a module: what is exported, and what may be compiled.

    Images come at the size that the feature extractor or the denoiser looks at, maps at the processing resolution.
    Where a smallest area counts, for which no runtime has an operator, an exported graph gives map and score before it.

    Args:
        pipeline: on the CPU, in float32. A change of it changes the graph that is exported next.
        input_type: "float32", images in [0, 1]; or "uint8", from 0 to 255.
    """

    noise: torch.Tensor
    shown: torch.Tensor | None
    inside: torch.Tensor | None
    places: torch.Tensor | None

    def __init__(self, pipeline: Any, input_type: str = "float32"):
        super().__init__()
        self.pipeline, self.calibration, self.input_type = pipeline, pipeline.calibration, input_type
        parts = {"unet": pipeline.unet if pipeline.runs_denoiser else None}
        parts |= {"feature_extractor": pipeline.feature_extractor, "calibration": pipeline.calibration}
        self.networks = nn.ModuleDict({name: part for name, part in parts.items() if part is not None})
        self.register_buffer("noise", graph_noise(pipeline))  # (T, 3, R, R)
        first = torch.tensor([0])  # a region goes with models of one category
        for name, side in (("shown", pipeline.input_resolution), ("inside", pipeline.processing_resolution)):
            self.register_buffer(name, inside_region(pipeline.region, first, as_size(side)))  # (1, H, W) or None
        places = None if self.inside is None else self.inside.flatten().nonzero()[:, 0]  # (n,)
        self.register_buffer("places", places)
        self.eval().requires_grad_(False)

    def forward(
        self,
        image: torch.Tensor,
        image_threshold: torch.Tensor | None = None,
        pixel_threshold: torch.Tensor | None = None,
        normal_scores: torch.Tensor | None = None,
        category: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Verdicts on a batch of one category.

        Args:
            image: (N, R', R', 3), of the input type.
            image_threshold, pixel_threshold: (K,), and
            normal_scores: (K, n), as of `ScoreCalibration`; None takes the calibration's.
            category: a unified model's index (), of all images.

        Returns:
            `OUTPUTS`, as of `AnomalyOutput`; without thresholds the first two.
        """
        pipeline, calibration, count = self.pipeline, self.calibration, image.shape[0]
        index: Any = 0 if category is None else category
        indices = torch.as_tensor(index).expand(count)  # (N,)
        if self.input_type == "uint8":
            image = image.float() / 255.0
        pixel_values = hide_outside(image.permute(0, 3, 1, 2) * 2.0 - 1.0, self.shown)  # (N, 3, R', R')
        noise = self.noise.expand(count, *self.noise.shape)  # (N, T, 3, R, R)
        measurement = pipeline.measure(pixel_values, noise, indices)
        maps = pipeline.score_maps(measurement, index, calibration)  # (N, S, R, R)
        anomaly_map = pipeline.join_maps(maps, index, calibration)  # (N, R, R)
        if calibration is not None and calibration.smallest_area and is_exporting():
            return anomaly_map, pipeline.image_scores(anomaly_map)
        of_score = anomaly_map
        if self.inside is not None:  # (N, 1, n), and 0 where nothing counts
            of_score = anomaly_map.flatten(1)[:, self.places][:, None]
            anomaly_map = clear_outside(anomaly_map, self.inside)
        score = pipeline.image_scores(of_score)  # (N,)
        if calibration is None or not calibration.has_thresholds:
            return anomaly_map, score
        thresholds: Any = calibration
        if image_threshold is not None and pixel_threshold is not None and normal_scores is not None:
            thresholds = GraphThresholds(calibration.map_mean, image_threshold, pixel_threshold, normal_scores)
        output = threshold_output(AnomalyOutput(anomaly_map, score), indices, thresholds)
        return tuple(getattr(output, name) for name in OUTPUTS)


def graph_noise(pipeline: Any) -> torch.Tensor:
    """The noise that a graph adds to every image, (T, 3, R, R): the same in each export."""
    size = as_size(pipeline.processing_resolution)
    generator = torch.Generator().manual_seed(0)
    return draw_noise((pipeline.num_levels, 3, *size), [generator], "cpu")[0]


def export_pipeline(
    pipeline: Any,
    path: str | os.PathLike,
    format: str | None = None,
    precision: str = "fp32",
    images: Sequence[Any] | None = None,
    input_type: str = "float32",
) -> Path:
    """Writes a pipeline as one file that runs without torch (`diffad.deployment.Runtime`).

    The graph takes `image`, (N, R', R', 3) float32 in [0, 1] of any N, and gives `OUTPUTS`. A unified model's takes
    `category` as well, an index () of all images. Thresholds are constants; the file's `Metadata` says them, and the
    good images' scores, from which `Runtime` sets others. A model with a smallest area gives map and score alone, and
    `Runtime` the rest.

    Args:
        pipeline: an `AnomalyDenoisePipeline`.
        path: of the file; OpenVINO's, an .xml, has its numbers in a .bin beside it.
        format: "onnx" or "openvino"; None goes by the path's ending.
        precision: "fp32"; "fp16", where the networks' weights are in half precision; or "int8", where the networks
            compute with 8 bits, chosen on `images`, and the thresholds are set again by the result.
        images: for int8, good images that neither training nor calibration has seen: every other one serves the
            choice of 8 bits, and the rest the thresholds.
        input_type: "float32", or "uint8" for a graph that takes pixels from 0 to 255, as cameras give them. `Runtime`
            then rounds to them after it has resized, which moves scores a little.

    Returns:
        The path.

    Raises:
        ValueError: an argument is wrong, or the pipeline has no graph.
        ImportError: a package is missing; the message names the extra that brings it.
    """
    path = Path(path)
    format = FORMATS.get(path.suffix) if format is None else format
    suffix = next((ending for ending, name in FORMATS.items() if name == format), None)
    if suffix is None or path.suffix != suffix:
        raise ValueError(
            f"`path` must end in .onnx, with `format` onnx, or in .xml, with openvino, but is {path} and {format}."
        )
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be fp32, fp16 or int8, but is {precision!r}.")
    if input_type not in ("float32", "uint8"):
        raise ValueError(f"`input_type` must be float32 or uint8, but is {input_type!r}.")
    check_graph(pipeline)
    if (precision == "int8") != (images is not None):
        raise ValueError("`images` go with int8: good images, from which it takes its 8 bits and its thresholds.")
    if precision == "int8" and (len(pipeline.categories) > 1 or not pipeline.has_thresholds):
        raise ValueError("`precision` int8 takes a calibrated model of one category.")
    if precision == "int8" and pipeline.calibration.smallest_area:
        raise ValueError("`precision` int8 takes a model without a smallest area: its thresholds are the graph's own.")
    if images is not None and len(images) < FEWEST_IMAGES:
        raise ValueError(f"`images` holds {len(images)} good images, and int8 takes at least {FEWEST_IMAGES}.")
    model = traced_onnx(pipeline, input_type)
    metadata = describe(pipeline, precision, input_type)
    if precision == "fp16":
        halve_weights(model)
    if images is not None:
        model, calibration = quantized(model, pipeline, images)
        kept = kept_scores(calibration)
        metadata = metadata._replace(
            image_threshold=calibration.image_threshold.tolist(),
            pixel_threshold=calibration.pixel_threshold.tolist(),
            normal_scores=kept["normal_scores"],
            normal_maxima=kept["normal_maxima"],
        )
    write_graph(model, metadata, path)
    return path


def check_graph(pipeline: Any) -> None:
    """Raises a ValueError where a pipeline does what no graph does yet."""
    if not isinstance(pipeline, diffad.AnomalyDenoisePipeline):
        raise ValueError(f"`pipeline`: only an AnomalyDenoisePipeline has a graph yet, and not {type(pipeline)}.")
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
        score_fraction=pipeline.config.score_fraction,
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


def traced_onnx(pipeline: Any, input_type: str = "float32") -> Any:
    """The pipeline's graph as an `onnx.ModelProto`."""
    with needs_extra("export"):
        onnx = importlib.import_module("onnx")
        importlib.import_module("onnxscript")
    if pipeline._execution_device.type != "cpu" or any(
        network is not None and network.dtype != torch.float32 for network in pipeline.measuring_networks
    ):
        raise ValueError(
            "`pipeline` must be on the CPU and in float32 to be exported: `pipe.to('cpu', torch.float32)`."
        )
    graph = InspectionGraph(pipeline, input_type)
    size, count = as_size(pipeline.input_resolution), 2
    image = torch.rand(count, *size, 3, generator=torch.Generator().manual_seed(0))
    inputs: dict[str, Any] = {"image": image if input_type == "float32" else (image * 255.0).byte()}
    defaults = {}
    if pipeline.has_thresholds and not pipeline.calibration.smallest_area:
        defaults = {name: getattr(pipeline.calibration, name) for name in THRESHOLDS}
    inputs |= defaults
    if len(pipeline.categories) > 1:
        inputs["category"] = torch.tensor(0)
    batch = torch.export.Dim("batch", max=max(2, MOST_SAMPLES // max(1, pipeline.num_levels)))
    shapes = {name: {0: batch} if name == "image" else None for name in inputs}
    if pipeline.calibration is not None:
        pipeline.calibration.prepare_export()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch to itself
        outputs = graph(**inputs)  # once, so that what is made once is made
        program = torch.export.export(graph, (), inputs, dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            program,
            kwargs=inputs,
            input_names=list(inputs),
            output_names=list(OUTPUTS[: len(outputs)]),
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


def quantized(model: Any, pipeline: Any, images: Sequence[Any]) -> tuple[Any, ScoreCalibration]:
    """The graph in 8 bits by every other image, with thresholds by the rest, which are also returned."""
    import onnx

    size = as_size(pipeline.input_resolution)
    value_range = common_value_range(images) if pipeline.value_range is None else pipeline.value_range
    loaded = (read_image(one) if isinstance(one, (str, os.PathLike)) else one for one in images)
    batches = [np.ascontiguousarray(resized_array(one, size, value_range)[None]) for one in loaded]
    model = quantize_networks(model, batches[1::2], NETWORKS)
    scores, maxima = zip(*scores_and_maxima(model, batches[::2]), strict=True)
    rate = pipeline.calibration.config.false_alarm_rate
    calibration = ScoreCalibration(num_scores=len(scores), false_alarm_rate=rate, keeps_maxima=True)
    calibration.set_thresholds(0, scores, maxima)
    for constant in model.graph.initializer:
        if constant.name in THRESHOLDS:
            value = getattr(calibration, constant.name).numpy()
            constant.CopyFrom(onnx.numpy_helper.from_array(value, constant.name))
    return model, calibration


def halve_weights(model: Any) -> None:
    """Stores the networks' weights in half precision; they are float32 again before they are used."""
    import onnx

    casts = []
    for weight in model.graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or not weight.name.startswith(NETWORKS):
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
        onnx.helper.set_model_props(model, {KEY: metadata.dumps()})
        with write_whole(path) as unfinished:
            onnx.save(model, unfinished)
        return
    with needs_extra("openvino"):
        openvino = importlib.import_module("openvino")
    with TemporaryDirectory(dir=path.parent) as folder:
        onnx.save(model, Path(folder) / "graph.onnx")
        converted = openvino.Core().read_model(Path(folder) / "graph.onnx")
        converted.set_rt_info(metadata.dumps(), KEY)
        openvino.save_model(converted, Path(folder) / path.name, compress_to_fp16=False)
        (Path(folder) / path.with_suffix(".bin").name).replace(path.with_suffix(".bin"))
        (Path(folder) / path.name).replace(path)
