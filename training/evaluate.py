"""Evaluates a saved pipeline on a data set's test split, on any number of processes.

    accelerate launch training/evaluate.py --model runs/mine --data DIR --output report.json

Numbers do not depend on the number of processes: noise is the model's, and metrics are sums.
Beside the report stand its table (.csv, .md), a page to read (.html) and two contact sheets (.png).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator

from diffad.commands.models import is_exported, load_model
from diffad.data import load_anomaly_dataset
from diffad.data.checks import dataset_value_range
from diffad.data.masks import defects_at
from diffad.evaluation.baselines import evaluate_baseline, load_training_images
from diffad.evaluation.detectors import (
    check_categories,
    counted_region,
    evaluate_category,
    promise,
    split_by_category,
)
from diffad.evaluation.metric_names import BASELINE_TITLES
from diffad.evaluation.report import (
    check_report_path,
    command_line,
    describe_machine,
    fingerprint,
    report_markdown,
    save_page,
    save_report,
    take_up_report,
    with_mean,
)
from diffad.precision import PRECISIONS, checked_precision, resolve_precision
from diffad.prediction.detection_call import noise_of
from diffad.training.arguments import POSITIVE, SHARE, FlagParser, local_path, whole_number

if TYPE_CHECKING:
    from datasets import Dataset

# Of an exported file, by its `Runtime.precision`, as accelerate names them
MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def create_parser() -> argparse.ArgumentParser:
    parser = FlagParser(description="Evaluates a saved pipeline.")
    parser.add_argument("--model", required=True, help="folder or Hub id of a pipeline, or an exported file")
    add_evaluation_arguments(parser)
    parser.add_argument("--output", type=local_path, default="report.json", help="the report (report.json)")
    parser.add_argument(
        "--save_maps", type=local_path, metavar="DIR", help="float32 TIFF maps, as MVTec's own evaluation reads them"
    )
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
    parser.add_argument(
        "--resolution", type=whole_number(8), default=256, help="pixels a side at which maps meet masks (256)"
    )
    parser.add_argument("--pro_fpr_limit", type=SHARE, default=0.3, help="of PRO (0.3)")
    parser.add_argument("--batch_size", type=POSITIVE, default=16, help="images a batch (16)")
    parser.add_argument(
        "--on_bad_image", choices=("error", "skip"), default="error", help="unreadable files, named either way (error)"
    )
    parser.add_argument(
        "--mixed_precision", choices=PRECISIONS, help="auto is bf16 where that is fast, else no (accelerate's setting)"
    )


def tell_of_one_kind(tests: dict[str, Dataset], accelerator: Accelerator) -> None:
    """Says of which categories, and so of which mean, some metrics will be missing, as all images are of one kind."""
    kinds = {name: set(images["label"]) for name, images in tests.items()}
    for name, labels in kinds.items():
        if len(labels) == 1:
            which = "defective" if 1 in labels else "good"
            of_mean = ", and so it does in the mean: choose the others with --category" if len(tests) > 1 else ""
            accelerator.print(
                f"All images of {name} are {which}: what compares both kinds (AUROC, AP, F1-max, PRO) stays empty"
                f"{of_mean}."
            )


def tell_of_thin_defects(images: Dataset, category: str, pipeline: Any, resolution: int) -> None:
    """Says whether some defects of a category are too thin for the pixels at which maps meet masks."""
    found = np.zeros(3, dtype=int)
    for mask in (row["mask"] for row in images.select_columns(["mask"])):
        if mask is not None:
            inside = counted_region(pipeline, category, (mask.height, mask.width))
            found += defects_at(mask, (resolution, resolution), inside)
    count, lost, broken = found.tolist()
    words = [f"{lost} have no pixel"] if lost else []
    words += [f"{broken} fall into pieces, each a defect of its own in PRO"] if broken else []
    if words:
        print(
            f"At {resolution} x {resolution} pixels, of {category}'s {count} defects {' and '.join(words)}. A larger "
            "--resolution helps."
        )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = create_parser()
    args = parser.parse_args(argv)
    accelerator = Accelerator(mixed_precision=resolve_precision(args.mixed_precision))
    args.mixed_precision = checked_precision(accelerator)  # also where accelerate's own settings say so
    path = Path(args.output)
    if path.suffix != ".json":
        raise ValueError(f"--output must end in .json, but is {path}.")
    check_report_path(path)

    # 1. Data and detectors
    dataset = load_anomaly_dataset(args.data, "test", args.category, args.dataset, args.on_bad_image)
    is_file = is_exported(args.model)
    pipeline = load_model(args.model, accelerator.device.type if is_file else None)
    if not is_file:
        pipeline.to(accelerator.device)
        pipeline.set_progress_bar_config(disable=True)
        check_categories(pipeline, sorted(set(dataset["category"])))
    if pipeline.value_range is None and (value_range := dataset_value_range(dataset)) is not None:
        accelerator.print(f"Images are taken to lie in [0, {value_range:g}], the smallest range that holds them all.")
        if is_file:
            pipeline.metadata = pipeline.metadata._replace(value_range=value_range)
        else:
            pipeline.register_to_config(value_range=value_range)
    baselines = [name for name in args.baselines if name != "none"]
    denoiser = getattr(pipeline, "unet", None)
    if "ddpm" in baselines and (denoiser is None or not hasattr(denoiser.config, "feature_channels")):
        raise ValueError("--baselines ddpm noises and denoises pixels: it goes with AnomalyDenoise pipelines only.")
    training = None
    if "padim" in baselines and getattr(pipeline, "feature_extractor", None) is not None:
        training = load_training_images(args.data, args.category, args.dataset, dataset, accelerator, args.on_bad_image)
    if training is None and "padim" in baselines:
        accelerator.print("PaDiM has nothing to be fitted to: its row is left out.")
        baselines.remove("padim")
    tests, goods = split_by_category(dataset), split_by_category(training)

    tell_of_one_kind(tests, accelerator)

    # 2. A new report, or what an interrupted run left of one
    report: dict[str, Any] = {
        "model": args.model,
        "model_files": fingerprint(args.model),
        "data": args.data,
        "noise": noise_of(pipeline),
        "resolution": args.resolution,
        "pro_fpr_limit": args.pro_fpr_limit,
        "mixed_precision": MIXED_PRECISION[pipeline.precision] if is_file else accelerator.mixed_precision,
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
    limits = (args.resolution, args.pro_fpr_limit, args.batch_size)
    for category in [name for name in tests if name not in report["results"]]:
        images, good = tests[category], goods.get(category)
        if accelerator.is_main_process:
            tell_of_thin_defects(images, category, pipeline, args.resolution)
        with accelerator.autocast():
            ours = evaluate_category(pipeline, images, category, accelerator, *limits, args.save_maps)
            others = {
                n: evaluate_baseline(n, pipeline, good, images, category, accelerator, *limits) for n in baselines
            }
        for name, result in others.items():
            report["baselines"][name] = with_mean({**report["baselines"][name], category: result})
        ours.result.update(promise(pipeline, category))
        report["results"] = with_mean({**report["results"], category: ours.result})
        report["scores"][category] = ours.records
        report["curves"][category] = {
            name: [np.round(axis, 5).tolist() for axis in curve] for name, curve in ours.curves.items()
        }
        if accelerator.is_main_process:
            save_report(report, path)

    # 4. The page
    if accelerator.is_main_process:
        with accelerator.autocast():
            save_page(report, pipeline, tests, path)
        print(report_markdown(report) + f"Report: {path} and {path.with_suffix('.html')}")
    accelerator.wait_for_everyone()
    accelerator.end_training()  # a process that exits with its group still open may abort
    return report


if __name__ == "__main__":
    main()
