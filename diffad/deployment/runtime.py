"""An exported model at work, without torch: NumPy, Pillow and ONNX Runtime or OpenVINO.

This file is long so that a call stands in one place, from the file and the image to the verdict.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

import diffad
from diffad.calibration.conformal import ROUNDING
from diffad.cores import available_cores
from diffad.deployment.metadata import KEY, OUTPUTS, Metadata
from diffad.image_sizes import as_side, as_size
from diffad.installation import needs_extra
from diffad.reading.grey_depth import warn_of_found_range
from diffad.reading.image_arrays import flatten, image_size, resized_array, smallest_common_range, within_range
from diffad.reading.image_files import read_image
from diffad.reading.unicode_forms import same_name
from diffad.regions import Region, can_list_regions, find_regions, level_of_area, num_smallest, without_small_regions
from diffad.resizing import region_at, resize_array
from diffad.warn_once import warn_once

# ONNX Runtime's names of what it computes on
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
# In float32, not in TF32, which CUDA's would take; what TensorRT cannot run goes to CUDA
CUDA = (PROVIDERS["cuda"], {"use_tf32": "0"})
PROVIDER_OPTIONS = {"cuda": [CUDA], "tensorrt": [PROVIDERS["tensorrt"], CUDA]}
OPENVINO_PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
WEIGHTS_KEY = "diffad_weights"  # of an .xml's runtime information: the SHA-256 of its .bin; older files lack it
FILE_KEY = "diffad_file"  # of an .onnx's metadata: the SHA-256 of the file with `NO_DIGEST` in its place
NO_DIGEST = "0" * 64

Run: TypeAlias = Callable[[dict[str, np.ndarray]], list[np.ndarray]]  # inputs by name -> outputs in order


@dataclass
class RuntimeOutput:
    """What a `Runtime` returns for N images: `diffad.AnomalyOutput`, its fields and their meaning, as NumPy arrays."""

    anomaly_map: np.ndarray
    anomaly_score: np.ndarray
    reconstruction: np.ndarray | None = None
    anomaly_mask: np.ndarray | None = None
    is_anomalous: np.ndarray | None = None
    p_value: np.ndarray | None = None

    @property
    def regions(self) -> list[list[Region]] | None:
        """Each image's defects as a list, as of `diffad.AnomalyOutput`."""
        if self.anomaly_mask is None:
            return None
        return [find_regions(*pair) for pair in zip(self.anomaly_map, self.anomaly_mask, strict=True)]


class Runtime:
    """An exported model, called as the pipeline that it was made of. Threads may share one.

    ```python
    runtime = Runtime("model.onnx")
    out = runtime("part.png")
    out.anomaly_map, out.anomaly_score, out.is_anomalous
    ```

    Args:
        path: an .onnx file, or OpenVINO's .xml with its .bin beside it.
        device: "cpu"; for an .onnx also "cuda" or "tensorrt", for an .xml one that OpenVINO finds, such as "gpu".
        precision: in which networks of float32 weights compute, "float32"; for an .xml also "bfloat16" or "float16",
            where the device has it. None takes that of the calibration, or float32 where the runtime or the device
            lacks it. Another than the calibration's moves scores, and warns.
        false_alarm_rate: sets both thresholds anew, by the good images' scores that the file keeps; None leaves them as
            they were calibrated. n good images can vouch for no less than 1 / (n + 1).

    Attributes:
        metadata: what the file says of itself (`Metadata`).
        precision: in which the networks compute.

    Raises:
        FileNotFoundError: no file stands there.
        ValueError: it is no graph of diffad's, or of another version's; it is damaged; an .xml stands beside another's
            .bin; or an argument is wrong, or the device or its precision not there.
        ImportError: the runtime is not installed; the message names the extra that brings it.
    """

    tile_size = None  # a graph looks at whole images

    def __init__(
        self,
        path: str | os.PathLike,
        device: str = "cpu",
        precision: str | None = None,
        false_alarm_rate: float | None = None,
    ):
        path = Path(path)
        if path.suffix.lower() not in (".onnx", ".xml"):
            raise ValueError(f"`path` must be an .onnx or an .xml file, but is {path}.")
        if not isinstance(device, str):
            raise ValueError(f'`device` must be a name such as "cpu", but is {device!r}.')
        if false_alarm_rate is not None and not (isinstance(false_alarm_rate, Real) and 0.0 < false_alarm_rate < 1.0):
            raise ValueError(f"`false_alarm_rate` must be a number in (0, 1), or None, but is {false_alarm_rate!r}.")
        for file in graph_files(path):
            if not file.is_file():
                raise FileNotFoundError(f"`path`: no file at {file}.")
        load = load_onnx if path.suffix.lower() == ".onnx" else load_openvino
        self._run, self.metadata, self.precision = load(path, device.lower(), precision)
        if self.metadata.calibrated_in not in (None, self.precision):
            known = self.metadata.calibrated_in
            can_be_had = path.suffix.lower() == ".xml" and known in OPENVINO_PRECISIONS
            warn_once(
                f"{path} was calibrated in {known} and runs in {self.precision}, which moves scores: the stated "
                f"false-alarm rate then holds no longer. Calibrate the model in {self.precision} and export it again"
                + (f", or run it in {known}, where the device has it (`precision`)." if can_be_had else ".")
            )
        # else the graph has judged with its own thresholds
        self._judges = bool(self.metadata.smallest_area) or false_alarm_rate is not None
        if self.metadata.smallest_area and not can_list_regions():
            raise ImportError(f"{path} has a smallest area of regions. This needs the package scipy: pip install scipy")
        if false_alarm_rate is not None:
            self.metadata = self.metadata.at_rate(false_alarm_rate)
        self.path = path

    @property
    def calibration(self) -> Metadata:
        """What a `ScoreCalibration` says of thresholds."""
        return self.metadata

    @property
    def categories(self) -> list[str]:
        """Names of a unified model's categories; empty for a model of one."""
        return self.metadata.categories

    @property
    def has_thresholds(self) -> bool:
        """Whether calls give masks, alarms and p-values."""
        return self.metadata.false_alarm_rate is not None

    @property
    def value_range(self) -> float | None:
        """Of images of more than 8 bits."""
        return self.metadata.value_range

    @property
    def input_resolution(self) -> int | tuple[int, int]:
        """Side to which images are resized, or height and width."""
        return as_side(self.metadata.input_size)

    @property
    def processing_resolution(self) -> int | tuple[int, int]:
        """Side of the maps, or height and width, before they are resized to the images' own."""
        return as_side(self.metadata.map_size)

    def category_index(self, category: str | int | None) -> int:
        """A category's index; a model of one category asks for nothing.

        Raises:
            ValueError: a wrong or missing name, or a category without thresholds.
        """
        names = self.categories or ["default"]
        if category is None and len(names) > 1:
            raise ValueError(f"`category` is needed: this model knows {', '.join(names)}. Pass one of them.")
        index = -1
        if category is None:
            index = 0
        elif isinstance(category, str):
            known = same_name(category, names)
            index = -1 if known is None else names.index(known)
        elif isinstance(category, (int, np.integer)) and not isinstance(category, bool):
            index = int(category)
        if index not in range(len(names)):
            raise ValueError(
                f"`category` {category!r} is unknown: this model knows {', '.join(names)}. Pass one of them, or its "
                "index, an integer."
            )
        if self.has_thresholds and not np.isfinite(self.metadata.image_threshold[index]):
            raise ValueError(f"Category {names[index]!r} is not calibrated. Calibrate it and export the model again.")
        return index

    def __call__(
        self,
        image: Any,
        category: str | int | Sequence[str | int] | None = None,
        batch_size: int = 16,
        match_input_resolution: bool = True,
    ) -> RuntimeOutput:
        """Maps, scores and verdicts of one image or many.

        Args:
            image: PIL image, path, array (H, W[, C]) or (N, H, W, C), or a list of these. Floats lie in [0, 1].
            category: of a unified model, its name or index, one for all images or one each.
            batch_size: images at once.
            match_input_resolution: whether maps come at the images' own size, which then must be one; else at the
                model's.

        Raises:
            ValueError, FileNotFoundError: an argument is wrong; the message names it and what to do.
        """
        items = [(one, place) for item, place in flatten(image, "image") for one in _singles(item, place)]
        if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a positive integer, but is {batch_size!r}.")
        batch_size = int(batch_size)  # a NumPy integer of few bits would overflow
        sizes = sorted({image_size(one, place) for one, place in items})
        if match_input_resolution and len(sizes) > 1:
            raise ValueError(
                f"`image` holds images of different sizes ({', '.join(f'{h}x{w}' for h, w in sizes)}, height x width), "
                "whose maps do not fit one array. Pass `match_input_resolution=False`, or make one call for each size."
            )
        value_range = self.value_range
        if value_range is None and (value_range := smallest_common_range(items)) is not None:
            warn_of_found_range(value_range)
        each: Any = category
        if hasattr(each, "tolist"):  # NumPy's and torch's
            each = each.tolist()
        given = [each] * len(items) if isinstance(each, str) or not hasattr(each, "__iter__") else list(each)
        if len(given) != len(items):
            raise ValueError(f"`category` lists {len(given)} names for {len(items)} images. Pass one, or one each.")
        indices = np.array([self.category_index(name) for name in given])
        size = sizes[0] if match_input_resolution else as_size(self.metadata.map_size)

        def network_input(i: int) -> np.ndarray:
            one, place = items[i]
            if isinstance(one, (str, os.PathLike)):
                one = read_image(one, reduce_large=True)
            return resized_array(one, self.metadata.input_size, value_range, place)

        places: list[int] = []
        outputs: list[RuntimeOutput] = []
        for index in sorted(set(indices.tolist())):
            of_category = np.flatnonzero(indices == index)
            for start in range(0, len(of_category), batch_size):
                batch = of_category[start : start + batch_size].tolist()
                pixels = np.stack([network_input(i) for i in batch])  # (B, R', R', 3)
                outputs.append(self.at_size(self.run(pixels, index), index, size))
                places += batch
        order = np.argsort(places)
        values: dict[str, Any] = {
            name: np.concatenate([getattr(one, name) for one in outputs])[order]
            for name in (*OUTPUTS, "reconstruction")
            if getattr(outputs[0], name) is not None
        }
        return RuntimeOutput(**values)

    def run(self, pixels: np.ndarray, category: int = 0) -> RuntimeOutput:
        """The graph alone: a batch (N, *input_size, 3), uint8 or float in [0, 1], all of one category, by its index.

        Raises:
            ValueError: the shape, type or range is another, or the category unknown or not calibrated.
        """
        pixels, shape = np.asarray(pixels), (*self.metadata.input_size, 3)
        if pixels.shape[1:] != shape or not len(pixels):
            raise ValueError(f"`pixels` must be (N, {', '.join(map(str, shape))}), but its shape is {pixels.shape}.")
        if pixels.dtype == np.uint8:
            pixels = pixels / np.float32(255.0)
        elif pixels.dtype.kind != "f":
            raise ValueError(f"`pixels` must be uint8, or floating point in [0, 1], but are {pixels.dtype}.")
        else:
            pixels = within_range(pixels, "pixels")
        category = self.category_index(category)
        if self.metadata.input_type == "uint8":
            pixels = np.rint(pixels * 255.0)
        inputs = {"image": np.ascontiguousarray(pixels, dtype=self.metadata.input_type)}
        if self.categories:
            inputs["category"] = np.array(category, dtype=np.int64)
        found = self._run(inputs)
        pictures = found.pop() if self.metadata.reconstruction else None
        values: dict[str, Any] = dict(zip(OUTPUTS, found, strict=False))
        # no threshold could tell it from a good image's; not every runtime's maximum is NaN where a map's pixel is
        if any(np.isnan(values[name]).any() for name in OUTPUTS[:2]):
            raise ValueError(
                "Scores are NaN, which is no verdict. Run the networks in float32 (`precision`); where they are, the "
                "file's weights are damaged: export the model again."
            )
        output = RuntimeOutput(**values, reconstruction=pictures)
        if self.metadata.smallest_area:
            output = self._without_small_peaks(output)
        return self._judged(output, category) if self._judges and self.has_thresholds else output

    def _without_small_peaks(self, output: RuntimeOutput) -> RuntimeOutput:
        """Maps less what is smaller than the smallest area, and the scores of what is left: no graph has that."""
        known, maps = self.metadata, output.anomaly_map
        size = (maps.shape[1], maps.shape[2])
        smallest, inside = num_smallest(known.smallest_area, size), self.inside_region(size)
        counted = np.where(inside, maps, maps[:, inside].min(axis=1)[:, None, None])  # `cut_small_peaks`
        levels = np.array([level_of_area(one, smallest) for one in counted], dtype=np.float32)
        maps = np.minimum(maps, levels[:, None, None])
        pixels = maps[:, inside]
        count = max(1, math.ceil(known.score_fraction * pixels.shape[1]))
        scores = np.partition(pixels, -count, axis=1)[:, -count:].mean(axis=1, dtype=np.float32)
        peak, mean = pixels.max(axis=1)[:, None, None], pixels.mean(axis=1)[:, None, None]
        maps = maps - np.float32(known.contrast) * np.minimum(peak - maps, peak - mean)  # `heighten_contrast`
        return replace(output, anomaly_map=np.where(inside, maps, np.float32(0.0)), anomaly_score=scores)

    def _judged(self, output: RuntimeOutput, category: int) -> RuntimeOutput:
        """With verdicts by the metadata's thresholds."""
        known, maps, scores = self.metadata, output.anomaly_map, output.anomaly_score
        normal = np.array(known.normal_scores[category], dtype=np.float32)
        lowest = scores - np.float32(ROUNDING) * np.abs(scores)
        at_least = (normal >= lowest[:, None]).sum(axis=1)
        is_anomalous = scores > np.float32(known.image_threshold[category])
        return RuntimeOutput(
            maps,
            scores,
            output.reconstruction,
            self._masks(maps, is_anomalous, category),
            is_anomalous,
            ((1.0 + at_least) / (1.0 + len(normal))).astype(np.float32),
        )

    def _masks(self, maps: np.ndarray, is_anomalous: np.ndarray, category: int) -> np.ndarray:
        """Where maps (N, H, W) are above their threshold, in alarmed images only."""
        masks = (maps > np.float32(self.metadata.pixel_threshold[category])) & is_anomalous[:, None, None]
        if not self.metadata.smallest_area:
            return masks
        return np.stack([without_small_regions(one, self.metadata.smallest_area) for one in masks])

    @cached_property
    def region(self) -> np.ndarray | None:
        """Which pixels of an image count, (h, w) bool; None where all do."""
        region = self.metadata.region
        if region is None:
            return None
        lengths = region["counts"]
        return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(region["size"])

    def inside_region(self, size: tuple[int, int]) -> np.ndarray:
        """The same at another size, (*size) bool, as of `diffad.region_of_interest`."""
        return np.ones(size, dtype=bool) if self.region is None else region_at(self.region, size)

    def at_size(self, output: RuntimeOutput, category: int, size: tuple[int, int]) -> RuntimeOutput:
        """An output with maps and masks of another size, (H, W): masks are drawn anew, in alarmed images only."""
        if output.anomaly_map.shape[1:] == tuple(size):
            return output
        inside = self.inside_region(size)
        maps = np.stack([np.where(inside, resize_array(one, size), np.float32(0.0)) for one in output.anomaly_map])
        pictures = output.reconstruction
        if pictures is not None:
            pictures = np.stack([resize_array(one, size) for one in pictures])
        if output.is_anomalous is None:
            return RuntimeOutput(maps, output.anomaly_score, pictures)
        mask = self._masks(maps, output.is_anomalous, category)
        return RuntimeOutput(maps, output.anomaly_score, pictures, mask, output.is_anomalous, output.p_value)


def _singles(image: Any, name: str) -> list[Any]:
    """A batch's images, or the one image."""
    is_batch = isinstance(image, np.ndarray) and image.ndim == 4
    if is_batch and not len(image):
        raise ValueError(f"`{name}` has no pixels: its shape is {image.shape}.")
    return list(image) if is_batch else [image]


def graph_files(path: Path) -> tuple[Path, ...]:
    """The files that an exported model consists of: an .xml has its weights beside it."""
    if path.suffix.lower() != ".xml":
        return (path,)
    weights = path.with_suffix(".bin")
    return path, weights.with_suffix(".BIN") if path.suffix.isupper() and not weights.is_file() else weights


def sha256_of(path: Path) -> str:
    """Tells a file's content from all others."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):  # a .bin may be larger than the memory that is left
            found.update(piece)
    return found.hexdigest()


def digest_of_onnx(path: Path, digest: str) -> str:
    """The SHA-256 of a file in which `digest`, its own, stands as `NO_DIGEST`."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = content.rfind(digest.encode())
        found = hashlib.sha256(memoryview(content)[:place])
        found.update(NO_DIGEST.encode())
        found.update(memoryview(content)[place + len(digest) :])
    return found.hexdigest()


def load_onnx(path: Path, device: str, precision: str | None) -> tuple[Run, Metadata, str]:
    """An .onnx file at work in ONNX Runtime, its metadata and precision; arguments as of `Runtime`."""
    with needs_extra("onnx"):
        onnxruntime = importlib.import_module("onnxruntime")
    if precision not in (None, "float32"):
        raise ValueError(f"`precision` of an .onnx file is float32, and not {precision!r}: export it to OpenVINO.")
    if PROVIDERS.get(device) not in onnxruntime.get_available_providers():
        there = [name for name, provider in PROVIDERS.items() if provider in onnxruntime.get_available_providers()]
        raise ValueError(f"`device` {device!r} is not there: this ONNX Runtime has {', '.join(there)}.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.log_severity_level = 3  # errors
    states = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        session = onnxruntime.InferenceSession(path, options, PROVIDER_OPTIONS.get(device, [PROVIDERS[device]]))
    except (states.InvalidProtobuf, states.InvalidArgument, states.InvalidGraph) as error:  # others are the device's
        raise ValueError(f"{path} is damaged, or no graph: export the model again. {last_line(error)}") from error
    if PROVIDERS[device] not in session.get_providers():  # it goes on with another
        raise ValueError(f"`device` {device!r} is not there: its libraries cannot be loaded.")
    try:
        said = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: export the model again.") from error
    if FILE_KEY in said and digest_of_onnx(path, said[FILE_KEY]) != said[FILE_KEY]:
        warn_once(
            f"{path} is not as it was exported: another program has changed it, or it is damaged. If you know of none, "
            "export the model again."
        )
    metadata = Metadata.loads(said.get(KEY), path, diffad.__version__)
    return lambda inputs: session.run(None, inputs), metadata, "float32"


def last_line(error: Exception) -> str:
    """What a runtime says of a file, without where in its code."""
    return str(error).strip().rpartition("\n")[2]


def load_openvino(path: Path, device: str, precision: str | None) -> tuple[Run, Metadata, str]:
    """An .xml file at work in OpenVINO, its metadata and precision; arguments as of `Runtime`."""
    with needs_extra("openvino"):
        openvino = importlib.import_module("openvino")
    if precision is not None and precision not in OPENVINO_PRECISIONS:
        raise ValueError(f"`precision` must be float32, bfloat16 or float16, but is {precision!r}.")
    core = openvino.Core()
    path, weights = graph_files(path)
    try:
        model = core.read_model(path, weights)
    except RuntimeError as error:
        raise ValueError(
            f"{path} or {weights} is damaged, or they are no graph: export the model again. {last_line(error)}"
        ) from error
    if model.has_rt_info(WEIGHTS_KEY) and str(model.get_rt_info(WEIGHTS_KEY).value) != sha256_of(weights):
        raise ValueError(
            f"{weights} is damaged, or not the one that {path} was exported with: put that one beside it, or export "
            "the model again."
        )
    text = str(model.get_rt_info(KEY).value) if model.has_rt_info(KEY) else None
    metadata = Metadata.loads(text, path, diffad.__version__)

    def compiled_in(precision: str) -> Any:
        options = {"INFERENCE_PRECISION_HINT": OPENVINO_PRECISIONS[precision]}
        if device == "cpu":
            options["INFERENCE_NUM_THREADS"] = str(available_cores())
        try:
            compiled = core.compile_model(model, device.upper(), options)
            taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()  # another where it lacks this one
        except RuntimeError as error:
            there = ", ".join(core.available_devices)
            raise ValueError(
                f"`device` {device!r} is not there, or cannot run this file: OpenVINO finds {there}. {last_line(error)}"
            ) from error
        return compiled, {name: key for key, name in OPENVINO_PRECISIONS.items()}.get(taken, taken)

    wanted = precision or metadata.calibrated_in
    compiled, taken = compiled_in(wanted if wanted in OPENVINO_PRECISIONS else "float32")
    if precision is None and taken != wanted and taken != "float32":
        compiled, taken = compiled_in("float32")
    if precision not in (None, taken):
        raise ValueError(f"`precision` {precision} is not there: OpenVINO's {device} takes {taken} instead. Pass that.")

    running = threading.Lock()  # a call's outputs stand in memory that the next one writes to

    def run(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        with running:
            return [np.array(value) for value in compiled(inputs).values()]

    return run, metadata, taken
