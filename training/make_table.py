#!/usr/bin/env python
"""Makes a table of the papers for a model and a data set: one row a setting, PaDiM as the last.

    accelerate launch training/make_table.py --table alpha --model runs/mine --data DIR --output tables/alpha.json

`training/configs/tables/` holds the tables. What rows share is done once: all rows of a model that look at the same
noise levels or the same reconstructions share one pass of the networks, in the calibration as in the test. Every row is
calibrated alike, on the good images of the training split, with noise of each image's own, by --seed. Rows that need a
model of their own (`train`) are trained first, with `--train_config` and the row's changes to it; a model that was
trained so already is taken as it is. This file is long so that what rows share stands in one place.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset

from diffad import AnomalyDenoisePipeline, DiADPipeline, TimmFeatureExtractor
from diffad.calibration.fitting import CalibrationFit
from diffad.commands.models import load_pipeline
from diffad.cores import limit_threads
from diffad.data import load_anomaly_dataset
from diffad.data.checks import dataset_value_range
from diffad.evaluation.baselines import evaluate_baseline, load_training_images
from diffad.evaluation.detectors import category_index, evaluate_detectors, split_by_category
from diffad.evaluation.metric_names import MEAN
from diffad.evaluation.report import command_line, describe_machine, markdown_table, with_mean, write_files
from diffad.files import read_json_object
from diffad.images import ImageSequence, as_size, images_to_pixel_values
from diffad.model_card import TRAINING_NAME
from diffad.pipelines.detection import DetectionPipeline, setting_names
from diffad.precision import checked_precision, resolve_precision
from diffad.process_share import process_share
from diffad.scoring import Measurement, empty_measurement
from diffad.seeding import draw_noise, image_generator
from diffad.training.arguments import POSITIVE, SEED, FlagParser, local_path
from diffad.training.checkpoints import list_checkpoints
from diffad.training.choice import with_settings
from diffad.training.evaluate import add_evaluation_arguments, tell_of_one_kind

TABLES = files("diffad.training") / "configs" / "tables"
METHODS: dict[str, type[DetectionPipeline]] = {"AnomalyDenoise": AnomalyDenoisePipeline, "DiAD": DiADPipeline}
SCRIPTS = {"AnomalyDenoise": "train_ddpm", "DiAD": "train_diad"}
# what a row may say beside the pipeline's own settings
ROW_KEYS = ("name", "calibrated", "backbone", "backbone_weights", "train", "each_category", "all_steps", "baseline")
# rows of a model that agree in these share one evaluation; the last three give DiAD another reconstruction
SHARED = ("baseline", "num_inference_steps", "strength", "scheduler")
# what acts on calibrated maps: rows that differ in nothing else share one calibration
AFTER_CALIBRATION = ("alpha", "score_fraction", "contrast", "pooling_size", "pooling_rounds")
# what belongs to the model and not to a row
FIXED = (
    "processing_resolution",
    "categories",
    "image_mean",
    "image_std",
    "latents_mean",
    "latents_std",
    "tile_size",
    "tile_overlap",
)
# in the folder of a row's own model, what it is trained with
ROW_FILE = "row.json"
# the last row of every table
PADIM = {"name": "PaDiM", "baseline": "padim"}


def create_parser() -> argparse.ArgumentParser:
    parser = FlagParser(description="Makes a table of the papers for a model and a data set.")
    parser.add_argument("--table", required=True, help=f"a table's file, or one of {table_names()}")
    parser.add_argument("--model", help="folder or Hub id of a pipeline (not for tables whose rows are trained)")
    parser.add_argument(
        "--train_config",
        metavar="FILE",
        help="YAML of flags that rows with models of their own share; --seed goes along",
    )
    add_evaluation_arguments(parser)
    parser.add_argument(
        "--output", type=local_path, default="table.json", help="gets the table, and .md beside it (table.json)"
    )
    parser.add_argument(
        "--max_statistics_images", type=POSITIVE, default=512, help="good images of a calibration (512)"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of each image's noise, and of training (0)")
    return parser


def table_names() -> str:
    """The tables that come with the package, as a list to read."""
    return ", ".join(sorted(path.name.removesuffix(".yaml") for path in TABLES.iterdir()))


def load_table(name: str) -> dict[str, Any]:
    """A table's title, source, method and rows.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: it sets what no row can.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else TABLES / f"{name}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"--table: there is no table {name!r}. Give a YAML file, or one of {table_names()}.")
    table = load_yaml(path)
    if not isinstance(table, dict) or not all(table.get(name) for name in ("title", "method", "rows")):
        raise ValueError(f"--table: {path} must set title, method and rows.")
    if table["method"] not in METHODS:
        raise ValueError(f"--table: method must be one of {', '.join(METHODS)} in {path}, not {table['method']!r}.")
    known = {*ROW_KEYS, *setting_names(METHODS[table["method"]])} - set(FIXED)
    if table["method"] == "AnomalyDenoise":
        # its denoiser predicts the features of one backbone; a table compares what acts on the denoiser's maps
        known -= {"backbone", "backbone_weights", "weights"}
    else:
        known |= {"scheduler"}  # of the reverse process, by diffusers' name of the class
    baselines = ["padim", "ddpm"] if table["method"] == "AnomalyDenoise" else ["padim"]
    for row in table["rows"]:
        unknown = sorted(set(row) - known)
        wrong_baseline = row.get("baseline", "padim") not in baselines
        switched_off = any(value is False for value in row.get("train", {}).values())
        mistakes = {
            f"sets unknown {unknown}": unknown,
            "has no name": "name" not in row,
            "asks for a scheduler that is none of diffusers'": not is_scheduler(row.get("scheduler", "DDIMScheduler")),
            f"asks for a baseline that is none of {', '.join(baselines)}": wrong_baseline,
            "says `false` under `train`, where a flag is left out": switched_off,
            "has weights and a backbone of its own, whose channels nothing has standardised": {"weights", "backbone"}
            <= set(row),
        }
        for mistake, made in mistakes.items():
            if made:
                raise ValueError(f"--table: a row of {path} {mistake}. A row takes {', '.join(sorted(known))}.")
    names = [row["name"] for row in (*table["rows"], PADIM)]
    if len(set(names)) < len(names):
        raise ValueError(f"--table: two rows of {path} have the same name, or one is called PaDiM, as the last row is.")
    own = [folder_name(row["name"]) for row in table["rows"] if "train" in row]
    if len(set(own)) < len(own):
        shared = Counter(own).most_common(1)[0][0]
        raise ValueError(
            f"--table: two rows of {path} would train their models into one folder, {shared}: give them names that "
            "differ in letters or digits."
        )
    return table


def folder_name(name: str) -> str:
    """A row's name, as its model's folder is called."""
    return re.sub(r"[^\w.]+", "-", str(name).lower()).strip("-")


def is_scheduler(name: str) -> bool:
    found = getattr(diffusers, str(name), None)
    return isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)


def load_yaml(path: Path | Any) -> dict[str, Any]:
    """What a file says; {} where it is empty.

    Raises:
        ValueError: it is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


# -- rows --------------------------------------------------------------------------------------------------------


def row_pipeline(model: DetectionPipeline, row: dict[str, Any], device: torch.device) -> DetectionPipeline:
    """A pipeline of the model's own networks with a row's settings, not calibrated."""
    if isinstance(model, AnomalyDenoisePipeline) and model.config.get("weights"):
        raise ValueError(
            "--model: a table compares what acts on the denoiser's maps, and this model joins others to them "
            "(`weights`). Give one that was trained with --no-choose."
        )
    components = {**model.components, "calibration": None}
    if "backbone" in row:
        strides = row.get("score_strides", model.feature_extractor.config.strides)
        components["feature_extractor"] = TimmFeatureExtractor.from_backbone(
            row["backbone"], strides, model.feature_extractor.config.image_size, row.get("backbone_weights")
        ).to(device)
    if "scheduler" in row:
        components["scheduler"] = getattr(diffusers, row["scheduler"]).from_config(model.scheduler.config)
    kept = {name: model.config[name] for name in setting_names(type(model))}
    if "weights" in kept:  # of the features' own maps, which a table is about where its rows say so
        kept["weights"] = None
    changed = {name: value for name, value in row.items() if name in kept}
    pipeline = type(model)(**components, **{**kept, **changed})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure_rows(
    pipelines: Sequence[DetectionPipeline],
    pixel_values: torch.Tensor,
    category: torch.Tensor,
    generators: Sequence[torch.Generator],
) -> Iterator[Measurement]:
    """Each row's measurement of a batch, from one pass of the networks they share."""
    first = pipelines[0]
    if isinstance(first, DiADPipeline):
        reconstruction = first.reconstruct(pixel_values, generators)
        for pipeline in pipelines:
            yield pipeline.compare(pixel_values, reconstruction)
        return
    resolution = as_size(first.processing_resolution)
    noise_levels = sorted({timestep for pipeline in pipelines for timestep in pipeline.config.timesteps})
    noise = draw_noise((len(noise_levels), 3, *resolution), generators, pixel_values.device)
    # with an alpha at which both maps count
    of_all = {"timesteps": noise_levels, "weights": None, "alpha": 0.5, "score_strides": None}
    everything = with_settings(first, **of_all).measure(pixel_values, noise, category)
    assert everything.residual is not None
    layers = everything.residual.split(first.feature_extractor.layer_channels, dim=2)  # L of (N, T, C_i, h, w)
    for pipeline in pipelines:
        chosen = [noise_levels.index(timestep) for timestep in pipeline.config.timesteps]
        residual = torch.cat([layers[i][:, chosen] for i in pipeline.scored_layers], dim=2)
        yield Measurement(everything.maps[:, chosen], residual)


def to_pixel_values(images: Iterable[Any], pipeline: DetectionPipeline, device: torch.device) -> torch.Tensor:
    """Images as the networks of `pipeline` take them, (N, 3, R, R) in [-1, 1]."""
    return images_to_pixel_values(
        ImageSequence(list(images), pipeline.value_range), as_size(pipeline.input_resolution)
    ).to(device)


@torch.no_grad()
def calibrate_rows(
    pipelines: Sequence[DetectionPipeline],
    good: Dataset,
    category: int,
    accelerator: Accelerator,
    batch_size: int,
    seed: int,
) -> None:
    """Gives each row's pipeline a calibration, without thresholds; all processes share the images."""
    fits: dict[tuple[Any, ...], tuple[DetectionPipeline, CalibrationFit]] = {}
    for pipeline in pipelines:
        fits.setdefault(calibration_key(pipeline), (pipeline, pipeline.calibration_fit(category, 1, 0.5, accelerator)))
    fitted = [pipeline for pipeline, _ in fits.values()]
    mine = process_share(len(good), accelerator)
    chosen = mine or range(1)  # whose measurement tells the shapes
    for start in range(0, len(chosen), batch_size):
        batch = chosen[start : start + batch_size]
        pixel_values = to_pixel_values((good[i]["image"] for i in batch), fitted[0], accelerator.device)
        of_category = torch.full((len(batch),), category, device=accelerator.device)
        generators = [image_generator(seed, i) for i in batch]
        measurements = measure_rows(fitted, pixel_values, of_category, generators)
        for (_, fit), measurement in zip(fits.values(), measurements, strict=True):
            fit.add_statistics(measurement if mine else empty_measurement(measurement))
    calibrations = {key: fit.set_statistics() for key, (_, fit) in fits.items()}
    for pipeline in pipelines:
        pipeline.register_modules(calibration=calibrations[calibration_key(pipeline)])


def calibration_key(pipeline: DetectionPipeline) -> tuple[Any, ...]:
    """What a row's calibration depends on: its features and settings."""
    settings = [name for name in setting_names(type(pipeline)) if name not in AFTER_CALIBRATION]
    return id(pipeline.feature_extractor), *(str(pipeline.config[name]) for name in settings)


def evaluate_rows(
    model: DetectionPipeline,
    rows: Sequence[dict[str, Any]],
    good: Dataset | None,
    images: Dataset,
    category: str,
    accelerator: Accelerator,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Metrics of rows of a model that share their work (see `SHARED`), on one category.

    Raises:
        ValueError: there are too few good training images to calibrate the rows with.
    """
    limits = (args.resolution, args.pro_fpr_limit, args.batch_size)
    if "baseline" in rows[0]:
        result = evaluate_baseline(rows[0]["baseline"], model, good, images, category, accelerator, *limits)
        return [result] * len(rows)
    pipelines = [row_pipeline(model, row, accelerator.device) for row in rows]
    index = category_index(model, category)
    calibrated = [pipeline for pipeline, row in zip(pipelines, rows, strict=True) if row.get("calibrated", True)]
    if calibrated:
        if not good:
            raise ValueError(
                f"--data: {args.data} has no good training images of {category} to calibrate the rows with. Add them, "
                "or set `calibrated: false` in the table."
            )
        if len(good) > args.max_statistics_images:
            good = good.shuffle(seed=args.seed).select(range(args.max_statistics_images))
        calibrate_rows(calibrated, good, index, accelerator, args.batch_size, args.seed)

    def detect(pictures: list[Any], places: list[int]) -> list[SimpleNamespace]:
        pixel_values = to_pixel_values(pictures, pipelines[0], accelerator.device)
        indices = torch.full((len(pictures),), index, device=accelerator.device)
        generators = [image_generator(args.seed, i) for i in places]
        outputs = []
        measurements = measure_rows(pipelines, pixel_values, indices, generators)
        for pipeline, measurement in zip(pipelines, measurements, strict=True):
            maps = pipeline.score_maps(measurement, indices, pipeline.calibration)
            joined = pipeline.join_maps(maps, indices, pipeline.calibration)
            anomaly_map, scores = pipeline.score_inside(joined, indices)
            outputs.append(SimpleNamespace(anomaly_map=anomaly_map, anomaly_score=scores))
        return outputs

    evaluations = evaluate_detectors(detect, len(rows), images, category, accelerator, *limits)
    return [evaluation.result for evaluation in evaluations]


def train_row(
    table: dict[str, Any], row: dict[str, Any], category: str | None, num_categories: int, args: argparse.Namespace
) -> Path:
    """The folder of a row's own model, trained now where it is not there; in a process of its own.

    Raises:
        ValueError: it has to be trained, and cannot be; or what is there was trained with other flags.
    """
    name = "-".join(filter(None, [folder_name(row["name"]), category]))
    folder = Path(args.output).with_suffix("") / name
    is_trained = (folder / "model_index.json").is_file()
    chosen = [category] if category else args.category
    config = Path(args.train_config or "")
    configuration = load_yaml(config) if config.is_file() else None
    data = os.path.realpath(args.data) if Path(args.data).exists() else args.data
    asked = {"seed": args.seed, "data": data, "category": chosen, "train_config": configuration, "train": row["train"]}
    if is_trained or list_checkpoints(folder):
        check_row(folder, asked)
    if is_trained:
        return folder
    if configuration is None:
        raise ValueError(
            f"--train_config must be a file of training flags: the row {row['name']!r} trains a model of its own."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("Rows train in one process. Run this once without `accelerate launch`, then with it.")
    if args.dataset is not None:
        raise ValueError("--dataset cannot be forced on training: it finds the layout of --data by itself.")
    flags: list[str] = ["--train_data_dir", args.data, "--output_dir", str(folder), "--seed", str(args.seed)]
    if args.mixed_precision is not None:
        flags += ["--mixed_precision", args.mixed_precision]
    if row.get("all_steps"):  # as many as one model for each category takes together
        if "max_train_steps" not in configuration:
            raise ValueError(f"--train_config: {args.train_config} must set max_train_steps for a row with all_steps.")
        flags += ["--max_train_steps", str(configuration["max_train_steps"] * num_categories)]
    flags += ["--category", *chosen] if chosen else []
    flags += ["--tile_size", "none"] if table["method"] == "AnomalyDenoise" else []  # rows score whole images
    for flag, value in row["train"].items():
        values = value if isinstance(value, list) else [value]
        flags += [f"--{flag}", *map(str, [] if value is True else values)]
    module = f"diffad.training.{SCRIPTS[table['method']]}"
    command = [sys.executable, "-m", module, "--config", args.train_config, *flags]
    command += ["--resume_from_checkpoint", "latest"]
    print(f"{row['name']}: training {folder}", flush=True)
    write_files(folder / ROW_FILE, {".json": json.dumps(asked, indent=2, default=str) + "\n"})
    subprocess.run(command, check=True)
    return folder


def check_row(folder: Path, asked: dict[str, Any]) -> None:
    """Raises a ValueError where a row's model in `folder` was trained with other flags than `asked` for now.

    Without `ROW_FILE`, as earlier versions left it, only the seed is known. Without --train_config, any is taken.
    """
    known: dict[str, Any] = {}
    if (path := folder / ROW_FILE).is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
    elif (path := folder / TRAINING_NAME).is_file():
        arguments = json.loads(path.read_text(encoding="utf-8"))["arguments"]
        known = {name: value for name, value in arguments.items() if name == "seed"}
    asked = json.loads(json.dumps(asked, default=str))
    for name, value in known.items():
        if asked[name] == value or (name == "train_config" and asked[name] is None):
            continue
        what = "another `train` of its row" if name == "train" else f"another --{name}"
        values = "" if name == "train_config" else f" ({json.dumps(value)}, not {json.dumps(asked[name])})"
        raise ValueError(f"--output: {folder} was trained with {what}{values}. Give that, or choose another --output.")


def check_table_path(path: Path) -> None:
    """Raises a ValueError where a table at `path`, or its .md beside it, would replace another program's files."""
    if path.suffix != ".json":
        raise ValueError(f"--output must end in .json, but is {path}.")
    if path.is_dir():
        raise ValueError(f"--output must be a file, but {path} is a folder.")
    if not path.exists():
        if (beside := path.with_suffix(".md")).exists():
            raise ValueError(f"--output: {beside} would be replaced, and is of no table. Give another file.")
        return
    if not isinstance(read_json_object(path).get("rows"), list):
        raise ValueError(f"--output: {path} is no table of make_table.py, and would be replaced. Give another file.")


def row_folders(
    table: dict[str, Any], row: dict[str, Any], categories: Sequence[str], args: argparse.Namespace
) -> dict[str, str | Path]:
    """The model that a row has for each category, as its folder or Hub id; trained now where it is the row's own."""
    if "train" not in row:
        return dict.fromkeys(categories, args.model)
    if not row.get("each_category"):
        return dict.fromkeys(categories, train_row(table, row, None, len(categories), args))
    return {category: train_row(table, row, category, len(categories), args) for category in categories}


# -- the table ---------------------------------------------------------------------------------------------------


def markdown(table: dict[str, Any]) -> str:
    """Title, source, and a row for each setting: its metrics, averaged over categories."""
    heading = f"{table['title']}\n\nSource: {table['source']}. Data: {table['data']}.\n\n"
    return heading + markdown_table({row["name"]: row["results"][MEAN] for row in table["rows"]}, "row")


def load_model(path: str | Path, method: str, device: torch.device) -> DetectionPipeline:
    """A saved pipeline on its device.

    Raises:
        ValueError: it is not of `method`, has no features to score with, or looks at a region or at tiles.
    """
    pipeline = load_pipeline(path)
    if not isinstance(pipeline, METHODS[method]):
        raise ValueError(f"--model: this table is about {method}, but {path} holds a {type(pipeline).__name__}.")
    if pipeline.unet is None:
        raise ValueError(f"--model: {path} has no denoiser, whose settings tables compare.")
    if pipeline.feature_extractor is None:
        raise ValueError(
            f"--model: {path} has no feature extractor, and features are what it is scored with. Give it one: "
            "pipe.register_modules(feature_extractor=TimmFeatureExtractor.from_backbone('resnet50', (4, 8, 16))), and "
            "save it again."
        )
    if pipeline.region is not None:
        raise ValueError(
            f"--model: {path} has a region of interest, and tables score whole images alone. Give a model that was "
            "trained without --roi."
        )
    if pipeline.tile_size is not None:
        raise ValueError(
            f"--model: {path} looks at images in tiles, and tables score whole images alone. Give a model that was "
            "trained with --tile_size none."
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = create_parser()
    args = parser.parse_args(argv)
    table = load_table(args.table)
    check_table_path(Path(args.output))
    if args.model is None and not all("train" in row for row in table["rows"]):
        raise ValueError("--model is needed: not every row of this table trains its own.")

    # 1. Data, and the models that rows train for themselves
    images = load_anomaly_dataset(args.data, "test", args.category, args.dataset, args.on_bad_image)
    value_range = dataset_value_range(images)
    tests = split_by_category(images)
    folders = [row_folders(table, row, list(tests), args) for row in table["rows"]]
    limit_threads()
    accelerator = Accelerator(mixed_precision=resolve_precision(args.mixed_precision))
    args.mixed_precision = checked_precision(accelerator)  # also where accelerate's own settings say so
    tell_of_one_kind(tests, accelerator)
    goods = split_by_category(
        load_training_images(args.data, args.category, args.dataset, images, accelerator, args.on_bad_image)
    )

    # 2. Model by model, category by category; rows that share the networks' work together
    rows = [*table["rows"], PADIM]
    folders.append(folders[0])  # PaDiM looks at the features that the first row does
    results: list[dict[str, Any]] = [{} for _ in rows]
    for folder in dict.fromkeys(folder for of_category in folders for folder in of_category.values()):
        model = load_model(folder, table["method"], accelerator.device)
        model.register_to_config(value_range=model.value_range or value_range)  # rows have no calibration yet
        for category, test in tests.items():
            groups: dict[tuple, list[int]] = {}
            for i, row in enumerate(rows):
                if folders[i][category] == folder:
                    groups.setdefault(tuple(row.get(name) for name in SHARED), []).append(i)
            for group in groups.values():
                of_group = [rows[i] for i in group]
                with accelerator.autocast():
                    evaluated = evaluate_rows(model, of_group, goods.get(category), test, category, accelerator, args)
                for i, result in zip(group, evaluated, strict=True):
                    results[i][category] = result

    # 3. The table
    entries = [
        {
            "name": row["name"],
            "settings": {name: value for name, value in row.items() if name != "name"},
            "results": with_mean(of_category),
        }
        for row, of_category in zip(rows, results, strict=True)
    ]
    if not any(results[-1].values()):
        entries.pop()
    report = {
        "title": table["title"],
        "source": table.get("source", "none of the papers"),
        "model": args.model,
        "data": args.data,
        "seed": args.seed,
        "resolution": args.resolution,
        "pro_fpr_limit": args.pro_fpr_limit,
        "mixed_precision": accelerator.mixed_precision,
        "command": command_line("diffad.training.make_table", args, parser),
        "processes": accelerator.num_processes,
        "machine": describe_machine(),
        "rows": entries,
    }
    if accelerator.is_main_process:
        path = Path(args.output)
        write_files(path, {".md": markdown(report), path.suffix: json.dumps(report, indent=2) + "\n"})
        print(markdown(report) + f"Table: {path}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return report


if __name__ == "__main__":
    main()
