#!/usr/bin/env python
"""Evaluates a saved pipeline on a data set's test split, on any number of processes.

    accelerate launch training/evaluate.py --model runs/mine --data DIR --output report.json

Numbers do not depend on the number of processes: each image draws its noise from its own seed, and metrics are sums.
Beside the report stand its table (.csv, .md), a page to read (.html) and two contact sheets (.png).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

import diffad
from diffad import AnomalyOutput, GaussianFeatureModel, TimmFeatureExtractor
from diffad.data import image_to_rgb, load_anomaly_dataset, mask_to_array, resize_image_and_mask
from diffad.images import images_to_pixel_values, images_to_tensors, resize_images
from diffad.metrics import AnomalyMetrics
from diffad.model_card import BASELINE_TITLES, MEAN
from diffad.precision import PRECISIONS, resolve_precision
from diffad.prediction import image_generator
from diffad.report_page import (
    METRIC_TITLES,
    PICTURE_HEIGHT,
    Case,
    case_caption,
    choose_cases,
    render_report_page,
)
from diffad.visualization import beside_overlay, save_rows

# what a report must agree in with the one that it goes on with
SETTINGS = ("model", "model_files", "data", "seed", "resolution", "pro_fpr_limit", "mixed_precision")


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Evaluates a saved pipeline.")
    parser.add_argument("--model", required=True, help="folder or Hub id of a pipeline")
    add_evaluation_arguments(parser)
    parser.add_argument("--output", default="report.json", help="the report (report.json)")
    parser.add_argument("--save_maps", metavar="DIR", help="float32 TIFF maps, as MVTec's own evaluation reads them")
    parser.add_argument(
        "--baselines",
        nargs="+",
        choices=(*BASELINE_TITLES, "none"),
        default=["padim"],
        help="rows beside ours: PaDiM over the same backbone; the model's own plain DDPM (padim)",
    )
    parser.add_argument("--resume", action="store_true", help="keep the categories that --output already holds")
    return parser


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """What every evaluation takes: the data, and how it is measured."""
    parser.add_argument("--data", required=True, help="data set's folder or Hub id, 'elpv' or 'elpv/mono'")
    parser.add_argument("--dataset", help="force a layout (mvtec_ad, visa, ...)")
    parser.add_argument("--category", nargs="+", help="only these categories")
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side at which maps meet masks (256)")
    parser.add_argument("--pro_fpr_limit", type=float, default=0.3, help="of PRO (0.3)")
    parser.add_argument("--batch_size", type=int, default=16, help="images a batch (16)")
    parser.add_argument(
        "--mixed_precision", choices=PRECISIONS, help="auto is bf16 where that is fast, else no (accelerate's setting)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")


def describe_machine() -> dict[str, Any]:
    """What a number depends on beside code and seed."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"{os.cpu_count()} CPU cores",
        "platform": platform.platform(terse=True),
        "torch": torch.__version__,
        "diffad": diffad.__version__,
    }


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
    seed: int = 0,
    save_maps: str | Path | None = None,
) -> Evaluation:
    """Evaluates a pipeline on one category's test images; the noise of each image follows from `seed` and its place."""

    def detect(pictures: list[Any], indices: list[int]) -> list[AnomalyOutput]:
        return [pipeline(pictures, **call_arguments(pipeline, category, indices, seed))]

    return evaluate_detectors(
        detect, 1, images, category, accelerator, resolution, pro_fpr_limit, batch_size, save_maps
    )[0]


def call_arguments(pipeline: Any, category: str, indices: Sequence[int], seed: int) -> dict[str, Any]:
    """What a pipeline is called with for test images of one category, `indices` being their places in it.

    Maps come as tensors at the processing resolution, and noise follows from the seed and the place alone.
    """
    return {
        "category": category_index(pipeline, category),
        "batch_size": len(indices),
        "match_input_resolution": False,
        "generator": [image_generator(seed, i) for i in indices],
        "output_type": "pt",
    }


def category_index(pipeline: Any, category: str) -> int:
    """A category's index in a unified model; 0 in a model of one, which goes with a category of any name.

    Raises:
        ValueError: a unified model does not know it.
    """
    return int(pipeline.category_index(category if len(pipeline.config.categories or []) > 1 else None, 1)[0])


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
) -> list[Evaluation]:
    """Evaluates detectors that share their work, in one pass over one category's test images.

    Args:
        detect: from a batch of images and their places in `images` to one output for each detector, with `anomaly_map`
            (N, H, W) and `anomaly_score` (N,) as tensors, and perhaps `p_value` and `is_anomalous`.
        num_detectors: how many outputs `detect` returns.
        images: as of `load_anomaly_dataset`.
        category: its name.
        accelerator: shares the batches among its processes. A batch is the same on any number of them, and so are
            its maps to the bit.
        resolution: side in pixels at which maps meet masks.
        pro_fpr_limit: of PRO.
        batch_size: images a batch.
        save_maps: folder for the first detector's maps.

    Returns:
        One evaluation for each detector. Seconds are those of all detectors together.
    """
    metrics = [AnomalyMetrics(pro_fpr_limit=pro_fpr_limit) for _ in range(num_detectors)]
    records: list[list[dict[str, Any]]] = [[] for _ in range(num_detectors)]
    started = time.time()
    # this process's share, without the padding that would count images twice
    with accelerator.split_between_processes(list(range(0, len(images), batch_size))) as starts:
        for start in tqdm(starts, desc=category, disable=not accelerator.is_local_main_process):
            indices = list(range(start, min(start + batch_size, len(images))))
            rows = [images[i] for i in indices]
            masks = [_mask(row, resolution) for row in rows]
            known = [j for j, mask in enumerate(masks) if mask is not None]
            with accelerator.autocast():
                outputs = detect([row["image"] for row in rows], indices)
            for number, output in enumerate(outputs):
                maps = resize_images(output.anomaly_map.float()[:, None], (resolution, resolution))[:, 0].cpu()
                scores = output.anomaly_score.cpu()
                metrics[number].update(anomaly_score=scores, label=torch.tensor([row["label"] for row in rows]))
                if known:
                    metrics[number].update(anomaly_map=maps[known], mask=np.stack([masks[j] for j in known]))
                records[number] += [_record(output, j, float(scores[j]), indices[j], row) for j, row in enumerate(rows)]
                if save_maps is not None and number == 0:
                    _save_maps(maps, rows, indices, Path(save_maps, category, "test"))
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


def _save_maps(maps: torch.Tensor, rows: list[dict[str, Any]], indices: list[int], folder: Path) -> None:
    for one, row, index in zip(maps, rows, indices, strict=True):
        name = Path(row["path"]).stem or f"{index:06d}"
        path = folder / row["defect"] / f"{name}.tiff"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one.numpy()).save(path)


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


# -- baselines ---------------------------------------------------------------------------------------------------


def fit_padim(
    feature_extractor: TimmFeatureExtractor, good: Dataset, batch_size: int = 16, image_size: int = 224
) -> GaussianFeatureModel:
    """PaDiM over the pipeline's own backbone and strides, at PaDiM's 224 px, fitted to good images.

    The grid is 56 x 56 whatever the finest stride: PaDiM's own, with a ResNet.
    """
    model = GaussianFeatureModel.from_extractor(feature_extractor, image_size=image_size, feature_size=image_size // 4)
    return model.fit(image_batches(good, batch_size, image_size))


def image_batches(images: Dataset, batch_size: int, image_size: int) -> Iterator[torch.Tensor]:
    """A data set's images in batches of (N, 3, image_size, image_size) in [-1, 1]; only one is in memory."""
    for start in range(0, len(images), batch_size):
        tensors = images_to_tensors([images[i]["image"] for i in range(start, min(start + batch_size, len(images)))])
        yield images_to_pixel_values(tensors, (image_size, image_size))


def evaluate_baseline(
    name: str,
    pipeline: Any,
    good: Dataset | None,
    images: Dataset,
    category: str,
    accelerator: Accelerator,
    resolution: int = 256,
    pro_fpr_limit: float = 0.3,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluates what users would take otherwise, on the same images.

    Args:
        name: "padim", or "ddpm": the plain DDPM of an AnomalyDenoise pipeline, noised to t = 250 and denoised in 50
            DDIM steps.
        good: training images of the category, for PaDiM. Every process fits all of them, so that the sums, and with
            them all numbers, are the same on any number of processes.
        pipeline, images, category, accelerator, resolution, pro_fpr_limit, batch_size, seed: as of
            `evaluate_category`.

    Returns:
        As of `Evaluation.result`; empty for PaDiM with fewer than two good images, as a covariance takes two.
    """
    if name == "padim":
        if good is None or len(good) < 2:
            return {}
        padim = fit_padim(pipeline.feature_extractor, good, batch_size)

        def detect(pictures: list[Any], indices: list[int]) -> list[Any]:
            return [padim.detect(pictures, batch_size=batch_size, match_input_resolution=False)]

    else:  # the plain DDPM
        scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)

        def detect(pictures: list[Any], indices: list[int]) -> list[Any]:
            return [
                pipeline.denoise(pictures, scheduler=scheduler, **call_arguments(pipeline, category, indices, seed))
            ]

    title = f"{BASELINE_TITLES[name]}: {category}"
    return evaluate_detectors(detect, 1, images, title, accelerator, resolution, pro_fpr_limit, batch_size)[0].result


def load_training_images(
    data: str, category: Sequence[str] | None, dataset: str | None, test: Dataset, accelerator: Accelerator
) -> Dataset | None:
    """Good images of the training split that are not in the test split too; None, and a word why, if there are none."""
    try:
        training = load_anomaly_dataset(data, split="train", category=category, dataset=dataset)
    except (FileNotFoundError, ValueError) as error:
        accelerator.print(f"No good images for training in {data}: {error}")
        return None
    tested = set(test["path"]) - {""}  # a plain folder shows the same good images in both
    paths, labels = training["path"], np.asarray(training["label"])
    chosen = [i for i, path in enumerate(paths) if labels[i] == 0 and path not in tested]
    if not chosen:
        accelerator.print(f"No good images for training in {data}: all of them are in its test split.")
        return None
    return training.select(chosen) if len(chosen) < len(training) else training


def split_by_category(dataset: Dataset | None) -> dict[str, Dataset]:
    """Each category's images, by the categories' names in order; none of None."""
    if dataset is None:
        return {}
    of_image = np.asarray(dataset["category"])
    return {str(name): dataset.select(np.flatnonzero(of_image == name)) for name in np.unique(of_image)}


# -- the report --------------------------------------------------------------------------------------------------


def mean_over_categories(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Metrics averaged over categories; a metric that one category lacks is left out."""
    columns = {name: [result.get(name) for result in results.values()] for name in METRIC_TITLES}
    return {name: round(float(np.mean(column)), 6) for name, column in columns.items() if column and None not in column}


def with_mean(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Results by category, and their mean as the last."""
    categories = {name: result for name, result in results.items() if name != MEAN}
    return {**categories, MEAN: mean_over_categories(categories)}


def markdown_table(rows: dict[str, dict[str, Any]], head: str = "category") -> str:
    """A row of metrics for each title, in percent and in the papers' order; a metric that no row has is left out.

    `head` stands above the titles.
    """
    names = [name for name in METRIC_TITLES if any(result.get(name) is not None for result in rows.values())]
    lines = [
        f"| {' | '.join([head, *(METRIC_TITLES[name] for name in names)])} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for title, result in rows.items():
        cells = ["" if result.get(name) is None else f"{100.0 * result[name]:.1f}" for name in names]
        lines.append(f"| {' | '.join([title, *cells])} |")
    return "\n".join(lines) + "\n"


def report_markdown(report: dict[str, Any]) -> str:
    """A row for each category and their mean, then each baseline's mean."""
    baselines = {BASELINE_TITLES[name]: of_category[MEAN] for name, of_category in report["baselines"].items()}
    return markdown_table({**report["results"], **baselines})


def save_report(report: dict[str, Any], path: Path) -> None:
    """Writes `path` (JSON), and beside it the table as .csv and .md; each at once, by renaming."""
    rows = [["method", "category", *METRIC_TITLES]]
    for method, of_category in {"": report["results"], **report["baselines"]}.items():
        for category, result in of_category.items():
            rows.append([method, category, *(result.get(name) for name in METRIC_TITLES)])
    table = io.StringIO()
    csv.writer(table).writerows(rows)
    texts = {".csv": table.getvalue(), ".md": report_markdown(report), path.suffix: json.dumps(report, indent=2) + "\n"}
    write_files(path, texts)


def take_up_report(report: dict[str, Any], path: Path, categories: Collection[str]) -> None:
    """Puts the categories that the report at `path` holds into a new one.

    Raises:
        ValueError: it was made with other settings or baselines, or it holds a category that is none of `categories`.
    """
    earlier = json.loads(path.read_text())
    changed = [name for name in SETTINGS if earlier.get(name) != report[name]]
    if sorted(earlier.get("baselines", {})) != sorted(report["baselines"]):
        changed.append("baselines")
    if set(earlier["results"]) - {MEAN} - set(categories):
        changed.append("category")
    if changed:
        raise ValueError(f"--resume: {path} was made with another {', '.join(changed)}. Choose another --output.")
    report.update({name: earlier[name] for name in ("results", "baselines", "scores", "curves")})


def save_page(
    report: dict[str, Any], pipeline: Any, images: dict[str, Dataset], accelerator: Accelerator, path: Path
) -> None:
    """Writes the page (.html), with pictures of the cases that tell most, and their contact sheets beside `path`."""
    cases = {
        category: draw_cases(pipeline, images[category], records, category, accelerator, report["seed"])
        for category, records in report["scores"].items()
    }
    write_files(path, {".html": render_report_page(report, report["curves"], cases)})
    save_sheets(cases, path)


def draw_cases(
    pipeline: Any,
    images: Dataset,
    records: Sequence[dict[str, Any]],
    category: str,
    accelerator: Accelerator,
    seed: int,
) -> list[Case]:
    """The images with the highest and the lowest scores of either kind, beside their maps and the defects' outlines."""
    threshold = thresholds(pipeline, category)[1]
    cases = []
    for title, indices in choose_cases(records).items():
        rows = [images[i] for i in indices]
        with accelerator.autocast():
            output = pipeline([row["image"] for row in rows], **call_arguments(pipeline, category, indices, seed))
        for i, row, anomaly_map in zip(indices, rows, output.anomaly_map, strict=True):
            cases.append(Case(title, case_caption(records[i]), draw_case(row, anomaly_map, threshold)))
    return cases


def draw_case(row: dict[str, Any], anomaly_map: torch.Tensor, threshold: float | None) -> np.ndarray:
    """An image beside its map, as of `beside_overlay`; no higher than the page shows it."""
    picture = image_to_rgb(row["image"])
    mask = None if row["mask"] is None else Image.fromarray(mask_to_array(row["mask"]))
    if picture.height > PICTURE_HEIGHT:  # at full size many categories would add up
        size = (max(1, round(picture.width * PICTURE_HEIGHT / picture.height)), PICTURE_HEIGHT)
        picture = picture.resize(size, Image.Resampling.BILINEAR)
        mask = None if mask is None else mask.resize(size, Image.Resampling.NEAREST)
    shown = resize_images(anomaly_map[None, None].float(), (picture.height, picture.width))[0, 0].numpy()
    return beside_overlay(np.asarray(picture), shown, None if mask is None else np.asarray(mask), threshold)


def thresholds(pipeline: Any, category: str) -> tuple[float | None, float | None]:
    """Of images and of pixels, of one category; None before it is calibrated."""
    if pipeline.calibration is None:
        return None, None
    index = category_index(pipeline, category)
    image, pixel = pipeline.calibration.image_threshold[index], pipeline.calibration.pixel_threshold[index]
    return tuple(float(value) if torch.isfinite(value) else None for value in (image, pixel))


def save_sheets(cases: dict[str, list[Case]], path: Path) -> None:
    """Contact sheets of all categories' cases, beside `path`: one of defective images and one of good ones."""
    for kind in ("defective", "good"):
        rows: dict[str, list[np.ndarray]] = {}
        for category, of_category in cases.items():
            for case in of_category:
                if case.title.startswith(kind):
                    rows.setdefault(f"{category}: {case.title}", []).extend(np.hsplit(case.picture, 2))
        if rows:
            save_rows(list(rows.values()), path.with_name(f"{path.stem}-{kind}.png"), row_titles=list(rows))


def write_files(path: Path, texts: dict[str, str]) -> None:
    """Writes texts to `path` with other suffixes, each under another name first and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in texts.items():
        unfinished = path.with_name(f".{path.stem}{suffix}.unfinished")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path.with_suffix(suffix))


def fingerprint(model: str) -> str | None:
    """Changes when a folder's pipeline is trained or calibrated anew; None for one on the Hub."""
    paths = [*Path(model).glob("model_index.json"), *sorted(Path(model).glob("*/*.safetensors"))]
    parts = [f"{path.relative_to(model)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16] if parts else None


def command_line(module: str, args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The command that makes the same report again: every argument that is not its default."""
    words = ["accelerate", "launch", "-m", module]
    for name, value in vars(args).items():
        if value in (parser.get_default(name), None, False) or name == "resume":
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name}", *map(str, values)]
    return shlex.join(words)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = create_parser()
    args = parser.parse_args(argv)
    accelerator = Accelerator(mixed_precision=resolve_precision(args.mixed_precision))
    args.mixed_precision = accelerator.mixed_precision  # also where accelerate's own settings say so
    path = Path(args.output)
    if path.suffix != ".json":
        raise ValueError(f"--output must end in .json, but is {path}.")

    # 1. Data and detectors
    dataset = load_anomaly_dataset(args.data, split="test", category=args.category, dataset=args.dataset)
    pipeline = DiffusionPipeline.from_pretrained(args.model).to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    baselines = [name for name in args.baselines if name != "none"]
    if "ddpm" in baselines and not hasattr(pipeline.unet.config, "feature_channels"):
        raise ValueError("--baselines ddpm noises and denoises pixels: it goes with AnomalyDenoise pipelines only.")
    training = None
    if "padim" in baselines and pipeline.feature_extractor is not None:
        training = load_training_images(args.data, args.category, args.dataset, dataset, accelerator)
    if training is None and "padim" in baselines:
        accelerator.print("PaDiM has nothing to be fitted to: its row is left out.")
        baselines.remove("padim")
    tests, goods = split_by_category(dataset), split_by_category(training)

    # 2. A new report, or what an interrupted run left of one
    report: dict[str, Any] = {
        "model": args.model,
        "model_files": fingerprint(args.model),
        "data": args.data,
        "seed": args.seed,
        "resolution": args.resolution,
        "pro_fpr_limit": args.pro_fpr_limit,
        "mixed_precision": accelerator.mixed_precision,
        "command": command_line("diffad.training.evaluate", args, parser),
        "processes": accelerator.num_processes,
        "machine": describe_machine(),
        "results": {},
        "baselines": {name: {} for name in baselines},
        "scores": {},
        "curves": {},
    }
    if args.resume and path.is_file():
        take_up_report(report, path, tests)
    accelerator.wait_for_everyone()  # nobody reads the report after it is written again

    # 3. Category by category
    limits = (args.resolution, args.pro_fpr_limit, args.batch_size, args.seed)
    for category in [name for name in tests if name not in report["results"]]:
        images, good = tests[category], goods.get(category)
        ours = evaluate_category(pipeline, images, category, accelerator, *limits, args.save_maps)
        for name in baselines:
            result = evaluate_baseline(name, pipeline, good, images, category, accelerator, *limits)
            report["baselines"][name] = with_mean({**report["baselines"][name], category: result})
        ours.result["image_threshold"] = thresholds(pipeline, category)[0]
        report["results"] = with_mean({**report["results"], category: ours.result})
        report["scores"][category] = ours.records
        report["curves"][category] = {
            name: [np.round(axis, 5).tolist() for axis in curve] for name, curve in ours.curves.items()
        }
        if accelerator.is_main_process:
            save_report(report, path)

    # 4. The page
    if accelerator.is_main_process:
        save_page(report, pipeline, tests, accelerator, path)
        print(report_markdown(report) + f"Report: {path} and {path.with_suffix('.html')}")
    accelerator.wait_for_everyone()
    accelerator.end_training()  # a process that exits with its group still open may abort
    return report


if __name__ == "__main__":
    main()
