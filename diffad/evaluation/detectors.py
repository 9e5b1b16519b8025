"""Runs detectors over a test split: metrics and every image's score, on any number of processes."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from diffad import AnomalyOutput
from diffad.data.checks import cast_images
from diffad.data.masks import resize_image_and_mask
from diffad.data.saturation import read_defects
from diffad.deployment.metadata import OUTPUTS
from diffad.deployment.runtime import Runtime
from diffad.evaluation.metric_names import check_category_names
from diffad.evaluation.metrics import AnomalyMetrics
from diffad.files import bounded_name, write_whole
from diffad.images import resize_images
from diffad.prediction.journal import name_pictures
from diffad.region_of_interest import inside_region


class Evaluation(NamedTuple):
    """What one detector showed on one category; but for times, the same on every process.

    result: metrics, number of images, seconds.
    records: path, label, defect, score, p_value and is_anomalous of each image, in the data set's order.
    curves: as of `AnomalyMetrics.curves`.
    """

    result: dict[str, Any]
    records: list[dict[str, Any]]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]


def evaluate_category(
    pipeline: Any,
    images: Dataset,
    category: str,
    accelerator: Accelerator,
    resolution: int = 256,
    pro_fpr_limit: float = 0.3,
    batch_size: int = 16,
    save_maps: str | Path | None = None,
) -> Evaluation:
    """Evaluates a pipeline on one category's test images."""

    def detect(pictures: list[Any], indices: list[int]) -> list[AnomalyOutput]:
        return [call_for(pipeline, pictures, category)]

    region = counted_region(pipeline, category, (resolution, resolution))
    return evaluate_detectors(
        detect, 1, images, category, accelerator, resolution, pro_fpr_limit, batch_size, save_maps, region
    )[0]


def image_auroc(detector: Any, images: Dataset, batch_size: int = 16) -> float:
    """Image AUROC in [0, 1] of a pipeline or a `Runtime` of one category; NaN without good or defective images."""
    metrics = AnomalyMetrics()
    for rows in images.select_columns(["image", "label"]).iter(batch_size):
        output = call_for(detector, rows["image"], "")
        metrics.update(anomaly_score=output.anomaly_score, label=rows["label"])
    return float(metrics.compute().get("image_auroc", math.nan))


def call_for(pipeline: Any, pictures: list[Any], category: str) -> AnomalyOutput:
    """What a pipeline says of test images of one category, `call_arguments`; or a `Runtime`."""
    if not isinstance(pipeline, Runtime):
        return pipeline(pictures, **call_arguments(pipeline, category, len(pictures)))
    output = pipeline(pictures, category_index(pipeline, category), len(pictures), match_input_resolution=False)
    found = {name: getattr(output, name) for name in OUTPUTS}
    values: dict[str, Any] = {n: None if one is None else torch.from_numpy(one) for n, one in found.items()}
    if output.reconstruction is not None:
        values["reconstruction"] = torch.from_numpy(output.reconstruction).permute(0, 3, 1, 2)  # (N, 3, R, R)
    return AnomalyOutput(**values)


def call_arguments(pipeline: Any, category: str, batch_size: int) -> dict[str, Any]:
    """What a pipeline is called with for test images of one category: maps as tensors at the processing resolution."""
    return {
        "category": category_index(pipeline, category),
        "batch_size": batch_size,
        "match_input_resolution": False,
        "output_type": "pt",
    }


def category_index(pipeline: Any, category: str) -> int:
    """A category's index in a unified model; 0 in a model of one, which goes with a category of any name.

    Raises:
        ValueError: a unified model does not know it.
    """
    return pipeline.category_index(category if len(pipeline.categories) > 1 else None)


def counted_region(pipeline: Any, category: str, size: tuple[int, int]) -> np.ndarray | None:
    """Which pixels of a category's maps of a size (height, width) count, bool: a pipeline's or a `Runtime`'s region of
    interest; None where all do.
    """
    if pipeline.region is None:
        return None
    if isinstance(pipeline, Runtime):
        return pipeline.inside_region(size)
    inside = inside_region(pipeline.region, torch.tensor([category_index(pipeline, category)]), size)
    return None if inside is None else inside[0].numpy(force=True)


def check_categories(pipeline: Any, categories: Iterable[str]) -> None:
    """Says before anything is run what would end an evaluation half-way.

    Raises:
        ValueError: a unified model does not know one of the categories, or is calibrated without it.
    """
    indices = [category_index(pipeline, category) for category in categories]
    calibration = getattr(pipeline, "calibration", None)
    if calibration is not None:
        calibration.check_category(torch.tensor(indices), pipeline.categories)


def promise(pipeline: Any, category: str) -> dict[str, float]:
    """What a pipeline promises of one category, for the report; nothing before it is calibrated.

    `image_threshold`; `allowed_false_alarms`, the rate that holds on average over sets of good images; and
    `allowed_false_alarms_95`, the rate that this calibration keeps with 95% confidence. `allowed_is_exact` is
    False where images were, or may have been, left out in turn: both rates are then near the true ones only.
    """
    if not pipeline.has_thresholds:
        return {}
    index = category_index(pipeline, category)
    threshold = pipeline.calibration.image_threshold[index]
    if not math.isfinite(threshold):
        return {}
    return {
        "image_threshold": float(threshold),
        "allowed_false_alarms": pipeline.calibration.stated_false_alarm_rate(index),
        "allowed_false_alarms_95": round(pipeline.calibration.false_alarm_bound(index), 6),
        "allowed_is_exact": pipeline.calibration.leave_one_out is False,
    }


def pixel_threshold(pipeline: Any, category: str) -> float | None:
    """Above which the map of an alarmed image is in its mask; None before the category is calibrated."""
    if not pipeline.has_thresholds:
        return None
    threshold = pipeline.calibration.pixel_threshold[category_index(pipeline, category)]
    return float(threshold) if math.isfinite(threshold) else None


@torch.no_grad()
def evaluate_detectors(
    detect: Callable[[list[Any], list[int]], Sequence[Any]],
    num_detectors: int,
    images: Dataset,
    category: str,
    accelerator: Accelerator,
    resolution: int = 256,
    pro_fpr_limit: float = 0.3,
    batch_size: int = 16,
    save_maps: str | Path | None = None,
    region: np.ndarray | None = None,
) -> list[Evaluation]:
    """Evaluates detectors that share their work, in one pass over one category's test images.

    Args:
        detect: from a batch of images and their places in `images` to one output for each detector, with `anomaly_map`
            (N, H, W) and `anomaly_score` (N,) as tensors, and perhaps `p_value` and `is_anomalous`.
        num_detectors: how many outputs `detect` returns.
        images: as of `load_anomaly_dataset`.
        category: its name.
        accelerator: shares the batches among its processes. A batch is the same on any number of them, and so are
            its maps to the bit. Mixed precision is the caller's to set (`with accelerator.autocast()`).
        resolution: side in pixels at which maps meet masks.
        pro_fpr_limit: of PRO.
        batch_size: images a batch.
        save_maps: folder for the first detector's maps, named by `name_maps`.
        region: which pixels count in pixel metrics, (resolution, resolution) bool; None where all do.

    Returns:
        One evaluation for each detector. Seconds are those of all detectors together.
    """
    metrics = [AnomalyMetrics(pro_fpr_limit=pro_fpr_limit) for _ in range(num_detectors)]
    records: list[list[dict[str, Any]]] = [[] for _ in range(num_detectors)]
    stored = cast_images(images, decode=False)  # whose masks are still folders, where they are
    map_names = [] if save_maps is None else name_maps(images["path"], images["defect"], category)
    check_map_folders([Path(save_maps or "", name) for name in map_names], images["path"])
    started = time.time()
    # this process's share, without the padding that would count images twice
    with accelerator.split_between_processes(list(range(0, len(images), batch_size))) as starts:
        for start in tqdm(starts, desc=category, disable=not accelerator.is_local_main_process):
            indices = list(range(start, min(start + batch_size, len(images))))
            rows = [images[i] for i in indices]
            masks = [_mask(row, resolution) for row in rows]
            known = {j: mask for j, mask in enumerate(masks) if mask is not None}
            defects = [_defects(stored[indices[j]]["mask"], resolution) for j in known]
            outputs = detect([row["image"] for row in rows], indices)
            for number, output in enumerate(outputs):
                maps = resize_images(output.anomaly_map.float()[:, None], (resolution, resolution))[:, 0].cpu()
                scores = output.anomaly_score.cpu()
                metrics[number].update(anomaly_score=scores, label=torch.tensor([row["label"] for row in rows]))
                if known:
                    metrics[number].update(
                        anomaly_map=maps[list(known)],
                        mask=np.stack(list(known.values())),
                        predicted_mask=_predicted_masks(output, list(known), resolution),
                        defects=defects if any(defects) else None,
                        region=region,
                    )
                records[number] += [_record(output, j, float(scores[j]), indices[j], row) for j, row in enumerate(rows)]
                if save_maps is not None and number == 0:
                    for one, index in zip(maps, indices, strict=True):
                        save_map(one, Path(save_maps), map_names[index])
    if accelerator.num_processes > 1:  # states are exchanged where they lie, and NCCL knows GPUs only
        metrics = [one.to(accelerator.device) for one in metrics]
    measured = [(one.compute(), one.curves()) for one in metrics]
    seconds = time.time() - started
    evaluations = []
    for (result, curves), own in zip(measured, records, strict=True):
        everyones = sorted(gather_object(own), key=lambda record: record.pop("index"))
        evaluations.append(Evaluation(_complete(result, everyones, seconds), everyones, curves))
    return evaluations


def _mask(row: dict[str, Any], resolution: int) -> np.ndarray | None:
    """(resolution, resolution) bool; None where a defective image has no mask."""
    if row["mask"] is None:
        return None if row["label"] else np.zeros((resolution, resolution), dtype=bool)
    return resize_image_and_mask(row["image"], row["mask"], (resolution, resolution))[1]


def _defects(stored: dict[str, Any] | None, resolution: int) -> list[tuple[np.ndarray, float]] | None:
    """Of an image with a folder of masks, its defects as `read_defects`."""
    if stored is None or stored["path"] is None or not os.path.isdir(stored["path"]):
        return None
    return read_defects(Path(stored["path"]), (resolution, resolution))


def _predicted_masks(output: Any, chosen: list[int], resolution: int) -> torch.Tensor | None:
    """The masks that a detector shows, (N, resolution, resolution) bool; None where it has no threshold."""
    masks = getattr(output, "anomaly_mask", None)
    if masks is None:
        return None
    return resize_images(masks[chosen].float()[:, None], (resolution, resolution))[:, 0].cpu() >= 0.5


def _record(output: Any, j: int, score: float, index: int, row: dict[str, Any]) -> dict[str, Any]:
    p_value, is_anomalous = getattr(output, "p_value", None), getattr(output, "is_anomalous", None)
    return {
        "index": index,
        "path": row["path"],
        "label": row["label"],
        "defect": row["defect"],
        "score": score,
        "p_value": None if p_value is None else float(p_value[j]),
        "is_anomalous": None if is_anomalous is None else bool(is_anomalous[j]),
    }


def name_maps(paths: Sequence[str], defects: Sequence[str], category: str) -> list[str]:
    """Where the map of each image goes, as MVTec's evaluation expects it: CATEGORY/test/DEFECT/NAME.tiff.

    NAME is the image's path below DEFECT or, where that is no folder of it, below the images' common one. No two
    images share one, labels are one folder each, and nothing leads upwards.
    """
    split = [[part for part in re.split(r"[\\/]", path) if part not in ("", ".", "..")] for path in paths]
    common = len(Path(os.path.commonpath(["/".join(["root", *parts[:-1]]) for parts in split])).parts) - 1
    places = []
    for index, (parts, defect) in enumerate(zip(split, defects, strict=True)):
        folders, name = parts[:-1], os.path.splitext(parts[-1])[0] if parts else f"{index:06d}"
        start = len(folders) - folders[::-1].index(defect) if defect in folders else common
        inside = folders[start:]
        places.append((str(index), Path(_one_folder(defect), *inside, name)))
    names = name_pictures(places, {}, ".tiff")
    return [f"{_one_folder(category)}/test/{names[str(index)]}" for index in range(len(places))]


def check_map_folders(maps: Sequence[Path], images: Sequence[str]) -> None:
    """Raises a ValueError where a map would lie between images: it could replace one, and be taken for one."""
    of_images = {os.path.dirname(os.path.realpath(path)) for path in images if path}
    if taken := sorted({os.path.realpath(path.parent) for path in maps} & of_images):
        raise ValueError(f"`save_maps`: maps would lie between the images in {taken[0]}. Give another folder.")


def _one_folder(label: str) -> str:
    label = re.sub(r"[\\/\0]", "_", label)
    return "_" if label in ("", ".", "..") else bounded_name(label)


def save_map(anomaly_map: torch.Tensor, folder: Path, name: str) -> None:
    """Writes a map (H, W) below a folder, as float32 TIFF."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as unfinished:
        Image.fromarray(anomaly_map.numpy()).save(unfinished, format="TIFF")


def _complete(result: dict[str, float], records: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """A category's entry in the report: metrics rounded, None where one is not defined; alarms, counts, times."""
    labels = [record["label"] for record in records]
    entry: dict[str, Any] = {name: None if np.isnan(value) else round(value, 6) for name, value in result.items()}
    if records and records[0]["is_anomalous"] is not None:
        good = [r["is_anomalous"] for r in records if not r["label"]]
        bad = [r["is_anomalous"] for r in records if r["label"]]
        entry["false_alarms"] = round(float(np.mean(good)), 6) if good else None
        entry["defects_found"] = round(float(np.mean(bad)), 6) if bad else None
    entry.update(
        good_images=labels.count(0),
        defective_images=labels.count(1),
        seconds=round(seconds, 2),
        images_per_second=round(len(records) / seconds, 2),
    )
    return entry


def split_by_category(dataset: Dataset | None) -> dict[str, Dataset]:
    """Each category's images, by the categories' names in order; none of None."""
    if dataset is None:
        return {}
    of_image = np.asarray(dataset["category"])
    check_category_names(of_image)
    return {str(name): dataset.select(np.flatnonzero(of_image == name)) for name in np.unique(of_image)}
